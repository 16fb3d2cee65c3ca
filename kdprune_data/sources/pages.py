"""Parquet files page by page: what they say of themselves, and the values of a column of images, by few rows at a time.

Row groups may hold more than memory does, and where values are dictionary-encoded a page of a few bytes may stand for any number of large
images: the first images of such a group tell how large they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdprune_data.errors import SourceError, first_line

MOST_ROWS = 1000
"""At a time, however small the images."""
ROWS_AS_PYTHON = 16
BUFFER_BYTES = 1 << 20
"""Of a column chunk, what is read at once: without it, the reader takes the whole chunk into memory."""
FEW_ROWS = 64
"""Rows of a dictionary-encoded column at a time: a page of a few bytes may stand for any number of large images."""
LOOKED_AT = 4
"""Of such a row group, the rows whose images tell how large they are."""
GROUPS_LOOKED_AT = 16
"""Of a whole source, the row groups that tell how large it is."""


def look(path: Path) -> tuple[Any, pa.Schema]:
    """A file's metadata and schema; it is closed again, as a process may open only so many."""
    with reading(path), pq.ParquetFile(path) as file:
        return file.metadata, file.schema_arrow


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the Parquet library makes of a file that is none, or damaged, in one line."""
    try:
        yield
    except MemoryError as error:
        advice = "give the process more, or write the file with smaller row groups"
        raise SourceError(f"{path}: there is no memory for a page of it ({first_line(error)}): {advice}") from None
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet ({first_line(error)}): fetch it again") from None


def open_file(path: Path, metadata: Any) -> Any:
    """A file to read page by page through a small buffer: neither mapped, which counts as the process's memory, nor a chunk at a time."""
    return pq.ParquetFile(path, metadata=metadata, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _chunks(group: Any, column: str) -> list[Any]:
    """What a row group says of a column's parts."""
    chunks = [group.column(n) for n in range(group.num_columns)]
    return [c for c in chunks if c.path_in_schema.split(".")[0] == column]


def _is_dictionary(group: Any, column: str) -> bool:
    """Whether values may be stored once and stand in many rows."""
    return any(c.has_dictionary_page or any("DICTIONARY" in e for e in c.encodings) for c in _chunks(group, column))


def _rows_at_once(group: Any, column: str, read_bytes: int) -> int:
    size = sum(c.total_uncompressed_size for c in _chunks(group, column))
    return int(max(1, min(MOST_ROWS, read_bytes * group.num_rows // max(size, 1))))


def images(path: Path, metadata: Any, column: str, read_bytes: int) -> Iterator[Any]:
    """The values of a file's column of images, so many rows at a time as hold about `read_bytes`. Raises SourceError for a damaged file."""
    with reading(path):
        file = open_file(path, metadata)
        for group in range(metadata.num_row_groups):
            rows = _rows_at_once(metadata.row_group(group), column, read_bytes)
            if _is_dictionary(metadata.row_group(group), column):
                largest = max(_first_sizes(path, metadata, group, column), default=0)
                rows = min(rows, FEW_ROWS, max(1, read_bytes // max(largest, 1)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                values = batch.column(0)
                for at in range(0, len(values), ROWS_AS_PYTHON):
                    yield from values.slice(at, ROWS_AS_PYTHON).to_pylist()
            pa.default_memory_pool().release_unused()


def size(paths: Sequence[Path], files: Sequence[Any], column: str) -> int:
    """Bytes of all columns, uncompressed; where images are dictionary-encoded and some that were read are far larger, as they say."""
    groups = [(path, file, n) for path, file in zip(paths, files, strict=True) for n in range(file.num_row_groups)]
    written = sum(file.row_group(n).total_byte_size for _, file, n in groups)
    coded = [one for one in groups if _is_dictionary(one[1].row_group(one[2]), column)]
    if not coded:
        return int(written)
    looked = coded[:: -(-len(coded) // GROUPS_LOOKED_AT)]
    found = [one for path, file, n in looked for one in _first_sizes(path, file, n, column)]
    seen = sum(found) * sum(file.num_rows for file in files) // max(1, len(found))
    return int(seen if seen > 2 * written else written)  # the first images of some groups are no measure of smaller differences


def _first_sizes(path: Path, metadata: Any, group: int, column: str) -> list[int]:
    """Bytes of the first few images of a row group."""
    with reading(path), open_file(path, metadata) as file:
        batches = file.iter_batches(LOOKED_AT, row_groups=[group], columns=[column])
        values = next((batch.column(0) for batch in batches if len(batch)), None)
    if values is None:
        return []
    values = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
    return [len(data or b"") for data in values.to_pylist()]


def footer(path: Path) -> bytes:
    """The sha256 of a file's footer: where each row group lies, how large it is, and from which values to which."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)  # 4 bytes of length, then `PAR1`
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).digest()
