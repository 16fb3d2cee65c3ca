"""pipelines/import_.py: image bytes arrive untouched, whatever the threads and the memory; an exact holdout; what is refused."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import import_, index, select, verify
from kdprune_pipelines._console import Outcome
from PIL import Image

from kdprune_data import images, order
from kdprune_data.errors import ExistsError, KdpruneError, SourceError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.members import UNNAMED

Digests = Callable[[Path], dict[str, str]]
Images = list[tuple[bytes, int]]


def run(source: Path | str | list[str], out: Path, **settings: Any) -> Outcome:
    return import_.run(
        import_.ImportConfig.from_dict({"source": source if isinstance(source, list) else str(source), "out": out} | settings)
    )


def refusal(kind: type[KdpruneError], source: Path | str, out: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        run(source, out, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def cifar(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 1,500 training images of CIFAR-10 in a Parquet file, schema and class names as they were."""
    whole = pq.ParquetFile(real_data / "cifar10" / "train.parquet")
    rows = next(whole.iter_batches(1500))
    path = tmp_path_factory.mktemp("cifar") / "train.parquet"
    pq.write_table(pa.Table.from_batches([rows]), path, row_group_size=400)
    return path


def test_imported_bytes_are_those_of_the_source(cifar: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    run(cifar, out, shard_samples=400)
    read = Dataset.open(out)
    source = pq.read_table(cifar)
    metadata = json.loads((source.schema.metadata or {})[b"huggingface"])
    assert list(read.classes) == metadata["info"]["features"]["label"]["names"]
    rows = source.to_pylist()
    by_key = {key_of(row, n): row for n, row in enumerate(rows)}
    assert len(read) == len(by_key) == 1500
    for n, key in enumerate(read.ids.tolist()):
        assert read.image_bytes(n) == by_key[key]["image"]["bytes"]
        assert read.labels[n] == by_key[key]["label"]
    hashes = order.order_hash(read.uids, 0, "import")
    assert (hashes[1:] > hashes[:-1]).all()
    assert read.manifest.counts == {
        "samples": 1500,
        "ok": 1500,
        "shards": 4,
        "labelled": 1500,
        "per_class": np.bincount([row["label"] for row in rows]).tolist(),
    }


def key_of(row: dict[str, Any], n: int) -> str:
    return Path(row["image"]["path"]).stem if row["image"]["path"] else f"{n:08d}"


@pytest.mark.parametrize("settings", [{"jobs": 4}, {"jobs": 4, "memory": 1_000_000}, {"jobs": 1, "memory": 1_000_000}])
def test_threads_and_memory_change_no_byte(cifar: Path, tmp_path: Path, digests: Digests, settings: dict[str, int]) -> None:
    """1.5 MB of images: above the megabyte they go through spool files."""
    common = {"shard_samples": 111, "shard_bytes": 150_000, "holdout": "0.1"}
    run(cifar, tmp_path / "one" / "train", jobs=1, **common)
    run(cifar, tmp_path / "other" / "train", **(common | settings))
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    one, other = (Manifest.load(tmp_path / name / "train") for name in ("one", "other"))
    assert (one.digest, one.content) == (other.digest, other.content)


@pytest.mark.parametrize(("rate", "val"), [("0.1", 144), ("0.25", 360), ("0.001", 1), ("0.5", 719)])
def test_holdout_is_exact_and_by_hash(tmp_path: Path, rate: str, val: int) -> None:
    """Of 1,438 digits; the ones with the smallest holdout hashes."""
    run("digits", tmp_path / "train", holdout=rate)
    train, aside = Dataset.open(tmp_path / "train"), Dataset.open(tmp_path / "val")
    assert (len(train), len(aside)) == (1438 - val, val)
    assert order.order_hash(aside.uids, 0, "holdout").max() < order.order_hash(train.uids, 0, "holdout").min()
    assert aside.manifest.name == "val"
    assert list(aside.classes) == list(train.classes)


def test_what_is_kept_of_train_does_not_depend_on_the_holdout(digits: Path, tmp_path: Path) -> None:
    run("digits", tmp_path / "train")
    whole, rest, aside = (Dataset.open(p) for p in (tmp_path / "train", digits / "data" / "train", digits / "data" / "val"))
    set_apart = set(aside.ids.tolist())
    assert [i for i in whole.ids if i not in set_apart] == rest.ids.tolist()
    assert whole.manifest.content != rest.manifest.content


def test_seeds_give_other_orders_of_the_same_content(tmp_path: Path) -> None:
    run("digits", tmp_path / "a", seed=0, split="test")
    run("digits", tmp_path / "b", seed=1, split="test")
    a, b = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    assert (a.ids != b.ids).mean() > 0.9
    assert a.manifest.content == b.manifest.content
    assert a.manifest.digest != b.manifest.digest


def test_packing_does_not_change_the_content(tmp_path: Path) -> None:
    contents = set()
    for n, settings in enumerate(({}, {"shard_samples": 7}, {"shard_bytes": 4096})):
        contents.add(run("digits", tmp_path / str(n), split="test", **settings).facts["test"]["content"])
    assert len(contents) == 1


@pytest.mark.parametrize("ending", ["", "x"])
def test_checksums_hold_for_sha256sum(digits: Path, tmp_path: Path, ending: str) -> None:
    folder = shutil.copytree(digits / "data" / "train", tmp_path / "train")
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.name for p in folder.iterdir() if p.suffix in (".tar", ".parquet")}
    with (folder / "shard-000001.tar").open("ab") as file:
        file.write(ending.encode())
    done = subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if ending else 0), done.stderr
    assert ("shard-000001.tar: FAILED" in done.stdout) == bool(ending)


