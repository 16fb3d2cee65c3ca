"""Coverage-centric coreset selection: leave out the likeliest label errors, then spread what is kept over the range of a score.

Keeping the hardest fails at small fractions: nothing is left of the dense middle of the data. So the range of the score is cut into bins
of equal width, and each gives the same number while it lasts. *Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for
high pruning rates", ICLR 2023.*
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import option
from kdprune_data.selectors.base import Method, Params, Picked, Pool
from kdprune_data.selectors.cutoff import AUM, CUT_HELP, needs, without_lowest
from kdprune_data.selectors.inputs import score_of
from kdprune_data.selectors.quota import groups, places


@dataclass(frozen=True)
class CcsParams(Params):
    """score: the one whose range is covered; cut: the fraction of lowest aum left out first, None = our rule; bins: how many of it."""

    score: str = option(AUM, help="The score whose range is covered.")
    cut: float | None = option(None, help=CUT_HELP, least=0, most=0.999)
    bins: int = option(50, help="Parts of equal width that the range is cut into.", least=1, most=1_000_000)


def select(pool: Pool, keep: int, params: CcsParams) -> Picked:
    """Keep `keep` samples spread over the range of a score. Not nested: bins and cut-off move with `keep`.

    With balance `none` the bins are over all that is left, as in the paper; else each class keeps its share, over bins of its own range.

    Raises UsageError without the scores or when too few are left, SourceError when one is NaN or infinite.
    """
    score_of(pool, params.score)
    return without_lowest(pool, keep, params, params.cut, lambda rest: _stratified(rest, keep, params))


def _stratified(pool: Pool, keep: int, params: CcsParams) -> Picked:
    scores = np.asarray(pool.scores[params.score], np.float64)
    spread = [group.rows[_spread(scores[group.rows], group.keep, params.bins)] for group in groups(pool, keep, params)]
    return Picked(np.sort(np.concatenate(spread)))


def _spread(scores: NDArray[np.float64], keep: int, bins: int) -> NDArray[np.int64]:
    """Which of a group's samples are kept: the first of each bin, as they come in the order of their hash."""
    member = bin_of(scores, bins)
    place, _ = places(np.arange(len(scores)), member)
    return np.flatnonzero(place < budgets(np.bincount(member, minlength=bins), keep)[member])


def bin_of(scores: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """The bin of each score, among `bins` of equal width from the lowest to the highest score, which is in the last: int64 of shape (n,).
    Where all are equal there is one bin."""
    low, high = scores.min(), scores.max()
    if low == high:
        return np.zeros(len(scores), np.int64)
    place: NDArray[np.float64] = (scores - low) / (high - low) * bins
    return np.minimum(place, bins - 1).astype(np.int64)


def budgets(sizes: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """How many each bin gives, int64 of shape (bins,): from the smallest bin up (equal ones in their order), all it has or an equal share
    of what is still to be kept, rounded down, whichever is less.

    The sum is exactly `keep`: shares never shrink on the way, and once one is smaller than its bin all later bins hold their shares too, of
    which the last is whatever remains.
    """
    given = np.zeros(len(sizes), np.int64)
    remaining = keep
    for done, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        given[bin_] = min(int(sizes[bin_]), remaining // (len(sizes) - done))
        remaining -= int(given[bin_])
    return given


METHOD = Method(
    select, "spread over the range of a score, lowest aum left out", CcsParams, lambda params: needs(params.score, params.cut), nested=False
)
