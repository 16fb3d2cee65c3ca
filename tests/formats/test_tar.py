"""formats/tar.py against Python's tarfile and webdataset's ShardWriter: what is written, what is read, and what is refused."""

from __future__ import annotations

import importlib
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from kdprune_data.errors import SourceError
from kdprune_data.formats import tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Files = list[tuple[str, bytes]]
CATS: Files = [("cats/1.jpg", b"a" * 700), ("cats/1.cls", b"3"), ("cats/2.jpg", b""), ("cats/2.cls", b"12")]


def packed(files: Files, form: str = "ustar", tweak: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
    """A tar made by Python's tarfile. `tweak` may change each header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form]) as target:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tweak(info)
            target.addfile(info, io.BytesIO(data))
    return out.getvalue()


def resummed(block: bytes) -> bytes:
    """A header with its checksum made right again."""
    bare = block[:148] + b" " * 8 + block[156:512]
    return bare[:148] + b"%06o\0 " % sum(bare) + bare[156:] + block[512:]


def patched(data: bytes, at: int, new: bytes, *, resum: bool = True) -> bytes:
    changed = data[:at] + new + data[at + len(new) :]
    return resummed(changed) if resum else changed


def refused(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        list(tar.records(data, "x.tar"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.tar")
    return str(caught.value)


# --- writing


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10_000])
@pytest.mark.parametrize("name", ["00000001.png", "a/b/c.jpg", "x" * 96 + ".jpg", "a b.cls", "%C3%BC.webp"])
def test_a_member_is_byte_for_byte_the_page_and_reads_back(name: str, size: int) -> None:
    data = bytes(n % 251 for n in range(size))
    block = tar.member(name, data)
    assert block[:100] == name.encode().ljust(100, b"\0")
    assert block[100:108] == b"0000644\0"
    assert block[108:116] == block[116:124] == b"0000000\0"
    assert block[124:136] == b"%011o\0" % size
    assert block[136:148] == b"00000000000\0"
    assert block[148:156] == b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    assert block[156:157] == b"0"
    assert block[157:257] == bytes(100)
    assert block[257:265] == b"ustar\00000"
    assert block[265:512] == bytes(247)
    assert block[512:] == data + bytes(-size % 512)
    with tarfile.open(fileobj=io.BytesIO(block + tar.END)) as found:
        (info,) = found.getmembers()
        assert (info.name, info.size, info.mode, info.mtime, info.uid, info.gid) == (name, size, 0o644, 0, 0, 0)
        assert info.isreg()
        assert found.extractfile(info).read() == data  # type: ignore[union-attr]


def test_a_member_that_no_header_can_tell_is_refused() -> None:
    assert tar.header("a.jpg", 8**11 - 1)[124:136] == b"77777777777\0"
    with pytest.raises(SourceError, match=r"member 'a.jpg' has 8,589,934,592 bytes: at most 8,589,934,591 fit a tar header; leave it out"):
        tar.header("a.jpg", 8**11)


@pytest.mark.parametrize("name", ["a.jpg", "b/" + "c" * 90])
def test_a_member_is_the_one_tarfile_writes_but_for_the_device_numbers(name: str) -> None:
    """tarfile fills the device fields (329 to 345) with octal zeros; docs/formats.md, with NUL."""
    theirs = packed([(name, b"data")])[:1024]
    assert resummed(theirs[:329] + bytes(16) + theirs[345:]) == tar.member(name, b"data")


@pytest.mark.parametrize("name", ["", "x" * 101])
def test_a_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match=rf"^member name '{name}' is {len(name)} bytes long: at most 100 fit a tar header"):
        tar.member(name, b"")


# --- reading


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "deep/" * 5, "long/" * 60, "v1.0/", "ünder/猫-", "long/" * 40 + "n" * 40 + "-"])
def test_scan_finds_what_tarfile_wrote(form: str, prefix: str) -> None:
    files = [(prefix + name.replace("/", "-"), data) for name, data in CATS]
    if form == "ustar" and len(prefix) > 200:
        files = [("d" * 120 + "/" + name.replace("/", "-"), data) for name, data in CATS]  # the prefix field
    data = packed(files, form)
    found = tar.scan(data, "x.tar")
    assert [(m.name, data[m.data : m.data + m.size]) for m in found] == [(name.removeprefix("./"), content) for name, content in files]
    found_records = list(tar.records(data, "x.tar"))
    assert [sorted(r.members) for r in found_records] == [["cls", "jpg"]] * 2
    stem = files[0][0].removeprefix("./").removesuffix("1.jpg")
    assert [r.key for r in found_records] == [f"{stem}1", f"{stem}2"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_record_can_be_copied_as_it_stands(form: str) -> None:
    files = [("long/" * 30 + name, data) for name, data in CATS] if form != "ustar" else CATS
    data = packed(files, form)
    for record, part in zip(tar.records(data, "x.tar"), (files[:2], files[2:]), strict=True):
        copied = data[record.offset : record.offset + record.length] + tar.END
        with tarfile.open(fileobj=io.BytesIO(copied)) as found:
            assert [(m.name, found.extractfile(m).read()) for m in found] == part  # type: ignore[union-attr]


def test_webdatasets_own_shards_are_read(tmp_path: Path, small_images: list[tuple[bytes, int]]) -> None:
    with webdataset.ShardWriter(str(tmp_path / "x-%02d.tar"), maxcount=30, verbose=0, mtime=0.5) as sink:
        for n, (data, label) in enumerate(small_images[:70]):
            sink.write({"__key__": f"{'p' * 110}/{n:03d}", "jpg": data, "cls": label, "json": {"n": n}})
    shards = sorted(tmp_path.glob("*.tar"))
    assert len(shards) == 3
    found = [(r, tar.map_file(path)) for path in shards for r in tar.records(tar.map_file(path), path.name)]
    assert [r.key for r, _ in found] == [f"{'p' * 110}/{n:03d}" for n in range(70)]
    for (record, buffer), (data, label) in zip(found, small_images, strict=False):
        found_members = {extension: buffer[m.data : m.data + m.size] for extension, m in record.members.items()}
        assert found_members == {"jpg": data, "cls": b"%d" % label, "json": found_members["json"]}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the garbage collector
@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.jpg", "a.seg.png", "b.jpg"], {"a": ["jpg", "seg.png"], "b": ["jpg"]}),
        (["README", ".hidden", "a.JPG", "a.Cls"], {"a": ["jpg", "cls"]}),
        (["x/a.jpg", "y/a.jpg", "a.jpg"], {"x/a": ["jpg"], "y/a": ["jpg"], "a": ["jpg"]}),
        (["v1.0/a.jpg", "v1.0/a.cls"], {"v1.0/a": ["jpg", "cls"]}),
        (["._a.jpg", "a.jpg", "._a.cls", "a.cls"], {"a": ["jpg", "cls"]}),
        ([], {}),
    ],
)
def test_records_group_by_webdatasets_rule(names: list[str], keys: dict[str, list[str]], tmp_path: Path) -> None:
    data = packed([(name, b"x") for name in names])
    assert {r.key: list(r.members) for r in tar.records(data, "x.tar")} == keys
    if names and "README" not in names:  # webdataset 1 stumbles over a name without a dot
        (tmp_path / "x.tar").write_bytes(data)
        theirs = {
            s["__key__"]: sorted(k for k in s if "__" not in k) for s in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
        }
        assert theirs == {key: sorted(found) for key, found in keys.items()}


@pytest.mark.parametrize("folder", ["PaxHeader", "PaxHeaders", "PaxHeaders.4711", "__MACOSX"])
def test_what_other_programs_leave_of_each_file_is_no_sample(folder: str) -> None:
    data = packed([(f"cats/{folder}/1.jpg", b"path=1.jpg"), (f"{folder}/cats/1.cls", b"x"), ("cats/._1.jpg", b"x"), *CATS])
    assert [r.key for r in tar.records(data, "x.tar")] == ["cats/1", "cats/2"]
    assert [r.key for r in tar.records(packed([("PaxHeadersX/1.jpg", b"x")]), "x.tar")] == ["PaxHeadersX/1"]


def test_folders_and_global_headers_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by hand"}) as target:
        folder = tarfile.TarInfo("cats")
        folder.type = tarfile.DIRTYPE
        target.addfile(folder)
        for name, data in CATS:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    found = tar.scan(out.getvalue(), "x.tar")
    assert [m.name for m in found] == [name for name, _ in CATS]
    assert [m.start for m in found] == [m.data - 512 for m in found]  # they belong to no record


@pytest.mark.parametrize("size", [b"\x80" + (700).to_bytes(11, "big"), b"00000001274 ", b"1274 \0\0\0\0\0\0\0", b"       1274\0"])
def test_sizes_in_all_spellings(size: bytes) -> None:
    data = patched(packed(CATS), 124, size)
    assert [m.size for m in tar.scan(data, "x.tar")] == [700, 1, 0, 2]


def test_a_size_in_a_pax_header_holds() -> None:
    def tweak(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"size": str(info.size)}

    assert [m.size for m in tar.scan(packed(CATS, "pax", tweak), "x.tar")] == [700, 1, 0, 2]


# --- refusing


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"V", "of unknown type b'V'"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_only_regular_files_are_read(form: str, kind: bytes, what: str) -> None:
    data = bytearray(packed([("a.jpg", b""), ("b.jpg", b"")], form))
    data[512:1024] = resummed(bytes(data[512 : 512 + 156]) + kind + bytes(data[512 + 157 : 1024]))
    assert refused(bytes(data)) == f"x.tar: member 'b.jpg' is {what}: only regular files are read; pack the set again without it"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "cats/../../a.jpg", ".//etc/a.jpg", "/" + "long/" * 30 + "a.jpg"])
def test_names_that_point_outside_are_refused(form: str, name: str) -> None:
    assert "points outside the tar: pack the set again with plain relative names" in refused(packed([(name, b"x")], form))


@pytest.mark.parametrize("form", ["gnu", "ustar"])
def test_a_name_that_is_not_utf8_is_refused(form: str) -> None:
    data = patched(packed([("a1.jpg", b"x")], form), 0, b"\xe4")
    assert refused(data) == "x.tar: the name of member '\\udce41.jpg' is not UTF-8: pack the set again with names that are"


@pytest.mark.parametrize("cut", [513, 700, 512 + 699, 512 + 1023, 1536 + 1, 1536 + 511, 1536 + 512])
def test_a_tar_cut_short_is_refused(cut: int) -> None:
    """In a header, in a payload, in its padding: everywhere but between two members, where nothing tells."""
    assert " is truncated: " in refused(packed(CATS)[:cut])


@pytest.mark.parametrize("cut", [1536, 1536 + 1024, 1536 + 1024 + 512 + 1024])
def test_a_tar_that_ends_between_members_without_its_end_mark_is_truncated(cut: int) -> None:
    assert "without a tar's end mark" in refused(packed(CATS)[:cut])


@pytest.mark.parametrize("at", [0, 99, 101, 110, 137, 148, 150, 157, 257, 300, 500])
@pytest.mark.parametrize("header", [0, 1536])
def test_any_changed_header_byte_is_refused(header: int, at: int) -> None:
    data = bytearray(packed(CATS))
    data[header + at] ^= 0x04
    refused(bytes(data))


@pytest.mark.parametrize(
    ("at", "field", "says"),
    [
        (124, b"zzzzzzzzzzz\0", "no size"),
        (124, b"-0000001000\0", "no size"),  # a size of -512 would walk on the spot for ever
        (124, b"0000000_700\0", "no size"),
        (124, b"\xff" * 12, "no size"),
        (124, b"\x80" + b"\xff" * 11, "truncated"),
    ],
)
def test_a_size_that_is_none_is_refused(at: int, field: bytes, says: str) -> None:
    assert says in refused(patched(packed(CATS), at, field))


@pytest.mark.parametrize("field", [b"zzzzzz\0 ", b"-00001\0 ", b"\xff" * 8, bytes(8)])
def test_a_checksum_that_is_none_is_refused(field: bytes) -> None:
    assert (
        refused(patched(packed(CATS), 148, field, resum=False))
        == "x.tar is not a tar, or damaged: the header at byte 0 fails its checksum; fetch it again"
    )


@pytest.mark.parametrize("value", ["-512", "many", "", "1e3", str(10**30)])
def test_a_pax_size_that_is_none_is_refused(value: str) -> None:
    def tweak(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"size": value}

    refused(packed(CATS[:1], "pax", tweak))


@pytest.mark.parametrize("size", [1, 100, 511])
def test_what_is_shorter_than_a_header_is_no_tar(size: int) -> None:
    assert refused(packed(CATS)[:size]) == (f"x.tar is not a tar, or is truncated: it has {size} bytes, a tar 512 at least; fetch it again")


@pytest.mark.parametrize(("kind", "unpack"), [("gzip", "gzip"), ("bz2", "bzip2"), ("lzma", "xz")])
def test_a_compressed_tar_is_refused_with_what_unpacks_it(kind: str, unpack: str) -> None:
    line = refused(importlib.import_module(kind).compress(packed(CATS)))
    assert line.endswith(f"samples are read in place, which that does not allow; `{unpack} -dc x.tar > NEW.tar` first")


@pytest.mark.parametrize("form", FORMATS)
def test_what_follows_the_end_mark_is_not_passed_over(form: str) -> None:
    assert refused(packed(CATS[:2], form) + packed(CATS[2:], form)).startswith(
        "x.tar goes on after its end mark at byte 2,560, as tars put"
    )
    assert tar.scan(packed(CATS, form) + bytes(3_000_000), "x.tar")


def test_a_sparse_file_in_pax_headers_is_refused() -> None:
    """Its payload begins with a map of its holes: read as it stands it would be another file."""

    def tweak(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}

    line = refused(packed([("GNUSparseFile.0/a.jpg", b"1\n0\n1\n")], "pax", tweak))
    assert line.startswith("x.tar: member 'a.jpg' is a sparse file: only regular files are read")


@pytest.mark.parametrize("name", ["a\nb.jpg", "cats\n/a.jpg"])
def test_a_name_on_two_lines_is_refused(name: str) -> None:
    assert "holds an end of line: pack the set again with names on one line" in refused(packed([(name, b"x")], "pax"))


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, b"hello\n" * 500, struct.pack("<512H", *range(512))])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.jpg", "b.jpg", "a.cls"], "the members of sample 'a' are not contiguous: pack the set again, sorted by name"),
        (["a.jpg", "a.JPG"], "sample 'a' has two members .jpg: pack the set again with one of each"),
    ],
)
def test_samples_that_are_not_whole_are_refused(names: list[str], says: str) -> None:
    assert refused(packed([(name, b"x") for name in names])) == f"x.tar: {says}"


# --- maps


def test_maps_open_again_what_they_dropped(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.tar" for n in range(5)]
    for n, path in enumerate(paths):
        path.write_bytes(b"%d" % n * 10)
    maps = tar.Maps(paths, limit=2)
    assert [maps[n][:1] for n in (0, 1, 2, 0, 4, 4, 1)] == [b"0", b"1", b"2", b"0", b"4", b"4", b"1"]
    assert len(maps._open) <= 2


@pytest.mark.parametrize(("data", "says"), [(None, "does not exist"), (b"", "is empty")])
def test_a_missing_or_empty_tar_is_refused(tmp_path: Path, data: bytes | None, says: str) -> None:
    if data is not None:
        (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(SourceError, match=says):
        tar.map_file(tmp_path / "x.tar")
