"""Soft labels, read: from a hundred shards for a batch of one, within a bound of memory, by several threads, by workers."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

import kdprune_data
from kdprune_data.errors import UsageError
from kdprune_data.formats import logits
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import Joined, LogitCache, Recent

Cli = Callable[..., Any]
TRAIN = Path("data/train")


@pytest.fixture(scope="module")
def many(chain: Path, few_digits: Path, kdprune: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace, to read only, with caches, plain and coded, of its training samples in 108 shards of one each."""
    workspace = shutil.copytree(chain, tmp_path_factory.mktemp("reading") / "workspace")
    cache = ["cache", "many/train", "--views", 3]
    for line in (
        ["import", few_digits / "train", "--holdout", "0.1", "--shard-samples", "1", "--out", "many/train"],
        [*cache, "--dtype", "float32", "--name", "plain"],
        [*cache, "--fidelity", "1e-2", "--name", "coded"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


def joined(workspace: Path, name: str, data: str | Path = TRAIN) -> Joined:
    return LogitCache.open(workspace / "logits" / name).join(Dataset.open(workspace / data))


@pytest.mark.parametrize("name", ["plain", "coded"])
def test_a_batch_of_a_hundred_shards_opens_each_once(many: Path, tmp_path: Path, name: str) -> None:
    """What was read stays at hand: the files may go."""
    workspace = shutil.copytree(many, tmp_path / "w")
    found = joined(workspace, name)
    rows = np.arange(len(found.place))
    first = found.read(rows, 1)
    assert len(found.cache.shards) == 108
    for one in (workspace / "logits" / name).glob("views-*"):
        shutil.rmtree(one)
    shuffled = np.random.default_rng(0).permutation(rows)
    for part in np.array_split(shuffled, 7):
        again = found.read(part, 1)
        for side, other in zip(first, again, strict=True):
            assert np.array_equal(side[part], other)


@pytest.mark.parametrize("name", ["plain", "coded"])
@pytest.mark.parametrize("most", [0, 60_000])
def test_memory_has_a_bound(many: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    rows = np.random.default_rng(0).permutation(108)
    expected = joined(many, name).read(rows, 2)
    monkeypatch.setattr(logits, "OPEN_BYTES", most)
    found = joined(many, name)
    for side, other in zip(expected, found.read(rows, 2), strict=True):
        assert np.array_equal(side, other)
    for held in (found._open, found.cache._rows, found.cache._bases):
        assert len(held._found) <= 1 + most // logits.ENTRY_BYTES


def test_of_a_coded_cache_only_the_samples_of_the_data_are_held(many: Path, kdprune: Cli, tmp_path: Path) -> None:
    """A cache of everything, and a tenth of it to train on."""
    workspace = shutil.copytree(many, tmp_path / "w")
    for line in (
        ["cache", TRAIN, "--fidelity", "1e-2", "--views", 3, "--name", "whole"],
        ["select", "--frac", "0.1", "--out", "subsets/few"],
    ):
        assert kdprune(*line, cwd=workspace).code == 0
    whole, few = joined(workspace, "whole"), joined(workspace, "whole", "subsets/few")
    rows = np.arange(len(few.place))
    mine, all_ = few.read(rows, 1), whole.read(np.arange(108), 1)
    data, every = Dataset.open(workspace / "subsets/few"), Dataset.open(workspace / TRAIN)
    at = [every.ids.tolist().index(one) for one in data.ids.tolist()]
    for side, other in zip(mine, all_, strict=True):
        assert np.array_equal(side, other[at])
    assert sum(len(one.logits) for one in few._open._found.values()) == len(rows)
    assert np.array_equal(replace(few, place=np.arange(108)).read(np.arange(108), 1).logits, whole.read(np.arange(108), 1).logits)


def test_no_rows_and_rows_that_have_none(many: Path) -> None:
    found = joined(many, "coded")
    assert found.read(np.zeros(0, np.int64), 0).logits.shape == (0, 10)
    lacking = replace(found, place=np.where(np.arange(108) == 5, -1, found.place))
    with pytest.raises(UsageError, match="has no logits of row 5, which does not decode"):
        lacking.read(np.array([4, 5]), 0)


def test_threads_make_a_value_once() -> None:
    made, recent = [], Recent[int, int](lambda _: 8)

    def make() -> int:
        time.sleep(0.01)
        made.append(1)
        return 7

    threads = [threading.Thread(target=recent.get, args=(1, make)) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (len(made), recent.get(1, make)) == (1, 7)


def test_workers_read_what_one_process_reads(many: Path) -> None:
    data = kdprune_data.SoftLabelDataset(many / TRAIN, many / "logits/coded", batch_size=16)
    alone = list(data)
    shared = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert [one["id"] for one in alone] == [one["id"] for one in shared]
    for one, other in zip(alone, shared, strict=True):
        assert one["logits"].equal(other["logits"])
    pipeline = kdprune_data.as_webdataset(many / TRAIN, many / "logits/coded")
    expected = {one: z for batch in alone for one, z in zip(batch["id"], batch["logits"], strict=True)}
    assert all(sample["logits"].equal(expected[sample["__id__"]]) for sample in pipeline)
