"""Values in the order of their classes, piece by piece and then all together, in no more memory than they and their classes take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)
Sorted = tuple[NDArray[np.integer], NDArray[T]]
"""Numbers of classes, ascending, in as few bytes as hold them, and a value for each."""


def by_class(numbers: NDArray[np.integer], values: NDArray[T], count: int) -> Sorted[T]:
    """Values in the order of their classes, whose numbers are below `count`; those of one class as they came."""
    numbers = numbers.astype(np.uint8 if count <= 1 << 8 else np.uint16 if count <= 1 << 16 else np.int32)
    order = np.argsort(numbers, kind="stable")  # by radix where numbers have 16 bits
    return numbers[order], values[order]


def merged(pieces: Sequence[Sorted[T]], count: int, kind: np.dtype[T]) -> tuple[NDArray[np.int64], NDArray[T]]:
    """The values of all pieces in the order of their classes: where those of each class begin, and at last their number, int64 of shape
    (count + 1,); and the values."""
    runs = [_runs(numbers) for numbers, _ in pieces]
    sizes = np.zeros(count, np.int64)
    for own, _, lengths in runs:
        sizes[own] += lengths
    starts = np.concatenate([[0], np.cumsum(sizes)])
    values, free = np.empty(int(starts[-1]), kind), starts[:-1].copy()
    for (_, some), (own, first, lengths) in zip(pieces, runs, strict=True):
        values[np.arange(len(some)) + np.repeat(free[own] - first, lengths)] = some
        free[own] += lengths
    return starts, values


def _runs(numbers: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The classes of a piece, where the values of each begin in it, and how many there are."""
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(numbers)), bool), numbers[1:] != numbers[:-1]]))
    return numbers[first].astype(np.int64), first, np.diff(first, append=len(numbers))
