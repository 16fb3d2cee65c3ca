"""Our files in other people's readers: webdataset, Hugging Face `datasets`, tarfile and DuckDB, none of which knows of us."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from kdprune_pipelines import export, import_, index, select
from PIL import Image

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache

# webdataset leaves its shards for the garbage collector to close
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

KINDS = ("digits", "cifar")
FORMS = ("whole", "subset")


@pytest.fixture(scope="module")
def folders(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test split in one shard (`digits-whole`), and a fifth of it (`digits-subset`)."""
    root = tmp_path_factory.mktemp("interop")
    import_.run(import_.ImportConfig("digits", split="test", out=root / "digits-whole"))
    select.run(select.SelectConfig(root / "digits-whole", frac="0.2", out=root / "digits-subset"))
    return root


@pytest.fixture(scope="module")
def cifar(real_data: Path, folders: Path) -> Path:
    """300 CIFAR-10 JPEGs in one shard, and a fifth of them."""
    rows = next(pq.ParquetFile(real_data / "cifar10" / "test.parquet").iter_batches(300))
    (folders / "source").mkdir()
    pq.write_table(pa.Table.from_batches([rows]), folders / "source" / "test.parquet")
    import_.run(import_.ImportConfig(str(folders / "source"), split="test", out=folders / "cifar-whole"))
    select.run(select.SelectConfig(folders / "cifar-whole", frac="0.2", out=folders / "cifar-subset"))
    return folders


@pytest.fixture(params=[(kind, form) for kind in KINDS for form in FORMS], ids="-".join)
def folder(request: pytest.FixtureRequest, folders: Path) -> Path:
    """Each of the four in turn; CIFAR-10 only where it is at hand."""
    kind, form = request.param
    if kind == "cifar":
        request.getfixturevalue("cifar")
    return folders / f"{kind}-{form}"


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_webdataset_reads_the_same_samples(folder: Path) -> None:
    read = Dataset.open(folder)
    found = webdataset.WebDataset([str(path) for path in read.shard_paths], shardshuffle=False).decode("pil")
    image = "png" if folder.name.startswith("digits") else "jpg"
    n = 0
    for n, sample in enumerate(found, 1):
        assert sample["__key__"] == read.ids[n - 1]
        assert sample["cls"] == read.labels[n - 1]
        assert np.array_equal(np.asarray(sample[image].convert("RGB")), by_pillow(read.image_bytes(n - 1)))
    assert n == len(read)


def test_webdataset_shuffles_splits_and_batches_them(digits: Path) -> None:
    """Its usual pipeline, over three shards."""
    read = Dataset.open(digits / "data" / "train")
    names = [str(path) for path in read.shard_paths]
    pipeline = (
        webdataset.WebDataset(names, shardshuffle=3, seed=0).shuffle(100).decode("rgb8").to_tuple("png", "cls", "__key__").batched(64)
    )
    keys = []
    for images, labels, batch in pipeline:
        assert images.shape == (len(batch), 8, 8, 3)
        keys += list(batch)
        assert labels.dtype == np.int64
    assert sorted(keys) == sorted(read.ids)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`datasets`, with its caches under tmp_path and no network."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return pytest.importorskip("datasets")


def test_hugging_face_datasets_reads_the_folder(folder: Path, offline: Any, tmp_path: Path) -> None:
    """`load_dataset(FOLDER)`, by the card alone: the tars are the data, the Parquet files beside them are not."""
    read = Dataset.open(folder)
    loaded = offline.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["test"]
    rows = loaded["test"]
    assert rows["__key__"][:] == read.ids.tolist()
    assert rows["cls"][:] == read.labels.tolist()
    image = "png" if folder.name.startswith("digits") else "jpg"
    assert set(rows.column_names) == {"__key__", "__url__", image, "cls"}
    for n in range(0, len(rows), 17):
        assert np.array_equal(np.asarray(rows[n][image].convert("RGB")), by_pillow(read.image_bytes(n)))


