"""An export on disk: plain WebDataset shards in which every sample carries, in one member, what the teacher said of all its views.

One member a sample: tar blocks are 512 bytes, so a member a view would be mostly padding. It is an `.npz` whose bytes depend on no library.
A few samples' views are read at a time, of one shard after the other, so memory does not grow with the cache. `docs/formats.md`, "Export".
"""

from __future__ import annotations

import copy
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError, SourceError
from kdprune_data.formats import dataset, tar
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logit_files import DTYPES, GEOMETRY
from kdprune_data.formats.logits import Joined, LogitCache
from kdprune_data.formats.shard import Sample

MEMBER = "kd.npz"
ARRAYS = ("logits", "boxes", "flip")
AT_ONCE = 32_000_000
"""Views that are read together take about this many bytes, or are one sample's."""
NAME_BYTES = 100
"""What a USTAR header holds of a name."""
ZIP_DATE = 0x21
"""1980-01-01, the first there is."""


class Soft(NamedTuple):
    """What one sample's member holds: logits, float16 or float32 of shape (V, c); boxes, int16 or int32 of shape (V, 4); flip, bool of
    shape (V,)."""

    logits: NDArray[np.floating]
    boxes: NDArray[np.signedinteger]
    flip: NDArray[np.bool_]

    def to_bytes(self) -> bytes:
        """The member."""
        return npz(self._asdict())


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays by name as an .npz: a ZIP of stored parts with one date, so that the bytes depend on no version of numpy, zipfile or zlib.

    Sources: PKWARE's APPNOTE 6.3.3 (ZIP), NumPy's NEP 1 (.npy, version 1.0).
    """
    parts, entries, at = [], [], 0
    for name, array in arrays.items():
        data, path = _npy(array), f"{name}.npy".encode("ascii")
        about = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, ZIP_DATE, zlib.crc32(data), len(data), len(data), len(path), 0)
        parts += [b"PK\x03\x04", about, path, data]
        entries += [b"PK\x01\x02", struct.pack("<H", 0x0314), about, struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, at), path]
        at += 4 + len(about) + len(path) + len(data)
    directory = b"".join(entries)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, len(arrays), len(arrays), len(directory), at, 0)
    return b"".join((*parts, directory, end))


def _npy(array: NDArray[Any]) -> bytes:
    plain = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    head = f"{{'descr': '{plain.dtype.str}', 'fortran_order': False, 'shape': {plain.shape}, }}".encode("ascii")
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + plain.tobytes()


def read_soft(data: bytes) -> Soft:
    """A member, read by numpy. Raises FormatError, saying what is wrong, when it is not as the format says."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, BadZipFile, KeyError, AttributeError, NotImplementedError, struct.error, zlib.error) as error:
        raise FormatError(f"cannot be read by numpy ({type(error).__name__})") from None
    if tuple(arrays) != ARRAYS:
        raise FormatError(f"holds {', '.join(arrays) or 'nothing'}, not {', '.join(ARRAYS)}")
    soft = Soft(*arrays.values())
    kinds = ((soft.logits, "f", 2), (soft.boxes, "i", 2), (soft.flip, "b", 1))
    if any(a.dtype.kind != kind or a.ndim != ndim for a, kind, ndim in kinds) or soft.boxes.shape != (len(soft.logits), 4):
        raise FormatError(f"holds arrays of shapes {', '.join(str(a.shape) for a in soft)}")
    if soft.flip.shape != soft.logits.shape[:1] or soft.to_bytes() != data:
        raise FormatError("is not written as its format says")
    if not np.isfinite(soft.logits).all() or (soft.boxes[:, 2:] < 1).any():
        raise FormatError("holds a logit that is not finite, or an empty box")
    return soft


def narrow(boxes: NDArray[np.int32]) -> NDArray[np.signedinteger]:
    """Boxes of shape (V, 4) as int16, or as they are where that does not hold them and their edges, top + height and left + width.

    Not as int8, which would do for small images: whoever adds top to height would leave it.
    """
    furthest = max(int(np.abs(boxes).max()), int((boxes[:, :2].astype(np.int64) + boxes[:, 2:]).max()))
    return boxes.astype(np.int16) if furthest < 1 << 15 else boxes


def dtype_of(cache: LogitCache) -> str:
    """The dtype of exported logits: float32 where the cache holds float32, else float16, which is finer than any code of a cache."""
    return "float32" if cache.manifest.config.get("dtype") == "float32" else "float16"


