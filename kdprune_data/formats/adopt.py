"""Reading shards that others wrote, where they lie: the index rows of each, and its sha256. Nothing is written beside them.

A shard is read by one thread, once: headers, labels, and every image (decoded and hashed, or without digests its header alone). Its rows
go to `.partial/` as they are finished, so that an interrupted `index` need not read it again, as long as it is the same file, with the same
time of change. The labels stay as they stand, numbers or texts, until all shards have been read: only then do texts have numbers.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdprune_data import images, order
from kdprune_data.errors import FormatError, SourceError
from kdprune_data.formats import grouping, indexing, manifest, table, tar
from kdprune_data.formats.build import Build
from kdprune_data.formats.members import Members, Numbering
from kdprune_data.formats.reading import TarFile
from kdprune_data.formats.shard import check_image

SCHEMA = indexing.SCHEMA.append(pa.field("text", pa.string()))
"""The rows of a shard before its labels are numbered: a label is in `label` or in `text`."""


@dataclass(frozen=True)
class Reading:
    """How shards are read. `id`: `key` or `shard`; `keep_bad`: images that do not decode are indexed as unusable; `digests`: every byte is
    read and hashed, every image decoded; else headers alone."""

    members: Members
    id: str
    keep_bad: bool
    digests: bool


@dataclass(frozen=True)
class Shard:
    """What was read of one: rows as in SCHEMA, and the tar's sha256 (hex; None without digests)."""

    rows: pa.Table
    sha256: str | None


def read_shard(build: Build, number: int, path: Path, reading: Reading) -> Shard:
    """Read one shard, or what an interrupted run read of it. Raises SourceError for a tar, a sample or an image that cannot be used."""
    scratch = build.scratch(f"{number:06d}.rows")
    of = _fingerprint(path)
    if (found := _standing(scratch, of)) is not None:
        return found
    made = None if reading.digests else from_headers(number, path, reading)
    if made is None:
        rows = indexing.Rows(number, SCHEMA)
        for row, _ in sample_rows(path, reading):
            rows.add(**row)
        made = rows.table()
    digest = manifest.sha256_file(path) if reading.digests else None
    note = manifest.canonical({"of": of, "sha256": digest})
    build.write_scratch(scratch.name, table.to_bytes(made.replace_schema_metadata({"shard": note})))
    return Shard(made, digest)


def _standing(scratch: Path, of: object) -> Shard | None:
    """What an interrupted run read of this very shard, or None: what a power failure has torn is read again."""
    try:
        found = table.read(scratch, SCHEMA)
        noted = json.loads((found.schema.metadata or {})[b"shard"])
        return Shard(found.replace_schema_metadata(None), noted["sha256"]) if noted["of"] == of else None
    except (FormatError, ValueError, LookupError, TypeError):
        return None


def sample_rows(path: Path, reading: Reading) -> Iterator[tuple[dict[str, Any], int]]:
    """The row of each sample of a shard, by column, and the bytes of its record. Raises SourceError as `read_shard` does."""
    buffer, where = tar.map_file(path), str(path)
    with TarFile(path) as file:  # of which the headers take less to read than of the map
        for record in tar.records(file, where):
            image = reading.members.image_of(record, where)
            label = reading.members.label_of(buffer, record, where)
            seen = _image(buffer, image, where, record.key, reading)
            row = {
                "id": f"{path.stem}/{record.key}" if reading.id == "shard" else record.key,
                "key": record.key,
                "offset": record.offset,
                "length": record.length,
                "label": None if isinstance(label, str) else label,
                "text": label if isinstance(label, str) else None,
                "image_offset": image.data,
                "image_length": image.size,
            }
            yield row | seen, record.length


