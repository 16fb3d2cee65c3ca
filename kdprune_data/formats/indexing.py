"""`index.parquet`: a row per sample, in tar order, with the place of its record and of its image; and what is counted when one is written.

`Rows` collects the rows of one shard; `write_index` writes those of all, with `sizes.json` and `SHA256SUMS`. `docs/formats.md`, "Data set".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError
from kdprune_data.formats import manifest as m
from kdprune_data.formats import table
from kdprune_data.formats.build import Build

INDEX = "index.parquet"
SELECTION = "selection.parquet"

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
    twice = order.first_repeat(index["uid"].to_numpy())
    if twice is not None:
        a, b = (index["id"][n].as_py() for n in twice)
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
        "samples": len(index),
        "ok": int(index["ok"].to_numpy(zero_copy_only=False).sum()),
        "shards": len(shard_names),
        "labelled": int((labels >= 0).sum()),
        "per_class": np.bincount(labels[labels >= 0], minlength=len(classes)).tolist(),
    } | noisy
    return Facts(counts, m.content_of(index["id"], digests_of(index["sha256"]), labels))


def unusable(index: pa.Table) -> list[str]:
    """The ids of the samples that do not decode, in tar order."""
    ok = index["ok"].to_numpy(zero_copy_only=False)
    found: list[str] = index["id"].take(pa.array(np.flatnonzero(~ok))).to_pylist()
    return found


def shard_names(paths: Sequence[Path]) -> list[str]:
    """What `sizes.json` calls the shards: by their files' names, with the shard's number before it where several files share one."""
    names = [p.name for p in paths]
    return names if len(set(names)) == len(names) else [f"{n}/{name}" for n, name in enumerate(names)]


def image_digest(data: bytes) -> bytes:
    """sha256 of an image's encoded bytes."""
    return hashlib.sha256(data).digest()
