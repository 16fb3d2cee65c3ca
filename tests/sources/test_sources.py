"""sources/: keys from paths, Parquet in its several shapes, class folders, digits; each refused in one line where it cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdprune_data import images, order
from kdprune_data.errors import KdpruneError, SourceError, UsageError
from kdprune_data.formats.foreign import read_ids, read_scores
from kdprune_data.sources import Item, SourceOptions, open_source
from kdprune_data.sources.base import key_of

Images = list[tuple[bytes, int]]


def items(where: Path | str, **options: Any) -> list[Item]:
    return list(open_source([str(where)], SourceOptions(**{"split": "train"} | options)))


def refusal(where: Path | str, kind: type[KdpruneError], **options: Any) -> str:
    def read() -> None:
        source = open_source([str(where)], SourceOptions(**{"split": "train"} | options))
        assert list(source) is not source.classes

    with pytest.raises(kind) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- keys


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a.jpg", "a"),
        ("cats/a.b.c.jpg", "cats/a_b_c"),
        ("v1.0/a.jpg", "v1.0/a"),
        ("no-extension", "no-extension"),
        (".jpg", "_jpg"),
        ("a..jpg", "a_"),
        ("ünder/猫.png", "%C3%BCnder/%E7%8C%AB"),
        ("a b/c d.png", "a b/c d"),
        ("tab\there.png", "tab%09here"),
        ("100%.png", "100%"),
        ("cats//a.jpg", "cats/a"),
        ("./a.jpg", "a"),
        ("x" * 90 + ".jpg", "x" * 90),
        ("bad-\udce4.jpg", "bad-%E4"),  # a file name that is no UTF-8, as Python hands it out
    ],
)
def test_key_of(path: str, key: str) -> None:
    assert key_of(path) == key


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("x" * 91 + ".jpg", "which is 91 bytes long: at most 90 fit; rename the file"),
        ("ü" * 16 + ".jpg", "which is 96 bytes long: at most 90 fit; rename the file"),
        ("", "which is empty; rename the file"),
        ("..", "rename"),
        ("../a.jpg", "rename"),
        ("cats/../../a.jpg", "rename"),
        ("/data/a.jpg", "rename"),
    ],
)
def test_a_path_that_makes_no_key_is_refused(path: str, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        key_of(path)
    assert repr(path) in str(caught.value)
    assert says in str(caught.value)


# --- Parquet


def parquet(
    path: Path, rows: list[Any], labels: list[Any], *, names: list[str] | None = None, columns: tuple[str, str] = ("image", "label")
) -> Path:
    """A Parquet file of images (dicts of bytes and path, or plain bytes) and labels; `names` in a ClassLabel, as Hugging Face writes it."""
    image, label = columns
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if isinstance(rows[0], dict) else pa.binary()
    made = pa.table({image: pa.array(rows, kind), label: pa.array(labels)})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path)
    return path


def rows_of(found: Images, paths: list[str | None] | None = None) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": paths[n] if paths else None} for n, (data, _) in enumerate(found)]


def test_hugging_face_parquet(tmp_path: Path, small_images: Images) -> None:
    some = small_images[:20]
    names = [f"digit {n}" for n in range(10)]
    path = parquet(tmp_path / "x.parquet", rows_of(some), [label for _, label in some], names=names)
    source = open_source([str(path)], SourceOptions("train"))
    assert (source.name, len(source), list(source.classes)) == ("parquet", 20, names)
    assert [(i.key, i.data, i.label) for i in source] == [(f"{n:08d}", data, label) for n, (data, label) in enumerate(some)]
    assert [i.origin for i in source][3] == f"{path} row 3"


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        (["a.b.jpg", "ü.jpg", "cats/c.png"], ["a_b", "%C3%BC", "cats/c"]),
        (["a.jpg", None, "c.jpg"], None),
        (["a.jpg", "a.jpg", "c.jpg"], None),
        (["/data/a.jpg", "/data/b.jpg", "/data/c.jpg"], None),  # not relative: the keys would point outside a tar
        (["../a.jpg", "b.jpg", "c.jpg"], None),
    ],
)
def test_keys_from_the_path_column(tmp_path: Path, small_images: Images, paths: list[str | None], keys: list[str] | None) -> None:
    path = parquet(tmp_path / "x.parquet", rows_of(small_images[:3], paths), [0, 1, 0])
    assert [i.key for i in items(path)] == (keys or ["00000000", "00000001", "00000002"])


@pytest.mark.parametrize("column", ["image", "img", "jpg", "png"])
@pytest.mark.parametrize("label", ["label", "labels", "cls", "fine_label"])
def test_a_binary_column_and_usual_names(tmp_path: Path, small_images: Images, column: str, label: str) -> None:
    path = parquet(tmp_path / "x.parquet", [data for data, _ in small_images[:3]], [2, 0, 2], columns=(column, label))
    found = items(path)
    assert [i.data for i in found] == [data for data, _ in small_images[:3]]
    assert [i.label for i in found] == [2, 0, 2]
    assert list(open_source([str(path)], SourceOptions("train")).classes) == ["class 0", "class 1", "class 2"]


def test_columns_by_name(tmp_path: Path, small_images: Images) -> None:
    path = parquet(tmp_path / "x.parquet", [data for data, _ in small_images[:3]], ["dog", "cat", "dog"], columns=("picture", "animal"))
    assert "which column holds the image? name it with --image-column: picture, animal" in refusal(path, UsageError)
    assert "which column holds the label? name it with --label-column: picture, animal" in refusal(path, UsageError, image_column="picture")
    found = items(path, image_column="picture", label_column="animal")
    assert [i.label for i in found] == [1, 0, 1]
    assert "has no column 'pic': it has picture, animal" in refusal(path, UsageError, image_column="pic", label_column="animal")
    assert "column 'animal' is string: not images" in refusal(path, UsageError, image_column="animal", label_column="animal")


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_rows_without_a_label(tmp_path: Path, small_images: Images, names: list[str] | None) -> None:
    """Null, or -1 as Hugging Face's ClassLabel says it."""
    path = parquet(tmp_path / "x.parquet", rows_of(small_images[:4]), [2, None, -1, 0], names=names)
    assert [i.label for i in items(path)] == [2, None, None, 0]
    assert len(open_source([str(path)], SourceOptions("train")).classes) == 3


