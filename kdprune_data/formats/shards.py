"""Writing the shards of a data set: samples in, `shard-000000.tar` ... and their index rows out.

Samples are cut into shards in the order they come, by count and bytes alone, so the cut does not depend on who does the work; each shard is
then checked (every image is decoded), hashed and written by one of `jobs` threads. A shard's index rows go to `.partial/` before the shard
is committed, so an interrupted import need not do it again.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kdprune_data import images
from kdprune_data.errors import SourceError
from kdprune_data.formats import dataset, table, tar
from kdprune_data.formats.build import Build


@dataclass(frozen=True)
class Limits:
    """Where a shard ends: before the record that would take it past either limit. A shard holds at least one sample."""

    samples: int = dataset.SHARD_SAMPLES
    bytes: int = dataset.SHARD_BYTES


@dataclass(frozen=True)
class Sample:
    """One sample to write. `label` None = unlabelled; `origin` says where it came from, in messages."""

    key: str
    data: bytes
    label: int | None
    origin: str

    @property
    def extension(self) -> str:
        """The image member's; `bin` where the bytes are no image type that is kept."""
        return images.extension(self.data) or "bin"

    @property
    def record_bytes(self) -> int:
        """The length of its record."""
        label = 0 if self.label is None else tar.BLOCK + tar.padded(len(str(self.label)))
        return tar.BLOCK + tar.padded(len(self.data)) + label


class ShardWriter:
    """Add samples in order, then `finish`. Used as a context manager: leaving it early stops the threads."""

    def __init__(self, build: Build, *, limits: Limits, jobs: int, keep_bad: bool) -> None:
        self._build = build
        self._limits = limits
        self._keep_bad = keep_bad
        self._pool = ThreadPoolExecutor(max(1, jobs))
        self._running: deque[Future[pa.Table]] = deque()
        self._at_once = max(1, jobs) + 1
        self._pending: list[Sample] = []
        self._pending_bytes = len(tar.END)
        self._tables: list[pa.Table] = []
        self._shards = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, sample: Sample) -> None:
        """The next sample. Raises SourceError when an image of an earlier shard does not decode (unless bad ones are kept)."""
        size = sample.record_bytes
        full = len(self._pending) >= self._limits.samples or self._pending_bytes + size > self._limits.bytes
        if self._pending and full:
            self._close()
        self._pending.append(sample)
        self._pending_bytes += size

    def _close(self) -> None:
        while len(self._running) >= self._at_once:
            self._tables.append(self._running.popleft().result())
        self._running.append(self._pool.submit(write_shard, self._build, self._shards, self._pending, self._keep_bad))
        self._shards += 1
        self._pending, self._pending_bytes = [], len(tar.END)

    def finish(self) -> pa.Table:
        """Close the last shard and return the whole index. Raises SourceError as `add` does, and when there was no sample."""
        if self._pending:
            self._close()
        self._tables += [one.result() for one in self._running]
        self._running.clear()
        if not self._tables:
            raise SourceError("the source has no samples for this split: nothing to write")
        return pa.concat_tables(self._tables).combine_chunks()

    @property
    def names(self) -> list[str]:
        """The shards written, in order."""
        return [dataset.SHARD % n for n in range(self._shards)]


def write_shard(build: Build, number: int, samples: Sequence[Sample], keep_bad: bool) -> pa.Table:
    """Write one shard and return its index rows; one that stands from an interrupted run is taken as it is.

    Raises SourceError for an image that does not decode, unless `keep_bad`.
    """
    name = dataset.SHARD % number
    rows_file = build.scratch(f"{name}.rows")
    of = _fingerprint(samples)
    if (build.finished(name) or {}).get("of") == of and rows_file.is_file():
        return table.read(rows_file, dataset.SCHEMA)
    rows = dataset.Rows(number)
    with build.create(name, {"of": of}) as sink:
        for sample in samples:
            rows.add(**_facts(sample, sink.bytes, keep_bad))
            image = tar.member(f"{sample.key}.{sample.extension}", sample.data)
            label = b"" if sample.label is None else tar.member(f"{sample.key}.cls", str(sample.label).encode())
            sink.write(image + label)
        sink.write(tar.END)
        index = rows.table()
        build.write_scratch(rows_file.name, table.to_bytes(index))
    return index


def _facts(sample: Sample, offset: int, keep_bad: bool) -> dict[str, Any]:
    height, width = check_image(sample.data, f"{sample.origin} (key {sample.key!r})", keep_bad)
    return {
        "id": sample.key,
        "key": sample.key,
        "offset": offset,
        "length": sample.record_bytes,
        "label": sample.label,
        "image_offset": offset + tar.BLOCK,
        "image_length": len(sample.data),
        "sha256": dataset.image_digest(sample.data),
        "width": width,
        "height": height,
        "ok": height > 0,
    }


def check_image(data: bytes, origin: str, keep_bad: bool) -> tuple[int, int]:
    """Decode an image and return (height, width), or (0, 0) for a bad one that may be kept.

    Raises SourceError when it does not decode, or is of a type that is not kept, unless `keep_bad`.
    """
    try:
        if images.extension(data) is None:
            raise SourceError("not a JPEG, PNG or WebP image")
        height, width, _ = images.decode(data).shape
        return height, width
    except SourceError as error:
        if keep_bad:
            return 0, 0
        raise SourceError(f"{origin}: {error}; mend or remove it, or pass --on-bad keep to carry it along unused") from None


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Tells whether a shard left by an interrupted run holds these very samples."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(f"{sample.key}\0{sample.label}\0".encode() + dataset.image_digest(sample.data))
    return total.hexdigest()
