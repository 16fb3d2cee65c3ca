"""The logit cache on disk: per shard, the rows once, and per range of views the geometry and the teacher's logits, memory-mapped.

`LogitCache.open` reads a finished cache; `join` aligns it with a data set by id, once, into integer row numbers; `Joined.read` gathers a
batch of one view. Every check that stands between a student and wrong soft labels is here. `docs/formats.md`, "Logits".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError, MismatchError, UsageError, some
from kdprune_data.formats import indexing, table
from kdprune_data.formats import manifest as m
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

ROWS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sha256", pa.binary(32)),
        ("label", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("top1_correct", pa.int32()),
    ]
)
GEOMETRY = ("top", "left", "height", "width")
PART_BYTES = 256_000_000
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}


class ViewRows(NamedTuple):
    """One view of n samples: boxes as int32 of shape (n,), flip as bool of shape (n,), logits as float16 or float32 of shape (n, c)."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]
    logits: NDArray[np.floating]


def rows_path(shard: int) -> str:
    """The rows file of a shard."""
    return f"rows/shard-{shard:06d}.parquet"


def view_path(first: int, last: int, shard: int) -> str:
    """The file of views first to last (both included) of a shard."""
    return f"views-{first:04d}-{last:04d}/shard-{shard:06d}.arrow"


def stored(logits: NDArray[np.float32], dtype: str) -> NDArray[np.floating]:
    """Logits as they are stored: z - max(z), in `dtype`, clipped to what it holds. Shape (n, c) in and out."""
    shifted = logits - logits.max(1, keepdims=True)
    kind = DTYPES[dtype]
    return np.asarray(np.maximum(shifted, np.finfo(kind).min), kind)


