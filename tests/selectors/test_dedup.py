"""selectors/dedup.py against loops written from the definition; chains, equal points, zeros, one sample; order and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.selectors import dedup

MEMORY = 10**9


def hashes(uids: np.ndarray, seed: int) -> list[int]:
    return [int(h) for h in order.order_hash(uids, seed, "select")]


def exact_by_loops(uids: np.ndarray, digests: np.ndarray, labels: np.ndarray, seed: int) -> tuple[set[int], int, int]:
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest.tobytes(), []).append(row)
    by_hash = hashes(uids, seed)
    kept = {min(rows, key=lambda row: by_hash[row]) for rows in groups.values()}
    known = [{int(labels[row]) for row in rows} - {-1} for rows in groups.values()]
    return kept, sum(len(rows) > 1 for rows in groups.values()), sum(len(found) > 1 for found in known)


def near_by_loops(uids: np.ndarray, embedding: np.ndarray, eps: float, seed: int) -> set[int]:
    """One cluster, whose centre is the mean of the points at unit length."""
    points = []
    for vector in embedding.astype(float).tolist():
        length = math.sqrt(sum(x * x for x in vector))
        points.append([x / length if length else 0.0 for x in vector])
    centre = [sum(column) / len(points) for column in zip(*points, strict=True)]
    by_hash = hashes(uids, seed)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    kept: list[int] = []
    for row in sorted(range(len(points)), key=lambda row: (round(cosine(points[row], centre), 6), by_hash[row])):
        if not any(cosine(points[row], points[other]) > 1 - eps for other in kept):
            kept.append(row)
    return set(kept)


@pytest.mark.parametrize("seed", range(12))
def test_exact_duplicates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = (1, 2, 40, 300)[seed % 4]
    digests = rng.integers(0, 256, (n // 2 + 1, 32), dtype=np.uint8)[rng.integers(0, n // 2 + 1, n)]
    uids, labels = rng.permutation(10**6)[:n].astype(np.uint64), rng.integers(-1, 3, n).astype(np.int32)
    found = dedup.exact(uids, digests, labels, seed=seed)
    assert (set(found.rows.tolist()), found.groups, len(found.conflicts)) == exact_by_loops(uids, digests, labels, seed)
    assert (np.diff(found.rows) > 0).all()


def test_digests_that_differ_in_their_last_byte_or_end_in_zeros_differ() -> None:
    digests = np.zeros((3, 32), np.uint8)
    digests[1, 31], digests[2, 0] = 1, 1
    assert len(dedup.exact(np.arange(3, dtype=np.uint64), digests, np.zeros(3, np.int32), seed=0).rows) == 3


def clouds(seed: int, n: int, d: int = 6) -> np.ndarray:
    """Points around a few directions, some of them equal; on a grid, so that sums are exact enough to compare."""
    rng = np.random.default_rng(seed)
    around = rng.normal(size=(max(1, n // 8), d))[rng.integers(0, max(1, n // 8), n)] + rng.normal(size=(n, d)) * 0.05
    around[n // 2 :: 5] = around[0]
    return around.astype(np.float16)


@pytest.mark.parametrize("eps", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("n", [1, 2, 17, 120])
def test_near_duplicates_in_one_cluster(n: int, eps: float) -> None:
    embedding, uids = clouds(n, n), np.random.default_rng(n).permutation(10**6)[:n].astype(np.uint64)
    found = dedup.near(uids, embedding, dedup.Near(eps, 1, 3, MEMORY))
    assert set(found.rows.tolist()) == near_by_loops(uids, embedding, eps, 3)


@pytest.mark.parametrize("clusters", [1, 3, 10])
def test_every_sample_that_is_left_out_has_a_near_one_that_stays_and_those_that_stay_are_apart(clusters: int) -> None:
    embedding, uids = clouds(5, 300), np.arange(300, dtype=np.uint64)
    found = dedup.near(uids, embedding, dedup.Near(0.05, clusters, 0, MEMORY))
    unit = embedding.astype(float) / np.linalg.norm(embedding.astype(float), axis=1, keepdims=True)
    cosine = unit @ unit.T
    gone = np.setdiff1d(np.arange(300), found.rows)
    assert len(gone)
    assert (cosine[np.ix_(gone, found.rows)].max(1) > 0.95).all()
    if clusters == 1:
        among = cosine[np.ix_(found.rows, found.rows)] - np.eye(len(found.rows))
        assert (among <= 0.95).all()


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 6])
def test_pairs_are_compared_within_a_cluster_alone(clusters: int) -> None:
    """Six tight bundles, all of them near one another at this eps: one sample of each cluster stays, and clusters do not cut a bundle."""
    rng = np.random.default_rng(0)
    angles = np.repeat(np.arange(6) * 0.2, 10) + rng.uniform(-0.001, 0.001, 60)
    embedding = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = dedup.near(np.arange(60, dtype=np.uint64), embedding, dedup.Near(0.99, clusters, 0, MEMORY))
    assert len(found.rows) == found.groups == clusters
    assert len(set((found.rows // 10).tolist())) == clusters


def test_a_cosine_of_just_the_limit_is_not_near() -> None:
    assert dedup.near(np.arange(3, dtype=np.uint64), np.eye(3), dedup.Near(1.0, 1, 0, MEMORY)).rows.tolist() == [0, 1, 2]


def test_points_that_differ_in_their_last_bit_warn_of_nothing() -> None:
    """Five directions in many lengths, and more clusters than k-means can then tell apart. (A warning is an error here.)"""
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(5, 3))[rng.integers(0, 5, 40)] * rng.random((40, 1))).astype(np.float32)
    assert 5 <= len(dedup.near(np.arange(40, dtype=np.uint64), points, dedup.Near(1e-6, 20, 0, MEMORY)).rows) < 20


@pytest.mark.parametrize(("clusters", "n", "refused"), [(1, 1, False), (1, 0, False), (2, 3, True), (50, 100, False), (51, 100, True)])
def test_too_many_clusters_are_refused(clusters: int, n: int, refused: bool) -> None:
    if refused:
        with pytest.raises(UsageError, match=rf"^--dedup-clusters {clusters} of {n} candidates .*: at most {n // 2}, by default 1$"):
            dedup.check_clusters(clusters, n)
    else:
        dedup.check_clusters(clusters, n)


def test_of_a_chain_not_all_but_one_go() -> None:
    """a - b - c, each near the next, a and c apart: both ends stay, whichever is the farthest from the centre."""
    angles = np.array([0.0, 0.2, 0.4])
    embedding = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = dedup.near(np.arange(3, dtype=np.uint64), embedding, dedup.Near(0.03, 1, 0, MEMORY))
    assert found.rows.tolist() == [0, 2]
    assert found.groups == 1


@pytest.mark.parametrize("clusters", [1, 4])
def test_equal_embeddings_and_zeros(clusters: int) -> None:
    uids = np.arange(20, dtype=np.uint64)
    assert len(dedup.near(uids, np.ones((20, 5), np.float16), dedup.Near(1e-6, clusters, 0, MEMORY)).rows) == 1
    assert len(dedup.near(uids, np.zeros((20, 5), np.float16), dedup.Near(0.5, clusters, 0, MEMORY)).rows) == 20
    huge = np.full((20, 5), 65_504, np.float16)
    assert len(dedup.near(uids, huge, dedup.Near(1e-6, clusters, 0, MEMORY)).rows) == 1


@pytest.mark.parametrize("clusters", [1, 7])
def test_the_order_of_rows_decides_nothing(clusters: int) -> None:
    embedding, uids = clouds(2, 200), np.random.default_rng(0).permutation(10**6)[:200].astype(np.uint64)
    digests, labels = np.repeat(embedding[:, :2].copy().view(np.uint8), 8, 1), np.arange(200, dtype=np.int32) % 3
    turned = np.random.default_rng(1).permutation(200)
    how = dedup.Near(0.05, clusters, 4, MEMORY)
    before = embedding.copy()
    one, other = dedup.near(uids, embedding, how), dedup.near(uids[turned], embedding[turned], how)
    assert set(uids[one.rows].tolist()) == set(uids[turned][other.rows].tolist())
    np.testing.assert_array_equal(embedding, before)
    one, other = (dedup.exact(u, d, x, seed=4) for u, d, x in ((uids, digests, labels), (uids[turned], digests[turned], labels[turned])))
    assert set(uids[one.rows].tolist()) == set(uids[turned][other.rows].tolist())


def test_memory_is_kept_to_and_refused() -> None:
    import tracemalloc

    embedding, uids = clouds(0, 4000, 32), np.arange(4000, dtype=np.uint64)
    needed = dedup.needed_bytes(4000, 32)
    with pytest.raises(UsageError, match=rf"takes {needed:,} bytes, --memory is {needed - 1:,}: give --memory {needed}$"):
        dedup.near(uids, embedding, dedup.Near(0.05, 1, 0, needed - 1))
    for clusters in (1, 4):
        tracemalloc.start()
        dedup.near(uids, embedding, dedup.Near(0.05, clusters, 0, needed))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < needed + 1_000_000


@pytest.mark.parametrize(("n", "clusters"), [(1, 1), (999, 1), (2500, 2), (50_000, 50)])
def test_the_default_number_of_clusters(n: int, clusters: int) -> None:
    assert dedup.default_clusters(n) == clusters
