"""Hugging Face image Parquet: `image: struct<bytes, path>` (or plain binary) and `label: int64`, class names in the schema metadata.

Labels may be texts as well, and both may be of the other types that polars and pandas write: large, views, dictionaries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdprune_data.errors import SourceError, UsageError, first_line, some
from kdprune_data.sources.base import Item, SourceOptions, classes_of, is_inside, key_of, listing

BATCH_ROWS = 1000
SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(?![^\W\d_])", re.IGNORECASE)
"""How the name of a file begins that holds one split."""


class ParquetSource:
    """One file, or all `*.parquet` of a folder in the order of their names."""

    name = "parquet"
    left_out: Sequence[str] = ()

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.paths = paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self.train = options.train
        _check_one_split(path, paths)
        try:
            self.files = [pq.ParquetFile(p, memory_map=True) for p in paths]
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path} cannot be read as Parquet ({first_line(error)}): fetch it again") from None
        self.path = path
        self.schema = self.files[0].schema_arrow
        for p, file in zip(paths, self.files, strict=True):
            if not file.schema_arrow.equals(self.schema):
                raise SourceError(f"{p} has other columns than {paths[0]}: import files of one schema")
        self.image_column = options.image_column or self._find("Image", ("image", "img", "jpg", "png"), self._is_image)
        self.label_column = options.label_column or self._find("ClassLabel", ("label", "labels", "cls", "fine_label"), self._is_label)
        for column, fits in ((self.image_column, self._is_image), (self.label_column, self._is_label)):
            if column not in self.schema.names:
                raise UsageError(f"{path} has no column {column!r}: it has {', '.join(self.schema.names)}")
            if not fits(self.schema.field(column).type):
                raise UsageError(f"{path}: column {column!r} is {self.schema.field(column).type}: not images (or labels); name another")
        if len(self) == 0:
            raise SourceError(f"{path} has no rows: nothing to import")

    def _find(self, feature: str, names: Sequence[str], fits: Any) -> str:
        found = [name for name, spec in self._features.items() if isinstance(spec, dict) and spec.get("_type") == feature]
        found = found or [name for name in names if name in self.schema.names and fits(self.schema.field(name).type)]
        if not found or (len(found) > 1 and feature == "Image"):
            kind = "image" if feature == "Image" else "label"
            raise UsageError(f"{self.path}: which column holds the {kind}? name it with --{kind}-column: {', '.join(self.schema.names)}")
        return found[0]

    @staticmethod
    def _is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and _is_binary(kind.field(at).type)
        return _is_binary(kind)

    @staticmethod
    def _is_label(kind: pa.DataType) -> bool:
        return bool(pa.types.is_integer(_plain(kind)) or pa.types.is_string(_plain(kind)))

    @cached_property
    def _features(self) -> dict[str, Any]:
        """The data set features that Hugging Face's `datasets` writes into the schema."""
        raw = (self.schema.metadata or {}).get(b"huggingface")
        try:
            found = json.loads(raw)["info"]["features"] if raw else {}
        except (ValueError, KeyError, TypeError):
            found = {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def _labels(self) -> pa.ChunkedArray:
        return self._column(self.label_column)

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of labels or paths, whole, as plain integers or strings."""
        found = [f.read(columns=[name]).column(0) for f in self.files]
        if "." in name and pa.types.is_struct(found[0].type):
            found = [pc.struct_field(one, 0) for one in found]
        return pa.chunked_array([c for one in found for c in one.cast(_plain(one.type)).chunks], _plain(found[0].type))

    @cached_property
    def _names(self) -> Sequence[str]:
        """The names in the schema's ClassLabel, if there are any."""
        return [str(name) for name in self._features.get(self.label_column, {}).get("names") or ()]

    @cached_property
    def _own(self) -> Sequence[str]:
        """From the schema's ClassLabel; else the distinct label texts, sorted; else `class 0` ... up to the largest label."""
        if self._names:
            return self._names
        if pa.types.is_string(self._labels.type):
            return sorted(pc.unique(self._labels.drop_null()).to_pylist())
        top = pc.max(self._labels).as_py()
        return _numbered(0 if top is None else top + 1)

    @cached_property
    def classes(self) -> Sequence[str]:
        """Its own (see `_own`); or train's, where those are among them: by name, or by number where neither has names."""
        if not self._names and pa.types.is_integer(self._labels.type) and list(self.train) != _numbered(len(self.train)):
            return self._own
        return classes_of(self._own, self.train)

    @cached_property
    def _keys_from_paths(self) -> bool:
        """Whether every row has a relative path and no two are the same."""
        kind = self.schema.field(self.image_column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return False
        paths = self._column(f"{self.image_column}.path")
        if paths.null_count or len(pc.unique(paths)) < len(paths):
            return False
        return all(is_inside(path) for path in paths.to_pylist())

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        files = {
            "source_files": listing((p.name, p.stat().st_size) for p in self.paths),
            "source_footers": hashlib.sha256(b"".join(_footer(p) for p in self.paths)).hexdigest(),
        }
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        taken = {} if list(self.classes) == list(self._own) else {"classes": list(self.classes)}
        return {"source": self.name} | files | columns | taken

    def __len__(self) -> int:
        return int(sum(f.metadata.num_rows for f in self.files))

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return int(sum(f.metadata.row_group(n).total_byte_size for f in self.files for n in range(f.num_row_groups)))

    def __iter__(self) -> Iterator[Item]:
        numbers = {name: n for n, name in enumerate(self._own)}
        row = 0
        for file in self.files:
            for batch in file.iter_batches(BATCH_ROWS, columns=[self.image_column, self.label_column]):
                images = batch.column(self.image_column).to_pylist()
                for image, label in zip(images, batch.column(self.label_column).to_pylist(), strict=True):
                    yield self._item(row, image, numbers[label] if isinstance(label, str) else label)
                    row += 1

    @cached_property
    def _places(self) -> Sequence[int]:
        """For each of its own classes, the place in `classes`."""
        if list(self._own) == list(self.classes):  # two may have one name
            return range(len(self._own))
        places = {name: n for n, name in enumerate(self.classes)}
        return [places[name] for name in self._own]

    def _item(self, row: int, image: Any, label: int | None) -> Item:
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        origin = f"{self.path} row {row}"
        if not data:
            raise SourceError(f"{origin} has no image bytes: only Parquet that holds the images themselves can be imported")
        if label == -1:  # how Hugging Face's ClassLabel says that there is none
            label = None
        if label is not None and not 0 <= label < len(self._own):
            known = some(self._own)
            raise SourceError(f"{origin} has label {label}, outside 0 to {len(self._own) - 1} ({known}): mend it or drop the row")
        if label is not None:
            label = self._places[label]
        return Item(key_of(str(path)) if self._keys_from_paths else f"{row:08d}", data, label, origin)


def _check_one_split(path: Path, paths: Sequence[Path]) -> None:
    """Refuse a folder of several splits: merged, a test set would be trained on."""
    splits = sorted({found[1].lower() for p in paths if (found := SPLIT.match(p.name))})
    if len(splits) > 1:
        raise UsageError(f"{path} holds files of several splits ({some(splits)}): import one at a time, by its file or a folder of its own")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type under a dictionary; `string` for all types of text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _numbered(n: int) -> list[str]:
    """The names of classes that have none."""
    return [f"class {i}" for i in range(n)]


def _footer(path: Path) -> bytes:
    """The sha256 of a file's footer: where each row group lies, how large it is, and from which values to which."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)  # 4 bytes of length, then `PAR1`
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).digest()
