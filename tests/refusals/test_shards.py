"""`index` of tars that cannot be adopted, and of odd ones that can."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdprune_data.formats.dataset import Dataset

INDEX = ["index", "bad.tar"]
Prepare = Callable[[Path, Any], object]


def tar(*more: Any, n: int = 4) -> Prepare:
    """A tar of n whole samples and other members after them."""
    return lambda w, real: real.tar(w / "bad.tar", [*real.samples(n), *more])


def alone(*members: Callable[[Any], tuple[str, bytes]] | tuple[str, bytes]) -> Prepare:
    """A tar of these members, each as it is or as made from real digits."""
    return lambda w, real: real.tar(w / "bad.tar", [one(real) if callable(one) else one for one in members])


def cut(size: int) -> Prepare:
    """A tar of 4 samples, of which only the first bytes have arrived."""

    def prepare(w: Path, real: Any) -> None:
        whole = real.tar(w / "bad.tar", real.samples()).read_bytes()
        (w / "bad.tar").write_bytes(whole[:size])

    return prepare


def flipped(w: Path, real: Any) -> None:
    whole = bytearray(real.tar(w / "bad.tar", real.samples()).read_bytes())
    whole[3] ^= 1
    (w / "bad.tar").write_bytes(whole)


def packed(w: Path, real: Any) -> None:
    (w / "bad.tar").write_bytes(gzip.compress(real.tar(w / "bad.tar", real.samples()).read_bytes()))


def two(w: Path, real: Any) -> None:
    for name in ("bad.tar", "worse.tar"):
        real.tar(w / name, real.samples())


def head(name: str, kind: bytes) -> tarfile.TarInfo:
    """A member without content that is no regular file."""
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, "0000.png"
    return found


def image(name: str = "x.png") -> Callable[[Any], tuple[str, bytes]]:
    return lambda real: (name, real.image(0))


def labelled(text: bytes) -> Prepare:
    return alone(image(), ("x.cls", text))


def with_file(content: bytes) -> Prepare:
    def prepare(w: Path, real: Any) -> None:
        tar()(w, real)
        (w / "names.txt").write_bytes(content)

    return prepare


def _mixed(w: Path, real: Any) -> None:
    alone(image(), ("x.txt", b"1"), image("y.png"), ("y.txt", b"cat"))(w, real)


TRUNCATED = r"bad.tar is truncated: .*; fetch it again"
OUTSIDE = r"bad.tar: member '{}' points outside the tar: pack the set again with plain relative names"
NOT_A_FILE = r"bad.tar: member 'a.png' is {}: only regular files are read; pack the set again without it"
NAMES = [*INDEX, "--classes", "names.txt"]

REFUSED: list[tuple[str, Prepare | None, list[str], int, str]] = [
    ("missing", None, INDEX, 2, r"no such file: 'bad.tar'; give files, a pattern in quotes, or a folder of .tar files"),
    (
        "a folder of nothing",
        lambda w, _: (w / "bad.tar").mkdir(),
        INDEX,
        2,
        r"bad.tar holds no .tar file: give the files themselves, or the folder",
    ),
    ("no bytes", cut(0), INDEX, 1, r"bad.tar is empty: fetch it again"),
    *((f"{size} bytes", cut(size), INDEX, 1, TRUNCATED) for size in (600, 700, 1024, 4096)),
    ("300 bytes", cut(300), INDEX, 1, r"bad.tar is not a tar, or is truncated: it has 300 bytes, a tar 512 at least; fetch it again"),
    ("a damaged header", flipped, INDEX, 1, r"bad.tar is .*damaged: .*the header at byte 0.*; fetch it again"),
    ("text", lambda w, r: r.put(w / "bad.tar", b"hello" * 1000), INDEX, 1, r"bad.tar is not a tar, or damaged: .*; fetch it again"),
    ("compressed", packed, INDEX, 1, r"bad.tar is compressed \(gzip\): .*; `gzip -dc bad.tar > NEW.tar` first"),
    ("a picture", lambda w, r: r.put(w / "bad.tar", r.image(0)), INDEX, 1, r"bad.tar is .*; fetch it again"),
    ("no members", tar(n=0), INDEX, 1, r"no sample with an image in '?bad.tar'?: expected members"),
    ("no samples", alone(("README", b"x")), INDEX, 1, r"no sample with an image in '?bad.tar'?: expected members"),
    ("hidden samples", alone(image(".a.png")), INDEX, 1, r"no sample with an image in '?bad.tar'?: expected members"),
    ("a hard link", tar(head("a.png", tarfile.LNKTYPE)), INDEX, 1, NOT_A_FILE.format("a hard link")),
    ("a symbolic link", tar(head("a.png", tarfile.SYMTYPE)), INDEX, 1, NOT_A_FILE.format("a symbolic link")),
    ("a character device", tar(head("a.png", tarfile.CHRTYPE)), INDEX, 1, NOT_A_FILE.format("a device")),
    ("a block device", tar(head("a.png", tarfile.BLKTYPE)), INDEX, 1, NOT_A_FILE.format("a device")),
    ("a pipe", tar(head("a.png", tarfile.FIFOTYPE)), INDEX, 1, NOT_A_FILE.format("a pipe")),
    ("a file with holes", tar(head("a.png", b"S")), INDEX, 1, NOT_A_FILE.format("a sparse file")),
    ("an absolute path", tar(("/etc/a.png", b"x")), INDEX, 1, OUTSIDE.format("/etc/a.png")),
    ("a path that climbs", tar(("../a.png", b"x")), INDEX, 1, OUTSIDE.format(r"\.\./a.png")),
    ("and further in", tar(("a/../../b.png", b"x")), INDEX, 1, OUTSIDE.format(r"a/\.\./\.\./b.png")),
    ("not UTF-8", tar(("gr\udcfcn.png", b"x")), INDEX, 1, r"bad.tar: the name of member 'gr\\udcfcn.png' is not UTF-8: pack the set again"),
    ("two lines", tar(("a\nb.png", b"x")), INDEX, 1, r"bad.tar: .*'a\\nb.*' .*: pack the set again"),
    (
        "not contiguous",
        alone(image(), image("y.png"), ("x.cls", b"0")),
        INDEX,
        1,
        r"the members of sample 'x' are not contiguous: pack the",
    ),
    (
        "one member twice",
        alone(image(), image()),
        INDEX,
        1,
        r"bad.tar: sample 'x' has two members .png: pack the set again with one of each",
    ),
    (
        "a key twice",
        tar(("0000.png", b"x"), n=2),
        INDEX,
        1,
        r"bad.tar: the members of sample '0000' are not contiguous: pack the set again",
    ),
    ("a key in two tars", two, [*INDEX, "worse.tar"], 1, r"sample '\d{4}' is in bad.tar and in worse.tar: .*pass --id shard"),
    ("a tar twice", tar(), [*INDEX, "bad.tar"], 2, r"bad.tar is listed twice: name each file once"),
    (
        "dotted keys",
        alone(image("a.b.png"), image("a.c.png")),
        INDEX,
        1,
        r"bad.tar sample 'a' has no image among its members .b.png .c.png",
    ),
    ("no image", alone(("x.cls", b"0")), INDEX, 1, r"bad.tar sample 'x' has no image among its members .cls: expected"),
    (
        "two images",
        alone(image(), image("x.jpg")),
        INDEX,
        1,
        r"bad.tar sample 'x' has more than one image .* .png .jpg: say which with",
    ),
    *(
        (f"label {text!r}", labelled(text), INDEX, 1, r"bad.tar sample 'x': its .cls member is .*; (mend|use)")
        for text in (b"cat", b"-1", b"1.0", b"", b"99999999999", b"\xd9\xa3", b"1 2")
    ),
    ("not an image", tar(("x.png", b"hello")), INDEX, 1, r"bad.tar sample 'x': not a JPEG, PNG or WebP image; .* --on-bad keep"),
    ("an image of no bytes", tar(("x.png", b"")), INDEX, 1, r"bad.tar sample 'x': an empty file, of 0 bytes; .* --on-bad keep"),
    ("no list of classes", tar(), NAMES, 2, r"--classes names.txt does not exist: give a text file with one class name a line"),
    ("a folder of classes", lambda w, r: (tar()(w, r), (w / "names.txt").mkdir()), NAMES, 2, r"--classes names.txt .*: give a text file"),
    ("too few classes", with_file(b"a\nb\n"), NAMES, 1, r"bad.tar sample '0003': class number 3, .* 2 names: add the missing names"),
    ("classes that are no text", with_file(b"gr\xfcn\n"), NAMES, 1, r"names.txt is not UTF-8 text \(byte 2\): save it as UTF-8"),
    *(
        (f"a label of {text[:12]!r}", alone(image(), ("x.json", text)), [*INDEX, "--label-member", "json:a"], 1, rf"bad.tar.*{said}")
        for text, said in (
            (b"{", "not a JSON object; mend the set"),
            (b'{"a":' * 100_000, "not a JSON object; mend the set"),
            (b'{"a":[1]}', r"'a' .* is '\[1\]', no class number and no text; mend the set"),
            (b'{"a":1.5}', r"'a' .* is '1.5', no class number and no text; mend the set"),
            (b'{"a":NaN}', r"'a' .* is 'nan', no class number and no text; mend the set"),
            (b'{"a":-1}', r"'a' .* is '-1', no class number and no text; mend the set"),
            (b'{"a":2147483647}', r"class number 2147483647 is above 999,999, the most without --classes FILE"),
            (b'{"b":1}', r"has a label where --label-member json:a says: name the right one"),
        )
    ),
    ("too large a class", labelled(b"2147483647"), INDEX, 1, r"sample 'x': class number 2147483647 is above 999,999, the most without"),
    (
        "numbers and texts",
        _mixed,
        [*INDEX, "--label-member", "txt"],
        1,
        r"labels are all numbers or all texts; mend the set, or list every name",
    ),
    ("no such label member", tar(), [*INDEX, "--label-member", "csv"], 2, r"--label-member 'csv' .*: give cls, txt or json:FIELD"),
    (
        "no such image member",
        tar(),
        [*INDEX, "--image-member", "jpg"],
        1,
        r"bad.tar sample '0000' has no member .jpg among .png .cls: mend it",
    ),
    ("an unknown id", tar(), [*INDEX, "--id", "hash"], 2, r"'hash' is not one of 'key', 'shard'.*see kdprune-data index --help"),
    ("no threads", tar(), [*INDEX, "-j", "0"], 2, r"--jobs 0 is too small: at least 1"),
    (
        "a file in the way",
        lambda w, r: (tar()(w, r), (w / "f").touch()),
        [*INDEX, "--out", "f"],
        2,
        r"f is a file, not a folder: choose another",
    ),
]


@pytest.mark.parametrize(("name", "prepare", "line", "code", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_tar_that_is_refused(
    tmp_path: Path, real: Any, refuses: Any, works: Any, name: str, prepare: Any, line: list[str], code: int, said: str
) -> None:
    if prepare is not None:
        prepare(tmp_path, real)
    refuses(tmp_path, line, code, said)
    real.tar(tmp_path / "good.tar", real.samples())
    works(tmp_path, "index", "good.tar")


def test_other_classes_than_train(tmp_path: Path, real: Any, refuses: Any, works: Any) -> None:
    works(tmp_path, "import", real.folders(tmp_path / "good"))
    real.tar(tmp_path / "bad.tar", real.samples())
    for split in ("val", "test"):
        said = rf"the classes of this {split} split are not those of data/train: 4 against 6, .*name them with --classes FILE"
        refuses(tmp_path, [*INDEX, "--split", split], 2, said)
    (tmp_path / "names.txt").write_text("".join(f"digit-{n}\n" for n in range(6)))
    works(tmp_path, *NAMES, "--split", "val")


@pytest.mark.parametrize(
    ("name", "prefix", "form"),
    [
        ("PAX", "k" * 150, tarfile.PAX_FORMAT),
        ("GNU", "k" * 150, tarfile.GNU_FORMAT),
        ("deep", "a/" * 120, tarfile.PAX_FORMAT),
        ("not ASCII", "größe 日本 ", tarfile.PAX_FORMAT),
        ("quotes", "a'b\"c $HOME;`x` ", tarfile.USTAR_FORMAT),
        ("here", "./", tarfile.USTAR_FORMAT),
    ],
)
def test_long_and_odd_names_are_read(tmp_path: Path, real: Any, works: Any, name: str, prefix: str, form: int) -> None:
    """Adopted keys stay what they are; the whole set is read and pruned."""
    real.tar(tmp_path / "odd.tar", real.samples(4, prefix), form)
    works(tmp_path, "index", "odd.tar")
    found = Dataset.open(tmp_path / "data/train")
    assert found.ids.tolist() == [prefix.removeprefix("./") + f"{n:04d}" for n in range(4)]
    assert [found.image_bytes(n) for n in range(4)] == [real.image(n) for n in range(4)]
    works(tmp_path, "select", "--frac", "0.5")
    works(tmp_path, "verify", "subsets/random-0.5-s0")


def test_bad_images_are_kept_unused_when_asked(tmp_path: Path, real: Any, works: Any) -> None:
    for text in (b"hello", b"", real.image(0)[:60]):
        real.tar(tmp_path / "bad.tar", [*real.samples(), ("x.png", text), ("x.cls", b"1")])
        works(tmp_path, *INDEX, "--on-bad", "keep", "--overwrite")
        assert Dataset.open(tmp_path / "data/train").ok.tolist() == [True] * 4 + [False]
