"""From shards to batches: the order of training, decoding, views and soft labels, for our own trainer and for anybody's.

1. `Images` (learn/decoded.py) reads and decodes samples by row, and keeps those that fit in memory.
2. A `ViewSource` says which view of a sample an epoch shows: drawn fresh, or replayed from a logit cache together with its soft labels.
3. `Feed.epoch` walks an epoch in the order of `order.epoch_order` and yields `Batch`es, prepared by threads but in order.

`SoftLabelDataset` (learn/loader.py) is the same for people with their own training loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdprune_data import order
from kdprune_data.errors import MismatchError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import Joined, LogitCache
from kdprune_data.learn import views
from kdprune_data.learn.decoded import Images as Images  # where others look for it
from kdprune_data.learn.views import Geometry, Normalisation, Pixels, Policy

NORMALISATION_SAMPLES = 10_000
T = TypeVar("T")
R = TypeVar("R")


def normalisation_of(images: Images, *, threads: int = 1, tick: Callable[[int], None] | None = None) -> Normalisation:
    """Mean and standard deviation per channel over the usable samples, or 10,000 of them chosen by hash, to 6 decimals.

    `tick` gets the samples of each part done.
    """
    levels = np.zeros((3, 256), np.int64)
    rows = images.data.usable()
    # The first ones would not do: adopted shards may come class by class.
    by_hash = np.argsort(order.order_hash(images.data.uids[rows], 0, "normalisation"), kind="stable")
    rows = np.sort(rows[by_hash[:NORMALISATION_SAMPLES]])
    parts = [rows[at] for at in images.few(rows)]
    for part, found in zip(parts, prefetch(lambda some: _levels(images.get(some)), parts, threads), strict=True):
        levels += found
        if tick is not None:
            tick(len(part))
    level, pixels = np.arange(256), levels[0].sum()
    mean = levels @ level / pixels
    std = np.sqrt(np.maximum(levels @ level**2 / pixels - mean**2, 1e-6))
    r, g, b = (round(float(v), 6) for v in mean / 255)
    sr, sg, sb = (round(float(v), 6) for v in std / 255)
    return Normalisation((r, g, b), (sr, sg, sb))


def _levels(images: Pixels | list[Pixels]) -> NDArray[np.int64]:
    """How many pixels have each level, in each channel: int64 of shape (3, 256). Whole numbers, so they add up alike in any order."""
    # Images of one size are counted as one tall image. Pillow counts many times as fast as numpy, and without copies in wider numbers.
    tall = [images.reshape(-1, *images.shape[2:])] if isinstance(images, np.ndarray) else images
    counts = np.array([Image.fromarray(image).histogram() for image in tall], np.int64)
    levels: NDArray[np.int64] = counts.sum(0).reshape(3, 256)
    return levels


class ViewSource(Protocol):
    """Which view of a sample an epoch (counted from 0) shows."""

    @property
    def policy(self) -> Policy:
        """What its views look like."""
        ...

    def show(self, rows: NDArray[np.int64], epoch: int) -> tuple[Geometry, NDArray[np.floating] | None]:
        """Boxes of some rows, and the teacher's logits of shape (n, c) where there are any."""
        ...


@dataclass(frozen=True)
class DrawnViews:
    """Views drawn from the policy: a new one every epoch, or `count` of them in turn."""

    data: Dataset
    policy: Policy
    count: int | None = None

    def show(self, rows: NDArray[np.int64], epoch: int) -> tuple[Geometry, None]:
        """See `ViewSource`."""
        view = epoch if self.count is None else epoch % self.count
        return views.geometry(self.policy, self.data.uids[rows], self.data.sizes[rows], view), None


@dataclass(frozen=True)
class CachedViews:
    """Views replayed from a logit cache, boxes as stored, with the teacher's logits: `count` of its views in turn."""

    joined: Joined
    policy: Policy
    count: int

    def show(self, rows: NDArray[np.int64], epoch: int) -> tuple[Geometry, NDArray[np.floating]]:
        """See `ViewSource`."""
        found = self.joined.read(rows, epoch % self.count)
        return Geometry(found.top, found.left, found.height, found.width, found.flip), found.logits


