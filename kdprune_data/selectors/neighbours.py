"""Exact nearest neighbours on the unit sphere, in chunks, the same to the bit on any machine, in any number of threads and chunks.

Vectors are scaled to unit length and rounded to multiples of 2^-25. Products of such numbers and sums of those are then whole multiples of
2^-50 below 4, which float64 holds exactly: no order of summation can change a distance, and equal points have distance 0. (The rounding
moves a coordinate by at most 1.5e-8; embeddings are stored with eleven bits.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import UsageError

GRID = 2.0**25
NUMBER = 40
"""Bytes in use for each pair that is worked on: its distance, a partial sort's copy, a running count, and masks."""
BLOCK = 64_000_000
"""Bytes of pairs that are worked on at once, where `memory` allows: more would not be faster."""


def on_grid(vectors: NDArray[np.floating], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Some vectors at unit length, in multiples of 2^-25: whole numbers as float64 of shape (len(rows), d). A vector of zeros stays one."""
    scaled = np.array(vectors[rows], np.float64)
    largest = np.abs(scaled).max(1, initial=0, keepdims=True)
    scaled /= np.where(largest > 0, largest, 1)  # first of all, so that no square leaves the range of float64
    length = np.sqrt(np.square(scaled).sum(1, keepdims=True))
    scaled *= GRID / np.where(length > 0, length, 1)
    return np.rint(scaled, out=scaled)


def nearest(points: NDArray[np.float64], k: int, memory: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest others of each point (all others where there are fewer): their rows, int64 of shape (m, k), ascending, and their
    Euclidean distances, from 0 to 2, float64 of shape (m, k). Of equally near ones the earlier rows.

    points: as `on_grid` gives them. Takes m^2 d multiplications. Raises UsageError when not even a row of pairs fits `memory`.
    """
    m, d = points.shape
    k = min(k, m - 1)
    room = memory - _fixed(m, d, k)
    if room < NUMBER * m:
        raise UsageError(
            f"neighbours among {m:,} samples take {_fixed(m, d, k) + NUMBER * m:,} bytes and --memory is {memory:,}: raise it, or cut the "
            "classes with --set parts=N"
        )
    squares = np.square(points).sum(1)
    near, distance = np.empty((m, k), np.int64), np.empty((m, k), np.float64)
    high = max(1, min(room, BLOCK) // (NUMBER * m))
    for top in range(0, m, high):
        apart = _apart(points, squares, top, min(top + high, m))
        rows = _smallest(apart, k)
        near[top : top + high] = rows
        distance[top : top + high] = np.sqrt(np.take_along_axis(apart, rows, 1)) / GRID
    return near, distance


def _apart(points: NDArray[np.float64], squares: NDArray[np.float64], top: int, bottom: int) -> NDArray[np.float64]:
    """Squared distances of some points to all, infinite to themselves."""
    apart = points[top:bottom] @ points.T
    apart *= -2
    apart += squares
    apart += squares[top:bottom, None]
    apart[np.arange(bottom - top), np.arange(top, bottom)] = np.inf
    return apart


def _smallest(apart: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The columns of each row's k smallest numbers, ascending; of equal numbers the earlier columns."""
    if k == 0:
        return np.empty((len(apart), 0), np.int64)
    last = np.partition(apart, k - 1, axis=1)[:, k - 1 : k]
    chosen, equal = apart < last, apart == last
    chosen |= equal & (np.cumsum(equal, axis=1) <= k - chosen.sum(1, keepdims=True))
    return np.nonzero(chosen)[1].reshape(len(apart), k)


def _fixed(m: int, d: int, k: int) -> int:
    """Bytes for the points while they are scaled, and for lists and messages of their neighbours."""
    return m * (32 * d + 250 * k + 500)


def peak_bytes(m: int, d: int, k: int, memory: int) -> int:
    """The most bytes that a group of m takes: a block of its pairs, less where `memory` does not hold it, but at least one row of them."""
    fixed, row = _fixed(m, d, min(k, m - 1)), NUMBER * m
    return max(fixed + row, min(memory, fixed + min(BLOCK, row * m)))
