"""DUAL with Beta sampling: uncertain samples, drawn at random, and the easier the fewer are kept.

The score `dual` is high where predictions were uncertain and the label's probability was low. At small fractions that keeps what cannot be
learned from so few, so samples are drawn with a probability that a Beta density of their mean probability moves towards the easy side.
*Source: Cho, Shin and Yun, "Lightweight dataset pruning without full training via example difficulty and prediction uncertainty", 2025.*
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import option
from kdprune_data.errors import SourceError
from kdprune_data.selectors.base import Method, Params, Picked, Pool
from kdprune_data.selectors.inputs import score_of
from kdprune_data.selectors.quota import check, groups

DUAL, P_TRUE = "dual", "p_true"
TOP = 10
"""The samples whose mean probability says how far the density starts from the easy side."""
CLOSEST = 1 - 2.0**-25
"""The largest probability that is told from 1: the scores are float32, and a density at 1 itself could be infinite."""


@dataclass(frozen=True)
class DualBetaParams(Params):
    """c_d: how late, as fewer are kept, the density moves to the easy side."""

    c_d: float = option(4.0, help="How late the density moves to the easy side as fewer are kept.", least=0.01, most=1000)


def select(pool: Pool, keep: int, params: DualBetaParams) -> Picked:
    """Draw `keep` samples without replacement, with probabilities in proportion to beta_density(p_true) * dual. Not nested.

    Each has the key -ln(u) / weight, u being its order hash as a number in (0, 1), and those of smallest keys are drawn: sampling without
    replacement as by Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006. Weights of 0 come last, by their hash.

    Raises UsageError without the scores, SourceError when one is not finite, or outside its range.
    """
    check(pool, keep, params)
    dual, p_true = (_within(pool, name, most) for name, most in ((DUAL, np.inf), (P_TRUE, 1.0)))
    hashes = order.order_hash(pool.uids, params.seed, "select")
    a, b = density(p_true[np.lexsort((hashes, -dual))[:TOP]], keep / len(dual), params.c_d)
    key = _log_key(hashes, _log_weight(dual, p_true, a, b))
    drawn = [group.rows[np.argsort(key[group.rows], kind="stable")[: group.keep]] for group in groups(pool, keep, params)]
    return Picked(np.sort(np.concatenate(drawn)))


def density(top: NDArray[np.float64], kept: float, c_d: float) -> tuple[float, float]:
    """The Beta density's a and b: b = 15 (1 - mu) (1 - r^c_d), a = 16 - b, with mu the mean probability of the samples of highest dual and
    r the fraction that is pruned."""
    b = 15 * (1 - float(np.sort(top).mean())) * (1 - (1 - kept) ** c_d)
    return 16 - b, b


def _within(pool: Pool, name: str, most: float) -> NDArray[np.float64]:
    values = np.asarray(score_of(pool, name), np.float64)
    outside = (values < 0) | (values > most)
    if outside.any():
        limits = "0 or more" if most == np.inf else f"from 0 to {most:g}"
        raise SourceError(
            f"{name} is {values[outside].min():g} for a candidate ({int(outside.sum()):,} of {len(values):,} are out of range): it must be "
            f"{limits}, as `kdprune-data score` writes it"
        )
    return values


def _log_weight(dual: NDArray[np.float64], p_true: NDArray[np.float64], a: float, b: float) -> NDArray[np.float64]:
    """ln(p^(a-1) (1-p)^(b-1) dual): the density's constant is the same for all. -inf for a weight of 0."""
    p = np.minimum(p_true, CLOSEST)
    there = (dual > 0) & (p > 0)
    weight = np.full(len(dual), -np.inf)
    weight[there] = (a - 1) * np.log(p[there]) + (b - 1) * np.log1p(-p[there]) + np.log(dual[there])
    return weight


def _log_key(hashes: NDArray[np.uint64], log_weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln(-ln(u) / weight); u is the middle of one of 2^52 equal parts of (0, 1), so that it is neither end."""
    u = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return np.log(-np.log(u)) - log_weight


METHOD = Method(select, "drawn by uncertainty, the easier the fewer are kept", DualBetaParams, needs=lambda _: (DUAL, P_TRUE), nested=False)
