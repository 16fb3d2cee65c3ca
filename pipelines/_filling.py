"""Filling a logit cache: what is to be asked and how it is stored, as a `Plan`, and the work, shard by shard. Used by `cache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from kdprune_pipelines import _bf16, _storing
from kdprune_pipelines._asking import Source, Teachers
from kdprune_pipelines._console import bar, count, duration, megabytes, say
from kdprune_pipelines._estimate import growing, measure_growing
from kdprune_pipelines._storing import Fidelity, Part, PlainStore, Store
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.formats import logit_files as files
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.indexing import digests_of
from kdprune_data.formats.logit_files import CODEBOOK, DTYPES
from kdprune_data.formats.logits import LogitCache

FILE_BYTES = 3000
"""About what a view file takes before it holds anything, beside some hundred for each of its views."""
SOME_VIEWS = 10_000
"""For fewer it is not worth while to measure how long they will take."""
TRIED_SHARE = 0.01
"""Of the time that caching takes so much goes into saying before how long that is."""


@dataclass(frozen=True)
class Plan:
    """What is to be cached: how many views in all, of which policy, stored how; `settings` and `inputs` as they stand in the manifest;
    `source`: makes whoever says the logits, which loads the teachers."""

    data: Dataset
    views: int
    fidelity: Fidelity | None
    dtype: str
    settings: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    named: str
    source: Callable[[], Source]

    @property
    def view_bytes(self) -> float:
        """What a view of a sample takes plain: its logits, its box and its flip."""
        side = 1 if "pad" in self.settings["policy"] else 2  # bytes of a box's four numbers: they reach as far as the images do
        return len(self.data.classes) * np.dtype(DTYPES[self.dtype]).itemsize + 4 * side + 1 / 8

    @cached_property
    def shards(self) -> list[int]:
        """Those of the data that have a sample which decodes."""
        found: list[int] = np.unique(self.data.shards[self.data.usable()]).tolist()
        return found

    def spans(self, there: int) -> list[tuple[int, int]]:
        """The ranges of the views from `there` on: what one takes in memory before it is written, coded too, bounds its file."""
        largest = max(len(self.data.rows_of(shard)) for shard in self.shards)
        raw = 4 if self.fidelity else np.dtype(DTYPES[self.dtype]).itemsize
        return files.ranges(there, self.views - 1, largest * (len(self.data.classes) * raw + 9))

    def bytes(self, there: int, each: float, base: float = 0) -> int:
        """About what the views from `there` on take. each: bytes of a view of a sample; base: of a sample once."""
        rows, shards, new = self.data.usable(), len(self.shards), self.views - there
        size = len(rows) * new * each + shards * (new * (950 if self.fidelity else 450) + len(self.spans(there)) * FILE_BYTES)
        if not there:
            size += sum(len(one) + 44 + base for one in self.data.ids[rows]) + shards * (2 if self.fidelity else 1) * FILE_BYTES / 2
        return int(size)


def fill(plan: Plan, build: Build, there: int) -> None:
    """Add the views from `there` on, shard by shard, and seal."""
    data, source = plan.data, plan.source()
    cost = _cost(plan, source, build, there)
    shards, spans, new = plan.shards, plan.spans(there), plan.views - there
    store, size = _store(plan, source, build, there, spans)
    asked = getattr(source, "device", None)
    many = len(data.usable()) * new >= SOME_VIEWS
    what = f"caching {count(new, 'view')} of {count(len(data.usable()), 'sample')}{f' on {asked}' if asked else ''}"
    say(f"{what}: about {megabytes(size)}" + (f", about {duration(tried(plan, source, there, share=TRIED_SHARE)[0])}" if many else ""))
    covered = [(a, b) for a, b, _ in LogitCache.open(build.folder).parts] if there else []
    wanted = [files.view_path(a, b, shard) for a, b in {*covered, *spans} for shard in shards]
    once = [path(shard) for path in _once(plan) for shard in shards]
    build.keep_only([*wanted, *once, *([CODEBOOK] if plan.fidelity else [])])
    todo = [(span, shard) for span in spans for shard in shards if not _stands(plan, build, span, shard)]
    left = sum(len(data.rows_of(shard)) * (last - first + 1) for (first, last), shard in todo)
    with bar("cache", total=len(data.usable()) * new, unit="view", initial=len(data.usable()) * new - left) as progress:
        for span, shard in todo:
            _fill_shard(source, store, build, shard, span, progress.update)
    counts = {"samples": len(data.usable()), "views": plan.views, "classes": len(data.classes)} | cost
    build.seal(counts=counts, classes=data.classes, content=data.manifest.content)


def _cost(plan: Plan, source: Source, build: Build, there: int) -> dict[str, Any]:
    """What asking in bf16 costs, for the manifest's counts: of a cache that grows as it stands there; nothing in float32."""
    if not isinstance(source, Teachers) or not source.exact:
        return {}
    if there:
        return {"bf16": LogitCache.open(build.folder).manifest.counts["bf16"]}
    return {"bf16": _bf16.of_views(source, () if plan.fidelity is None else plan.fidelity.temperatures)}


