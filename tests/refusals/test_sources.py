"""`import` of sources that cannot be used, and of odd ones that can: what is said, that nothing is left, what is stored."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from kdprune_data import images
from kdprune_data.formats.dataset import Dataset

IMPORT = ["import", "bad"]
BAD_IMAGE = r"mend or remove it, or pass --on-bad keep"


def files(**made: Callable[[Any], bytes]) -> Callable[[Path, Any], object]:
    """Good class folders with files more in `digit-0`; `__` in a name is a dot."""

    def prepare(w: Path, real: Any) -> None:
        real.folders(w / "bad")
        for name, data in made.items():
            real.put(w / "bad" / "digit-0" / name.replace("__", "."), data(real))

    return prepare


def bomb(_: Any) -> bytes:
    """The head of a PNG of 180 million pixels."""
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20_000).to_bytes(4, "big") + (9_000).to_bytes(4, "big") + b"\x08\0\0\0\0"
    return head + zlib.crc32(head[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


def rows(labels: Any, images: Any = None) -> Callable[[Path, Any], object]:
    return lambda w, real: real.parquet(w / "bad.parquet", labels, images)


def link(name: str, to: str) -> Callable[[Path, Any], object]:
    def prepare(w: Path, real: Any) -> None:
        real.folders(w / "bad")
        (w / name).symlink_to(to)

    return prepare


def _cut(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:700])


def _two(w: Path, real: Any) -> None:
    for name in ("bad.tar", "worse.tar"):
        real.tar(w / name, real.samples())


PARQUET = ["import", "bad.parquet"]
GOOD = files()

REFUSED: list[tuple[str, Callable[[Path, Any], object] | None, list[str], int, str]] = [
    ("missing", None, IMPORT, 2, r"source 'bad' does not exist: give Parquet files, WebDataset shards, a folder"),
    ("an empty folder", lambda w, _: (w / "bad").mkdir(), IMPORT, 1, r"bad holds no image \(.*\): give a folder with a folder per class"),
    ("an empty file", lambda w, _: (w / "bad").touch(), IMPORT, 2, r"source 'bad' is not a kind that can be imported: give"),
    ("a pipe", lambda w, _: os.mkfifo(w / "bad"), IMPORT, 2, r"source 'bad' is not a kind that can be imported: give"),
    ("a link to itself", lambda w, _: (w / "bad").symlink_to("bad"), IMPORT, 2, r"source 'bad' does not exist: give"),
    ("a name that is not UTF-8", None, ["import", "b\udce4d"], 2, r"source 'b\\udce4d' does not exist: give"),
    ("a name of two lines", None, ["import", "b\nd"], 2, r"source 'b\\nd' does not exist: give"),
    (
        "text for an image",
        files(x__png=lambda _: b"hello"),
        IMPORT,
        1,
        r"bad/digit-0/x.png \(key 'digit-0/x'\): not a JPEG, .*" + BAD_IMAGE,
    ),
    ("an image of no bytes", files(x__png=lambda _: b""), IMPORT, 1, r"bad/digit-0/x.png .*: an empty file, of 0 bytes; " + BAD_IMAGE),
    ("half a PNG", files(x__png=lambda r: r.image(0)[:60]), IMPORT, 1, r"x.png .*: not an image that decodes \(\w+\); " + BAD_IMAGE),
    ("half a JPEG", files(x__jpg=lambda r: r.image(0, "JPEG")[:400]), IMPORT, 1, r"x.jpg .*: not an image that decodes .*" + BAD_IMAGE),
    (
        "half a WebP",
        files(x__webp=lambda r: r.image(0, "WEBP", "RGB")[:60]),
        IMPORT,
        1,
        r"x.webp .*: not an image that decodes .*" + BAD_IMAGE,
    ),
    ("a GIF called PNG", files(x__png=lambda r: r.image(0, "GIF")), IMPORT, 1, r"x.png .*: not a JPEG, PNG or WebP image; " + BAD_IMAGE),
    ("a BMP called JPEG", files(x__jpg=lambda r: r.image(0, "BMP")), IMPORT, 1, r"x.jpg .*: not a JPEG, PNG or WebP image; " + BAD_IMAGE),
    ("too many pixels", files(x__png=bomb), IMPORT, 1, r"x.png .*: an image of more pixels than the 178,956,970 .*; scale it down; "),
    (
        "one key twice",
        files(x__png=lambda r: r.image(0), x__jpg=lambda r: r.image(0, "JPEG")),
        IMPORT,
        1,
        r"x.jpg and .*x.png .*rename one",
    ),
    (
        "a dot for a line",
        files(a__b__png=lambda r: r.image(0), a_b__png=lambda r: r.image(1)),
        IMPORT,
        1,
        r"same key 'digit-0/a_b': rename",
    ),
    ("too long a key", files(**{"k" * 90 + "__png": lambda r: r.image(0)}), IMPORT, 1, r"which is 98 bytes long: at most 90 fit; rename"),
    (
        "too long, not ASCII",
        files(**{"ü" * 20 + "__png": lambda r: r.image(0)}),
        IMPORT,
        1,
        r"which is 128 bytes long: at most 90 fit; rename",
    ),
    (
        "loose images",
        lambda w, r: r.put(w / "bad/x.png", r.image(0)),
        IMPORT,
        1,
        r"bad/x.png is in no class folder \(1 such\): move images",
    ),
    (
        "a class that is not UTF-8",
        lambda w, r: r.put(w / "bad/gr\udcfcn/x.png", r.image(0)),
        IMPORT,
        1,
        r"'gr\\udcfcn', .* not UTF-8: rename",
    ),
    ("an image linked to nothing", link("bad/digit-0/z.png", "nowhere.png"), IMPORT, 1, r"bad/digit-0/z.png\b.*(check|remove)"),
    (
        "sources of two kinds",
        lambda w, r: (GOOD(w, r), rows(pa.array([0]))(w, r)),
        ["import", "bad", "bad.parquet"],
        2,
        r"one kind at a time",
    ),
    (
        "two folders",
        lambda w, r: (GOOD(w, r), r.folders(w / "more")),
        ["import", "bad", "more"],
        2,
        r"'bad', 'more' are several .*: import one",
    ),
    ("a pattern of nothing", None, ["import", "bad-*.tar"], 2, r"the pattern 'bad-\*.tar' matches no file: check the folder and the name"),
    ("a range of nothing", None, ["import", "bad-{0..3}.tar"], 2, r"no such file: 'bad-0.tar', .* and 1 more of .*; give files, a pattern"),
    (
        "half a tar",
        lambda w, r: _cut(r.tar(w / "bad.tar", r.samples())),
        ["import", "bad.tar"],
        1,
        r"bad.tar is .*(truncated|damaged).*; fetch it",
    ),
    (
        "one key in two tars",
        lambda w, r: _two(w, r),
        ["import", "bad.tar", "worse.tar"],
        1,
        r"bad.tar sample '\d+' and worse.tar .*--id shard",
    ),
    (
        "too much noise",
        GOOD,
        [*IMPORT, "--label-noise", "1.5"],
        2,
        r"--label-noise 1.5 is out of range: give the share of labels to change",
    ),
    (
        "noise in a test set",
        GOOD,
        [*IMPORT, "--split", "test", "--label-noise", "0.1"],
        2,
        r"--label-noise goes with --split train, not test",
    ),
    ("too large a seed", GOOD, [*IMPORT, "--seed", str(2**64)], 2, r"--seed 18446744073709551616 is too large: at most"),
    ("no rows", rows(pa.array([], pa.int64())), PARQUET, 1, r"bad.parquet has no rows: nothing to import"),
    (
        "no Parquet",
        lambda w, r: r.put(w / "bad.parquet", b"PAR1 not"),
        PARQUET,
        1,
        r"bad.parquet cannot be read as Parquet .*: fetch it again",
    ),
    (
        "a fraction for a label",
        rows(pa.array([0.5])),
        PARQUET,
        2,
        r"which column holds the label\? name it with --label-column: image, label",
    ),
    ("a label below 0", rows(pa.array([0, -2])), PARQUET, 1, r"row 1 has label -2, outside 0 to 0 .*: mend it or drop the row"),
    (
        "a row without image",
        rows(pa.array([0, 1]), [None, None]),
        PARQUET,
        1,
        r"bad.parquet row 0 has no image bytes: only Parquet that holds",
    ),
    (
        "a row that does not decode",
        rows(pa.array([0]), [b"x"]),
        PARQUET,
        1,
        r"bad.parquet row 0 .*: not a JPEG, PNG or WebP image; " + BAD_IMAGE,
    ),
    (
        "no such column",
        rows(pa.array([0])),
        [*PARQUET, "--label-column", "klass"],
        2,
        r"bad.parquet has no column 'klass': it has image, label",
    ),
    (
        "images for labels",
        rows(pa.array([0])),
        [*PARQUET, "--label-column", "image"],
        2,
        r"column 'image' is binary: not images .*; name another",
    ),
    (
        "a tenth of 6",
        GOOD,
        [*IMPORT, "--holdout", "1e-9"],
        2,
        r"--holdout 1E-9 sets 0 of 6 samples apart: train and val need at least one each",
    ),
    ("all of them", GOOD, [*IMPORT, "--holdout", "1"], 2, r"--holdout 1 sets 6 of 6 samples apart: train and val need at least one each"),
    *(
        (
            f"holdout {f!r}",
            GOOD,
            [*IMPORT, "--holdout", f],
            2,
            rf"--holdout {f} is no fraction to set apart as val: give a number above 0 and below 1",
        )
        for f in ("50%", "half", "1.5", "nan", "-1", "0")
    ),
    (
        "a file in the way",
        lambda w, r: (GOOD(w, r), (w / "f").touch()),
        [*IMPORT, "--out", "f"],
        2,
        r"f is a file, not a folder: choose another",
    ),
    (
        "a file above",
        lambda w, r: (GOOD(w, r), (w / "f").touch()),
        [*IMPORT, "--out", "f/g"],
        2,
        r"f is a file, not a folder: choose another",
    ),
    ("the source is the output", GOOD, [*IMPORT, "--out", "bad"], 2, r"bad holds files that are not an artefact: choose another --out"),
    ("and overwrite", GOOD, [*IMPORT, "--out", "bad", "--overwrite"], 2, r"bad holds files that are not an artefact: choose another --out"),
    ("here", GOOD, [*IMPORT, "--out", "."], 2, r"holds files that are not an artefact: choose another --out"),
    ("the source in the output", lambda w, r: r.folders(w / "data/train/x"), ["import", "data/train/x"], 2, r"data/train holds files that"),
    ("too long an --out", GOOD, [*IMPORT, "--out", "o" * 300], 2, r"the folder name 'o+'... is 300 bytes long: at most 240 fit; choose"),
    ("no threads", GOOD, [*IMPORT, "-j", "0"], 2, r"--jobs 0 is too small: at least 1"),
    ("fewer threads than none", GOOD, [*IMPORT, "--jobs", "-1"], 2, r"--jobs -1 is too small: at least 1"),
    ("a negative seed", GOOD, [*IMPORT, "--seed", "-1"], 2, r"--seed -1 is too small: at least 0"),
    ("too little memory", GOOD, [*IMPORT, "--memory", "5"], 2, r"--memory 5 is too small: at least 1,000,000"),
    ("too small a shard", GOOD, [*IMPORT, "--shard-bytes", "5"], 2, r"--shard-bytes 5 is too small: at least 4,096"),
    (
        "an unknown option",
        GOOD,
        [*IMPORT, "--hold-out", "0.1"],
        2,
        r"'--hold-out'.*Did you mean.*'--holdout'.*see kdprune-data import --help",
    ),
    ("an unknown split", GOOD, [*IMPORT, "--split", "dev"], 2, r"'dev' is not one of 'train', 'val', 'test'"),
]


@pytest.mark.parametrize(("name", "prepare", "line", "code", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_source_that_is_refused(
    tmp_path: Path, real: Any, refuses: Any, works: Any, name: str, prepare: Any, line: list[str], code: int, said: str
) -> None:
    real.folders(tmp_path / "good")
    if prepare is not None:
        prepare(tmp_path, real)
    refuses(tmp_path, line, code, said)
    if not (tmp_path / "data/train").exists():  # as it does where that holds the source
        works(tmp_path, "import", "good")


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("classes", [["digit-1", "digit-x"], ["cat"]], ids=["a class more", "another class"])
def test_other_classes_than_train(tmp_path: Path, real: Any, refuses: Any, works: Any, classes: list[str], split: str) -> None:
    works(tmp_path, "import", real.folders(tmp_path / "good"))
    for n, one in enumerate(classes):
        real.put(tmp_path / "bad" / one / "x.png", real.image(n))
    said = rf"the classes of this {split} split are not those of data/train: {len(classes)} against 6, differing in .*; use a source with"
    refuses(tmp_path, [*IMPORT, "--split", split], 2, said)
    works(tmp_path, "import", "good", "--split", split)


def test_an_artefact_in_an_artefact(tmp_path: Path, real: Any, refuses: Any, works: Any) -> None:
    works(tmp_path, "import", real.folders(tmp_path / "good"))
    refuses(
        tmp_path, ["import", "good", "--out", "data/train/more"], 2, r"data/train/more lies inside an artefact \(.*\).*choose another --out"
    )


ACCEPTED: list[tuple[str, Callable[[Any], bytes], str]] = [
    *((f"a JPEG in {mode}", lambda r, mode=mode: r.image(0, "JPEG", mode), "jpg") for mode in ("RGB", "L", "CMYK", "YCbCr", "1")),
    *((f"a PNG in {mode}", lambda r, mode=mode: r.image(0, "PNG", mode), "png") for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")),
    *((f"a WebP in {mode}", lambda r, mode=mode: r.image(0, "WEBP", mode), "webp") for mode in ("RGB", "RGBA", "L")),
    ("a PNG that moves", lambda r: r.moving("PNG"), "png"),
    ("a WebP that moves", lambda r: r.moving("WEBP"), "webp"),
    ("a palette that shines through", lambda r: r.image(0, "PNG", "P", transparency=3), "png"),
    ("progressive", lambda r: r.image(0, "JPEG", "RGB", progressive=True), "jpg"),
    ("1 pixel", lambda r: images.encode_png(np.full((1, 1), 7, np.uint8)), "png"),
]


@pytest.mark.parametrize("called", ["jpg", "PNG"])
@pytest.mark.parametrize(("name", "make", "kept_as"), ACCEPTED, ids=[case[0] for case in ACCEPTED])
def test_an_odd_image_is_kept_as_it_is(
    tmp_path: Path, real: Any, works: Any, name: str, make: Callable[[Any], bytes], kept_as: str, called: str
) -> None:
    """Whatever the file is called: the bytes are those of the file, the member is named for what they are, and Pillow's pixels are read."""
    data = make(real)
    real.put(tmp_path / "odd" / "one" / f"x.{called}", data)
    works(tmp_path, "import", "odd")
    found = Dataset.open(tmp_path / "data/train")
    assert (found.ids.tolist(), found.ok.tolist(), found.image_bytes(0)) == (["one/x"], [True], data)
    assert f"one/x.{kept_as}".encode() in (tmp_path / "data/train/shard-000000.tar").read_bytes()[:100]
    with Image.open(io.BytesIO(data)) as image:
        image.info.pop("transparency", None)
        wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(images.decode(found.image_bytes(0)), wanted)
    assert found.sizes.tolist() == [list(wanted.shape[:2])]


@pytest.mark.parametrize("name", ["größe x.png", "a\nb.png", "日本.png", "bad-\udce4.png", "'; rm -rf $HOME.png", "a.b.c.png", "%41.png"])
def test_an_odd_name_makes_a_plain_key(tmp_path: Path, real: Any, works: Any, name: str) -> None:
    real.put(tmp_path / "odd source\n" / "größe" / name, real.image(0))
    works(tmp_path, "import", "odd source\n")
    found = Dataset.open(tmp_path / "data/train")
    assert found.ids[0].isascii()
    assert found.ids[0].isprintable()
    assert found.image_bytes(0) == real.image(0)
    assert list(found.classes) == ["größe"]
    works(tmp_path, "verify", "data/train")


def test_links_are_followed_once(tmp_path: Path, real: Any, works: Any) -> None:
    real.folders(tmp_path / "bad")
    (tmp_path / "bad/digit-0/again").symlink_to("..")
    (tmp_path / "bad/digit-9").symlink_to("digit-1")
    works(tmp_path, *IMPORT)
    assert sorted(Dataset.open(tmp_path / "data/train").ids)[-1] == "digit-9/0001"
