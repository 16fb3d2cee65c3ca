"""PAX headers that hold nothing but a time: 1,024 bytes and a header to read for each member, which half of a shard of small images may be.

Writers that know a member's time to a fraction of a second put them there, WebDataset's own among them; who reads a data set has no use for
them. `find` walks the headers of records, many records at a time; the bytes of images are not looked at. `docs/formats.md`, "Subset".
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kdprune_data.formats import headers, tar
from kdprune_data.formats.blocks import Reader, Runs, by_block, edges
from kdprune_data.formats.dataset import Dataset

AT_ONCE = 1 << 22
"""Bytes of headers, and of members that are no images, that are looked at together: arrays of few records would take longer to make."""
KEYS = (b"mtime", b"atime", b"ctime")
PAX = ord("x")
MOST = 1 << 60
"""Larger sizes, which no member has, are taken for this one."""
_EIGHTS = 8 ** np.arange(10, -1, -1)


@dataclass(frozen=True)
class Spans:
    """Bytes of records that are left out: of record `records`[i], counted from 0, those from `starts`[i] to `ends`[i] in its shard.

    int64 of shape (n,), in order.
    """

    records: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 of shape (n,): the bytes of each."""
        return self.ends - self.starts

    def some(self, wanted: NDArray[np.bool_]) -> Spans:
        """Those of them that are wanted."""
        return Spans(self.records[wanted], self.starts[wanted], self.ends[wanted])

    @classmethod
    def joined(cls, parts: Iterable[Spans]) -> Spans:
        """Those of several, whose records count on."""
        found = list(parts)
        return cls(*(np.concatenate([getattr(one, name) for one in found]) for name in ("records", "starts", "ends")))