def test_string_labels_are_sorted_into_classes(tmp_path: Path, small_images: Images) -> None:
    labels = ["dog", "cat", None, "ant", "dog"]
    path = parquet(tmp_path / "x.parquet", rows_of(small_images[:5]), labels)
    assert list(open_source([str(path)], SourceOptions("train")).classes) == ["ant", "cat", "dog"]
    assert [i.label for i in items(path)] == [2, 1, None, 0, 2]


def test_a_folder_of_parquet_files_is_one_source(tmp_path: Path, small_images: Images) -> None:
    whole = parquet(tmp_path / "whole.parquet", rows_of(small_images[:9]), [n % 3 for n in range(9)])
    for n in range(3):
        part = slice(3 * n, 3 * n + 3)
        parquet(tmp_path / "parts" / f"part-{n}.parquet", rows_of(small_images[part]), [k % 3 for k in range(9)][part])
    assert [i[:3] for i in items(tmp_path / "parts")] == [i[:3] for i in items(whole)]
    parquet(tmp_path / "parts" / "part-9.parquet", [b"x"], [0])
    assert "has other columns than" in refusal(tmp_path / "parts", SourceError)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train-0.parquet", "test-0.parquet"], "'test', 'train'"),
        (["Train.parquet", "val_1.parquet", "validation-00000-of-00001.parquet"], "'train', 'val', 'validation'"),
        (["dev1.parquet", "valid.parquet"], "'dev', 'valid'"),
        (["train-0.parquet", "train-1.parquet", "testimony.parquet", "valley.parquet"], None),
    ],
)
def test_a_folder_of_several_splits_is_refused(tmp_path: Path, small_images: Images, files: list[str], splits: str | None) -> None:
    for name in files:
        parquet(tmp_path / name, rows_of(small_images[:2]), [0, 1])
    if splits is None:
        assert len(items(tmp_path)) == 2 * len(files)
    else:
        said = refusal(tmp_path, UsageError)
        assert said == f"{tmp_path} holds files of several splits ({splits}): import one at a time, by its file or a folder of its own"


