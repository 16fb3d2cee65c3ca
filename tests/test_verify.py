"""`verify`: whole artefacts pass; one flipped byte in any file of any artefact, and lies that every digest agrees with, do not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import File, Manifest, sha256_file

Cli = Callable[..., Any]
SHARDED = [f"shard-{n:06d}.tar" for n in range(3)]
MADE = ["log.txt", "manifest.json"]
TABLES = [*MADE, "index.parquet", "sizes.json", "SHA256SUMS"]
KEPT = ["README.md", "ranking.parquet", "selection.parquet"]
CACHE = "logits/random-0.5-s0--resnet8-s0"
STUDENT = "students/random-0.5-s0--resnet8-a0.6204-s0"
ARTEFACTS = {
    "data/train": [*TABLES, "README.md", *SHARDED],
    "data/adopted": [*TABLES, *(f"../../tars/{name}" for name in SHARDED)],
    "subsets/random-0.5-s0": [*TABLES, *KEPT, *SHARDED[:2]],
    "subsets/ids": [*TABLES, *KEPT, *(f"../../data/train/{name}" for name in SHARDED)],
    "teachers/resnet8-s0": [
        *(*MADE, "metrics.jsonl", "model.safetensors", "epoch-001.safetensors", "epoch-003.safetensors"),
        *(f"dynamics/epoch-{n:03d}.parquet" for n in (1, 2, 3)),
    ],
    STUDENT: [*MADE, "metrics.jsonl", "model.safetensors"],
    "scores/resnet8-s0": [
        *MADE,
        *(name % n for name in ("part-%06d.parquet", "embedding-%06d.arrow", "logits-%06d.arrow") for n in range(3)),
    ],
    "exports/random-0.5-s0--resnet8-s0": [*MADE, "sizes.json", "SHA256SUMS", "README.md", *SHARDED[:2]],
    CACHE: [*MADE, *(name % n for name in ("rows/shard-%06d.parquet", "views-0000-0002/shard-%06d.arrow") for n in (0, 1))],
}
FILES = [(artefact, name) for artefact, names in ARTEFACTS.items() for name in names]
WITH_SAMPLES = ["data/train", "data/adopted", "subsets/random-0.5-s0", "subsets/ids"]


@pytest.fixture(scope="module")
def workspace(chain: Path, tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """`chain`, with shards adopted where they lie and a subset without tars: one artefact of every kind. Put back what you change."""
    root = shutil.copytree(chain, tmp_path_factory.mktemp("verify") / "workspace")
    tars = root / "tars"
    tars.mkdir()
    for name in SHARDED:
        shutil.copy(root / "data/train" / name, tars)
    for line in (
        ["index", *(tars / name for name in SHARDED), "--out", "data/adopted"],
        ["export"],
        ["select", "--frac", "0.3", "--ids-only", "--out", "subsets/ids"],
    ):
        ran = kdprune(*line, cwd=root)
        assert ran.code == 0, ran.err
    return root


@pytest.fixture
def kept(workspace: Path) -> Iterator[Path]:
    """The workspace, whose files are as they were when the test is over."""
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    yield workspace
    for path in workspace.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    for path, data in before.items():
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)


def faults(kdprune: Cli, workspace: Path, artefact: str) -> list[str]:
    """What `verify` finds; none where it ends in 0, some where it ends in 1."""
    ran = kdprune("verify", artefact, "--json", cwd=workspace)
    assert ran.err == "", ran.err
    found = json.loads(ran.out)
    assert (ran.code, found["ok"]) == ((1, False) if found["faults"] else (0, True))
    return found["faults"]


def resealed(folder: Path, **changes: Any) -> None:
    """Make the manifest say what the files are, and whatever else is to be said: now every digest fits."""
    manifest = Manifest._parse(folder / "manifest.json")

    def fresh(files: Any) -> tuple[File, ...]:
        return tuple(File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in files)

    new = replace(manifest, files=fresh(manifest.files), side=fresh(manifest.side), outside=fresh(manifest.outside), **changes)
    (folder / "manifest.json").write_bytes(new.to_json())


# --- whole artefacts


def test_the_table_lists_every_file(workspace: Path) -> None:
    folders = {path.parent.relative_to(workspace).as_posix() for path in workspace.rglob("manifest.json")}
    assert folders - {"data/val", "data/test"} == set(ARTEFACTS)
    for artefact, names in ARTEFACTS.items():
        inside = {p.relative_to(workspace / artefact).as_posix() for p in (workspace / artefact).rglob("*") if p.is_file()}
        assert inside == {name for name in names if not name.startswith("..")}


@pytest.mark.parametrize("artefact", [*ARTEFACTS, "data/val", "data/test"])
def test_a_whole_artefact_passes(workspace: Path, kdprune: Cli, artefact: str) -> None:
    assert faults(kdprune, workspace, artefact) == []
    ran = kdprune("verify", artefact, cwd=workspace)
    assert ran.code == 0
    assert ran.out.startswith(f"{artefact}: whole: ")
    assert Manifest.load(workspace / artefact).digest[:12] in ran.out


def test_it_writes_nothing(workspace: Path, kdprune: Cli, digests: Callable[[Path], dict[str, str]]) -> None:
    before = digests(workspace)
    for artefact in ARTEFACTS:
        faults(kdprune, workspace, artefact)
    assert digests(workspace) == before


# --- one fault in one file


@pytest.mark.parametrize(("artefact", "name"), FILES)
def test_a_flipped_byte_is_found_and_its_file_named(workspace: Path, kdprune: Cli, artefact: str, name: str) -> None:
    path = workspace / artefact / name
    data = path.read_bytes()
    pick = random.Random(f"{artefact}/{name}")
    places = {0, len(data) // 2, len(data) - 1, pick.randrange(len(data)), pick.randrange(len(data))}
    try:
        for n, place in enumerate(sorted(places)):
            changed = bytearray(data)
            changed[place] ^= 1 << (n % 8)
            path.write_bytes(changed)
            found = faults(kdprune, workspace, artefact)
            assert any(Path(name).name in fault for fault in found), (place, found)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(("artefact", "name"), [one for one in FILES if one[1] != "manifest.json"])
def test_a_missing_file_a_shorter_and_a_longer_one(workspace: Path, kdprune: Cli, artefact: str, name: str) -> None:
    path = workspace / artefact / name
    data = path.read_bytes()
    try:
        for changed in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
            path.write_bytes(changed)
            found = faults(kdprune, workspace, artefact)
            assert any(Path(name).name in fault and f"{len(changed):,} bytes" in fault for fault in found), found
        path.unlink()
        if name in ("ranking.parquet", "log.txt"):  # they may stay behind when an artefact travels
            assert kdprune("verify", artefact, cwd=workspace).code == 0
            return
        found = faults(kdprune, workspace, artefact)
        assert any(Path(name).name in fault and "is missing" in fault for fault in found), found
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("artefact", ARTEFACTS)
@pytest.mark.parametrize("name", ["notes.txt", "deeper/shard-000000.tar", ".hidden"])
def test_a_file_more_is_found(workspace: Path, kdprune: Cli, artefact: str, name: str) -> None:
    path = workspace / artefact / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"anything")
    try:
        (fault,) = faults(kdprune, workspace, artefact)
        assert fault == f"{artefact}/{name}: 1 file in the folder that the manifest does not list"
    finally:
        path.unlink()
        if "/" in name:
            path.parent.rmdir()


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_without_its_manifest_it_is_no_artefact(kept: Path, kdprune: Cli, artefact: str) -> None:
    manifest = kept / artefact / "manifest.json"
    data = manifest.read_bytes()
    manifest.unlink()
    ran = kdprune("verify", artefact, cwd=kept)
    assert (ran.code, "holds no manifest.json" in ran.err) == (2, True)
    for broken in (b"", b"{}", data[:-1], data + b"\n", json.dumps(json.loads(data), indent=1).encode()):
        manifest.write_bytes(broken)
        assert any("manifest.json" in fault for fault in faults(kdprune, kept, artefact))


@pytest.mark.parametrize("artefact", WITH_SAMPLES)
def test_a_flipped_byte_of_an_image_names_the_sample(workspace: Path, kdprune: Cli, artefact: str) -> None:
    data = Dataset.open(workspace / artefact)
    for row in (0, len(data) // 2, len(data) - 1):
        path = data.shard_paths[data.shards[row]]
        start, length = (data.index[name][row].as_py() for name in ("image_offset", "image_length"))
        whole = path.read_bytes()
        try:
            for place in (start, start + length // 2, start + length - 1):
                changed = bytearray(whole)
                changed[place] ^= 0x10
                path.write_bytes(changed)
                named = [fault for fault in faults(kdprune, workspace, artefact) if f"sample {data.ids[row]!r}" in fault]
                assert len(named) == 1
                assert path.name in named[0]
                assert "its image's sha256 is not the index's" in named[0]
        finally:
            path.write_bytes(whole)


def test_of_many_faults_the_first_are_shown_and_all_with_json(kept: Path, kdprune: Cli) -> None:
    for name in SHARDED:
        path = kept / "data/train" / name
        path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX"))
    text = kdprune("verify", "data/train", cwd=kept)
    assert text.code == 1
    found = faults(kdprune, kept, "data/train")
    assert len(found) == 108 + 3
    assert text.out.splitlines()[0] == "data/train: 111 faults"
    assert text.out.splitlines()[-1].strip() == "and 91 more (all with --json)"


# --- lies that every digest agrees with


def table_change(name: str, change: Callable[[dict[str, list[Any]]], None]) -> Callable[[Path], None]:
    """Rewrite a Parquet file of a folder with other values, types and metadata as they were."""

    def apply(folder: Path) -> None:
        table = pq.read_table(folder / name)
        columns = table.to_pydict()
        change(columns)
        pq.write_table(pa.table(columns, schema=table.schema), folder / name)

    return apply


def swapped(column: str, a: int = 0, b: int = 1) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[column][a], columns[column][b] = columns[column][b], columns[column][a]

    return change


def put(column: str, value: Any, row: int = 0) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[column][row] = value

    return change


def turned(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        values.reverse()


def other_label_in_tar(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b".cls") // 512 * 512 + 512
    data[at] = ord("0") + (data[at] - ord("0") + 1) % 10
    path.write_bytes(data)


def other_key_in_tar(folder: Path) -> None:
    """A sample under another name, with a checksum that fits: a digit up in the name is one up in the sum."""
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    for at in (0, data.index(b".cls") // 512 * 512):
        place = at + data[at : at + 100].index(b".") - 1
        step = 1 if data[place] < ord("9") else -1
        data[place] += step
        total = int(bytes(data[at + 148 : at + 154]), 8) + step
        data[at + 148 : at + 154] = b"%06o" % total
    path.write_bytes(data)


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return apply


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"][3] = torch.inf


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"] = torch.zeros(11)


LIES: list[tuple[str, Callable[[Path], None], str]] = [
    ("data/train", table_change("index.parquet", put("uid", 5)), "the uid of "),
    ("data/train", table_change("index.parquet", put("label", 10)), "of 10 classes"),
    ("data/train", table_change("index.parquet", put("label", 9, row=3)), "do not give the manifest's content"),
    ("data/train", table_change("index.parquet", swapped("sha256")), "its image's sha256 is not the index's"),
    ("data/train", table_change("index.parquet", swapped("offset")), "there is no such record at byte"),
    ("data/train", table_change("index.parquet", put("length", 512)), "there is no such record at byte"),
    ("data/train", table_change("index.parquet", put("width", 9)), "decodes to 8 x 8 pixels, the index says otherwise"),
    ("data/train", table_change("index.parquet", put("ok", False)), "says ok 108, the index gives 107"),
    ("data/train", table_change("index.parquet", put("shard", 2)), "not in the order of the shards"),
    ("data/train", other_label_in_tar, "its label (cls) is "),
    ("data/train", other_key_in_tar, "there is no such record at byte 0"),
    ("data/train", written("sizes.json", '{"shard-000000.tar":40}'), "its counts are not the index's"),
    ("data/train", written("sizes.json", "108"), "sizes.json"),
    ("data/train", written("SHA256SUMS", f"{'0' * 64}  index.parquet\n"), "the line of 'index.parquet' is not the manifest's digest"),
    ("data/train", written("SHA256SUMS", ""), "has no line of 'index.parquet', 'shard-000000.tar'"),
    ("subsets/random-0.5-s0", table_change("selection.parquet", swapped("id")), "its column id is not the index's"),
    ("subsets/random-0.5-s0", table_change("selection.parquet", put("label", None)), "its column label is not the index's"),
    ("subsets/random-0.5-s0", table_change("selection.parquet", turned), "is not the index's"),
    ("scores/resnet8-s0", table_change("part-000001.parquet", put("el2n", float("nan"))), "el2n is not finite for ["),
    ("scores/resnet8-s0", table_change("part-000001.parquet", put("id", "3/0003")), "rows of 107 ids"),
    ("teachers/resnet8-s0", table_change("dynamics/epoch-002.parquet", swapped("uid")), "does not hold each sample exactly once"),
    ("teachers/resnet8-s0", table_change("dynamics/epoch-002.parquet", put("loss", float("inf"))), "not finite"),
    ("teachers/resnet8-s0", table_change("dynamics/epoch-002.parquet", put("loss", 9.0)), "p_true and loss"),
    ("teachers/resnet8-s0", weights("model.safetensors", not_finite), "holds numbers that are not finite ('linear.bias')"),
    ("teachers/resnet8-s0", weights("epoch-001.safetensors", of_another_shape), "tells 11 classes apart and this model 10"),
    ("teachers/resnet8-s0", written("metrics.jsonl", "{}\nloss 0.3\n"), "line 2 is not JSON"),
    (CACHE, table_change("rows/shard-000000.parquet", turned), "was made for other samples than the rows beside it"),
    (CACHE, table_change("rows/shard-000000.parquet", put("label", 99)), "has label 99, of 10 classes"),
    (CACHE, table_change("rows/shard-000000.parquet", put("top1_correct", 77)), "is not what its first 3 views give"),
]


@pytest.mark.parametrize(("artefact", "lie", "said"), LIES, ids=[f"{n}-{said}" for n, (_, _, said) in enumerate(LIES)])
def test_a_lie_is_found(kept: Path, kdprune: Cli, artefact: str, lie: Callable[[Path], None], said: str) -> None:
    lie(kept / artefact)
    resealed(kept / artefact)
    found = faults(kdprune, kept, artefact)
    assert any(said in fault for fault in found), found


@pytest.mark.parametrize(
    ("lie", "counts", "said"),
    [
        (put("label_true", None), {}, "one of label and label_true is empty, the other is not"),
        (put("label_true", 10, row=4), {}, "has label_true 10, of 10 classes"),
        (put("label_true", -3), {}, "has label_true -3, of 10 classes"),
        (put("id", "x"), {"noisy": 5}, "says noisy 5, the index gives 288"),
        (dict.clear, {}, "has no column label_true, and the manifest counts noisy labels"),
    ],
)
def test_lies_about_label_noise_are_found(
    tmp_path: Path, kdprune: Cli, lie: Callable[[dict[str, list[Any]]], None], counts: dict[str, int], said: str
) -> None:
    assert kdprune("import", "digits", "--label-noise", "0.2", cwd=tmp_path).code == 0
    folder = tmp_path / "data" / "train"
    before = Manifest.load(folder).counts
    if lie is dict.clear:
        rows = pq.read_table(folder / "index.parquet")
        pq.write_table(rows.drop_columns(["label_true"]), folder / "index.parquet")
    else:
        table_change("index.parquet", lie)(folder)
    resealed(folder, counts={**before, **counts})
    found = faults(kdprune, tmp_path, "data/train")
    assert any(said in fault for fault in found), found


@pytest.mark.parametrize(
    ("artefact", "key", "value"),
    [
        ("data/train", "samples", 109),
        ("data/train", "ok", 107),
        ("data/train", "shards", 4),
        ("data/train", "labelled", 0),
        ("data/train", "per_class", [108]),
        ("subsets/random-0.5-s0", "kept", 53),
        ("subsets/random-0.5-s0", "candidates", 200),
        ("scores/resnet8-s0", "samples", 107),
        ("teachers/resnet8-s0", "samples", 107),
        (CACHE, "samples", 55),
        (CACHE, "views", 4),
    ],
)
def test_counts_are_counted(kept: Path, kdprune: Cli, artefact: str, key: str, value: Any) -> None:
    counts = Manifest.load(kept / artefact).counts
    resealed(kept / artefact, counts={**counts, key: value})
    assert faults(kdprune, kept, artefact)


@pytest.mark.parametrize("artefact", ["data/train", "subsets/random-0.5-s0"])
def test_the_content_is_computed(kept: Path, kdprune: Cli, artefact: str) -> None:
    resealed(kept / artefact, content="0" * 64)
    assert any("do not give the manifest's content" in fault for fault in faults(kdprune, kept, artefact))


def test_a_digest_left_out_is_not_compared(kept: Path, kdprune: Cli) -> None:
    """As when shards are adopted without digests: what is inside them is checked all the same."""
    manifest = Manifest.load(kept / "data/adopted")
    bare = replace(manifest, outside=tuple(replace(f, sha256=None) for f in manifest.outside))
    (kept / "data/adopted/manifest.json").write_bytes(bare.to_json())
    assert faults(kdprune, kept, "data/adopted") == []
    tar = kept / "tars/shard-000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDAX", 1))
    (fault,) = faults(kdprune, kept, "data/adopted")
    assert "shard-000001.tar: sample " in fault


def test_a_zero_padded_class_number_is_that_class(tmp_path: Path, chain: Path, kdprune: Cli) -> None:
    import io
    import tarfile

    with tarfile.open(chain / "data/train/shard-000000.tar") as old, tarfile.open(tmp_path / "padded.tar", "w") as new:
        for member in old:
            data = old.extractfile(member).read()
            data = data.zfill(3) if member.name.endswith(".cls") else data
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    assert kdprune("index", "padded.tar", "--out", "adopted", cwd=tmp_path).code == 0
    assert faults(kdprune, tmp_path, "adopted") == []


def test_logits_have_a_largest_of_zero(kept: Path, kdprune: Cli) -> None:
    path = kept / CACHE / "views-0000-0002/shard-000001.arrow"
    reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
    batches = [reader.get_batch(n) for n in range(3)]
    z = np.array(batches[1].column("logits").flatten().to_numpy()).reshape(len(batches[1]), -1)
    z[2] -= np.float16(1)
    batches[1] = batches[1].set_column(5, batches[1].schema.field(5), pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), 10))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, reader.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    resealed(kept / CACHE)
    ids = pq.read_table(kept / CACHE / "rows/shard-000001.parquet")["id"].to_pylist()
    (fault,) = faults(kdprune, kept, CACHE)
    assert f"the logits of {ids[2]!r} are not finite with largest value 0" in fault


def test_a_model_of_a_function_is_checked_without_running_it(kept: Path, kdprune: Cli) -> None:
    config = dict(Manifest.load(kept / STUDENT).config)
    config["architecture"] = {**config["architecture"], "name": "nowhere_to_be_found:tiny"}
    resealed(kept / STUDENT, config=config)
    assert faults(kdprune, kept, STUDENT) == []
    weights("model.safetensors", not_finite)(kept / STUDENT)
    resealed(kept / STUDENT)
    assert any("linear.bias" in fault for fault in faults(kdprune, kept, STUDENT))


def test_what_is_no_artefact(tmp_path: Path, kdprune: Cli) -> None:
    for name, said in (("nowhere", "does not exist"), (".", "holds no manifest.json")):
        ran = kdprune("verify", name, cwd=tmp_path)
        assert (ran.code, said in ran.err, ran.out) == (2, True, "")
