"""Facility location: keep the samples that are together most similar to all, f(S) = sum over i of max over j in S of s(i, j).

f is monotone and submodular, so that taking the largest gain each time reaches 1 - 1/e of the best (Nemhauser, Wolsey, Fisher, 1978). Lazy:
a gain that was computed earlier bounds the present one from above, so few are computed anew (M. Minoux, "Accelerated greedy algorithms for
maximizing submodular set functions", 1978); stochastic: of a random few in each step (B. Mirzasoleiman et al., "Lazier than lazy greedy",
AAAI 2015). Similarities are whole numbers in float32 and are summed in float64 without rounding, so the two ways of taking the largest of
all, lazy and plain, are equal, and equal gains are equal.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order

Rows = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""The similarities of some samples to all m: float32 of shape (s, m)."""


def lazy(similar: NDArray[np.float32], keep: int) -> NDArray[np.int64]:
    """The places of `keep` samples, in the order of choice; equal gains by the place.

    similar: float32 of shape (m, m), whole numbers from 0 to 2^24.
    """
    best = np.zeros(len(similar), np.float32)
    total = 0.0
    # (minus the gain, the place, the step in which it was computed): the smallest has the largest gain, and of these the first place.
    heap = [(-float(row.sum(dtype=np.float64)), place, 0) for place, row in enumerate(similar)]
    heapq.heapify(heap)
    chosen = np.empty(keep, np.int64)
    for step in range(keep):
        while heap[0][2] != step:
            place = heap[0][1]
            gain = float(np.maximum(similar[place], best).sum(dtype=np.float64)) - total
            heapq.heapreplace(heap, (-gain, place, step))
        gain, chosen[step], _ = heapq.heappop(heap)
        np.maximum(best, similar[chosen[step]], out=best)
        total -= gain
    return chosen


def stochastic(rows: Rows, uids: NDArray[np.uint64], keep: int, *, seed: int, epsilon: float) -> NDArray[np.int64]:
    """As `lazy`, but of ceil(m / keep * ln(1 / epsilon)) candidates in each step: those with the smallest order hash for the step.

    uids: of all m, in the order of places.
    """
    m = len(uids)
    few = min(m, math.ceil(m / keep * math.log(1 / epsilon)))
    best, left = np.zeros(m, np.float32), np.arange(m)
    chosen = np.empty(keep, np.int64)
    for step in range(keep):
        if len(left) > few:
            hashes = order.order_hash(uids[left], seed, f"stochastic/{step}")
            looked = np.sort(left[np.argpartition(hashes, few)[:few]])
        else:
            looked = left
        chosen[step], row = _largest(rows, looked, best)
        np.maximum(best, row, out=best)
        left = left[left != chosen[step]]
    return chosen


def _largest(rows: Rows, looked: NDArray[np.int64], best: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
    """The first place with the largest gain, and its row, a block of rows at a time."""
    top, place, row = -1.0, -1, best
    step = max(1, 2**20 // len(best))
    for start in range(0, len(looked), step):
        block = rows(looked[start : start + step])
        gains = np.maximum(block, best).sum(1, dtype=np.float64)  # without f(S), which is the same for all
        found = int(np.argmax(gains))
        if gains[found] > top:
            top, place, row = float(gains[found]), int(looked[start + found]), block[found]
    return place, row


def clusters(rows: Rows, chosen: NDArray[np.int64], m: int) -> NDArray[np.float64]:
    """How many of all m samples are most similar to each chosen one: float64 of shape (k,), at least 1 each, of sum m.

    A chosen one is its own; among equally similar ones the first place has it.
    """
    first = np.sort(chosen)
    top, of = np.full(m, -1, np.float32), np.zeros(m, np.int64)
    step = max(1, 2**20 // m)
    for start in range(0, len(first), step):
        block = rows(first[start : start + step])
        found = block.argmax(0)
        value = block[found, np.arange(m)]
        better = value > top
        top[better] = value[better]
        of[better] = first[start + found[better]]
    of[first] = first
    return np.bincount(of, minlength=m)[chosen].astype(np.float64)
