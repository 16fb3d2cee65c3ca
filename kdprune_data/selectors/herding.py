"""Herding: samples whose mean follows the mean of their class as closely as can be.

M. Welling, "Herding dynamical weights to learn", ICML 2009; Y. Chen, M. Welling, A. Smola, "Super-samples from kernel herding", UAI 2010.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data.selectors.base import Cost, Method, Picked, Pool, Size
from kdprune_data.selectors.inputs import embedding_of
from kdprune_data.selectors.points import PartsParams, Points, fits, linear_cost, select_groups, size_of


def select(pool: Pool, keep: int, params: PartsParams) -> Picked:
    """Of each class, one after the other, the sample h that makes ||(i + 1) mu - (h_1 + ... + h_i) - h|| smallest; each once. Nested.

    mu: the mean of the class. Equal ones by the order hash.

    Raises UsageError without an embedding, or when it needs more memory than it is given; SourceError when a number is not finite.
    """
    values = embedding_of(pool)
    fits("herding", size_of(pool, keep, params), params, cost)
    n = len(values)
    return select_groups(pool, keep, params, lambda group: (_herd(Points(values, group.rows, params.memory, n), group.keep), None))


def cost(size: Size, params: PartsParams) -> Cost:
    """k m d multiplications for k kept of m; memory grows with m alone."""
    return linear_cost(size, params, lambda m, k: (k + 1.0) * m * size.width)


def _herd(points: Points, keep: int) -> NDArray[np.int64]:
    """Places in the order of choice. About the mean, with x = h - mu and s the sum of the chosen, it is the smallest |x|^2 + 2 s x."""
    mean = points.mean()
    squares = points.distances(mean)
    total, chosen = np.zeros(points.d), np.empty(keep, np.int64)
    for step in range(keep):
        chosen[step] = np.argmin(squares + 2 * (points.products(total) - total @ mean))
        squares[chosen[step]] = np.inf
        total += points.point(int(chosen[step])) - mean
    return chosen


METHOD = Method(select, "samples whose mean is nearest to that of their class", PartsParams, lambda _: ("embedding",), cost)
