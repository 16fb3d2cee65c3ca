"""Scores from the embedding of all samples: each a function of `Embedded`, found by name in `FROM_EMBEDDING`.

Samples are sorted by their order hash first and looked at in blocks, so that a score depends neither on the order of files nor on memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import Settings, option
from kdprune_data.scores.clusters import Points, fit, nearest

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
DISTANCES = ("cosine", "euclidean")
FIT = 50_000
"""The most samples, the first by their hash, that clusters are found with."""
ITERATIONS = 100
"""The most iterations of k-means."""
MOST_ROWS = 4096
"""Samples in a block of pairs, where memory allows so many."""


@dataclass(frozen=True)
class Embedded:
    """All samples of a data set, in any order. uids: uint64 of shape (n,), distinct; labels: int32 of shape (n,); embedding: finite
    float16 or float32 of shape (n, d); seed: of all that is random; memory: the most bytes that a score's own arrays should take."""

    uids: NDArray[np.uint64]
    labels: NDArray[np.int32]
    embedding: NDArray[np.floating]
    seed: int = 0
    memory: int = 1_000_000_000


@dataclass(frozen=True)
class EmbeddingScore:
    """One score. compute: (embedded, settings) to float64 of shape (n,), rows as given; settings: their type."""

    compute: Callable[[Embedded, Any], F64]
    settings: type[Settings]


@dataclass(frozen=True)
class PrototypeSettings(Settings):
    """clusters: how many, by default as many as there are classes; distance: between directions or between points."""

    clusters: int | None = option(None, help="Clusters; by default one per class.", least=1)
    distance: str = option("cosine", help="Distance to the centroid.", choices=DISTANCES)


@dataclass(frozen=True)
class DensitySettings(Settings):
    """neighbours: how many are looked at; clusters: look for them in the sample's own k-means cluster alone, of so many; by default among
    all samples."""

    neighbours: int = option(10, help="Nearest neighbours looked at.", least=1)
    clusters: int | None = option(None, help="Look for neighbours in the sample's own cluster, of so many; by default everywhere.", least=1)


def prototype(data: Embedded, settings: PrototypeSettings) -> F64:
    """Distance to the nearest centroid of k-means: float64 of shape (n,), at least 0. High is hard.

    `cosine`: 1 - cos of the angle, of mean directions (half the squared distance of vectors of length 1); `euclidean`: of means. Labels are
    not looked at, but for the number of clusters.
    Source: Sorscher et al., "Beyond neural scaling laws: beating power law scaling via data pruning", NeurIPS 2022.
    """
    cosine = settings.distance == "cosine"
    rows = _by_hash(data)
    centroids = _centroids(data, rows, settings.clusters or len(np.unique(data.labels)), cosine=cosine)
    found = np.empty(len(rows))
    for part, block in _points(data, rows, cosine=cosine).blocks():
        square = np.square(block - centroids[nearest(block, centroids)]).sum(1)
        found[rows[part]] = square / 2 if cosine else np.sqrt(square)
    return found


