"""Parquet and Arrow as this project writes and reads them: one set of writer options, and schemas checked on the way in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdprune_data.errors import FormatError, first_line
from kdprune_data.formats.build import Sink

ROW_GROUP = 1 << 20


def options(schema: pa.Schema) -> dict[str, Any]:
    """How Parquet is written: zstd, strings as differences, floats split by byte (half the size of the library's default)."""
    encodings = {}
    for field in schema:
        if pa.types.is_string(field.type):
            encodings[field.name] = "DELTA_BYTE_ARRAY"
        elif pa.types.is_floating(field.type):
            encodings[field.name] = "BYTE_STREAM_SPLIT"
    return {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "column_encoding": encodings}


def write(sink: IO[bytes] | Sink, table: pa.Table) -> None:
    """Write a table as Parquet."""
    pq.write_table(table, sink, row_group_size=ROW_GROUP, **options(table.schema))


def to_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    write(buffer, table)
    return buffer.getvalue()


def read(path: Path, schema: pa.Schema | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, as one chunk per column. Raises FormatError when it is unreadable or not of the schema asked for."""
    try:
        table = pq.ParquetFile(path, memory_map=True).read(columns=list(columns) if columns else None)
        if columns is not None:
            table = table.select(list(columns))
        table.validate(full=True)  # text that is not UTF-8 would fail later, as something else
    except (pa.ArrowException, OSError, KeyError) as error:
        raise FormatError(f"{path} cannot be read as Parquet ({first_line(error)}): make or fetch it again") from None
    if schema is not None:
        wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns])
        check(path, table.schema, wanted)
    return table.combine_chunks()


def check(path: Path, found: pa.Schema, wanted: pa.Schema) -> None:
    """Raise FormatError unless the columns and types found are those wanted."""
    if not found.equals(wanted):
        differing = [f"{f.name}: {f.type}" for f in found if f.name not in wanted.names or wanted.field(f.name).type != f.type]
        missing = [name for name in wanted.names if name not in found.names]
        what = f"unexpected {', '.join(differing)}" if differing else f"without {', '.join(missing)}" if missing else "in another order"
        raise FormatError(f"{path} does not have the columns of its format ({what}): make or fetch it again")


def ipc_write(sink: Any, batches: Sequence[pa.RecordBatch], schema: pa.Schema, *, zstd: int | None = None) -> None:
    """Write record batches as an Arrow IPC file, uncompressed, or with zstd at a level."""
    codec = None if zstd is None else pa.Codec("zstd", compression_level=zstd)
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for batch in batches:
            writer.write_batch(batch)


def ipc_batch(reader: Any, n: int) -> pa.RecordBatch:
    """The n-th record batch of a file. Raises ArrowException where it is damaged: unchecked, arrow follows offsets out of the file."""
    batch = reader.get_batch(n)
    batch.validate(full=True)
    return batch


def ipc_open(path: Path) -> Any:
    """A memory-mapped Arrow IPC file reader. Raises FormatError when it is not one."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path} cannot be read as an Arrow file ({first_line(error)}): make or fetch it again") from None
