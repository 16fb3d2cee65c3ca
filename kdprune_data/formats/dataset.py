"""The data set on disk: tar shards and `index.parquet`. `Dataset` reads one (a subset too); `Rows` collects the index of one being made.

The index holds a row per sample in tar order with the place of its record and of its image, so reading a sample is a slice of a memory map
and pruning is a copy of byte ranges. `docs/formats.md`, "Data set".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError, MismatchError, SourceError
from kdprune_data.formats import manifest as m
from kdprune_data.formats import table
from kdprune_data.formats.build import Build
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.members import Members, Numbering, root_config
from kdprune_data.formats.tar import Maps

INDEX = "index.parquet"
SELECTION = "selection.parquet"
SHARD = "shard-%06d.tar"
SHARD_SAMPLES = 10_000
SHARD_BYTES = 256_000_000

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("uid", pa.uint64()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("label", pa.int32()),
        ("image_offset", pa.int64()),
        ("image_length", pa.int64()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("ok", pa.bool_()),
    ]
)
NOISY_SCHEMA = SCHEMA.append(pa.field("label_true", pa.int32()))
"""Of a data set that was imported with `--label-noise`, and of its subsets: `label` is the noisy one."""


@dataclass(frozen=True)
class Dataset:
    """A data set or subset, opened for reading. Arrays are in tar order, one entry per sample; nothing is decoded here."""

    folder: Path
    manifest: Manifest
    index: pa.Table

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a finished data set or subset.

        Raises UsageError when the folder is neither, FormatError when its files are not what the manifest says.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder, kinds=("dataset", "subset"))
        index = table.read(folder / INDEX)
        table.check(folder / INDEX, index.schema, NOISY_SCHEMA if "label_true" in index.column_names else SCHEMA)
        if len(index) != manifest.counts["samples"]:
            raise FormatError(f"{folder / INDEX} has {len(index):,} rows, the manifest says {manifest.counts['samples']:,}: fetch it again")
        return cls(folder, manifest, index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> Sequence[str]:
        """The class names, in label order."""
        return self.manifest.classes

    @cached_property
    def ids(self) -> NDArray[np.object_]:
        """str objects of shape (n,)."""
        return np.asarray(self.index["id"].to_pylist(), dtype=object)

    @cached_property
    def uids(self) -> NDArray[np.uint64]:
        """uint64 of shape (n,)."""
        return self._column("uid", np.uint64)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """int32 of shape (n,), -1 where there is none."""
        return labels_of(self.index["label"])

    @cached_property
    def true_labels(self) -> NDArray[np.int32]:
        """int32 of shape (n,), -1 where there is none: the labels as the source had them, where some were changed by `--label-noise`."""
        return labels_of(self.index["label_true"]) if "label_true" in self.index.column_names else self.labels

    @cached_property
    def shards(self) -> NDArray[np.int32]:
        """int32 of shape (n,): the number of each sample's shard."""
        return self._column("shard", np.int32)

    @cached_property
    def ok(self) -> NDArray[np.bool_]:
        """bool of shape (n,): the sample's image decodes."""
        return self._column("ok", np.bool_)

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """int32 of shape (n, 2): height and width in pixels."""
        return np.stack([self._column("height", np.int32), self._column("width", np.int32)], 1)

    @cached_property
    def sha256(self) -> NDArray[np.uint8]:
        """uint8 of shape (n, 32): the digest of each image's bytes; zeros where none was taken (`index --no-digests`)."""
        return digests_of(self.index["sha256"])

    @cached_property
    def has_digests(self) -> bool:
        """Each image's digest is known, so that a changed one is noticed."""
        return bool(self.index["sha256"].null_count == 0)

    @cached_property
    def origin(self) -> Mapping[str, Any]:
        """The config of the data set that this one was chosen from in the end, or its own: what a subset's records owe to it."""
        return root_config(self.manifest.as_input("data"))

    @cached_property
    def members(self) -> Members:
        """Which member of a sample is its image and which its label."""
        return Members.of(self.manifest.as_input("data"))

    @cached_property
    def numbering(self) -> Numbering:
        """Which class number each label is."""
        return Numbering(self.classes, named=True)

    @cached_property
    def shard_paths(self) -> list[Path]:
        """The tar of each shard number, inside the folder or outside."""
        if self.manifest.outside:
            return [m.place(self.folder, f.path) for f in self.manifest.outside]
        return [self.folder / f.path for f in self.manifest.files if f.path.endswith(".tar")]

    @cached_property
    def maps(self) -> Maps:
        """The shards, memory-mapped."""
        return Maps(self.shard_paths)

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._column("image_offset", np.int64), self._column("image_length", np.int64)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of one sample, its digest checked (a tenth of what decoding costs): shards that lie elsewhere may be replaced.

        Raises SourceError when its shard is missing, or holds other bytes than were indexed; in a set without digests, only when it is
        shorter than it was.
        """
        offset, length = self._places
        start, end = int(offset[row]), int(offset[row] + length[row])
        shard = int(self.shards[row])
        found = self.maps[shard][start:end]
        if len(found) != end - start or (self.has_digests and image_digest(found) != self.sha256[row].tobytes()):
            raise SourceError(
                f"{self.shard_paths[shard]} was changed: sample {self.ids[row]!r} is not the image that was indexed; "
                f"make or fetch {self.folder} again"
            )
        return found

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """The rows of one shard that decode, in tar order."""
        first, last = np.searchsorted(self.shards, [shard, shard + 1])
        return np.arange(first, last)[self.ok[first:last]]

    def usable(self) -> NDArray[np.int64]:
        """The rows that decode. Raises SourceError when there is none."""
        rows = np.flatnonzero(self.ok)
        if not len(rows):
            raise SourceError(f"{self.folder} has no sample that decodes: import it again")
        return rows

    def same_classes(self, other: Sequence[str], whose: str) -> None:
        """Raise MismatchError unless the classes are those of another artefact."""
        if list(self.classes) != list(other):
            raise MismatchError(
                f"{self.folder} has {len(self.classes)} classes ({', '.join(self.classes[:3])}, ...), {whose} {len(other)} "
                f"({', '.join(other[:3])}, ...): use data with the same classes in the same order"
            )

    def _column(self, name: str, kind: Any) -> NDArray[Any]:
        return np.asarray(self.index[name].to_numpy(zero_copy_only=False), dtype=kind)


def labels_of(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """A nullable label column as int32, -1 for null."""
    return np.asarray(column.fill_null(-1).to_numpy(), dtype=np.int32)


def label_array(labels: NDArray[np.int32]) -> pa.Array:
    """int32 labels as a nullable column, null for -1."""
    return pa.array(labels, pa.int32(), mask=labels < 0)


def digests_of(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """A column of 32-byte digests as uint8 of shape (n, 32), zeros for null."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(whole, pa.ChunkedArray):  # no rows, hence no chunk
        return np.zeros((0, 32), np.uint8)
    if whole.null_count == len(whole):
        return np.zeros((len(whole), 32), np.uint8)
    found = np.frombuffer(whole.buffers()[1], np.uint8)[whole.offset * 32 :][: len(whole) * 32].reshape(-1, 32)
    # What stands in the buffer at a null is anything.
    return found if not whole.null_count else np.where(whole.is_valid().to_numpy(zero_copy_only=False)[:, None], found, np.uint8(0))