def from_headers(number: int, path: Path, reading: Reading) -> pa.Table | None:
    """The rows of a shard of which no image is read whole, a column at a time; None for what is left to `sample_rows`.

    Raises SourceError as `read_shard` does.
    """
    buffer, where, members = tar.map_file(path), str(path), reading.members
    with TarFile(path) as file:
        files = tar.files(file, where)
    found = None if files is None else grouping.samples(files)
    if files is None or found is None:
        return None
    image = found.only(images.MEMBERS if members.image is None else (members.image,))
    label = found.only((members.label_extension,))
    if image is None or label is None or image.min() < 0:  # which sample that is, and what to do, is said there
        return None
    view, keys = memoryview(buffer), found.keys
    labels, heights, widths = list[int | str | None](), list[int](), list[int]()
    starts, lengths = files.data[image], files.sizes[image]
    places = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    label_places = zip(label.tolist(), files.data[label].tolist(), (files.data + files.sizes)[label].tolist(), strict=True)
    for key, (start, end), (has_label, label_start, label_end) in zip(keys, places, label_places, strict=True):
        labels.append(None if has_label < 0 else members.label_in(buffer[label_start:label_end], where, key))
        height, width = _header(view[start:end], where, key, reading.keep_bad)
        heights.append(height)
        widths.append(width)
    ids = [f"{path.stem}/{key}" for key in keys] if reading.id == "shard" else keys
    columns = {
        "id": ids,
        "key": keys,
        "uid": order.uids_of(ids),
        "shard": np.full(len(ids), number, np.int32),
        "offset": found.starts,
        "length": found.ends - found.starts,
        "label": [None if isinstance(one, str) else one for one in labels],
        "text": [one if isinstance(one, str) else None for one in labels],
        "image_offset": starts,
        "image_length": lengths,
        "sha256": pa.nulls(len(ids), SCHEMA.field("sha256").type),
        "width": widths,
        "height": heights,
        "ok": np.array(heights) > 0,
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA})


def _image(buffer: mmap.mmap, image: tar.Member, where: str, key: str, reading: Reading) -> dict[str, Any]:
    if reading.digests:
        data = bytes(buffer[image.data : image.data + image.size])
        height, width = check_image(data, f"{where} sample {key!r}", reading.keep_bad)
        digest = indexing.image_digest(data)
    else:
        height, width = _header(memoryview(buffer)[image.data : image.data + image.size], where, key, reading.keep_bad)
        digest = None
    return {"sha256": digest, "width": width, "height": height, "ok": height > 0}


def _header(data: memoryview, where: str, key: str, keep_bad: bool) -> tuple[int, int]:
    try:
        return images.size(data)
    except SourceError as error:
        if keep_bad:
            return 0, 0
        raise SourceError(f"{where} sample {key!r}: {error}; mend or remove it, or pass --on-bad keep to carry it along unused") from None


def _fingerprint(path: Path) -> list[Any]:
    """Tells whether a file is the one that an interrupted run read."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


def labels_met(rows: Sequence[pa.Table], paths: Sequence[Path]) -> dict[int | str, str]:
    """Each distinct label of the shards, with the shard and sample that had it first."""
    met: dict[int | str, str] = {}
    for one, path in zip(rows, paths, strict=True):
        for column in ("label", "text"):
            values = one[column].combine_chunks()
            for value in pc.unique(values).drop_null().to_pylist():
                if value not in met:
                    met[value] = f"{path} sample {one['key'][pc.index(values, pa.scalar(value, values.type)).as_py()].as_py()!r}"
    return met


def numbered(rows: pa.Table, numbering: Numbering) -> pa.Table:
    """Rows as in SCHEMA with their labels as class numbers: an index."""
    texts = pc.dictionary_encode(rows["text"].combine_chunks())
    numbers = pa.array([numbering.number(text) for text in texts.dictionary.to_pylist()], pa.int32())
    labels = pc.coalesce(rows["label"].combine_chunks(), numbers.take(texts.indices))
    return rows.set_column(rows.schema.get_field_index("label"), indexing.SCHEMA.field("label"), labels).select(indexing.SCHEMA.names)


def check_ids(index: pa.Table, paths: Sequence[Path]) -> None:
    """Raise SourceError when two shards have a sample of one id, naming both."""
    twice = order.first_repeat(index["uid"].to_numpy())
    if twice is None:
        return
    ids, shards = ([index[name][int(n)].as_py() for n in twice] for name in ("id", "shard"))
    if ids[0] == ids[1]:
        a, b = (paths[n] for n in shards)
        raise SourceError(f"sample {ids[0]!r} is in {a} and in {b}: ids must be unique; pass --id shard to name samples SHARD/key")
