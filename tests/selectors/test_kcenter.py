"""k-centre against its definition, in loops, and against the best there is, by trying all."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.selectors import Pool
from kdprune_data.selectors.points import PartsParams


def pool_of(points: np.ndarray) -> Pool:
    """Samples of one class with these embeddings."""
    uids = order.uids_of(str(n) for n in range(len(points)))
    return Pool(uids, np.zeros(len(points), np.int32), embedding=points)


def ref_kcenter(points: np.ndarray, tie: list[int], keep: int) -> list[int]:
    """Rows in the order of choice: the first by the hash, then the farthest from its nearest chosen one."""
    chosen = [min(range(len(points)), key=lambda row: tie[row])]
    while len(chosen) < keep:
        rest = [row for row in range(len(points)) if row not in chosen]
        away = {row: min(((points[row] - points[kept]) ** 2).sum() for kept in chosen) for row in rest}
        chosen.append(min(rest, key=lambda row: (-away[row], tie[row])))
    return chosen


def radius(points: np.ndarray, kept: tuple[int, ...] | list[int]) -> float:
    """The largest distance of a point to its nearest kept one."""
    return max(min(float(np.linalg.norm(point - points[row])) for row in kept) for point in points)


POINTS = {
    "many": lambda rng: rng.normal(size=(40, 5)),
    "ties": lambda rng: rng.integers(0, 4, (40, 2)).astype(np.float64),  # duplicates, and many equal distances
    "float16": lambda rng: rng.normal(size=(40, 9)).astype(np.float16),
    "equal": lambda rng: np.full((10, 3), 7.0),
    "two": lambda rng: np.repeat([[0.0], [1.0]], 6, 0),
    "one": lambda rng: rng.normal(size=(1, 4)),
}


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_references(kind: str, seed: int) -> None:
    points = POINTS[kind](np.random.default_rng(seed))
    pool, n = pool_of(points), len(points)
    expected = ref_kcenter(points.astype(np.float64), order.order_hash(pool.uids, seed, "select").tolist(), n)
    for keep in {1, 2, n // 3, n // 2, n} & set(range(1, n + 1)):
        found = selectors.select("kcenter", pool, keep, PartsParams(seed=seed))
        assert found.indices.tolist() == sorted(expected[:keep])


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_radius_is_at_most_twice_the_smallest(seed: int, keep: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(12, 2)) * rng.choice([1, 10], (12, 1))
    kept = selectors.select("kcenter", pool_of(points), keep, PartsParams(seed=seed)).indices.tolist()
    assert radius(points, kept) <= 2 * min(radius(points, some) for some in combinations(range(12), keep)) + 1e-12


def test_seeds_differ_and_outliers_come_early() -> None:
    points = np.concatenate([np.random.default_rng(0).normal(size=(99, 4)), [[50.0, 0, 0, 0]]])
    kept = [selectors.select("kcenter", pool_of(points), 5, PartsParams(seed=seed)).indices.tolist() for seed in range(4)]
    assert all(99 in some for some in kept)
    assert len({tuple(some) for some in kept}) > 1
