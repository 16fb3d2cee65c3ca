"""Put the items of a source into hash order without holding more of them in memory than allowed.

1. Every item is read once, in the source's order, and put into the bucket that the top bits of its order hash name: a list in memory when
   all fit, else a spool file per bucket, at most 128 of them.
2. Bucket after bucket is read back, sorted by the hash, and handed on; one that does not fit is first spooled again, by the hash's next
   bits. Equal keys have equal hashes, so collisions meet here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError
from kdprune_data.sources.base import Item

Hashed = tuple[int, Item]
CHUNK = 1000
HASH_BITS = 64
MOST_BITS = 7
"""128 spool files at once: systems let a process open 1,024, some only 256."""
ITEM_BYTES = 300
"""About what an item takes in memory beside its spooled bytes."""


class Spool(NamedTuple):
    """A bucket on disk: its file, and how many items it holds."""

    path: Path
    items: int


class Shuffle:
    """See the module's text. `scratch` is a folder for spool files; the caller removes it."""

    def __init__(self, scratch: Path, *, seed: int, memory: int, expected_bytes: int) -> None:
        self._memory = memory
        # Buckets are not all of one size, and what Python adds to small images is more than they are.
        self._bits = self._bits_for(expected_bytes)
        self._seed = seed
        self._scratch = scratch
        self._held: list[Hashed] = []
        self._spools: list[Spool] = []
        self.uids: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def _bits_for(self, size: int) -> int:
        """How many bits of the hash make buckets of about a third of the memory, at most `MOST_BITS` at a time."""
        return min(MOST_BITS, (3 * size // max(self._memory, 1)).bit_length())

    def collect(self, items: Iterable[Item]) -> None:
        """Read all items. Afterwards `uids` holds the uid of every key, in the source's order."""
        seen: list[NDArray[np.uint64]] = []
        hashed = self._hashed(items, seen)
        if self._bits:
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._spools = _spread(hashed, self._scratch / "bucket", 0, self._bits)
        else:
            self._held = list(hashed)
        self.uids = np.concatenate(seen) if seen else self.uids

    def _hashed(self, items: Iterable[Item], seen: list[NDArray[np.uint64]]) -> Iterator[Hashed]:
        """Each item with its order hash; the uids go to `seen`."""
        for chunk in chunks(items):
            uids = order.uids_of(item.key for item in chunk)
            seen.append(uids)
            yield from zip(order.order_hash(uids, self._seed, "import").tolist(), chunk, strict=True)

    def __iter__(self) -> Iterator[Item]:
        """All items in ascending hash order. Raises SourceError when two have the same key."""
        before: Item | None = None
        for bucket in self._read_back(self._spools, self._bits) if self._bits else [self._held]:
            for _, item in sorted(bucket, key=lambda one: one[0]):
                if before is not None and before.key == item.key:
                    raise SourceError(f"{before.origin} and {item.origin} have the same key {item.key!r}: rename one")
                yield item
                before = item

    def _read_back(self, spools: Iterable[Spool], used: int) -> Iterator[Iterable[Hashed]]:
        """The buckets in order, each small enough to be held; `used`: bits of the hash by which the items were spread so far."""
        for spool in spools:
            size = spool.path.stat().st_size + ITEM_BYTES * spool.items
            bits = min(max(1, self._bits_for(size)), HASH_BITS - used) if size > self._memory and spool.items > 1 else 0
            with spool.path.open("rb") as file:
                if bits:
                    finer = _spread(_read(file), spool.path, used, bits)
                else:
                    yield _read(file)
            spool.path.unlink()
            if bits:
                yield from self._read_back(finer, used + bits)


def _spread(hashed: Iterable[Hashed], name: Path, used: int, bits: int) -> list[Spool]:
    """Write each item to the file, `NAME-NNN`, that the `bits` after the first `used` of its hash name."""
    shift, last = HASH_BITS - used - bits, (1 << bits) - 1
    paths = [name.with_name(f"{name.name}-{n:03d}") for n in range(1 << bits)]
    items = [0] * len(paths)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for one, item in hashed:
            n = one >> shift & last
            _write(files[n], one, item)
            items[n] += 1
    return [Spool(*pair) for pair in zip(paths, items, strict=True)]


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
