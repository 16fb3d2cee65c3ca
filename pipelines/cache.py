"""`cache`: what the teacher says of many views of each kept sample.

1. The views' boxes are drawn from (seed, id, view) for the data set's policy, at the teacher's input size.
2. Each sample is decoded once for all new views of a range; every view is rendered and shown to the teacher, in batches that do not cross
   a shard.
3. Per shard: the rows once, and one file of geometry and logits for each range of views.

Writes `logits/SUBSET--TEACHER`. Views are append-only: asking for more adds files and leaves those that stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _recipes, _workspace
from kdprune_pipelines._console import Outcome, bar, count, megabytes, say
from kdprune_pipelines._estimate import Estimate, growing, look, measure_growing
from kdprune_pipelines._models import Saved, open_model
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import SourceError, some
from kdprune_data.formats import logits as cached
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.indexing import digests_of
from kdprune_data.formats.logits import DTYPES, LogitCache, ViewRows
from kdprune_data.formats.manifest import PARTIAL, Manifest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.stream import Images
    from kdprune_data.learn.views import Geometry, Pixels, Policy

TEMPERATURES = (1.0, 2.0, 4.0)
DECODED_AT_ONCE = 32
RENDERED_BYTES = 64_000_000
"""Views that wait to be shown to the teacher take about this much memory, however many there are."""


@dataclass(frozen=True)
class CacheConfig(Config):
    """Settings of `cache`."""

    recipe: str | None = option(None, help="Take the options not given here from this recipe: a packaged one's name, or a TOML file.")
    subset: Path | None = option(None, help="The subset or data set to cache for; default the only one in subsets/.", argument=True)
    teacher: Path | None = option(None, help="The teacher's folder; default the only one in teachers/.")
    views: int = option(8, help="How many views of each sample; more than are there adds the missing.", least=1, most=10_000)
    dtype: str = option("float16", help="How logits are stored.", choices=tuple(DTYPES))
    flip: str = option("auto", help="Mirror views left to right; auto: not for digits.", choices=("auto", "on", "off"))
    pad: int | None = option(None, help="Pixels by which crops that are not resized may reach outside; default size/8.", least=0)
    scale: tuple[float, ...] = option((), help="Share of the area that a resized crop takes; default 0.25 1.", values="LOW HIGH")
    ratio: tuple[float, ...] = option((), help="Width over height of a resized crop; default 0.75 1.3333.", values="LOW HIGH")
    seed: int = option(0, help="Seed of the views.", least=0)
    batch: int = option(256, help="Samples in a batch; batches do not cross shards.", least=1)
    code: str | None = option(None, help="package.module:function, when the teacher is your own function.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    name: str | None = option(None, help="Name in logits/; default SUBSET--TEACHER.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")


@dataclass(frozen=True)
class Caching:
    """The teacher at work on one data set."""

    config: CacheConfig
    saved: Saved
    images: Images
    net: nn.Module
    policy: Policy
    device: torch.device


def run(config: CacheConfig) -> Outcome:
    """Fill a logit cache. Raises UsageError, MismatchError, SourceError and ExistsError."""
    config = _recipes.applied("cache", config)
    data = Dataset.open(_workspace.one(config.subset, _workspace.SUBSETS, "SUBSET"))
    saved = open_model(_workspace.one(config.teacher, _workspace.TEACHERS, "--teacher"))
    from kdprune_data.learn import views  # which imports torch: after what a mistyped folder is told

    data.same_classes(saved.manifest.classes, str(saved.folder))
    size = saved.architecture.size
    crops = views.Crops.of(config.pad, config.scale, config.ratio)
    policy = views.policy_for(data.sizes[data.usable()], data.classes, size=size, flip=config.flip, seed=config.seed, crops=crops)
    folder, name = _workspace.place(config.out, config.name, _workspace.LOGITS, f"{data.manifest.name}--{saved.manifest.name}")
    settings = {"dtype": config.dtype, "policy": policy.to_dict(), "precision": "float32", "batch": config.batch}
    identity = Identity("logits", name, settings, [data.manifest.as_input("data"), saved.manifest.as_input("teacher")])
    if config.dry_run:
        state = look(folder, identity, overwrite=config.overwrite)
        return _estimate(_caching(config, saved, data, policy), folder, state)
    if not config.overwrite and (there := _settled_views(folder, identity)) >= config.views:
        say(f"already done: {count(there, 'view')} there")
        return _outcome(folder, Manifest.load(folder))
    with Build.begin(folder, identity, overwrite=config.overwrite, append=True) as build:
        there = LogitCache.open(folder).views if (folder / "manifest.json").is_file() else 0
        if config.views <= there:
            build.abandon()
            say(f"already done: {count(there, 'view')} there")
        else:
            _fill(_caching(config, saved, data, policy), build, there)
    return _outcome(folder, Manifest.load(folder))


def _settled_views(folder: Path, identity: Identity) -> int:
    """The views of a finished cache with nothing of an interrupted run to clear away, whose disk may be read-only; 0 for any other."""
    finished = Build.look(folder, identity) == "finished" and not (folder / PARTIAL).exists()
    return LogitCache.open(folder).views if finished else 0


def _caching(config: CacheConfig, saved: Saved, data: Dataset, policy: Policy) -> Caching:
    from kdprune_data.learn.inference import choose_device
    from kdprune_data.learn.stream import Images

    return Caching(config, saved, Images(data), saved.load(code=config.code), policy, choose_device(config.device))


def _fill(caching: Caching, build: Build, there: int) -> None:
    """Add the views from `there` on, shard by shard, and seal."""
    data, config = caching.images.data, caching.config
    shards = np.unique(data.shards[data.usable()]).tolist()
    largest = max(len(data.rows_of(s)) for s in shards)
    classes = len(data.classes)
    spans = cached.ranges(there, config.views - 1, largest * (classes * np.dtype(DTYPES[config.dtype]).itemsize + 9))
    new = config.views - there
    size = megabytes(int(len(data.usable()) * new * _view_bytes(caching)))
    say(f"caching {count(new, 'view')} of {count(len(data.usable()), 'sample')} on {caching.device}: about {size}")
    covered = [(a, b) for a, b, _ in LogitCache.open(build.folder).parts] if there else []
    wanted = [cached.view_path(a, b, shard) for a, b in {*covered, *spans} for shard in shards]
    build.keep_only([*wanted, *(cached.rows_path(shard) for shard in shards)])
    todo = [(span, shard) for span in spans for shard in shards if not _stands(build, span, shard)]
    left = sum(len(data.rows_of(shard)) * (last - first + 1) for (first, last), shard in todo)
    with bar("cache", total=len(data.usable()) * new, unit="view", initial=len(data.usable()) * new - left) as progress:
        for span, shard in todo:
            _fill_shard(caching, build, shard, span, progress.update)
    counts = {"samples": len(data.usable()), "views": config.views, "classes": classes}
    build.seal(counts=counts, classes=data.classes, content=data.manifest.content)


def _stands(build: Build, span: tuple[int, int], shard: int) -> bool:
    """Whether a range of views of a shard was finished by an earlier run."""
    return build.finished(cached.view_path(*span, shard)) is not None and build.finished(cached.rows_path(shard)) is not None


def _fill_shard(caching: Caching, build: Build, shard: int, span: tuple[int, int], tick: Callable[[int], None]) -> None:
    """One range of views of one shard: its view file, and the rows with the first range, whose counts they hold."""
    data = caching.images.data
    rows = data.rows_of(shard)
    found, kl = _views(caching, rows, span, tick)
    correct = [cached.top1(view.logits, data.labels[rows]) for view in found]
    metadata: dict[str, Any] = {
        "format": "1",
        "rows": cached.rows_digest(data.ids[rows], digests_of(data.index["sha256"])[rows]),
        "teacher": caching.saved.manifest.digest,
        "policy": caching.policy.to_dict(),
        "normalisation": caching.saved.normalisation.to_dict(),
        "views": f"{span[0]},{span[1]}",
        "top1_correct": [int(c.sum()) for c in correct],
        "kl": kl,
    }
    cached.write_views(build, cached.view_path(*span, shard), found, metadata)
    if span[0] == 0:
        cached.write_rows(build, shard, data, rows, np.sum(correct, 0, dtype=np.int32))


def _views(
    caching: Caching, rows: NDArray[np.int64], span: tuple[int, int], tick: Callable[[int], None]
) -> tuple[list[ViewRows], dict[str, float]]:
    """All views of a range of some rows, and the mean KL between what the teacher said and what is stored."""
    from kdprune_data.learn import views

    data = caching.images.data
    boxes = [views.geometry(caching.policy, data.uids[rows], data.sizes[rows], view) for view in range(span[0], span[1] + 1)]
    said: list[list[NDArray[np.floating]]] = [[] for _ in boxes]
    lost = dict.fromkeys(TEMPERATURES, 0.0)
    for n, kept, losses in _said(caching, rows, boxes, order.batches(np.arange(len(rows)), caching.config.batch)):
        for tau in TEMPERATURES:
            lost[tau] += losses[tau] * len(kept)
        said[n].append(kept)
        tick(len(kept))
    views_of = [_rows(box, np.concatenate(logits)) for box, logits in zip(boxes, said, strict=True)]
    return views_of, {f"{tau:g}": round(lost[tau] / (len(rows) * len(boxes)), 9) for tau in TEMPERATURES}


def _said(
    caching: Caching, rows: NDArray[np.int64], boxes: Sequence[Geometry], batches: Iterable[NDArray[np.int64]]
) -> Iterator[tuple[int, NDArray[np.floating], dict[float, float]]]:
    """What the teacher says of every view of each batch of places in `rows`: (view's place in `boxes`, logits as stored, their KL).

    Raises SourceError for a logit that is no finite number.
    """
    import torch

    from kdprune_data.learn.inference import evaluating
    from kdprune_data.learn.losses import kl

    with evaluating(caching.net, caching.device) as net:
        for at, images in _decoded(caching, rows, batches):
            for n, pixels in enumerate(_rendered(caching, images, [box.take(at) for box in boxes])):
                full = net(caching.saved.normalisation.apply(pixels.to(caching.device))).float().cpu()
                bad = caching.images.data.ids[rows[at[~torch.isfinite(full).all(1).numpy()]]]
                if len(bad):
                    raise SourceError(f"the teacher's logits of {some(bad)} are not finite numbers: its weights are broken; use another")
                kept = cached.stored(full.numpy(), caching.config.dtype)
                again = torch.from_numpy(kept.astype(np.float32))
                yield n, kept, {tau: float(kl(again, full, tau)) for tau in TEMPERATURES}


def _decoded(
    caching: Caching, rows: NDArray[np.int64], batches: Iterable[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.int64], Pixels | list[Pixels]]]:
    """Batches of places in `rows`, each with its images. A few samples are decoded ahead, not a few batches: photographs are large."""
    from kdprune_data.learn.stream import prefetch

    places = list(batches)
    parts = [list(order.batches(at, DECODED_AT_ONCE)) for at in places]
    ready = prefetch(lambda at: caching.images.get(rows[at]), chain.from_iterable(parts), caching.config.jobs)
    for at, some_parts in zip(places, parts, strict=True):
        found = [next(ready) for _ in some_parts]
        yield at, np.concatenate(found) if caching.images.equal else list(chain.from_iterable(found))


def _rendered(caching: Caching, images: Pixels | list[Pixels], boxes: Sequence[Geometry]) -> Iterator[torch.Tensor]:
    """The views of a batch, one after the other, rendered a little ahead in parts of so many samples that memory stays bounded."""
    import torch

    from kdprune_data.learn import views
    from kdprune_data.learn.stream import prefetch

    n, size, threads = len(images), caching.policy.size, caching.config.jobs
    ahead = 2 * threads + 2  # parts that `prefetch` holds, and the one that is used
    parts = list(order.batches(np.arange(n), max(1, RENDERED_BYTES // (ahead * 3 * size * size))))

    def make(part: tuple[Geometry, NDArray[np.int64]]) -> torch.Tensor:
        box, at = part
        return views.render(images[at[0] : at[-1] + 1], box.take(at), size)

    ready = prefetch(make, product(boxes, parts), threads)
    for _ in boxes:
        yield torch.cat([next(ready) for _ in parts])


def _rows(boxes: Geometry, logits: NDArray[np.floating]) -> ViewRows:
    return ViewRows(boxes.top, boxes.left, boxes.height, boxes.width, boxes.flip, logits)


def _view_bytes(caching: Caching) -> float:
    """What a view of a sample takes: its logits, its box and its flip."""
    side = 1 if caching.policy.kind == "pad-crop" else 2  # bytes of a box's four numbers: they reach as far as the images do
    return len(caching.images.data.classes) * np.dtype(DTYPES[caching.config.dtype]).itemsize + 4 * side + 1 / 8


def _estimate(caching: Caching, folder: Path, state: str) -> Outcome:
    """What filling would do: bytes of the view files, seconds from a few samples of the very work."""
    from kdprune_data.learn import views

    data, config = caching.images.data, caching.config
    rows = data.usable()
    there = LogitCache.open(folder).views if state == "finished" else 0
    new = max(config.views - there, 0)
    state = "grown" if there and new else state
    boxes = [views.geometry(caching.policy, data.uids[rows], data.sizes[rows], view) for view in range(there, there + min(new, 8))]

    def work() -> Iterator[int]:
        done = 0
        for n, kept, _ in _said(caching, rows, boxes, growing(np.arange(len(rows)), config.batch)):
            done += len(kept)
            if n == len(boxes) - 1:
                yield done
                done = 0

    total = len(rows) * new
    seconds = measure_growing(work(), total) if new else 0.0
    each = _view_bytes(caching)
    table = 0 if there else sum(len(one) + 48 for one in data.ids[rows])
    counts = {"sample": len(rows), "view": new}
    return Estimate(folder, state, counts, int(total * each) + table, seconds).outcome()


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts, size = made.counts, sum(f.bytes for f in made.files)
    per_view = size / (counts["samples"] * counts["views"])
    text = (
        f"{folder}: {count(counts['views'], 'view')} of {count(counts['samples'], 'sample')}, {megabytes(size)} "
        f"({per_view:.0f} bytes a view), {made.config['dtype']}"
    )
    return Outcome(folder, {"folder": str(folder), "counts": counts, "bytes": size, "digest": made.digest}, text)
