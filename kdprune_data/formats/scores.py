"""Scores on disk: a Parquet part per shard, a float32 column per score; which end is hard stands in the one table here and in every file.

`docs/formats.md`, "Scores".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError, UsageError, unknown
from kdprune_data.formats import indexing, table
from kdprune_data.formats.build import Build
from kdprune_data.formats.manifest import Manifest

PART = "part-%06d.parquet"
VECTORS = "%s-%06d.arrow"
KINDS_OF_VECTORS = ("embedding", "logits")


@dataclass(frozen=True)
class Score:
    """What a score is: which end is hard; what it is made from (`early` or `final` checkpoint's outputs, `dynamics`, or the `embedding`);
    and whether it is only computed when it is asked for with `score --also`."""

    hard: str
    source: str
    asked: bool = False


SCORES: dict[str, Score] = {
    "el2n": Score("high", "early"),
    "grand": Score("high", "early"),
    "grand_full": Score("high", "early", asked=True),
    "entropy": Score("high", "final"),
    "margin": Score("low", "final"),
    "confidence": Score("low", "final"),
    "loss": Score("high", "final"),
    "forgetting": Score("high", "dynamics"),
    "aum": Score("low", "dynamics"),
    "correct": Score("low", "dynamics"),
    "p_true": Score("low", "dynamics"),
    "dyn_unc": Score("high", "dynamics"),
    "dual": Score("high", "dynamics"),
    "tdds": Score("high", "dynamics"),
    "prototype": Score("high", "embedding", asked=True),
    "class_distance": Score("high", "embedding", asked=True),
    "density": Score("low", "embedding", asked=True),
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


def read_vectors(path: Path, what: str) -> NDArray[np.float16]:
    """One shard's `embedding` or `logits`: float16 of shape (n, d), read by memory map. Raises FormatError when the file is not that."""
    reader = table.ipc_open(path)
    column = reader.get_batch(0).column(0) if reader.num_record_batches == 1 and reader.schema.names == [what] else None
    if column is None or not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float16() or column.null_count:
        raise FormatError(f"{path} does not hold one batch of float16 {what}: run score again")
    return np.asarray(column.flatten().to_numpy()).reshape(len(column), column.type.list_size)


@dataclass(frozen=True)
class Scores:
    """A scores artefact, opened for reading."""

    folder: Path
    manifest: Manifest
    _read: dict[str, Path] = field(default_factory=dict, repr=False, compare=False)

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
        whole = self._rows(["id", column])
        return order.uids_of(whole["id"].to_pylist()), np.asarray(whole[column].to_numpy(), np.float32)

    def has(self, name: str) -> bool:
        """Whether it holds a score of this name, or the `embedding` or `logits`."""
        return bool(self.manifest.config[name]) if name in KINDS_OF_VECTORS else name in self.columns

    def width(self, what: str) -> int:
        """How many numbers an `embedding` or a row of `logits` has, 0 where there are none."""
        names = [f.path for f in self.manifest.files if f.path.startswith(f"{what}-")]
        return read_vectors(self.folder / names[0], what).shape[1] if names else 0

    def vectors(self, what: str) -> tuple[NDArray[np.uint64], NDArray[np.float16]]:
        """The `embedding` or `logits` of every sample: uids and float16 of shape (n, d), in shard order.

        Raises UsageError when they were not recorded, FormatError when a file is not what it should be.
        """
        if not self.has(what):
            raise UsageError(f"{self.folder} holds no {what}: run `kdprune-data score` with --{what}")
        names = [f.path for f in self.manifest.files if f.path.startswith(f"{what}-")]
        found = [read_vectors(self._whole(name), what) for name in names]
        whole = self._rows(["id"])
        if sum(map(len, found)) != len(whole) or len({one.shape[1] for one in found}) != 1:
            shapes = ", ".join(str(one.shape) for one in found[:4])
            raise FormatError(f"{self.folder} has {what} files of {shapes}, and {len(whole):,} samples: run score again")
        return order.uids_of(whole["id"].to_pylist()), np.concatenate(found)

    def _whole(self, path: str) -> Path:
        """One of its files, read through and compared with the manifest's digest, once."""
        if path not in self._read:
            self._read[path] = self.manifest.checked(self.folder, path)
        return self._read[path]

    def _rows(self, columns: list[str]) -> pa.Table:
        parts = [self._whole(f.path) for f in self.manifest.files if f.path.startswith("part-")]
        whole = pa.concat_tables([table.read(p, columns=columns) for p in parts])
        if len(whole) != self.manifest.counts["samples"]:
            raise FormatError(
                f"{self.folder} has {len(whole):,} scores, its manifest says {self.manifest.counts['samples']:,}: run score again"
            )
        return whole
