"""Batches with soft labels for people with their own training loop, which can be left in the middle of an epoch and taken up again.

The order of an epoch is a function of (seed, epoch) alone, and so are its batches for a constant global batch. So a position is an epoch
and how many samples of it were seen: whoever goes on may do so with another number of worker processes, or of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from kdprune_data.errors import FormatError, MismatchError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import canonical
from kdprune_data.learn.decoded import KEEPS, Images
from kdprune_data.learn.stream import CachedViews, Feed, ViewSource, normalisation_of, view_source

FORMAT = 1
EPOCH, START_EPOCH, START, LOADED = range(4)
"""What stands where in the numbers that all processes share: the epoch that is shown next; a batch to begin with, and in which epoch; how
many times such a position was loaded."""


class SoftLabelDataset(IterableDataset[dict[str, Any]]):
    """Whole training batches of a data set or subset, with the teacher's soft labels: for people with their own training loop.

    Iterating yields one epoch of dicts: `image`, normalised float32 of shape (n, 3, s, s); `label`, int64 of shape (n,), -1 = none;
    `logits`, float32 of shape (n, c), or None without a cache; `weight`, float32 of shape (n,), the subset's weights, 1 where it has none;
    `id`, a list of n str; `seen`, how many samples of the epoch were shown up to here, this batch included. Order, views and soft labels
    are those of `kdprune-data distill` for the same seed. Give it to `DataLoader(..., batch_size=None)`; with workers, batches are shared
    out in turn and come in the same order.

    subset: a data set or subset folder; logits: a logit cache that covers it; epoch: counted from 0, see `set_epoch`; views: how many of
    the cache's views to use in turn (all). Without logits every epoch draws a fresh view. in_memory: `on` keeps decoded images, `off` does
    not, `auto` does where they fit; forked workers share them. rank, ranks: which of several processes that train together this is; each
    yields its share of every batch of `batch_size`, which is the global one.

    `load_state_dict(state_after(batch))` goes on after a batch, in another process too, whatever its number of workers and ranks. A
    StatefulDataLoader of torchdata calls `state_dict` and `load_state_dict` by itself, and wants as many workers as before.

    Raises UsageError, MismatchError and FormatError as the readers of the two folders do.
    """

    def __init__(
        self,
        subset: str | Path,
        logits: str | Path | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        views: int | None = None,
        in_memory: str = "auto",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__()
        _check(batch_size, views, in_memory, rank, ranks)
        data = Dataset.open(subset)
        images = Images(data, keep=in_memory)
        # In shared memory: persistent workers hold a copy of this object, made before the next `set_epoch`.
        self._shared = torch.tensor([epoch, -1, 0, 0]).share_memory_()  # type: ignore[no-untyped-call]  # torch's stub lacks it
        self._begun = 0
        self._walk: _Walk | None = None
        self.normalisation = normalisation_of(images)
        self.feed = Feed(images, view_source(data, logits, seed, views), batch_size, seed, weights=data.weights)
        self.rank, self.ranks = rank, ranks
        if min(map(len, self.feed.plan(epoch))) < ranks:
            raise UsageError(
                f"ranks {ranks} is too large: some would get nothing of {len(data.usable())} samples in batches of {batch_size}; "
                "give a larger batch_size, or train in fewer processes"
            )

    @property
    def epoch(self) -> int:
        """The epoch (counted from 0) that the next iteration yields."""
        return int(self._shared[EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration yields, in the workers of a DataLoader too; from its beginning, unless
        a position in that very epoch was loaded."""
        if epoch != self.epoch:
            self._shared[START_EPOCH] = -1
        self._shared[EPOCH] = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.feed.steps_per_epoch()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        self._walk = _Walk(self, self.epoch, self._start() + first, step)
        return self._walk

    def _start(self) -> int:
        """The batch to begin with; a position that was loaded counts once, and in its own epoch alone."""
        start, self._begun = self._waiting() or 0, int(self._shared[LOADED])
        return start

    def _waiting(self) -> int | None:
        """The batch of a position that was loaded and not begun with yet; None where there is none in the epoch that is next."""
        epoch, in_epoch, start, loaded = self._shared.tolist()
        return int(start) if loaded > self._begun and in_epoch == epoch else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_walk": None}  # a worker walks by itself

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, where no workers iterate: plain JSON. In a worker it tells the epoch, and its iterator the rest."""
        walk, waiting = self._walk, self._waiting()
        if get_worker_info() is not None:
            return self._state(self.epoch, 0)
        if waiting is not None:
            return self._state(self.epoch, int(_ends(self.feed, self.epoch)[waiting - 1]) if waiting else 0)
        return self._state(self.epoch, walk.seen if walk is not None and walk.epoch == self.epoch else 0)

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The position after a batch of the current epoch, whoever loaded it: plain JSON, for `load_state_dict`. After the last one it is
        the beginning of the next epoch."""
        return self._state(self.epoch, int(batch["seen"]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin at a position: its epoch, after the samples seen.

        Raises MismatchError when it is of other data, views, batches or another seed; FormatError when it is no position.
        """
        own = self._state(0, 0)
        if set(state) != set(own) or state["format"] != FORMAT:
            raise FormatError(
                f"the state is no position of a SoftLabelDataset in format {FORMAT}: give one of its state_dict or state_after"
            )
        differs = [f"{key} {str(state[key])[:12]}, here {str(own[key])[:12]}" for key in FIXED if state[key] != own[key]]
        if differs:
            raise MismatchError(f"the state is of another training ({'; '.join(differs)}): go on with what it was made with, or begin anew")
        epoch, seen = int(state["epoch"]), int(state["seen"])
        start = int(np.searchsorted(_ends(self.feed, epoch), seen, side="right")) if seen else 0
        if epoch < 0 or seen not in (0, *_ends(self.feed, epoch).tolist()):
            raise FormatError(f"the state is no position: no batch of epoch {epoch} ends after {seen} samples; give one as it was made")
        self._shared[EPOCH] = epoch
        if get_worker_info() is None:  # in a worker its iterator knows better, and all workers share these numbers
            self._shared[START_EPOCH], self._shared[START] = epoch, start
            self._shared[LOADED] += 1

    def _state(self, epoch: int, seen: int) -> dict[str, Any]:
        if seen == len(self.feed.images.data.usable()):  # nobody wants to go on with nothing
            epoch, seen = epoch + 1, 0
        data, source = self.feed.images.data, self.feed.views
        fixed = (data.manifest.content, _digest(source), self.feed.batch, self.feed.seed)
        return dict(zip(FIXED, fixed, strict=True)) | {"format": FORMAT, "epoch": epoch, "seen": seen}


FIXED = ("content", "views", "batch_size", "seed")
"""What a position holds for: the content of the data, a digest of views and soft labels, the global batch, and the seed of the order."""


class _Walk(Iterator[dict[str, Any]]):
    """An iteration over an epoch, or a worker's share of it: every `step`-th batch from one on. Saved and restored by itself too."""

    def __init__(self, dataset: SoftLabelDataset, epoch: int, first: int, step: int) -> None:
        self._dataset, self._next, self._step = dataset, first, step
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._plan = self._dataset.feed.plan(epoch)
        self._ends = np.cumsum([len(rows) for rows in self._plan])

    @property
    def seen(self) -> int:
        """Samples of the epoch before the next batch."""
        return int(self._ends[min(self._next, len(self._ends)) - 1]) if self._next else 0

    def __next__(self) -> dict[str, Any]:
        if self._next >= len(self._plan):
            raise StopIteration
        own, feed = self._dataset, self._dataset.feed
        rows, seen = self._plan[self._next][own.rank :: own.ranks], int(self._ends[self._next])
        batch = feed.make(rows, self.epoch)
        self._next += self._step
        return {
            "image": own.normalisation.apply(batch.images),
            "label": batch.labels,
            "logits": batch.logits,
            "weight": batch.weights,
            "id": feed.images.data.ids[rows].tolist(),
            "seen": seen,
        }

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "next": self._next, "step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there. Raises MismatchError when it is of another number of workers."""
        if state["step"] != self._step:
            raise MismatchError(
                f"the state was saved with {state['step']} workers and there are {self._step}: take as many, or go on with "
                "load_state_dict(state_after(batch)) of the dataset, which any number can"
            )
        if state["epoch"] != self.epoch:  # at the end of an epoch, of which the dataset's state says that the next one follows
            self._dataset.set_epoch(state["epoch"])
            self._begin(state["epoch"])
        self._next = state["next"]


def _ends(feed: Feed, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """After how many samples each batch of an epoch ends: int64 of shape (batches,)."""
    return np.cumsum([len(rows) for rows in feed.plan(epoch)])


def _digest(source: ViewSource) -> str:
    """What names views and soft labels: policy, how many in turn, and whose logits."""
    count, teachers = None, []
    if isinstance(source, CachedViews):
        count, teachers = source.count, [one["digest"] for one in source.joined.cache.teachers]
    return hashlib.sha256(canonical([dict(source.policy.to_dict()), count, teachers])).hexdigest()


def _check(batch_size: int, views: int | None, in_memory: str, rank: int, ranks: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} is too small: at least 1")
    if views is not None and views < 1:
        raise UsageError(f"views {views} is too small: at least 1, or None for all")
    if in_memory not in KEEPS:
        raise UsageError(f"in_memory {in_memory!r} is none of {', '.join(KEEPS)}")
    if not 0 <= rank < ranks:
        raise UsageError(f"rank {rank} is out of range: from 0 to {ranks - 1}, one less than ranks")
