"""Writing the shards of a data set: samples in, `shard-000000.tar` ... and their index rows out, with few samples in memory at a time.

1. `add` cuts the samples into shards in the order they come, by count and bytes alone, so the cut does not depend on who does the work.
2. Batches of samples are hashed and checked (every image is decoded) by `jobs` threads, ahead of the writing, in a window of so many bytes.
3. In their order again, they go into the one shard that is open. Its index rows go to `.partial/` before it is committed.

A shard that stands from an interrupted run is not written again: its samples pass by and must be the ones that it was made of.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from kdprune_data.errors import SourceError
from kdprune_data.formats import dataset, indexing
from kdprune_data.formats.build import Build
from kdprune_data.formats.shard import Checked, Sample, Shard, check

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
    """Samples of one shard on their way through the threads. `last`: the shard ends with them."""

    shard: Shard
    samples: list[Sample]
    bytes: int
    checked: Future[list[Checked]]
    last: bool


class ShardWriter:
    """Add samples in order, then `finish`. Used as a context manager: leaving it early stops the threads and drops the open shard.

    window: bytes of samples that may be in memory; noisy: the index has the column `label_true`.
    """

    def __init__(self, build: Build, *, limits: Limits, jobs: int, keep_bad: bool, window: int = WINDOW, noisy: bool = False) -> None:
        self._build = build
        self._limits = limits
        self._keep_bad = keep_bad
        self._schema = indexing.NOISY_SCHEMA if noisy else indexing.SCHEMA
        self._pool = ThreadPoolExecutor(max(1, jobs))
        self._window = window
        self._most_batches = BATCHES_A_JOB * max(1, jobs)
        self._batch_bytes = min(BATCH_BYTES, window // (2 * max(1, jobs)))
        self._running: deque[Batch] = deque()
        self._running_bytes = 0
        self._samples: list[Sample] = []
        self._bytes = 0
        self._shard: Shard | None = None
        self._shards = 0
        self._tables: list[pa.Table] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for shard in [self._shard, *(batch.shard for batch in self._running)]:
            if shard is not None:
                shard.abandon()

    def add(self, sample: Sample) -> None:
        """The next sample. Raises SourceError when an image does not decode (unless bad ones are kept), once its turn has come."""
        size = sample.record_bytes
        shard = self._shard
        if shard is not None and (shard.samples >= self._limits.samples or shard.bytes + size > self._limits.bytes):
            self._submit(shard, last=True)
            shard = None
        if shard is None:
            self._shard = shard = Shard(self._build, self._shards, self._schema)
            self._shards += 1
        shard.samples += 1
        shard.bytes += size
        self._samples.append(sample)
        self._bytes += size
        if self._bytes >= self._batch_bytes or len(self._samples) >= BATCH_SAMPLES:
            self._submit(shard, last=False)

    def _submit(self, shard: Shard, *, last: bool) -> None:
        """Give what was added to the threads; take back, in order, what is beyond the window."""
        work = self._pool.submit(check, self._samples, decode=shard.stands is None, keep_bad=self._keep_bad)
        self._running.append(Batch(shard, self._samples, self._bytes, work, last))
        self._running_bytes += self._bytes
        self._samples, self._bytes = [], 0
        while self._running and (self._is_full() or self._running[0].checked.done()):
            self._take_back()

    def _is_full(self) -> bool:
        return self._running_bytes > self._window or len(self._running) > self._most_batches

    def _take_back(self) -> None:
        shard, samples, size, checked, last = self._running[0]
        for sample, found in zip(samples, checked.result(), strict=True):
            shard.put(sample, found)
        if last:
            self._tables.append(shard.close())
        self._running.popleft()
        self._running_bytes -= size

    def finish(self) -> pa.Table:
        """Close the last shard and return the whole index. Raises SourceError as `add` does, and when there was no sample."""
        if self._shard is None:
            raise SourceError("the source has no samples for this split: nothing to write")
        self._submit(self._shard, last=True)
        while self._running:
            self._take_back()
        self._shard = None
        return pa.concat_tables(self._tables).combine_chunks()

    @property
    def names(self) -> list[str]:
        """The shards written, in order."""
        return [dataset.SHARD % n for n in range(self._shards)]
