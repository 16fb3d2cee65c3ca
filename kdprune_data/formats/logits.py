"""The logit cache, read: a teacher's logits for many views of every sample, joined with a data set by id.

`LogitCache.open` reads a finished cache; `join` aligns it with a data set by id, once, into integer row numbers; `Joined.read` gathers a
batch of one view. Every check that stands between a student and wrong soft labels is here. The files themselves are
`kdprune_data.formats.logit_files`, the coded form `kdprune_data.formats.lowrank`. `docs/formats.md`, "Logits".
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError, MismatchError, UsageError, first_line, some
from kdprune_data.formats import indexing, table
from kdprune_data.formats import manifest as m
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logit_files import (
    BROKEN,
    CODEBOOK,
    CODED,
    DTYPES,
    ROWS_SCHEMA,
    Boxes,
    Stored,
    ViewRows,
    base_path,
    classes_digest,
    coded_view,
    metadata_of,
    plain_view,
    read_base,
    read_codebook,
    rows_digest,
    rows_path,
    shard_of,
    view_boxes,
    view_path,
    views_of,
)
from kdprune_data.formats.lowrank import Codebook
from kdprune_data.formats.manifest import Manifest

__all__ = ["Joined", "LogitCache", "Opened", "boxes_of", "normalisation_of", "open_view", "read_view"]
ENDLESS = ("pad-crop", "resized-crop")
"""Kinds of policies of which there is always another view."""
OPEN_BYTES = 256_000_000
"""Of each kind, what is held open takes about this much memory at most: views of the shards that are trained in turn, and of the next."""
ENTRY_BYTES = 16_384
"""What is held takes some memory and a memory map, however small it is: so there are at most 16,000."""
K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values used last, by key, of OPEN_BYTES in all, or one. May be used by several threads. size: bytes of a value."""

    def __init__(self, size: Callable[[V], int]) -> None:
        self._size, self._found, self._bytes = size, OrderedDict[K, V](), 0
        self._mutex, self._making = Lock(), Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made where it is not at hand."""
        if (found := self._at_hand(key)) is not None:
            return found
        with self._making:  # other threads wait, and do not make the same
            if (found := self._at_hand(key)) is not None:
                return found
            made = make()
            with self._mutex:
                self._found[key] = made
                self._bytes += self._size(made) + ENTRY_BYTES
                while self._bytes > OPEN_BYTES and len(self._found) > 1:
                    self._bytes -= self._size(self._found.popitem(last=False)[1]) + ENTRY_BYTES
        return made

    def _at_hand(self, key: K) -> V | None:
        with self._mutex:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)


class Rows(NamedTuple):
    """What is checked against the rows of a shard: their labels, int32 of shape (n,), -1 = none, and the digest that names them."""

    labels: NDArray[np.int32]
    digest: str


@dataclass(frozen=True)
class LogitCache:
    """A finished logit cache, opened for reading."""

    folder: Path
    manifest: Manifest
    _rows: Recent[int, Rows] = field(default_factory=lambda: Recent(lambda rows: rows.labels.nbytes), init=False, repr=False, compare=False)
    _bases: Recent[int, NDArray[np.int16]] = field(
        default_factory=lambda: Recent(lambda base: base.nbytes), init=False, repr=False, compare=False
    )

    @classmethod
    def open(cls, folder: str | Path) -> LogitCache:
        """Open a cache. Raises UsageError when the folder is none, FormatError when its manifest is not as the format says, or a view of it
        is missing."""
        folder = Path(folder)
        cache = cls(folder, Manifest.load(folder, kinds=("logits",)))
        try:
            cache._check_manifest()
        except (ValueError, TypeError, LookupError) as error:
            raise FormatError(f"{folder / m.NAME} is not that of a logit cache ({first_line(error)}): make or fetch it again") from None
        covered = sorted({(a, b) for a, b, _ in cache.parts})
        if [v for a, b in covered for v in range(a, b + 1)] != list(range(cache.views)):
            raise FormatError(f"{folder} says {cache.views} views, its files hold {covered}: run cache again, or fetch it again")
        if len(cache.parts) != len(covered) * len(cache.shards):
            raise FormatError(f"{folder} does not hold every range of views of every shard: run cache again, or fetch it again")
        return cache

    def _check_manifest(self) -> None:
        """Raise ValueError, TypeError or LookupError unless what is read of the manifest is there."""
        config, views = self.manifest.config, self.manifest.counts["views"]
        if type(views) is not int or views < 1:
            raise ValueError(f"views {views!r}")
        if config["dtype"] not in (*DTYPES, CODED):
            raise ValueError(f"dtype {config['dtype']!r}")
        if not isinstance(config["policy"], dict):
            raise TypeError(f"policy {config['policy']!r}")
        numbers = [*config["temperatures"], config["fidelity"]] if self.coded else []
        numbers += [config["ensemble"]["temperature"]] if "ensemble" in config else []
        if not all(isinstance(one, int | float) and one > 0 for one in numbers) or len(numbers) < 2 * self.coded:
            raise TypeError(f"temperatures and fidelity {numbers}")
        once = [rows_path, base_path] if self.coded else [rows_path]
        missing = {path(shard) for shard in self.shards for path in once}.union([CODEBOOK] if self.coded else []) - self.sha256.keys()
        if missing:
            raise LookupError(f"{min(missing)} is not listed")

    def __reduce__(self) -> tuple[object, ...]:
        return (LogitCache, (self.folder, self.manifest))

    @property
    def views(self) -> int:
        """How many views there are, numbered from 0."""
        return int(self.manifest.counts["views"])

    def count_of(self, asked: int | None) -> int:
        """How many of its views that is: all for None. Raises UsageError for more than there are."""
        if asked is not None and asked > self.views:
            more = self.policy["kind"] in ENDLESS
            how = f"make more with cache --views {asked}" if more else f"these are all, of policy {self.policy['kind']}; ask for fewer"
            raise UsageError(f"{self.folder} has {self.views} views, {asked} are asked for: {how}")
        return asked or self.views

    @property
    def policy(self) -> Mapping[str, Any]:
        """The view policy, as stored."""
        found: Mapping[str, Any] = self.manifest.config["policy"]
        return found

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        """The teachers, as inputs' descriptions: several of an ensemble, none of logits from elsewhere."""
        return [one for one in self.manifest.inputs if one["role"] == "teacher"]

    @property
    def coded(self) -> bool:
        """Whether logits are stored in the coded form."""
        return bool(self.manifest.config["dtype"] == CODED)

    @property
    def temperatures(self) -> tuple[float, float] | None:
        """Between which temperatures the logits hold, both included; None for all."""
        config = self.manifest.config
        if "ensemble" in config:
            return float(config["ensemble"]["temperature"]), float(config["ensemble"]["temperature"])
        return (float(min(config["temperatures"])), float(max(config["temperatures"]))) if self.coded else None

    @cached_property
    def kl(self) -> dict[str, float]:
        """Mean KL(full || stored) by temperature over all views, as measured when they were made; of a coded cache without the samples
        that the code was learned from."""
        parts: list[tuple[dict[str, float], int]] = []
        for first, last, shard in self.parts:
            path = self.folder / view_path(first, last, shard)
            try:
                metadata = metadata_of(table.ipc_open(path))
                lost = {tau: float(value) for tau, value in json.loads(metadata["kl"]).items()}
                samples = int(metadata["measured"] if self.coded else len(self.rows_of(shard).labels))
                if parts and lost.keys() != parts[0][0].keys():
                    raise ValueError(metadata["kl"])
            except BROKEN as error:
                raise FormatError(f"{path} does not state its KL as its format says ({type(error).__name__}): fetch it again") from None
            parts.append((lost, samples * (last - first + 1)))
        total = max(sum(n for _, n in parts), 1)
        return {tau: round(sum(kl[tau] * n for kl, n in parts) / total, 9) for tau in parts[0][0]}

    @cached_property
    def codebook(self) -> Codebook:
        """The codebook of a coded cache. Raises FormatError when it is not that of the manifest."""
        return read_codebook(self.manifest.checked(self.folder, CODEBOOK))[0]

    @cached_property
    def sha256(self) -> dict[str, str | None]:
        """The digest of every file, by path."""
        return {f.path: f.sha256 for f in self.manifest.files}

    @cached_property
    def parts(self) -> list[tuple[int, int, int]]:
        """(first view, last view, shard) of every view file."""
        names = [f.path for f in self.manifest.files if f.path.startswith("views-")]
        return [(views_of(name)[0], views_of(name)[-1], shard_of(name)) for name in names]

    @cached_property
    def shards(self) -> list[int]:
        """The shards it has rows for, ascending."""
        return sorted({shard for _, _, shard in self.parts})

    def rows(self, shard: int) -> pa.Table:
        """The rows of a shard, as in ROWS_SCHEMA. Raises FormatError for one without an id."""
        path = self.folder / rows_path(shard)
        rows = table.read(path, ROWS_SCHEMA)
        if rows["id"].null_count:
            raise FormatError(f"{path} has a row without an id: make or fetch it again")
        return rows

    def rows_of(self, shard: int) -> Rows:
        """What is checked against the rows of a shard."""

        def make() -> Rows:
            rows = self.rows(shard)
            return Rows(indexing.labels_of(rows["label"]), rows_digest(rows["id"].to_pylist(), indexing.digests_of(rows["sha256"])))

        return self._rows.get(shard, make)

    def base_of(self, shard: int) -> NDArray[np.int16]:
        """The base of a shard of a coded cache: int16 of shape (n, k). Raises FormatError when it does not belong to its rows."""

        def make() -> NDArray[np.int16]:
            path = self.manifest.checked(self.folder, base_path(shard))
            reader, rows = table.ipc_open(path), self.rows_of(shard)
            try:
                metadata, base = metadata_of(reader), read_base(reader, self.codebook)
            except BROKEN as error:
                raise FormatError(f"{path} is no base as its format says ({type(error).__name__}): make or fetch it again") from None
            if metadata.get("format") != "1":
                raise FormatError(f"{path} is not of format 1, which this version reads: make or fetch it again")
            if metadata.get("rows") != rows.digest or metadata.get("codebook") != self.sha256[CODEBOOK] or len(base) != len(rows.labels):
                raise FormatError(f"{path} was made for other samples or another codebook than those beside it: make or fetch it again")
            return base

        return self._bases.get(shard, make)

    def join(self, data: Dataset) -> Joined:
        """Align with a data set by id. Raises MismatchError when a sample has no row, or its image or label is another."""
        tables = [self.rows(shard) for shard in self.shards]
        lengths = [len(t) for t in tables]
        rows = pa.concat_tables(tables).combine_chunks()
        wanted = data.usable()
        found = order.locate(order.uids_of(rows["id"].to_pylist()), data.uids[wanted])
        absent = data.ids[wanted[found < 0]]
        if len(absent):
            raise MismatchError(
                f"{self.folder} has no logits for {len(absent):,} of {len(wanted):,} samples of {data.folder} ({some(absent)}): "
                f"run `kdprune-data cache {data.folder}`, or use the cache of a set that holds them"
            )
        self._same(data, wanted, rows.take(pa.array(found)))
        place = np.full(len(data), -1, np.int64)
        place[wanted] = found
        return Joined(self, place, np.concatenate([[0], np.cumsum(lengths)]))

    def _same(self, data: Dataset, wanted: NDArray[np.int64], rows: pa.Table) -> None:
        if (rows["sha256"].null_count == 0) != data.has_digests:
            with_them, without = (data.folder, self.folder) if data.has_digests else (self.folder, data.folder)
            raise MismatchError(
                f"{without} has no digests of its images (index --no-digests) and {with_them} has: nothing tells whether they are the same "
                f"images; run `kdprune-data cache {data.folder}`, or index the shards again with digests"
            )
        for what, mine, theirs in (
            ("id", np.asarray(rows["id"].to_pylist(), object), data.ids[wanted]),
            ("image", indexing.digests_of(rows["sha256"]), data.sha256[wanted]),
            ("label", indexing.labels_of(rows["label"]), data.labels[wanted]),
        ):
            differs = np.asarray(mine != theirs)
            bad = data.ids[wanted[differs.any(1) if differs.ndim > 1 else differs]]
            if len(bad):
                raise MismatchError(
                    f"{self.folder} was made of other data: the {what} of {len(bad):,} samples of {data.folder} differs ({some(bad)}); "
                    f"run `kdprune-data cache {data.folder}`"
                )


