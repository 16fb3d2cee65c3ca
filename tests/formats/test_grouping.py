"""formats/grouping.py against `tar.records`: the same samples; and the rows of an index that are made of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdprune_data.errors import SourceError
from kdprune_data.formats import adopt, grouping, indexing, tar
from kdprune_data.formats.members import Members
from kdprune_data.formats.plain import Files

KEYS = [f"{n:05d}" for n in range(300)]
NAMES = {
    "two members": [f"{key}.{extension}" for key in KEYS for extension in ("jpg", "cls")],
    "one member": [f"{key}.jpg" for key in KEYS],
    "in folders": [f"cats/v1.0/{key}.{extension}" for key in KEYS for extension in ("jpg", "seg.png", "cls")],
    "one key in two folders": [f"{folder}/{key}.jpg" for folder in ("a", "b") for key in KEYS],
    "long and short": ["a.jpg", "aa.jpg", "aa.cls", "aaa.jpg", "a" * 200 + ".jpg", "b/a.jpg", "b/aa.jpg", "ab/a.jpg"],
    "keys that begin alike": ["1.jpg", "10.jpg", "10.cls", "100.jpg", "1000.cls"],
    "upper case": ["a.JPG", "a.Cls", "b.jpg", "b.CLS", "c.cls"],
    "files between": ["README", "a.jpg", ".hidden", "a.cls", "b.", "b.jpg", "x/README", "x/.b.jpg", "._b.jpg", "b.cls"],
    "last a file between": ["a.jpg", "README"],
}
LEFT = {
    "none": [],
    "no sample": ["README", ".hidden"],
    "not together": ["a.jpg", "b.jpg", "a.cls"],
    "two of one kind": ["a.jpg", "b.jpg", "b.JPG"],
    "not ASCII": ["ü.jpg"],
    "left behind": ["PaxHeader/a.jpg", "a.jpg"],
    "many kinds": [f"a.{n}" for n in range(100)],
    "very long": ["a" * 300 + ".jpg"],
}


def packed(names: list[str], content: bytes = b"content") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as target:
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(content) * n % 1500
            target.addfile(info, io.BytesIO(content * 300))
    return out.getvalue()


def files_of(data: bytes) -> Files:
    """All files of a tar, however small."""
    members = tar.walk(data, "x.tar")
    columns = (np.array([one[n] for one in members], np.int64) for n in (1, 2, 3))
    return Files([one.name for one in members], *columns, end=0)


@pytest.mark.parametrize("at_once", [grouping.AT_ONCE, 1, 7])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_samples_are_those_of_records(names: list[str], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "AT_ONCE", at_once)
    data = packed(names)
    files, expected = files_of(data), list(tar.records(data, "x.tar"))
    found = grouping.samples(files)
    assert found is not None
    assert found.keys == [one.key for one in expected]
    assert found.starts.tolist() == [one.offset for one in expected]
    assert found.ends.tolist() == [one.offset + one.length for one in expected]
    kinds = [found.extensions[kind] for kind in found.kinds]
    members: list[dict[str, str]] = [{} for _ in expected]
    for sample, kind, file in zip(found.sample, kinds, found.files, strict=True):
        members[sample][kind] = files.names[file]
    assert members == [{kind: one.name for kind, one in record.members.items()} for record in expected]
    for wanted in ("jpg", "cls", "none"):
        only = found.only((wanted,))
        assert only is not None
        assert [files.names[n] if n >= 0 else None for n in only] == [one.get(wanted) for one in members]


@pytest.mark.parametrize("names", LEFT.values(), ids=LEFT)
def test_what_is_not_plain_is_left_to_records(names: list[str]) -> None:
    assert grouping.samples(files_of(packed(names))) is None


def test_a_sample_with_two_of_what_there_is_to_be_one() -> None:
    found = grouping.samples(files_of(packed(["a.jpg", "a.png", "b.jpg"])))
    assert found is not None
    assert found.only(("jpg", "png")) is None


# --- rows of an index


READINGS = {
    "numbers": (Members(), "key"),
    "texts": (Members(label="txt"), "shard"),
    "json": (Members("img", "json:a.b"), "key"),
    "no labels": (Members(label="json:c"), "key"),
}


def shard(path: Path, small_images: list[tuple[bytes, int]], *more: tuple[str, bytes]) -> Path:
    """A tar of real digits, with labels in three ways; sample 7 has none."""
    with tarfile.open(path, "w") as target:
        for n, (data, label) in enumerate(small_images):
            kinds = {"jpg": data, "img": data, "cls": b" %d\n" % label, "txt": b"digit %d" % label, "json": b'{"a": {"b": %d}}' % label}
            members = [(f"{n:04d}.{kind}", content) for kind, content in kinds.items() if n != 7 or kind in ("jpg", "img")]
            for name, content in [*members, *(more if n == 100 else ())]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                target.addfile(info, io.BytesIO(content))
    return path


def one_by_one(number: int, path: Path, reading: adopt.Reading) -> object:
    rows = indexing.Rows(number, adopt.SCHEMA)
    for row, _ in adopt.sample_rows(path, reading):
        rows.add(**row)
    return rows.table()


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_rows_from_headers_are_those_of_one_sample_after_the_other(
    tmp_path: Path, small_images: list[tuple[bytes, int]], reading: tuple[Members, str]
) -> None:
    path = shard(tmp_path / "x.tar", small_images)
    how = adopt.Reading(*reading, keep_bad=False, digests=False)
    found = adopt.from_headers(3, path, how)
    assert found is not None
    assert found.equals(one_by_one(3, path, how))
    assert len(found) == 200


@pytest.mark.parametrize(
    ("more", "keep_bad", "says"),
    [
        ([("bad.jpg", b"no image"), ("bad.cls", b"1")], True, None),
        ([("bad.jpg", b"no image"), ("bad.cls", b"1")], False, "sample 'bad': not a JPEG, PNG or WebP image with a readable header; mend"),
        ([("bad.cls", b"1")], True, "sample 'bad' has no image among its members .cls"),
        ([("0001.jpg", b"again")], True, "the members of sample '0001' are not contiguous"),
        ([("bad.txt", b"digit 1"), ("bad.cls", b"one"), ("bad.png", b"")], True, "sample 'bad': its .cls member is b'one', not a class"),
    ],
)
def test_what_is_wrong_is_told_in_the_same_words(
    tmp_path: Path, small_images: list[tuple[bytes, int]], more: list[tuple[str, bytes]], keep_bad: bool, says: str | None
) -> None:
    path = shard(tmp_path / "x.tar", small_images, *more)
    reading = adopt.Reading(Members(), "key", keep_bad, digests=False)

    def said(read: object) -> object:
        try:
            return read(3, path, reading)  # type: ignore[operator]  # it is one of the two functions
        except SourceError as error:
            return str(error)

    expected, found = said(one_by_one), said(adopt.from_headers)
    assert found is None or found == expected
    assert says is None or says in str(expected)
    if says is None:
        assert isinstance(found, pa.Table)
        assert found["ok"].to_pylist().count(False) == 1
