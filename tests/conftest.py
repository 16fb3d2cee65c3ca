"""What several tests share: real data, the digits workspace, small folders of real images, and a way to run a stage.

Every data set here is real: scikit-learn's digits, which are always at hand, and slices of the research data where it lies
(`KDPRUNE_TEST_DATA`, by default `../shared/data` beside the repository). Tests that need the latter skip, saying so, where it is absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import import_
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
SETTLED = ("manifest.json", "log.txt")
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
def kill_midway() -> Callable[[str, Path, int], None]:
    """Run a Python program in another process and kill -9 it as soon as `folder` holds so many tars: a real interruption."""

    def run(program: str, folder: Path, tars: int) -> None:
        with subprocess.Popen([sys.executable, "-c", program]) as process:
            while process.poll() is None and len(list(folder.glob("*.tar"))) < tars:
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9, "it ended before it could be killed"
        assert not (folder / "manifest.json").exists()

    return run


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """The sha256 of every file of an artefact's folder, by path; of files that say when it was made, nothing."""

    def of(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in SETTLED)
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return of


# --- the command line, and a workspace in which every command has run


@dataclass(frozen=True)
class Ran:
    """How a command line ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def kdprune() -> Callable[..., Ran]:
    """Run a command line in a folder, in this process: `kdprune("info", "data/train", cwd=workspace)`. With one thread."""
    import torch
    from kdprune_cli.main import call

    torch.set_num_threads(1)

    def run(*arguments: object, cwd: Path) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = call([str(a) for a in arguments])
        return Ran(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def started() -> Callable[..., subprocess.Popen[str]]:
    """Start a command line in a folder as a process of its own. `first`: Python to run before it."""

    def start(*arguments: object, cwd: Path, first: str = "") -> subprocess.Popen[str]:
        code = f"{first}\nfrom kdprune_cli.main import main\nmain({[str(a) for a in arguments]!r})"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=environment, text=True, **pipes)

    return start


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `test/`: class folders of 12 and 5 real digits a class."""
    from sklearn.datasets import load_digits

    from kdprune_data.images import encode_png

    root = tmp_path_factory.mktemp("few")
    data = load_digits()
    pixels = np.floor(data.images * (255 / 16) + 0.5).astype(np.uint8)
    for label in range(10):
        for n, row in enumerate(np.flatnonzero(data.target == label)[:17].tolist()):
            path = root / ("train" if n < 12 else "test") / str(label) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(pixels[row]))
    return root


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, few_digits: Path, kdprune: Callable[..., Ran]) -> Path:
    """A workspace after the six commands, to read only (`chain_copy` is to write in): 108 digits to train on, in 3 shards."""
    workspace = tmp_path_factory.mktemp("chain")
    for line in (
        ["import", few_digits / "train", "--holdout", "0.1", "--shard-samples", "40"],
        ["import", few_digits / "test", "--split", "test"],
        ["teacher", "--model", "resnet8", "--epochs", "3", "--batch", "16"],
        ["score", "--embedding", "--logits"],
        ["select", "--frac", "0.5", "--shard-samples", "30"],
        ["cache", "--views", "3"],
        ["distill", "--model", "resnet8", "--epochs", "4", "--batch", "16"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


@pytest.fixture
def chain_copy(chain: Path, tmp_path: Path) -> Path:
    """A copy of `chain` to write in."""
    return shutil.copytree(chain, tmp_path / "workspace")


@pytest.fixture(scope="session")
def weigh() -> Callable[..., None]:
    """Give the samples of a subset other weights (None: null), and make its manifest fit: as a method that weighs would have written it."""
    import pyarrow as pa

    from kdprune_data.formats import table
    from kdprune_data.formats.manifest import File, Manifest, sha256_file

    def change(folder: Path, weights: Iterable[float | None]) -> None:
        path, manifest = folder / "selection.parquet", Manifest.load(folder)
        found = pq.read_table(path)
        at = found.schema.get_field_index("weight")
        path.write_bytes(table.to_bytes(found.set_column(at, "weight", pa.array(list(weights), pa.float32()))))
        files = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
        (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())

    return change


@pytest.fixture(scope="session")
def reseal() -> Callable[[Path], None]:
    """Make the manifest of a folder fit the files as they stand: as if somebody had written them so."""
    from kdprune_data.formats.manifest import File, Manifest, sha256_file

    def change(folder: Path) -> None:
        manifest = Manifest.read(folder)
        files = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
        (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())

    return change
