"""The rows of somebody's table as `selectors.streamed` reads them: with a score each, the larger the harder, and order hashes on request.

The order hash of a row begins with its uid: a column of the table's where it has one of ours, else BLAKE2b of the id. For a choice at
random the hash is the score; uids that had to be computed for that are kept in a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from kdprune_pipelines._console import bar
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError
from kdprune_data.formats import blake, repeats, rows
from kdprune_data.formats.rows import Table
from kdprune_data.selectors.parts import Piece, in_turn

U64 = NDArray[np.uint64]


@dataclass
class Candidates:
    """The rows of a table, ranked by its score. high: whether its high end is the hard one; seed: of the order hash; labelled: whether
    classes are told apart; jobs: threads."""

    table: Table
    high: bool
    seed: int
    labelled: bool
    jobs: int

    @property
    def parts(self) -> int:
        """How many parts the table has."""
        return len(self.table.parts)

    @property
    def about(self) -> int:
        """How many rows there are, those that are not `ok` among them."""
        return self.table.rows

    @property
    def columns(self) -> list[str]:
        """What is read of the table to rank its rows."""
        return [name for name in (self.table.label if self.labelled else None, self.table.score) if name is not None]

    def read(self, part: int) -> Iterator[Piece]:
        """The pieces of a part."""
        for at, batch in enumerate(self.table.read(part, self.columns)):
            yield self.piece(part, at, batch)

    def piece(self, part: int, at: int, batch: pa.RecordBatch) -> Piece:
        """A piece from its columns."""
        scores = rows.scores_of(batch.column(self.table.score))
        return Piece(self.labels(batch), scores if self.high else -scores)

    def labels(self, batch: pa.RecordBatch) -> NDArray[np.integer] | None:
        """The classes of a piece, where they are told apart."""
        return rows.labels_of(batch.column(self.table.label)) if self.labelled else None

    def hashes(self, part: int, some: list[NDArray[np.int64]]) -> list[U64]:
        """The order hashes of some rows of a part."""
        if not any(map(len, some)):
            return [np.zeros(0, np.uint64) for _ in some]
        batches = self.table.read(part, self.table.named)
        uids = (self.uids(part, at, batch.take(pa.array(own))) for at, (batch, own) in enumerate(zip(batches, some, strict=True)))
        return [order.order_hash(own, self.seed, "select") for own in uids]

    def uids(self, part: int, at: int, batch: pa.RecordBatch) -> U64:
        """The uids of a piece, or of some of its rows. Raises SourceError where an id is missing."""
        if batch.column(self.table.id).null_count:
            raise SourceError(f"{self.table.files[0].path}: column {self.table.id!r} has empty rows: every row needs an id")
        if self.table.has_uids:
            return np.asarray(batch.column(rows.UID).to_numpy(), np.uint64)
        return blake.uids(batch.column(self.table.id))

    def numbers(self, part: int, at: int, batch: pa.RecordBatch) -> U64:
        """A number of each id of a piece: its uid where that is at hand."""
        return self.uids(part, at, batch) if self.table.has_uids else repeats.hashes(batch.column(self.table.id))

    @property
    def numbers_are_uids(self) -> bool:
        """Whether these numbers are uids, so that no two rows may have the same."""
        return self.table.has_uids

    def name(self, part: int, piece: int, row: int) -> str:
        """The id of a row."""
        return self.table.name(part, piece, row)


@dataclass
class Shuffled(Candidates):
    """The rows of a table in the order of their hashes, the lowest first. Where the table has no uids, `fill` comes first."""

    _file: BinaryIO | None = field(default=None, init=False)
    _starts: list[list[int]] = field(default_factory=list, init=False)

    @property
    def columns(self) -> list[str]:
        """What is read of the table to rank its rows."""
        return [*([self.table.label] if self.labelled and self.table.label else []), *([rows.UID] if self.table.has_uids else [])]

    def fill(self, file: BinaryIO) -> None:
        """Compute the uids of all rows, where the table has none, and keep them in a file."""
        if self.table.has_uids:
            return
        self._file, at = file, 0
        with bar("hash ids", total=self.about, unit="row") as progress:
            for found in in_turn(self._hashed, self.parts, self.jobs):
                self._starts.append([at])
                for uids in found:
                    file.write(uids.data)
                    at += len(uids)
                    self._starts[-1].append(at)
                    progress.update(len(uids))
        file.flush()

    def _hashed(self, part: int) -> list[U64]:
        return [self.uids(part, at, batch) for at, batch in enumerate(self.table.read(part, [self.table.id]))]

    def read(self, part: int) -> Iterator[Piece]:
        """The pieces of a part."""
        if self.columns:
            yield from super().read(part)
            return
        for at in range(len(self._starts[part]) - 1):
            yield self.piece(part, at, None)

    def piece(self, part: int, at: int, batch: pa.RecordBatch | None) -> Piece:
        """A piece from its columns, of which it may need none."""
        hashes = order.order_hash(self.numbers(part, at, batch), self.seed, "select")
        return Piece(None if batch is None else self.labels(batch), -order.unit(hashes))

    def numbers(self, part: int, at: int, batch: pa.RecordBatch | None) -> U64:
        """The uids of a piece, from its column or from the file."""
        if batch is not None and self.table.has_uids:
            return np.asarray(batch.column(rows.UID).to_numpy(), np.uint64)
        if self._file is None:
            raise ValueError("uids are needed before they were computed")
        begin, end = self._starts[part][at : at + 2]
        return np.frombuffer(os.pread(self._file.fileno(), 8 * (end - begin), 8 * begin), np.uint64)

    @property
    def numbers_are_uids(self) -> bool:
        """They are."""
        return True