def class_distance(data: Embedded, _: Settings) -> F64:
    """Euclidean distance to the median vector of the sample's class, the median of each number: float64 of shape (n,), at least 0. High is
    hard.

    Source: Xia et al., "Moderate coreset: a universal method of data selection for real-world data-efficient deep learning", ICLR 2023.
    """
    found = np.empty(len(data.labels))
    for label in np.unique(data.labels):
        rows = np.flatnonzero(data.labels == label)
        # A few columns at once: the median sorts a copy of them.
        width = max(1, data.memory // (32 * len(rows)))
        columns = [slice(at, at + width) for at in range(0, data.embedding.shape[1], width)]
        middle = np.concatenate([np.median(data.embedding[rows, part].astype(np.float64), axis=0) for part in columns])
        for part, block in _points(data, rows, cosine=False).blocks():
            found[rows[part]] = np.sqrt(np.square(block - middle).sum(1))
    return found


def density(data: Embedded, settings: DensitySettings) -> F64:
    """Mean cosine similarity to the nearest neighbours, the sample itself left out: float64 of shape (n,), in [-1, 1]; 0 for a sample that
    is alone. Low is hard (far from all others).

    Of fewer others than `neighbours`, all are taken. Every pair is compared: n^2 d multiplications; with `clusters` k, only pairs within a
    cluster of k-means, about n^2 d / k, and a neighbour across the border of two clusters is missed.
    """
    rows = _by_hash(data)
    found = np.empty(len(rows))
    for part in _parts(data, rows, settings.clusters):
        found[part] = _closeness(_points(data, part, cosine=True), settings.neighbours, data.memory)
    return found


def _parts(data: Embedded, rows: I64, clusters: int | None) -> list[I64]:
    """The rows of each cluster; all together where there is to be none."""
    if clusters is None:
        return [rows]
    centroids = _centroids(data, rows, clusters, cosine=True)
    member = np.concatenate([nearest(block, centroids) for _, block in _points(data, rows, cosine=True).blocks()])
    return [rows[member == cluster] for cluster in np.unique(member)]


def _by_hash(data: Embedded) -> I64:
    return np.argsort(order.order_hash(data.uids, data.seed, "clusters"), kind="stable").astype(np.int64)


def _points(data: Embedded, rows: I64, *, cosine: bool) -> Points:
    return Points(data.embedding, rows, cosine=cosine, memory=data.memory)


def _centroids(data: Embedded, rows: I64, count: int, *, cosine: bool) -> F64:
    rows = rows[:FIT]
    return fit(_points(data, rows, cosine=cosine), data.uids[rows], count, seed=data.seed, iterations=ITERATIONS, cosine=cosine)


def _closeness(points: Points, neighbours: int, memory: int) -> F64:
    """Mean similarity of each point to its nearest others, a block of pairs at a time."""
    count = min(neighbours, len(points) - 1)
    found = np.zeros(len(points))
    if count == 0:
        return found
    # Of b points: three arrays of b x b (similarities, the same with the best so far, a partition of that) in a quarter of the memory, and
    # in another the points of two blocks, which are five arrays of b x d for a while when they are made.
    size = min(MOST_ROWS, int((memory / 4 / 24) ** 0.5), memory // (4 * 8 * 7 * points.width))
    size = max(size, MOST_ROWS // 64)
    for rows, block in points.blocks(size):
        best = np.full((len(block), count), -np.inf)
        for columns, others in points.blocks(size):
            similar = block @ others.T
            if rows == columns:
                np.fill_diagonal(similar, -np.inf)
            best = _best(best, similar)
        # Rounded, so that samples that are alike tie to the last bit and the order hash decides between them.
        found[rows] = np.round(np.sort(best, 1).mean(1), 12).clip(-1, 1)
    return found


def _best(best: F64, more: F64) -> F64:
    """The largest of each row of both, as many as `best` holds: float64 of its shape, in any order."""
    count = best.shape[1]
    better = more > best.min(1, keepdims=True)
    if np.count_nonzero(better) > 4 * best.size:
        whole = np.concatenate([best, more], 1)
        return np.asarray(np.partition(whole, whole.shape[1] - count, axis=1)[:, -count:])
    # After the first blocks few are better than what was found, and merging those few is much less than a partition of all.
    row, column = np.nonzero(better)
    values = np.concatenate([best.ravel(), more[row, column]])
    row = np.concatenate([np.repeat(np.arange(len(best)), count), row])
    by_row = np.lexsort((-values, row))
    _, starts = np.unique(row[by_row], return_index=True)
    return np.asarray(values[by_row][starts[:, None] + np.arange(count)])


FROM_EMBEDDING: dict[str, EmbeddingScore] = {
    "prototype": EmbeddingScore(prototype, PrototypeSettings),
    "class_distance": EmbeddingScore(class_distance, Settings),
    "density": EmbeddingScore(density, DensitySettings),
}