@pytest.mark.parametrize("form", FORMS)
def test_hugging_face_datasets_reads_mixed_kinds_and_missing_labels(
    tmp_path: Path, small_images: list[tuple[bytes, int]], offline: Any, form: str
) -> None:
    """JPEG, PNG and WebP by turns, every fourth without a label: a column per kind, null where a sample has another."""
    rows = [{"bytes": data, "path": None} for data, _ in small_images[:40]]
    labels = [None if n % 4 == 0 else label for n, (_, label) in enumerate(small_images[:40])]
    pq.write_table(pa.table({"image": rows, "label": pa.array(labels, pa.int64())}), tmp_path / "x.parquet")
    import_.run(import_.ImportConfig(str(tmp_path / "x.parquet"), out=tmp_path / "whole"))
    select.run(select.SelectConfig(tmp_path / "whole", frac="0.5", balance="none", out=tmp_path / "subset"))
    read = Dataset.open(tmp_path / form)
    rows = offline.load_dataset(str(tmp_path / form), cache_dir=str(tmp_path / "cache"))["train"]
    assert set(rows.column_names) == {"__key__", "__url__", "jpg", "png", "webp", "cls"}
    assert rows["cls"][:] == [None if label < 0 else label for label in read.labels]
    for n, row in enumerate(rows):
        (image,) = (row[kind] for kind in ("jpg", "png", "webp") if row[kind] is not None)
        assert np.array_equal(np.asarray(image.convert("RGB")), by_pillow(read.image_bytes(n)))


def test_hugging_face_datasets_reads_a_subset_of_adopted_shards(
    tmp_path: Path, small_images: list[tuple[bytes, int]], offline: Any
) -> None:
    """Their members keep their names: `.jpeg`, and whatever else they hold."""
    jpegs = [one for one in small_images if one[0][:2] == b"\xff\xd8"][:20]
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        for n, (data, label) in enumerate(jpegs):
            sink.write({"__key__": f"{n:03d}", "jpeg": data, "cls": label, "json": {"n": n}})
    index.run(index.IndexConfig((tmp_path / "x.tar",), split="test", out=tmp_path / "test"))
    select.run(select.SelectConfig(tmp_path / "test", frac="1", out=tmp_path / "all"))
    rows = offline.load_dataset(str(tmp_path / "all"), cache_dir=str(tmp_path / "cache"))["test"]
    assert [np.asarray(row["jpeg"]).tolist() for row in rows] == [by_pillow(data).tolist() for data, _ in jpegs]
    assert rows["cls"][:] == [label for _, label in jpegs]


@pytest.mark.parametrize("views", [1, 3])
def test_hugging_face_datasets_reads_an_export(chain: Path, offline: Any, tmp_path: Path, views: int) -> None:
    """The arrays of `kd.npz` are a column, as the card says."""
    (cache,) = (chain / "logits").iterdir()
    export.run(export.ExportConfig(chain / "subsets/random-0.5-s0", cache, views=views, out=tmp_path / "export"))
    read = Dataset.open(chain / "subsets/random-0.5-s0")
    joined = LogitCache.open(cache).join(read)
    rows = offline.load_dataset(str(tmp_path / "export"), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["__key__"][:] == read.ids.tolist()
    assert rows["cls"][:] == read.labels.tolist()
    found = joined.read(np.arange(len(read)), views - 1)
    assert np.array_equal([row["kd.npz"]["logits"][-1] for row in rows], found.logits)
    assert [row["kd.npz"]["boxes"][-1][0] for row in rows] == found.top.tolist()
    assert [row["kd.npz"]["flip"][-1] for row in rows] == found.flip.tolist()


def test_duckdb_joins_our_tables(folders: Path) -> None:
    """A subset's rows are its parent's, told by SQL alone."""
    whole, part = folders / "digits-whole", folders / "digits-subset"
    with duckdb.connect() as base:
        base.execute(f"CREATE VIEW whole AS SELECT * FROM '{whole}/index.parquet'")
        base.execute(f"CREATE VIEW kept AS SELECT * FROM '{part}/selection.parquet'")
        base.execute(f"CREATE VIEW ranking AS SELECT * FROM '{part}/ranking.parquet'")
        (joined,) = base.execute("SELECT count(*) FROM kept JOIN whole USING (id, uid, sha256, label)").fetchone()
        (kept,) = base.execute("SELECT count(*) FROM kept").fetchone()
        (first,) = base.execute("SELECT count(*) FROM ranking JOIN kept USING (id) WHERE rank < (SELECT count(*) FROM kept)").fetchone()
    assert joined == kept == first == 72
