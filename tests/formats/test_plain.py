"""formats/plain.py against the careful walk: the same members, and the same words about what is wrong, whatever the tar."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from kdprune_data.errors import SourceError
from kdprune_data.formats import plain, tar, windows
from kdprune_data.formats.reading import TarFile

Files = list[tuple[str, bytes]]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def payload(n: int, size: int) -> bytes:
    return np.random.default_rng(n).bytes(size)


def samples(count: int, size: Callable[[int], int], name: str = "{:06d}") -> Files:
    """`count` images of so many bytes each, with their labels."""
    keys = [name.format(n) for n in range(count)]
    return [member for n, key in enumerate(keys) for member in ((f"{key}.jpg", payload(n, size(n))), (f"{key}.cls", b"%d" % (n % 10)))]


SMALL = samples(600, lambda n: 300 + n)
LARGE = samples(12, lambda n: 40_000 + 700 * n, "large-{:06d}")
MIXED = SMALL[:400] + LARGE + SMALL[400:]


def packed(files: Files, form: str = "ustar", *, mtime: float = 0.0, folder: bool = False, more: Mapping[str, str] | None = None) -> bytes:
    """A tar of files; `more`: what the PAX header of each says."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form], pax_headers={"comment": "made by hand"} if folder else None) as target:
        if folder:
            info = tarfile.TarInfo("cats/")
            info.type = tarfile.DIRTYPE
            info.mtime = mtime
            target.addfile(info)
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.pax_headers = len(data), mtime, dict(more or {})
            target.addfile(info, io.BytesIO(data))
    return out.getvalue()


PLAIN = {
    "small": packed(SMALL),
    "large": packed(LARGE),
    "mixed": packed(MIXED),
    "gnu": packed(MIXED, "gnu", mtime=1.0),
    "pax": packed(MIXED, "pax"),
    "times": packed(MIXED, "pax", mtime=1700000000.5),
    "folder and comment": packed(MIXED, "pax", mtime=1700000000.5, folder=True),
    "names of 100 bytes": packed(samples(300, lambda n: n, "{:096d}")),
    "prefixes": packed(samples(300, lambda n: n, "d" * 120 + "/{:06d}")),
    "./": packed(samples(300, lambda n: n, "./cats/{:06d}")),
    "long names in PAX": packed(samples(300, lambda n: n, "long/" * 40 + "{:06d}"), "pax"),
    "texts in PAX": packed(samples(300, lambda n: n, "猫/{:06d}"), "pax", mtime=0.5),
    "other times in PAX": packed(samples(300, lambda n: n), "pax", more={"atime": "1.5", "ctime": "17"}),
    "a longer time in PAX": packed(samples(300, lambda n: n), "pax", more={"mtime": "1" * 60}),
    "a comment in PAX": packed(samples(300, lambda n: n), "pax", more={"mtime": "1.5", "comment": "made by hand"}),
    "texts in ustar": packed(samples(300, lambda n: n, "ünder/{:06d}"), "gnu"),
    "two dots": packed(samples(300, lambda n: n, "a..b/{:06d}")),
    "tars in it": packed([*SMALL, ("in.tar", packed(SMALL[:40])), *SMALL[:1], ("in.2.tar", packed(LARGE[:2])[512:])]),
    "zeros after it": packed(SMALL) + bytes(100_000),
}
CAREFUL = {
    "long names in GNU": packed(samples(300, lambda n: n, "long/" * 40 + "{:06d}"), "gnu"),
    "too small": packed(SMALL[:10]),
    "names on two lines": packed([*SMALL, ("a\nb.jpg", b"")], "pax"),
    "names that climb": packed([*SMALL, ("a/../../b.jpg", b"")]),
    "absolute names": packed([*SMALL, ("/b.jpg", b"")]),
    "two tars": packed(SMALL) + packed(SMALL),
    "no end": packed(SMALL)[:-10240],
    "cut": packed(SMALL)[:400_000],
    "compressed": b"\x1f\x8b" + packed(SMALL),
    "no tar": payload(0, 100_000),
}


def said(read: Callable[[bytes, str], list[tar.Member]], data: bytes) -> object:
    """The members, or the line that refuses."""
    try:
        return read(data, "x.tar")
    except SourceError as error:
        return str(error)


@pytest.mark.parametrize("window", [windows.WINDOW, 4, 7])
@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_a_plain_tar_is_read_as_the_careful_walk_reads_it(data: bytes, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", window)
    found = plain.files(data)
    assert found is not None
    assert tar.scan(data, "x.tar") == tar.walk(data, "x.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as theirs:
        files = [one for one in theirs.getmembers() if one.isfile()]
    assert found.names == [one.name.removeprefix("./") for one in files]
    assert found.data.tolist() == [one.offset_data for one in files]
    assert found.sizes.tolist() == [one.size for one in files]


@pytest.mark.parametrize("data", CAREFUL.values(), ids=CAREFUL)
def test_what_is_not_plain_is_left_to_the_careful_walk(data: bytes) -> None:
    if data[:2] != b"\x1f\x8b":
        assert plain.files(data) is None or "end mark" in str(said(tar.scan, data))
    else:
        assert "is compressed" in str(said(tar.scan, data))
        return
    assert said(tar.scan, data) == said(tar.walk, data)


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_told_in_the_same_words(seed: int) -> None:
    """Bytes of headers that are others: sizes, kinds, names, magic, checksums, what PAX headers say; half with the checksum made right."""
    random = np.random.default_rng(seed)
    data = bytearray(PLAIN[["small", "mixed", "times", "gnu"][seed % 4]])
    starts = [one.start for one in tar.walk(bytes(data), "x")]
    for _ in range(1 + seed % 3):
        at = starts[int(random.integers(len(starts)))]
        first, size = [(124, 12), (156, 1), (0, 20), (257, 8), (148, 8), (345, 20), (512, 29), (512, 4)][int(random.integers(8))]
        place = at + first + int(random.integers(size))
        data[place] = int(random.choice([0, 1, 32, 47, 46, 10, 48, 53, 55, 56, 95, 120, 128, 200, 255]))
        if seed % 2:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    assert said(tar.scan, bytes(data)) == said(tar.walk, bytes(data))


@pytest.mark.parametrize(
    ("field", "new"),
    [(124, b"00000000454 "), (124, b"00000000454\0"), (124, b"       454\0\0"), (148, None)],
    ids=["a space", "as it was", "spaces before", "another checksum"],
)
def test_sizes_and_checksums_in_other_spellings_hold(field: int, new: bytes | None) -> None:
    data = bytearray(PLAIN["small"])
    assert data[124:136] == b"00000000454\0"
    data[field : field + len(new or b"")] = new or b""
    data[148:156] = b" " * 8
    total = sum(data[:512])
    data[148:156] = b"%07o\0" % total if new is None else b"%06o\0 " % total
    assert said(tar.scan, bytes(data)) == tar.scan(PLAIN["small"], "x.tar")


def test_a_file_read_in_slices_is_read_alike(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(PLAIN["times"])
    with TarFile(tmp_path / "x.tar") as found:
        assert list(tar.records(found, "x.tar")) == list(tar.records(PLAIN["times"], "x.tar"))
