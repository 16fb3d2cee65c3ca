"""From shards to batches: the order of training, decoding, views and soft labels, for our own trainer and for anybody's.

1. `Images` reads and decodes samples by row; small ones of equal size are decoded once and kept.
2. A `ViewSource` says which view of a sample an epoch shows: drawn fresh, or replayed from a logit cache together with its soft labels.
3. `Feed.epoch` walks an epoch in the order of `order.epoch_order` and yields `Batch`es, prepared by threads but in order.

`SoftLabelDataset` is the same for people with their own training loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdprune_data import order
from kdprune_data.errors import MismatchError, SourceError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import Joined, LogitCache
from kdprune_data.images import decode
from kdprune_data.learn import views
from kdprune_data.learn.views import Geometry, Normalisation, Pixels, Policy

KEEP_BYTES = 2_000_000_000
"""Decoded images of one size are kept in memory up to this many bytes."""
DECODED_BYTES = 32_000_000
"""Images that are decoded to be rendered take about this much memory in each thread, or one image does: photographs are large."""
NORMALISATION_SAMPLES = 10_000
T = TypeVar("T")
R = TypeVar("R")


class Images:
    """Decoded images of a data set, by row. May be used by several threads."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        rows = data.usable()
        sizes = data.sizes[rows]
        self.equal = bool((sizes == sizes[0]).all())
        self._kept: NDArray[np.uint8] | None = None
        self._there = np.zeros(len(data), bool)
        if self.equal and len(data) * int(sizes[0].prod()) * 3 <= KEEP_BYTES:
            self._kept = np.empty((len(data), *sizes[0].tolist(), 3), np.uint8)

    def get(self, rows: NDArray[np.int64]) -> Pixels | list[Pixels]:
        """Images of some rows: uint8 of shape (n, h, w, 3) where all images are of one size, else a list of (h, w, 3).

        Raises SourceError that names a sample which does not decode.
        """
        if self._kept is None:
            found = [self._decoded(row) for row in rows.tolist()]
            return np.stack(found) if self.equal else found
        for row in rows[~self._there[rows]].tolist():
            self._kept[row] = self._decoded(row)
            self._there[row] = True
        return self._kept[rows]

    def _decoded(self, row: int) -> NDArray[np.uint8]:
        data = self.data.image_bytes(row)
        try:
            return decode(data)
        except SourceError as error:
            raise SourceError(
                f"sample {self.data.ids[row]!r} in {self.data.shard_paths[self.data.shards[row]]}: {error}; index the shards again without "
                "--no-digests, or import them again, and it is left out"
            ) from None

    def few(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Places in `rows`, in parts so small that the images of one take at most DECODED_BYTES, or are one image."""
        largest = 3 * int(self.data.sizes[rows].astype(np.int64).prod(1).max(initial=1))
        return list(order.batches(np.arange(len(rows)), max(1, DECODED_BYTES // largest)))

    def __reduce__(self) -> tuple[object, ...]:
        return (Images, (self.data,))


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

    def to(self, device: torch.device, images: Tensor) -> Batch:
        """The same on a device, with the images as a network takes them."""
        logits, weights = (None if one is None else one.to(device) for one in (self.logits, self.weights))
        return Batch(self.rows, images, self.labels.to(device), logits, weights)


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
        size = self.views.policy.size
        images = torch.cat([views.render(self.images.get(rows[at]), boxes.take(at), size) for at in self.images.few(rows)])
        labels = torch.from_numpy(self.images.data.labels[rows].astype(np.int64))
        soft = None if logits is None else torch.from_numpy(logits.astype(np.float32))
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


class SoftLabelDataset(IterableDataset[dict[str, Any]]):
    """Whole training batches of a data set or subset, with the teacher's soft labels: for people with their own training loop.

    Iterating yields one epoch of dicts: `image`, normalised float32 of shape (n, 3, s, s); `label`, int64 of shape (n,), -1 = none;
    `logits`, float32 of shape (n, c), or None without a cache; `weight`, float32 of shape (n,), the subset's weights, 1 where it has none;
    `id`, a list of n str. Order, views and soft labels are those of `kdprune-data distill` for the same seed. Give it to
    `DataLoader(..., batch_size=None)`; with workers, batches are shared out in turn and come in the same order.

    subset: a data set or subset folder; logits: a logit cache that covers it; epoch: counted from 0, see `set_epoch`; views: how many of
    the cache's views to use in turn (all). Without logits every epoch draws a fresh view.

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
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is too small: at least 1")
        if views is not None and views < 1:
            raise UsageError(f"views {views} is too small: at least 1, or None for all")
        data = Dataset.open(subset)
        images = Images(data)
        # In shared memory: persistent workers hold a copy of this object, made before the next `set_epoch`.
        self._epoch = torch.tensor(epoch).share_memory_()  # type: ignore[no-untyped-call]  # torch's stub lacks it
        self.normalisation = normalisation_of(images)
        self._feed = Feed(images, view_source(data, logits, seed, views), batch_size, seed, weights=data.weights)

    @property
    def epoch(self) -> int:
        """The epoch (counted from 0) that the next iteration yields."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration yields, in the workers of a DataLoader too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._feed.steps_per_epoch()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        ids, epoch = self._feed.images.data.ids, self.epoch
        for rows in self._feed.plan(epoch)[first::step]:
            batch = self._feed.make(rows, epoch)
            image = self.normalisation.apply(batch.images)
            yield {"image": image, "label": batch.labels, "logits": batch.logits, "weight": batch.weights, "id": ids[rows].tolist()}


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
