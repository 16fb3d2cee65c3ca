"""Artefacts that are damaged, incomplete, of other data or of another time: each is refused by name, and whole again it works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load, save

from kdprune_data.formats import manifest as m
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

DATA, SUBSET, TEACHER, SCORES = "data/train", "subsets/random-0.5-s0", "teachers/resnet8-s0", "scores/resnet8-s0"
CACHE, STUDENT = "logits/random-0.5-s0--resnet8-s0", "students/random-0.5-s0--resnet8-a0.6204-s0"
SELECT = ["select", "--frac", "0.25"]
RANKED = [*SELECT, "--method", "el2n"]
TRAIN = ["teacher", "--model", "resnet8", "--steps", "1", "--name", "other"]
SCORE, FILL = ["score", "--name", "other"], ["cache", "--name", "other", "--views", "1"]
DISTILL = ["distill", "--model", "resnet8", "--steps", "1", "--name", "other"]
AGAIN = r"(make or fetch|fetch) .*again"

Prepare = Callable[[Path, Any], object]


def wrote(path: str, data: bytes) -> Prepare:
    return lambda w, real: real.put(w / path, data)


def gone(path: str) -> Prepare:
    return lambda w, _: (w / path).unlink()


def moved(path: str) -> Prepare:
    return lambda w, _: (w / path).rename(w / f"{path}.old")


def blank(path: str, byte: bytes = b"x") -> Prepare:
    """As long as it was, and nothing of what it was."""
    return lambda w, _: (w / path).write_bytes(byte * (w / path).stat().st_size)


def flipped(path: str) -> Prepare:
    """With one bit in the middle turned round."""

    def prepare(w: Path, _: Any) -> None:
        data = bytearray((w / path).read_bytes())
        data[len(data) // 2] ^= 1
        (w / path).write_bytes(data)

    return prepare


def signed(folder: str, **change: Any) -> Prepare:
    return lambda w, real: real.sign(w / folder, **change)


def weights(value: float, file: str = f"{TEACHER}/model.safetensors") -> Prepare:
    """Weights of which one is no finite number, in a folder that says they are its own."""

    def prepare(w: Path, real: Any) -> None:
        tensors = load((w / file).read_bytes())
        tensors["linear.weight"].flat[3] = value
        (w / file).write_bytes(save(tensors))
        _own(w / file, real)

    return prepare


def recorded(value: float) -> Prepare:
    """A recorded score that is no finite number, in a folder that says it is its own."""

    def prepare(w: Path, real: Any) -> None:
        file = w / SCORES / "part-000000.parquet"
        table = pq.read_table(file)
        at = table.schema.get_field_index("el2n")
        values = table["el2n"].to_numpy().copy()
        values[2] = value
        pq.write_table(table.set_column(at, table.schema.field("el2n"), pa.array(values)), file)
        _own(file, real)

    return prepare


def _own(file: Path, real: Any) -> None:
    """Put a file's size and digest into the manifest beside it, and the digest that follows."""
    body = json.loads((file.parent / m.NAME).read_bytes())
    for one in body["files"]:
        if one["path"] == file.name:
            one |= {"bytes": file.stat().st_size, "sha256": m.sha256_file(file)}
    keys = ("format", "kind", "config", "counts", "classes", "files")
    named = {"inputs": [[i["role"], i["digest"]] for i in body["inputs"]], "outside": [[f["bytes"], f["sha256"]] for f in body["outside"]]}
    real.sign(file.parent, files=body["files"], digest=m.sha256_json({key: body[key] for key in keys} | named))


def foreign(value: float | None) -> Prepare:
    """Somebody's file of scores, one of them like this."""

    def prepare(w: Path, _: Any) -> None:
        ids = Dataset.open(w / DATA).ids.tolist()
        pq.write_table(pa.table({"id": ids, "mine": pa.array([value, *range(len(ids) - 1)], pa.float64())}), w / "theirs.parquet")

    return prepare


def other_data(w: Path, real: Any) -> None:
    """The training data give way to others of the same classes."""
    shutil.rmtree(w / "data")
    _import(w, real, 300)


def _import(w: Path, real: Any, first: int) -> None:
    from kdprune_pipelines import import_

    for n in range(first, first + 40):
        real.put(w / "more" / str(real.labels[n]) / f"{n:04d}.png", real.image(n))
    import_.run(import_.ImportConfig.from_dict({"source": str(w / "more"), "out": w / DATA}))
    shutil.rmtree(w / "more")


