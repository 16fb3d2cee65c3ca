"""dual_beta against a slow reference written from its definition, and against the probabilities that it should draw with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import inf, log

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.errors import SourceError
from kdprune_data.selectors import Params, Pool
from kdprune_data.selectors.base import BALANCES
from kdprune_data.selectors.dual_beta import DualBetaParams, density

SIZES = [[1], [9], [40], [13, 0, 8], [1, 1, 1], [30, 50]]
HARD = {"dual": "high", "p_true": "low"}


def pool_of(sizes: list[int], *, coarse: bool = False, seed: int = 0) -> Pool:
    """Classes of these sizes; `coarse` has equal scores, weights of 0, and probabilities of 0 and of 1."""
    rng = np.random.default_rng([seed, *sizes])
    n = sum(sizes)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    p_true = rng.integers(0, 4, n) / 3 if coarse else rng.random(n)
    dual = rng.integers(0, 3, n) / 10 if coarse else rng.random(n) / 4
    return Pool(order.uids_of(f"{seed}-{row}" for row in range(n)), labels, {"dual": dual, "p_true": p_true}, HARD)


def ref_dual_beta(pool: Pool, keep: int, params: DualBetaParams) -> list[int]:
    """The definition: a Beta density that moves with what is pruned, times dual; keys -ln(u) / weight; the smallest keys of each class."""
    n = len(pool.uids)
    hashes = order.order_hash(pool.uids, params.seed, "select").tolist()
    dual, p_true = pool.scores["dual"].tolist(), pool.scores["p_true"].tolist()
    top = sorted(range(n), key=lambda row: (-dual[row], hashes[row]))[:10]
    mu = sum(p_true[row] for row in top) / len(top)
    b = 15 * (1 - mu) * (1 - (1 - keep / n) ** params.c_d)
    a = 16 - b

    def key(row: int) -> tuple[float, int]:
        p, u = min(p_true[row], 1 - 2**-25), (hashes[row] // 2**12 + 0.5) / 2**52
        if p == 0 or dual[row] == 0:
            return inf, hashes[row]
        return log(-log(u)) - ((a - 1) * log(p) + (b - 1) * log(1 - p) + log(dual[row])), hashes[row]

    kept = []
    for members, budget in ref_groups(pool, keep, params):
        kept += sorted(members, key=key)[:budget]
    return sorted(kept)


def ref_budgets(pool: Pool, rows: list[int], keep: int, balance: str) -> Counter[int]:
    """How many of each class: seats by Sainte-Lague's quotients (2r + 1) / 2n, or by places r; of equal ones the lower class."""
    sizes = Counter(pool.labels[rows].tolist())
    quotas = [(Fraction(2 * r + 1, 2 * n) if balance == "class" else Fraction(r), label) for label, n in sizes.items() for r in range(n)]
    return Counter(label for _, label in sorted(quotas)[:keep])


def ref_groups(pool: Pool, keep: int, params: Params) -> list[tuple[list[int], int]]:
    """Each class with its share; or all at once."""
    rows = range(len(pool.uids))
    if params.balance == "none":
        return [(list(rows), keep)]
    budget = ref_budgets(pool, list(rows), keep, params.balance)
    return [([row for row in rows if pool.labels[row] == label], count) for label, count in budget.items()]


@pytest.mark.parametrize("c_d", [0.5, 4.0, 30.0])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("balance", BALANCES)
def test_it_is_the_references(balance: str, coarse: bool, c_d: float) -> None:
    for sizes in SIZES:
        for seed in range(3):
            pool = pool_of(sizes, coarse=coarse, seed=seed)
            n = len(pool.uids)
            for keep in {1, n // 10, n // 4, n // 2, n - 1, n} - {0}:
                params = DualBetaParams(balance=balance, seed=seed, c_d=c_d)
                assert selectors.select("dual_beta", pool, keep, params).indices.tolist() == ref_dual_beta(pool, keep, params)


@pytest.mark.parametrize(
    ("mu", "kept", "c_d", "b"),
    [(0.5, 1.0, 4.0, 7.5), (0.2, 0.5, 1.0, 6.0), (0.0, 0.5, 2.0, 11.25), (1.0, 0.3, 4.0, 0.0), (0.5, 0.1, 4.0, 7.5 * (1 - 0.9**4))],
)
def test_the_density_by_hand(mu: float, kept: float, c_d: float, b: float) -> None:
    """b = 15 (1 - mu) (1 - r^c_d), a = 16 - b."""
    assert density(np.full(10, mu), kept, c_d) == pytest.approx((16 - b, b))


def test_draws_have_the_probabilities_of_the_weights() -> None:
    """The first of five to be drawn, over 3,000 seeds: as often as its weight says, to five standard deviations."""
    dual, p_true = np.array([0.1, 0.2, 0.2, 0.3, 0.05]), np.array([0.8, 0.5, 0.6, 0.2, 0.9])
    pool = Pool(order.uids_of("abcde"), np.zeros(5, np.int32), {"dual": dual, "p_true": p_true}, HARD)
    mu, r = 0.6, 0.8
    b = 15 * (1 - mu) * (1 - r**4)
    weight = p_true ** (16 - b - 1) * (1 - p_true) ** (b - 1) * dual
    share = weight / weight.sum()
    trials = 3000
    met = Counter(int(selectors.select("dual_beta", pool, 1, DualBetaParams(seed=seed)).indices[0]) for seed in range(trials))
    for row in range(5):
        assert abs(met[row] / trials - share[row]) <= 5 * np.sqrt(share[row] * (1 - share[row]) / trials)


def test_the_fewer_are_kept_the_easier_they_are() -> None:
    pool = pool_of([3000])
    means = [pool.scores["p_true"][selectors.select("dual_beta", pool, keep, None).indices].mean() for keep in (60, 300, 900, 1500)]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1] + 0.1


def test_weights_of_zero_come_last() -> None:
    """Never before one that could be drawn; in the order of their hash when there is nothing else."""
    pool = pool_of([100])
    dual = np.where(np.arange(100) < 40, 0.0, pool.scores["dual"])
    never = replace(pool, scores=pool.scores | {"dual": dual})
    assert selectors.select("dual_beta", never, 60, None).indices.min() == 40
    by_hash = np.argsort(order.order_hash(pool.uids[:40], 0, "select"))
    assert set(selectors.select("dual_beta", never, 75, None).indices[:15].tolist()) == set(by_hash[:15].tolist())


@pytest.mark.parametrize("value", [0.0, 1e-40, 1.0])
def test_sure_predictions(value: float) -> None:
    """No probability gives a density that is no number."""
    pool = pool_of([50])
    sure = replace(pool, scores=pool.scores | {"p_true": np.full(50, value)})
    for keep in (1, 10, 49):
        assert len(selectors.select("dual_beta", sure, keep, None).indices) == keep


@pytest.mark.parametrize(
    ("name", "value", "limits"), [("dual", -0.1, "0 or more"), ("p_true", -0.1, "from 0 to 1"), ("p_true", 1.1, "from 0 to 1")]
)
def test_scores_out_of_range_are_refused(name: str, value: float, limits: str) -> None:
    pool = pool_of([20])
    pool.scores[name][3] = value
    with pytest.raises(SourceError, match=rf"^{name} is {value} for a candidate \(1 of 20 are out of range\): it must be {limits}"):
        selectors.select("dual_beta", pool, 5, None)
