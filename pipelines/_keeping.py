"""Writing what is kept of a table: one more reading of it, which also looks whether an id comes twice."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from kdprune_pipelines._candidates import U64, Candidates
from kdprune_pipelines._console import bar
from kdprune_pipelines._estimate import measure
from numpy.typing import NDArray

from kdprune_data.errors import SourceError
from kdprune_data.formats import listed, rows
from kdprune_data.formats.listed import Facts, Writer
from kdprune_data.formats.repeats import Repeats, spool
from kdprune_data.formats.rows import Table
from kdprune_data.selectors.parts import in_turn
from kdprune_data.selectors.streamed import Kept


@dataclass(frozen=True)
class Found:
    """What a part gives: the rows kept, and of each piece a number of each id, as `Repeats.sort` orders them."""

    kept: list[pa.RecordBatch]
    numbers: list[tuple[U64, NDArray[np.int64]]]
    rows: int


def schema_of(table: Table, hard: str | None) -> pa.Schema:
    """The columns of a list: `id`, or `uid` where that is all there is, then `label` and `score` in the types of the table."""
    fields = [pa.field(rows.UID, pa.uint64()) if table.has_uids and table.id == rows.UID else pa.field("id", pa.string())]
    if table.label is not None:
        fields.append(pa.field("label", table.type_of(table.label)))
    if table.score is not None:
        fields.append(pa.field("score", table.type_of(table.score), metadata={"hard": hard or ""}))
    return pa.schema(fields)


def write(path: Path, candidates: Candidates, kept: Kept, schema: pa.Schema, facts: Facts) -> None:
    """Write the rows that are kept, in the order of the table. Raises SourceError where an id is missing or comes twice."""
    table, jobs, written = candidates.table, candidates.jobs, 0
    with spool(existing(path.parent)) as file, listed.create(path, schema, facts) as writer:
        repeats = Repeats(file, table.rows)
        with bar("write", total=table.rows, unit="row") as progress:
            for found in in_turn(lambda part: _part(part, candidates, kept, schema, repeats), len(table.parts), jobs):
                for batch in found.kept:
                    writer.write(batch)
                    written += batch.num_rows
                for numbers, ends in found.numbers:
                    repeats.add(numbers, ends)
                progress.update(found.rows)
        twice = repeats.find(lambda work, n: in_turn(work, n, jobs))
        if len(twice):
            _check_ids(candidates, twice)
        if written != facts.counts["kept"]:
            raise SourceError(f"{table.files[0].path} was changed while it was read: run the same command again")


def existing(folder: Path) -> Path:
    """The innermost folder on the way to one that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def _part(part: int, candidates: Candidates, kept: Kept, schema: pa.Schema, repeats: Repeats) -> Found:
    kept_of, numbers, count = [], [], 0
    for at, batch in enumerate(candidates.table.read(part, _columns(candidates.table))):
        _check_there(candidates.table, batch)
        mask = kept.mask(part, at, candidates.piece(part, at, batch))
        if mask.any():
            kept_of.append(_written(candidates.table, batch, mask, schema))
        numbers.append(repeats.sort(candidates.numbers(part, at, batch)))
        count += batch.num_rows
    return Found(kept_of, numbers, count)


def _columns(table: Table) -> list[str]:
    """All that is read of the table here."""
    return list(dict.fromkeys([*_kept_columns(table), *table.named]))


def _kept_columns(table: Table) -> list[str]:
    return [name for name in (table.id, table.label, table.score) if name is not None]


def _check_there(table: Table, batch: pa.RecordBatch) -> None:
    """Raise SourceError for an id that is missing, or no text."""
    ids = batch.column(table.id)
    if ids.null_count:
        raise SourceError(f"{table.files[0].path}: column {table.id!r} has empty rows: every row needs an id")
    try:
        ids.validate(full=True)  # text that is not UTF-8 would fail later, as something else
    except pa.ArrowException:
        raise SourceError(f"{table.files[0].path}: column {table.id!r} holds what is not UTF-8 text: mend the file") from None


def _written(table: Table, batch: pa.RecordBatch, mask: NDArray[np.bool_], schema: pa.Schema) -> pa.RecordBatch:
    """The rows kept of a piece, as they are written."""
    some = batch.select(_kept_columns(table)).filter(pa.array(mask))
    return pa.record_batch([own.cast(field.type) for own, field in zip(some.columns, schema, strict=True)], schema=schema)


def _check_ids(candidates: Candidates, twice: U64) -> None:
    """Raise SourceError where ids whose numbers come twice are the same, or these numbers are their uids."""
    table = candidates.table
    met: dict[str | int, str] = {}
    for part in range(len(table.parts)):
        for at, batch in enumerate(table.read(part, table.named)):
            numbers = candidates.numbers(part, at, batch)
            some = np.flatnonzero(np.isin(numbers, twice))
            for number, one in zip(numbers[some].tolist(), rows.texts(batch.column(table.id).take(pa.array(some))), strict=True):
                key = number if candidates.numbers_are_uids else one
                if key in met:
                    path = table.parts[part].file.path
                    same = f"lists {one!r} more than once" if met[key] == one else f"lists {one!r}, which has the uid of {met[key]!r}"
                    raise SourceError(f"{path} {same}: give each id one row")
                met[key] = one


def cost(candidates: Candidates, keep: int, schema: pa.Schema) -> tuple[int, float]:
    """Bytes of a list of `keep` rows, and seconds that making it takes, both told from the first rows of the table."""
    table, share, written = candidates.table, keep / max(1, candidates.about), 0
    beginning = io.BytesIO()
    writer = Writer(beginning, schema)

    def work() -> Iterator[int]:
        nonlocal written
        for part in range(candidates.parts):
            for at, batch in enumerate(table.read(part, _columns(table))):
                _check_there(table, batch)
                if table.score is None:
                    candidates.uids(part, at, batch)
                else:
                    candidates.numbers(part, at, batch)
                some = np.diff(np.floor(np.arange(batch.num_rows + 1) * share)) > 0
                writer.write(_written(table, batch, some, schema))
                written += int(np.count_nonzero(some))
                yield batch.num_rows

    seconds = measure(work(), candidates.about)
    writer.close()
    again = 1.3  # classes and scores are read three times in all
    return beginning.tell() * keep // max(1, written), again * seconds / min(candidates.jobs, os.cpu_count() or 1)