FOREIGN = [*SELECT, "--scores", "theirs.parquet", "--column", "mine", "--hard", "high"]
DEEP = b'{"a":' * 100_000

REFUSED: list[tuple[str, Prepare, list[str], int, str]] = [
    *(
        (
            f"{kind} of the future",
            signed(folder, format=2),
            line,
            1,
            rf"{folder}/manifest.json is of another format than 1: use the version of",
        )
        for kind, folder, line in (
            ("data", DATA, SELECT),
            ("a subset", SUBSET, DISTILL),
            ("a teacher", TEACHER, SCORE),
            ("scores", SCORES, RANKED),
            ("a cache", CACHE, DISTILL),
            ("a student", STUDENT, ["evaluate", STUDENT]),
        )
    ),
    (
        "signed in another way",
        wrote(f"{DATA}/manifest.json", b'{"format":3}'),
        SELECT,
        1,
        r"is of another format than 1: use the version of",
    ),
    *(
        (
            f"a manifest of {text[:6]!r}",
            wrote(f"{DATA}/manifest.json", text),
            SELECT,
            1,
            rf"{DATA}/manifest.json is not a manifest .*: {AGAIN}",
        )
        for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", DEEP)
    ),
    (
        "a changed manifest",
        lambda w, _: _edit(w / DATA / m.NAME),
        SELECT,
        1,
        rf"{DATA}/manifest.json was changed: its sha256 is not .*; {AGAIN}",
    ),
    (
        "a digest of other contents",
        signed(DATA, digest="0" * 64),
        SELECT,
        1,
        rf"{DATA}/manifest.json states digest 000000000000, .*{AGAIN}",
    ),
    ("counts that are a list", signed(DATA, counts=[1]), SELECT, 1, rf"{DATA}/manifest.json is not a manifest .*: {AGAIN}"),
    ("a file outside", signed(DATA, files=[{"path": "../x", "bytes": 1, "sha256": ""}]), SELECT, 1, r"lists a file outside the folder"),
    ("a neighbour is damaged", wrote(f"{SUBSET}/manifest.json", b"{"), FILL, 1, rf"{SUBSET}/manifest.json is not a manifest .*: {AGAIN}"),
    ("no manifest", gone(f"{DATA}/manifest.json"), SELECT, 2, r"no data/train here: run `kdprune-data import SOURCE --split train` first"),
    ("no index", gone(f"{DATA}/index.parquet"), SELECT, 1, rf"{DATA}/index.parquet is missing: .*{AGAIN}"),
    ("no shard", gone(f"{DATA}/shard-000001.tar"), SELECT, 1, rf"{DATA}/shard-000001.tar is missing: .*{AGAIN}"),
    (
        "a shorter shard",
        wrote(f"{DATA}/shard-000001.tar", b"x"),
        SELECT,
        1,
        rf"{DATA}/shard-000001.tar has 1 bytes, the manifest says .*{AGAIN}",
    ),
    ("a blank index", blank(f"{DATA}/index.parquet"), SELECT, 1, rf"{DATA}/index.parquet cannot be read as Parquet .*{AGAIN}"),
    ("a blank shard", blank(f"{DATA}/shard-000001.tar"), TRAIN, 1, rf"{DATA}/shard-000001.tar was changed: sample .*{AGAIN}"),
    ("no scores", gone(f"{SCORES}/part-000001.parquet"), RANKED, 1, rf"{SCORES}/part-000001.parquet is missing: .*{AGAIN}"),
    ("no weights", gone(f"{TEACHER}/model.safetensors"), SCORE, 1, rf"{TEACHER}/model.safetensors is missing: .*{AGAIN}"),
    ("no rows", gone(f"{CACHE}/rows/shard-000000.parquet"), DISTILL, 1, rf"{CACHE}/rows/shard-000000.parquet is missing: .*{AGAIN}"),
    ("no views", gone(f"{CACHE}/views-0000-0002/shard-000000.arrow"), DISTILL, 1, rf"{CACHE}/views-0000-0002/.* is missing: .*{AGAIN}"),
    ("blank weights", blank(f"{TEACHER}/model.safetensors"), SCORE, 1, rf"{TEACHER}/model.safetensors was changed: .*again"),
    (
        "blank views",
        blank(f"{CACHE}/views-0000-0002/shard-000000.arrow"),
        DISTILL,
        1,
        rf"{CACHE}/views-0000-0002/shard-000000.arrow .*again",
    ),
    ("blank rows", blank(f"{CACHE}/rows/shard-000000.parquet"), DISTILL, 1, rf"{CACHE}/rows/shard-000000.parquet cannot be read .*again"),
    ("a flipped bit of scores", flipped(f"{SCORES}/part-000001.parquet"), RANKED, 1, rf"{SCORES}/part-000001.parquet was changed: .*again"),
    ("a flipped bit of weights", flipped(f"{TEACHER}/model.safetensors"), SCORE, 1, rf"{TEACHER}/model.safetensors was changed: .*again"),
    ("a flipped bit of a subset", flipped(f"{SUBSET}/selection.parquet"), DISTILL, 1, rf"{SUBSET}/selection.parquet was changed: .*again"),
    ("blank scores", blank(f"{SCORES}/part-000000.parquet"), RANKED, 1, rf"{SCORES}/part-000000.parquet was changed: .*again"),
    *(
        (
            f"a weight that is {value}, {line[0]}",
            weights(value),
            line,
            1,
            r"model.safetensors holds numbers that are not finite .*; use others",
        )
        for value in (float("nan"), float("inf"))
        for line in (SCORE, FILL, ["evaluate", TEACHER])
    ),
    *(
        (
            f"a recorded {value}",
            recorded(value),
            RANKED,
            1,
            rf"{SCORES} has no finite score for 1 sample \('.*'\): every candidate needs a finite",
        )
        for value in (float("nan"), float("inf"), float("-inf"))
    ),
    *(
        (
            f"a foreign {value}",
            foreign(value),
            FOREIGN,
            1,
            r"theirs.parquet has no finite score for 1 sample \('.*'\): every candidate needs",
        )
        for value in (float("nan"), float("inf"), None)
    ),
    (
        "scores of other data",
        other_data,
        [*RANKED, "--scores", SCORES],
        1,
        rf"{SCORES} scores other data than {DATA}: run `kdprune-data score",
    ),
    ("no scores of these data", other_data, RANKED, 2, r"no fitting score in scores/: run `kdprune-data score` first, or give a folder"),
    ("a cache of other data", other_data, ["distill", DATA, "--logits", CACHE, *DISTILL[1:]], 1, rf"{CACHE} .*(sample|other)"),
    (
        "a teacher without cache",
        other_data,
        ["distill", DATA, "--teacher", TEACHER, *DISTILL[1:]],
        1,
        r"no cache .*: run `kdprune-data cache",
    ),
]


