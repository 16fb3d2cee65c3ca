"""One sample and one shard in the making: a sample's record and what is found out about it; a tar that is written, or found standing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import images
from kdprune_data.errors import KdpruneError, SourceError
from kdprune_data.formats import dataset, indexing, table, tar
from kdprune_data.formats.build import Build, Sink
from kdprune_data.formats.shrink import Shrink


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


@dataclass(frozen=True)
class Handling:
    """What becomes of images. `keep_bad`: those that do not decode are kept; `shrink`: how large ones are made smaller, None: not."""

    keep_bad: bool = False
    shrink: Shrink | None = None


class Checked(NamedTuple):
    """What a thread found out about a sample: of its image as it is stored, the sha256 and the pixels (0 where it does not decode); a
    digest of all members as they came; and the image as it is stored where that is not as it came."""

    sha256: bytes
    height: int
    width: int
    mark: bytes
    data: bytes | None = None


def check(samples: Sequence[Sample], handling: Handling, *, decode: bool) -> list[Checked]:
    """Hash samples and, if asked, decode them and make large ones smaller.

    Raises SourceError as `check_image` does, and for a resized image that would be called like another member.
    """
    found = []
    for sample in samples:
        sha256 = indexing.image_digest(sample.data)
        mark = sha256 + b"".join(extension.encode() + b"\0" + indexing.image_digest(data) for extension, data in sample.others)
        made = None
        height, width = 0, 0
        if decode:
            pixels = _decoded(sample.data, f"{sample.origin} (key {sample.key!r})", handling.keep_bad)
            if pixels is not None:
                height, width, _ = pixels.shape
                made = None if handling.shrink is None else handling.shrink.apply(pixels)
        if made is None:
            found.append(Checked(sha256, height, width, mark))
        else:
            data, height, width = made
            _check_resized(sample)
            found.append(Checked(indexing.image_digest(data), height, width, mark, data))
    return found


def _check_resized(sample: Sample) -> None:
    if any(extension == "jpg" for extension, _ in sample.others):
        raise SourceError(
            f"{sample.origin} (key {sample.key!r}): resized, its image is called .jpg, as another of its members is: pack the set again "
            "without that one, or import it without --max-side"
        )


def check_image(data: bytes, origin: str, keep_bad: bool) -> tuple[int, int]:
    """Decode an image and return (height, width), or (0, 0) for a bad one that may be kept.

    Raises SourceError when it does not decode, or is of a type that is not kept, unless `keep_bad`.
    """
    pixels = _decoded(data, origin, keep_bad)
    return (0, 0) if pixels is None else (pixels.shape[0], pixels.shape[1])


def _decoded(data: bytes, origin: str, keep_bad: bool) -> NDArray[np.uint8] | None:
    try:
        if not data:
            raise SourceError("an empty file, of 0 bytes")
        if images.extension(data) is None:
            raise SourceError("not a JPEG, PNG or WebP image")
        return images.decode(data)
    except SourceError as error:
        if keep_bad:
            return None
        raise SourceError(f"{origin}: {error}; mend or remove it, or pass --on-bad keep to carry it along unused") from None


class Shard:
    """One shard: written, or, where it stands from an interrupted run, compared. Of its samples: `samples`, how many; `bytes`, what the tar
    takes with them; `resized`, how many images were; `kinds`, the extensions of the images."""

    def __init__(self, build: Build, number: int, schema: pa.Schema) -> None:
        self._build = build
        self.name = dataset.SHARD % number
        self.samples, self.bytes = 0, len(tar.END)
        self._rows = indexing.Rows(number, schema)
        self._rows_file = build.scratch(f"{self.name}.rows")
        self.resized = 0
        self.kinds: set[str] = set()
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
        """The next sample, already checked, with the image that is stored."""
        self.samples += 1
        self.bytes += sample.record_bytes
        self.resized += checked.data is not None
        self.kinds.add(sample.extension)
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
            noted = self._build.finished(self.name) or {}
            if noted.get("of") != of:
                raise SourceError(
                    f"the source changed since the import was interrupted: {self._build.folder / self.name} holds other samples than it "
                    f"has now; what had been made was removed: run the same command again to import the source as it is"
                )
            self.resized, self.kinds = noted.get("resized", 0), set(noted.get("images", self.kinds))
            return self.stands
        sink, file = self._opened()
        sink.write(tar.END)
        rows = self._rows.table()
        self._build.write_scratch(self._rows_file.name, table.to_bytes(rows))
        self._facts |= {"of": of, "resized": self.resized, "images": sorted(self.kinds)}
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
