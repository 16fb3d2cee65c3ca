"""D2 pruning: hard samples that are not each other's neighbours, by messages over a graph of nearest neighbours.

Each sample starts with its own difficulty and, the nearer the more, that of its neighbours; whoever has most is kept and takes from its
neighbours. *Source: Maharana, Yadav and Bansal, "D2 pruning: message passing for balancing diversity and difficulty in data pruning",
ICLR 2024.*
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import option
from kdprune_data.selectors.base import EMBEDDING, Cost, Method, Params, Picked, Pool, Size
from kdprune_data.selectors.cutoff import CUT_HELP, needs, without_lowest
from kdprune_data.selectors.inputs import embedding_of, score_of
from kdprune_data.selectors.neighbours import nearest, on_grid, peak_bytes
from kdprune_data.selectors.quota import groups


@dataclass(frozen=True)
class D2Params(Params):
    """score: the difficulty; neighbours: of each sample in the graph; gamma: how fast what is taken from a neighbour falls with distance;
    cut: the fraction of lowest aum left out first, None = our rule; parts: random parts of each class, each with a graph of its own."""

    score: str = option("forgetting", help="The score that says how hard a sample is.")
    neighbours: int = option(5, help="Nearest neighbours of each sample.", least=1, most=1000)
    gamma: float = option(0.1, help="How fast what a kept sample takes from a neighbour falls with their distance.", least=0, most=1000)
    cut: float | None = option(None, help=CUT_HELP, least=0, most=0.999)
    parts: int = option(1, help="Random parts of each class that are selected from by themselves: time falls as many times.", least=1)


def select(pool: Pool, keep: int, params: D2Params) -> Picked:
    """Keep `keep` samples, of each class (with balance `none` of all) by a graph of its own. Not nested: the cut-off moves with `keep`.

    Raises UsageError without scores or embedding, when too few are left, or a class's graph does not fit `memory`; SourceError when a
    number is not finite.
    """
    score_of(pool, params.score)
    embedding_of(pool)
    return without_lowest(pool, keep, params, params.cut, lambda rest: _by_graphs(rest, keep, params))


def _by_graphs(pool: Pool, keep: int, params: D2Params) -> Picked:
    assert pool.embedding is not None
    hard = difficulty(pool, params.score)
    chosen = []
    for group in groups(pool, keep, params, params.parts):
        near, distance = nearest(on_grid(pool.embedding, group.rows), params.neighbours, params.memory)
        chosen.append(group.rows[passed(hard[group.rows], near, distance, keep=group.keep, gamma=params.gamma)])
    return Picked(np.sort(np.concatenate(chosen)))


def difficulty(pool: Pool, name: str) -> NDArray[np.float64]:
    """A score as messages carry it, float64 of shape (n,): the harder the larger, none below 0. A score whose low end is hard is negated;
    where any is then negative, all are raised by as much as makes the least 0."""
    scores = np.asarray(pool.scores[name], np.float64)
    hard = scores if pool.hard[name] == "high" else -scores
    return hard - min(0.0, float(hard.min()))


def passed(
    hard: NDArray[np.float64], near: NDArray[np.int64], distance: NDArray[np.float64], *, keep: int, gamma: float
) -> NDArray[np.int64]:
    """Which `keep` are kept, int64 of shape (keep,), in the order in which they are.

    hard: float64 of shape (m,); near, distance: of each sample's k neighbours, of shape (m, k). phi = hard + sum over neighbours of
    exp(-distance) * hard; then, again and again, the largest phi is kept (the first among equals), and its own phi times
    exp(-gamma * distance) is taken from that of each of its neighbours.
    """
    forward, back = np.exp(-distance), np.exp(-gamma * distance).tolist()
    start = hard.copy()
    for column in range(near.shape[1]):
        start += forward[:, column] * hard[near[:, column]]
    phi, neighbours = start.tolist(), near.tolist()
    # A heap whose old entries are told by a value that is no longer theirs: a search of all phi each time would be quadratic.
    heap = [(-value, row) for row, value in enumerate(phi)]
    heapq.heapify(heap)
    kept: list[int] = []
    taken = [False] * len(phi)
    while len(kept) < keep:
        value, row = heapq.heappop(heap)
        if taken[row] or -value != phi[row]:
            continue
        taken[row] = True
        kept.append(row)
        for other, weight in zip(neighbours[row], back[row], strict=True):
            phi[other] -= weight * phi[row]
            if not taken[other]:
                heapq.heappush(heap, (-phi[other], other))
    return np.array(kept, np.int64)


def cost(size: Size, params: D2Params) -> Cost:
    """Every pair of a group (of a part of it) is multiplied once from either side."""
    parts = np.minimum(params.parts, size.kept)
    largest = -(-size.candidates // parts)
    pairs = float((largest.astype(np.float64) ** 2 * parts).sum())
    return Cost(pairs * size.width, peak_bytes(int(largest.max()), size.width, params.neighbours, params.memory))


METHOD = Method(
    select,
    "hard samples that are not each other's neighbours, lowest aum left out",
    D2Params,
    lambda params: (*needs(params.score, params.cut), EMBEDDING),
    cost,
    nested=False,
)