TEXTS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("struct", [False, True])
def test_the_types_that_others_write(tmp_path: Path, small_images: Images, binary: Any, text: Any, struct: bool) -> None:
    """polars writes large texts and bytes or views of them, pandas categories as dictionaries; in two files, each with its own."""
    labels = [["dog", "cat", None], ["ant", "dog", "dog"]]
    for n, part in enumerate(labels):
        data = [image for image, _ in small_images[3 * n : 3 * n + 3]]
        kind = pa.struct([("bytes", binary), ("path", text if not pa.types.is_dictionary(text) else pa.string())]) if struct else binary
        rows = [{"bytes": one, "path": f"{n}-{k}.png"} for k, one in enumerate(data)] if struct else data
        made = pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary())})
        made = pa.table({"image": made["image"].cast(kind), "label": pa.array(part).cast(pa.string()).cast(text)})
        pq.write_table(made, tmp_path / f"{n}.parquet")
    found = items(tmp_path)
    assert list(open_source([str(tmp_path)], SourceOptions("train")).classes) == ["ant", "cat", "dog"]
    assert [i.data for i in found] == [data for data, _ in small_images[:6]]
    assert [i.label for i in found] == [2, 1, None, 0, 2, 2]
    assert [i.key for i in found] == ([f"{n}-{k}" for n in range(2) for k in range(3)] if struct else [f"{n:08d}" for n in range(6)])


def test_categories_of_numbers(tmp_path: Path, small_images: Images) -> None:
    column = pa.array([2, 0, 2]).dictionary_encode()
    pq.write_table(pa.table({"image": [data for data, _ in small_images[:3]], "label": column}), tmp_path / "x.parquet")
    assert [i.label for i in items(tmp_path / "x.parquet")] == [2, 0, 2]


@pytest.mark.parametrize(
    ("own", "train", "numbers"),
    [
        (["b", "d"], ["a", "b", "c", "d"], [1, 3]),
        (["d", "b"], ["a", "b", "c", "d"], [3, 1]),
        (["a", "x"], ["a", "b"], None),  # one that train has not
        (["a", "b"], ["a", "crane", "crane", "b"], None),  # which number the name means cannot be known
        (["a", "crane", "crane"], ["a", "crane", "crane"], [0, 1, 2]),
    ],
)
def test_named_classes_are_numbered_as_in_train(
    tmp_path: Path, small_images: Images, own: list[str], train: list[str], numbers: list[int] | None
) -> None:
    path = parquet(tmp_path / "x.parquet", rows_of(small_images[: len(own)]), list(range(len(own))), names=own)
    source = open_source([str(path)], SourceOptions("test", train=train))
    assert list(source.classes) == (own if numbers is None else train)
    assert [i.label for i in source] == (numbers or list(range(len(own))))


