"""By a score: keep its hard end, its easy end, or its middle. Ties by the order hash, never by the order of files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.selectors.base import Params, Picked, Pool
from kdprune_data.selectors.quota import places, take


def select(pool: Pool, keep: int, params: Params) -> Picked:
    """Keep `keep` samples by `pool.scores`. Nested in `keep`.

    `middle` keeps what is nearest to the median place: of each class, or with balance `none` of the whole pool.

    Raises UsageError without scores, SourceError when one is NaN or infinite.
    """
    if pool.scores is None:
        raise UsageError("keeping by a score needs scores: run `kdprune-data score`, or give --scores FILE --column NAME")
    if not np.isfinite(pool.scores).all():
        raise SourceError(f"score {pool.scores[~np.isfinite(pool.scores)][0]} cannot be ranked: every score must be a finite number")
    return take(pool, _ranking(pool, pool.scores, params), keep, params)


def _ranking(pool: Pool, scores: NDArray[np.floating], params: Params) -> NDArray[np.int64]:
    tie = order.order_hash(pool.uids, params.seed, "select")
    high_first = params.hard_is_high == (params.end != "easy")
    ranking = np.lexsort((tie, -scores if high_first else scores)).astype(np.int64)
    if params.end != "middle":
        return ranking
    groups = np.zeros(len(scores), np.int32) if params.balance == "none" else pool.labels
    place, size = places(ranking, groups)
    return np.lexsort((tie, np.abs(2 * place - (size - 1)) / size)).astype(np.int64)
