"""One sample and one shard in the making: a sample's record and what is found out about it; a tar that is written, or found standing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from kdprune_data import images
from kdprune_data.errors import KdpruneError, SourceError
from kdprune_data.formats import dataset, indexing, table, tar
from kdprune_data.formats.build import Build, Sink


@dataclass(frozen=True)
class Sample:
    """One sample to write. `label` None = unlabelled; `origin` says where it came from, in messages; `others`: further members, as
    (extension, bytes); `true`: the label before it was changed, for an index that says so."""

    key: str
    data: bytes
    label: int | None
    origin: str
    others: tuple[tuple[str, bytes], ...] = ()
    true: int | None = None

    @property
    def extension(self) -> str:
        """The image member's; `bin` where the bytes are no image type that is kept."""
        return images.extension(self.data) or "bin"

    @property
    def record_bytes(self) -> int:
        """The length of its record."""
        sizes = [len(self.data), *([] if self.label is None else [len(str(self.label))]), *(len(data) for _, data in self.others)]
        return sum(tar.BLOCK + tar.padded(size) for size in sizes)

    def record(self) -> bytes:
        """Its members: the image, the class number, the others."""
        label = [] if self.label is None else [("cls", str(self.label).encode())]
        members = [(self.extension, self.data), *label, *self.others]
        return b"".join(tar.member(f"{self.key}.{extension}", data) for extension, data in members)


class Checked(NamedTuple):
    """What a thread found out about a sample: its image's sha256 and pixels (0 where it does not decode), and a digest of all members."""

    sha256: bytes
    height: int
    width: int
    mark: bytes


def check(samples: Sequence[Sample], *, decode: bool, keep_bad: bool) -> list[Checked]:
    """Hash samples and, if asked, decode them. Raises SourceError as `check_image` does."""
    found = []
    for sample in samples:
        sha256 = indexing.image_digest(sample.data)
        mark = sha256 + b"".join(extension.encode() + b"\0" + indexing.image_digest(data) for extension, data in sample.others)
        height, width = check_image(sample.data, f"{sample.origin} (key {sample.key!r})", keep_bad) if decode else (0, 0)
        found.append(Checked(sha256, height, width, mark))
    return found


def check_image(data: bytes, origin: str, keep_bad: bool) -> tuple[int, int]:
    """Decode an image and return (height, width), or (0, 0) for a bad one that may be kept.

    Raises SourceError when it does not decode, or is of a type that is not kept, unless `keep_bad`.
    """
    try:
        if not data:
            raise SourceError("an empty file, of 0 bytes")
        if images.extension(data) is None:
            raise SourceError("not a JPEG, PNG or WebP image")
        height, width, _ = images.decode(data).shape
        return height, width
    except SourceError as error:
        if keep_bad:
            return 0, 0
        raise SourceError(f"{origin}: {error}; mend or remove it, or pass --on-bad keep to carry it along unused") from None


class Shard:
    """One shard: written, or, where it stands from an interrupted run, compared."""

    def __init__(self, build: Build, number: int, schema: pa.Schema) -> None:
        self._build = build
        self.name = dataset.SHARD % number
        self.samples, self.bytes = 0, len(tar.END)  # as counted while it is filled; they run ahead of what is written
        self._rows = indexing.Rows(number, schema)
        self._rows_file = build.scratch(f"{self.name}.rows")
        self._of = hashlib.sha256()
        self._facts: dict[str, Any] = {}
        self._open: tuple[Sink, AbstractContextManager[Sink]] | None = None
        self.stands = self._standing(schema)

    def _standing(self, schema: pa.Schema) -> pa.Table | None:
        """The index rows of the finished shard, if there is one."""
        if (self._build.finished(self.name) or {}).get("of") is None or not self._rows_file.is_file():
            return None
        try:
            return table.read(self._rows_file, schema)
        except KdpruneError:  # torn by a power failure: the shard is made again
            return None

    def put(self, sample: Sample, checked: Checked) -> None:
        """The next sample, already checked."""
        self._of.update(f"{sample.key}\0{sample.label}\0".encode() + checked.mark)
        if self.stands is not None:
            return
        sink, _ = self._opened()
        start, record = sink.bytes, sample.record()
        self._rows.add(
            id=sample.key,
            key=sample.key,
            offset=start,
            length=len(record),
            label=sample.label,
            image_offset=start + tar.BLOCK,
            image_length=len(sample.data),
            sha256=checked.sha256,
            width=checked.width,
            height=checked.height,
            ok=checked.height > 0,
            label_true=sample.true,
        )
        sink.write(record)

    def close(self) -> pa.Table:
        """Commit it and return its index rows. Raises SourceError when it stands and was made of other samples."""
        of = self._of.hexdigest()
        if self.stands is not None:
            if (self._build.finished(self.name) or {}).get("of") != of:
                raise SourceError(
                    f"the source changed since the import was interrupted: {self._build.folder / self.name} holds other samples than it "
                    f"has now; what had been made was removed: run the same command again to import the source as it is"
                )
            return self.stands
        sink, file = self._opened()
        sink.write(tar.END)
        rows = self._rows.table()
        self._build.write_scratch(self._rows_file.name, table.to_bytes(rows))
        self._facts["of"] = of
        self._open = None
        file.__exit__(None, None, None)
        return rows

    def abandon(self) -> None:
        """Leave nothing of a shard that is not finished."""
        if self._open is not None:
            _, file = self._open
            self._open = None
            with suppress(_AbandonedError):
                file.__exit__(_AbandonedError, _AbandonedError(), None)

    def _opened(self) -> tuple[Sink, AbstractContextManager[Sink]]:
        """The file, begun with the first sample: shards that are still being filled wait for it."""
        if self._open is None:
            file = self._build.create(self.name, self._facts)
            self._open = (file.__enter__(), file)
        return self._open


class _AbandonedError(Exception):
    pass
