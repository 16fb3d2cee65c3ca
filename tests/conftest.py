"""What several tests share: real data, the digits workspace, small folders of real images, and a way to run a stage.

Every data set here is real: scikit-learn's digits, which are always at hand, and slices of the research data where it lies
(`KDPRUNE_TEST_DATA`, by default `../shared/data` beside the repository). Tests that need the latter skip, saying so, where it is absent.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import import_
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
SETTLED = ("manifest.json",)
"""Files that state when they were made."""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the research data. Skips where it is absent."""
    folder = Path(os.environ.get("KDPRUNE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "cifar10" / "train.parquet").is_file():
        pytest.skip(f"no research data in {folder}: set KDPRUNE_TEST_DATA to run this")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the digits imported, to read only: `data/train`, `data/val` (a tenth of train), `data/test`; 500 in a shard."""
    workspace = tmp_path_factory.mktemp("digits")
    settings = {"source": "digits", "shard_samples": 500}
    import_.run(import_.ImportConfig.from_dict(settings | {"split": "train", "holdout": "0.1", "out": workspace / "data" / "train"}))
    import_.run(import_.ImportConfig.from_dict(settings | {"split": "test", "out": workspace / "data" / "test"}))
    return workspace


@pytest.fixture(scope="session")
def cifar_rows(real_data: Path) -> list[tuple[bytes, int]]:
    """The first 400 training images of CIFAR-10, as (JPEG bytes, label)."""
    rows = next(pq.ParquetFile(real_data / "cifar10" / "train.parquet").iter_batches(400)).to_pylist()
    return [(row["image"]["bytes"], row["label"]) for row in rows]


@pytest.fixture(scope="session")
def small_images() -> list[tuple[bytes, int]]:
    """200 real digits as (image bytes, label), where the kind of file matters: JPEG, PNG and WebP by turns."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.floor(data.images[:200] * (255 / 16) + 0.5).astype(np.uint8)
    found = []
    for n, (one, label) in enumerate(zip(pixels, data.target[:200].tolist(), strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(one).convert("RGB").resize((16, 16)).save(buffer, ("JPEG", "PNG", "WEBP")[n % 3])
        found.append((buffer.getvalue(), label))
    return found


@pytest.fixture
def class_folders(tmp_path: Path, small_images: list[tuple[bytes, int]]) -> Path:
    """A folder of class folders: 30 of `small_images` as `digit-L/NNN.jpg|png|webp`."""
    root = tmp_path / "folders"
    for n, (data, label) in enumerate(small_images[:30]):
        path = root / f"digit-{label}" / f"{n:03d}.{('jpg', 'png', 'webp')[n % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """The sha256 of every file of an artefact's folder, by path; of `manifest.json`, which says when it was made, nothing."""

    def of(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in SETTLED)
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return of