def test_class_folders_arrive_as_they_are(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (class_folders / "notes.txt").write_text("x")
    run(class_folders, tmp_path / "train")
    read = Dataset.open(tmp_path / "train")
    assert list(read.classes) == sorted(p.name for p in class_folders.iterdir() if p.is_dir())
    files = {p.relative_to(class_folders).with_suffix("").as_posix(): p for p in class_folders.rglob("*/*")}
    assert sorted(read.ids) == sorted(files)
    for n, key in enumerate(read.ids.tolist()):
        assert read.image_bytes(n) == files[key].read_bytes()
        assert read.classes[read.labels[n]] == files[key].parent.name
    assert "left out: 1 file not named like an image ('notes.txt')" in capsys.readouterr().err


# --- again


def test_an_import_that_was_killed_goes_on(tmp_path: Path, digests: Digests, kill_midway: Callable[[str, Path, int], None]) -> None:
    """Its finished shards stand, and the end is what it would have been."""
    settings = {"shard_samples": 3, "holdout": "0.1", "jobs": 2}
    out = tmp_path / "a" / "train"
    values = settings | {"source": "digits", "out": str(out)}
    kill_midway(f"from kdprune_pipelines import import_; import_.run(import_.ImportConfig.from_dict({values}))", out, 40)
    with pytest.raises(UsageError, match="is unfinished: run the command that makes it again, it continues"):
        Dataset.open(out)
    before = {p.name: p.stat().st_mtime_ns for p in sorted(out.glob("*.tar"))[:20]}
    run("digits", out, **settings)
    run("digits", tmp_path / "b" / "train", **settings)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_the_same_again_says_already_done(tmp_path: Path, digests: Digests, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("digits", tmp_path / "train", holdout="0.1")
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert "already done" not in capsys.readouterr().err
    again = run("digits", tmp_path / "train", holdout="0.10", jobs=4, memory=5_000_000)
    assert "already done" in capsys.readouterr().err
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"seed": 1}, "(seed is 0, now 1)"),
        ({"holdout": "0.2"}, "(holdout is 0.1, now 0.2)"),
        ({"shard_samples": 100}, "(shard_samples is 10000, now 100)"),
        ({"on_bad": "keep"}, "(on_bad is error, now keep)"),
        ({"holdout": None}, "(holdout is 0.1, now null)"),
    ],
)
def test_other_settings_are_refused_naming_the_difference(tmp_path: Path, digests: Digests, settings: dict[str, Any], differs: str) -> None:
    run("digits", tmp_path / "train", holdout="0.1")
    before = digests(tmp_path)
    line = refusal(ExistsError, "digits", tmp_path / "train", **({"holdout": "0.1"} | settings))
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-2") / "train"  # not beside this train, whose val would be in the way
    assert line.startswith(f"{tmp_path / 'train'} was made with other settings {differs}: use --out {elsewhere} for another")
    assert digests(tmp_path) == before
    run("digits", tmp_path / "train", overwrite=True, **({"holdout": "0.1"} | settings))
    assert Manifest.load(tmp_path / "train").config[next(iter(settings))] == next(iter(settings.values()))


