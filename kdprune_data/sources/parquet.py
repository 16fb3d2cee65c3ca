"""Hugging Face image Parquet: `image: struct<bytes, path>` (or plain binary) and `label: int64`, class names in the schema metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdprune_data.errors import SourceError, UsageError, first_line, some
from kdprune_data.sources.base import Item, is_inside, key_of, listing

BATCH_ROWS = 1000


class ParquetSource:
    """One file, or all `*.parquet` of a folder in the order of their names."""

    name = "parquet"
    left_out: Sequence[str] = ()

    def __init__(self, path: Path, *, image_column: str | None = None, label_column: str | None = None) -> None:
        self.paths = paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        try:
            self.files = [pq.ParquetFile(p, memory_map=True) for p in paths]
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path} cannot be read as Parquet ({first_line(error)}): fetch it again") from None
        self.path = path
        self.schema = self.files[0].schema_arrow
        for p, file in zip(paths, self.files, strict=True):
            if not file.schema_arrow.equals(self.schema):
                raise SourceError(f"{p} has other columns than {paths[0]}: import files of one schema")
        self.image_column = image_column or self._find("Image", ("image", "img", "jpg", "png"), self._is_image)
        self.label_column = label_column or self._find("ClassLabel", ("label", "labels", "cls", "fine_label"), self._is_label)
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
        return bool((pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) or pa.types.is_binary(kind))

    @staticmethod
    def _is_label(kind: pa.DataType) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_string(kind))

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
        return pa.chunked_array([c for f in self.files for c in f.read(columns=[self.label_column]).column(0).chunks])

    @cached_property
    def classes(self) -> Sequence[str]:
        """From the schema's ClassLabel; else the distinct label texts, sorted; else `class 0` ... up to the largest label."""
        names = self._features.get(self.label_column, {}).get("names")
        if names:
            return [str(name) for name in names]
        if pa.types.is_string(self._labels.type):
            return sorted(pc.unique(self._labels.drop_null()).to_pylist())
        top = pc.max(self._labels).as_py()
        return [f"class {n}" for n in range(0 if top is None else top + 1)]

    @cached_property
    def _keys_from_paths(self) -> bool:
        """Whether every row has a relative path and no two are the same."""
        kind = self.schema.field(self.image_column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return False
        chunks = [c for f in self.files for c in f.read(columns=[f"{self.image_column}.path"]).column(0).chunks]
        paths = pc.struct_field(pa.chunked_array(chunks), "path") if chunks else pa.chunked_array([[]], pa.string())
        if paths.null_count or len(pc.unique(paths)) < len(paths):
            return False
        return all(is_inside(path) for path in paths.to_pylist())

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return {"source": self.name, "source_files": listing((p.name, p.stat().st_size) for p in self.paths)} | columns

    def __len__(self) -> int:
        return int(sum(f.metadata.num_rows for f in self.files))

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return int(sum(f.metadata.row_group(n).total_byte_size for f in self.files for n in range(f.num_row_groups)))

    def __iter__(self) -> Iterator[Item]:
        numbers = {name: n for n, name in enumerate(self.classes)}
        row = 0
        for file in self.files:
            for batch in file.iter_batches(BATCH_ROWS, columns=[self.image_column, self.label_column]):
                images = batch.column(self.image_column).to_pylist()
                for image, label in zip(images, batch.column(self.label_column).to_pylist(), strict=True):
                    yield self._item(row, image, numbers[label] if isinstance(label, str) else label)
                    row += 1

    def _item(self, row: int, image: Any, label: int | None) -> Item:
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        origin = f"{self.path} row {row}"
        if not data:
            raise SourceError(f"{origin} has no image bytes: only Parquet that holds the images themselves can be imported")
        if label == -1:  # how Hugging Face's ClassLabel says that there is none
            label = None
        if label is not None and not 0 <= label < len(self.classes):
            known = some(self.classes)
            raise SourceError(f"{origin} has label {label}, outside 0 to {len(self.classes) - 1} ({known}): mend it or drop the row")
        return Item(key_of(str(path)) if self._keys_from_paths else f"{row:08d}", data, label, origin)
