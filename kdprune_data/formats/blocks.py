"""Runs of bytes of shards, read into memory by the block: what a subset takes of its parent's records.

Runs that lie near one another in a shard are read in one call, with what is between them, and then moved together: with small images a call
for each would take longer than the bytes. In a block the runs stand one behind another, whatever shards they are of.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdprune_data.formats import tar

BYTES = 1 << 20
"""Of a block, where no record has more: little enough to stay in a core's cache until it is written."""
NEAR = 1 << 14
"""Reading so many bytes that are not wanted takes as long as another call."""


@dataclass(frozen=True)
class Runs:
    """Runs of bytes of numbered shards, each of whole tar blocks. shards: int32 of shape (n,); starts, ends: int64 of shape (n,)."""

    shards: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, part: slice) -> Runs:
        return Runs(self.shards[part], self.starts[part], self.ends[part])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 of shape (n,): the bytes of each."""
        return self.ends - self.starts


class Reader:
    """Reads runs of these shards. May be shared by threads. Its buffers are used again: to touch new memory takes longer than to read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._free: list[NDArray[np.uint8]] = []
        self._own = threading.local()

    def read(self, runs: Runs) -> NDArray[np.uint8]:
        """The bytes of some runs, uint8 of shape (their sum,): hand it back with `release`.

        Raises SourceError when a shard is missing, EOFError when one ends before a run does.
        """
        places = edges(runs.sizes)
        block = self._buffer(int(places[-1]))
        for first, last in _parts(runs.shards[1:] != runs.shards[:-1]):
            with tar.opened(self._paths[int(runs.shards[first])]) as file:
                self._fill(block[places[first] : places[last]], file, runs[first:last])
        return block

    def release(self, block: NDArray[np.uint8]) -> None:
        """Nobody needs the block any more."""
        if isinstance(block.base, np.ndarray) and len(block.base) == 2 * BYTES:
            self._free.append(block.base)

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        if size > 2 * BYTES:  # a large record: its memory is not kept
            return np.empty(size, np.uint8)
        try:
            return self._free.pop()[:size]
        except IndexError:
            return np.empty(2 * BYTES, np.uint8)[:size]

    def _fill(self, block: NDArray[np.uint8], file: FileIO, runs: Runs) -> None:
        """Read runs of one shard, a group of near ones at a time."""
        places, blocks = edges(runs.sizes), edges(runs.sizes // tar.BLOCK)
        for first, last in _parts(_far(runs)):
            start, end = int(runs.starts[first]), int(runs.ends[last - 1])
            part = block[places[first] : places[last]]
            if end - start == len(part):
                _read(file, start, part)
                continue
            wide = self._wide(end - start)
            _read(file, start, wide)
            group = runs[first:last]
            begins = np.repeat((group.starts - start) // tar.BLOCK - (blocks[first:last] - blocks[first]), group.sizes // tar.BLOCK)
            # Every place is inside, so nothing is clipped; told to raise, numpy would write to a copy first.
            np.take(_by_block(wide), begins + np.arange(len(begins)), axis=0, out=_by_block(part), mode="clip")

    def _wide(self, size: int) -> NDArray[np.uint8]:
        """Room for a group with all that lies between its runs, this thread's own."""
        if size > 4 * BYTES:
            return np.empty(size, np.uint8)
        if not hasattr(self._own, "wide"):
            self._own.wide = np.empty(4 * BYTES, np.uint8)
        found: NDArray[np.uint8] = self._own.wide
        return found[:size]


def edges(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of so many begins, when they stand one behind another, and where the last ends: one more than there are."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _parts(ends: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The parts that a sequence falls into, as (first, last + 1). ends: after which of its items, but the last, a part ends."""
    return pairwise([0, *(np.flatnonzero(ends) + 1).tolist(), len(ends) + 1])


def _far(runs: Runs) -> NDArray[np.bool_]:
    """After which runs of a shard, but the last, another call is made: the next is far away, or the group is as large as a block."""
    far = np.asarray(runs.starts[1:] - runs.ends[:-1] > NEAR)
    group = np.concatenate([np.zeros(1, np.int64), np.cumsum(far)])
    begins = runs.starts[np.concatenate([np.ones(1, np.bool_), far])][group]
    grown = (runs.starts - begins) // BYTES
    return np.asarray(far | (grown[1:] != grown[:-1]))


def _by_block(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return data.reshape(-1, tar.BLOCK)


def _read(file: FileIO, start: int, into: NDArray[np.uint8]) -> None:
    file.seek(start)
    left = into.data
    while left:
        done = file.readinto(left)
        if not done:
            raise EOFError
        left = left[done:]