def test_val_alone_is_made_again(tmp_path: Path, digests: Digests) -> None:
    run("digits", tmp_path / "train", holdout="0.1")
    before = digests(tmp_path)
    shutil.rmtree(tmp_path / "val")
    run("digits", tmp_path / "train", holdout="0.1")
    assert digests(tmp_path) == before


def test_another_source_of_the_same_name_is_refused(class_folders: Path, tmp_path: Path) -> None:
    run(class_folders, tmp_path / "train")
    shutil.rmtree(next(class_folders.iterdir()))
    assert "source_files is" in refusal(ExistsError, class_folders, tmp_path / "train")


# --- images that do not decode


@pytest.fixture
def with_bad(class_folders: Path) -> Path:
    """Class folders with three files that are no images: cut short, empty, and text."""
    whole = next(class_folders.rglob("*.png")).read_bytes()
    for n, data in enumerate((whole[:60], b"", b"this is no image")):
        (class_folders / "digit-0" / f"bad-{n}.png").write_bytes(data)
    return class_folders


def test_bad_images_stop_the_import_naming_the_file(with_bad: Path, tmp_path: Path) -> None:
    line = refusal(SourceError, with_bad, tmp_path / "train")
    assert line.startswith(str(with_bad / "digit-0" / "bad-"))
    assert line.endswith("; mend or remove it, or pass --on-bad keep to carry it along unused")
    assert not (tmp_path / "train").exists()


