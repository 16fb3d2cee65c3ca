"""Put the items of a source into hash order without holding more of them in memory than allowed.

1. Every item is read once, in the source's order, and put into the bucket that the top bits of its order hash name: a list in memory when
   all fit, else a spool file per bucket.
2. Bucket after bucket is read back, sorted by the hash, and handed on. Equal keys have equal hashes, so collisions meet here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError
from kdprune_data.sources.base import Item

Hashed = tuple[int, Item]
CHUNK = 1000


class Shuffle:
    """See the module's text. `scratch` is a folder for spool files; the caller removes it."""

    def __init__(self, scratch: Path, *, seed: int, memory: int, expected_bytes: int) -> None:
        # A bucket is held twice for a moment (read, then sorted), and buckets are not all of one size.
        self._bits = max(0, (3 * expected_bytes // max(memory, 1)).bit_length())
        self._seed = seed
        self._scratch = scratch
        self._held: list[Hashed] = []
        self.uids: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def collect(self, items: Iterable[Item]) -> None:
        """Read all items. Afterwards `uids` holds the uid of every key, in the source's order."""
        seen = []
        spools: list[BinaryIO] = []
        if self._bits:
            self._scratch.mkdir(parents=True, exist_ok=True)
            spools = [self._spool(n).open("wb") for n in range(1 << self._bits)]
        try:
            for chunk in chunks(items):
                uids = order.uids_of(item.key for item in chunk)
                seen.append(uids)
                hashed = zip(order.order_hash(uids, self._seed, "import").tolist(), chunk, strict=True)
                if not self._bits:
                    self._held += hashed
                    continue
                for one, item in hashed:
                    _write(spools[one >> (64 - self._bits)], one, item)
        finally:
            for spool in spools:
                spool.close()
        self.uids = np.concatenate(seen) if seen else self.uids

    def __iter__(self) -> Iterator[Item]:
        """All items in ascending hash order. Raises SourceError when two have the same key."""
        before: Item | None = None
        for bucket in self._buckets():
            for _, item in sorted(bucket, key=lambda one: one[0]):
                if before is not None and before.key == item.key:
                    raise SourceError(f"{before.origin} and {item.origin} have the same key {item.key!r}: rename one")
                yield item
                before = item

    def _buckets(self) -> Iterator[Iterable[Hashed]]:
        if not self._bits:
            yield self._held
            return
        for n in range(1 << self._bits):
            with self._spool(n).open("rb") as file:
                yield _read(file)
            self._spool(n).unlink()

    def _spool(self, n: int) -> Path:
        return self._scratch / f"bucket-{n:05d}"


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items in lists of up to 1,000, so that hashes can be computed many at a time."""
    feed = iter(items)
    while chunk := list(islice(feed, CHUNK)):
        yield chunk


def _write(file: BinaryIO, one: int, item: Item) -> None:
    head = json.dumps([one, item.key, item.label, item.origin]).encode()
    file.write(struct.pack("<II", len(head), len(item.data)) + head + item.data)


def _read(file: BinaryIO) -> Iterator[Hashed]:
    while prefix := file.read(8):
        head_bytes, data_bytes = struct.unpack("<II", prefix)
        one, key, label, origin = json.loads(file.read(head_bytes))
        yield one, Item(key, file.read(data_bytes), label, origin)
