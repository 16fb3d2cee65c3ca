"""Writing the shards of a data set: samples in, `shard-000000.tar` ... and their index rows out, with few samples in memory at a time.

1. Batches of samples are hashed and checked (every image is decoded, and a large one made smaller where that is asked for) by `jobs`
   threads, ahead of the writing, in a window of so many bytes.
2. In their order again, they are cut into shards, by count and by the bytes that are stored, so the cut does not depend on who does the
   work. The index rows of a shard go to `.partial/` before it is committed.

A shard that stands from an interrupted run is not written again: as many samples as it has pass by, and must be those it was made of.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa

from kdprune_data.errors import SourceError
from kdprune_data.formats import dataset, indexing
from kdprune_data.formats.build import Build
from kdprune_data.formats.shard import Checked, Handling, Sample, Shard, check

BATCH_SAMPLES = 64
BATCH_BYTES = 1_000_000
BATCHES_A_JOB = 8
WINDOW = 64_000_000


@dataclass(frozen=True)
class Limits:
    """Where a shard ends: before the record that would take it past either limit. A shard holds at least one sample."""

    samples: int = dataset.SHARD_SAMPLES
    bytes: int = dataset.SHARD_BYTES


class Batch(NamedTuple):
    """Samples on their way through the threads, and their bytes as they came."""

    samples: list[Sample]
    bytes: int
    checked: Future[list[Checked]]


class ShardWriter:
    """Add samples in order, then `finish`. Used as a context manager: leaving it early stops the threads and drops the open shard.

    window: bytes of samples that may be in memory; noisy: the index has the column `label_true`. Afterwards `resized` says how many images
    were made smaller, `kinds` the extensions of all.
    """

    def __init__(self, build: Build, *, limits: Limits, jobs: int, handling: Handling, window: int = WINDOW, noisy: bool = False) -> None:
        self._build = build
        self._limits = limits
        self._handling = handling
        self._schema = indexing.NOISY_SCHEMA if noisy else indexing.SCHEMA
        self._pool = ThreadPoolExecutor(max(1, jobs))
        self._window = window
        self._most_batches = BATCHES_A_JOB * max(1, jobs)
        self._batch_bytes = min(BATCH_BYTES, window // (2 * max(1, jobs)))
        self._running: deque[Batch] = deque()
        self._running_bytes = 0
        self._samples: list[Sample] = []
        self._bytes = 0
        self._decode = False  # until the first shard is met that does not stand
        self._to_compare = 0  # with the last shard that was looked at, which stands
        self._ahead: deque[Shard] = deque()
        self._shard: Shard | None = None
        self._shards = 0
        self._tables: list[pa.Table] = []
        self.resized = 0
        self.kinds: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._shard is not None:
            self._shard.abandon()

    def add(self, sample: Sample) -> None:
        """The next sample. Raises SourceError when an image does not decode (unless bad ones are kept), once its turn has come."""
        if not self._decode and self._to_compare == 0:
            self._submit()
            self._look_ahead()
        self._to_compare -= not self._decode
        self._samples.append(sample)
        self._bytes += sample.record_bytes
        if self._bytes >= self._batch_bytes or len(self._samples) >= BATCH_SAMPLES:
            self._submit()

    def _look_ahead(self) -> None:
        """Find out whether the shard of the next samples stands: these need not be decoded again."""
        shard = self._opened()
        self._ahead.append(shard)
        self._decode = shard.stands is None
        self._to_compare = 0 if shard.stands is None else len(shard.stands)

    def _opened(self) -> Shard:
        self._shards += 1
        return Shard(self._build, self._shards - 1, self._schema)

    def _submit(self) -> None:
        """Give what was added to the threads; take back, in order, what is beyond the window."""
        if not self._samples:
            return
        work = self._pool.submit(check, self._samples, self._handling, decode=self._decode)
        self._running.append(Batch(self._samples, self._bytes, work))
        self._running_bytes += self._bytes
        self._samples, self._bytes = [], 0
        while self._running and (self._is_full() or self._running[0].checked.done()):
            self._take_back()

    def _is_full(self) -> bool:
        return self._running_bytes > self._window or len(self._running) > self._most_batches

    def _take_back(self) -> None:
        samples, size, checked = self._running[0]
        for sample, found in zip(samples, checked.result(), strict=True):
            stored = sample if found.data is None else replace(sample, data=found.data)
            self._shard_of(stored.record_bytes).put(stored, found)
        self._running.popleft()
        self._running_bytes -= size

    def _shard_of(self, size: int) -> Shard:
        """The shard of the next record, of so many bytes. The one before is closed when it takes no more."""
        if self._shard is not None and not self._takes(self._shard, size):
            self._close(self._shard)
        if self._shard is None:
            self._shard = self._ahead.popleft() if self._ahead else self._opened()
        return self._shard

    def _takes(self, shard: Shard, size: int) -> bool:
        if shard.stands is not None:
            return shard.samples < len(shard.stands)
        return shard.samples < self._limits.samples and shard.bytes + size <= self._limits.bytes

    def _close(self, shard: Shard) -> None:
        self._tables.append(shard.close())
        self.resized += shard.resized
        self.kinds |= shard.kinds
        self._shard = None

    def finish(self) -> pa.Table:
        """Close the last shard and return the whole index. Raises SourceError as `add` does, and when there was no sample."""
        if self._shards == 0:
            raise SourceError("the source has no samples for this split: nothing to write")
        self._submit()
        while self._running:
            self._take_back()
        if self._shard is not None:
            self._close(self._shard)
        return pa.concat_tables(self._tables).combine_chunks()

    @property
    def names(self) -> list[str]:
        """The shards written, in order."""
        return [dataset.SHARD % n for n in range(self._shards)]
