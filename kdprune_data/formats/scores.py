"""Scores on disk: a Parquet part per shard, a float32 column per score; which end is hard stands in the one table here and in every file.

`docs/formats.md`, "Scores".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError, unknown
from kdprune_data.formats import indexing, table
from kdprune_data.formats.build import Build
from kdprune_data.formats.manifest import Manifest

PART = "part-%06d.parquet"
VECTORS = "%s-%06d.arrow"


@dataclass(frozen=True)
class Score:
    """What a score is: which end is hard, and what it is made from (`early` or `final` checkpoint's outputs, or `dynamics`)."""

    hard: str
    source: str


SCORES: dict[str, Score] = {
    "el2n": Score("high", "early"),
    "grand": Score("high", "early"),
    "entropy": Score("high", "final"),
    "margin": Score("low", "final"),
    "confidence": Score("low", "final"),
    "loss": Score("high", "final"),
    "forgetting": Score("high", "dynamics"),
    "aum": Score("low", "dynamics"),
    "correct": Score("low", "dynamics"),
}


def write_part(
    build: Build,
    shard: int,
    ids: Sequence[str],
    labels: NDArray[np.int32],
    columns: Mapping[str, NDArray[np.float32]],
    made_from: Mapping[str, str],
) -> None:
    """Write the scores of one shard's samples, in its order. `made_from`: for each score, the file or checkpoint it came from."""
    fields = [pa.field("id", pa.string()), pa.field("label", pa.int32())]
    fields += [pa.field(n, pa.float32(), metadata={"hard": SCORES[n].hard, "source": made_from[n]}) for n in columns]
    arrays = [pa.array(ids, pa.string()), indexing.label_array(labels), *(pa.array(v, pa.float32()) for v in columns.values())]
    with build.create(PART % shard) as sink:
        table.write(sink, pa.table(arrays, schema=pa.schema(fields)))


def write_vectors(build: Build, what: str, shard: int, vectors: NDArray[np.float16]) -> None:
    """Write one shard's `embedding` or `logits` beside its scores: float16 of shape (n, d)."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    batch = pa.record_batch([column], names=[what])
    with build.create(VECTORS % (what, shard)) as sink:
        table.ipc_write(sink, [batch], batch.schema)


@dataclass(frozen=True)
class Scores:
    """A scores artefact, opened for reading."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Scores:
        """Open a finished scores artefact. Raises UsageError when the folder is none."""
        return cls(folder, Manifest.load(folder, kinds=("scores",)))

    @property
    def columns(self) -> list[str]:
        """The scores it holds."""
        return list(self.manifest.config["columns"])

    def read(self, column: str) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """One score of every sample: uids and values, in shard order. Raises UsageError when it is not among those recorded."""
        if column not in self.columns:
            raise unknown("score", column, self.columns)
        parts = [self.folder / f.path for f in self.manifest.files if f.path.startswith("part-")]
        tables = [table.read(p, columns=["id", column]) for p in parts]
        whole = pa.concat_tables(tables)
        if len(whole) != self.manifest.counts["samples"]:
            raise FormatError(
                f"{self.folder} has {len(whole):,} scores, its manifest says {self.manifest.counts['samples']:,}: run score again"
            )
        return order.uids_of(whole["id"].to_pylist()), np.asarray(whole[column].to_numpy(), np.float32)