def find(parent: Dataset, rows: NDArray[np.int64], jobs: int = 1) -> Spans:
    """The PAX headers of these rows' records whose records hold nothing but times. rows: ascending; jobs: threads.

    Raises SourceError when a record is not what was indexed.
    """
    parent.check_outside(np.unique(parent.shards[rows]).tolist())
    others = (parent.index["length"].to_numpy() - parent.index["image_length"].to_numpy())[rows]
    cuts = [0, *(np.flatnonzero(np.diff(np.cumsum(others) // AT_ONCE)) + 1).tolist(), len(rows)]
    reader = Reader(parent.shard_paths)
    with ThreadPoolExecutor(jobs) as threads:
        return Spans.joined(threads.map(lambda part: _Walk(parent, rows[slice(*part)], reader).found(part[0]), pairwise(cuts)))


class _Walk:
    """Over the headers of some records, one step of all at a time. Places are counted in blocks of 512 bytes of what was read: for each
    record its bytes before the image, and those behind it."""

    def __init__(self, parent: Dataset, rows: NDArray[np.int64], reader: Reader) -> None:
        self._parent, self._rows, self._reader = parent, rows, reader
        self._shards = parent.shards[rows]
        columns = (parent.index[name].to_numpy()[rows] for name in ("offset", "length", "image_offset", "image_length"))
        self._starts, lengths, self._images, self._sizes = columns
        self._behind = self._images + _blocks(self._sizes) * tar.BLOCK
        self._ends = self._starts + lengths
        before = (self._images - self._starts) // tar.BLOCK
        self._first = edges(before + (self._ends - self._behind) // tar.BLOCK)
        self._image = self._first[:-1] + before - 1
        """Where each image's own header is: the last before its bytes."""
        self._at = self._first[:-1].copy()
        self._given = np.full(len(rows), -1, np.int64)
        """The size that a PAX header has told of the next member, -1 where it has told none."""
        self._records: list[NDArray[np.int64]] = []
        self._places: list[NDArray[np.int64]] = []
        self._lengths: list[NDArray[np.int64]] = []

    def found(self, before: int) -> Spans:
        """What is to be left out. before: the number of the first record."""
        aligned = (self._starts | self._images | self._ends) % tar.BLOCK == 0
        self._refuse(~aligned | (self._images <= self._starts) | (self._behind > self._ends))
        shards, starts, ends = (
            np.stack(both, 1).ravel() for both in ((self._shards, self._shards), (self._starts, self._behind), (self._images, self._ends))
        )
        try:
            block = self._reader.read(Runs.of(shards, starts, ends))
        except EOFError:
            raise self._parent.changed(int(self._rows[0])) from None
        live = np.arange(len(self._rows))
        while len(live):
            live = self._step(by_block(block), live)
        self._reader.release(block)
        return self._spans(before)

    def _step(self, data: NDArray[np.uint8], live: NDArray[np.int64]) -> NDArray[np.int64]:
        """Past the next header of each of these records, and past what it tells of; those that are not at their end."""
        here = self._at[live]
        heads = data[here]
        kinds, sizes = heads[:, 156], self._sizes_in(heads, live, here)
        regular = np.logical_or.reduce([kinds == ord(kind) for kind in headers.REGULAR])
        sizes = np.where(regular & (self._given[live] >= 0), self._given[live], sizes)
        self._given[live[regular]] = -1
        image = here == self._image[live]
        beyond = here + 1 + np.where(image, 0, _blocks(sizes))
        over = (beyond > self._first[live + 1]) | ((here < self._image[live]) & (beyond > self._image[live]))
        self._refuse(over | (image & (~regular | (sizes != self._sizes[live]))), live)
        pax = np.flatnonzero(kinds == PAX)
        only = pax[self._only_times(data, here[pax] + 1, sizes[pax], live[pax])]
        self._records.append(live[only])
        self._places.append(here[only])
        self._lengths.append((beyond - here)[only])
        self._at[live] = beyond
        return live[beyond < self._first[live + 1]]

    def _sizes_in(self, heads: NDArray[np.uint8], live: NDArray[np.int64], here: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers in the size fields: as nearly all are written, eleven octal digits and an end, or by `headers.number`."""
        digits = heads[:, 124:135] - np.uint8(ord("0"))
        plain = (digits < 8).all(1) & ((heads[:, 135] == 0) | (heads[:, 135] == ord(" ")))
        sizes: NDArray[np.int64] = digits.astype(np.int64) @ _EIGHTS
        for n in np.flatnonzero(~plain).tolist():
            sizes[n] = min(headers.number(heads[n, 124:136].tobytes(), *self._told(int(live[n]), int(here[n]))), MOST)
        return sizes

    def _only_times(
        self, data: NDArray[np.uint8], at: NDArray[np.int64], sizes: NDArray[np.int64], live: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of these bodies of PAX headers hold times alone; of the others, the sizes that they tell are noted."""
        short = sizes <= tar.BLOCK
        only = np.zeros(len(at), np.bool_)
        only[short] = _times_alone(data[np.minimum(at[short], len(data) - 1)], sizes[short])
        for n in np.flatnonzero(~only).tolist():
            raw = data[at[n] : at[n] + _blocks(sizes[n])].tobytes()[: sizes[n]]
            _, told = headers.pax(raw, *self._told(int(live[n]), int(at[n]) - 1))
            only[n] = _is_times(raw)
            self._given[live[n]] = self._given[live[n]] if told is None else min(told, MOST)
        return only

    def _told(self, record: int, place: int) -> tuple[str, int]:
        """A place for messages: the shard, and the byte in it."""
        return str(self._parent.shard_paths[int(self._shards[record])]), int(self._bytes(np.array([record]), np.array([place]))[0])

    def _bytes(self, records: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The bytes in their shards of places in these records."""
        into = (places - self._first[records]) * tar.BLOCK
        before = self._images[records] - self._starts[records]
        return np.asarray(np.where(into < before, self._starts[records] + into, self._behind[records] + into - before))

    def _refuse(self, wrong: NDArray[np.bool_], live: NDArray[np.int64] | None = None) -> None:
        if wrong.any():
            rows = self._rows if live is None else self._rows[live]
            raise self._parent.changed(int(rows[np.argmax(wrong)]))

    def _spans(self, before: int) -> Spans:
        records, places, lengths = map(np.concatenate, (self._records, self._places, self._lengths))
        order = np.lexsort((places, records))
        records, places = records[order], places[order]
        starts = self._bytes(records, places)
        return Spans(records + before, starts, starts + lengths[order] * tar.BLOCK)


def _blocks(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many blocks of a tar so many bytes take."""
    return np.asarray(-(-sizes // tar.BLOCK))


def _times_alone(bodies: NDArray[np.uint8], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which bodies are records `LL Xtime=VALUE LF` alone, X being m, a or c: as times are written, less than a hundred bytes each.

    bodies: uint8 of shape (n, 512), of which `sizes` bytes each count.
    """
    rows = np.arange(len(bodies))
    at, fine = np.zeros(len(bodies), np.int64), sizes > 0
    for _ in KEYS:
        going = fine & (at < sizes)
        if not going.any():
            break
        text = bodies[rows[:, None], np.minimum(at[:, None] + np.arange(9), tar.BLOCK - 1)]
        digits = text[:, :2].astype(np.int64) - ord("0")
        ends = at + 10 * digits[:, 0] + digits[:, 1]
        right = ((digits >= (1, 0)) & (digits <= 9)).all(1) & (text[:, 2] == ord(" "))
        right &= np.logical_or.reduce([text[:, 3] == key[0] for key in KEYS])
        right &= (text[:, 4:] == np.frombuffer(b"time=", np.uint8)).all(1) & (ends > at + 9) & (ends <= sizes)
        right &= bodies[rows, np.clip(ends - 1, 0, tar.BLOCK - 1)] == ord("\n")
        fine &= right | ~going
        at = np.where(going & right, ends, at)
    return np.asarray(fine & (at == sizes))


def _is_times(body: bytes) -> bool:
    """The same of one body of any length, which parses."""
    at = 0
    while at < len(body):
        digits = body[at:].partition(b" ")[0]
        end = at + int(digits)
        if body[at + len(digits) + 1 : end].partition(b"=")[0] not in KEYS:
            return False
        at = end
    return len(body) > 0
