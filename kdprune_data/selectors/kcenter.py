"""k-centre, greedy: every sample is near to a kept one.

T. F. Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical Computer Science 38, 1985; to select data:
O. Sener, S. Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data.selectors.base import Cost, Method, Picked, Pool, Size
from kdprune_data.selectors.inputs import embedding_of
from kdprune_data.selectors.points import PartsParams, Points, fits, linear_cost, select_groups, size_of


def select(pool: Pool, keep: int, params: PartsParams) -> Picked:
    """Of each class, a first sample, then always the one farthest (L2) from its nearest kept one. Nested.

    The first is the one with the smallest order hash, so another seed gives another subset. The largest distance of any sample to its
    nearest kept one is at most twice the smallest possible (Gonzalez). Equal distances by the order hash.

    Raises UsageError without an embedding, or when it needs more memory than it is given; SourceError when a number is not finite.
    """
    values = embedding_of(pool)
    fits("kcenter", size_of(pool, keep, params), params, cost)
    n = len(values)
    return select_groups(pool, keep, params, lambda group: (_spread(Points(values, group.rows, params.memory, n), group.keep), None))


def cost(size: Size, params: PartsParams) -> Cost:
    """k m d multiplications for k kept of m; memory grows with m alone, as no distances but the nearest are kept."""
    return linear_cost(size, params, lambda m, k: float(k) * m * size.width)


def _spread(points: Points, keep: int) -> NDArray[np.int64]:
    """Places in the order of choice."""
    chosen = np.zeros(keep, np.int64)
    nearest = np.full(points.m, np.inf)  # the squared distance to the nearest chosen one
    for step in range(keep):
        chosen[step] = np.argmax(nearest)
        np.minimum(nearest, points.distances(points.point(int(chosen[step]))), out=nearest)
        nearest[chosen[step]] = -1  # below that of its duplicates, which is 0
    return chosen


METHOD = Method(select, "no sample far from a kept one (k-centre, greedy)", PartsParams, lambda _: ("embedding",), cost)