@dataclass(frozen=True)
class Export:
    """What is exported: the samples of a data set or subset that decode, with the first `views` views of a cache that was joined to it."""

    data: Dataset
    joined: Joined
    views: int

    @cached_property
    def shards(self) -> list[int]:
        """The subset's shards that hold a sample to export, ascending: the n-th becomes `shard-%06d.tar` of n."""
        found: list[int] = np.unique(self.data.shards[self.data.usable()]).tolist()
        return found

    @property
    def names(self) -> list[str]:
        """The shards' names, in order."""
        return [dataset.SHARD % n for n in range(len(self.shards))]

    @property
    def dtype(self) -> type[np.floating]:
        """Of the logits."""
        return DTYPES[dtype_of(self.joined.cache)]

    @property
    def member_bytes(self) -> int:
        """The length of a sample's member, where its boxes fit int16."""
        classes = len(self.data.classes)
        empty = Soft(np.zeros((self.views, classes), self.dtype), np.ones((self.views, 4), np.int16), np.zeros(self.views, bool))
        return len(empty.to_bytes())

    @property
    def bytes(self) -> int:
        """About how long the tars will be; to the byte for shards that we have written, whose boxes fit int16."""
        records = int(self._places[1][self.data.usable()].sum())
        soft = len(self.data.usable()) * (tar.BLOCK + tar.padded(self.member_bytes))
        return records + soft + len(self.shards) * len(tar.END)

    @cached_property
    def _places(self) -> list[NDArray[np.int64]]:
        return [self.data.index[name].to_numpy() for name in ("offset", "length", "image_offset")]

    def write(self, build: Build, number: int, tick: Callable[[int], None]) -> None:
        """Write the shard of one number. `tick` gets samples done. Raises SourceError and FormatError as `samples` does."""
        facts: dict[str, Any] = {"images": []}
        with build.create(self.names[number], facts) as sink:
            for sample in self.samples(self.data.rows_of(self.shards[number])):
                sink.write(sample.record())
                if sample.extension not in facts["images"]:
                    facts["images"] = sorted([*facts["images"], sample.extension])
                tick(1)
            sink.write(tar.END)

    def samples(self, rows: NDArray[np.int64]) -> Iterator[Sample]:
        """The samples of some rows, as they are written.

        Raises SourceError for an image that is not the one that was indexed, and names that fit no tar; FormatError for a broken cache.
        """
        joined = copy.copy(self.joined)  # which has nothing open: what is read for one shard is let go with it
        per_sample = self.views * (len(self.data.classes) * np.dtype(self.dtype).itemsize + 17)
        for part in order.batches(rows, max(1, AT_ONCE // per_sample)):
            for row, soft in zip(part.tolist(), self._soft(joined, part), strict=True):
                yield self._sample(row, soft)

    def _soft(self, joined: Joined, rows: NDArray[np.int64]) -> Iterator[Soft]:
        logits = np.empty((len(rows), self.views, len(self.data.classes)), self.dtype)
        boxes = np.empty((len(rows), self.views, 4), np.int32)
        flip = np.empty((len(rows), self.views), np.bool_)
        for view in range(self.views):
            found = joined.read(rows, view)
            logits[:, view] = np.maximum(found.logits, np.finfo(self.dtype).min)
            boxes[:, view] = np.stack([getattr(found, side) for side in GEOMETRY], 1)
            flip[:, view] = found.flip
        for n in range(len(rows)):
            yield Soft(logits[n], narrow(boxes[n]), flip[n])

    def _sample(self, row: int, soft: Soft) -> Sample:
        data, image = self.data, self.data.image_bytes(row)
        offset, length, at = (int(column[row]) for column in self._places)
        path, key, label = str(data.shard_paths[data.shards[row]]), str(data.ids[row]), int(data.labels[row])
        raw = bytes(data.maps[int(data.shards[row])][offset : offset + length])
        record = next(tar.records(raw + tar.END, path), None)
        if record is None:
            raise SourceError(f"{path} was changed: sample {key!r} is not where it was indexed; make or fetch {data.folder} again")
        others = [(e, raw[m.data : m.data + m.size]) for e, m in record.members.items() if offset + m.data != at and e != "cls"]
        sample = Sample(key, image, None if label < 0 else label, path, (*others, (MEMBER, soft.to_bytes())))
        _check_names(sample)
        return sample


def _check_names(sample: Sample) -> None:
    extensions = [sample.extension, "cls", *(extension for extension, _ in sample.others)]
    twice = next((e for n, e in enumerate(extensions) if e in extensions[:n]), None)
    if twice is not None:
        raise SourceError(f"{sample.origin} sample {sample.key!r} has a member .{twice} beside the one that gets this name: leave it out")
    longest = max((f"{sample.key}.{extension}" for extension in extensions), key=len)
    if not (longest.isascii() and longest.isprintable()) or len(longest) > NAME_BYTES or not all(map(str.isascii, extensions)):
        raise SourceError(
            f"{sample.origin} sample {sample.key!r} would have a member {longest!r}: at most {NAME_BYTES} bytes of printable ASCII fit a "
            f"tar header; pack the set again with shorter names (`kdprune-data import` escapes what is not ASCII)"
        )