@dataclass(frozen=True)
class Opened:
    """Some rows of one view of a shard: their boxes, and their logits as they are stored. held: their numbers in the shard, ascending, None
    for all of it."""

    boxes: Boxes
    logits: Stored
    held: NDArray[np.int64] | None = None

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        held = 0 if self.held is None else self.held.nbytes
        return sum(side.nbytes for side in self.boxes) + self.logits.nbytes + held

    def pick(self, at: NDArray[np.int64]) -> Opened:
        """The rows of some numbers in the shard, in that order."""
        at = at if self.held is None else np.searchsorted(self.held, at)
        top, left, height, width, flip = self.boxes
        return Opened(Boxes(top[at], left[at], height[at], width[at], flip[at]), self.logits.pick(at))

    def followed(self, others: Sequence[Opened]) -> Opened:
        """These rows and those of others, one after the other."""
        boxes = Boxes(*(np.concatenate(sides) for sides in zip(self.boxes, *(one.boxes for one in others), strict=True)))
        return Opened(boxes, self.logits.followed([one.logits for one in others]))

    def decoded(self) -> ViewRows:
        """All of it, as numbers."""
        return ViewRows(*self.boxes, self.logits.decoded())


@dataclass(frozen=True)
class Joined:
    """A cache aligned with a data set. `place`: int64, for each row of the data set its row in the cache's rows, -1 for none; `starts`:
    int64, where each of the cache's shards starts in them, and their number."""

    cache: LogitCache
    place: NDArray[np.int64]
    starts: NDArray[np.int64]
    _open: Recent[tuple[int, int], Opened] = field(
        default_factory=lambda: Recent(lambda opened: opened.nbytes), init=False, repr=False, compare=False
    )
    _checked: set[object] = field(default_factory=set, init=False, repr=False, compare=False)

    def read(self, rows: NDArray[np.int64], view: int) -> ViewRows:
        """One view of some rows of the data set, in their order.

        Raises UsageError for a view or a row that is not there, FormatError for a file that does not belong to its rows.
        """
        if not 0 <= view < self.cache.views:
            raise UsageError(f"{self.cache.folder} has views 0 to {self.cache.views - 1}, not {view}: ask for one of these")
        place = self.place[rows]
        if place.min(initial=0) < 0:
            raise UsageError(f"{self.cache.folder} has no logits of row {rows[place.argmin()]}, which does not decode: leave it out")
        by_place = np.argsort(place, kind="stable")
        ascending = place[by_place]
        ends = np.searchsorted(ascending, self.starts)
        several = np.flatnonzero(np.diff(ends)).tolist() or [0]
        if len(several) == 1:
            return self._view(several[0], view).pick(place - self.starts[several[0]]).decoded()
        first, *others = (self._view(n, view).pick(ascending[ends[n] : ends[n + 1]] - self.starts[n]) for n in several)
        back = np.empty_like(by_place)
        back[by_place] = np.arange(len(back))
        return first.followed(others).pick(back).decoded()  # decoded together: a batch may be of a hundred shards

    @cached_property
    def _used(self) -> list[NDArray[np.int64] | None]:
        """Of each shard the rows that the data set has, as numbers in the shard, ascending; None for all."""
        places = np.sort(self.place[self.place >= 0])
        ends, sizes = np.searchsorted(places, self.starts), np.diff(self.starts)
        parts = [places[ends[n] : ends[n + 1]] - self.starts[n] for n in range(len(sizes))]
        return [None if len(part) == size else part for part, size in zip(parts, sizes.tolist(), strict=True)]

    def _view(self, n: int, view: int) -> Opened:
        """One view of the n-th shard: of a coded one, of which memory holds all, the rows that the data set has."""

        def make() -> Opened:
            opened, used = open_view(self.cache, self.cache.shards[n], view, self._checked), self._used[n]
            return opened if used is None or not self.cache.coded else replace(opened.pick(used), held=used)

        return self._open.get((n, view), make)

    def __reduce__(self) -> tuple[object, ...]:
        return (Joined, (self.cache, self.place, self.starts))