def _store(plan: Plan, source: Source, build: Build, there: int, spans: list[tuple[int, int]]) -> tuple[Store, int]:
    """How it is stored, and about how many bytes the new views take."""
    if plan.fidelity is None:
        return PlainStore(plan.dtype), plan.bytes(there, plan.view_bytes)
    first = LogitCache.open(build.folder).parts[0] if there else (*spans[0], 0)
    store, choice = _storing.coded_store(source, build, plan.fidelity, first[1] - first[0] + 1)
    if choice is not None:
        return store, plan.bytes(there, choice.view_bytes + geometry_bytes(plan), choice.base_bytes)
    standing = [f for f in build.files() if f.path.startswith("views-")]
    done = sum(len(plan.data.rows_of(files.shard_of(f.path))) * len(files.views_of(f.path)) for f in standing)
    return store, int(len(plan.data.usable()) * (plan.views - there) * sum(f.bytes for f in standing) / max(done, 1))


def geometry_bytes(plan: Plan) -> float:
    """About what a view's box takes packed: of a padded crop two of few numbers and a bit, else four."""
    policy = plan.settings["policy"]
    return (2 * np.log2(2 * policy["pad"] + 1) + 1) / 8 if "pad" in policy else 4.0


def _once(plan: Plan) -> list[Callable[[int], str]]:
    """The files that a shard has one of."""
    return [files.rows_path, *([files.base_path] if plan.fidelity else [])]


def _stands(plan: Plan, build: Build, span: tuple[int, int], shard: int) -> bool:
    """Whether a range of views of a shard was finished by an earlier run."""
    return all(build.finished(path) is not None for path in (files.view_path(*span, shard), *(path(shard) for path in _once(plan))))


def _fill_shard(source: Source, store: Store, build: Build, shard: int, span: tuple[int, int], tick: Callable[[int], None]) -> None:
    """One range of views of one shard: its view file, and the rows with the first range, whose counts they hold."""
    data = source.data
    rows = data.rows_of(shard)
    metadata: dict[str, Any] = source.metadata() | {
        "format": "1",
        "rows": files.rows_digest(data.ids[rows], digests_of(data.index["sha256"])[rows]),
        "policy": source.policy.to_dict(),
        "classes": files.classes_digest(data.classes),
        "views": f"{span[0]},{span[1]}",
    }
    correct = store.write(build, _asked(source, store, rows, (shard, span), tick), data.labels[rows], metadata)
    if span[0] == 0:
        files.write_rows(build, shard, data, rows, correct)


def _asked(source: Source, store: Store, rows: NDArray[np.int64], where: tuple[int, tuple[int, int]], tick: Callable[[int], None]) -> Part:
    """All views of a range of some rows, as the store keeps them, and what that loses."""
    shard, span = where
    views = range(span[0], span[1] + 1)
    kept: list[list[NDArray[np.floating]]] = [[] for _ in views]
    lost: dict[float, float] = {}
    for n, full in source.said(rows, views, order.batches(np.arange(len(rows)), source.batch)):
        some, losses = store.keep(full)
        kept[n].append(some)
        for tau, kl in losses.items():
            lost[tau] = lost.get(tau, 0.0) + kl * len(full) / (len(rows) * len(views))
        tick(len(full))
    return Part(shard, span, rows, [source.boxes(rows, view) for view in views], [np.concatenate(one) for one in kept], lost)


def tried(plan: Plan, source: Source, there: int, *, share: float = 1.0) -> tuple[float, list[list[NDArray[np.float32]]]]:
    """The seconds that the views from `there` on would take, by a few samples of the very work, at most this share of it; and what was said
    of up to 8 views of these."""
    rows = plan.data.usable()
    views = range(there, min(plan.views, there + 8))
    said: list[list[NDArray[np.float32]]] = [[] for _ in views]
    by_hash = np.argsort(order.order_hash(plan.data.uids[rows], 0, "probe"), kind="stable")

    def work() -> Iterator[int]:
        done = 0
        for n, full in source.said(rows[by_hash], views, growing(np.arange(len(rows)), source.batch)):
            said[n].append(full)
            done += len(full)
            if n == len(views) - 1:
                yield done
                done = 0

    return measure_growing(work(), len(rows) * (plan.views - there), share), said
