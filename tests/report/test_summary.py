"""report/summary.py against plain loops, numpy, scipy, and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kdprune_data.report.summary import average_ranks, class_means, hardness, quantiles, rank_correlations


def columns(n: int, seed: int) -> list[NDArray[np.float32]]:
    """Smooth, with many ties, of two values, and nearly constant."""
    rng = np.random.default_rng(seed)
    found = [rng.normal(size=n), rng.integers(0, 4, n), rng.random(n) < 0.3, np.arange(n) == 0, 1e30 * rng.normal(size=n)]
    return [one.astype(np.float32) for one in found]


def plain_ranks(values: list[float]) -> list[float]:
    """Places from 1, equal values sharing the mean of theirs."""
    found = []
    for value in values:
        below = sum(1 for other in values if other < value)
        equal = sum(1 for other in values if other == value)
        found.append(below + (equal + 1) / 2)
    return found


def plain_spearman(a: list[float], b: list[float]) -> float | None:
    x, y = plain_ranks(a), plain_ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    above = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    below = sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y)
    return above / math.sqrt(below) if below else None


@pytest.mark.parametrize("n", [1, 2, 3, 10, 57, 1000])
def test_quantiles_are_numpys(n: int) -> None:
    at = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    for values in columns(n, n):
        found = quantiles(values, at)
        assert found.dtype == np.float64
        assert np.allclose(found, np.quantile(values.astype(np.float64), at), rtol=1e-12, atol=0)
        assert (found[0], found[-1]) == (values.min(), values.max())
        assert (np.diff(found) >= 0).all()
        assert np.array_equal(found, quantiles(values[::-1], at))


def test_quantiles_by_hand() -> None:
    assert quantiles(np.array([4.0, 1.0, 2.0, 3.0]), (0, 0.25, 0.5, 1)).tolist() == [1.0, 1.75, 2.5, 4.0]
    assert quantiles(np.full(3, 0.1, np.float32)).tolist() == [float(np.float32(0.1))] * 9
    assert np.isfinite(quantiles(np.array([-3e38, 3e38], np.float32))).all()


def test_class_means_by_hand() -> None:
    """One class without a sample, and a sample without a label."""
    values, labels = np.array([1, 2, 4, 100, 8], np.float32), np.array([0, 0, 2, -1, 2])
    found = class_means(values, labels, 4)
    assert found[[0, 2]].tolist() == [1.5, 6.0]
    assert np.isnan(found[[1, 3]]).all()


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_average_ranks(n: int) -> None:
    for values in columns(n, n):
        assert average_ranks(values).tolist() == plain_ranks(values.tolist()) == stats.rankdata(values).tolist()


def test_minus_nothing_is_nothing() -> None:
    assert average_ranks(np.array([0.0, -0.0, 1.0])).tolist() == [1.5, 1.5, 3.0]


@pytest.mark.parametrize("n", [2, 3, 9, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_rank_correlations(n: int, seed: int) -> None:
    given = columns(n, seed)
    found = rank_correlations(given)
    assert np.array_equal(found, found.T, equal_nan=True)
    for i, a in enumerate(given):
        for j, b in enumerate(given):
            expected = plain_spearman(a.tolist(), b.tolist())
            if expected is None:
                assert np.isnan(found[i, j])
            else:
                assert found[i, j] == pytest.approx(expected, abs=1e-12)
                assert found[i, j] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
                assert -1 <= found[i, j] <= 1


def test_rank_correlation_by_hand() -> None:
    """Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6; and against a tie, 1 2.5 2.5 4: 4.5 / sqrt(5 * 4.5)."""
    a, b, tied = np.array([1.0, 2, 3, 4]), np.array([20.0, 10, 40, 30]), np.array([0.0, 5, 5, 9])
    found = rank_correlations([a, b, tied, -a, np.ones(4)])
    assert found[0, 1] == pytest.approx(0.6)
    assert found[0, 2] == pytest.approx(4.5 / math.sqrt(22.5))
    assert found[0, 3] == -1
    assert np.isnan(found[4]).all()
    assert np.diag(found)[:4].tolist() == [1, 1, 1, 1]


def test_one_sample_has_no_correlation() -> None:
    assert np.isnan(rank_correlations([np.ones(1), np.zeros(1)])).all()


def test_hardness_by_hand() -> None:
    """Two scores of opposite sign that agree, one that does not vary; the last class is empty."""
    means = {"el2n": np.array([1.0, 3.0, np.nan]), "aum": np.array([5.0, 1.0, np.nan]), "flat": np.array([2.0, 2.0, np.nan])}
    found = hardness(means, {"el2n": 2.0, "aum": 1.0, "flat": 0.0}, {"el2n": "high", "aum": "low", "flat": "high"})
    assert found[:2].tolist() == [(-0.5 - 2) / 2, (0.5 + 2) / 2]
    assert np.isnan(found[2])
    alone = hardness({"flat": means["flat"]}, {"flat": 0.0}, {"flat": "high"})
    assert alone[:2].tolist() == [0, 0]
    assert np.isnan(alone[2])
