"""ccs against a slow reference written from its definition, and cases worked by hand: budgets, bins, cut-off."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.selectors import Params, Pool
from kdprune_data.selectors.base import BALANCES
from kdprune_data.selectors.ccs import CcsParams, bin_of, budgets
from kdprune_data.selectors.cutoff import cut_count

SIZES = [[1], [9], [30, 30], [5, 50, 1], [13, 0, 8], [1] * 7, [200]]


def pool_of(sizes: list[int], seed: int, levels: int) -> Pool:
    """Classes of these sizes with an el2n on few levels, unevenly filled, and an aum."""
    rng = np.random.default_rng([seed, levels, *sizes])
    n = sum(sizes)
    uids = order.uids_of(f"{seed}-{row}" for row in range(n))
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    el2n = np.floor(rng.random(n) ** 3 * levels) / 7
    return Pool(uids, labels, {"el2n": el2n, "aum": rng.integers(-3, 9, n) / 4}, {"el2n": "high", "aum": "low"})


def ref_ccs(pool: Pool, keep: int, params: CcsParams) -> list[int]:
    """The definition: cut by aum, then per group bins, budgets from the smallest bin up, and a draw in each bin by the hash."""
    hashes = order.order_hash(pool.uids, params.seed, "select").tolist()
    left = ref_left(pool, keep, params)
    kept = []
    for members, budget in ref_groups(pool, left, keep, params):
        scores = [float(pool.scores[params.score][row]) for row in members]
        low, high = min(scores), max(scores)
        bins: dict[int, list[int]] = {b: [] for b in range(params.bins)}
        for row, score in zip(members, scores, strict=True):
            place = 0 if high == low else min(params.bins - 1, floor((score - low) / (high - low) * params.bins))
            bins[place].append(row)
        remaining, bins_left = budget, params.bins
        for place in sorted(bins, key=lambda b: (len(bins[b]), b)):
            share = min(len(bins[place]), remaining // bins_left)
            kept += sorted(bins[place], key=lambda row: hashes[row])[:share]
            remaining, bins_left = remaining - share, bins_left - 1
        assert remaining == 0
    return sorted(kept)


def ref_budgets(pool: Pool, rows: list[int], keep: int, balance: str) -> Counter[int]:
    """How many of each class: seats by Sainte-Lague's quotients (2r + 1) / 2n, or by places r; of equal ones the lower class."""
    sizes = Counter(pool.labels[rows].tolist())
    quotas = [(Fraction(2 * r + 1, 2 * n) if balance == "class" else Fraction(r), label) for label, n in sizes.items() for r in range(n)]
    return Counter(label for _, label in sorted(quotas)[:keep])


def ref_left(pool: Pool, keep: int, params: CcsParams) -> list[int]:
    """All but those of lowest aum: of each class in proportion; with balance `none` of all."""
    n = len(pool.uids)
    hashes = order.order_hash(pool.uids, params.seed, "select").tolist()
    cut = params.cut if params.cut is not None else min(0.3, max(0.0, 0.375 - 0.75 * keep / n))
    count = floor(cut * n + 0.5 + 1e-9)
    by_aum = sorted(range(n), key=lambda row: (pool.scores["aum"][row], hashes[row]))
    if params.balance == "none":
        return sorted(by_aum[count:])
    out = ref_budgets(pool, by_aum, count, "class")
    gone = {row for label, few in out.items() for row in [row for row in by_aum if pool.labels[row] == label][:few]}
    return sorted(set(range(n)) - gone)


def ref_groups(pool: Pool, left: list[int], keep: int, params: Params) -> list[tuple[list[int], int]]:
    """What is left, by class, each with its share; or all at once."""
    if params.balance == "none":
        return [(left, keep)]
    budget = ref_budgets(pool, left, keep, params.balance)
    return [([row for row in left if pool.labels[row] == label], count) for label, count in budget.items()]