@pytest.mark.parametrize(
    ("rows", "labels", "names", "kind", "says"),
    [
        (
            [{"bytes": None, "path": "a.jpg"}],
            [0],
            ["a"],
            SourceError,
            "row 0 has no image bytes: only Parquet that holds the images themselves",
        ),
        ([None], [0], None, SourceError, "row 0 has no image bytes"),
        ([b"x", b"y"], [0, 5], ["a", "b"], SourceError, "row 1 has label 5, outside 0 to 1 ('a', 'b'): mend it or drop the row"),
        ([b"x"], [-2], ["a"], SourceError, "row 0 has label -2, outside 0 to 0 ('a')"),
        ([b"x"], [0.5], None, UsageError, "which column holds the label?"),
        ([{"bytes": b"x", "path": ""}], [0], None, SourceError, "empty"),
    ],
)
def test_parquet_that_cannot_be_imported(
    tmp_path: Path, rows: list[Any], labels: list[Any], names: list[str] | None, kind: type[KdpruneError], says: str
) -> None:
    assert says in refusal(parquet(tmp_path / "x.parquet", rows, labels, names=names), kind)


def test_a_parquet_file_without_rows_or_of_something_else(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "x.parquet")
    assert "has no rows: nothing to import" in refusal(tmp_path / "x.parquet", SourceError)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not")
    assert "cannot be read as Parquet" in refusal(tmp_path / "x.parquet", SourceError)


def test_a_parquet_file_that_is_damaged_inside(tmp_path: Path, small_images: Images) -> None:
    """Its footer reads; a page does not."""
    path = parquet(tmp_path / "x.parquet", rows_of(small_images), [0] * len(small_images))
    raw = bytearray(path.read_bytes())
    raw[40 : len(raw) // 2] = bytes(len(raw) // 2 - 40)
    path.write_bytes(raw)
    assert "x.parquet cannot be read as Parquet (" in refusal(path, SourceError)


def test_the_research_data_is_read(real_data: Path) -> None:
    source = open_source([str(real_data / "photos" / "train.parquet")], SourceOptions("train"))
    found = list(source)
    assert len(found) == len(source) == 100
    assert sorted(i.label for i in found if i.label is not None) == list(range(100))
    assert len(source.classes) == 100
    assert sum(len(i.data) for i in found) <= source.bytes


# --- class folders


def test_class_folders(class_folders: Path, small_images: Images) -> None:
    source = open_source([str(class_folders)], SourceOptions("train"))
    found = list(source)
    assert list(source.classes) == sorted(p.name for p in class_folders.iterdir())
    assert len(source) == len(found) == 30
    assert source.bytes == sum(len(i.data) for i in found)
    assert [i.key for i in found] == sorted(i.key for i in found)
    for item in found:
        data, label = small_images[int(item.key[-3:])]
        assert (item.data, source.classes[item.label or 0], item.key) == (data, f"digit-{label}", f"digit-{label}/{item.key[-3:]}")
        assert Path(item.origin).read_bytes() == data


def test_what_is_passed_over_in_class_folders(class_folders: Path) -> None:
    before = [i[:3] for i in items(class_folders)]
    (class_folders / ".git").mkdir()
    (class_folders / ".git" / "a.jpg").write_bytes(b"x")
    (class_folders / "digit-0" / ".hidden.jpg").write_bytes(b"x")
    (class_folders / "digit-0" / "notes.txt").write_bytes(b"x")
    (class_folders / "notes").mkdir()
    (class_folders / "notes" / "a.txt").write_bytes(b"x")
    (class_folders / "README.md").write_bytes(b"x")
    source = open_source([str(class_folders)], SourceOptions("train"))
    assert [i[:3] for i in source] == before
    assert source.left_out == ["README.md", "digit-0/notes.txt", "notes/a.txt"]
    assert "notes" not in source.classes


@pytest.mark.parametrize("name", ["A.JPG", "a.Jpeg", "deep/er/a.png", "ü.webp", "a.b.c.jpg"])
def test_extensions_depths_and_names(tmp_path: Path, small_images: Images, name: str) -> None:
    path = tmp_path / "x" / "cat" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(small_images[0][0])
    (found,) = items(tmp_path / "x")
    assert (found.key, found.label) == (key_of(f"cat/{name}"), 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ([], "holds no image (.jpg .jpeg .png .webp): give a folder with a folder per class"),
        (["a.txt"], "holds no image"),
        (["cat/a.jpg", "b.jpg", "c.jpg"], "b.jpg is in no class folder (2 such): move images into CLASS/ folders"),
    ],
)
def test_a_folder_that_cannot_be_imported(tmp_path: Path, make: list[str], says: str) -> None:
    root = tmp_path / "x"
    root.mkdir()
    for name in make:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    assert says in refusal(root, SourceError)


