"""Moderate coreset: keep the samples whose distance to the centre of their class is neither small nor large.

The centre is the class's median vector, coordinate by coordinate, in the space of the embedding. *Source: Xia, Liu, Yu, Shen, Han and Liu,
"Moderate coreset: a universal method of data selection for real-world data-efficient deep learning", ICLR 2023.*
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.selectors.base import EMBEDDING, Cost, Method, Params, Picked, Pool, Size
from kdprune_data.selectors.inputs import embedding_of
from kdprune_data.selectors.quota import check, take
from kdprune_data.selectors.ranked import middle_first

NUMBER = 32
"""Bytes that are in use for each number of the embedding that is worked on: itself in float64, and what numpy copies on the way."""
BLOCK = 64_000_000
"""Bytes that are worked on at once, where `memory` allows: more would not be faster."""


def select(pool: Pool, keep: int, params: Params) -> Picked:
    """Keep the `keep` samples whose distances to their class's median vector are nearest to the middle. Nested in `keep`.

    The middle is each class's; with balance `none` that of all distances, as in the paper.

    Raises UsageError without embedding or labels, SourceError when an embedding is not finite.
    """
    check(pool, keep, params)
    unlabelled = int((pool.labels < 0).sum())
    if unlabelled:
        raise UsageError(f"moderate needs labels and {unlabelled:,} samples have none: choose another method, or candidates with labels")
    distances = class_distances(pool, params.memory)
    farthest_first = np.lexsort((order.order_hash(pool.uids, params.seed, "select"), -distances)).astype(np.int64)
    return take(pool, middle_first(pool, farthest_first, params), keep, params)


def class_distances(pool: Pool, memory: int) -> NDArray[np.float64]:
    """The Euclidean distance of each embedding to the median vector of its class: float64 of shape (n,). In blocks, so that they take at
    most `memory` bytes, but at least a column of a class. No value depends on the order of the pool, or on the blocks."""
    vectors = embedding_of(pool)
    by_class = np.argsort(pool.labels, kind="stable")
    starts = np.flatnonzero(np.diff(pool.labels[by_class])) + 1
    distances = np.empty(len(vectors), np.float64)
    for rows in np.split(by_class, starts):
        distances[rows] = _from_median(vectors, rows, max(1, min(memory, BLOCK) // NUMBER))
    return distances


def _from_median(vectors: NDArray[np.floating], rows: NDArray[np.int64], numbers: int) -> NDArray[np.float64]:
    """The distances of one class, `numbers` of them at a time."""
    n, d = len(rows), vectors.shape[1]
    median = np.empty(d, np.float64)
    wide = max(1, numbers // n)
    for left in range(0, d, wide):
        median[left : left + wide] = np.median(vectors[rows, left : left + wide].astype(np.float64), axis=0)
    distances = np.empty(n, np.float64)
    high = max(1, numbers // max(d, 1))
    for top in range(0, n, high):
        distances[top : top + high] = np.sqrt(np.square(vectors[rows[top : top + high]].astype(np.float64) - median).sum(1))
    return distances


def cost(size: Size, params: Params) -> Cost:
    """A multiplication for each number; the largest class in float64, or as much of it as `memory` holds."""
    largest = int(size.candidates.max())
    least = max(largest, size.width) * NUMBER
    return Cost(float(size.candidates.sum()) * size.width, max(least, min(params.memory, BLOCK, largest * size.width * NUMBER)))


METHOD = Method(select, "the middle by the distance to the class's median vector", needs=lambda _: (EMBEDDING,), cost=cost)
