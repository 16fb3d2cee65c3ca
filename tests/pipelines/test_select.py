"""pipelines/select.py: the subset that docs/formats.md describes, records byte for byte, from whatever it is chosen and by whatever."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import import_, index, select, verify
from kdprune_pipelines._console import Outcome

from kdprune_data import order
from kdprune_data.errors import ExistsError, FormatError, KdpruneError, MismatchError, SourceError, UsageError
from kdprune_data.formats import copying, subset
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import Manifest, sha256_file
from kdprune_data.formats.shards import Limits

Digests = Callable[[Path], dict[str, str]]


def run(data: Path, out: Path, **settings: Any) -> Outcome:
    return select.run(select.SelectConfig.from_dict({"data": data, "out": out} | settings))


def refusal(kind: type[KdpruneError], data: Path, out: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        run(data, out, **settings)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def records(read: Dataset) -> list[bytes]:
    """The bytes of every sample's record."""
    tars = [path.read_bytes() for path in read.shard_paths]
    columns = (read.index[name].to_pylist() for name in ("shard", "offset", "length"))
    return [tars[shard][offset : offset + length] for shard, offset, length in zip(*columns, strict=True)]


@pytest.fixture(scope="module")
def train(digits: Path) -> Path:
    return digits / "data" / "train"


# --- what is kept, and how


@pytest.mark.parametrize("frac", ["0.1", "0.3", "0.5", "1"])
@pytest.mark.parametrize("balance", ["class", "none"])
def test_a_subset_is_the_parents_records_in_the_parents_order(train: Path, tmp_path: Path, frac: str, balance: str) -> None:
    run(train, tmp_path / "x", frac=frac, balance=balance, shard_samples=150)
    parent, kept = Dataset.open(train), Dataset.open(tmp_path / "x")
    assert len(kept) == int(Fraction(frac) * len(parent) + Fraction(1, 2))
    rows = order.locate(parent.uids, kept.uids)
    assert (np.diff(rows) > 0).all()
    assert records(kept) == [one for row, one in enumerate(records(parent)) if row in set(rows.tolist())]
    assert all(path.stat().st_size == sum(map(len, found)) + 1024 for path, found in zip(kept.shard_paths, by_shard(kept), strict=True))
    for name in ("id", "key", "uid", "label", "length", "image_length", "sha256", "width", "height", "ok"):
        assert kept.index[name].to_pylist() == [parent.index[name][row].as_py() for row in rows]


def by_shard(read: Dataset) -> list[list[bytes]]:
    found = records(read)
    return [[found[row] for row in np.flatnonzero(read.shards == shard)] for shard in range(len(read.shard_paths))]


def test_the_manifest_and_the_tables_of_a_subset(train: Path, tmp_path: Path) -> None:
    run(train, tmp_path / "x", frac="0.25", seed=7)
    parent, kept = Dataset.open(train), Dataset.open(tmp_path / "x")
    found = kept.manifest
    assert (found.kind, found.name, list(found.classes)) == ("subset", "x", list(parent.classes))
    assert found.config == {
        "method": "random",
        "balance": "class",
        "frac": "0.25",
        "seed": 7,
        "ids_only": False,
        "shard_samples": 10_000,
        "shard_bytes": 256_000_000,
    }
    assert (found.counts["candidates"], found.counts["kept"]) == (len(parent), len(kept))
    (data,) = found.inputs
    assert (data["role"], data["digest"], data["content"]) == ("data", parent.manifest.digest, parent.manifest.content)
    selection = pq.read_table(tmp_path / "x" / "selection.parquet")
    assert {f.name: str(f.type) for f in selection.schema} == {
        "id": "string",
        "uid": "uint64",
        "sha256": "fixed_size_binary[32]",
        "label": "int32",
        "score": "float",
        "weight": "float",
    }
    for name in ("id", "uid", "sha256", "label"):
        assert selection[name].equals(kept.index[name])
    assert selection["score"].null_count == len(kept)
    assert set(selection["weight"].to_pylist()) == {1.0}
    ranking = pq.read_table(tmp_path / "x" / "ranking.parquet")
    assert ranking["id"].to_pylist() == parent.ids.tolist()
    assert sorted(ranking["rank"].to_pylist()) == list(range(len(parent)))
    first = {i for i, rank in zip(ranking["id"].to_pylist(), ranking["rank"].to_pylist(), strict=True) if rank < len(kept)}
    assert first == set(kept.ids)
    assert [f.path for f in found.side] == ["README.md", "log.txt", "ranking.parquet"]


def test_the_class_proportions_are_kept(train: Path, tmp_path: Path) -> None:
    run(train, tmp_path / "x", frac="0.1")
    parent, kept = Dataset.open(train).manifest.counts, Dataset.open(tmp_path / "x").manifest.counts
    for whole, part in zip(parent["per_class"], kept["per_class"], strict=True):
        assert abs(part - Fraction(whole * kept["kept"], parent["ok"])) <= 1
    run(train, tmp_path / "y", frac="0.1", balance="uniform")
    assert set(Dataset.open(tmp_path / "y").manifest.counts["per_class"]) <= {12, 13}


