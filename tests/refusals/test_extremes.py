"""Data sets of one sample, with an empty class, of 10,000 classes: every command either works or says why not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

SUBSET, TEACHER = "subsets/random-1-s0", "teachers/resnet8-s0"
TEACH = ["teacher", "--model", "resnet8", "--epochs", "2"]
CHAIN = [
    [*TEACH, "--norm", "group"],
    ["score"],
    ["select", "--frac", "1"],
    ["cache", "--views", "2"],
    ["distill", "--model", "resnet8", "--norm", "group", "--epochs", "2", "--name", "student"],
    ["evaluate", "students/student"],
]
EVERYTHING = ["data/train", "data/test", TEACHER, "scores/resnet8-s0", SUBSET, "logits/random-1-s0--resnet8-s0", "students/student"]


def test_one_sample(tmp_path: Path, real: Any, works: Any, refuses: Any) -> None:
    """The whole chain."""
    real.put(tmp_path / "one" / "cat" / "x.png", real.image(0))
    refuses(
        tmp_path, ["import", "one", "--holdout", "0.5"], 2, r"--holdout 0.5 sets 1 of 1 sample apart: train and val need at least one each"
    )
    works(tmp_path, "import", "one")
    works(tmp_path, "import", "one", "--split", "test")
    refuses(tmp_path, ["select", "--frac", "0.4"], 2, r"--frac 0.4 of 1 sample keeps none: at least 0.5 is needed")
    for line in CHAIN:
        works(tmp_path, *line)
    for artefact in EVERYTHING:
        works(tmp_path, "verify", artefact)
        works(tmp_path, "info", artefact)


def test_one_sample_and_batch_norm(tmp_path: Path, real: Any, works: Any) -> None:
    """Statistics of a single picture's pixels are statistics."""
    real.put(tmp_path / "one" / "cat" / "x.png", real.image(0))
    works(tmp_path, "import", "one")
    works(tmp_path, *TEACH)


def test_an_empty_class(tmp_path: Path, real: Any, works: Any) -> None:
    """The class is there all the way, with none of everything."""
    real.folders(tmp_path / "few", 20)
    (tmp_path / "few" / "digit-4x").mkdir()
    works(tmp_path, "import", "few")
    works(tmp_path, "import", "few", "--split", "test")
    for line in CHAIN:
        works(tmp_path, *line)
    for artefact in EVERYTHING:
        works(tmp_path, "verify", artefact)
        assert "digit-4x" in Manifest.load(tmp_path / artefact).classes
    assert Manifest.load(tmp_path / SUBSET).counts["per_class"][5] == 0
    for balance in ("class", "uniform", "none"):
        works(tmp_path, "select", "--frac", "0.5", "--balance", balance, "--name", balance)
        assert Manifest.load(tmp_path / "subsets" / balance).counts["kept"] == 10


def test_fewer_of_a_class_than_its_share(tmp_path: Path, real: Any, works: Any) -> None:
    """A class of one sample gives that one, and the others make up for it."""
    for n in range(30):
        real.put(tmp_path / "few" / ("rare" if n == 0 else "common") / f"{n}.png", real.image(n))
    works(tmp_path, "import", "few")
    works(tmp_path, "select", "--frac", "0.5", "--balance", "uniform")
    counts = Manifest.load(tmp_path / "subsets/random-0.5-s0").counts
    assert (counts["kept"], counts["per_class"]) == (15, [14, 1])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, real: Any, works: Any) -> Path:
    """10,000 classes of one digit each, imported from Parquet."""
    workspace = tmp_path_factory.mktemp("wide")
    images = [real.image(n % 1000) for n in range(10_000)]
    labels = [f"class-{n:05d}" for n in range(10_000)]
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": labels}), workspace / "wide.parquet")
    works(workspace, "import", "wide.parquet", "--shard-samples", "5000")
    return workspace


def test_ten_thousand_classes(wide: Path, works: Any, refuses: Any) -> None:
    began = time.monotonic()
    assert len(Dataset.open(wide / "data/train").classes) == 10_000
    shards = sorted((wide / "data/train").glob("*.tar"))
    works(wide, "index", *shards, "--out", "adopted/train")
    assert Dataset.open(wide / "adopted/train").manifest.counts["per_class"] == [1] * 10_000
    works(wide, "select", "--frac", "0.5")
    assert Manifest.load(wide / "subsets/random-0.5-s0").counts["kept"] == 5000
    works(wide, "select", "--frac", "0.05", "--ids-only", "--name", "few")
    works(wide, "teacher", "--data", "subsets/few", "--model", "resnet8", "--steps", "1", "--size", "8", "--batch", "500")
    works(wide, "score", "--data", "subsets/few")
    works(wide, "evaluate", TEACHER, "--data", "subsets/few")
    ran = works(wide, "info", "data/train")
    assert len(ran.out) < 2000
    assert time.monotonic() - began < 60
