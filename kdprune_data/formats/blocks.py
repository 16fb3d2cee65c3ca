"""Runs of bytes of shards, read into memory by the block: what a subset takes of its parent's records.

Runs that lie near one another in a shard are read in one call, with what is between them, and then moved together: with small images a call
for each would take longer than the bytes. In a block the runs stand one behind another, whatever shards they are of.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdprune_data.formats import tar

BYTES = 1 << 21
"""Of a block, where no record has more: still in the processor's cache when it is hashed, and worth the lines of Python that it takes."""
NEAR = 1 << 14
"""Reading so many bytes that are not wanted takes as long as another call."""


@dataclass(frozen=True)
class Runs:
    """Runs of bytes of numbered shards, each of whole tar blocks, and which of them begin a read of their own.

    shards: int32 of shape (n,); starts, ends: int64 of shape (n,); apart: bool of shape (n,).
    """

    shards: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    apart: NDArray[np.bool_]

    @classmethod
    def of(cls, shards: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Runs:
        """Read together are those of a shard that lie near one another, until they reach over the bytes of a block."""
        far = np.ones(len(starts), np.bool_)
        far[1:] = (shards[1:] != shards[:-1]) | (starts[1:] - ends[:-1] > NEAR)
        begins = starts[np.flatnonzero(far)][np.cumsum(far) - 1]
        grown = (starts - begins) // BYTES
        far[1:] |= grown[1:] != grown[:-1]
        return cls(shards, starts, ends, far)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, part: slice) -> Runs:
        return Runs(self.shards[part], self.starts[part], self.ends[part], self.apart[part])


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
        places = edges(runs.ends - runs.starts)
        block = self._buffer(int(places[-1]))
        first = np.append(0, np.flatnonzero(runs.apart[1:]) + 1)
        beyond = np.append(first[1:], len(runs))
        reads = (runs.shards[first], runs.starts[first], runs.ends[beyond - 1], places[first], places[beyond])
        with ExitStack() as opened:
            last = -1
            for n, (shard, start, end, place, after) in enumerate(zip(*(column.tolist() for column in reads), strict=True)):
                if shard != last:
                    opened.close()
                    file, last = opened.enter_context(tar.opened(self._paths[shard])), shard
                if end - start == after - place:
                    _read(file, start, block[place:after])
                else:
                    self._gather(file, runs[first[n] : beyond[n]], block[place:after])
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

    def _gather(self, file: FileIO, runs: Runs, into: NDArray[np.uint8]) -> None:
        """Read near runs with all that is between them, then take them out of it."""
        start, end = int(runs.starts[0]), int(runs.ends[-1])
        wide = self._wide(end - start)
        _read(file, start, wide)
        sizes = (runs.ends - runs.starts) // tar.BLOCK
        moved = (runs.starts - start) // tar.BLOCK - edges(sizes)[:-1]
        # Every place is inside, so nothing is clipped; told to raise, numpy would write to a copy first.
        np.take(by_block(wide), np.repeat(moved, sizes) + np.arange(sizes.sum()), axis=0, out=by_block(into), mode="clip")

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
    return np.append(0, np.cumsum(sizes))


def by_block(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes as the blocks of a tar: shape (n, 512)."""
    return data.reshape(-1, tar.BLOCK)


def _read(file: FileIO, start: int, into: NDArray[np.uint8]) -> None:
    file.seek(start)
    left = into.data
    while left:
        done = file.readinto(left)
        if not done:
            raise EOFError
        left = left[done:]