def rows_digest(ids: Iterable[str], sha256: NDArray[np.uint8]) -> str:
    """sha256 (hex) over `id NUL image-sha256 LF` of a shard's rows: a view file names the rows it belongs to."""
    lines = (f"{one}\0{digest}\n" for one, digest in zip(ids, m.hexes(sha256), strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def top1(logits: NDArray[np.floating], labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether the largest logit (the first of equals) is the label's: bool of shape (n,), False where there is no label."""
    return np.asarray(logits.argmax(1) == labels)


def ranges(first: int, last: int, per_view: int) -> list[tuple[int, int]]:
    """Split views first..last (both included) so that no file passes 256 MB, or holds one view. per_view: bytes of the largest shard's."""
    width = max(1, PART_BYTES // max(per_view, 1))
    return [(at, min(at + width - 1, last)) for at in range(first, last + 1, width)]


def write_rows(build: Build, shard: int, data: Dataset, rows: NDArray[np.int64], correct: NDArray[np.int32]) -> None:
    """Write the rows of a shard. correct: int32 of shape (n,), in how many views of the first range the top 1 was the label."""
    columns = [data.index[name].take(pa.array(rows)) for name in ("id", "sha256", "label", "height", "width")]
    with build.create(rows_path(shard)) as sink:
        table.write(sink, pa.table([*columns, pa.array(correct, pa.int32())], schema=ROWS_SCHEMA))


def write_views(build: Build, path: str, views: Sequence[ViewRows], metadata: Mapping[str, Any]) -> None:
    """Write one view file: a record batch per view, metadata (texts, or JSON values) in the schema."""
    names = [*GEOMETRY, "flip", "logits"]
    kinds = [_narrowest([getattr(v, side) for v in views]) for side in GEOMETRY]
    classes = views[0].logits.shape[1]
    logit_kind = pa.list_(pa.from_numpy_dtype(views[0].logits.dtype), classes)
    texts = {k: v if isinstance(v, str) else m.canonical(v).decode() for k, v in metadata.items()}
    schema = pa.schema(list(zip(names, [*kinds, pa.bool_(), logit_kind], strict=True)), metadata=texts)
    batches = []
    for view in views:
        arrays = [pa.array(getattr(view, side), kind) for side, kind in zip(GEOMETRY, kinds, strict=True)]
        logits = pa.FixedSizeListArray.from_arrays(pa.array(view.logits.reshape(-1)), classes)
        batches.append(pa.record_batch([*arrays, pa.array(view.flip), logits], schema=schema))
    with build.create(path) as sink:
        table.ipc_write(sink, batches, schema)


def _narrowest(columns: Sequence[NDArray[np.int32]]) -> pa.DataType:
    low, high = min(int(c.min()) for c in columns), max(int(c.max()) for c in columns)
    return next(k for k, bound in ((pa.int8(), 1 << 7), (pa.int16(), 1 << 15), (pa.int32(), 1 << 31)) if -bound <= low and high < bound)


@dataclass(frozen=True)
class LogitCache:
    """A finished logit cache, opened for reading."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> LogitCache:
        """Open a cache. Raises UsageError when the folder is none, FormatError when a view of it is missing."""
        folder = Path(folder)
        cache = cls(folder, Manifest.load(folder, kinds=("logits",)))
        covered = sorted({(a, b) for a, b, _ in cache.parts})
        if [v for a, b in covered for v in range(a, b + 1)] != list(range(cache.views)):
            raise FormatError(f"{folder} says {cache.views} views, its files hold {covered}: run cache again, or fetch it again")
        return cache

    @property
    def views(self) -> int:
        """How many views there are, numbered from 0."""
        return int(self.manifest.counts["views"])

    @property
    def policy(self) -> Mapping[str, Any]:
        """The view policy, as stored."""
        found: Mapping[str, Any] = self.manifest.config["policy"]
        return found

    @property
    def teacher(self) -> Mapping[str, Any]:
        """The teacher, as an input's description."""
        return self.manifest.ancestor("teacher")

    @cached_property
    def parts(self) -> list[tuple[int, int, int]]:
        """(first view, last view, shard) of every view file."""
        names = [f.path for f in self.manifest.files if f.path.startswith("views-")]
        return [(int(n[6:10]), int(n[11:15]), int(n.split("shard-")[1][:6])) for n in names]

    @cached_property
    def shards(self) -> list[int]:
        """The shards it has rows for, ascending."""
        return sorted({shard for _, _, shard in self.parts})

    def rows(self, shard: int) -> pa.Table:
        """The rows of a shard, as in ROWS_SCHEMA."""
        return table.read(self.folder / rows_path(shard), ROWS_SCHEMA)

    def join(self, data: Dataset) -> Joined:
        """Align with a data set by id. Raises MismatchError when a sample has no row, or its image or label is another."""
        tables = [self.rows(shard) for shard in self.shards]
        lengths = [len(t) for t in tables]
        rows = pa.concat_tables(tables).combine_chunks()
        wanted = data.usable()
        found = order.locate(order.uids_of(rows["id"].to_pylist()), data.uids[wanted])
        absent = data.ids[wanted[found < 0]]
        if len(absent):
            raise MismatchError(
                f"{self.folder} has no logits for {len(absent):,} of {len(wanted):,} samples of {data.folder} ({some(absent)}): "
                f"run `kdprune-data cache {data.folder}`, or use the cache of a set that holds them"
            )
        self._same(data, wanted, rows.take(pa.array(found)))
        place = np.full(len(data), -1, np.int64)
        place[wanted] = found
        return Joined(self, place, np.concatenate([[0], np.cumsum(lengths)]))

    def _same(self, data: Dataset, wanted: NDArray[np.int64], rows: pa.Table) -> None:
        if (rows["sha256"].null_count == 0) != data.has_digests:
            with_them, without = (data.folder, self.folder) if data.has_digests else (self.folder, data.folder)
            raise MismatchError(
                f"{without} has no digests of its images (index --no-digests) and {with_them} has: nothing tells whether they are the same "
                f"images; run `kdprune-data cache {data.folder}`, or index the shards again with digests"
            )
        for what, mine, theirs in (
            ("id", np.asarray(rows["id"].to_pylist(), object), data.ids[wanted]),
            ("image", indexing.digests_of(rows["sha256"]), data.sha256[wanted]),
            ("label", indexing.labels_of(rows["label"]), data.labels[wanted]),
        ):
            differs = np.asarray(mine != theirs)
            bad = data.ids[wanted[differs.any(1) if differs.ndim > 1 else differs]]
            if len(bad):
                raise MismatchError(
                    f"{self.folder} was made of other data: the {what} of {len(bad):,} samples of {data.folder} differs ({some(bad)}); "
                    f"run `kdprune-data cache {data.folder}`"
                )


@dataclass(frozen=True)
class Joined:
    """A cache aligned with a data set. `place`: int64, for each row of the data set its row in the cache's rows, -1 for none."""

    cache: LogitCache
    place: NDArray[np.int64]
    starts: NDArray[np.int64]
    _open: dict[tuple[int, int], ViewRows] = field(default_factory=dict)

    def read(self, rows: NDArray[np.int64], view: int) -> ViewRows:
        """One view of some rows of the data set, in their order.

        Raises UsageError for a view that is not there, FormatError for a file that does not belong to its rows.
        """
        if not 0 <= view < self.cache.views:
            raise UsageError(f"{self.cache.folder} has views 0 to {self.cache.views - 1}, not {view}: make more with cache --views")
        place = self.place[rows]
        member = np.searchsorted(self.starts, place, side="right") - 1
        pieces = []
        for n in np.unique(member):
            at = np.flatnonzero(member == n)
            whole = self._view(self.cache.shards[n], view)
            pieces.append((at, [column[place[at] - self.starts[n]] for column in whole]))
        if len(pieces) == 1:
            return ViewRows(*pieces[0][1])
        back = np.argsort(np.concatenate([at for at, _ in pieces]), kind="stable")
        return ViewRows(*(np.concatenate(columns)[back] for columns in zip(*(c for _, c in pieces), strict=True)))

    def _view(self, shard: int, view: int) -> ViewRows:
        found = self._open.get((shard, view))
        if found is None:
            found = self._open[shard, view] = read_view(self.cache, shard, view)
        return found

    def __reduce__(self) -> tuple[object, ...]:
        return (Joined, (self.cache, self.place, self.starts))


def read_view(cache: LogitCache, shard: int, view: int) -> ViewRows:
    """One whole view of a shard, logits as a memory map. Raises FormatError when the file does not belong to its rows or to its teacher,
    or when its labels are not where they were (a shifted join)."""
    first, last, _ = next(p for p in cache.parts if p[2] == shard and p[0] <= view <= p[1])
    path = cache.folder / view_path(first, last, shard)
    reader, rows = table.ipc_open(path), cache.rows(shard)
    try:
        metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
        _check_view(path, metadata, cache, rows)
        found = _view_rows(reader.get_batch(view - first))
        recorded = int(json.loads(metadata["top1_correct"])[view - first])
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
        raise FormatError(f"{path} does not hold view {view} as its format says ({type(error).__name__}): make or fetch it again") from None
    if len(found.logits) != len(rows):
        raise FormatError(f"{path} has {len(found.logits):,} rows, {rows_path(shard)} has {len(rows):,}: make or fetch it again")
    counted = int(top1(found.logits, indexing.labels_of(rows["label"])).sum())
    if counted != recorded:
        raise FormatError(
            f"{path}: in view {view} the largest logit is the label's in {counted:,} rows, when it was written in {recorded:,}: "
            f"rows and logits do not belong together; run cache again"
        )
    return found


def _view_rows(batch: pa.RecordBatch) -> ViewRows:
    logits = batch.column("logits").flatten().to_numpy().reshape(len(batch), -1)
    # Stored in the narrowest integer: sums such as top + height would leave an int8.
    top, left, height, width = (np.asarray(batch.column(c).to_numpy(), np.int32) for c in GEOMETRY)
    return ViewRows(top, left, height, width, np.asarray(batch.column("flip").to_numpy(zero_copy_only=False)), logits)


def _check_view(path: Path, metadata: Mapping[str, str], cache: LogitCache, rows: pa.Table) -> None:
    expected = {
        "format": ("1", "is not of format 1, which this version reads"),
        "rows": (
            rows_digest(rows["id"].to_pylist(), indexing.digests_of(rows["sha256"])),
            "was made for other samples than the rows beside it",
        ),
        "teacher": (cache.teacher["digest"], f"holds the logits of another teacher than {cache.teacher['name']}, which the manifest names"),
        "policy": (m.canonical(cache.policy).decode(), "has views of another policy than the manifest's"),
    }
    for key, (value, wrong) in expected.items():
        if metadata.get(key) != value:
            raise FormatError(f"{path} {wrong}: run cache again, or fetch it again")