def test_a_class_whose_name_is_no_utf8_is_refused(tmp_path: Path, small_images: Images) -> None:
    folder = os.fsencode(tmp_path) + b"/x/gr\xfcn"
    os.makedirs(folder)  # noqa: PTH103 - bytes
    Path(os.fsdecode(folder), "a.png").write_bytes(small_images[1][0])
    assert "is not UTF-8: rename" in refusal(tmp_path / "x", SourceError)


# --- digits


def test_digits_are_split_by_hash_four_to_one() -> None:
    from sklearn.datasets import load_digits

    train, test = items("digits"), items("digits", split="test")
    assert (len(train), len(test)) == (1438, 359)  # floor(0.2 * 1797 + 1/2) = 359
    keys = [i.key for i in train] + [i.key for i in test]
    assert sorted(keys) == [f"{n:08d}" for n in range(1797)]
    hashes = order.order_hash(order.uids_of(keys), 0, "digits")
    assert hashes[1438:].max() < hashes[:1438].min()
    theirs = load_digits()
    for item in (*train[::50], *test[::50]):
        n = int(item.key)
        grey = images.decode(item.data)
        assert np.array_equal(grey, np.repeat(np.rint(theirs.images[n] * 255 / 16).astype(np.uint8)[:, :, None], 3, 2))
        assert item.label == theirs.target[n]


def test_digits_have_no_val_split() -> None:
    assert refusal("digits", UsageError, split="val") == ("digits has no split 'val': import train (with --holdout 0.1 for val) or test")


# --- which source


ADVICE = "give Parquet files, WebDataset shards, a folder of class folders, or the word digits"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", f"does not exist: {ADVICE}"),
        ("nowhere.tar", f"does not exist: {ADVICE}"),
        ("x.zip", f"is not a kind that can be imported: {ADVICE}"),
        ("x.tar.gz", "is not a kind that can be imported: it is compressed: unpack it (gzip -dk) first"),
        ("no*.parquet", "the pattern '"),
        ("no-{0..2}.tar", "no such file: '"),
    ],
)
def test_what_is_no_source(tmp_path: Path, name: str, says: str) -> None:
    if name.startswith("x"):
        (tmp_path / name).write_bytes(b"x")
    assert says in refusal(tmp_path / name, UsageError)


