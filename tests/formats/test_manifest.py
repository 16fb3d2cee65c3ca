"""formats/manifest.py: canonical JSON, the two identities computed anew from docs/formats.md, and nothing changed that goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdprune_data.errors import FormatError, KdpruneError, UsageError
from kdprune_data.formats import manifest as m
from kdprune_data.formats.manifest import File, Manifest

KEYS = {
    "format",
    "kind",
    "name",
    "config",
    "inputs",
    "counts",
    "classes",
    "files",
    "side",
    "outside",
    "digest",
    "content",
    "made",
    "sha256",
}


def sha(value: Any) -> str:
    """sha256 of canonical JSON as the page puts it: keys sorted, `,` and `:` without spaces, printable text as it is."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def made(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "dataset",
        "name": "train",
        "config": {"seed": 0},
        "inputs": [],
        "counts": {"samples": 1},
        "classes": ["kätze"],
        "files": (File("index.parquet", 5, "ab" * 32),),
        "content": "cd" * 32,
    }
    return Manifest(**values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished artefact of one 5-byte file."""
    (tmp_path / "index.parquet").write_bytes(b"12345")
    (tmp_path / m.NAME).write_bytes(made(made={"time": "now"}).to_json())
    return tmp_path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None, 0.1]}, '{"a":[true,null,0.1],"b":1}'),
        ({"name": 'ü "猫"\n'}, '{"name":"ü \\"猫\\"\\n"}'),
        ({}, "{}"),
        ({"é": 1, "z": 2, "Z": 3}, '{"Z":3,"z":2,"é":1}'),
    ],
)
def test_canonical(value: Any, text: str) -> None:
    assert m.canonical(value) == text.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_has_no_nan(value: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        m.canonical({"a": [value]})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_both_identities_are_what_the_page_says(digits: Path, split: str) -> None:
    folder = digits / "data" / split
    raw = (folder / "manifest.json").read_bytes()
    body = json.loads(raw)
    assert set(body) == KEYS
    assert raw == json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert body["sha256"] == sha({key: value for key, value in body.items() if key != "sha256"})
    named = {key: body[key] for key in ("format", "kind", "config", "counts", "classes", "files")}
    assert body["digest"] == sha(
        named
        | {"inputs": [[i["role"], i["digest"]] for i in body["inputs"]], "outside": [[f["bytes"], f["sha256"]] for f in body["outside"]]}
    )
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    lines = sorted(b"%s\0%s\0%d\n" % (row["id"].encode(), row["sha256"].hex().encode(), row["label"]) for row in rows)
    assert body["content"] == hashlib.sha256(b"".join(lines)).hexdigest()


def test_every_file_is_listed_once_with_its_digest(digits: Path) -> None:
    folder = digits / "data" / "train"
    body = json.loads((folder / "manifest.json").read_bytes())
    listed = [f["path"] for f in body["files"]]
    assert listed == sorted(listed)
    assert {*listed, *(f["path"] for f in body["side"]), "manifest.json"} == {p.name for p in folder.iterdir()}
    for file in (*body["files"], *body["side"]):
        data = (folder / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_content_of_an_unlabelled_sample() -> None:
    digests = np.arange(64, dtype=np.uint8).reshape(2, 32)
    lines = [b"b\0" + digests[0].tobytes().hex().encode() + b"\0\n", b"a\0" + digests[1].tobytes().hex().encode() + b"\x007\n"]
    assert m.content_of(["b", "a"], digests, np.array([-1, 7], np.int32)) == hashlib.sha256(b"".join(sorted(lines))).hexdigest()


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"name": "other"}, False),
        ({"made": {"time": "later"}}, False),
        ({"side": (File("README.md", 1, "ef" * 32),)}, False),
        ({"content": "00" * 32}, False),
        ({"kind": "subset"}, True),
        ({"config": {"seed": 1}}, True),
        ({"counts": {"samples": 2}}, True),
        ({"classes": ["cat"]}, True),
        ({"files": (File("index.parquet", 6, "ab" * 32),)}, True),
        ({"files": (File("index.parquet", 5, "ac" * 32),)}, True),
        ({"outside": (File("/x.tar", 6, "ab" * 32),)}, True),
        ({"inputs": [{"role": "data", "digest": "ab" * 32}]}, True),
    ],
)
def test_what_enters_the_digest(change: dict[str, Any], moves: bool) -> None:
    assert (made(**change).digest != made().digest) == moves


def test_the_place_of_files_outside_does_not_enter_the_digest() -> None:
    assert made(outside=(File("/here/x.tar", 6, None),)).digest == made(outside=(File("../there/y.tar", 6, None),)).digest


def test_load_gives_back_what_was_written(folder: Path) -> None:
    found = Manifest.load(folder)
    assert found == made(made={"time": "now"})
    assert found.to_json() == (folder / m.NAME).read_bytes()


def test_any_changed_byte_of_the_manifest_is_refused(folder: Path) -> None:
    raw = (folder / m.NAME).read_bytes()
    for at in range(len(raw)):
        for new in (raw[at] ^ 1, 0x20):
            (folder / m.NAME).write_bytes(raw[:at] + bytes([new]) + raw[at + 1 :])
            with pytest.raises(FormatError) as caught:
                Manifest.load(folder)
            assert "\n" not in str(caught.value)
    for other in (
        raw + b"\n",
        raw[:-1],
        b"",
        b"[]",
        b'"text"',
        b"null",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        json.dumps(json.loads(raw)).encode(),
    ):
        (folder / m.NAME).write_bytes(other)
        with pytest.raises(FormatError, match=r"make or fetch|use the version"):
            Manifest.load(folder)


def signed(body: dict[str, Any]) -> bytes:
    """A manifest that is true to itself, whatever it says."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return m.canonical(rest | {"sha256": sha(rest)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "is of another format than 1: use the version of kdprune-data that wrote it"),
        ({"config": {"seed": 1}}, "states digest"),
        ({"files": [{"path": "index.parquet", "bytes": 5}]}, "is not a manifest (TypeError)"),
        ({"more": 1}, "is not a manifest (TypeError)"),
        ({"files": None}, "is not a manifest (TypeError)"),
        ({"files": [{"path": "index.parquet", "bytes": "5", "sha256": None}]}, "is not a manifest (TypeError)"),
        ({"files": [{"path": 5, "bytes": 5, "sha256": None}]}, "is not a manifest (TypeError)"),
        ({"name": None}, "is not a manifest (TypeError)"),
        ({"classes": "01"}, "is not a manifest (TypeError)"),
        ({"classes": [0, 1]}, "is not a manifest (TypeError)"),
        ({"counts": [1]}, "is not a manifest (TypeError)"),
        ({"config": None}, "is not a manifest (TypeError)"),
        ({"inputs": {}}, "is not a manifest (TypeError)"),
        ({"inputs": [{"role": "data"}]}, "is not a manifest (KeyError)"),
    ],
)
def test_a_manifest_that_is_true_to_itself_but_not_to_the_page_is_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    body = json.loads((folder / m.NAME).read_bytes())
    (folder / m.NAME).write_bytes(signed(body | change))
    with pytest.raises(FormatError) as caught:
        Manifest.load(folder)
    assert says in str(caught.value)