@dataclass
class Rows:
    """The index rows of one shard, collected one by one, columns as in `index.parquet`."""

    shard: int
    schema: pa.Schema = SCHEMA
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.columns = {name: [] for name in self.schema.names}

    def add(self, **row: Any) -> None:
        """One sample; `uid` and `shard` are filled in."""
        for name, values in self.columns.items():
            if name in row:
                values.append(row[name])

    def table(self) -> pa.Table:
        """The rows as an index table."""
        ids = self.columns["id"]
        filled = self.columns | {"uid": order.uids_of(ids), "shard": np.full(len(ids), self.shard, np.int32)}
        return pa.table({field.name: pa.array(filled[field.name], field.type) for field in self.schema})


@dataclass(frozen=True)
class Facts:
    """What the manifest of a data set says of its samples."""

    counts: dict[str, Any]
    content: str


def write_index(build: Build, index: pa.Table, classes: Sequence[str], shard_names: Sequence[str]) -> Facts:
    """Write `index.parquet`, `sizes.json` and, where the shards are inside, `SHA256SUMS`; count, and compute the content.

    Raises SourceError when two ids are equal or share a uid.
    """
    ids = index["id"].to_pylist()
    uids = index["uid"].to_numpy()
    twice = order.first_repeat(uids)
    if twice is not None:
        a, b = (ids[n] for n in twice)
        what = f"id {a!r} occurs twice" if a == b else f"ids {a!r} and {b!r} share a uid"
        raise SourceError(f"{what}: ids must be unique; rename one (adopted shards: --id shard)")
    with build.create(INDEX) as sink:
        table.write(sink, index)
    per_shard = np.bincount(index["shard"].to_numpy(), minlength=len(shard_names))
    build.write("sizes.json", m.canonical(dict(zip(shard_names, per_shard.tolist(), strict=True))))
    sums = [f for f in build.files() if f.path.endswith(".tar") or f.path in (INDEX, SELECTION)]
    build.write("SHA256SUMS", "".join(f"{f.sha256}  {f.path}\n" for f in sums).encode())
    labels = labels_of(index["label"])
    noisy = {"noisy": int((labels != labels_of(index["label_true"])).sum())} if "label_true" in index.column_names else {}
    counts = {
        "samples": len(ids),
        "ok": int(index["ok"].to_numpy(zero_copy_only=False).sum()),
        "shards": len(shard_names),
        "labelled": int((labels >= 0).sum()),
        "per_class": np.bincount(labels[labels >= 0], minlength=len(classes)).tolist(),
    } | noisy
    return Facts(counts, m.content_of(ids, digests_of(index["sha256"]), labels))


def shard_names(paths: Sequence[Path]) -> list[str]:
    """What `sizes.json` calls the shards: by their files' names, with the shard's number before it where several files share one."""
    names = [p.name for p in paths]
    return names if len(set(names)) == len(names) else [f"{n}/{name}" for n, name in enumerate(names)]


def image_digest(data: bytes) -> bytes:
    """sha256 of an image's encoded bytes."""
    return hashlib.sha256(data).digest()
