"""A list of what was kept of a table: one Parquet file, which says in its metadata how it was made. `docs/formats.md`, "List"."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from kdprune_data.errors import ExistsError, KdpruneError, UsageError
from kdprune_data.formats import identity, standing, table
from kdprune_data.formats import manifest as m
from kdprune_data.formats.atomic import naming, remove_empty

KEY = b"kdprune"


@dataclass(frozen=True)
class Facts:
    """How a list is made. config: every setting that changes it; inputs: the files of the table, as `rows.Table.described` tells of them;
    counts: whole numbers."""

    config: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int]

    def to_json(self) -> bytes:
        """As it stands in the file."""
        return m.canonical({"format": m.FORMAT, "config": self.config, "inputs": list(self.inputs), "counts": self.counts})


def read_facts(path: Path) -> Facts | None:
    """What a list says of itself; None for a file that is no list of ours, or not whole."""
    try:
        found = json.loads((pq.read_metadata(path).metadata or {})[KEY])
        return Facts(found["config"], found["inputs"], found["counts"]) if found["format"] == m.FORMAT else None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def look(path: Path, config: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]], *, overwrite: bool) -> str:
    """What stands where a list is to be written: nothing (`new`), this very list (`finished`), or one that is to be `replaced`.

    Raises UsageError for a name that is no Parquet file's, ExistsError where something else stands there.
    """
    if path.suffix != ".parquet":
        raise UsageError(f"--out {path} is no name of a Parquet file: give one that ends in .parquet")
    standing.check_length(path, "file")
    standing.check_around(path)
    if path.is_dir():
        raise ExistsError(f"{path} is a folder: give the name of a file with --out")
    if not path.exists():
        return "new"
    there = read_facts(path)
    if there is None:
        raise ExistsError(f"{path} is no list that this command made: choose another --out, or remove it yourself")
    if overwrite:
        return "replaced"
    wanted = json.loads(m.canonical({"config": config, "inputs": list(inputs)}))
    differs = identity.differences(there.config, wanted["config"])
    differs += [] if there.inputs == wanted["inputs"] else ["other files"]
    if not differs:
        return "finished"
    shown = "; ".join(differs[:3]) + (f"; and {len(differs) - 3} more" if len(differs) > 3 else "")
    raise ExistsError(f"{path} was made with other settings ({shown}): use another --out, or --overwrite to replace it")


class Writer:
    """Writes a list, row group by row group."""

    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema, **table.options(schema))
        self._schema = schema
        self._held: list[pa.RecordBatch] = []
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Some rows more."""
        self._held.append(batch)
        self._rows += batch.num_rows
        while self._rows >= table.ROW_GROUP:
            whole = self._whole()
            self._writer.write_table(whole.slice(0, table.ROW_GROUP), row_group_size=table.ROW_GROUP)
            self._held, self._rows = whole.slice(table.ROW_GROUP).to_batches(), self._rows - table.ROW_GROUP

    def close(self) -> None:
        """The rest, and the footer."""
        if self._rows:
            self._writer.write_table(self._whole(), row_group_size=table.ROW_GROUP)
        self._writer.close()

    def abandon(self) -> None:
        """Write no more: the file is given up. (Else the library would close it later, when it is gone, and complain aloud.)"""
        with suppress(Exception):
            self._writer.close()
        self._writer.is_open = False

    def _whole(self) -> pa.Table:
        return pa.Table.from_batches(self._held, self._schema)


@contextmanager
def create(path: Path, schema: pa.Schema, facts: Facts) -> Iterator[Writer]:
    """Write a list beside its name, then rename it; where that fails, nothing is left.

    Raises ExistsError while another process writes it, KdpruneError where nothing can be written.
    """
    around = [parent for parent in path.absolute().parents if not parent.exists()]
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with _opened(path, beside) as file:
            try:
                file.truncate(0)  # what a killed run left
                writer = Writer(file, schema.with_metadata({KEY: facts.to_json()}))
                try:
                    with naming(path):
                        yield writer
                        writer.close()
                        file.flush()
                except BaseException:
                    writer.abandon()
                    raise
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except BaseException:
        remove_empty(around)
        raise


def _opened(path: Path, beside: Path) -> BinaryIO:
    """The file beside, which this process alone writes from now on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
    except OSError as error:
        raise KdpruneError(f"cannot write in {path.parent}: {error.strerror}; choose another --out") from None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), beside.stat()):  # whoever held it has just finished
            raise BlockingIOError(errno.EAGAIN, "in use")
    except OSError as error:
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
            raise
        raise ExistsError(f"another process is writing {path}: wait for it, or choose another --out") from None
    return file
