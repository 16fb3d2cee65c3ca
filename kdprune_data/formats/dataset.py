"""The data set on disk, opened for reading: tar shards and their index; a subset too.

The index holds a row per sample in tar order with the place of its record and of its image, so reading a sample is a slice of a memory map
and pruning is a copy of byte ranges. `docs/formats.md`, "Data set".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.errors import FormatError, MismatchError, SourceError
from kdprune_data.formats import indexing, table
from kdprune_data.formats import manifest as m
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.members import Members, Numbering, root_config
from kdprune_data.formats.tar import Maps

SHARD = "shard-%06d.tar"
SHARD_SAMPLES = 10_000
SHARD_BYTES = 256_000_000
WEIGHTS_SCHEMA = pa.schema([("uid", pa.uint64()), ("weight", pa.float32())])
"""What is read of `selection.parquet` for the weights."""


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
        index = table.read(folder / indexing.INDEX)
        table.check(folder / indexing.INDEX, index.schema, indexing.NOISY_SCHEMA if "label_true" in index.column_names else indexing.SCHEMA)
        if len(index) != manifest.counts["samples"]:
            raise FormatError(
                f"{folder / indexing.INDEX} has {len(index):,} rows, the manifest says {manifest.counts['samples']:,}: fetch it again"
            )
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
        return indexing.labels_of(self.index["label"])

    @cached_property
    def true_labels(self) -> NDArray[np.int32]:
        """int32 of shape (n,), -1 where there is none: the labels as the source had them, where some were changed by `--label-noise`."""
        return indexing.labels_of(self.index["label_true"]) if "label_true" in self.index.column_names else self.labels

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
        return indexing.digests_of(self.index["sha256"])

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """float32 of shape (n,): how much each sample counts in a student's loss; 1 in a data set.

        Raises FormatError when the subset's table is not of its samples, SourceError as `read_weights` does.
        """
        if self.manifest.kind != "subset":
            return np.ones(len(self), np.float32)
        self.manifest.checked(self.folder, indexing.SELECTION)
        uids, weights = read_weights(self.folder)
        if not np.array_equal(uids, self.uids):
            raise FormatError(f"{self.folder / indexing.SELECTION} is not of the samples of {indexing.INDEX}: make or fetch it again")
        return weights

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
    def _places(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Of every image: its shard, and where it starts and ends there."""
        starts = self._column("image_offset", np.int64)
        return self.shards, starts, starts + self._column("image_length", np.int64)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of one sample, checked as `read` checks it. Raises SourceError as `read` does."""
        return self.read((row,))[0]

    def read(self, rows: NDArray[np.integer] | Sequence[int]) -> list[bytes]:
        """The encoded images of some samples, in the order of `rows` (int of shape (n,)); n bytes objects.

        Every image's digest is checked against the index (a tenth of what decoding costs): shards that lie elsewhere may be replaced. In a
        set without digests only the lengths are. May be called by several threads.
        Raises SourceError, for the first such row, when a shard is missing, or holds other bytes than were indexed.
        """
        at = np.asarray(rows, np.int64)
        shards, starts, ends = (column[at].tolist() for column in self._places)
        maps = self.maps.together(set(shards))
        found = [maps[shard][start:end] for shard, start, end in zip(shards, starts, ends, strict=True)]
        if self.has_digests:
            there, said = b"".join(map(indexing.image_digest, found)), self.sha256[at].tobytes()
            changed = [n for n in range(len(found)) if there[32 * n : 32 * n + 32] != said[32 * n : 32 * n + 32]] if there != said else []
        else:
            changed = [n for n, one in enumerate(found) if len(one) != ends[n] - starts[n]]
        if changed:
            raise self.changed(int(at[changed[0]]))
        return found

    def changed(self, row: int) -> SourceError:
        """The error for a sample that is not what was indexed any more."""
        path, sample = self.shard_paths[int(self.shards[row])], self.index["id"][row].as_py()
        return SourceError(f"{path} was changed: sample {sample!r} is not the image that was indexed; make or fetch {self.folder} again")

    def check_outside(self, shards: Sequence[int]) -> None:
        """Raise SourceError unless these shards, where they lie outside the folder, have the bytes that the manifest says."""
        for n in shards if self.manifest.outside else ():
            path, said = self.shard_paths[n], self.manifest.outside[n].bytes
            there = path.stat().st_size if path.is_file() else None
            if there is not None and there != said:  # one that is missing is said when it is opened
                raise SourceError(f"{path} has {there:,} bytes, {self.folder} says {said:,}: fetch it again, or index the set again")

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
            if sorted(self.classes) == sorted(other):
                n, (ours, theirs) = next((n, both) for n, both in enumerate(zip(self.classes, other, strict=True)) if both[0] != both[1])
                raise MismatchError(
                    f"{self.folder} has the classes of {whose} in another order (class {n} is {ours!r}, there {theirs!r}): "
                    "use data with the same classes in the same order"
                )
            raise MismatchError(
                f"{self.folder} has {len(self.classes)} classes ({', '.join(self.classes[:3])}, ...), {whose} {len(other)} "
                f"({', '.join(other[:3])}, ...): use data with the same classes in the same order"
            )

    def _column(self, name: str, kind: Any) -> NDArray[Any]:
        return np.asarray(self.index[name].to_numpy(zero_copy_only=False), dtype=kind)


def read_weights(folder: Path) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Uids and weights of a subset's samples, in tar order.

    Raises FormatError when the table cannot be read, SourceError for a weight that is negative or no finite number.
    """
    path = folder / indexing.SELECTION
    found = table.read(path, WEIGHTS_SCHEMA, columns=WEIGHTS_SCHEMA.names)
    uids = np.asarray(found["uid"].to_numpy(), np.uint64)
    weights = np.array(found["weight"].to_numpy(zero_copy_only=False), np.float32)  # its own memory: torch takes no other
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        first = table.read(path, columns=["id"])["id"][int(bad[0])].as_py()
        raise SourceError(
            f"{path}: of {len(weights):,} weights {len(bad):,} are negative or no finite numbers, the first {weights[bad[0]]:g} of "
            f"{first!r}: make or fetch the subset again"
        )
    return uids, weights