def test_bad_images_are_kept_unused_when_asked(with_bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(with_bad, tmp_path / "train", on_bad="keep")
    assert "3 samples that do not decode, carried along but never used: 'digit-0/bad-" in capsys.readouterr().err
    read = Dataset.open(tmp_path / "train")
    bad = {f"digit-0/bad-{n}": (with_bad / "digit-0" / f"bad-{n}.png").read_bytes() for n in range(3)}
    assert {i: read.image_bytes(n) for n, i in enumerate(read.ids.tolist()) if not read.ok[n]} == bad
    assert (read.manifest.counts["samples"], read.manifest.counts["ok"], len(read.usable())) == (33, 30, 30)


def test_the_advice_of_the_refusal_can_be_followed(with_bad: Path, tmp_path: Path) -> None:
    """It stopped; with --on-bad keep, as it said, the same command goes on."""
    refusal(SourceError, with_bad, tmp_path / "train")
    run(with_bad, tmp_path / "train", on_bad="keep")
    assert Manifest.load(tmp_path / "train").counts["ok"] == 30


def test_a_mended_source_can_be_imported(with_bad: Path, tmp_path: Path) -> None:
    refusal(SourceError, with_bad, tmp_path / "train")
    for n in range(3):
        (with_bad / "digit-0" / f"bad-{n}.png").unlink()
    run(with_bad, tmp_path / "train")
    assert Manifest.load(tmp_path / "train").counts["samples"] == 30


# --- refusals


@pytest.mark.parametrize("split", ["val", "test"])
def test_another_split_has_no_class_that_train_lacks(class_folders: Path, tmp_path: Path, split: str) -> None:
    run(class_folders, tmp_path / "train")
    (class_folders / "digit-3").rename(class_folders / "owl")
    line = refusal(UsageError, class_folders, tmp_path / split, split=split)
    assert f"the classes of this {split} split are not those of {tmp_path / 'train'}: 10 against 10, differing in owl;" in line
    assert not (tmp_path / split).exists()


@pytest.mark.parametrize("empty", [False, True])
def test_another_split_may_lack_samples_of_a_class(class_folders: Path, tmp_path: Path, empty: bool) -> None:
    """It keeps train's classes and their numbers, whether the class's folder is gone or empty."""
    run(class_folders, tmp_path / "train")
    shutil.rmtree(class_folders / "digit-3")
    if empty:
        (class_folders / "digit-3").mkdir()
    run(class_folders, tmp_path / "test", split="test")
    train, test = Dataset.open(tmp_path / "train"), Dataset.open(tmp_path / "test")
    assert list(test.classes) == list(train.classes)
    counts = train.manifest.counts["per_class"]
    assert test.manifest.counts["per_class"] == [*counts[:3], 0, *counts[4:]]
    for key, label in zip(test.ids.tolist(), test.labels.tolist(), strict=True):
        assert test.classes[label] == key.split("/")[0]
    assert ("classes" in test.manifest.config) is not empty


def test_another_split_is_made_again_when_train_has_other_classes(class_folders: Path, tmp_path: Path) -> None:
    run(class_folders, tmp_path / "test", split="test")
    (class_folders / "an owl").mkdir()
    run(class_folders, tmp_path / "train")
    (class_folders / "an owl").rmdir()
    assert "(classes is null, now [" in refusal(ExistsError, class_folders, tmp_path / "test", split="test")
    run(class_folders, tmp_path / "test", split="test", overwrite=True)
    assert list(Dataset.open(tmp_path / "test").classes) == list(Dataset.open(tmp_path / "train").classes)


LABELS: list[tuple[list[Any], list[Any], list[int]]] = [
    (["ant", "cat", "dog"], ["dog", "ant", None], [2, 0, -1]),
    ([0, 1, 2], [1, 0, 1], [1, 0, 1]),
]


@pytest.mark.parametrize(("train", "test", "numbers"), LABELS)
def test_labels_of_parquet_are_numbered_as_in_train(
    tmp_path: Path, small_images: Images, train: list[Any], test: list[Any], numbers: list[int]
) -> None:
    for split, labels in (("train", train), ("test", test)):
        pq.write_table(pa.table({"image": [data for data, _ in small_images[:3]], "label": labels}), tmp_path / f"{split}.parquet")
        run(tmp_path / f"{split}.parquet", tmp_path / split, split=split)
    read = Dataset.open(tmp_path / "test")
    assert list(read.classes) == list(Dataset.open(tmp_path / "train").classes)
    assert {int(i): label for i, label in zip(read.ids.tolist(), read.labels.tolist(), strict=True)} == dict(enumerate(numbers))


def test_numbers_without_names_are_no_names_of_train(tmp_path: Path, small_images: Images) -> None:
    """Sorted by the alphabet, `class 10` comes second: the number 1 would have become another class."""
    for name in ("class 0", "class 1", "class 10"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "a.png").write_bytes(small_images[1][0])
    run(tmp_path / "folders", tmp_path / "train")
    pq.write_table(pa.table({"image": [data for data, _ in small_images[:2]], "label": [0, 1]}), tmp_path / "test.parquet")
    assert "2 against 3" in refusal(UsageError, tmp_path / "test.parquet", tmp_path / "test", split="test")


def test_the_first_line_says_where_val_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("digits", tmp_path / "mine" / "train-b", holdout="0.1")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"train: {tmp_path / 'mine' / 'train-b'}; val (0.1 of it): {tmp_path / 'mine' / 'val'}"
    assert (tmp_path / "mine" / "val" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split": "test", "holdout": "0.1"}, "--holdout goes with --split train, not test"),
        ({"holdout": "1"}, "--holdout 1 sets 1,438 of 1,438 samples apart: train and val need at least one each"),
        ({"holdout": "0"}, "--holdout 0 is no fraction to set apart as val"),
        ({"split": "val"}, "digits has no split 'val'"),
        ({"holdout": "0.0001"}, "--holdout 0.0001 sets 0 of 1,438 samples apart"),
        ({"holdout": "0.9999"}, "--holdout 0.9999 sets 1,438 of 1,438 samples apart"),
        ({"holdout": "0.2", "name": "val"}, "data/val is called val, where --holdout puts val: choose another name for train"),
        ({"holdout": "0.2", "name": "x/../val"}, "val is called val, where --holdout puts val: choose another name for train"),
    ],
)
def test_wrong_usage_leaves_nothing(tmp_path: Path, settings: dict[str, str], says: str) -> None:
    out = tmp_path / "data" / settings.get("name", "train")
    assert says in refusal(UsageError, "digits", out, **{k: v for k, v in settings.items() if k != "name"})
    assert not (tmp_path / "data").exists()


def test_two_images_with_one_key_are_refused_naming_both(class_folders: Path, tmp_path: Path) -> None:
    for name in ("a.b.png", "a_b.jpg"):
        shutil.copy(next(class_folders.rglob("*.png")), class_folders / "digit-0" / name)
    line = refusal(SourceError, class_folders, tmp_path / "train")
    folder = class_folders / "digit-0"
    assert line in {
        f"{folder / x} and {folder / y} have the same key 'digit-0/a_b': rename one"
        for x, y in (("a.b.png", "a_b.jpg"), ("a_b.jpg", "a.b.png"))
    }


