"""Somebody else's numbers and lists: a Parquet file of scores, a file of ids to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, UsageError, first_line
from kdprune_data.formats import table

ID_COLUMNS = ("id", "key", "uid", "__key__")


@dataclass(frozen=True)
class Named:
    """A list of samples by uid, with the names they came under (for messages) and, for scores, a number each and the field's metadata."""

    uids: NDArray[np.uint64]
    names: Any
    values: NDArray[np.float64] | None = None
    metadata: dict[str, str] | None = None


def number_columns(path: Path) -> list[str]:
    """The columns of a Parquet file that hold numbers, but for the id column. Raises SourceError when it cannot be read."""
    schema = _schema(path)
    numbers = (f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type))
    return [name for name in numbers if name not in ID_COLUMNS]


def read_scores(path: Path, column: str) -> Named:
    """The column of a Parquet file, by its id column (`id`, `key`, `uid` or `__key__`).

    Raises UsageError when a column is missing, SourceError when it is not numbers, one is too large for float32, or a sample has two.
    """
    schema = _schema(path)
    if column not in schema.names:
        raise UsageError(f"{path} has no column {column!r}: it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise SourceError(f"{path}: column {column!r} is {kind}: scores must be numbers")
    names = _id_column(path, schema)
    rows = table.read(path, columns=[names, column])
    uids, listed = _uids(path, rows[names])
    twice = order.first_repeat(uids)
    if twice:
        raise SourceError(f"{path} lists {listed[twice[0]]!r} more than once: give each sample one score")
    values = np.asarray(rows[column].cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy(), np.float64)
    _check_float32(path, column, values, listed)
    metadata = {k.decode(): v.decode() for k, v in (schema.field(column).metadata or {}).items()}
    return Named(uids, listed, values, metadata)


def _check_float32(path: Path, column: str, values: NDArray[np.float64], names: Any) -> None:
    """Scores are kept as float32, in which a larger number would be infinite."""
    large = np.flatnonzero(np.isfinite(values) & (np.abs(values) > np.finfo(np.float32).max))
    if len(large):
        raise SourceError(
            f"{path}: column {column!r} of {names[large[0]]!s} is {values[large[0]]:g}, too large for float32, in which scores are kept "
            f"({len(large):,} of {len(values):,} are): scale the column"
        )


def read_ids(path: Path) -> Named:
    """Samples to keep: a text file with one id a line, a Parquet file with an id column, or a .npy array of texts or of uint64 uids.

    Raises UsageError for another kind of file, SourceError for one that cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"--keys {path} does not exist: give a .txt, .parquet or .npy file of ids")
    if path.suffix == ".parquet":
        names = _id_column(path, _schema(path))
        return Named(*_uids(path, table.read(path, columns=[names])[names]))
    if path.suffix == ".npy":
        return _from_npy(path)
    if path.suffix == ".txt":
        lines = [line for line in read_lines(path) if line.strip()]
        return Named(order.uids_of(lines), lines)
    raise UsageError(f"--keys {path}: cannot tell what a {path.suffix or 'nameless'} file holds; give a .txt, .parquet or .npy file of ids")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises SourceError when it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text (byte {error.start:,}): save it as UTF-8") from None
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines, which also takes U+2028 and its like for an end of line
    return lines if lines[-1] else lines[:-1]


def read_classes(path: Path) -> list[str]:
    """The class names of a text file, one a line, in label order.

    Raises UsageError when it does not exist or has an empty line before its last name, SourceError when it is not UTF-8.
    """
    if not path.is_file():
        raise UsageError(f"--classes {path} does not exist: give a text file with one class name a line")
    names = [line.strip() for line in read_lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise UsageError(f"--classes {path}: {where}; give one class name a line, in label order")
    return names


def _from_npy(path: Path) -> Named:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise SourceError(f"{path} cannot be read as a plain numpy array ({first_line(error)}): save texts or uint64 uids") from None
    if array.ndim == 1 and array.dtype == np.uint64:
        return Named(array, array)
    if array.ndim == 1 and array.dtype.kind in "US":
        names = [n.decode() if isinstance(n, bytes) else str(n) for n in array.tolist()]
        return Named(order.uids_of(names), names)
    raise SourceError(f"{path} is {array.dtype} of shape {array.shape}: expected one row of texts (ids) or of uint64 (uids)")


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet ({first_line(error)}): give another file") from None


def _id_column(path: Path, schema: pa.Schema) -> str:
    for name in ID_COLUMNS:
        if name in schema.names:
            return name
    raise UsageError(f"{path} has no column {' or '.join(ID_COLUMNS)} to join by: it has {', '.join(schema.names)}; rename the id column")


def _uids(path: Path, column: pa.ChunkedArray) -> tuple[NDArray[np.uint64], Any]:
    if column.null_count:
        raise SourceError(f"{path}: the id column has {column.null_count:,} empty rows: every row needs an id")
    if pa.types.is_uint64(column.type):
        uids = np.asarray(column.to_numpy(), np.uint64)
        return uids, uids
    names = [str(n) for n in column.to_pylist()]
    return order.uids_of(names), names
