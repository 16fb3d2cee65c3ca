"""Facility location on last-layer gradients: every sample's gradient points nearly as that of a kept one does.

The function: K. Wei, R. Iyer, J. Bilmes, "Submodularity in data subset selection and active learning", ICML 2015.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data.selectors.base import Method, Picked, Pool
from kdprune_data.selectors.craig import choose_greedily
from kdprune_data.selectors.gradients import NEEDS, Gradients, GreedyParams, as_levels, greedy_cost, select_by_gradients


def select(pool: Pool, keep: int, params: GreedyParams) -> Picked:
    """Of each class, greedily, the samples most similar to all: facility location on (1 + the cosine of two last-layer gradients) / 2.
    Nested when lazy. No weights.

    Raises as `craig.select` does.
    """
    return select_by_gradients(
        "facility_location",
        pool,
        keep,
        params,
        cost=greedy_cost,
        choose=lambda group, gradients: (
            choose_greedily(pool.uids[group.rows], group.keep, gradients, params, lambda some: alikeness(gradients, some)),
            None,
        ),
    )


def alikeness(gradients: Gradients, some: NDArray[np.int64]) -> NDArray[np.float32]:
    """(1 + cosine) / 2 of some with all, in levels: float32 of shape (s, m). The cosine with a gradient that is 0 is 0."""
    lengths = np.sqrt(gradients.lengths)
    over = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    found = gradients.products(some)
    found *= over[some, None]
    found *= over
    found[np.arange(len(some)), some] = over[some] > 0
    np.clip(found, -1, 1, out=found)
    found += 1
    found /= 2
    return as_levels(found)


METHOD = Method(select, "samples whose gradients are like all of their class", GreedyParams, lambda _: NEEDS, greedy_cost)
