"""Somebody's table of ids, labels and scores, in one or several Parquet files, read piece by piece: it need not fit in memory.

A part is some row groups of one file, so that several threads can read at once; a piece is `PIECE` rows of it at most. Parts and pieces are
the same at every reading, whichever columns are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, UsageError, first_line
from kdprune_data.formats.foreign import ID_COLUMNS
from kdprune_data.formats.manifest import NAME, Manifest

PIECE = 1 << 18
PART = 1 << 20
"""Rows in a part at least, where there are so many in a file."""
LABEL, OK, UID = "label", "ok", "uid"
TRIED = 1000
"""Rows whose column `uid` is compared with their ids before it is believed."""


@dataclass(frozen=True)
class TableFile:
    """A file of a table, as its footer tells. footer: sha256 (hex) of the footer's bytes, which know the place and size of every column."""

    path: Path
    bytes: int
    footer: str
    metadata: pq.FileMetaData
    schema: pa.Schema


@dataclass(frozen=True)
class Part:
    """Some neighbouring row groups of a file."""

    file: TableFile
    groups: range


@dataclass(frozen=True)
class Table:
    """The files, and of their columns those that are read: id, by which rows are told apart; label, None where there is none; score, None
    where none is asked for. Rows whose column `ok` is not true are passed over."""

    files: tuple[TableFile, ...]
    id: str
    label: str | None
    score: str | None

    @classmethod
    def open(cls, paths: Sequence[Path], score: str | None) -> Table:
        """Open Parquet files, and those in folders, by name.

        Raises UsageError for what holds no such table, SourceError for files that cannot be read or do not go together.
        """
        files = tuple(_file(path) for given in paths for path in _inside(given))
        first, names = files[0].path, files[0].schema.names
        ids = [name for name in ID_COLUMNS if name in names]
        if not ids:
            listed = f"it has {', '.join(names)}"
            raise UsageError(f"{first} has no column {' or '.join(ID_COLUMNS)} to tell rows apart by: {listed}; rename the id column")
        if score is not None and score not in names:
            raise UsageError(f"{first} has no column {score!r}: it has {', '.join(names)}")
        table = cls(files, ids[0], LABEL if LABEL in names else None, score)
        table._check_types()
        return table

    def _check_types(self) -> None:
        first = self.files[0]
        for file in self.files[1:]:
            for name in self._columns:
                here = first.schema.field(name).type
                there = file.schema.field(name).type if name in file.schema.names else "absent"
                if there != here:
                    raise SourceError(
                        f"{file.path}: column {name!r} is {there}, and {here} in {first.path}: give files with the same columns"
                    )
        kind = self.type_of(self.id)
        if not (_is_text(kind) or pa.types.is_integer(kind)):
            raise SourceError(f"{first.path}: column {self.id!r} is {kind}: ids are texts or whole numbers")
        if self.score is not None and not _is_number(self.type_of(self.score)):
            raise SourceError(f"{first.path}: column {self.score!r} is {self.type_of(self.score)}: scores must be numbers")

    def check_labels(self, balance: str) -> None:
        """Raise UsageError where a balance needs class numbers and there are none."""
        first = self.files[0].path
        if balance != "none" and self.label is None:
            raise UsageError(f"--balance {balance} needs a column {LABEL!r} and {first} has none: use --balance none")
        if balance != "none" and self.label is not None and not pa.types.is_integer(self.type_of(self.label)):
            kind = self.type_of(self.label)
            raise UsageError(f"--balance {balance} needs class numbers and column {LABEL!r} of {first} is {kind}: use --balance none")

    def type_of(self, name: str) -> pa.DataType:
        """A column's type."""
        return self.files[0].schema.field(name).type

    def metadata(self, name: str) -> dict[str, str]:
        """What the first file says of a column."""
        return {key.decode(): value.decode() for key, value in (self.files[0].schema.field(name).metadata or {}).items()}

    @property
    def _columns(self) -> list[str]:
        """All that may be read, of any file."""
        named = [self.id, *(name for name in (self.label, self.score) if name is not None)]
        return list(dict.fromkeys([*named, *(name for name in (OK, UID) if name in self.files[0].schema.names)]))

    @property
    def named(self) -> list[str]:
        """The columns that name a row: its id, and its uid where there is one of ours."""
        return list(dict.fromkeys([self.id, *([UID] if self.has_uids else [])]))

    @property
    def rows(self) -> int:
        """How many rows there are, those among them that are not `ok`."""
        return sum(file.metadata.num_rows for file in self.files)

    @cached_property
    def parts(self) -> list[Part]:
        """The parts, in order."""
        found = []
        for file in self.files:
            first, rows, groups = 0, 0, file.metadata.num_row_groups
            for group in range(groups):
                rows += file.metadata.row_group(group).num_rows
                if rows >= PART or (rows and group + 1 == groups):
                    found.append(Part(file, range(first, group + 1)))
                    first, rows = group + 1, 0
        return found

    @cached_property
    def has_uids(self) -> bool:
        """Whether there is a column `uid` that is ours: the 64-bit names of the ids. (Whatever else somebody calls so is not read.)"""
        if UID not in self.files[0].schema.names or not pa.types.is_uint64(self.type_of(UID)):
            return False
        if self.id == UID:
            return True
        for part in range(len(self.parts)):
            for piece in self.read(part, [self.id, UID]):
                ids, uids = piece.slice(0, TRIED).columns
                if len(ids):
                    return not uids.null_count and bool(np.array_equal(uids.to_numpy(), order.uids_of(texts(ids))))
        return False

    def read(self, part: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The pieces of a part, with some columns. Raises SourceError where the file is damaged."""
        file = self.parts[part].file
        also = [OK] if OK in file.schema.names and pa.types.is_boolean(file.schema.field(OK).type) else []
        wanted, groups = list(dict.fromkeys([*columns, *also])), list(self.parts[part].groups)
        try:
            reader = pq.ParquetFile(file.path, metadata=file.metadata, pre_buffer=False)
            for piece in _pieces(reader.iter_batches(PIECE, row_groups=groups, columns=wanted, use_threads=False)):
                # A filter drops rows for which it is null too.
                yield (piece.filter(piece.column(OK)) if also else piece).select(list(columns))
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file.path} cannot be read as Parquet ({first_line(error)}): make or fetch it again") from None

    def name(self, part: int, piece: int, row: int) -> str:
        """The id of one row, for messages."""
        found = next(one for at, one in enumerate(self.read(part, [self.id])) if at == piece)
        return texts(found.column(0).slice(row, 1))[0]

    def described(self) -> list[dict[str, object]]:
        """What a list that is made of the table says of its files."""
        return [{"name": f.path.name, "bytes": f.bytes, "rows": f.metadata.num_rows, "footer": f.footer} for f in self.files]


def _inside(given: Path) -> list[Path]:
    """The files that a path names. Raises UsageError where it names none."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UsageError(f"{given} does not exist: give a Parquet file, or a folder of them")
    if (given / NAME).is_file() and (kind := Manifest.read(given).kind) != "scores":
        hint = "`kdprune-data select` chooses from it" if kind in ("dataset", "subset") else "give a table"
        raise UsageError(f"{given} is of kind {kind}, and no table of scores: {hint}")
    found = sorted(given.glob("*.parquet"))
    if not found:
        raise UsageError(f"{given} holds no .parquet files: give a Parquet file, or a folder of them")
    return found


def _file(path: Path) -> TableFile:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
            footer = hashlib.sha256(file.read(length)).hexdigest()
        opened = pq.ParquetFile(path)
        return TableFile(path, size, footer, opened.metadata, opened.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet ({first_line(error)}): give another file") from None


def _pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Record batches cut anew, into pieces of `PIECE` rows and a last one: arrow cuts where the columns read happen to be cut."""
    held: list[pa.RecordBatch] = []
    room = PIECE
    for batch in batches:
        while batch.num_rows:
            held.append(batch.slice(0, room))
            batch, room = batch.slice(room), room - held[-1].num_rows
            if not room:
                yield _joined(held)
                held, room = [], PIECE
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _is_text(kind: pa.DataType) -> bool:
    return any(getattr(pa.types, f"is_{name}", lambda _: False)(kind) for name in ("string", "large_string", "string_view")) or bool(
        pa.types.is_dictionary(kind) and _is_text(kind.value_type)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def texts(column: pa.Array) -> list[str]:
    """Ids as texts."""
    return [str(one) for one in column.to_pylist()]


def labels_of(column: pa.Array) -> NDArray[np.integer]:
    """Class numbers: int32 or int64 of shape (n,), below 0 = none. Raises SourceError for one that is no 64-bit number."""
    narrow = column.type.bit_width < 32 or column.type == pa.int32()
    try:
        whole = column.cast(pa.int32() if narrow else pa.int64())
    except pa.ArrowInvalid as error:
        raise SourceError(f"column {LABEL!r} cannot be read as class numbers ({first_line(error)}): use --balance none") from None
    return np.asarray((whole.fill_null(-1) if whole.null_count else whole).to_numpy())


def scores_of(column: pa.Array) -> NDArray[np.floating]:
    """Scores, NaN where there are none: float32 of shape (n,) where that holds all that the column's type does, else float64."""
    kind = column.type
    narrow = kind in (pa.float16(), pa.float32()) or (pa.types.is_integer(kind) and kind.bit_width <= 16)
    found = column.cast(pa.float32() if narrow else pa.float64(), safe=False)
    return np.asarray((found.fill_null(float("nan")) if found.null_count else found).to_numpy())
