"""Training dynamics on disk: what a network in train mode said of every sample, once per epoch. `docs/formats.md`, "Model".

A Parquet file of a few numbers an epoch; and, where the teacher was asked to record them, whole logits in an Arrow file beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.errors import FormatError
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


def logits_path(epoch: int) -> str:
    """The file of one epoch's logits, counted from 1."""
    return f"{FOLDER}/logits-{epoch:03d}.arrow"


def write(build: Build, epoch: int, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write one epoch. columns: as in SCHEMA, one row per sample, in index order."""
    with build.create(path_of(epoch)) as sink:
        table.write(sink, pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA))


def read(folder: Path, epoch: int, columns: list[str]) -> dict[str, NDArray[Any]]:
    """Columns of one epoch. Raises FormatError when the file is not what it should be."""
    rows = table.read(folder / path_of(epoch), SCHEMA, columns)
    return {name: np.asarray(rows[name].to_numpy(zero_copy_only=False)) for name in columns}


def write_logits(build: Build, epoch: int, logits: NDArray[np.float16]) -> None:
    """Write one epoch's logits, less the largest of each row: float16 of shape (n, c), rows as in that epoch's file."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    batch = pa.record_batch([column], names=["logits"])
    with build.create(logits_path(epoch)) as sink:
        table.ipc_write(sink, [batch], batch.schema)


def read_logits(folder: Path, epoch: int) -> NDArray[np.float16]:
    """One epoch's logits, float16 of shape (n, c), read by memory map. Raises FormatError when the file is not what it should be."""
    path = folder / logits_path(epoch)
    reader = table.ipc_open(path)
    column = reader.get_batch(0).column(0) if reader.num_record_batches == 1 and reader.schema.names == ["logits"] else None
    if column is None or not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float16() or column.null_count:
        raise FormatError(f"{path} does not hold one batch of float16 logits: make or fetch the teacher again")
    return np.asarray(column.flatten().to_numpy()).reshape(len(column), column.type.list_size)
