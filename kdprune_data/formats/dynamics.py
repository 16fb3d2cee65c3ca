"""Training dynamics on disk: what a network in train mode said of every sample, once per epoch. `docs/formats.md`, "Model"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.formats import table
from kdprune_data.formats.build import Build

SCHEMA = pa.schema(
    [("uid", pa.uint64()), ("p_true", pa.float32()), ("logit_margin", pa.float32()), ("correct", pa.bool_()), ("loss", pa.float32())]
)
FOLDER = "dynamics"
ROW_BYTES = 21
"""About what a row takes."""


def path_of(epoch: int) -> str:
    """The file of one epoch, counted from 1."""
    return f"{FOLDER}/epoch-{epoch:03d}.parquet"


def write(build: Build, epoch: int, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write one epoch. columns: as in SCHEMA, one row per sample, in index order."""
    with build.create(path_of(epoch)) as sink:
        table.write(sink, pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA))


def read(folder: Path, epoch: int, columns: list[str]) -> dict[str, NDArray[Any]]:
    """Columns of one epoch. Raises FormatError when the file is not what it should be."""
    rows = table.read(folder / path_of(epoch), SCHEMA, columns)
    return {name: np.asarray(rows[name].to_numpy(zero_copy_only=False)) for name in columns}