def test_unlabelled_rows_are_imported_without_a_class(tmp_path: Path, small_images: Images) -> None:
    rows = [{"bytes": data, "path": None} for data, _ in small_images[:10]]
    labels = [None if n < 4 else n % 3 for n in range(10)]
    pq.write_table(pa.table({"image": rows, "label": pa.array(labels, pa.int64())}), tmp_path / "x.parquet")
    run(tmp_path / "x.parquet", tmp_path / "train")
    read = Dataset.open(tmp_path / "train")
    assert sorted(read.labels[:].tolist())[:4] == [-1] * 4
    assert read.manifest.counts["labelled"] == 6
    assert read.index["label"].null_count == 4


# --- images of every sort


def encoded(pixels: np.ndarray, kind: str, mode: str = "RGB", **how: Any) -> bytes:
    """Real pixels in another mode and format."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def of_every_sort(small_images: Images) -> dict[str, tuple[bytes, str]]:
    """By name: the bytes, and the member they become."""
    one, two = (images.decode(small_images[n][0]) for n in (1, 4))
    second = Image.fromarray(two)
    deep = io.BytesIO()
    Image.fromarray(one[:, :, 0].astype(np.uint16) * 257).save(deep, "PNG")
    moving = {"save_all": True, "append_images": [second], "duration": 100}
    return {
        "cmyk": (encoded(one, "JPEG", "CMYK"), "jpg"),
        "grey": (encoded(one, "JPEG", "L"), "jpg"),
        "palette": (encoded(one, "PNG", "P"), "png"),
        "alpha": (encoded(one, "PNG", "RGBA"), "png"),
        "deep": (deep.getvalue(), "png"),
        "moving-webp": (encoded(one, "WEBP", lossless=True, **moving), "webp"),
        "moving-png": (encoded(one, "PNG", **moving), "png"),
        "wrong-name": (encoded(one, "PNG"), "png"),
    }


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_images_of_every_sort_arrive_as_they_are(tmp_path: Path, of_every_sort: dict[str, tuple[bytes, str]], kind: str) -> None:
    """Named by their magic bytes, decoded as Pillow decodes them: of animated ones the first frame."""
    source = tmp_path / "source"
    source.mkdir()
    names = list(of_every_sort)
    if kind == "folder":
        (source / "cat").mkdir()
        for name, (data, _) in of_every_sort.items():
            (source / "cat" / f"{name}.jpg").write_bytes(data)
    elif kind == "parquet":
        rows = [{"bytes": data, "path": f"cat/{name}.jpg"} for name, (data, _) in of_every_sort.items()]
        pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), source / "x.parquet")
    else:
        with tarfile.open(source / "x.tar", "w") as packed:
            for name, (data, _) in of_every_sort.items():
                info = tarfile.TarInfo(f"cat/{name}.jpg")
                info.size = len(data)
                packed.addfile(info, io.BytesIO(data))
    run(source, tmp_path / "train")
    read = Dataset.open(tmp_path / "train")
    assert sorted(read.ids) == sorted(f"cat/{name}" for name in names)
    for n, one in enumerate(read.ids.tolist()):
        data, _ = of_every_sort[one.removeprefix("cat/")]
        assert read.image_bytes(n) == data
        with Image.open(io.BytesIO(data)) as image:
            image.info.pop("transparency", None)
            assert np.array_equal(images.decode(data), np.asarray(image.convert("RGB")))
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as packed:
        found = {name for name in packed.getnames() if not name.endswith(".cls")}
    assert found == {f"cat/{name}.{extension}" for name, (_, extension) in of_every_sort.items()}
    assert read.ok.all()


@pytest.mark.parametrize("on_bad", ["error", "keep"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file, of 0 bytes"),
        (b"GIF89a", "not a JPEG, PNG or WebP image"),
        (b"\xff\xd8\xff\xe0", "not an image that decodes"),
        (images.encode_png(np.zeros((8, 8), np.uint8))[:-30], "not an image that decodes"),
        (struct.pack(">8sI4sIIBBBBB", b"\x89PNG\r\n\x1a\n", 13, b"IHDR", 20_000, 20_000, 8, 0, 0, 0, 0), "178,956,970"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, data: bytes, says: str, on_bad: str) -> None:
    if says == "178,956,970":
        data += struct.pack(">I", zlib.crc32(data[12:])) + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    good = images.encode_png(np.zeros((8, 8), np.uint8))
    pq.write_table(pa.table({"image": [good, data], "label": [0, 0]}), tmp_path / "x.parquet")
    if on_bad == "error":
        line = refusal(SourceError, tmp_path / "x.parquet", tmp_path / "train")
        assert line.startswith(f"{tmp_path / 'x.parquet'} row 1 (key '00000001'): ")
        assert says in line
    else:
        run(tmp_path / "x.parquet", tmp_path / "train", on_bad="keep")
        assert Manifest.load(tmp_path / "train").counts["ok"] == 1


def test_ten_thousand_classes_with_any_names(tmp_path: Path, small_images: Images) -> None:
    names = [f"Käfer {n}" for n in range(10_000)]
    images_ = [small_images[n % 200][0] for n in range(200)]
    pq.write_table(pa.table({"image": images_, "label": [names[50 * n] for n in range(200)]}), tmp_path / "text.parquet")
    table = pa.table({"image": images_, "label": [50 * n for n in range(200)]})
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "named.parquet")
    run(tmp_path / "named.parquet", tmp_path / "data" / "train")
    run(tmp_path / "text.parquet", tmp_path / "data" / "test", split="test")
    train, test = (Dataset.open(tmp_path / "data" / split) for split in ("train", "test"))
    assert list(train.classes) == list(test.classes) == names
    assert sum(train.manifest.counts["per_class"]) == 200
    assert train.manifest.content == test.manifest.content


def test_one_sample(tmp_path: Path, small_images: Images) -> None:
    (tmp_path / "source" / "only").mkdir(parents=True)
    (tmp_path / "source" / "only" / "a.jpg").write_bytes(small_images[0][0])
    run(tmp_path / "source", tmp_path / "train")
    assert Manifest.load(tmp_path / "train").counts["per_class"] == [1]


# --- WebDataset shards


@pytest.fixture
def foreign(tmp_path: Path, small_images: Images) -> Path:
    """Three shards of 12 digits each: image, a JSON member, the label."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as packed:
            for n in range(12 * shard, 12 * shard + 12):
                data, label = small_images[n]
                for name, content in ((f"{n:03d}.jpeg", data), (f"{n:03d}.json", b'{"n": %d}' % n), (f"{n:03d}.cls", b"%d" % label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    packed.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("shuffle", ["auto", "off", "on"])
def test_foreign_shards_are_packed_anew(foreign: Path, tmp_path: Path, small_images: Images, shuffle: str) -> None:
    run(foreign, tmp_path / "train", shuffle=shuffle, shard_samples=10)
    read = Dataset.open(tmp_path / "train")
    in_order = [f"{n:03d}" for n in range(36)]
    assert (read.ids.tolist() == in_order) == (shuffle != "on")
    assert sorted(read.ids) == in_order
    assert read.manifest.config["shuffle"] == (shuffle == "on")
    for n, one in enumerate(read.ids.tolist()):
        assert (read.image_bytes(n), read.labels[n]) == small_images[int(one)]
    for path in read.shard_paths:
        with tarfile.open(path) as packed:
            for k, member in enumerate(packed):
                assert member.name.split(".")[1] == (images.extension(small_images[int(member.name[:3])][0]), "cls", "json")[k % 3]
                assert (member.mode, member.mtime, member.uid) == (0o644, 0, 0)
    assert verify.run(verify.VerifyConfig(tmp_path / "train")).ok


@pytest.mark.parametrize("settings", [{"jobs": 1, "memory": 1_000_000}, {"jobs": 4}, {"jobs": 4, "shuffle": "on", "memory": 1_000_000}])
def test_threads_and_memory_change_no_byte_of_foreign_shards(
    foreign: Path, tmp_path: Path, digests: Digests, settings: dict[str, Any]
) -> None:
    common = {"shard_bytes": 20_000, "holdout": "0.2", "shuffle": settings.get("shuffle", "auto")}
    run(foreign, tmp_path / "one" / "train", jobs=1, **common)
    run(foreign, tmp_path / "other" / "train", **(common | settings))
    assert digests(tmp_path / "one") == digests(tmp_path / "other")


def test_packing_foreign_shards_anew_gives_their_content(foreign: Path, tmp_path: Path) -> None:
    index.run(index.IndexConfig.from_dict({"shards": sorted(foreign.glob("*.tar")), "out": tmp_path / "adopted"}))
    outcome = run([str(p) for p in sorted(foreign.glob("*.tar"))], tmp_path / "train")
    assert outcome.facts["train"]["content"] == Manifest.load(tmp_path / "adopted").content


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, [UNNAMED]),
        (
            {"image_member": "jpeg", "label_member": "json:n"},
            ["left out: the .cls members of 36 samples, whose labels come from json:n", UNNAMED],
        ),
    ],
)
def test_what_is_said_of_foreign_labels(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, str], says: list[str]
) -> None:
    run(foreign, tmp_path / "train", **settings)
    assert [line for line in capsys.readouterr().err.splitlines() if line in says] == says
    read = Dataset.open(tmp_path / "train")
    assert not settings or read.labels.tolist() == [int(one) for one in read.ids]
    assert verify.run(verify.VerifyConfig(tmp_path / "train")).ok


