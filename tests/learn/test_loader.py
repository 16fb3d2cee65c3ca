"""learn/loader.py: batches for anybody's training loop, the same whoever loads them, and positions to go on from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdprune_data.errors import FormatError, MismatchError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.learn.loader import SoftLabelDataset
from kdprune_data.learn.stream import CachedViews, Feed, Images, cached_views, normalisation_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores, or batches: what happens then is tested
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]

SUBSET, CACHE = Path("subsets/random-0.5-s0"), Path("logits/random-0.5-s0--resnet8-s0")


def replay(chain: Path, **settings: Any) -> tuple[Dataset, CachedViews]:
    data = Dataset.open(chain / SUBSET)
    return data, cached_views(data, LogitCache.open(chain / CACHE), **settings)


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    soft = torch.equal(a["logits"], b["logits"]) if a["logits"] is not None else b["logits"] is None
    return soft and a["id"] == b["id"] and torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


@pytest.mark.parametrize("with_logits", [True, False])
def test_fields(chain: Path, with_logits: bool) -> None:
    found = SoftLabelDataset(chain / SUBSET, chain / CACHE if with_logits else None, batch_size=20)
    batches = list(found)
    assert len(batches) == len(found) == 3
    data = Dataset.open(chain / SUBSET)
    assert sorted(one for b in batches for one in b["id"]) == sorted(data.ids.tolist())
    label_of = dict(zip(data.ids.tolist(), data.labels.tolist(), strict=True))
    for batch, n in zip(batches, (18, 18, 18), strict=True):
        assert list(batch) == ["image", "label", "logits", "weight", "id", "seen"]
        assert torch.equal(batch["weight"], torch.ones(n))
        assert (batch["image"].shape, batch["image"].dtype) == ((n, 3, 8, 8), torch.float32)
        assert (batch["label"].shape, batch["label"].dtype) == ((n,), torch.int64)
        assert batch["label"].tolist() == [label_of[one] for one in batch["id"]]
        if with_logits:
            assert (batch["logits"].shape, batch["logits"].dtype) == ((n, 10), torch.float32)
        else:
            assert batch["logits"] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_come_with_their_samples(chain_copy: Path, weigh: Callable[..., None], workers: int) -> None:
    """Those of `selection.parquet`, joined by place."""
    weigh(chain_copy / SUBSET, np.arange(54) / 4)
    data = Dataset.open(chain_copy / SUBSET)
    weight_of = dict(zip(data.ids.tolist(), (np.arange(54) / 4).tolist(), strict=True))
    found = SoftLabelDataset(chain_copy / SUBSET, chain_copy / CACHE, batch_size=20)
    for batch in DataLoader(found, batch_size=None, num_workers=workers):
        assert batch["weight"].dtype == torch.float32
        assert batch["weight"].tolist() == [weight_of[one] for one in batch["id"]]


@pytest.mark.parametrize("count", [None, 2])
def test_it_shows_what_distill_trains_on(chain: Path, count: int | None) -> None:
    data, source = replay(chain, count=count)
    found = SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=16, seed=4, views=count)
    normalisation = normalisation_of(Images(data))
    for epoch in range(4):
        found.set_epoch(epoch)
        for mine, fed in zip(found, Feed(Images(data), source, 16, 4).epoch(epoch), strict=True):
            assert mine["id"] == data.ids[fed.rows].tolist()
            assert torch.equal(mine["image"], normalisation.apply(fed.images))
            assert torch.equal(mine["logits"], fed.logits)


def test_labels_only_draws_a_fresh_view_every_epoch(chain: Path) -> None:
    found = SoftLabelDataset(chain / SUBSET, batch_size=54)
    shown = []
    for epoch in range(3):
        found.set_epoch(epoch)
        batch = next(iter(found))
        shown.append(batch["image"][np.argsort(batch["id"])])
    assert not torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[1], shown[2])


def test_workers_change_nothing(chain: Path) -> None:
    """Spawned, as everywhere but on Linux: so all that a worker needs must be picklable."""
    found = SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=7, epoch=1)
    plain = list(DataLoader(found, batch_size=None))
    shared = list(DataLoader(found, batch_size=None, num_workers=2, multiprocessing_context="spawn"))
    assert len(plain) == 8
    assert all(alike(a, b) for a, b in zip(plain, shared, strict=True))
    assert all(alike(a, b) for a, b in zip(plain, list(found), strict=True))


def test_persistent_workers_hear_of_the_epoch(chain: Path) -> None:
    """They live through all epochs, with the copy of the data set that they were started with."""
    found = SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=18)
    loader = DataLoader(found, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="spawn")
    for epoch in (0, 2, 1):
        found.set_epoch(epoch)
        assert found.epoch == epoch
        assert all(alike(a, b) for a, b in zip(list(loader), list(found), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 is too small: at least 1"),
        ({"batch_size": -3}, "batch_size -3 is too small"),
        ({"batch_size": 8, "views": 0}, "views 0 is too small: at least 1, or None for all"),
        ({"batch_size": 8, "views": -1, "logits": None}, "views -1 is too small"),
        ({"batch_size": 8, "views": 4}, "has 3 views, 4 are asked for"),
        ({"batch_size": 8, "in_memory": "no"}, "in_memory 'no' is none of auto, on, off"),
        ({"batch_size": 8, "rank": 2, "ranks": 2}, "rank 2 is out of range: from 0 to 1"),
        ({"batch_size": 3, "ranks": 4}, "ranks 4 is too large: some would get nothing of 54 samples in batches of 3"),
        ({"batch_size": 8, "seed": -1}, "seed -1 is out of range"),
        ({"batch_size": 8, "logits": SUBSET}, "expected logits"),
        ({"batch_size": 8, "subset": CACHE}, "expected dataset or subset"),
        ({"batch_size": 8, "subset": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_errors(chain: Path, settings: dict[str, Any], message: str) -> None:
    given = {"subset": SUBSET, "logits": CACHE} | settings
    subset, cache = given.pop("subset"), given.pop("logits")
    with pytest.raises(UsageError, match=message):
        next(iter(SoftLabelDataset(chain / subset, None if cache is None else chain / cache, **given)))


def test_a_cache_of_other_samples_is_refused(chain: Path) -> None:
    with pytest.raises(MismatchError, match="has no logits for 50 of 50 samples"):
        SoftLabelDataset(chain / "data/test", chain / CACHE, batch_size=8)


@pytest.mark.parametrize("keep", ["on", "off"])
@pytest.mark.parametrize("workers", [0, 2])
def test_keeping_images_changes_nothing(chain: Path, keep: str, workers: int) -> None:
    """In any epoch, whether they are decoded, or were decoded by whichever worker."""
    plain = SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=7)
    found = SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=7, in_memory=keep)
    for epoch in range(3):
        plain.set_epoch(epoch)
        found.set_epoch(epoch)
        loader = DataLoader(found, batch_size=None, num_workers=workers)
        assert all(alike(a, b) for a, b in zip(plain, loader, strict=True))


def test_forked_workers_share_what_they_decoded(chain_copy: Path) -> None:
    """The shards are gone after the first epoch, in which each worker read every second batch."""
    found = SoftLabelDataset(chain_copy / SUBSET, chain_copy / CACHE, batch_size=7, in_memory="on")
    kept = found.feed.images
    loader = DataLoader(found, batch_size=None, num_workers=2, multiprocessing_context="fork")
    first = list(loader)
    for path in kept.data.shard_paths:
        path.unlink()
    kept.data.__dict__.pop("maps", None)
    found.set_epoch(3)
    assert sorted(one for batch in loader for one in batch["id"]) == sorted(one for batch in first for one in batch["id"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_batch(chain: Path, ranks: int) -> None:
    whole = list(SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=10))
    parts = [list(SoftLabelDataset(chain / SUBSET, chain / CACHE, batch_size=10, rank=n, ranks=ranks)) for n in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [share["seen"] for share in shares] == [batch["seen"]] * ranks
        for n, share in enumerate(shares):
            assert share["id"] == batch["id"][n::ranks]
            assert torch.equal(share["image"], batch["image"][n::ranks])
            assert torch.equal(share["logits"], batch["logits"][n::ranks])


# --- going on


def ids(batches: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [batch["id"] for batch in batches]


def fresh(chain: Path, **settings: Any) -> SoftLabelDataset:
    return SoftLabelDataset(chain / SUBSET, chain / CACHE, **({"batch_size": 7} | settings))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 3), (0, 5)])
@pytest.mark.parametrize("done", [0, 3, 8])
def test_a_position_is_gone_on_from_with_any_number_of_workers(chain: Path, before: int, after: int, done: int) -> None:
    """Also with more of them than there are batches left, or shards; and the epochs after it are whole."""
    whole = fresh(chain, epoch=2)
    expected = list(whole)
    first = fresh(chain, epoch=2)
    shown = list(islice(DataLoader(first, batch_size=None, num_workers=before), done))
    state = first.state_after(shown[-1]) if shown else first.state_dict()
    again = fresh(chain)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.epoch == (2 if done < 8 else 3)  # after the last batch the next epoch begins
    if done < 8:
        again.set_epoch(2)  # as a loop over epochs does
        rest = list(DataLoader(again, batch_size=None, num_workers=after))
        assert len(shown) + len(rest) == 8
        assert all(alike(a, b) for a, b in zip(expected, shown + rest, strict=True))
    for epoch in (3, 2):
        again.set_epoch(epoch)
        whole.set_epoch(epoch)
        assert ids(DataLoader(again, batch_size=None, num_workers=after)) == ids(whole)


@pytest.mark.parametrize("done", [1, 3])
def test_the_state_is_that_of_the_next_batch(chain: Path, done: int) -> None:
    """Loaded and not yet begun with; in the midst of an epoch; of an epoch that was chosen since."""
    first, again = fresh(chain, epoch=1), fresh(chain)
    shown = list(islice(first, done))
    state = first.state_after(shown[-1])
    assert first.state_dict() == state
    again.load_state_dict(state)
    assert again.state_dict() == state
    after = next(iter(again))
    assert again.state_dict() == first.state_after(after) != state
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.set_epoch(2)
    assert again.state_dict() == state | {"epoch": 2, "seen": 0}


def test_ranks_and_workers_may_change_together(chain: Path) -> None:
    one = fresh(chain, epoch=1)
    seen = list(islice(one, 4))
    assert one.state_dict() == one.state_after(seen[-1])
    expected = ids(one)[4:]
    parts = []
    for rank in range(2):
        part = fresh(chain, rank=rank, ranks=2)
        part.load_state_dict(one.state_after(seen[-1]))
        parts.append(ids(DataLoader(part, batch_size=None, num_workers=rank)))
    assert [[*a, *b] for a, b in zip(*parts, strict=True)] == [[*batch[::2], *batch[1::2]] for batch in expected]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True), (5, False)])
@pytest.mark.parametrize("done", [1, 7, 8])
def test_a_stateful_loader_goes_on(chain: Path, workers: int, persistent: bool, done: int) -> None:
    from torchdata import stateful_dataloader as loading

    def loader(found: SoftLabelDataset) -> Any:
        return loading.StatefulDataLoader(found, batch_size=None, num_workers=workers, persistent_workers=persistent)

    first = fresh(chain, epoch=1)
    expected = list(first)
    running = loader(fresh(chain, epoch=1))
    shown = list(islice(running, done))
    state = running.state_dict()
    again = fresh(chain)
    going_on = loader(again)
    going_on.load_state_dict(state)
    rest = list(going_on)
    assert again.epoch == 1
    assert all(alike(a, b) for a, b in zip(expected, shown + rest, strict=True))
    again.set_epoch(2)
    first.set_epoch(2)
    assert ids(going_on) == ids(first)


def test_a_stateful_loader_with_other_workers_is_refused_in_words(chain: Path) -> None:
    from torchdata import stateful_dataloader as loading

    running = loading.StatefulDataLoader(fresh(chain), batch_size=None, num_workers=0)
    next(iter(running))
    walk = iter(fresh(chain))
    with pytest.raises(MismatchError, match=re.escape("the state was saved with 2 workers and there are 1: take as many, or go on with")):
        walk.load_state_dict({"epoch": 0, "next": 3, "step": 2})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "the state is of another training (batch_size 8, here 7): go on with what it was made with"),
        ({"seed": 1}, "another training (seed 1, here 0)"),
        ({"views": 2}, "another training (views "),
        ({"logits": None}, "another training (views "),
        ({"subset": Path("data/train")}, "another training (content "),
    ],
)
def test_a_position_of_another_training_is_refused(chain: Path, change: dict[str, Any], message: str) -> None:
    """Changed data among them: the content names the samples, their images and labels."""
    given = {"subset": SUBSET, "logits": CACHE, "batch_size": 7} | change
    subset, cache = given.pop("subset"), given.pop("logits")
    if subset != SUBSET:
        cache = None
    other = SoftLabelDataset(chain / subset, None if cache is None else chain / cache, **given)
    with pytest.raises(MismatchError, match=re.escape(message)):
        fresh(chain).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "no position of a SoftLabelDataset in format 1"),
        ({"more": 1}, "no position of a SoftLabelDataset in format 1"),
        ({"seen": 8}, "no batch of epoch 0 ends after 8 samples"),
        ({"seen": -1}, "no batch of epoch 0 ends after -1 samples"),
        ({"seen": 55}, "no batch of epoch 0 ends after 55 samples"),
    ],
)
def test_what_is_no_position_is_refused(chain: Path, change: dict[str, Any], message: str) -> None:
    found = fresh(chain)
    with pytest.raises(FormatError, match=message):
        found.load_state_dict(found.state_dict() | change)
