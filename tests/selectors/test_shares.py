"""How many of each class are kept, from their sizes alone: what `quota.take` comes to, on thousands of small tables."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from kdprune_data.selectors import Params, Pool, quota, shares


def taken(sizes: list[int], keep: int, balance: str, seed: int) -> list[int]:
    """What a ranking comes to."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    pool = Pool(np.arange(len(labels), dtype=np.uint64), labels)
    kept = quota.take(pool, np.arange(len(labels)), keep, Params(balance=balance)).indices
    return np.bincount(labels[kept], minlength=len(sizes)).tolist()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("balance", ["class", "uniform"])
def test_as_a_ranking_comes_to(monkeypatch: pytest.MonkeyPatch, balance: str, exact: bool) -> None:
    if exact:  # as for classes too large for quotients in float64
        monkeypatch.setattr(shares, "EXACT_IN_FLOAT", 0)
    rng = np.random.default_rng(0)
    for seed in range(1500):
        sizes = rng.integers(1, (4, 12, 60)[seed % 3], rng.integers(1, 10))
        keep = int(rng.integers(1, sizes.sum() + 1))
        assert shares.shares(sizes, keep, balance).tolist() == taken(sizes.tolist(), keep, balance, seed), (sizes, keep)


def test_classes_too_large_for_floats() -> None:
    """Quotas of two classes that are the same float64 and differ: the smaller one is kept, not the one of the lower class number."""
    sizes = np.array([2**53 - 1, 2**53], np.int64) // 2**3
    keep = int(sizes.sum()) // 2
    found = shares.shares(sizes, keep, "class")
    assert found.sum() == keep
    inside = max(Fraction(2 * k - 1, 2 * n) for k, n in zip(found.tolist(), sizes.tolist(), strict=True))
    outside = min(Fraction(2 * k + 1, 2 * n) for k, n in zip(found.tolist(), sizes.tolist(), strict=True))
    assert inside < outside


def test_without_balance_it_is_all_one() -> None:
    assert shares.shares(np.array([7]), 3, "none").tolist() == [3]