@pytest.mark.parametrize("shuffle", ["auto", "on"])
def test_repeated_keys_of_foreign_shards(foreign: Path, tmp_path: Path, shuffle: str) -> None:
    shutil.copy(foreign / "part-0.tar", foreign / "part-9.tar")
    line = refusal(SourceError, foreign, tmp_path / "train", shuffle=shuffle)
    assert line.endswith("have the same key '000': name samples by their shards too, with --id shard, or rename one")
    assert not (tmp_path / "train").exists()
    run(foreign, tmp_path / "train", shuffle=shuffle, id="shard")
    assert {"part-0/000", "part-9/000"} <= set(Dataset.open(tmp_path / "train").ids)


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_the_sources_own_order(class_folders: Path, tmp_path: Path, small_images: Images, source: str) -> None:
    if source == "parquet":
        rows = [{"bytes": data, "path": f"{n}.jpg"} for n, (data, _) in enumerate(small_images[:20])]
        pq.write_table(pa.table({"image": rows, "label": [0] * 20}), tmp_path / "x.parquet")
    where = class_folders if source == "folder" else tmp_path / "x.parquet"
    run(where, tmp_path / "train", shuffle="off")
    ids = Dataset.open(tmp_path / "train").ids.tolist()
    files = sorted(p.relative_to(class_folders).with_suffix("").as_posix() for p in class_folders.rglob("*.*"))
    assert ids == (files if source == "folder" else [str(n) for n in range(20)])


