"""Herding against its definition, in loops: points that follow the mean of their class."""

from __future__ import annotations

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.errors import UsageError
from kdprune_data.selectors import Pool
from kdprune_data.selectors.points import PartsParams


def pool_of(points: np.ndarray, labels: np.ndarray | None = None) -> Pool:
    """Samples with these embeddings, of one class unless labels are given."""
    uids = order.uids_of(str(n) for n in range(len(points)))
    return Pool(uids, np.zeros(len(points), np.int32) if labels is None else labels.astype(np.int32), embedding=points)


def ref_herding(pool: Pool, rows: list[int], keep: int, seed: int = 0) -> list[int]:
    """Rows in the order of choice, straight from the formula."""
    tie = order.order_hash(pool.uids, seed, "select").tolist()
    h = {row: np.asarray(pool.embedding[row], np.float64) for row in rows}
    mean = sum(h.values()) / len(rows)
    chosen: list[int] = []
    while len(chosen) < keep:
        wanted = (len(chosen) + 1) * mean - sum((h[row] for row in chosen), np.zeros(len(mean)))
        chosen.append(min((row for row in rows if row not in chosen), key=lambda row: (((wanted - h[row]) ** 2).sum(), tie[row])))
    return chosen


POINTS = {
    "many": lambda rng: rng.normal(size=(48, 5)) + 3,
    "float16": lambda rng: rng.normal(size=(48, 7)).astype(np.float16),
    "ties": lambda rng: rng.integers(0, 2, (64, 2)).astype(np.float32),  # 64: their mean is exact, so equal distances are equal
    "equal": lambda rng: np.ones((16, 3)),
    "zero": lambda rng: np.zeros((16, 3)),
    "one": lambda rng: rng.normal(size=(1, 4)),
    "wide": lambda rng: rng.normal(size=(4, 70)),
}


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_references(kind: str, seed: int) -> None:
    pool = pool_of(POINTS[kind](np.random.default_rng(seed)))
    n = len(pool.uids)
    expected = ref_herding(pool, list(range(n)), n, seed)
    for keep in {1, 2, n // 3, n // 2, n} & set(range(1, n + 1)):
        found = selectors.select("herding", pool, keep, PartsParams(seed=seed))
        assert found.indices.tolist() == sorted(expected[:keep])
        assert found.weights is None


def test_by_hand() -> None:
    """The mean is 3.8, and 3 is nearest to it; then 6 is nearest to 7.6 - 3 = 4.6; then 1 to 11.4 - 9 = 2.4."""
    pool = pool_of(np.array([[0.0], [1], [3], [6], [9]]))
    kept = [selectors.select("herding", pool, keep, PartsParams()).indices.tolist() for keep in (1, 2, 3)]
    assert kept == [[2], [2, 3], [1, 2, 3]]


@pytest.mark.parametrize("seed", range(3))
def test_it_matches_the_mean_better_than_random(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 900)
    pool = pool_of(np.maximum(0, rng.normal(size=(900, 32)) + labels[:, None]), labels)
    away = {}
    for method in ("herding", "random"):
        kept = selectors.select(method, pool, 90, PartsParams(seed=seed)).indices
        away[method] = sum(
            np.linalg.norm(pool.embedding[kept[labels[kept] == c]].mean(0) - pool.embedding[labels == c].mean(0)) for c in range(3)
        )
    assert away["herding"] < away["random"] / 4


def test_classes_are_apart() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 100) * 2  # classes 1, 3 and 5 are empty
    pool = pool_of(rng.normal(size=(100, 6)), labels)
    found = selectors.select("herding", pool, 20, PartsParams()).indices
    share = selectors.select("random", pool, 20, PartsParams()).indices
    for label in (0, 2, 4, 6):
        rows = np.flatnonzero(labels == label).tolist()
        assert sorted(ref_herding(pool, rows, int((labels[share] == label).sum()))) == found[labels[found] == label].tolist()


@pytest.mark.parametrize("method", ["herding", "kcenter"])
def test_points_that_are_not_held_give_the_same(method: str) -> None:
    """A class whose points are more than memory is read in blocks, from float16."""
    rng = np.random.default_rng(1)
    pool = pool_of(rng.normal(size=(900, 1000)).astype(np.float16))
    least = int(selectors.method(method).cost(size_of(900, 1000), PartsParams(memory=1)).bytes)
    assert least < 12 * 900 * 1000
    held, read = (selectors.select(method, pool, 90, PartsParams(memory=memory)).indices.tolist() for memory in (10**9, least))
    assert held == read
    with pytest.raises(
        UsageError, match=f"^{method} needs {least:,} bytes for groups of up to 900 samples, and --memory is {least - 1:,}: "
    ):
        selectors.select(method, pool, 90, PartsParams(memory=least - 1))


def size_of(n: int, d: int) -> selectors.Size:
    """One class, a tenth kept."""
    return selectors.Size(np.array([n]), np.array([n // 10]), d)
