"""From a ranking to a subset of exact size: how many of each class, and which.

Every sample gets a quota from its place in the ranking of its class, and the k smallest quotas are kept. One sort, exact for any k, and
nested: a smaller k keeps a prefix of the same list. (Largest remainder is exact too, but not nested: its remainders move when k does.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.selectors.base import Params, Picked, Pool


def places(ranking: NDArray[np.int64], groups: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's 0-based place in the ranking of its group, and its group's size: int64 of shape (n,) each."""
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    grouped = ranking[np.argsort(member[ranking], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    place = np.empty(len(groups), np.int64)
    place[grouped] = np.arange(len(groups)) - starts[member[grouped]]
    return place, sizes[member].astype(np.int64)


def take(pool: Pool, ranking: NDArray[np.int64], keep: int, params: Params) -> Picked:
    """Keep `keep` samples by a ranking of the pool, balanced as asked; the result's `order` is that of keeping.

    `class`: quota (2r + 1) / 2n for place r of a class of n, so classes keep their proportions (Sainte-Lague's rule). `uniform`: quota r,
    so classes get equal shares. `none`: the ranking itself. Ties by class number, then by the order hash.

    Raises UsageError when the pool holds fewer than `keep`, or labels are needed and missing.
    """
    n = len(pool.uids)
    if not 1 <= keep <= n:
        raise UsageError(f"cannot keep {keep:,} of {n:,} candidates: choose a fraction that keeps between 1 and {n:,}")
    if params.balance == "none":
        kept = ranking
    else:
        if (pool.labels < 0).any():
            raise UsageError(
                f"--balance {params.balance} needs labels and {int((pool.labels < 0).sum()):,} samples have none: use --balance none"
            )
        place, size = places(ranking, pool.labels)
        # A quotient of integers below 2^26 is rounded to one float64 whatever its terms, so equal quotas compare equal.
        quota = (2 * place + 1) / (2 * size) if params.balance == "class" else place
        kept = np.lexsort((order.order_hash(pool.uids, params.seed, "select"), pool.labels, quota))
    return Picked(np.sort(kept[:keep]), kept.astype(np.int64))