def _edit(manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes().replace(b'"name":"train"', b'"name":"Train"'))


@pytest.mark.parametrize(("name", "prepare", "line", "code", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_an_artefact_that_is_refused(
    chain: Path, chain_copy: Path, real: Any, refuses: Any, works: Any, name: str, prepare: Prepare, line: list[str], code: int, said: str
) -> None:
    prepare(chain_copy, real)
    refuses(chain_copy, line, code, said)
    if "theirs.parquet" in line:
        foreign(0.5)(chain_copy, real)
    elif "other data" in name or "these data" in name or "without cache" in name:
        return
    for folder in ("data", "subsets", "teachers", "scores", "logits", "students"):
        shutil.rmtree(chain_copy / folder)
        shutil.copytree(chain / folder, chain_copy / folder)
    works(chain_copy, *line)


# --- other classes, other places


@pytest.fixture
def other_classes(chain_copy: Path, real: Any, works: Any) -> Path:
    """A workspace with a second data set, `cats`, of other classes."""
    real.folders(chain_copy / "source", 12)
    works(chain_copy, "import", "source", "--out", "cats")
    return chain_copy


@pytest.mark.parametrize(
    "line",
    [["score", "--data", "cats", "--teacher", TEACHER], ["cache", "cats"], ["evaluate", STUDENT, "--data", "cats"]],
    ids=lambda v: v[0],
)
def test_data_of_other_classes(other_classes: Path, refuses: Any, line: list[str]) -> None:
    refuses(
        other_classes,
        line,
        1,
        r"cats has 10 classes \(digit-0, .*\), .* 10 \(0, 1, 2, ...\): use data with the same classes in the same order",
    )


def test_validation_data_of_other_classes(other_classes: Path, refuses: Any) -> None:
    refuses(other_classes, [*TRAIN, "--val", "cats"], 1, r"cats has 10 classes .*: use data with the same classes in the same order")


@pytest.mark.parametrize("line", [["distill"], ["cache"], ["select"], ["teacher"]], ids=lambda v: v[0])
def test_an_ids_only_subset_whose_parent_has_moved(chain_copy: Path, refuses: Any, works: Any, line: list[str]) -> None:
    works(chain_copy, *SELECT, "--ids-only", "--name", "ids")
    (chain_copy / DATA).rename(chain_copy / "data/old")
    more = {
        "distill": ["subsets/ids", *DISTILL[1:], "--logits", "none"],
        "cache": ["subsets/ids", *FILL[1:]],
        "select": ["subsets/ids", "--frac", "0.5", "--name", "other"],
        "teacher": ["--data", "subsets/ids", *TRAIN[1:]],
    }[line[0]]
    refuses(chain_copy, [*line, *more], 1, r"data/train/shard-00000\d.tar does not exist: it may have been moved; fetch it or index")
    (chain_copy / "data/old").rename(chain_copy / DATA)
    works(chain_copy, *line, *more)


def test_a_checkpoint_of_other_data(chain_copy: Path, real: Any, refuses: Any) -> None:
    """An unfinished teacher is not continued on other data."""
    there = chain_copy / TEACHER
    identity = Manifest.load(there)
    inputs = {i["role"]: i["digest"] for i in identity.inputs}
    shutil.rmtree(there)
    real.put(
        there / ".partial/identity.json", m.canonical({"kind": "model", "config": identity.config, "inputs": inputs | {"data": "0" * 64}})
    )
    line = ["teacher", "--model", "resnet8", "--epochs", "3", "--batch", "16"]
    before = sorted(there.rglob("*"))
    refuses(chain_copy, ["score", "--teacher", TEACHER], 2, rf"{TEACHER} is unfinished: run the command that makes it again, it continues")
    assert sorted(there.rglob("*")) == before
    (there / ".partial/lock").touch()
    (there / ".partial/parts").mkdir()
    refuses(
        chain_copy, line, 2, rf"{TEACHER} holds an unfinished run with other settings \(input data is 000000000000.*\): use --name .*, or"
    )


def test_a_number_that_is_no_score(chain_copy: Path, real: Any, refuses: Any) -> None:
    """Foreign files: texts for numbers, ids twice, none of ours."""
    ids = Dataset.open(chain_copy / DATA).ids.tolist()
    for columns, code, said in (
        ({"id": ids, "mine": ["a"] * len(ids)}, 1, r"theirs.parquet: column 'mine' is string: scores must be numbers"),
        ({"id": [ids[0], *ids[:-1]], "mine": range(len(ids))}, 1, r"theirs.parquet lists '.*' more than once: give each sample one score"),
        (
            {"id": [f"x{n}" for n in ids], "mine": range(len(ids))},
            1,
            r"theirs.parquet has no score for 108 samples of .*: score this data set",
        ),
        ({"mine": range(len(ids))}, 2, r"theirs.parquet has no column id or key or uid .*; rename the id column"),
        ({"id": ids}, 2, r"theirs.parquet has no column 'mine': it has id"),
    ):
        pq.write_table(pa.table({key: pa.array(list(values)) for key, values in columns.items()}), chain_copy / "theirs.parquet")
        refuses(chain_copy, FOREIGN, code, said)
    real.put(chain_copy / "theirs.parquet", b"PAR1 not")
    refuses(chain_copy, FOREIGN, 1, r"theirs.parquet cannot be read as Parquet .*: give another file")
    np.save(chain_copy / "ids.npy", np.asarray([1.5]))
    refuses(
        chain_copy,
        ["select", "--keys", "ids.npy"],
        1,
        r"ids.npy is float64 of shape \(1,\): expected one row of texts \(ids\) or of uint64",
    )


def test_a_file_where_its_folder_is_asked_for(chain: Path, refuses: Any) -> None:
    refuses(chain, ["info", "data/train/index.parquet"], 2, r"data/train/index.parquet is a file: give the folder it stands in")


def test_the_command_that_made_it_names_the_way_to_make_it_again(chain_copy: Path, refuses: Any, works: Any) -> None:
    (chain_copy / "subsets/random-0.5-s0/index.parquet").unlink()
    line = ["select", "--frac", "0.5"]
    refuses(chain_copy, line, 1, r"index.parquet is missing: .*\(this command makes it again with --overwrite\)")
    works(chain_copy, *line, "--overwrite")