@pytest.mark.parametrize("score", ["aum", "el2n"])
@pytest.mark.parametrize("cut", [None, 0.0, 0.2])
@pytest.mark.parametrize("balance", BALANCES)
def test_it_is_the_references(balance: str, cut: float | None, score: str) -> None:
    """Any k: ties, single classes, single samples, absent classes, one bin, more bins than samples."""
    for sizes in SIZES:
        for levels in (1, 4, 1000):
            pool = pool_of(sizes, 1, levels)
            n = len(pool.uids)
            for keep in {1, n // 10, n // 4, n // 2, floor(0.7 * n)} - {0}:
                for bins in (1, 3, 50):
                    params = CcsParams(score=score, cut=cut, bins=bins, balance=balance, seed=keep)
                    assert selectors.select("ccs", pool, keep, params).indices.tolist() == ref_ccs(pool, keep, params)


@pytest.mark.parametrize(
    ("sizes", "keep", "expected"),
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([10, 1, 10], 10, [4, 1, 5]),  # 9 over two bins: 4, and 5 to the last
        ([0, 0, 7], 5, [0, 0, 5]),
        ([2, 3, 100], 50, [2, 3, 45]),
        ([5, 5, 5], 2, [0, 1, 1]),  # 2 // 3 = 0, 2 // 2 = 1, 1 // 1 = 1
        ([4, 4], 8, [4, 4]),
        ([3], 3, [3]),
    ],
)
def test_budgets_by_hand(sizes: list[int], keep: int, expected: list[int]) -> None:
    assert budgets(np.array(sizes), keep).tolist() == expected


def test_budgets_lose_nothing() -> None:
    """Exactly what is asked, never more than a bin has, and as equal as can be: whoever gives less than another gives all, or one less."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        sizes = rng.integers(0, rng.integers(1, 40), rng.integers(1, 60))
        keep = int(rng.integers(0, sizes.sum() + 1))
        given = budgets(sizes, keep)
        assert given.sum() == keep
        assert np.all((given >= 0) & (given <= sizes))
        assert np.all((given == sizes) | (given >= given.max() - 1))


def test_bins_by_hand() -> None:
    """Equal widths, upper edges open but for the last."""
    assert bin_of(np.array([0.0, 1.9, 2.0, 5.0, 9.99, 10.0]), 5).tolist() == [0, 0, 1, 2, 4, 4]
    assert bin_of(np.array([-1.0, 0.0, 1.0]), 2).tolist() == [0, 1, 1]
    assert bin_of(np.full(4, 3.3), 50).tolist() == [0] * 4
    assert bin_of(np.array([7.0]), 50).tolist() == [0]


@pytest.mark.parametrize(
    ("keep", "cut", "count"),
    [(100, None, 300), (200, None, 225), (300, None, 150), (500, None, 0), (900, None, 0), (10, None, 300), (100, 0.2, 200), (100, 0.0, 0)],
)
def test_cut_off_by_hand(keep: int, cut: float | None, count: int) -> None:
    """Of a thousand: 0.3 up to a tenth, then 0.375 - 0.75 f, nothing from a half on."""
    assert cut_count(keep, 1000, cut) == count


def test_the_cut_off_of_ours_leaves_enough() -> None:
    for n in range(1, 200):
        assert all(0 <= cut_count(keep, n, None) <= n - keep for keep in range(1, n + 1))


def test_it_covers_the_range_where_the_hardest_do_not() -> None:
    """A thousand samples, of which most are easy: each tenth of the range that holds samples gives some."""
    rng = np.random.default_rng(3)
    el2n = rng.beta(1, 4, 1000)
    pool = Pool(
        order.uids_of(map(str, range(1000))), np.zeros(1000, np.int32), {"el2n": el2n, "aum": -el2n}, {"el2n": "high", "aum": "low"}
    )
    kept = el2n[selectors.select("ccs", pool, 100, CcsParams(score="el2n")).indices]
    assert kept.max() <= np.sort(el2n)[699]  # the three hundred of lowest aum are the hardest here
    share = np.histogram(kept, 10, (el2n.min(), np.sort(el2n)[699]))[0]
    assert share.min() >= 8
    assert share.max() <= 12
