"""By a score: keep its hard end, its easy end, or its middle. Ties by the order hash, never by the order of files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import option
from kdprune_data.selectors.base import ENDS, Method, Params, Picked, Pool
from kdprune_data.selectors.inputs import score_of
from kdprune_data.selectors.quota import check, lowest, narrowed, places, take


@dataclass(frozen=True)
class RankedParams(Params):
    """score: the one to rank by; end: which end of it is kept; skip_hardest: the fraction of the candidates, from the hard end, that is
    left out first."""

    score: str = option("el2n", help="The score to rank by.")
    end: str = option("hard", help="Which samples a score keeps.", choices=ENDS)
    skip_hardest: float = option(0.0, help="Fraction of the candidates, the hardest, that is left out first.", least=0, most=0.999)


def select(pool: Pool, keep: int, params: RankedParams) -> Picked:
    """Keep `keep` samples by a score. Nested in `keep`.

    `middle` keeps what is nearest to the median place: of each class, or with balance `none` of the whole pool. `skip_hardest` is the
    offset of Paul et al., "Deep learning on a data diet", NeurIPS 2021: the hardest are often mislabelled. Of each class its proportion is
    left out, with balance `none` the hardest of all.

    Raises UsageError without the score or when too few are left, SourceError when one is NaN or infinite.
    """
    scores = score_of(pool, params.score)
    if params.skip_hardest:
        skipped = order.keep_count(order.fraction(params.skip_hardest), len(scores))
        check(pool, keep, params)
        hardest = lowest(pool, _ranking(pool, scores, params, "hard"), skipped, params)
        return narrowed(pool, hardest, keep, lambda rest: _select(rest, keep, params))
    return _select(pool, keep, params)


def _select(pool: Pool, keep: int, params: RankedParams) -> Picked:
    return take(pool, _ranking(pool, pool.scores[params.score], params, params.end), keep, params)


def _ranking(pool: Pool, scores: NDArray[np.floating], params: RankedParams, end: str) -> NDArray[np.int64]:
    tie = order.order_hash(pool.uids, params.seed, "select")
    high_first = (pool.hard[params.score] == "high") == (end != "easy")
    ranking = np.lexsort((tie, -scores if high_first else scores)).astype(np.int64)
    return middle_first(pool, ranking, params) if end == "middle" else ranking


def middle_first(pool: Pool, ranking: NDArray[np.int64], params: Params) -> NDArray[np.int64]:
    """A ranking of the pool turned into one that begins with what is nearest to the median place of the other, in sizes of the class: of
    each class, or with balance `none` of the whole pool. Ties by the order hash."""
    groups = np.zeros(len(ranking), np.int32) if params.balance == "none" else pool.labels
    place, size = places(ranking, groups)
    tie = order.order_hash(pool.uids, params.seed, "select")
    return np.lexsort((tie, np.abs(2 * place - (size - 1)) / size)).astype(np.int64)


METHOD = Method(select, "by a score", RankedParams, lambda params: (params.score,))