@pytest.mark.parametrize("balance", ["class", "uniform", "none"])
def test_smaller_fractions_are_inside_larger_ones(train: Path, tmp_path: Path, balance: str) -> None:
    before: set[str] = set()
    for frac in ("0.05", "0.1", "0.3", "0.7"):
        run(train, tmp_path / frac, frac=frac, balance=balance, ids_only=True)
        now = set(Dataset.open(tmp_path / frac).ids)
        assert before < now
        before = now


def test_the_choice_does_not_depend_on_the_packing(tmp_path: Path) -> None:
    for name, settings in (("a", {}), ("b", {"shard_samples": 13, "seed": 5})):
        import_.run(import_.ImportConfig.from_dict({"source": "digits", "split": "test", "out": tmp_path / name / "data"} | settings))
        run(tmp_path / name / "data", tmp_path / name / "kept", frac="0.3")
    a, b = (Dataset.open(tmp_path / name / "kept") for name in ("a", "b"))
    assert set(a.ids) == set(b.ids)
    assert a.ids.tolist() != b.ids.tolist()
    assert a.manifest.content == b.manifest.content


def test_threads_change_no_byte(train: Path, tmp_path: Path, digests: Digests) -> None:
    for jobs in (1, 4):
        run(train, tmp_path / str(jobs) / "x", frac="0.5", shard_samples=37, jobs=jobs)
    assert digests(tmp_path / "1") == digests(tmp_path / "4")
    assert Manifest.load(tmp_path / "1" / "x").digest == Manifest.load(tmp_path / "4" / "x").digest


def test_unchecked_makes_the_same_subset_and_leaves_damage_to_verify(train: Path, tmp_path: Path, digests: Digests) -> None:
    parent = shutil.copytree(train, tmp_path / "train")
    for name, unchecked in (("a", False), ("b", True)):
        run(parent, tmp_path / name / "x", frac="1", unchecked=unchecked)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert Manifest.load(tmp_path / "a/x").digest == Manifest.load(tmp_path / "b/x").digest
    data = bytearray((parent / "shard-000001.tar").read_bytes())
    data[Dataset.open(parent).index["image_offset"][700].as_py() + 60] ^= 1
    (parent / "shard-000001.tar").write_bytes(data)
    assert "shard-000001.tar was changed: sample '" in refusal(SourceError, parent, tmp_path / "c", frac="1")
    run(parent, tmp_path / "c", frac="1", unchecked=True)
    found = verify.run(verify.VerifyConfig(artefact=tmp_path / "c"))
    assert not found.ok
    assert f"sample {Dataset.open(parent).ids[700]!r}: its image's sha256 is not the index's" in found.text


def test_samples_that_do_not_decode_are_no_candidates(class_folders: Path, tmp_path: Path) -> None:
    for n in range(5):
        (class_folders / "digit-0" / f"bad-{n}.png").write_bytes(b"no image")
    import_.run(import_.ImportConfig(str(class_folders), out=tmp_path / "train", on_bad="keep"))
    run(tmp_path / "train", tmp_path / "x", frac="1")
    kept = Dataset.open(tmp_path / "x")
    assert (kept.manifest.counts["candidates"], kept.manifest.counts["kept"], len(kept)) == (30, 30, 30)
    assert kept.ok.all()


@pytest.mark.parametrize("ending", ["", "x"])
def test_checksums_hold_for_sha256sum(train: Path, tmp_path: Path, ending: str) -> None:
    run(train, tmp_path / "x", frac="0.1")
    listed = [line.split("  ")[1] for line in (tmp_path / "x" / "SHA256SUMS").read_text().splitlines()]
    assert listed == ["index.parquet", "selection.parquet", "shard-000000.tar"]
    with (tmp_path / "x" / "selection.parquet").open("a") as file:
        file.write(ending)
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "x", capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name}: {'FAILED' if ending and name == 'selection.parquet' else 'OK'}" for name in listed]


# --- without tars


def test_an_ids_only_subset_reads_the_same_images(train: Path, tmp_path: Path) -> None:
    run(train, tmp_path / "tars", frac="0.2")
    run(train, tmp_path / "ids", frac="0.2", ids_only=True)
    full, thin = Dataset.open(tmp_path / "tars"), Dataset.open(tmp_path / "ids")
    assert not list((tmp_path / "ids").glob("*.tar"))
    assert thin.ids.tolist() == full.ids.tolist()
    assert [thin.image_bytes(n) for n in range(len(thin))] == [full.image_bytes(n) for n in range(len(full))]
    assert records(thin) == records(full)
    assert thin.manifest.content == full.manifest.content
    assert (tmp_path / "ids" / "selection.parquet").read_bytes() == (tmp_path / "tars" / "selection.parquet").read_bytes()


