"""The shards of a subset, copied as they were planned: read, checked, written and hashed.

1. A shard is cut into blocks of whole records (`blocks.py`). A block is read into memory, each image in it compared with its digest in the
   parent's index, and written to its place.
2. The same memory is hashed, block after block: the shard's digest is of the bytes written, whatever happens to the parent meanwhile.

Each thread makes a shard by itself, so that a block stays in one core's cache; when there are none left to begin, it takes blocks of shards
that others make. Most of the time goes into the two passes of sha256, over the images and over the shard.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import SourceError
from kdprune_data.formats import tar
from kdprune_data.formats.blocks import Reader, by_block
from kdprune_data.formats.build import Build, Sink
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.subset import Plan
from kdprune_data.images import MEMBERS

AHEAD = 4
"""Blocks of a shard that may wait for an earlier one to be hashed."""

Block = NDArray[np.uint8]


@dataclass(frozen=True)
class Copier:
    """Copies planned records of a parent. `checked`: each image is compared with its digest first."""

    parent: Dataset
    plan: Plan
    reader: Reader
    checked: bool

    @classmethod
    def of(cls, parent: Dataset, plan: Plan, *, checked: bool = True) -> Copier:
        """For all shards of a plan. A parent without digests has nothing to compare with."""
        return cls(parent, plan, Reader(parent.shard_paths), checked and parent.has_digests)

    def read(self, first: int, last: int) -> Block:
        """Planned records of one shard, behind one another. Raises SourceError when they are not as they were indexed."""
        plan = self.plan
        try:
            block = self.reader.read(plan.runs[int(plan.first[first]) : int(plan.first[last])])
        except EOFError:
            raise self.parent.changed(self._cut_off(first, last)) from None
        if self.checked:
            self._check(block, first, last)
        return block

    def put(self, sink: Sink, first: int, last: int) -> Block:
        """Read records and write them to their place."""
        block = self.read(first, last)
        sink.place(block.data, int(self.plan.offsets[first]))
        return block

    def names(self, block: Block, first: int, last: int) -> NDArray[np.bytes_]:
        """Of the image members, for their extensions: what stands in the headers before them, as their maker wrote them."""
        images = self._images(first, last)
        found = by_block(block)[images // tar.BLOCK - 1, :100]
        for n in np.flatnonzero(found[:, -1]).tolist():  # it may go on in a header of its own before this one
            extension = self._long_name(block, first, first + n).encode()[-100:]
            found[n] = np.frombuffer(extension.ljust(100, b"\0"), np.uint8)
        return np.ascontiguousarray(found).view("S100")[:, 0]

    def _long_name(self, block: Block, first: int, record: int) -> str:
        """The dot and the extension of the image member of one record of a block that begins with the first."""
        start = int(self.plan.offsets[record] - self.plan.offsets[first])
        raw = block[start : start + int(self.plan.lengths[record])].tobytes() + tar.END
        try:
            members = [one for found in tar.records(raw, "record") for one in found.members.items()]
        except SourceError:
            raise self.parent.changed(int(self.plan.rows[record])) from None
        return next((f".{extension}" for extension, one in members if one.data == self.plan.images[record]), "")

    def _cut_off(self, first: int, last: int) -> int:
        """The first row whose shard ends before its record does."""
        rows = self.plan.rows[first:last]
        ends = self.parent.index["offset"].to_numpy()[rows] + self.parent.index["length"].to_numpy()[rows]
        sizes = np.array([self.parent.shard_paths[shard].stat().st_size for shard in self.parent.shards[rows].tolist()])
        return int(rows[np.argmax(ends > sizes)])

    def _check(self, block: Block, first: int, last: int) -> None:
        rows, starts, view, sha256 = self.plan.rows[first:last], self._images(first, last), block.data, hashlib.sha256
        ends = starts + self.plan.image_lengths[first:last]
        found = b"".join([sha256(view[start:end]).digest() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
        said = self.parent.sha256[rows]
        if found != said.tobytes():
            differ = (np.frombuffer(found, np.uint8).reshape(-1, 32) != said).any(1)
            raise self.parent.changed(int(rows[np.argmax(differ)]))

    def _images(self, first: int, last: int) -> NDArray[np.int64]:
        """Where in their block the images begin."""
        return np.asarray(self.plan.offsets[first:last] - self.plan.offsets[first] + self.plan.images[first:last])


class Shard:
    """One shard in the making. `make` makes it; other threads may `help`. Blocks are hashed in order, by whoever brings the next one."""

    def __init__(self, copier: Copier, number: int) -> None:
        self._copier = copier
        self._number = number
        self._blocks = enumerate(copier.plan.blocks(number))
        self._sink: Sink | None = None
        self._names: list[NDArray[np.bytes_]] = []
        self._errors: dict[int, Exception] = {}
        self._waiting: dict[int, Block] = {}
        self._next = 0
        self._hashing = False
        self._at_work = 0
        self._over = False
        self._changed = threading.Condition()

    def make(self, build: Build) -> str:
        """Make it, or find it made; its name."""
        plan, copier = self._copier.plan, self._copier
        name, rows = plan.names[self._number], plan.rows[plan.cuts[self._number] : plan.cuts[self._number + 1]]
        samples = hashlib.sha256(copier.parent.uids[rows].astype("<u8").tobytes()).hexdigest()
        try:
            if not _stands(build.finished(name), samples, checked=copier.checked):
                facts: dict[str, Any] = {"samples": samples, "checked": copier.checked}
                with build.create(name, facts) as sink:
                    self._copy(sink)
                    facts["images"] = _extensions(np.concatenate(self._names))
        finally:
            self._end()
        return name

    def help(self) -> None:
        """Take part until there is nothing left to take."""
        with self._changed:
            self._changed.wait_for(lambda: self._sink is not None or self._over)
        self._work()

    def _copy(self, sink: Sink) -> None:
        with self._changed:
            self._sink = sink
            self._changed.notify_all()
        try:
            self._work()
        finally:
            self._end()
        if self._errors:  # blocks are taken in order: the first that is wrong is among them
            raise self._errors[min(self._errors)]
        sink.place(tar.END, sink.bytes)
        sink.count(tar.END)

    def _end(self) -> None:
        """Nobody begins any more, and nobody is at work when this returns: the file can be closed."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._at_work)

    def _work(self) -> None:
        with self._changed:
            sink = self._sink
            if sink is None or self._over:
                return
            self._at_work += 1
        try:
            while (taken := self._take()) is not None:
                self._do(sink, *taken)
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    def _take(self) -> tuple[int, tuple[int, int]] | None:
        """The next block, once few enough wait to be hashed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < AHEAD or self._errors)
            return None if self._errors else next(self._blocks, None)

    def _do(self, sink: Sink, number: int, part: tuple[int, int]) -> None:
        """Copy a block, and hash it if it is its turn, else leave it to whoever copies the one before. Errors are for `make` to raise."""
        try:
            block = self._copier.put(sink, *part)
            names = self._copier.names(block, *part)
            with self._changed:
                self._names.append(names)
                self._waiting[number] = block
                if self._hashing:
                    return
                self._hashing = True
            while (ready := self._ready()) is not None:
                sink.count(ready.data)
                self._copier.reader.release(ready)
        except Exception as error:
            with self._changed:
                self._errors[number] = error
                self._changed.notify_all()

    def _ready(self) -> Block | None:
        """The next block to hash, if it is there; else hashing stops until it comes."""
        with self._changed:
            found = self._waiting.pop(self._next, None)
            self._hashing = found is not None
            self._next += self._hashing
            self._changed.notify_all()
            return found


def copy(parent: Dataset, plan: Plan, build: Build, jobs: int, *, checked: bool = True) -> Iterator[str]:
    """Copy the planned records with `jobs` threads; yields the names of shards as they are finished, in order.

    checked: images that were changed are noticed. Raises SourceError when a shard of the parent's is not as long as it was, or an image is
    not the one that was indexed.
    """
    parent.check_outside(np.unique(parent.shards[plan.rows]).tolist())
    build.keep_only(plan.names)
    copier = Copier.of(parent, plan, checked=checked)
    shards = [Shard(copier, number) for number in range(len(plan.names))]
    last = shards[: -jobs - 1 : -1]  # the latest first: they have most left

    def help_others() -> None:
        for shard in last:
            shard.help()

    with ThreadPoolExecutor(jobs) as threads:
        made = [threads.submit(shard.make, build) for shard in shards]
        helping = [threads.submit(help_others) for _ in range(jobs)]  # whose turn comes when all shards have been begun
        try:
            for one in made:
                yield one.result()
        finally:
            _cancel([*helping, *made])


def _cancel(futures: Sequence[Future[Any]]) -> None:
    for one in futures:
        one.cancel()


def _stands(noted: Mapping[str, Any] | None, samples: str, *, checked: bool) -> bool:
    """Whether a finished shard can stay: another selection, of an earlier version, may have left it, or a run that did not check."""
    return noted is not None and noted.get("samples") == samples and "images" in noted and (noted["checked"] or not checked)


def _extensions(names: NDArray[np.bytes_]) -> list[str]:
    """Which image members there are among these names, sorted."""
    return sorted(one for one in MEMBERS if np.char.endswith(names, f".{one}".encode()).any())


def image_members(build: Build, shards: Sequence[str]) -> list[str]:
    """The extensions of the image members in these copied shards, sorted. For sets whose image is whichever member is one."""
    return sorted({extension for name in shards for extension in (build.finished(name) or {})["images"]})


def trial(parent: Dataset, plan: Plan, *, checked: bool) -> Iterator[int]:
    """Read, check and hash what would be copied, without writing it; the bytes done, step by step."""
    copier = Copier.of(parent, plan, checked=checked)
    for number in range(len(plan.names)):
        digest = hashlib.sha256()
        for first, last in plan.blocks(number):
            block = copier.read(first, last)
            digest.update(block.data)
            yield len(block)
            copier.reader.release(block)
