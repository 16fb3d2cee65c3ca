"""Random: rank by the order hash. No state, the same on every machine, stable when the data set is packed anew or grows.

The baseline that distillation turns into the method of choice: "Distilling the Knowledge in Data Pruning", Ben-Baruch et al., ICML 2025.
"""

from __future__ import annotations

import numpy as np

from kdprune_data import order
from kdprune_data.selectors.base import Method, Params, Picked, Pool
from kdprune_data.selectors.quota import take


def select(pool: Pool, keep: int, params: Params) -> Picked:
    """Keep a random `keep` of the pool, balanced as asked. Nested in `keep`."""
    ranking = np.argsort(order.order_hash(pool.uids, params.seed, "select"), kind="stable")
    return take(pool, ranking.astype(np.int64), keep, params)


METHOD = Method(select, "at random")