def test_an_ids_only_subset_moves_with_its_workspace(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "data", tmp_path / "a" / "data")
    run(tmp_path / "a" / "data" / "train", tmp_path / "a" / "subsets" / "x", frac="0.2", ids_only=True)
    (tmp_path / "a").rename(tmp_path / "b")
    assert Dataset.open(tmp_path / "b" / "subsets" / "x").image_bytes(3)


@pytest.mark.parametrize("linked", ["data", "subsets"])
def test_an_ids_only_subset_under_linked_folders(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: str) -> None:
    """`subsets/` on another disk, say: paths that climb out of it must not climb along the link's name."""
    work = tmp_path / "home" / "w"
    work.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (work / linked).symlink_to(tmp_path / "disk")
    shutil.copytree(digits / "data" / "val", work / "data" / "train", dirs_exist_ok=True)
    run(work / "data" / "train", work / "subsets" / "x", frac="0.2", ids_only=True)
    monkeypatch.chdir(tmp_path)
    for folder in (work / "subsets" / "x", Path("home/w/subsets/x")):
        assert Dataset.open(folder).image_bytes(0)
        assert verify.run(verify.VerifyConfig(folder)).ok


@pytest.mark.parametrize("ids_only", [False, True])
@pytest.mark.parametrize("parents_ids_only", [False, True])
def test_a_subset_of_a_subset(train: Path, tmp_path: Path, parents_ids_only: bool, ids_only: bool) -> None:
    run(train, tmp_path / "half", frac="0.5", ids_only=parents_ids_only)
    run(tmp_path / "half", tmp_path / "part", frac="0.4", ids_only=ids_only)
    whole, half, part = (Dataset.open(p) for p in (train, tmp_path / "half", tmp_path / "part"))
    assert len(part) == int(Fraction("0.4") * len(half) + Fraction(1, 2))
    assert set(part.ids) < set(half.ids) < set(whole.ids)
    rows = order.locate(whole.uids, part.uids)
    assert [part.image_bytes(n) for n in range(len(part))] == [whole.image_bytes(row) for row in rows]
    (parent,) = part.manifest.inputs
    (grandparent,) = parent["inputs"]
    assert (parent["kind"], grandparent["kind"], grandparent["content"]) == ("subset", "dataset", whole.manifest.content)


# --- again