def test_a_source_that_changed_after_an_interruption_is_refused(
    tmp_path: Path, small_images: Images, kill_midway: Callable[[str, Path, int], None]
) -> None:
    """Nothing tells from outside: the same names and sizes."""
    source = tmp_path / "source"
    (source / "cat").mkdir(parents=True)
    for n in range(600):
        (source / "cat" / f"{n:04d}.png").write_bytes(images.encode_png(np.full((8, 8), n % 251, np.uint8)))
    out = tmp_path / "train"
    values = {"source": str(source), "out": str(out), "shard_samples": 3}
    kill_midway(f"from kdprune_pipelines import import_; import_.run(import_.ImportConfig.from_dict({values}))", out, 20)
    with tarfile.open(out / "shard-000004.tar") as packed:
        key = packed.getnames()[0]
    (source / key).write_bytes(images.encode_png(np.full((8, 8), 252, np.uint8)))
    line = refusal(SourceError, source, out, shard_samples=3)
    assert line.startswith(f"the source changed since the import was interrupted: {out / 'shard-000004.tar'} holds other samples")
    assert not out.exists()
    run(source, out, shard_samples=3)
    assert Manifest.load(out).counts["samples"] == 600


# --- label noise


@pytest.mark.parametrize(("rate", "holdout", "noisy"), [("0.2", None, 288), ("0.2", "0.1", 259), ("0", None, 0), ("1", "0.5", 719)])
def test_label_noise_is_exact_and_spares_val(tmp_path: Path, rate: str, holdout: str | None, noisy: int) -> None:
    run("digits", tmp_path / "clean" / "train", holdout=holdout)
    run("digits", tmp_path / "noisy" / "train", holdout=holdout, label_noise=rate, noise_seed=4)
    clean, found = (Dataset.open(tmp_path / name / "train") for name in ("clean", "noisy"))
    assert found.index.schema.names == [*clean.index.schema.names, "label_true"]
    assert found.true_labels.tolist() == clean.labels.tolist() == clean.true_labels.tolist()
    assert (found.labels != found.true_labels).sum() == found.manifest.counts["noisy"] == noisy
    assert (found.manifest.content == clean.manifest.content) == (noisy == 0)
    assert (found.manifest.config["label_noise"], found.manifest.config["noise_seed"]) == (rate, 4)
    assert verify.run(verify.VerifyConfig(tmp_path / "noisy" / "train")).ok
    if holdout:
        assert Manifest.load(tmp_path / "noisy" / "val").digest == Manifest.load(tmp_path / "clean" / "val").digest