@pytest.mark.parametrize("path", ["../index.parquet", "/etc/passwd", "a/../../b", ""])
def test_a_file_that_is_not_inside_the_folder_is_refused(folder: Path, path: str) -> None:
    (folder / m.NAME).write_bytes(made(files=(File(path, 5, "ab" * 32),)).to_json())
    with pytest.raises(FormatError, match="lists a file outside the folder"):
        Manifest.load(folder)


def test_missing_and_short_files_are_refused(folder: Path) -> None:
    (folder / "index.parquet").write_bytes(b"1234")
    with pytest.raises(FormatError, match=r"index.parquet has 4 bytes, the manifest says 5: make or fetch it again$"):
        Manifest.load(folder)
    (folder / "index.parquet").unlink()
    with pytest.raises(FormatError, match=r"index.parquet is missing: the manifest lists it; make or fetch the folder again$"):
        Manifest.load(folder)


def test_a_folder_that_is_no_artefact_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"nowhere does not exist: expected a finished dataset or subset; give another folder, or make it first$"
    ):
        Manifest.load(tmp_path / "nowhere", kinds=("dataset", "subset"))
    with pytest.raises(UsageError, match=r"is of kind dataset: expected scores; give another folder$"):
        Manifest.load(folder, kinds=("scores",))
    (folder / m.NAME).unlink()
    with pytest.raises(UsageError, match=r"holds no manifest.json: expected a finished scores; give another folder, or make it first$"):
        Manifest.load(folder, kinds=("scores",))
    (folder / m.PARTIAL).mkdir()
    with pytest.raises(UsageError, match=r"is unfinished: run the command that makes it again, it continues$"):
        Manifest.load(folder)


def test_an_ancestor_is_embedded_whole(digits: Path) -> None:
    parent = Manifest.load(digits / "data" / "train")
    child = made(kind="subset", inputs=[parent.as_input("data")])
    found = child.ancestor("data")
    assert {key: found[key] for key in ("role", "kind", "name", "digest", "content")} == {
        "role": "data",
        "kind": "dataset",
        "name": "train",
        "digest": parent.digest,
        "content": parent.content,
    }
    with pytest.raises(KdpruneError, match="has no input of role 'teacher'"):
        child.ancestor("teacher")


def test_an_artefact_can_be_moved(digits: Path, tmp_path: Path) -> None:
    there = shutil.copytree(digits / "data" / "val", tmp_path / "elsewhere")
    assert Manifest.load(there) == Manifest.load(digits / "data" / "val")