def test_a_selection_that_was_killed_goes_on(
    train: Path, tmp_path: Path, digests: Digests, kill_midway: Callable[[str, Path, int], None]
) -> None:
    settings = {"frac": "1", "shard_samples": 2, "jobs": 2}
    out = tmp_path / "a" / "x"
    values = settings | {"data": str(train), "out": str(out)}
    kill_midway(f"from kdprune_pipelines import select; select.run(select.SelectConfig.from_dict({values}))", out, 40)
    before = {p.name: p.stat().st_mtime_ns for p in sorted(out.glob("*.tar"))[:20]}
    run(train, out, **settings)
    run(train, tmp_path / "b" / "x", **settings)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_the_same_again_and_other_settings(train: Path, tmp_path: Path, digests: Digests, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(train, tmp_path / "x", frac="0.5")
    before = digests(tmp_path)
    capsys.readouterr()
    assert run(train, tmp_path / "x", frac="0.50", jobs=4) == first
    assert "already done" in capsys.readouterr().err
    for settings, says in (
        ({"frac": "0.4"}, "(frac is 0.5, now 0.4)"),
        ({"frac": "0.5", "seed": 3}, "(seed is 0, now 3)"),
        ({"frac": "0.5", "balance": "none"}, "(balance is class, now none)"),
        ({"frac": "0.5", "ids_only": True}, "(ids_only is false, now true)"),
    ):
        with pytest.raises(ExistsError) as caught:
            run(train, tmp_path / "x", **settings)
        assert says in str(caught.value)
    with pytest.raises(ExistsError, match="input data is"):
        run(train.parent / "val", tmp_path / "x", frac="0.5")
    assert digests(tmp_path) == before


def test_names_follow_from_what_was_asked(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(digits / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def named(**settings: Any) -> str:
        return str(select.run(select.SelectConfig.from_dict(settings)).folder)

    assert named(frac="0.50") == "subsets/random-0.5-s0"
    assert named(frac="1e-1", seed=3) == "subsets/random-0.1-s3"
    assert named(frac="0.1", name="mine") == "subsets/mine"
    Path("ids.txt").write_text("\n".join(Dataset.open("data/train").ids[:13]))
    assert named(keys="ids.txt") == "subsets/keys-0.010046-s0"


# --- lists


def listed(path: Path, ids: list[str]) -> Path:
    """A list of ids in the file's own kind."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{i}\n" for i in ids) + "\n")
    elif path.suffix == ".parquet":
        column = {"by-id": "id", "by-key": "__key__", "by-uid": "uid"}[path.stem]
        pq.write_table(pa.table({"other": ids, column: order.uids_of(ids) if column == "uid" else ids}), path)
    else:
        np.save(path, {"texts": np.array(ids), "bytes": np.array(ids, "S"), "uids": order.uids_of(ids)}[path.stem])
    return path


@pytest.mark.parametrize("name", ["x.txt", "by-id.parquet", "by-key.parquet", "by-uid.parquet", "texts.npy", "bytes.npy", "uids.npy"])
@pytest.mark.parametrize("ids_only", [False, True])
def test_keys_keep_exactly_those(train: Path, tmp_path: Path, name: str, ids_only: bool) -> None:
    parent = Dataset.open(train)
    wanted = np.random.default_rng(0).choice(parent.ids, 100, replace=False).tolist()
    run(train, tmp_path / "x", keys=listed(tmp_path / name, wanted), ids_only=ids_only)
    kept = Dataset.open(tmp_path / "x")
    assert kept.ids.tolist() == [i for i in parent.ids if i in set(wanted)]
    assert kept.manifest.config["method"] == "keys"
    assert (kept.manifest.counts["candidates"], kept.manifest.counts["kept"]) == (len(parent), 100)
    assert not (tmp_path / "x" / "ranking.parquet").exists()


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("x.txt", b"", SourceError, "lists no ids: nothing to keep"),
        ("x.txt", b"GOOD\nGOOD\n", SourceError, "more than once: a subset holds each sample once"),
        ("x.txt", b"GOOD\nnobody\nnothing\n", SourceError, "lists 2 ids that"),
        ("x.txt", b"\xff\xfe", SourceError, "x.txt is not UTF-8 text (byte 0): save it as UTF-8"),
        ("x.csv", b"GOOD", UsageError, "cannot tell what a .csv file holds; give a .txt, .parquet or .npy file of ids"),
        ("x.npy", b"GOOD", SourceError, "cannot be read as a plain numpy array"),
        ("x.parquet", b"GOOD", SourceError, "cannot be read as Parquet"),
        ("missing.txt", None, UsageError, "missing.txt does not exist: give a .txt, .parquet or .npy file of ids"),
    ],
)
def test_lists_that_are_refused(train: Path, tmp_path: Path, name: str, content: bytes | None, kind: type[KdpruneError], says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.replace(b"GOOD", Dataset.open(train).ids[0].encode()))
    assert says in refusal(kind, train, tmp_path / "out", keys=tmp_path / name)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint64), np.arange(3), np.array([1.5])])
def test_arrays_that_are_no_lists_of_ids(train: Path, tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    line = refusal(SourceError, train, tmp_path / "out", keys=tmp_path / "x.npy")
    assert f"is {array.dtype} of shape {array.shape}: expected one row of texts (ids) or of uint64 (uids)" in line


def test_pickles_are_never_loaded(train: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(["a", None], object), allow_pickle=True)
    assert "cannot be read as a plain numpy array" in refusal(SourceError, train, tmp_path / "out", keys=tmp_path / "x.npy")


def test_a_parquet_without_ids_is_refused(train: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "x.parquet")
    line = refusal(UsageError, train, tmp_path / "out", keys=tmp_path / "x.parquet")
    assert line.endswith("has no column id or key or uid or __key__ to join by: it has name; rename the id column")
    pq.write_table(pa.table({"id": pa.array(["a", None])}), tmp_path / "y.parquet")
    assert "1 empty row" in refusal(SourceError, train, tmp_path / "out", keys=tmp_path / "y.parquet")


def test_a_listed_sample_that_does_not_decode_is_refused(class_folders: Path, tmp_path: Path) -> None:
    (class_folders / "digit-0" / "bad.png").write_bytes(b"no image")
    import_.run(import_.ImportConfig(str(class_folders), out=tmp_path / "train", on_bad="keep"))
    (tmp_path / "x.txt").write_text("digit-0/bad\n")
    assert "lists 1 sample that" in refusal(SourceError, tmp_path / "train", tmp_path / "out", keys=tmp_path / "x.txt")


# --- somebody else's scores


def scored(path: Path, data: Path, *, hard: str | None = None, column: str = "difficulty", kind: Any = None) -> dict[str, float]:
    """A Parquet file of a score for every sample, in an order of its own."""
    ids = np.random.default_rng(1).permutation(Dataset.open(data).ids).tolist()
    values = {i: float(n % 97) for n, i in enumerate(ids)}
    field = pa.field(column, kind or pa.float64(), metadata={"hard": hard} if hard else None)
    pq.write_table(
        pa.table(
            [pa.array(ids), pa.array(values.values(), pa.float64()).cast(field.type)], schema=pa.schema([("key", pa.string()), field])
        ),
        path,
    )
    return values


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize("how", ["a byte of an image", "cut", "other bytes of the same length"])
def test_a_parent_whose_bytes_have_changed_is_not_copied(train: Path, tmp_path: Path, adopted: bool, how: str) -> None:
    shutil.copytree(train, tmp_path / "set")
    parent = tmp_path / "set"
    if adopted:
        index.run(index.IndexConfig(shards=(str(parent / "*.tar"),), out=tmp_path / "adopted"))
        parent = tmp_path / "adopted"
    path, first = tmp_path / "set" / "shard-000001.tar", Dataset.open(parent).index["image_offset"].to_pylist()[600]
    data = bytearray(path.read_bytes())
    data[first + 60] ^= 1
    path.write_bytes({"a byte of an image": data, "cut": data[: len(data) // 2]}.get(how, bytes(len(data))))
    with pytest.raises((SourceError, FormatError), match=r"shard-000001.tar (was changed: sample '|has [\d,]+ bytes, )"):
        select.run(select.SelectConfig(parent, frac="1", out=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("hard", ["High", "yes"])
def test_a_hard_end_that_is_none_is_refused(train: Path, tmp_path: Path, hard: str) -> None:
    scored(tmp_path / "s.parquet", train, hard=hard)
    line = refusal(SourceError, train, tmp_path / "x", frac="0.1", scores=tmp_path / "s.parquet", column="difficulty")
    assert f"says that its hard end is '{hard}': expected high or low" in line


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.int64(), pa.uint8(), pa.float16()])
@pytest.mark.parametrize(("hard", "keep"), [("high", "hard"), ("low", "hard"), ("high", "easy"), ("low", "easy")])
def test_foreign_scores_keep_the_end_asked_for(train: Path, tmp_path: Path, hard: str, keep: str, kind: pa.DataType) -> None:
    values = scored(tmp_path / "s.parquet", train, kind=kind)
    run(train, tmp_path / "x", frac="0.1", scores=tmp_path / "s.parquet", column="difficulty", hard=hard, keep=keep, balance="none")
    kept = Dataset.open(tmp_path / "x")
    left = set(values) - set(kept.ids)
    inside, outside = [values[i] for i in kept.ids], [values[i] for i in left]
    if (hard == "high") == (keep == "hard"):
        assert min(inside) >= max(outside)
    else:
        assert max(inside) <= min(outside)
    selection = pq.read_table(tmp_path / "x" / "selection.parquet")
    assert selection["score"].to_pylist() == inside
    config = kept.manifest.config
    assert (config["column"], config["hard"], config["keep"], config["method"]) == ("difficulty", hard, keep, "difficulty")


def test_the_hard_end_may_stand_in_the_file_or_be_known(train: Path, tmp_path: Path) -> None:
    scored(tmp_path / "silent.parquet", train)
    scored(tmp_path / "saying.parquet", train, hard="low")
    scored(tmp_path / "known.parquet", train, column="margin")
    line = refusal(UsageError, train, tmp_path / "out", frac="0.1", scores=tmp_path / "silent.parquet", column="difficulty")
    assert line == "which end of column 'difficulty' is the hard one? say --hard high or --hard low"
    for name, column in (("saying", "difficulty"), ("known", "margin")):
        run(train, tmp_path / name, frac="0.1", scores=tmp_path / f"{name}.parquet", column=column)
        assert Manifest.load(tmp_path / name).config["hard"] == "low"
    run(train, tmp_path / "told", frac="0.1", scores=tmp_path / "saying.parquet", column="difficulty", hard="high")
    assert Manifest.load(tmp_path / "told").config["hard"] == "high"


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (lambda t: t.slice(3), MismatchError, "has no score for 3 samples of"),
        (
            lambda t: t.set_column(1, "difficulty", pa.array([None] + [1.0] * (len(t) - 1))),
            SourceError,
            "has no finite score for 1 sample (",
        ),
        (
            lambda t: t.set_column(1, "difficulty", pa.array([np.nan, np.inf] + [1.0] * (len(t) - 2))),
            SourceError,
            "has no finite score for 2 samples",
        ),
        (lambda t: t.set_column(1, "difficulty", t["key"]), SourceError, "column 'difficulty' is string: scores must be numbers"),
        (lambda t: t.rename_columns(["key", "score"]), UsageError, "has no column 'difficulty': it has key, score"),
        (
            lambda t: t.rename_columns(["who", "difficulty"]),
            UsageError,
            "has no column id or key or uid or __key__ to join by: it has who, difficulty",
        ),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), SourceError, "more than once"),
        (lambda t: t.set_column(1, "difficulty", pa.array([2**62 + 1] * len(t))), None, ""),
    ],
)
def test_foreign_scores_that_are_refused(train: Path, tmp_path: Path, spoil: Any, kind: type[KdpruneError] | None, says: str) -> None:
    scored(tmp_path / "s.parquet", train)
    pq.write_table(spoil(pq.read_table(tmp_path / "s.parquet")), tmp_path / "s.parquet")
    settings = {"frac": "0.1", "scores": tmp_path / "s.parquet", "column": "difficulty", "hard": "high"}
    if kind is None:  # large whole numbers are scores too
        run(train, tmp_path / "out", **settings)
    else:
        assert says in refusal(kind, train, tmp_path / "out", **settings)


def test_equal_scores_are_settled_by_the_hash(tmp_path: Path) -> None:
    """All scores equal: what is kept is what random keeps, in any packing."""
    for name, settings in (("a", {}), ("b", {"shard_samples": 13, "seed": 5})):
        data = tmp_path / name / "data"
        import_.run(import_.ImportConfig.from_dict({"source": "digits", "split": "test", "out": data} | settings))
        ids = Dataset.open(data).ids.tolist()
        pq.write_table(pa.table({"id": ids, "same": np.zeros(len(ids))}), tmp_path / name / "s.parquet")
        run(data, tmp_path / name / "kept", frac="0.3", scores=tmp_path / name / "s.parquet", column="same", hard="high")
    run(tmp_path / "a" / "data", tmp_path / "random", frac="0.3")
    a, b, random = (Manifest.load(tmp_path / p).content for p in ("a/kept", "b/kept", "random"))
    assert a == b == random


# --- refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "say what to keep: either --frac FRACTION (above 0, at most 1) or --keys FILE"),
        ({"frac": "0.1", "keys": "x.txt"}, "--frac and --keys were both given: --keys keeps exactly the ids listed; give one"),
        ({"frac": "0.1", "hard": "high", "scores": "pyproject.toml"}, "name the column with --column"),
        ({"keys": "x.txt", "method": "random"}, "--keys is a list by itself"),
        ({"frac": "0.1", "method": "el2n", "column": "x"}, "--method and --column were both given"),
        ({"frac": "0.1", "column": "x"}, "--column names a column of a Parquet file: give the file with --scores FILE"),
        ({"frac": "0.1", "scores": "x.parquet"}, "--scores was given but --method is random"),
        ({"frac": "0.1", "scores": "x.parquet", "column": "y"}, "--scores x.parquet does not exist"),
        ({"frac": "0.1", "method": "el2m"}, "unknown method 'el2m'; did you mean 'el2n'?"),
        ({"frac": "0.1", "method": "el2n"}, "no fitting score in scores/: run `kdprune-data score` first"),
        ({"frac": "0"}, "fraction 0 is out of range"),
        ({"frac": "1.1"}, "fraction 1.1 is out of range"),
        ({"frac": "0.0001"}, "--frac 0.0001 of 1,294 samples keeps none: at least 0.00039 is needed"),
        ({"frac": "0.1", "balance": "clas"}, "unknown balance 'clas'; did you mean 'class'?"),
        ({"frac": "0.1", "name": "x"}, "--out and --name were both given"),
    ],
)
def test_wrong_usage_is_refused(train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refusal(UsageError, train, tmp_path / "out", **settings)


def test_a_refusal_does_not_stand_in_the_way_of_the_next_try(tmp_path: Path, small_images: list[tuple[bytes, int]]) -> None:
    """Unlabelled samples need --balance none, says the message; and then it works."""
    rows = [{"bytes": data, "path": None} for data, _ in small_images[:20]]
    pq.write_table(pa.table({"image": rows, "label": pa.array([None] * 20, pa.int64())}), tmp_path / "x.parquet")
    import_.run(import_.ImportConfig(str(tmp_path / "x.parquet"), out=tmp_path / "train"))
    line = refusal(UsageError, tmp_path / "train", tmp_path / "out", frac="0.5")
    assert line == "--balance class needs labels and 20 samples have none: use --balance none"
    run(tmp_path / "train", tmp_path / "out", frac="0.5", balance="none")
    assert Manifest.load(tmp_path / "out").counts["kept"] == 10


def test_no_data_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"^no data/train here: run `kdprune-data import SOURCE --split train` first, or give a folder with DATA$"
    ):
        select.run(select.SelectConfig(frac="0.5"))


@pytest.mark.parametrize("name", ["a/b", ".x"])
def test_names_that_are_no_names(train: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a plain name: no slash, no leading dot; use --out for a folder elsewhere"):
        select.run(select.SelectConfig(train, frac="0.5", name=name))


def test_a_parents_shard_that_is_gone_is_said(train: Path, tmp_path: Path) -> None:
    shutil.copytree(train, tmp_path / "train")
    run(tmp_path / "train", tmp_path / "ids", frac="0.5", ids_only=True)
    (tmp_path / "train" / "shard-000001.tar").unlink()
    with pytest.raises(SourceError, match=r"shard-000001.tar does not exist: it may have been moved; fetch it or index the set again"):
        run(tmp_path / "ids", tmp_path / "x", frac="0.5")


def test_the_card_of_a_subset_without_tars_tells_no_loader_of_them(train: Path, tmp_path: Path) -> None:
    run(train, tmp_path / "x", frac="0.1", ids_only=True)
    assert (tmp_path / "x" / "README.md").read_text().startswith("# x\n\n129 samples in")


def test_the_card_of_a_subset_of_a_subset_names_the_split(digits: Path, tmp_path: Path) -> None:
    run(digits / "data" / "test", tmp_path / "half", frac="0.5")
    run(tmp_path / "half", tmp_path / "quarter", frac="0.5")
    assert "  - split: test\n" in (tmp_path / "quarter" / "README.md").read_text()


def test_a_card_says_what_it_is(train: Path, tmp_path: Path) -> None:
    run(train, tmp_path / "x", frac="0.1")
    card = (tmp_path / "x" / "README.md").read_text()
    assert card.startswith("---\nconfigs:\n")
    assert "129 samples in 1 WebDataset shard, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card
    assert f"(content `{Manifest.load(train).content}`) by random, fraction 0.1, seed 0." in card
    assert json.loads((tmp_path / "x" / "sizes.json").read_bytes()) == {"shard-000000.tar": 129}


# --- what the review of a first version found


def test_a_selection_that_finished_its_ranking_and_was_interrupted_ends_in_the_same_bytes(
    train: Path, tmp_path: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train, tmp_path / "whole", frac="0.3")

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(select, "_card", stop)  # an interruption at the last file, after ranking.parquet
        run(train, tmp_path / "broken", frac="0.3", name=None)
    assert (tmp_path / "broken" / "ranking.parquet").is_file()
    run(train, tmp_path / "broken", frac="0.3")
    left, right = digests(tmp_path / "broken"), digests(tmp_path / "whole")
    assert {k: v for k, v in left.items() if k != "README.md"} == {
        k: v for k, v in right.items() if k != "README.md"
    }  # it names the folder
    assert verify.run(verify.VerifyConfig(artefact=tmp_path / "broken")).ok


def test_a_shard_of_an_interrupted_run_is_trusted_only_for_the_very_samples(train: Path, tmp_path: Path) -> None:
    """The selection may have been another, of an earlier version: its shards are made again, and those there are too many of go."""
    parent, limits = Dataset.open(train), Limits(20, 10**9)
    identity = Identity("subset", "x", {}, [parent.manifest.as_input("data")])
    whole = records(parent)

    def copied(rows: np.ndarray) -> dict[str, int]:
        plan = subset.plan(parent, rows, limits)
        with Build.begin(tmp_path / "x", identity) as build:
            assert list(copying.copy(parent, plan, build, 2)) == plan.names
        paths = sorted((tmp_path / "x").glob("*.tar"))
        assert [path.name for path in paths] == plan.names
        for path, at in zip(paths, range(0, len(rows), 20), strict=True):
            assert path.read_bytes() == b"".join(whole[row] for row in rows[at : at + 20]) + bytes(1024)
        return {path.name: path.stat().st_mtime_ns for path in paths}

    first = np.arange(0, 200, 2)
    before = copied(first)
    assert copied(first) == before
    other = np.concatenate([first[:20], np.arange(41, 121, 2)])  # one shard as it was, two of others, two fewer
    after = copied(other)
    assert {name for name in after if after[name] == before[name]} == {"shard-000000.tar"}


def test_the_weights_of_a_parent_are_left_behind(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(train, tmp_path / "half", frac="0.5", ids_only=True)
    run(tmp_path / "half", tmp_path / "a", frac="0.5")
    assert "weights" not in capsys.readouterr().err
    path = tmp_path / "half" / "selection.parquet"
    found = pq.read_table(path)
    weights = pa.array(np.arange(len(found)), pa.float32())
    pq.write_table(found.set_column(found.schema.get_field_index("weight"), found.schema.field("weight"), weights), path)
    made = Manifest.read(tmp_path / "half")
    files = [replace(f, bytes=path.stat().st_size, sha256=sha256_file(path)) if f.path == path.name else f for f in made.files]
    (tmp_path / "half" / "manifest.json").write_bytes(replace(made, files=tuple(files)).to_json())
    run(tmp_path / "half", tmp_path / "b", frac="0.5")
    assert f"the weights of {tmp_path / 'half'} are left behind: " in capsys.readouterr().err
    assert set(pq.read_table(tmp_path / "b" / "selection.parquet")["weight"].to_pylist()) == {1.0}


@pytest.mark.parametrize("column", ["../../evil", "a/b", "my score", ".hidden", "a\nb", "-"])
def test_a_column_whose_name_can_be_no_folder_needs_a_name(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    monkeypatch.chdir(tmp_path)
    scored(tmp_path / "s.parquet", train, hard="high", column=column)
    settings = {"data": train, "frac": "0.1", "scores": tmp_path / "s.parquet", "column": column}
    if column == "-":
        assert str(select.run(select.SelectConfig.from_dict(settings)).folder) == "subsets/--0.1-s0"
        return
    with pytest.raises(UsageError) as caught:
        select.run(select.SelectConfig.from_dict(settings))
    assert str(caught.value) == f"--column {column!r} cannot be part of a folder's name ({f'{column}-0.1-s0'!r}): give one with --name NAME"
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]
    select.run(select.SelectConfig.from_dict(settings | {"name": "mine"}))
    assert Manifest.load(tmp_path / "subsets/mine").config["column"] == column


@pytest.mark.parametrize("column", ["random", "herding", "ccs", "embedding", "logits", "keys"])
def test_a_column_with_the_name_of_a_method_is_refused(train: Path, tmp_path: Path, column: str) -> None:
    line = refusal(UsageError, train, tmp_path / "x", frac="0.1", scores=tmp_path / "s.parquet", column=column, hard="high")
    assert line == f"--column {column} has the name of something else that samples are chosen by, and is no score: rename the column"


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_numbers_that_float32_cannot_hold_are_refused(train: Path, tmp_path: Path, value: float) -> None:
    ids = Dataset.open(train).ids.tolist()
    most = float(np.finfo(np.float32).max)
    for values, fine in (([most, -most, *range(len(ids) - 2)], True), ([1.0, value, *range(len(ids) - 2)], False)):
        pq.write_table(pa.table({"id": ids, "mine": pa.array(values, pa.float64())}), tmp_path / "s.parquet")
        settings = {"frac": "0.1", "scores": tmp_path / "s.parquet", "column": "mine", "hard": "high"}
        if fine:
            run(train, tmp_path / "fine", **settings)
            continue
        line = refusal(SourceError, train, tmp_path / "x", **settings)
        assert f"column 'mine' of {ids[1]} is {value:g}, too large for float32, in which scores are kept (1 of 1,294 are)" in line


def test_uniform_says_what_is_kept_of_classes_that_are_short(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a score whose hardest are left out not all of theirs can be."""
    scored(tmp_path / "s.parquet", train, hard="high")
    settings = {"scores": tmp_path / "s.parquet", "column": "difficulty", "where": "class != '0' or difficulty < 10"}
    run(train, tmp_path / "x", frac="0.5", balance="uniform", **settings, skip_hardest=0.1)
    labels = Dataset.open(train).labels
    err, kept = capsys.readouterr().err, np.bincount(Dataset.open(tmp_path / "x").labels)
    there = int(err.split("('0' with ")[1].split(")")[0])
    assert kept[0] < there < len(labels)
    assert f"): {kept[0]} of {there} of theirs are kept, and up to {kept.max()} of the others\n" in err


def test_a_parent_that_was_replaced_is_noticed_by_its_ids_only_subset(train: Path, tmp_path: Path) -> None:
    parent = shutil.copytree(train, tmp_path / "train")
    run(parent, tmp_path / "ids", frac="0.5", ids_only=True)
    import_.run(import_.ImportConfig(source="digits", holdout="0.1", seed=7, out=parent, overwrite=True))
    read = Dataset.open(tmp_path / "ids")
    with pytest.raises(SourceError, match="is not the image that was indexed"):
        for row in range(len(read)):
            read.image_bytes(row)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frac": "0.5", "keep": "easy"}, "--keep easy chooses an end of a score, and none ranks here"),
        ({"frac": "0.5", "method": "random", "keep": "hard"}, "none ranks here"),
        ({"frac": "0.5", "method": "el2n", "hard": "low"}, "recorded scores know which end is hard"),
        ({"keys": "x.txt", "balance": "none"}, "--balance changes how samples are ranked, and --keys is a list that is kept as it is"),
        ({"keys": "x.txt", "seed": 3}, "--seed changes how samples are ranked"),
        ({"keys": "x.txt", "ranks": True}, "--ranks changes how samples are ranked"),
        ({"frac": "0.5", "ids_only": True, "unchecked": True}, "the check of images that are copied, and --ids-only copies none"),
        ({"frac": "0.5", "ids_only": True, "normalize": True}, "--normalize leaves out headers of what is copied, and --ids-only"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(train: Path, tmp_path: Path, settings: dict[str, str], message: str) -> None:
    assert message in refusal(UsageError, train, tmp_path / "x", **settings)


def test_the_input_of_a_selection_is_never_overwritten(train: Path, tmp_path: Path) -> None:
    parent = shutil.copytree(train, tmp_path / "train")
    with pytest.raises(ExistsError, match="is of kind dataset, which --overwrite does not replace by subset"):
        run(parent, parent, frac="0.5", overwrite=True)
    run(parent, tmp_path / "half", frac="0.5")
    with pytest.raises(ExistsError, match="is what this subset is made from"):
        run(tmp_path / "half", tmp_path / "half", frac="0.5", overwrite=True)
    assert len(Dataset.open(tmp_path / "half")) == 647


@pytest.mark.parametrize(("frac", "said"), [("0.97", True), ("0.5", False)])
def test_uniform_says_which_classes_are_short(
    digits: Path, tmp_path: Path, frac: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digits have 116 to 133 samples a class; an equal share of 97 % is 125.5."""
    outcome = run(digits / "data/train", tmp_path / "x", frac=frac, balance="uniform")
    err = capsys.readouterr().err
    line = "classes of 10 with fewer samples than an equal share of 125.5 ('0' with 116, "
    assert (line in err) is said
    assert outcome.facts["counts"]["kept"] == (1255 if said else 647)