def test_subsets_carry_the_true_labels(tmp_path: Path) -> None:
    run("digits", tmp_path / "train", label_noise="0.3")
    select.run(select.SelectConfig.from_dict({"data": tmp_path / "train", "frac": "0.5", "out": tmp_path / "half"}))
    whole, half = Dataset.open(tmp_path / "train"), Dataset.open(tmp_path / "half")
    true = dict(zip(whole.ids, whole.true_labels, strict=True))
    assert [true[one] for one in half.ids] == half.true_labels.tolist()
    assert verify.run(verify.VerifyConfig(tmp_path / "half")).ok


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label_noise": "0.1", "split": "test"}, "--label-noise goes with --split train, not test"),
        ({"label_noise": "2"}, "--label-noise 2 is out of range"),
    ],
)
def test_label_noise_that_is_refused(tmp_path: Path, settings: dict[str, str], says: str) -> None:
    assert says in refusal(UsageError, "digits", tmp_path / "train", **settings)
    assert not (tmp_path / "train").exists()


# --- a dry run


@pytest.mark.parametrize("memory", [1_000_000, 2_000_000_000])
def test_a_dry_run_touches_nothing_and_is_about_right(class_folders: Path, foreign: Path, tmp_path: Path, memory: int) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for source in (class_folders, foreign, "digits"):
        facts = run(source, tmp_path / "data" / "train", holdout="0.1", dry_run=True, memory=memory).facts
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
        assert facts["spools"] == (memory == 1_000_000 and source == "digits")
        made = run(source, tmp_path / "data" / "train", holdout="0.1", memory=memory)
        for split, found in (("train", facts), ("val", facts["val"])):
            counts = made.facts[split]["counts"]
            assert found["counts"] == {"sample": counts["samples"], "class": 10, "shard": counts["shards"]}
            size = sum(p.stat().st_size for p in (tmp_path / "data" / split).glob("*.tar"))
            assert 0.5 * size < found["bytes"] < 2 * size + 4096
        again = run(source, tmp_path / "data" / "train", holdout="0.1", dry_run=True, memory=memory)
        assert again.text.splitlines()[0].endswith("is finished: nothing would be done")
        shutil.rmtree(tmp_path / "data")


# --- memory


@pytest.mark.long
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_memory_is_bounded_however_large_the_source(real_data: Path, tmp_path: Path, kind: str) -> None:
    """2.1 GB of photographs in row groups of 500 MB (then in tars), imported with 500 MB: all together, the process stays below 1 GB."""
    photos = pq.read_table(real_data / "photos" / "train.parquet").to_pylist()
    source = tmp_path / "x.parquet"
    written = n = 0
    with pq.ParquetWriter(source, pa.schema([("image", pa.binary()), ("label", pa.int64())]), compression="none") as file:
        while written < 2_100_000_000:
            rows = [photos[(n + k) % 100]["image"]["bytes"] + (n + k).to_bytes(4, "big") for k in range(5000)]
            file.write_table(pa.table({"image": rows, "label": [(n + k) % 100 for k in range(5000)]}), row_group_size=5000)
            n, written = n + 5000, written + sum(map(len, rows))
    if kind == "webdataset":
        run(source, tmp_path / "first")
        source = tmp_path / "first" / "shard-*.tar"
    line = [str(source), "--memory", "500000000", "--shuffle", "on", "--out", str(tmp_path / "train")]
    program = (
        "import resource, subprocess, sys; "
        f"subprocess.run([sys.executable, '-m', 'kdprune_cli.main', 'import', *{line}], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) * 1024 < 1_000_000_000
    assert Manifest.load(tmp_path / "train").counts["ok"] == n