def read_view(cache: LogitCache, shard: int, view: int, checked: set[object] | None = None) -> ViewRows:
    """One whole view of a shard. `checked` and errors as for `open_view`."""
    return open_view(cache, shard, view, checked).decoded()


def boxes_of(cache: LogitCache, shard: int, view: int) -> Boxes:
    """The boxes of one view of a shard, read without its logits. Raises FormatError for a file that is not as its format says."""
    first, last, _ = next(p for p in cache.parts if p[2] == shard and p[0] <= view <= p[1])
    path = cache.folder / view_path(first, last, shard)
    try:
        return view_boxes(table.ipc_batch(table.ipc_open(path), view - first), coded=cache.coded)
    except BROKEN as error:
        raise FormatError(f"{path} does not hold view {view} as its format says ({type(error).__name__}): make or fetch it again") from None


def open_view(cache: LogitCache, shard: int, view: int, checked: set[object] | None = None) -> Opened:
    """One view of a shard, plain logits as a memory map. `checked` holds what was checked before, once for all views and each view.

    Raises FormatError when the file does not belong to its rows or its teacher, when its labels are not where they were (a shifted
    join), or when it is not the file that the manifest lists.
    """
    checked = set() if checked is None else checked
    first, last, _ = next(p for p in cache.parts if p[2] == shard and p[0] <= view <= p[1])
    name = view_path(first, last, shard)
    path, reader, rows = cache.folder / name, table.ipc_open(cache.folder / name), cache.rows_of(shard)
    try:
        metadata = metadata_of(reader)
        if name not in checked:
            _check_view(cache, shard, path, metadata)
            if metadata["views"] != f"{first},{last}" or reader.num_record_batches != last - first + 1:
                raise ValueError(metadata["views"])
        batch = table.ipc_batch(reader, view - first)
        boxes, logits = coded_view(batch, cache.codebook, cache.base_of(shard)) if cache.coded else plain_view(batch)
        recorded = int(json.loads(metadata["top1_correct"])[view - first])
    except BROKEN as error:
        raise FormatError(f"{path} does not hold view {view} as its format says ({type(error).__name__}): make or fetch it again") from None
    kind, shape = logits.kind
    if kind != cache.manifest.config["dtype"] or shape != len(cache.manifest.classes):
        raise FormatError(f"{path} holds {kind} logits of {shape:,} classes, the manifest says otherwise: make or fetch it again")
    if len(logits) != len(rows.labels) or len(boxes.top) != len(rows.labels):
        raise FormatError(f"{path} has {len(logits):,} rows, {rows_path(shard)} has {len(rows.labels):,}: make or fetch it again")
    if (name, view) not in checked:
        _check_labels(f"{path}: in view {view}", logits, rows.labels, recorded)
    if name not in checked:  # last: what is wrong with a file says more than that it was changed
        cache.manifest.checked(cache.folder, name)
    checked.update((name, (name, view)))
    return Opened(boxes, logits)