def test_several_sources_are_of_one_kind(tmp_path: Path, class_folders: Path, small_images: Images) -> None:
    for n in range(3):
        parquet(tmp_path / f"part-{n}.parquet", rows_of(small_images[3 * n : 3 * n + 3]), [0, 1, 0])
    (tmp_path / "x.tar").write_bytes(b"x")

    def keys(*where: str) -> list[bytes]:
        return [i.data for i in open_source([str(tmp_path / w) for w in where], SourceOptions("train"))]

    def refused(*where: str, **options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            open_source([w if w == "digits" else str(tmp_path / w) for w in where], SourceOptions("train", **options))
        return str(caught.value)

    data = [image for image, _ in small_images[:9]]
    assert keys("part-*.parquet") == keys("part-{0..2}.parquet") == keys("part-0.parquet", "part-1.parquet", "part-2.parquet") == data
    assert keys("part-2.parquet", "part-0.parquet") == data[6:] + data[:3]  # in the order given
    assert refused("part-0.parquet", "x.tar").endswith("x.tar is WebDataset shards: import sources of one kind at a time")
    assert "is listed twice: name each file once" in refused("part-0.parquet", "part-*.parquet")
    assert "matches files of several kinds" in refused("*.[pt]ar*")
    assert "are several sources, each with classes of its own" in refused("digits", "digits")
    assert "holds Parquet files and tars" in refused(".")
    assert (
        refused("digits", image_member="jpg")
        == "--image-member goes with WebDataset shards, and the source is scikit-learn's digits: leave it out"
    )
    assert "--image-column goes with Parquet files, and the source is a folder of class folders" in refused("folders", image_column="x")
    assert "--image-column goes with Parquet files" in refused("folders", image_column="key")
    assert "--id goes with WebDataset shards" in refused("folders", id="shard")


def test_tars_beside_folders_may_be_either(tmp_path: Path, class_folders: Path) -> None:
    (class_folders / "x.tar").write_bytes(b"x")
    said = refusal(class_folders, UsageError)
    assert said.startswith(f"{class_folders} holds tars and folders (")
    assert said.endswith(f"name the tars to import, as '{class_folders}/*.tar', or move them out of the class folders")
    (class_folders / "x.tar").rename(class_folders / ".x.tar")
    assert items(class_folders)


def test_files_of_several_splits_may_be_named_one_by_one(tmp_path: Path, small_images: Images) -> None:
    """A glob may catch a test set; a list is meant."""
    paths = [parquet(tmp_path / f"{name}.parquet", rows_of(small_images[:2]), [0, 1]) for name in ("train", "val")]
    assert "holds files of several splits ('train', 'val')" in refusal(tmp_path / "*.parquet", UsageError)
    assert len(list(open_source([str(p) for p in paths], SourceOptions("train")))) == 4


@pytest.mark.parametrize("read_bytes", [1, 1000, 10**9])
def test_parquet_is_read_in_parts_that_fit(tmp_path: Path, small_images: Images, read_bytes: int) -> None:
    path = parquet(tmp_path / "x.parquet", rows_of(small_images), [0] * len(small_images))
    assert [i.data for i in items(path, read_bytes=read_bytes)] == [data for data, _ in small_images]


def test_labels_of_parquet_that_are_no_class_numbers(tmp_path: Path, small_images: Images) -> None:
    path = parquet(tmp_path / "x.parquet", rows_of(small_images[:2]), [0, 20_240_131])
    assert "has label 20,240,131: without class names at most 999,999; number the classes from 0" in refusal(path, SourceError)


def test_links_between_class_folders_are_followed_once(class_folders: Path) -> None:
    (class_folders / "digit-0" / "more").symlink_to(class_folders / "digit-1")
    (class_folders / "digit-1" / "more").symlink_to(class_folders / "digit-0")
    found = [i.key for i in items(class_folders)]
    assert any(key.startswith("digit-0/more/") for key in found)
    assert not any(key.count("/more/") > 1 for key in found)


def test_a_link_to_nothing_is_named(class_folders: Path) -> None:
    (class_folders / "digit-0" / "z.png").symlink_to(class_folders / "gone.png")
    assert refusal(class_folders, SourceError).endswith("z.png is a link to nothing: remove it, or fetch what it names")


def test_an_artefact_is_no_source(digits: Path) -> None:
    assert "is a finished artefact, no source: use it as it is (--data" in refusal(digits / "data" / "train", UsageError)
    assert "is named by an empty text" in refusal("", UsageError)
    assert len(items(digits / "data" / "val" / "*.tar")) == 144


def test_a_source_describes_itself_without_places(class_folders: Path, tmp_path: Path, small_images: Images) -> None:
    """The same source elsewhere is the same; another file, or another size, is not."""

    def said(where: Path) -> dict[str, Any]:
        return open_source([str(where)], SourceOptions("train")).describe()

    moved = shutil.copytree(class_folders, tmp_path / "moved")
    assert said(moved) == said(class_folders)
    next(moved.rglob("*.png")).write_bytes(b"x")
    assert said(moved) != said(class_folders)
    one = parquet(tmp_path / "a" / "x.parquet", rows_of(small_images[:3]), [0, 1, 0])
    other = parquet(tmp_path / "b" / "x.parquet", rows_of(small_images[:3]), [0, 1, 0])
    assert said(one) == said(other)
    assert str(tmp_path) not in json.dumps(said(one))
    size = other.stat().st_size
    parquet(other, rows_of(small_images[:3]), [0, 2, 0])
    assert other.stat().st_size == size
    assert said(one) != said(other)  # the same name and size, but a label was changed: its largest stands in the footer


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint64"])
@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_the_largest_int32_is_no_class_number(tmp_path: Path, small_images: Images, dtype: str, names: list[str] | None) -> None:
    path = parquet(tmp_path / "x.parquet", rows_of(small_images[:2]), np.asarray([0, 2**31 - 1], dtype), names=names)  # type: ignore[arg-type]
    says = "row 1 has label 2147483647, outside 0 to 1" if names else "has label 2,147,483,647: without class names at most 999,999"
    assert says in refusal(path, SourceError)


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        ([None, -1], ["a"], "no sample has a label: name the column that holds them with --label-column, if there is one"),
        (
            [0, 1],
            None,
            "classes are unnamed: the schema has no names of theirs (mirroring is right for photographs, wrong for digits: --flip",
        ),
        ([0, 1], ["a", "b"], ""),
        (["a", "b"], None, ""),
    ],
)
def test_what_is_said_of_labels(tmp_path: Path, small_images: Images, labels: list[Any], names: list[str] | None, says: str) -> None:
    source = open_source([str(parquet(tmp_path / "x.parquet", rows_of(small_images[:2]), labels, names=names))], SourceOptions("train"))
    assert says in "".join(source.notes)
    assert bool(source.notes) == bool(says)