@dataclass(frozen=True)
class BoxesOnly:
    """The boxes of another source's views, without its soft labels: for a teacher that is asked while the student trains."""

    views: ViewSource

    @property
    def policy(self) -> Policy:
        """See `ViewSource`."""
        return self.views.policy

    def show(self, rows: NDArray[np.int64], epoch: int) -> tuple[Geometry, None]:
        """See `ViewSource`."""
        return self.views.show(rows, epoch)[0], None


def cached_views(data: Dataset, cache: LogitCache, count: int | None = None) -> CachedViews:
    """A cache aligned with a data set. Raises MismatchError when it is of other data, UsageError when it has fewer views."""
    data.same_classes(cache.manifest.classes, f"{cache.folder}")
    shown = cache.count_of(count)
    return CachedViews(cache.join(data), Policy.from_dict(cache.policy), shown)


@dataclass(frozen=True)
class Batch:
    """rows: int64 of shape (n,), of the data set; images: uint8 of shape (n, 3, s, s); labels: int64 of shape (n,), -1 = none; logits:
    the teacher's, float32 of shape (n, c); weights: how much each sample counts, float32 of shape (n,), None: all alike."""

    rows: NDArray[np.int64]
    images: Tensor
    labels: Tensor
    logits: Tensor | None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Feed:
    """Training batches of a data set, epoch after epoch. `weights`: of every row, float32 of shape (n,), None: all alike."""

    images: Images
    views: ViewSource
    batch: int
    seed: int
    threads: int = 1
    weights: NDArray[np.float32] | None = None

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of every batch of an epoch (counted from 0), in order."""
        data = self.images.data
        rows = data.usable()
        walk = order.epoch_order(data.uids[rows], data.shards[rows], seed=self.seed, epoch=epoch)
        return list(order.batches(rows[walk], self.batch))

    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(list(order.batches(self.images.data.usable(), self.batch)))

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch, in order, from the `start`-th on."""
        yield from prefetch(lambda rows: self.make(rows, epoch), self.plan(epoch)[start:], self.threads)

    def make(self, rows: NDArray[np.int64], epoch: int) -> Batch:
        """One batch."""
        boxes, logits = self.views.show(rows, epoch)
        images = self.images.rendered(rows, boxes, self.views.policy)
        labels = torch.from_numpy(self.images.data.labels[rows].astype(np.int64))
        soft = None if logits is None else torch.from_numpy(logits).to(torch.float32)  # from float16 ten times as fast as numpy
        return Batch(rows, images, labels, soft, None if self.weights is None else torch.from_numpy(self.weights[rows]))


def prefetch(make: Callable[[T], R], plan: Iterable[T], threads: int) -> Generator[R, None, None]:
    """`make` of every item of the plan, in order, a few items ahead in `threads` threads (0: here and now)."""
    if threads < 1:
        yield from map(make, plan)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in plan:
                waiting.append(pool.submit(make, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def view_source(data: Dataset, logits: str | Path | None, seed: int, count: int | None) -> ViewSource:
    """The first `count` views of a logit cache (None: all), or without one views drawn for the data. Raises as `cached_views` does."""
    if logits is not None:
        return cached_views(data, LogitCache.open(logits), count)
    policy = views.policy_for(data.sizes[data.usable()], data.classes, size=None, flip="auto", seed=seed)
    return DrawnViews(data, policy, count)


def check_policy(cache: LogitCache, asked: Policy) -> None:
    """Raise MismatchError when a cache holds other views than those asked for, naming what differs."""
    there, wanted = dict(cache.policy), asked.to_dict()
    differs = [
        f"{k} is {there.get(k)}, asked {wanted.get(k)}" for k in sorted(there.keys() | wanted.keys()) if there.get(k) != wanted.get(k)
    ]
    if differs:
        raise MismatchError(f"{cache.folder} holds views of another policy ({'; '.join(differs)}): ask for the same, or cache these views")
