"""k-means: seeded by hashes, in blocks of fixed size, each sum in one order: nothing in it depends on the order of files, or on memory.

Points are looked at through `Points`, which makes a block when it is asked for, and keeps them all only where there is memory for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
BLOCK = 1024
"""Points in a block of k-means: fixed, as the last bits of sums depend on it."""


class Points:
    """Rows of an embedding in a given order, float64; with `cosine` of length 1 (a row of zeros has no direction and stays as it is).

    embedding: floating of shape (n, d); rows: int64 of shape (m,); memory: bytes, half of which may be taken to keep the points made.
    """

    def __init__(self, embedding: NDArray[np.floating], rows: I64, *, cosine: bool, memory: int) -> None:
        self._embedding, self._rows, self._cosine = embedding, rows, cosine
        self.width = embedding.shape[1]
        self._made: F64 | None = None
        if 8 * len(rows) * self.width <= memory // 2:
            made = np.empty((len(rows), self.width))
            for part, block in self.blocks():
                made[part] = block
            self._made = made

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> F64:
        """float64 of shape (rows in part, d)."""
        if self._made is not None:
            return self._made[part]
        found = np.array(self._embedding[self._rows[part]], np.float64, order="C")
        return unit(found) if self._cosine else found

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, F64]]:
        """Consecutive blocks: where each is, and its points."""
        for at in range(0, len(self), size):
            part = slice(at, min(at + size, len(self)))
            yield part, self[part]


def unit(rows: F64) -> F64:
    """Rows divided by their lengths, float64 of the shape given; rows of zeros stay."""
    # By the largest entry first: the squares of tiny ones would be 0.
    largest = np.abs(rows).max(1, keepdims=True)
    scaled = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    length = np.sqrt(np.square(scaled).sum(1, keepdims=True))
    return np.asarray(np.divide(scaled, length, out=scaled, where=length > 0))


def nearest(points: F64, centroids: F64) -> I64:
    """The nearest centroid of each point, the first where several are: int64 of shape (m,)."""
    return np.asarray((points @ centroids.T - np.square(centroids).sum(1) / 2).argmax(1))


def fit(points: Points, uids: NDArray[np.uint64], count: int, *, seed: int, iterations: int, cosine: bool) -> F64:
    """Centroids, float64 of shape (k, d): Lloyd's iterations from the centroids of k-means++, until no point changes its cluster.

    At most `count`, fewer where fewer points are distinct. A cluster that loses all its points stays where it was; with `cosine` a centroid
    is its points' mean direction. uids: uint64 of shape (m,), one a point, which the first centroids are drawn by.
    Source: Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA
    2007.
    """
    centroids = _drawn(points, uids, count, seed)
    before: I64 | None = None
    for _ in range(iterations):
        member = np.concatenate([nearest(block, centroids) for _, block in points.blocks()])
        if before is not None and np.array_equal(member, before):
            break
        before = member
        centroids = means(points, member, centroids, cosine=cosine)
    return centroids


def _drawn(points: Points, uids: NDArray[np.uint64], count: int, seed: int) -> F64:
    """The first centroids: points, each drawn with chances in proportion to the squared distance from the nearest one drawn before it.

    The draw is the earliest of exponential times, one of each point's own hash, so it depends on no order.
    """
    square = np.ones(len(points))
    found: list[F64] = []
    while len(found) < count and square.any():
        waits = -np.log1p(-order.unit(order.order_hash(uids, seed, f"clusters/{len(found)}")))
        times = np.divide(waits, square, out=np.full(len(points), np.inf), where=square > 0)
        first = int(times.argmin())
        found.append(points[slice(first, first + 1)][0])
        away = np.concatenate([np.square(block - found[-1]).sum(1) for _, block in points.blocks()])
        square = np.minimum(square, away) if len(found) > 1 else away
    return np.stack(found)


def means(points: Points, member: I64, before: F64, *, cosine: bool) -> F64:
    """The mean of each cluster's points, with `cosine` of length 1: float64 of shape (k, d). A cluster without points, or whose points'
    directions cancel out, stays at `before`. member: int64 of shape (m,), the cluster of each point."""
    sums, counts = np.zeros_like(before), np.bincount(member, minlength=len(before))[:, None]
    for part, block in points.blocks():
        grouped = np.argsort(member[part], kind="stable")
        there, starts = np.unique(member[part][grouped], return_index=True)
        sums[there] += np.add.reduceat(block[grouped], starts, axis=0)
    found = np.divide(sums, counts, out=before.copy(), where=counts > 0)
    if not cosine:
        return found
    directions = unit(found)
    return np.asarray(np.where(directions.any(1, keepdims=True), directions, before))
