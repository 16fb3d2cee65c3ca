"""A subset on disk: the parent's records, copied byte for byte into shards of their own, and `selection.parquet`, which says which and why.

The plan (which records go into which shard, at which bytes) is made before anything is copied, from the parent's index alone; so any
number of threads, on any machine, writes the same tars. `docs/formats.md`, "Subset".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.formats import dataset, indexing, table, tar
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.shards import Limits
from kdprune_data.images import MEMBERS

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
COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Plan:
    """Where each kept record goes. `rows` of the parent, ascending; `cuts`: shard n holds rows[cuts[n]:cuts[n + 1]]."""

    rows: NDArray[np.int64]
    cuts: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def names(self) -> list[str]:
        """The shards' names, in order."""
        return [dataset.SHARD % n for n in range(len(self.cuts) - 1)]


def plan(parent: Dataset, rows: NDArray[np.int64], limits: Limits) -> Plan:
    """Cut the kept rows into shards: each takes records while it stays within the limits, and at least one."""
    lengths = parent.index["length"].to_numpy()[rows]
    ends = np.cumsum(lengths)
    cuts = [0]
    while cuts[-1] < len(rows):
        first = cuts[-1]
        base = int(ends[first] - lengths[first])
        by_bytes = int(np.searchsorted(ends, base + limits.bytes - len(tar.END), side="right"))
        cuts.append(max(first + 1, min(first + limits.samples, by_bytes, len(rows))))
    edges = np.asarray(cuts, np.int64)
    starts = ends - lengths
    shard = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    return Plan(rows, edges, starts - starts[edges[:-1]][shard])


def copy(parent: Dataset, made: Plan, build: Build, jobs: int) -> Iterator[str]:
    """Copy the planned records, shard by shard, with `jobs` threads; yields the names of shards as they are finished, in order.

    Raises SourceError when a shard of the parent's is not as long as it was, or an image is not the one that was indexed.
    """
    parent.check_outside(np.unique(parent.shards[made.rows]).tolist())
    build.keep_only(made.names)
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        yield from pool.map(lambda n: _copy_shard(parent, made, build, n), range(len(made.names)))


def _copy_shard(parent: Dataset, made: Plan, build: Build, number: int) -> str:
    name, rows = made.names[number], made.rows[made.cuts[number] : made.cuts[number + 1]]
    facts = {"samples": hashlib.sha256(parent.uids[rows].astype("<u8").tobytes()).hexdigest()}
    if build.finished(name) == facts:  # else it is of another selection: an earlier version may have chosen others
        return name
    for row in rows.tolist():
        parent.image_bytes(row)  # which checks it: a subset is what its digests say, or is not made
    with build.create(name, facts) as sink:
        for piece in pieces(parent, made, number):
            sink.write(piece)
    return name


def pieces(parent: Dataset, made: Plan, number: int) -> Iterator[memoryview | bytes]:
    """The bytes of a planned shard, a few megabytes at a time."""
    for shard, start, end in _ranges(parent, made.rows[made.cuts[number] : made.cuts[number + 1]]):
        view = memoryview(parent.maps[shard])
        for at in range(start, end, COPY_BYTES):
            yield view[at : min(at + COPY_BYTES, end)]
    yield tar.END


def _ranges(parent: Dataset, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """The rows' records as (shard, start, end), neighbours joined."""
    shards = parent.shards[rows]
    starts = parent.index["offset"].to_numpy()[rows]
    ends = starts + parent.index["length"].to_numpy()[rows]
    fresh = np.flatnonzero((shards[1:] != shards[:-1]) | (starts[1:] != ends[:-1])) + 1
    first = np.concatenate([[0], fresh])
    last = np.concatenate([fresh, [len(rows)]]) - 1
    yield from zip(shards[first].tolist(), starts[first].tolist(), ends[last].tolist(), strict=True)


def index_of(parent: Dataset, made: Plan) -> pa.Table:
    """The index of the new shards, from the parent's: only places change."""
    rows = parent.index.take(made.rows)
    shard = np.repeat(np.arange(len(made.cuts) - 1, dtype=np.int32), np.diff(made.cuts))
    shift = rows["image_offset"].to_numpy() - rows["offset"].to_numpy()
    moved = {"shard": shard, "offset": made.offsets, "image_offset": made.offsets + shift}
    for name, values in moved.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows.combine_chunks()


def image_members(paths: Sequence[Path], index: pa.Table) -> list[str]:
    """The extensions of the image members, sorted: from the names in the headers before them, as the parent's maker wrote them.

    paths: the shards that the index's rows are in. For sets whose image is whichever member is one.
    """
    found: set[str] = set()
    shards, starts = index["shard"].to_numpy(), index["image_offset"].to_numpy() - tar.BLOCK
    for number, path in enumerate(paths):
        buffer, rows = tar.map_file(path), np.flatnonzero(shards == number)
        names = np.frombuffer(buffer, np.uint8)[starts[rows][:, None] + np.arange(100)]
        whole = names[:, -1] == 0  # else it may go on in a header of its own before this one
        text = names[whole].tobytes()
        found |= {text[at : at + 100].rstrip(b"\0").rpartition(b".")[2].decode("ascii", "replace") for at in range(0, len(text), 100)}
        found |= {_image_member(buffer, one) for one in index.take(rows[~whole]).select(["offset", "length", "image_offset"]).to_pylist()}
    return sorted(found & set(MEMBERS))


def _image_member(buffer: tar.Buffer, row: Mapping[str, int]) -> str:
    """One sample's, from its record."""
    raw = bytes(buffer[row["offset"] : row["offset"] + row["length"]]) + tar.END
    record = next(tar.records(raw, "record"))
    return next(extension for extension, one in record.members.items() if row["offset"] + one.data == row["image_offset"])


def write_selection(build: Build, index: pa.Table, scores: NDArray[np.float32] | None, weights: NDArray[np.float32] | None) -> None:
    """Write `selection.parquet` for the index rows of a subset."""
    n = len(index)
    columns = {name: index[name] for name in ("id", "uid", "sha256", "label")} | {
        "score": pa.nulls(n, pa.float32()) if scores is None else pa.array(scores, pa.float32()),
        "weight": pa.array(np.ones(n, np.float32) if weights is None else weights, pa.float32()),
    }
    with build.create(indexing.SELECTION) as sink:
        table.write(sink, pa.table(columns, schema=SCHEMA))


def write_ranking(build: Build, ids: Sequence[str], scores: NDArray[np.float32] | None, ranking: NDArray[np.int64]) -> None:
    """Write `ranking.parquet`: every candidate, in tar order, with its place in the order of keeping."""
    rank = np.empty(len(ranking), np.int64)
    rank[ranking] = np.arange(len(ranking))
    columns = {
        "id": pa.array(ids, pa.string()),
        "score": pa.nulls(len(rank), pa.float32()) if scores is None else pa.array(scores, pa.float32()),
        "rank": pa.array(rank),
    }
    with build.create(RANKING) as sink:
        table.write(sink, pa.table(columns, schema=RANKING_SCHEMA))