def test_repeated_images_are_counted_as_often_as_they_stand(tmp_path: Path) -> None:
    """A dictionary holds them once: 200 rows of 50 kB take a few in the file, and few rows at a time are read."""
    data = [np.random.default_rng(n).bytes(50_000) for n in range(3)]
    path = parquet(tmp_path / "x.parquet", [{"bytes": data[n % 3], "path": None} for n in range(200)], [0] * 200)
    assert path.stat().st_size < 400_000
    source = open_source([str(path)], SourceOptions("train", read_bytes=100_000))
    assert source.bytes == 200 * 50_000
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    largest = 0
    for n, item in enumerate(source):
        assert item.data == data[n % 3]
        largest = max(largest, pool.bytes_allocated() - before)
    assert largest < 2_000_000


@pytest.mark.parametrize(
    ("mode", "says"), [(0o000, "cannot list ./digit-1 (Permission denied): let it be"), (0o444, "cannot read digit-1/")]
)
def test_folders_that_cannot_be_read_are_named(class_folders: Path, mode: int, says: str) -> None:
    """By a child without root's rights, which root must start in the folder: it could not come there by itself."""
    program = (
        "import os\nfrom kdprune_data.sources import SourceOptions, folder, open_source\nos.geteuid() or os.setuid(65534)\n"
        "try: print(len(open_source(['.'], SourceOptions('train'))))\nexcept Exception as error: print(error)"
    )
    (class_folders / "digit-1").chmod(mode)
    done = subprocess.run([sys.executable, "-c", program], cwd=class_folders, capture_output=True, text=True, check=False)
    (class_folders / "digit-1").chmod(0o755)
    assert done.stdout.startswith(says), done.stderr


@pytest.mark.parametrize("read", [lambda path: read_scores(path, "mine"), read_ids])
def test_rows_without_an_id_are_refused_naming_the_file(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table({"id": ["a", None, None], "mine": [1.0, 2.0, 3.0]}), path)
    with pytest.raises(SourceError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: the id column has 2 empty rows: every row needs an id"
