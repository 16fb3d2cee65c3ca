"""The files of a logit cache, one by one: rows, view files plain and coded, bases and the codebook. `docs/formats.md`, "Logits".

Nothing here knows of folders that are finished, of teachers or of data sets: `kdprune_data.formats.logits` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data.errors import FormatError
from kdprune_data.formats import manifest as m
from kdprune_data.formats import table
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.lowrank import Codebook

ROWS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sha256", pa.binary(32)),
        ("label", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("top1_correct", pa.int32()),
    ]
)
GEOMETRY = ("top", "left", "height", "width")
PART_BYTES = 256_000_000
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
CODED = "coded"
CODEBOOK = "codebook.arrow"
ZSTD_LEVEL = 15
"""From here on zstd has tables of its own for each part of a buffer: a fifth fewer bytes than at level 3, at 3 us a sample."""


class ViewRows(NamedTuple):
    """One view of n samples: boxes as int32 of shape (n,), flip as bool of shape (n,), logits as float16 or float32 of shape (n, c)."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]
    logits: NDArray[np.floating]


class Boxes(NamedTuple):
    """The boxes of one view of n samples, as in `ViewRows`."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]


class Stored(Protocol):
    """The logits of one view of n samples, as they are stored."""

    @property
    def kind(self) -> tuple[str, int]:
        """The `dtype` of a manifest, and c."""
        ...

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        ...

    def __len__(self) -> int:
        """n."""
        ...

    def pick(self, at: NDArray[np.int64]) -> Self:
        """Those of some rows, still as they are stored."""
        ...

    def followed(self, others: Sequence[Self]) -> Self:
        """These and those of others, one after the other, as one."""
        ...

    def decoded(self) -> NDArray[np.floating]:
        """As numbers: float16 or float32 of shape (n, c)."""
        ...


@dataclass(frozen=True)
class Plain:
    """Logits read by memory map."""

    values: NDArray[np.floating]
    nbytes: int = 0

    @property
    def kind(self) -> tuple[str, int]:
        """See `Stored`."""
        return str(self.values.dtype), self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def pick(self, at: NDArray[np.int64]) -> Plain:
        """See `Stored`."""
        return Plain(self.values[at])

    def followed(self, others: Sequence[Plain]) -> Plain:
        """See `Stored`."""
        return Plain(np.concatenate([self.values, *(one.values for one in others)]))

    def decoded(self) -> NDArray[np.floating]:
        """See `Stored`."""
        return self.values


@dataclass(frozen=True)
class Coded:
    """Logits that are decoded when they are used. base: int16, residual: int8, of shape (n, k)."""

    book: Codebook
    base: NDArray[np.int16]
    residual: NDArray[np.int8]

    @property
    def kind(self) -> tuple[str, int]:
        """See `Stored`."""
        return CODED, self.book.vectors.shape[1]

    @property
    def nbytes(self) -> int:
        """See `Stored`."""
        return self.base.nbytes + self.residual.nbytes

    def __len__(self) -> int:
        return len(self.residual)

    def pick(self, at: NDArray[np.int64]) -> Coded:
        """See `Stored`."""
        return Coded(self.book, self.base[at], self.residual[at])

    def followed(self, others: Sequence[Coded]) -> Coded:
        """See `Stored`."""
        base, residual = (np.concatenate([getattr(one, side) for one in (self, *others)]) for side in ("base", "residual"))
        return Coded(self.book, base, residual)

    def decoded(self) -> NDArray[np.floating]:
        """See `Stored`."""
        return self.book.decode(self.base, self.residual)


def rows_path(shard: int) -> str:
    """The rows file of a shard."""
    return f"rows/shard-{shard:06d}.parquet"


def base_path(shard: int) -> str:
    """The base file of a shard of a coded cache."""
    return f"base/shard-{shard:06d}.arrow"


def view_path(first: int, last: int, shard: int) -> str:
    """The file of views first to last (both included) of a shard."""
    return f"views-{first:04d}-{last:04d}/shard-{shard:06d}.arrow"


def views_of(path: str) -> range:
    """The views in a view file, by its path."""
    return range(int(path[6:10]), int(path[11:15]) + 1)


def shard_of(path: str) -> int:
    """The shard that a view file is of, by its path."""
    return int(path.split("shard-")[1].split(".")[0])


def ranges(first: int, last: int, per_view: int) -> list[tuple[int, int]]:
    """Split views first..last (both included) so that no file passes 256 MB, or holds one view. per_view: bytes of the largest shard's."""
    width = max(1, PART_BYTES // max(per_view, 1))
    return [(at, min(at + width - 1, last)) for at in range(first, last + 1, width)]


def stored(logits: NDArray[np.float32], dtype: str) -> NDArray[np.floating]:
    """Logits as they are stored plain: z - max(z), in `dtype`, clipped to what it holds. Shape (n, c) in and out."""
    shifted = logits - logits.max(1, keepdims=True)
    kind = DTYPES[dtype]
    return np.asarray(np.maximum(shifted, np.finfo(kind).min), kind)


def top1(logits: NDArray[np.floating], labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether the largest logit (the first of equals) is the label's: bool of shape (n,), False where there is no label."""
    return np.asarray(logits.argmax(1) == labels)


def rows_digest(ids: Iterable[str], sha256: NDArray[np.uint8]) -> str:
    """sha256 (hex) over `id NUL image-sha256 LF` of a shard's rows: a view file names the rows it belongs to."""
    lines = (f"{one}\0{digest}\n" for one, digest in zip(ids, m.hexes(sha256).to_pylist(), strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def classes_digest(classes: Sequence[str]) -> str:
    """sha256 (hex) of the class names in their order: a view file says which class each of its logits is of."""
    return m.sha256_json(list(classes))


# --- writing


def write_rows(build: Build, shard: int, data: Dataset, rows: NDArray[np.int64], correct: NDArray[np.int32]) -> None:
    """Write the rows of a shard. correct: int32 of shape (n,), in how many views of the first range the top 1 was the label."""
    columns = [data.index[name].take(pa.array(rows)) for name in ("id", "sha256", "label", "height", "width")]
    with build.create(rows_path(shard)) as sink:
        table.write(sink, pa.table([*columns, pa.array(correct, pa.int32())], schema=ROWS_SCHEMA))


def write_views(build: Build, path: str, views: Sequence[ViewRows], metadata: Mapping[str, Any]) -> None:
    """Write one plain view file: a record batch per view, metadata (texts, or JSON values) in the schema."""
    names = [*GEOMETRY, "flip", "logits"]
    kinds = _narrowest_of(views)
    classes = views[0].logits.shape[1]
    logit_kind = pa.list_(pa.from_numpy_dtype(views[0].logits.dtype), classes)
    schema = pa.schema(list(zip(names, [*kinds, pa.bool_(), logit_kind], strict=True)), metadata=_texts(metadata))
    batches = []
    for view in views:
        arrays = [pa.array(getattr(view, side), kind) for side, kind in zip(GEOMETRY, kinds, strict=True)]
        logits = pa.FixedSizeListArray.from_arrays(pa.array(view.logits.reshape(-1)), classes)
        batches.append(pa.record_batch([*arrays, pa.array(view.flip), logits], schema=schema))
    with build.create(path) as sink:
        table.ipc_write(sink, batches, schema)


def write_coded(
    build: Build, path: str, boxes: Sequence[Boxes], residuals: Sequence[NDArray[np.int8]], metadata: Mapping[str, Any]
) -> None:
    """Write one coded view file: a record batch of one row per view. residuals: int8 of shape (n, k) each."""
    kinds = _narrowest_of(boxes)
    lists = [pa.list_(kind) for kind in (*kinds, pa.bool_(), pa.int8())]
    schema = pa.schema(list(zip((*GEOMETRY, "flip", "residual"), lists, strict=True)), metadata=_texts(metadata))
    batches = []
    for box, residual in zip(boxes, residuals, strict=True):
        arrays = [_one_row(getattr(box, side), kind) for side, kind in zip(GEOMETRY, kinds, strict=True)]
        batches.append(pa.record_batch([*arrays, _one_row(box.flip, pa.bool_()), _one_row(residual.T, pa.int8())], schema=schema))
    with build.create(path) as sink:
        table.ipc_write(sink, batches, schema, zstd=ZSTD_LEVEL)


def write_base(build: Build, shard: int, base: NDArray[np.int16], metadata: Mapping[str, Any]) -> None:
    """Write the base of a shard. base: int16 of shape (n, k)."""
    schema = pa.schema([("base", pa.list_(pa.int16()))], metadata=_texts(metadata))
    with build.create(base_path(shard)) as sink:
        table.ipc_write(sink, [pa.record_batch([_one_row(base.T, pa.int16())], schema=schema)], schema, zstd=ZSTD_LEVEL)


def codebook_bytes(book: Codebook, facts: Mapping[str, Any]) -> bytes:
    """A codebook as the bytes of its file. `facts`: what else its metadata hold (texts, or JSON values)."""
    kind = pa.list_(pa.int32(), book.vectors.shape[1])
    metadata = _texts({"format": "1", "step": repr(book.step), "multiple": str(book.multiple)} | dict(facts))
    schema = pa.schema([("vector", kind)], metadata=metadata)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(book.vectors.reshape(-1)), book.vectors.shape[1])
    sink = pa.BufferOutputStream()
    table.ipc_write(sink, [pa.record_batch([vectors], schema=schema)], schema)
    return bytes(sink.getvalue())


def _one_row(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Numbers as the only row of a column of lists."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
    return pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat)


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {k: v if isinstance(v, str) else m.canonical(v).decode() for k, v in metadata.items()}


def _narrowest_of(boxes: Sequence[Any]) -> list[pa.DataType]:
    return [_narrowest([getattr(one, side) for one in boxes]) for side in GEOMETRY]


def _narrowest(columns: Sequence[NDArray[np.int32]]) -> pa.DataType:
    low, high = min(int(c.min()) for c in columns), max(int(c.max()) for c in columns)
    return next(k for k, bound in ((pa.int8(), 1 << 7), (pa.int16(), 1 << 15), (pa.int32(), 1 << 31)) if -bound <= low and high < bound)


# --- reading: what is not as the page says raises what arrow or numpy raise, or ValueError; whoever reads makes one error of them

BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError)
BOX_TYPES = (pa.int8(), pa.int16(), pa.int32())


def read_codebook(path: Path) -> tuple[Codebook, dict[str, Any]]:
    """A codebook, and its facts: `temperatures`, `fidelity`, `kl`, `rounding`. Raises FormatError."""
    reader = table.ipc_open(path)
    try:
        metadata = metadata_of(reader)
        if metadata["format"] != "1" or reader.num_record_batches != 1 or reader.schema.names != ["vector"]:
            raise ValueError(metadata["format"])
        column = table.ipc_batch(reader, 0).column(0)
        vectors = _of_type(column.flatten(), pa.int32()).to_numpy().reshape(len(column), -1)
        book = Codebook(vectors, float(metadata["step"]), int(metadata["multiple"]))
        if book.directions < 1 or not (0 < book.step < np.inf and 1 <= book.multiple <= 128):
            raise ValueError(book.step)
        return book, {key: json.loads(metadata[key]) for key in ("temperatures", "fidelity", "kl", "rounding")}
    except BROKEN as error:
        raise FormatError(f"{path} is no codebook as its format says ({type(error).__name__}): make or fetch the cache again") from None


def metadata_of(reader: Any) -> dict[str, str]:
    """The texts in a file's schema."""
    return {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}


def view_boxes(batch: pa.RecordBatch, *, coded: bool) -> Boxes:
    """The boxes of one view of a plain or coded file."""
    columns = [_only_row(batch, name) if coded else batch.column(name) for name in (*GEOMETRY, "flip")]
    # Stored in the narrowest integer: sums such as top + height would leave an int8.
    top, left, height, width = (np.asarray(_of_type(column, *BOX_TYPES).to_numpy(), np.int32) for column in columns[:4])
    boxes = Boxes(top, left, height, width, np.asarray(_of_type(columns[4], pa.bool_()).to_numpy(zero_copy_only=False), bool))
    if len({len(side) for side in boxes}) != 1:
        raise ValueError("columns of different lengths")
    if min(height.min(initial=1), width.min(initial=1)) < 1:
        raise ValueError("an empty box")
    return boxes


def plain_view(batch: pa.RecordBatch) -> tuple[Boxes, Plain]:
    """One view of a plain file."""
    logits = batch.column("logits").flatten().to_numpy().reshape(len(batch), -1)
    return view_boxes(batch, coded=False), Plain(logits)


def coded_view(batch: pa.RecordBatch, book: Codebook, base: NDArray[np.int16]) -> tuple[Boxes, Coded]:
    """One view of a coded file. Raises ValueError where its numbers are not as many as the base's rows."""
    return view_boxes(batch, coded=True), Coded(book, base, _by_row(batch, "residual", pa.int8(), book))


def read_base(reader: Any, book: Codebook) -> NDArray[np.int16]:
    """The base in a base file: int16 of shape (n, k)."""
    if reader.num_record_batches != 1:
        raise ValueError(reader.num_record_batches)
    return _by_row(table.ipc_batch(reader, 0), "base", pa.int16(), book)


def _by_row(batch: pa.RecordBatch, name: str, kind: pa.DataType, book: Codebook) -> NDArray[Any]:
    """Numbers that stand direction by direction: of shape (n, k), those of a row together."""
    numbers = _of_type(_only_row(batch, name), kind).to_numpy()
    return np.ascontiguousarray(numbers.reshape(book.directions, -1).T)


def _only_row(batch: pa.RecordBatch, name: str) -> pa.Array:
    if len(batch) != 1:
        raise ValueError(f"{len(batch)} rows in a view")
    return batch.column(name).flatten()


def _of_type(column: pa.Array, *kinds: pa.DataType) -> pa.Array:
    if column.type not in kinds or column.null_count:
        raise TypeError(f"{column.type} with {column.null_count} nulls")
    return column
