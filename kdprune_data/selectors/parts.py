"""Rows that never stand in memory together: a table that is read in parts, as often as it takes, by a few threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a part. labels: integers of shape (n,), below 0 = none; None where no class is asked for. scores: float32 or
    float64 of shape (n,), the same in all pieces, the larger the harder."""

    labels: NDArray[np.integer] | None
    scores: NDArray[np.floating]


class Rows(Protocol):
    """A table of labels and scores. A part is read from several threads, and cut into the same pieces every time."""

    @property
    def parts(self) -> int:
        """How many parts there are."""

    @property
    def about(self) -> int:
        """How many rows there are, or a few more."""

    def read(self, part: int) -> Iterator[Piece]:
        """The pieces of a part."""

    def hashes(self, part: int, rows: list[NDArray[np.int64]]) -> list[NDArray[np.uint64]]:
        """The order hashes of some rows: for each piece of a part their places in it, ascending."""

    def name(self, part: int, piece: int, row: int) -> str:
        """What messages call a row."""


def in_turn(work: Callable[[int], T], parts: int, jobs: int) -> Iterator[T]:
    """What `work` makes of each part, in order, made by `jobs` threads that are never far ahead."""
    if jobs == 1:
        yield from map(work, range(parts))
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for part in range(parts):
                waiting.append(pool.submit(work, part))
                if len(waiting) > jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
