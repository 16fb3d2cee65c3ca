"""Whether any of very many 64-bit numbers comes twice, in little memory: they are sorted into buckets, piece by piece, and kept in a file.

1. `hashes` makes a number of each id, fast: not the one that names it (`order.uids_of`), so ids that share one are compared themselves.
2. `Repeats.add` writes the numbers of a piece, in the order of their upper bits.
3. `Repeats.find` reads all that begin with the same bits, and tells which come more than once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.errors import KdpruneError
from kdprune_data.formats.atomic import naming
from kdprune_data.formats.blake import Texts

U64 = NDArray[np.uint64]

STEP = 1 << 14
"""Ids that are hashed at a time, so that what is computed of them stays in the processor's cache."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
BUCKET = 1 << 17
"""At least so many numbers share their upper bits, where there are so many."""
MOST_BITS = 10
"""More buckets would be read in too small pieces."""


def hashes(ids: pa.Array) -> U64:
    """A number of each id, the same for the same text: uint64 of shape (n,). ids: strings, or what can be told as strings; none null."""
    texts = Texts.of(ids)
    found = np.empty(len(texts), np.uint64)
    for top in range(0, len(texts), STEP):
        rows = slice(top, top + STEP)
        sizes = texts.sizes[rows]
        mixed = sizes.astype(np.uint64) * FACTOR
        for at, word in enumerate(texts.words(rows)):
            more = (mixed ^ word) * FACTOR
            more ^= more >> np.uint64(32)
            mixed = more if sizes.min() > 8 * at else np.where(sizes > 8 * at, more, mixed)  # whatever longer ones stand beside
        mixed *= FACTOR
        found[rows] = mixed ^ (mixed >> np.uint64(29))
    return found


@contextmanager
def spool(folder: Path) -> Iterator[BinaryIO]:
    """A file for what memory need not hold, without a name: however this ends, nothing is left of it.

    Raises KdpruneError where nothing can be written.
    """
    try:
        opened = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - so that only its opening is excused
    except OSError as error:
        raise KdpruneError(f"cannot write in {folder}: {error.strerror}; choose another --out") from None
    with opened as file, naming(folder):
        yield file


@dataclass
class Repeats:
    """The numbers added so far. about: how many there will be."""

    file: BinaryIO
    about: int
    _ends: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def bits(self) -> int:
        """Upper bits by which numbers are told apart first."""
        return min(MOST_BITS, (self.about // BUCKET).bit_length())

    def sort(self, numbers: U64) -> tuple[U64, NDArray[np.int64]]:
        """The numbers of a piece in the order of their upper bits, and where those of each end: for `add`, and for any thread."""
        if not self.bits:
            return numbers, np.array([len(numbers)])
        bucket = (numbers >> np.uint64(64 - self.bits)).astype(np.uint16)
        return numbers[np.argsort(bucket, kind="stable")], np.cumsum(np.bincount(bucket, minlength=1 << self.bits))

    def add(self, numbers: U64, ends: NDArray[np.int64]) -> None:
        """Add a piece, as `sort` gives it."""
        self.file.write(numbers.data)
        self._ends.append(ends)

    def find(self, each: Callable[[Callable[[int], U64], int], Iterable[U64]]) -> U64:
        """The numbers that come more than once: uint64 of shape (m,), ascending. each: calls a function with 0, 1, ... up to a number, and
        gives what it returns."""
        self.file.flush()
        sizes = np.array([ends[-1] for ends in self._ends], np.int64)
        places = np.cumsum(sizes) - sizes

        def bucket(number: int) -> U64:
            pieces = [np.zeros(0, np.uint64)]
            for place, ends in zip(places.tolist(), self._ends, strict=True):
                begin, end = (int(ends[number - 1]) if number else 0), int(ends[number])
                pieces.append(np.frombuffer(os.pread(self.file.fileno(), 8 * (end - begin), 8 * (place + begin)), np.uint64))
            return _twice(np.concatenate(pieces))

        return np.unique(np.concatenate([np.zeros(0, np.uint64), *each(bucket, 1 << self.bits)]))


def _twice(numbers: U64) -> U64:
    """Those that come more than once, each once or more often. Without a sort: the last number at a place of a table stays there, and the
    others that belong there are few."""
    places = 4 << len(numbers).bit_length()
    place = (numbers & np.uint64(places - 1)).astype(np.int64)
    rows = np.arange(len(numbers), dtype=np.uint32)
    table = np.empty(places, np.uint32)
    table[place] = rows
    last = table[place]
    others = np.flatnonzero(last != rows)
    driven = numbers[others]
    among = np.sort(driven)
    return np.concatenate([driven[driven == numbers[last[others]]], among[1:][among[1:] == among[:-1]]])
