"""`export`: plain WebDataset shards in which every sample carries the cached soft labels of all its views, for readers without this tool.

1. Find the subset and the logit cache that holds its samples; join them by id, refusing what does not belong together.
2. Shard by shard: each sample's image, class and other members as they are, and one member more, `KEY.kd.npz`: logits, boxes and flips.
3. `README.md` says what it is, where it comes from, and holds the lines of Python that read it and train with it.

Writes `exports/NAME`, NAME being the logit cache's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kdprune_pipelines import _workspace
from kdprune_pipelines._console import Outcome, bar, count, megabytes, say, say_unusable
from kdprune_pipelines._estimate import Estimate, growing, look, measure_growing

from kdprune_data.config import Config, option
from kdprune_data.errors import FormatError, SourceError
from kdprune_data.formats import indexing
from kdprune_data.formats import manifest as m
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.export import Export, dtype_of
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.share.exports import ExportCard, export_card


@dataclass(frozen=True)
class ExportConfig(Config):
    """Settings of `export`."""

    subset: Path | None = option(None, help="The subset or data set to export; default the only one in subsets/.", argument=True)
    logits: Path | None = option(None, help="The logit cache's folder; default the only one that fits in logits/.")
    views: int | None = option(None, help="Export the first N views; default all cached.", least=1)
    name: str | None = option(None, help="Name in exports/; default the logit cache's.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    jobs: int = option(2, help="Threads that write shards.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")


def run(config: ExportConfig) -> Outcome:
    """Export a subset with its soft labels. Raises UsageError, MismatchError, SourceError, FormatError and ExistsError."""
    data = Dataset.open(_workspace.one(config.subset, _workspace.SUBSETS, "SUBSET"))
    contents = _workspace.contents(data.manifest.as_input("data"))
    cache = LogitCache.open(_workspace.one(config.logits, _workspace.LOGITS, "--logits", lambda one: one.content in contents))
    data.same_classes(cache.manifest.classes, str(cache.folder))
    views = cache.count_of(config.views)
    export = Export(data, cache.join(data), views)
    folder, name = _workspace.place(config.out, config.name, _workspace.EXPORTS, cache.manifest.name)
    settings = {"views": views, "dtype": dtype_of(cache)}
    identity = Identity("export", name, settings, [data.manifest.as_input("data"), cache.manifest.as_input("logits")])
    if config.dry_run:
        return _estimate(export, folder, look(folder, identity, overwrite=config.overwrite))
    with Build.begin(folder, identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            say("already done")
            return _outcome(folder, build.done)
        try:
            made = _write(export, build, config.jobs)
        except (SourceError, FormatError):  # of damaged shards or a damaged cache: what was made of them is no start
            build.discard()
            raise
    return _outcome(folder, made)


def _write(export: Export, build: Build, jobs: int) -> Manifest:
    """Write the shards, then what says what they are, and seal."""
    data, rows = export.data, export.data.usable()
    say_unusable(indexing.unusable(data.index))
    say(f"exporting {count(export.views, 'view')} of {count(len(rows), 'sample')}: about {megabytes(export.bytes)}")
    build.keep_only(export.names)
    todo = [n for n, name in enumerate(export.names) if build.finished(name) is None]
    left = sum(len(data.rows_of(export.shards[n])) for n in todo)
    with bar("export", total=len(rows), initial=len(rows) - left) as progress, ThreadPoolExecutor(jobs) as pool:
        tick = _one_by_one(progress.update)
        work = [pool.submit(export.write, build, n, tick) for n in todo]
        try:
            for one in work:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    build.write("sizes.json", m.canonical({name: len(data.rows_of(n)) for name, n in zip(export.names, export.shards, strict=True)}))
    build.write("SHA256SUMS", "".join(f"{f.sha256}  {f.path}\n" for f in build.files() if f.path.endswith(".tar")).encode())
    labels = data.labels[rows]
    counts = {
        "samples": len(rows),
        "views": export.views,
        "shards": len(export.names),
        "labelled": int((labels >= 0).sum()),
        "per_class": np.bincount(labels[labels >= 0], minlength=len(data.classes)).tolist(),
    }
    build.write("README.md", export_card(_card(export, build), counts).encode())
    content = m.content_of(data.ids[rows].tolist(), data.sha256[rows], labels)
    return build.seal(counts=counts, classes=data.classes, content=content, side=["README.md"])


def _one_by_one(tick: Callable[[int], None]) -> Callable[[int], None]:
    """The same, for several threads."""
    lock = threading.Lock()

    def locked(n: int) -> None:
        with lock:
            tick(n)

    return locked


def _card(export: Export, build: Build) -> ExportCard:
    cache = export.joined.cache
    found = {extension for name in export.names for extension in (build.finished(name) or {})["images"]}
    return ExportCard(
        title=build.identity.name,
        data=export.data.manifest.as_input("data"),
        cache=cache.manifest.as_input("logits"),
        teachers=[one for one in cache.manifest.inputs if one["role"] == "teacher"],
        images=sorted(found),
        dtype=dtype_of(cache),
        temperatures=getattr(cache, "temperatures", None),
        classes=export.data.classes,
    )


def _estimate(export: Export, folder: Path, state: str) -> Outcome:
    """What exporting would do: the tars from the index, seconds from a few samples of the very work."""
    rows = export.data.usable()

    def work() -> Iterator[int]:
        for part in growing(rows, 1024):
            for sample in export.samples(part):
                hashlib.sha256(sample.record())
            yield len(part)

    seconds = measure_growing(work(), len(rows))
    counts = {"sample": len(rows), "view": export.views, "shard": len(export.names)}
    return Estimate(folder, state, counts, export.bytes, seconds).outcome()


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts, size = made.counts, sum(f.bytes for f in made.files)
    facts: dict[str, Any] = {"folder": str(folder), "counts": counts, "bytes": size, "digest": made.digest, "content": made.content}
    text = (
        f"{folder}: {count(counts['samples'], 'sample')} with {count(counts['views'], 'view')} each in "
        f"{count(counts['shards'], 'shard')}, {megabytes(size)} ({size / counts['samples']:,.0f} bytes a sample)"
    )
    return Outcome(folder, facts, text)
