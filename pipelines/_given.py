"""Logits from elsewhere: a Parquet file of somebody's, joined by id, takes the teacher's place in `cache --from FILE`.

Columns `id` and `logits`, a row a sample, for whole images; or also `view`, `top left height width` and `flip`, a row for every view.
`docs/formats.md`, "Logits from elsewhere".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kdprune_pipelines._console import count, say
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, UsageError, first_line, some
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logit_files import GEOMETRY
from kdprune_data.formats.manifest import sha256_file

if TYPE_CHECKING:
    from kdprune_data.learn.policy import Policy
    from kdprune_data.learn.views import Geometry

BOXES = ("view", *GEOMETRY, "flip")
FARTHEST = 2**20
"""No number of a box is larger: no image is."""


@dataclass(frozen=True)
class Given:
    """Logits of every view of every sample that decodes. logits: float32 of shape (n, v, c); given: int32 of shape (n, v, 5), top, left,
    height, width and flip, None for the policy's; place: int64, for each row of the data its place in these, -1 for none."""

    data: Dataset
    policy: Policy
    sha256: str
    logits: NDArray[np.float32]
    given: NDArray[np.int32] | None
    place: NDArray[np.int64]
    batch: int = 4096

    @property
    def views(self) -> int:
        """How many there are of each sample."""
        return int(self.logits.shape[1])

    def boxes(self, rows: NDArray[np.int64], view: int) -> Geometry:
        """See `_asking.Source`."""
        from kdprune_data.learn.views import Geometry, geometry

        if self.given is None:
            return geometry(self.policy, self.data.uids[rows], self.data.sizes[rows], view)
        top, left, height, width, flip = np.ascontiguousarray(self.given[self.place[rows], view].T)
        return Geometry(top, left, height, width, flip != 0)

    def said(
        self, rows: NDArray[np.int64], views: Sequence[int], batches: Iterable[NDArray[np.int64]]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See `_asking.Source`."""
        for at in batches:
            for n, view in enumerate(views):
                yield n, self.logits[self.place[rows[at]], view]

    def metadata(self) -> dict[str, Any]:
        """See `_asking.Source`."""
        return {"teacher": self.sha256, "normalisation": None}


def read(path: Path, data: Dataset, size: int | None) -> Given:
    """Read somebody's logits for a data set. size: the side of the views in pixels, None for the images' own or 224.

    Raises UsageError for a file that is none or lacks columns, SourceError for what does not fit the data: rows that are missing or given
    twice, logits of another number of classes, numbers that are not finite.
    """
    from kdprune_data.learn import policy as policies

    table = _table(path)
    boxed = "view" in table.column_names
    logits, view = _logits(path, table, len(data.classes)), _whole(path, table, "view") if boxed else np.zeros(len(table), np.int64)
    place, sample = _samples(path, table, data)
    views = int(view.max(initial=0)) + 1
    used = np.flatnonzero(sample >= 0)
    if len(used) < len(table):
        say(f"{count(len(table) - len(used), 'row')} of {path} of ids that {data.folder} does not have, or that do not decode: left out")
    n = int(place.max()) + 1
    if views > len(table):
        raise SourceError(f"{path}: view {views - 1} is given, of {len(table):,} rows: number views from 0, without gaps")
    at = sample[used] * views + view[used]
    times = np.bincount(at, minlength=n * views)
    if (times != 1).any():
        cell = int(np.flatnonzero(times != 1)[0])
        one = data.ids[np.flatnonzero(place == cell // views)[0]]
        wrong = "has no row" if times[cell] == 0 else f"has {times[cell]} rows"
        raise SourceError(f"{path}: view {cell % views} of {one!r} {wrong}: give every view of every sample once, {views} of each")
    rows = np.empty(n * views, np.int64)
    rows[at] = used
    base = policies.policy_for(data.sizes[data.usable()], data.classes, size=size, flip="off", seed=0)
    policy = policies.Policy("given", base.size, flip=False, seed=0) if boxed else policies.identity(base)
    given = _boxes(path, table)[rows].reshape(n, views, 5) if boxed else None
    return Given(data, policy, sha256_file(path), logits[rows].reshape(n, views, -1), given, place)


def _table(path: Path) -> pa.Table:
    if not path.is_file():
        raise UsageError(
            f"--from {path} {'is a folder' if path.is_dir() else 'does not exist'}: give a Parquet file with the columns id and logits"
        )
    try:
        names = pq.ParquetFile(path).schema_arrow.names
        wanted = ["id", "logits", *(BOXES if "view" in names else ())]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UsageError(f"--from {path} has no column {missing[0]!r}: it has {', '.join(names)}; expected {', '.join(wanted)}")
        table = pq.read_table(path, columns=wanted)
        return table.set_column(table.column_names.index("id"), "id", _plain_text(table["id"])).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"--from {path} cannot be read as Parquet ({first_line(error)})") from None


def _plain_text(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text that is stored in another way, as pandas stores categories, as text; else the same."""
    kind = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    return ids.cast(pa.large_string()) if pa.types.is_string(kind) or pa.types.is_string_view(kind) else ids


def _logits(path: Path, table: pa.Table, classes: int) -> NDArray[np.float32]:
    column = table["logits"].combine_chunks()
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
        raise SourceError(f"{path}: column 'logits' is {kind}: expected lists of numbers, one per class")
    lengths = np.asarray(column.value_lengths().fill_null(0) if not pa.types.is_fixed_size_list(kind) else [kind.list_size] * len(column))
    if column.null_count or (lengths != classes).any():
        other = int(lengths[lengths != classes][0]) if (lengths != classes).any() else "null"
        raise SourceError(f"{path}: a row has {other} logits, the data have {classes} classes: one number for each, in their order")
    with np.errstate(over="ignore"):  # which is told here
        values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, classes)
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        ids = some(table["id"].take(pa.array(bad)).to_pylist())
        raise SourceError(f"{path}: the logits of {ids} are not finite numbers that float32 holds: mend them")
    return values


