"""A cut-off that comes before a method: the samples of lowest `aum` are left out, because they are the likeliest to have a wrong label.

*Source: the hard cut-off of Zheng et al., "Coverage-centric coreset selection for high pruning rates", ICLR 2023.*
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.selectors.base import Params, Picked, Pool
from kdprune_data.selectors.inputs import score_of
from kdprune_data.selectors.quota import check, lowest, narrowed

AUM = "aum"
CUT_HELP = "Fraction of the candidates, those of lowest aum, that is left out first; auto: 0.375 - 0.75 f, from 0 to 0.3."


def needs(score: str, cut: float | None) -> tuple[str, ...]:
    """The scores that a method with this cut-off reads: its own, and `aum` unless nothing is cut."""
    return (score,) if cut == 0 or score == AUM else (score, AUM)


def cut_count(keep: int, n: int, cut: float | None) -> int:
    """How many of n candidates are left out before `keep` of them are kept: floor(cut * n + 1/2).

    None is a rule of ours: cut = 0.375 - 0.75 f with f = keep / n, at least 0 and at most 0.3. It gives the published 0.3 at f = 0.1 and is
    near the published 0.2 at f = 0.2; in between and above it is nobody's. In whole numbers, so that it is exact; `keep` are always left.
    """
    if cut == 0:
        return 0
    if cut is not None:
        return order.keep_count(order.fraction(cut), n)
    return max(0, min((3 * n - 6 * keep + 4) // 8, (3 * n + 5) // 10))


def without_lowest(pool: Pool, keep: int, params: Params, cut: float | None, select: Callable[[Pool], Picked]) -> Picked:
    """What `select` keeps of the pool without the samples of lowest aum; among equal ones the smaller order hash is left out first.

    Of each class its proportion, so that classes keep theirs; with balance `none` the lowest of all, as in the paper.

    Raises UsageError when the pool, or what is left of it, holds fewer than `keep`, labels are needed and missing, or the pool has no aum;
    SourceError when an aum is not finite.
    """
    check(pool, keep, params)
    lowest_first = np.empty(0, np.int64) if cut == 0 else _ascending(pool, params.seed)
    return narrowed(pool, lowest(pool, lowest_first, cut_count(keep, len(pool.uids), cut), params), keep, select)


def _ascending(pool: Pool, seed: int) -> NDArray[np.int64]:
    return np.lexsort((order.order_hash(pool.uids, seed, "select"), score_of(pool, AUM))).astype(np.int64)
