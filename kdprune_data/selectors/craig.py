"""CRAIG: samples whose weighted gradients add up to about the gradient of their class.

B. Mirzasoleiman, J. Bilmes, J. Leskovec, "Coresets for data-efficient training of machine learning models", ICML 2020.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data.selectors import greedy
from kdprune_data.selectors.base import Method, Picked, Pool
from kdprune_data.selectors.gradients import NEEDS, Gradients, GreedyParams, as_levels, greedy_cost, select_by_gradients
from kdprune_data.selectors.points import Chosen
from kdprune_data.selectors.quota import Group

NOTHING = 1e-13
"""A squared distance below this share of the two squared lengths is rounding, and 0."""


def select(pool: Pool, keep: int, params: GreedyParams) -> Picked:
    """Of each class, greedily, the samples nearest to all by last-layer gradients: facility location on (a bound of the distances - the
    distance of two gradients). Nested when lazy. The weight is how many samples of the class are nearest to a kept one, itself included.

    Raises UsageError without embedding, logits or labels, or when it needs more memory than it is given; SourceError when a number is not
    finite.
    """

    def choose(group: Group, gradients: Gradients) -> Chosen:
        def rows(some: NDArray[np.int64]) -> NDArray[np.float32]:
            return nearness(gradients, some)

        chosen = choose_greedily(pool.uids[group.rows], group.keep, gradients, params, rows)
        return chosen, greedy.clusters(rows, chosen, len(gradients))

    return select_by_gradients("craig", pool, keep, params, cost=greedy_cost, choose=choose)


def nearness(gradients: Gradients, some: NDArray[np.int64]) -> NDArray[np.float32]:
    """1 - distance / twice the largest length, of some to all, in levels: float32 of shape (s, m).

    Any constant that no distance exceeds gives the same choice: of the gains only the first has it, in all candidates alike.
    """
    lengths = gradients.lengths
    both = lengths[some, None] + lengths
    found = gradients.products(some)
    found *= -2
    found += both
    found[found < NOTHING * both] = 0
    np.sqrt(found, out=found)
    found /= -2 * np.sqrt(lengths.max()) or -1.0
    found += 1
    found[np.arange(len(some)), some] = 1
    return as_levels(found)


def choose_greedily(
    uids: NDArray[np.uint64], keep: int, gradients: Gradients, params: GreedyParams, rows: greedy.Rows
) -> NDArray[np.int64]:
    """Places in the order of choice, lazily from a matrix of all similarities, or stochastically from rows made when they are needed."""
    if params.greedy == "stochastic":
        return greedy.stochastic(rows, uids, keep, seed=params.seed, epsilon=params.epsilon)
    similar = np.empty((len(gradients), len(gradients)), np.float32)
    for block in gradients.blocks(np.arange(len(gradients))):
        similar[block] = rows(block)
    return greedy.lazy(similar, keep)


METHOD = Method(select, "samples whose weighted gradients cover those of their class", GreedyParams, lambda _: NEEDS, greedy_cost)