def _samples(path: Path, table: pa.Table, data: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row of the data its place among the samples that decode, and for each row of the file that of its sample; -1 for none.

    Raises SourceError where a sample has no row.
    """
    kind = table.schema.field("id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or table["id"].null_count:
        nulls = " with nulls" if table["id"].null_count else ""
        raise SourceError(f"{path}: column 'id' is {kind}{nulls}: expected the ids of the data, as text")
    wanted = data.usable()
    place = np.full(len(data), -1, np.int64)
    place[wanted] = np.arange(len(wanted))
    sample = order.locate(data.uids[wanted], order.uids_of(table["id"].to_pylist()))
    absent = data.ids[wanted[np.bincount(sample[sample >= 0], minlength=len(wanted)) == 0]]
    if len(absent):
        raise SourceError(f"{path} has no logits for {len(absent):,} of {len(wanted):,} samples of {data.folder} ({some(absent)})")
    return place, sample


def _whole(path: Path, table: pa.Table, name: str) -> NDArray[np.int64]:
    column = table[name].combine_chunks()
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise SourceError(f"{path}: column {name!r} is {column.type}{' with nulls' if column.null_count else ''}: expected whole numbers")
    values = np.asarray(column.to_numpy(zero_copy_only=False)).astype(np.int64)
    least = {"view": 0, "height": 1, "width": 1, "flip": 0}.get(name, -FARTHEST)
    most = 1 if name == "flip" else 9_999 if name == "view" else FARTHEST
    if len(values) and not least <= int(values.min()) <= int(values.max()) <= most:
        raise SourceError(f"{path}: column {name!r} has values from {values.min()} to {values.max()}: they are from {least} to {most}")
    return values


def _boxes(path: Path, table: pa.Table) -> NDArray[np.int32]:
    """int32 of shape (rows, 5)."""
    return np.stack([_whole(path, table, name).astype(np.int32) for name in (*GEOMETRY, "flip")], 1)
