"""A subset on disk: the parent's records, copied byte for byte into shards of their own, and `selection.parquet`, which says which and why.

The plan (which records go into which shard, at which bytes) is made before anything is copied, from the parent's index alone; so any
number of threads, on any machine, writes the same tars. `docs/formats.md`, "Subset".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.errors import FormatError
from kdprune_data.formats import dataset, indexing, table, tar
from kdprune_data.formats.blocks import BYTES, Runs
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.shards import Limits
from kdprune_data.formats.times import Spans

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("uid", pa.uint64()),
        ("sha256", pa.binary(32)),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
    ]
)
RANKING_SCHEMA = pa.schema([("id", pa.string()), ("score", pa.float32()), ("rank", pa.int64())])
RANKING = "ranking.parquet"


@dataclass(frozen=True)
class Plan:
    """Where each kept record goes. `rows` of the parent, ascending; `cuts`: shard n holds rows[cuts[n]:cuts[n + 1]]; of each new record its
    `offsets` in the shard, its `lengths`, where in it the image begins, `images`, and that one's bytes, `image_lengths`; `runs`: the bytes
    of the parent that it is made of, record i of runs[first[i]:first[i + 1]]."""

    rows: NDArray[np.int64]
    cuts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    images: NDArray[np.int64]
    image_lengths: NDArray[np.int64]
    runs: Runs
    first: NDArray[np.int64]

    @property
    def names(self) -> list[str]:
        """The shards' names, in order."""
        return [dataset.SHARD % n for n in range(len(self.cuts) - 1)]

    def blocks(self, number: int) -> Iterator[tuple[int, int]]:
        """The records of a shard in blocks of at most BYTES and at least one record, as (first, last + 1)."""
        at, last = self.cuts[number : number + 2].tolist()
        ends = self.offsets[at:last] + self.lengths[at:last]
        begin = at
        while at < last:
            beyond = begin + int(np.searchsorted(ends, self.offsets[at] + BYTES, side="right"))
            yield at, max(at + 1, beyond)
            at = max(at + 1, beyond)


def plan(parent: Dataset, rows: NDArray[np.int64], limits: Limits, left_out: Spans | None = None) -> Plan:
    """Cut the kept rows into shards: each takes records while it stays within the limits, and at least one.

    left_out: bytes of the rows' records that are not copied.
    Raises FormatError when the index is not of records that are whole tar blocks, with the image in them.
    """
    columns = (parent.index[name].to_numpy()[rows] for name in ("offset", "length", "image_offset", "image_length"))
    starts, lengths, images, sizes = columns
    inside = (images - starts >= tar.BLOCK) & (images + sizes <= starts + lengths)
    if not (inside & ((starts | lengths | images) % tar.BLOCK == 0)).all():
        raise FormatError(f"{parent.folder / indexing.INDEX} has places that no record of a tar can have: make or fetch it again")
    whole, first, images = Runs.of(parent.shards[rows], starts, starts + lengths), np.arange(len(rows) + 1), images - starts
    runs = whole
    if left_out is not None:
        runs, first = _without(whole, left_out)
        lengths = lengths - _in_records(left_out, len(rows))
        images = images - _in_records(left_out.some(left_out.starts - starts[left_out.records] < images[left_out.records]), len(rows))
    cuts, offsets = _cut(lengths, limits)
    return Plan(rows, cuts, offsets, lengths, images, sizes, runs, first)


def _in_records(spans: Spans, records: int) -> NDArray[np.int64]:
    """The bytes of each record that are left out."""
    return np.bincount(spans.records, spans.sizes, records).astype(np.int64)


def _without(whole: Runs, spans: Spans) -> tuple[Runs, NDArray[np.int64]]:
    """The runs that are left of whole records, and where those of each begin among them."""
    records = np.concatenate([np.arange(len(whole)), spans.records])
    starts, ends = np.concatenate([whole.starts, spans.ends]), np.concatenate([whole.ends, spans.starts])
    # Each record has as many starts as ends: in order, they belong together.
    starts, ends = starts[np.lexsort((starts, records))], ends[np.lexsort((ends, records))]
    left = ends > starts
    records = np.sort(records, kind="stable")[left]
    return Runs.of(whole.shards[records], starts[left], ends[left]), np.searchsorted(records, np.arange(len(whole) + 1))


def _cut(lengths: NDArray[np.int64], limits: Limits) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where records of these lengths are cut into shards, and where in its shard each begins."""
    ends = np.cumsum(lengths)
    cuts = [0]
    while cuts[-1] < len(lengths):
        first = cuts[-1]
        base = int(ends[first] - lengths[first])
        by_bytes = int(np.searchsorted(ends, base + limits.bytes - len(tar.END), side="right"))
        cuts.append(max(first + 1, min(first + limits.samples, by_bytes, len(lengths))))
    edges, starts = np.asarray(cuts, np.int64), ends - lengths
    return edges, starts - np.repeat(starts[edges[:-1]], np.diff(edges))


def index_of(parent: Dataset, made: Plan) -> pa.Table:
    """The index of the new shards, from the parent's: only places change."""
    rows = parent.index.take(made.rows)
    shard = np.repeat(np.arange(len(made.cuts) - 1, dtype=np.int32), np.diff(made.cuts))
    moved = {"shard": shard, "offset": made.offsets, "length": made.lengths, "image_offset": made.offsets + made.images}
    for name, values in moved.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows.combine_chunks()


def write_selection(build: Build, index: pa.Table, scores: NDArray[np.float32] | None, weights: NDArray[np.float32] | None) -> None:
    """Write `selection.parquet` for the index rows of a subset."""
    n = len(index)
    columns = {name: index[name] for name in ("id", "uid", "sha256", "label")} | {
        "score": pa.nulls(n, pa.float32()) if scores is None else pa.array(scores, pa.float32()),
        "weight": pa.array(np.ones(n, np.float32) if weights is None else weights, pa.float32()),
    }
    with build.create(indexing.SELECTION) as sink:
        table.write(sink, pa.table(columns, schema=SCHEMA))


def write_ranking(build: Build, ids: pa.Array, scores: NDArray[np.float32] | None, ranking: NDArray[np.int64]) -> None:
    """Write `ranking.parquet`: every candidate, in tar order, with its place in the order of keeping. ids: string."""
    rank = np.empty(len(ranking), np.int64)
    rank[ranking] = np.arange(len(ranking))
    columns = {
        "id": ids,
        "score": pa.nulls(len(rank), pa.float32()) if scores is None else pa.array(scores, pa.float32()),
        "rank": pa.array(rank),
    }
    with build.create(RANKING) as sink:
        table.write(sink, pa.table(columns, schema=RANKING_SCHEMA))