def _check_labels(where: str, logits: Stored, labels: NDArray[np.int32], recorded: int) -> None:
    """Raise FormatError unless the largest logit is the label's in as many rows as when they were written."""
    said = _largest(logits)
    counted = int((said == labels).sum())
    if counted == recorded:
        return
    # A row that was shifted in from outside may agree by chance, so as many as the shift is long may differ.
    by = next(
        (n for n in (1, -1, 2, -2) if abs(int((np.roll(said, -n) == labels).sum()) - recorded) <= abs(n) < abs(counted - recorded)), None
    )
    rows = f"{abs(by or 0)} row{'s' if abs(by or 0) > 1 else ''}"
    cause = (
        "rows and logits do not belong together"
        if by is None
        else f"the logits stand {rows} {'after' if by > 0 else 'before'} their samples"
    )
    raise FormatError(
        f"{where} the largest logit is the label's in {counted:,} rows, when it was written in {recorded:,}: {cause}; run cache again"
    )


def _largest(logits: Stored) -> NDArray[np.int64]:
    """The class of each row's largest logit (the first of equals), a few thousand rows at a time."""
    parts = [logits.pick(at).decoded().argmax(1) for at in order.batches(np.arange(len(logits)), 4096)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _check_view(cache: LogitCache, shard: int, path: Path, metadata: Mapping[str, str]) -> None:
    """Raise FormatError, naming what differs, unless a view file's metadata are those of the manifest and of the rows beside it."""
    if metadata.get("rows") != cache.rows_of(shard).digest:
        other = next((n for n in cache.shards if cache.rows_of(n).digest == metadata.get("rows")), None)
        whose = "other samples than the rows beside it" if other is None else f"the samples of shard {other}, not of shard {shard}"
        raise FormatError(f"{path} was made for {whose}: run cache again, or fetch it again")
    names = " and ".join(one["name"] for one in cache.teachers) or "the one"
    source = cache.manifest.config.get("source", {})
    expected = {
        "format": ("1", "is not of format 1, which this version reads"),
        "teacher": (
            " ".join(one["digest"] for one in cache.teachers) or source.get("sha256"),
            f"holds the logits of another teacher than {names}, which the manifest names",
        ),
        "policy": (m.canonical(cache.policy).decode(), "has views of another policy than the manifest's"),
        "normalisation": (
            _normalisation(cache.teachers),
            f"was made with inputs of another normalisation than {names}'s, which the manifest names",
        ),
    }
    if "classes" in metadata:
        expected["classes"] = (classes_digest(cache.manifest.classes), "has its logits in another order of classes than the manifest's")
    if cache.coded:
        expected["codebook"] = (str(cache.sha256[CODEBOOK]), "is coded by another codebook than the one beside it")
    for key, (value, wrong) in expected.items():
        if metadata.get(key) != value:
            raise FormatError(f"{path} {wrong}: run cache again, or fetch it again")


def _normalisation(teachers: Sequence[Mapping[str, Any]]) -> str:
    """As a view file states it."""
    return m.canonical(normalisation_of([one["config"].get("normalisation") for one in teachers])).decode()


def normalisation_of(each: Sequence[Any]) -> Any:
    """The normalisations of a cache's teachers as its files state them: one by itself, a list of several, null of none."""
    return each[0] if len(each) == 1 else list(each) or None
