"""Hugging Face image Parquet: `image: struct<bytes, path>` (or plain binary) and `label: int64`, class names in the schema metadata.

Labels may be texts as well, and both may be of the other types that polars and pandas write: large, views, dictionaries. Labels and paths
are read first, whole; images then by so many rows at a time as fit what may be held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdprune_data.errors import SourceError, UsageError, some
from kdprune_data.formats.members import CLASSES_LIMIT, MIRRORING, classes_beside, invented
from kdprune_data.sources import pages
from kdprune_data.sources.base import Item, Outline, SourceOptions, is_inside, key_of, listing, outlined, places_of


class ParquetSource:
    """Parquet files of one schema, read one after another."""

    name = "parquet"
    shuffles = True
    left_out: Sequence[str] = ()

    def __init__(self, paths: Sequence[Path], options: SourceOptions) -> None:
        self.paths = paths
        self.where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more"
        self.train = options.train
        self.read_bytes = options.read_bytes
        self.files, schemas = zip(*map(pages.look, paths), strict=True)
        self.schema = schemas[0]
        for path, schema in zip(paths, schemas, strict=True):
            if not schema.equals(self.schema):
                raise SourceError(f"{path} has other columns than {paths[0]}: import files of one schema")
        self.image_column = options.image_column or self._find("Image", ("image", "img", "jpg", "png"), _is_image)
        self.label_column = options.label_column or self._find("ClassLabel", ("label", "labels", "cls", "fine_label"), _is_label)
        for column, fits in ((self.image_column, _is_image), (self.label_column, _is_label)):
            if column not in self.schema.names:
                raise UsageError(f"{self.where} has no column {column!r}: it has {', '.join(self.schema.names)}")
            if not fits(self.schema.field(column).type):
                kind = self.schema.field(column).type
                raise UsageError(f"{self.where}: column {column!r} is {kind}: not images (or labels); name another")
        if len(self) == 0:
            raise SourceError(f"{self.where} has no rows: nothing to import")

    def _find(self, feature: str, names: Sequence[str], fits: Any) -> str:
        found = [name for name, spec in self._features.items() if isinstance(spec, dict) and spec.get("_type") == feature]
        found = found or [name for name in names if name in self.schema.names and fits(self.schema.field(name).type)]
        if not found or (len(found) > 1 and feature == "Image"):
            kind = "image" if feature == "Image" else "label"
            raise UsageError(f"{self.where}: which column holds the {kind}? name it with --{kind}-column: {', '.join(self.schema.names)}")
        return found[0]

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
        found = []
        for path, file in zip(self.paths, self.files, strict=True):
            with pages.reading(path):
                found.append(pages.open_file(path, file).read(columns=[name]).column(0))
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
        if top is not None and top >= CLASSES_LIMIT:
            raise SourceError(
                f"{self.where} has label {top:,}: without class names at most {CLASSES_LIMIT - 1:,}; number the classes from 0"
            )
        return invented(0 if top is None else top + 1)

    @cached_property
    def classes(self) -> Sequence[str]:
        """Its own (see `_own`); or train's, where those are among them: by name, or by number where neither has names."""
        return classes_beside(self.train, self._own, named=self._named)

    @property
    def _named(self) -> bool:
        """Whether its classes have names."""
        return bool(self._names) or not pa.types.is_integer(self._labels.type)

    @cached_property
    def notes(self) -> Sequence[str]:
        """See `Source`."""
        if (self.outline.labels < 0).all():
            return ("no sample has a label: name the column that holds them with --label-column, if there is one",)
        return () if self._named else (f"classes are unnamed: the schema has no names of theirs ({MIRRORING})",)

    @cached_property
    def _keys_from_paths(self) -> bool:
        """Whether every row has a relative path and no two are the same."""
        kind = self.schema.field(self.image_column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return False
        paths = self._paths()
        if paths.null_count or len(pc.unique(paths)) < len(paths):
            return False
        return all(is_inside(path) for path in _texts(paths))

    def _paths(self) -> pa.ChunkedArray:
        return self._column(f"{self.image_column}.path")

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        files = {
            "source_files": listing((p.name, p.stat().st_size) for p in self.paths),
            "source_footers": hashlib.sha256(b"".join(pages.footer(p) for p in self.paths)).hexdigest(),
        }
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        taken = {} if list(self.classes) == list(self._own) else {"classes": list(self.classes)}
        return {"source": self.name} | files | columns | taken

    def __len__(self) -> int:
        return int(sum(file.num_rows for file in self.files))

    @cached_property
    def bytes(self) -> int:
        """About how many bytes its images are: see `pages.size`."""
        return pages.size(self.paths, self.files, self.image_column)

    @cached_property
    def outline(self) -> Outline:
        """See `Source`."""
        own = self._numbers()
        labels = np.full(len(own), -1, np.int32)
        labels[own >= 0] = places_of(self._own, self.classes)[own[own >= 0]]
        if not self._keys_from_paths:
            return outlined((f"{row:08d}" for row in range(len(self))), labels, lambda row: (self._origin(row), f"{row:08d}"))
        paths = self._paths()
        return outlined(map(key_of, _texts(paths)), labels, lambda row: (self._origin(row), key_of(paths[row].as_py())))

    def _numbers(self) -> NDArray[np.int64]:
        """Each row's place among its own classes, -1 for none. Raises SourceError for a number outside them."""
        found = self._labels
        if pa.types.is_string(found.type):
            return np.asarray(pc.index_in(found, pa.array(self._own, pa.string())).fill_null(-1).to_numpy(), np.int64)
        numbers = np.asarray(found.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(), np.int64)
        wrong = np.flatnonzero((numbers < -1) | (numbers >= len(self._own)))  # -1 is how Hugging Face's ClassLabel says that there is none
        if len(wrong):
            at = f"{self._origin(int(wrong[0]))} has label {found[int(wrong[0])].as_py()}"
            raise SourceError(f"{at}, outside 0 to {len(self._own) - 1} ({some(self._own)}): mend it or drop the row")
        return numbers

    def _origin(self, row: int) -> str:
        for path, file in zip(self.paths, self.files, strict=True):
            if row < file.num_rows:
                return f"{path} row {row}"
            row -= file.num_rows
        return f"row {row}"

    def __iter__(self) -> Iterator[Item]:
        row = 0
        for path, file in zip(self.paths, self.files, strict=True):
            for place, image in enumerate(pages.images(path, file, self.image_column, self.read_bytes)):
                data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
                origin = f"{path} row {place}"
                if data is None:
                    raise SourceError(f"{origin} has no image bytes: only Parquet that holds the images themselves can be imported")
                label = int(self.outline.labels[row])
                yield Item(key_of(str(name)) if self._keys_from_paths else f"{row:08d}", data, None if label < 0 else label, origin)
                row += 1


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    """The values of a column of texts, few at a time."""
    for chunk in column.chunks:
        for at in range(0, len(chunk), pages.MOST_ROWS):
            yield from chunk.slice(at, pages.MOST_ROWS).to_pylist()


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type under a dictionary; `string` for all types of text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(_plain(kind)) or pa.types.is_string(_plain(kind)))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
