"""Put the items of a source into hash order without holding more of them in memory than allowed.

1. Every item is read once, in the source's order, and put into the bucket that the top bits of its order hash name: a list in memory when
   all fit, else a spool file per bucket, at most 128 of them. Where they were to fit and do not, those held are spooled then.
2. Bucket after bucket is read back, sorted by the hash, and handed on; one that does not fit is first spooled again, by the hash's next
   bits.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kdprune_data.order import U64
from kdprune_data.sources.base import Item

Numbered = tuple[int, Item]
"""An item and its row: its place in the source."""
HASH_BITS = 64
MOST_BITS = 7
"""128 spool files at once: systems let a process open 1,024, some only 256."""
ITEM_BYTES = 600
"""About what an item takes in memory beside its spooled bytes: what Python adds to small images is more than they are."""


class Spool(NamedTuple):
    """A bucket on disk: its file, and how many items it holds."""

    path: Path
    items: int


class Shuffle:
    """See the module's text. `scratch` is a folder for spool files, which the caller removes; `hashes` holds each row's order hash."""

    def __init__(self, scratch: Path, *, hashes: U64, memory: int, expected_bytes: int) -> None:
        self._memory = memory
        self._hashes = hashes
        self._scratch = scratch
        self._bits = self._bits_for(expected_bytes + ITEM_BYTES * len(hashes))
        self._held: list[Numbered] = []
        self._spools: list[Spool] = []

    @property
    def spools(self) -> bool:
        """Whether it goes by way of the disk."""
        return self._bits > 0

    def _bits_for(self, size: int) -> int:
        """How many bits of the hash make buckets of a third of the memory, as they are not all of one size; at most `MOST_BITS` at a time,
        and none where all fits."""
        return 0 if size <= self._memory else min(MOST_BITS, (3 * size // max(self._memory, 1)).bit_length())

    def collect(self, items: Iterable[Numbered]) -> None:
        """Read all items."""
        if self._bits:
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._spools = self._spread(items, self._scratch / "bucket", 0, self._bits)
        else:
            self._hold(items)

    def _hold(self, items: Iterable[Numbered]) -> None:
        """Keep the items in memory, and change to spool files once they pass it: a source may hold more than it says."""
        feed, held = iter(items), 0
        for row, item in feed:
            self._held.append((row, item))
            held += item_bytes(item)
            if held > self._memory and len(self._held) < len(self._hashes):
                self._bits = max(1, self._bits_for(held * len(self._hashes) // len(self._held)))
                self.collect(chain(self._let_go(), feed))

    def _let_go(self) -> Iterator[Numbered]:
        """Those held, which are not any more."""
        self._held.reverse()
        while self._held:
            yield self._held.pop()

    def __iter__(self) -> Iterator[Numbered]:
        """All items, each with its row, in ascending hash order."""
        for bucket in self._read_back(self._spools, self._bits) if self._bits else [self._held]:
            yield from sorted(bucket, key=lambda one: self._hashes[one[0]])

    def _read_back(self, spools: Iterable[Spool], used: int) -> Iterator[Iterable[Numbered]]:
        """The buckets in order, each small enough to be held; `used`: bits of the hash by which the items were spread so far."""
        for spool in spools:
            size = spool.path.stat().st_size + ITEM_BYTES * spool.items
            bits = min(max(1, self._bits_for(size)), HASH_BITS - used) if size > self._memory and spool.items > 1 else 0
            with spool.path.open("rb") as file:
                if bits:
                    finer = self._spread(unspool(file), spool.path, used, bits)
                else:
                    yield unspool(file)
            spool.path.unlink()
            if bits:
                yield from self._read_back(finer, used + bits)

    def _spread(self, items: Iterable[Numbered], name: Path, used: int, bits: int) -> list[Spool]:
        """Write each item to the file, `NAME-NNN`, that the `bits` after the first `used` of its hash name."""
        shift, last = HASH_BITS - used - bits, (1 << bits) - 1
        paths = [name.with_name(f"{name.name}-{n:03d}") for n in range(1 << bits)]
        counts = [0] * len(paths)
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for row, item in items:
                n = int(self._hashes[row]) >> shift & last
                spool(files[n], row, item)
                counts[n] += 1
        return [Spool(*pair) for pair in zip(paths, counts, strict=True)]


def item_bytes(item: Item) -> int:
    """About what an item takes in memory."""
    return ITEM_BYTES + len(item.data) + sum(len(data) for _, data in item.others)


def spool(file: BinaryIO, row: int, item: Item) -> None:
    """Write one item: lengths of head and image, the head as JSON, the image, the other members."""
    others = [[extension, len(data)] for extension, data in item.others]
    head = json.dumps([row, item.key, item.label, item.origin, others]).encode()
    file.write(struct.pack("<QQ", len(head), len(item.data)) + head)
    file.write(item.data)
    for _, data in item.others:
        file.write(data)


def unspool(file: BinaryIO) -> Iterator[Numbered]:
    """The items of a file, one at a time."""
    while prefix := file.read(16):
        head_bytes, data_bytes = struct.unpack("<QQ", prefix)
        row, key, label, origin, others = json.loads(file.read(head_bytes))
        data = file.read(data_bytes)
        yield row, Item(key, data, label, origin, tuple((extension, file.read(size)) for extension, size in others))
