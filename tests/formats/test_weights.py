"""Weights of samples, as `selection.parquet` holds them: read by place, and refused where they are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdprune_data.errors import FormatError, SourceError
from kdprune_data.formats.dataset import Dataset, read_weights
from kdprune_data.formats.manifest import File, Manifest, sha256_file

SUBSET = Path("subsets/random-0.5-s0")
Weigh = Callable[..., None]


@pytest.mark.parametrize("folder", ["data/train", "data/val", SUBSET])
def test_without_weights_all_are_one(chain: Path, folder: str) -> None:
    data = Dataset.open(chain / folder)
    assert data.weights.dtype == np.float32
    assert data.weights.tolist() == [1.0] * len(data)


def test_weights_are_in_the_order_of_the_index(chain_copy: Path, weigh: Weigh) -> None:
    weigh(chain_copy / SUBSET, np.arange(54) / 8)
    data = Dataset.open(chain_copy / SUBSET)
    assert data.weights.tolist() == (np.arange(54) / 8).tolist()
    uids, weights = read_weights(chain_copy / SUBSET)
    assert np.array_equal(uids, data.uids)
    assert np.array_equal(weights, data.weights)
    assert weights.flags.writeable


@pytest.mark.parametrize("bad", [-1.0, -1e-30, float("nan"), float("inf"), None])
def test_no_weight_is_negative_or_infinite(chain_copy: Path, weigh: Weigh, kdprune: Callable[..., Any], bad: float | None) -> None:
    weights: list[float | None] = [1.0] * 54
    weights[7] = bad
    weigh(chain_copy / SUBSET, weights)
    data = Dataset.open(chain_copy / SUBSET)
    with pytest.raises(SourceError, match=rf"of 54 weights 1 are negative or no finite numbers, the first \S+ of {data.ids[7]!r}: make or"):
        _ = data.weights
    for line in (["distill"], ["info", SUBSET]):
        ran = kdprune(*line, cwd=chain_copy)
        assert (ran.code, ran.err.count("\n")) == (1, ran.err.count("\n"))
        assert "negative or no finite numbers" in ran.err.splitlines()[-1]
    ran = kdprune("verify", SUBSET, cwd=chain_copy)
    assert ran.code == 1
    assert (
        f"selection.parquet: of 54 weights 1 are negative or no finite numbers, the first {float('nan') if bad is None else bad:g}"
        in ran.out
    )


def test_weights_of_other_samples_are_refused(chain_copy: Path) -> None:
    """Also where the manifest was made to fit; without that, any change of the file."""
    folder = chain_copy / SUBSET
    path, manifest = folder / "selection.parquet", Manifest.load(folder)
    found, before = pq.read_table(path), path.read_bytes()

    def spoil(table: pa.Table) -> None:
        data = Dataset.open(folder)
        pq.write_table(table, path)
        with pytest.raises(FormatError, match=r"selection.parquet was changed: its sha256 is not the manifest's; make or fetch it again"):
            _ = data.weights
        files = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
        (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())

    spoil(found.take(list(range(53, -1, -1))))
    with pytest.raises(FormatError, match=r"selection.parquet is not of the samples of index.parquet: make or fetch it again"):
        _ = Dataset.open(folder).weights
    (folder / "manifest.json").write_bytes(manifest.to_json())
    path.write_bytes(before)
    spoil(found.drop_columns(["weight"]))
    with pytest.raises(FormatError, match=r"selection.parquet \w+"):
        _ = Dataset.open(folder).weights
