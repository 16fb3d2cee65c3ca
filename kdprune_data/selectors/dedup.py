"""Duplicates among the candidates: of samples with the same image one is kept, and of samples that a network takes for nearly the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError

PER_CLUSTER = 1000
"""Samples in a cluster, on average, where no number of clusters is given."""
ROUNDS = 50
"""Most rounds of k-means."""


@dataclass(frozen=True)
class Kept:
    """rows: int64 of shape (m,), ascending, what is left; groups: samples that were kept for others too; conflicts: int64, ascending, those
    among the rows that were kept for others with another label."""

    rows: NDArray[np.int64]
    groups: int
    conflicts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def exact(uids: NDArray[np.uint64], digests: NDArray[np.uint8], labels: NDArray[np.int32], *, seed: int) -> Kept:
    """Of samples with the same image keep the one with the smallest order hash.

    uids: uint64 of shape (n,); digests: uint8 of shape (n, 32), of each image's bytes; labels: int32 of shape (n,), -1 = none, which
    disagrees with nothing.
    """
    by_hash = _by_hash(uids, seed)
    whole = np.ascontiguousarray(digests[by_hash]).view("V32").reshape(-1)
    _, first, group, sizes = np.unique(whole, return_index=True, return_inverse=True, return_counts=True)
    labelled = np.flatnonzero(labels[by_hash] >= 0)
    least, most = np.full(len(first), np.iinfo(np.int32).max), np.full(len(first), -1)
    np.minimum.at(least, group[labelled], labels[by_hash][labelled])
    np.maximum.at(most, group[labelled], labels[by_hash][labelled])
    return Kept(np.sort(by_hash[first]), int((sizes > 1).sum()), np.sort(by_hash[first][least < most]))


def default_clusters(n: int) -> int:
    """Clusters for n samples: about a thousand in each."""
    return max(1, n // PER_CLUSTER)


def check_clusters(clusters: int, n: int) -> None:
    """Raise UsageError for more clusters than half of the n candidates: pairs are compared within a cluster, and most would have none."""
    if clusters > max(1, n // 2):
        raise UsageError(
            f"--dedup-clusters {clusters} of {n:,} candidates would compare next to none: at most {max(1, n // 2)}, by default "
            f"{default_clusters(n)}"
        )


@dataclass(frozen=True)
class Near:
    """How near is a duplicate: eps: a cosine above 1 - eps; clusters: within how many; seed: of ties; memory: most bytes."""

    eps: float
    clusters: int
    seed: int
    memory: int


def near(uids: NDArray[np.uint64], embedding: NDArray[np.floating], how: Near) -> Kept:
    """Of samples whose embeddings nearly agree keep the least typical: SemDeDup, Abbas et al., "SemDeDup: data-efficient learning at
    web-scale through semantic deduplication", 2023.

    k-means of the embeddings, brought to unit length, makes clusters; only pairs within one are compared. In each the samples are taken up
    from the farthest from its centre (by cosine; ties by the order hash), and one is left out if its cosine with one that is *kept* is
    above 1 - eps, so that of a chain of neighbours not all but one go. Embeddings of zeros are near none.

    uids: uint64 of shape (n,); embedding: floating of shape (n, d), finite. About n * clusters * d multiplications for each of at most 50
    rounds of k-means and n * m * d for clusters of m; 48 bytes for each number of the embedding.
    Raises UsageError where that is above the memory.
    """
    n, width = embedding.shape
    check_memory(n, width, how.memory)
    by_hash = _by_hash(uids, how.seed)
    unit = _unit(embedding[by_hash].astype(np.float32))
    kept, groups = [], 0
    for rows, centre in _clusters(unit, how.clusters):
        left, found = _spread(_unit(unit[rows].astype(np.float64)), centre, 1 - how.eps)
        kept.append(by_hash[rows[left]])
        groups += found
    return Kept(np.sort(np.concatenate(kept)), groups)


def needed_bytes(n: int, width: int) -> int:
    """Most bytes that `near` takes for n embeddings of so many numbers: all of them at once as float32, some as float64."""
    return 48 * n * width


def check_memory(n: int, width: int, memory: int) -> None:
    """Raise UsageError where `near` would take more."""
    needed = needed_bytes(n, width)
    if needed > memory:
        raise UsageError(
            f"--dedup near of {n:,} embeddings of {width:,} numbers takes {needed:,} bytes, --memory is {memory:,}: give --memory {needed}"
        )


def _by_hash(uids: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    return np.argsort(order.order_hash(uids, seed, "select"), kind="stable").astype(np.int64)


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """The rows at length 1; those of zeros as they are."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(vectors.dtype)


def _clusters(unit: NDArray[np.floating], clusters: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """The rows of each cluster, ascending, and its centre."""
    if clusters == 1:
        yield np.arange(len(unit)), unit.mean(0, dtype=np.float64)
        return
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    distinct = len(np.unique(unit, axis=0))
    with threadpool_limits(1), warnings.catch_warnings():  # sums of several threads depend on how many they are
        # Points that differ in their last bit may be one to k-means: some clusters are then empty, which is no matter.
        warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
        found = KMeans(min(clusters, distinct), n_init=1, max_iter=ROUNDS, random_state=0).fit(unit)
    for cluster in range(found.n_clusters):
        rows = np.flatnonzero(found.labels_ == cluster)
        if len(rows):
            yield rows, found.cluster_centers_[cluster].astype(np.float64)


def _spread(unit: NDArray[np.floating], centre: NDArray[np.float64], limit: float) -> tuple[NDArray[np.int64], int]:
    """Those of a cluster that are kept, and how many of them were kept for others too."""
    # einsum, not BLAS: equal points give equal numbers wherever they stand.
    outwards = np.argsort(np.einsum("ij,j->i", unit, centre), kind="stable")
    sorted_out = unit[outwards]
    there = np.ones(len(unit), bool)
    groups = 0
    for n in range(len(unit)):
        if there[n]:
            same = np.einsum("ij,j->i", sorted_out[n + 1 :], sorted_out[n]) > limit
            groups += bool((same & there[n + 1 :]).any())
            there[n + 1 :] &= ~same
    return outwards[there], groups
