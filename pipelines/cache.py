"""`cache`: what the teacher says of many views of each kept sample.

1. The views' boxes are drawn from (seed, id, view) for the data set's policy, at the teacher's input size.
2. Each sample is decoded once for all new views of a range; every view is rendered and shown to the teacher, in batches that do not cross
   a shard. `--ensemble` asks several teachers; `--from FILE` takes somebody else's logits in their place.
3. Per shard: the rows once, and one file of geometry and logits for each range of views; plain, or with `--fidelity` coded.

Writes `logits/SUBSET--TEACHER`. Views are append-only: asking for more adds files and leaves those that stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _asking, _given, _recipes, _storing, _workspace
from kdprune_pipelines._asking import Source
from kdprune_pipelines._console import Outcome, bar, count, duration, megabytes, say
from kdprune_pipelines._estimate import Estimate, growing, look, measure_growing
from kdprune_pipelines._models import Saved, open_model
from kdprune_pipelines._storing import Fidelity, Part, PlainStore, Store
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import KdpruneError, UsageError
from kdprune_data.formats import logit_files as files
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.indexing import digests_of
from kdprune_data.formats.logit_files import CODEBOOK, CODED, DTYPES
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import PARTIAL

if TYPE_CHECKING:
    from kdprune_data.learn.policy import Policy

MOST_VIEWS = 10_000
FILE_BYTES = 3000
"""About what a view file takes before it holds anything, beside some hundred for each of its views."""
SOME_VIEWS = 10_000
"""For fewer it is not worth while to measure how long they will take."""


def _check_views(text: str) -> None:
    """Raise UsageError unless `--views` is a number, or a word."""
    if text in ("all", "identity"):
        return
    try:
        views = int(text)
    except ValueError:
        raise UsageError(f"--views {text!r} is no number of views: give one, or all, or identity") from None
    if not 1 <= views <= MOST_VIEWS:
        raise UsageError(f"--views {views} is too {'small: at least 1' if views < 1 else f'large: at most {MOST_VIEWS:,}'}")


@dataclass(frozen=True)
class CacheConfig(Config):
    """Settings of `cache`."""

    recipe: str | None = option(None, help="Take the options not given here from this recipe: a packaged one's name, or a TOML file.")
    subset: Path | None = option(None, help="The subset or data set to cache for; default the only one in subsets/.", argument=True)
    teacher: Path | None = option(None, help="The teacher's folder; default the only one in teachers/.")
    ensemble: tuple[Path, ...] = option((), help="Another teacher (several times): of all the mean probabilities are stored.")
    from_: Path | None = option(None, help="Logits from elsewhere, in place of a teacher: a Parquet file with the columns id and logits.")
    views: str = option(
        "8",
        help="How many views of each sample; more adds those missing. all: every distinct padded crop; identity: the image itself.",
        check=_check_views,
    )
    dtype: str = option("float16", help="How logits are stored without --fidelity.", choices=tuple(DTYPES))
    fidelity: float | None = option(
        None, help="Store coded: as coarsely as keeps the mean KL(full || stored) within this (1e-2).", least=1e-7, most=1
    )
    temperature: tuple[float, ...] = option(
        (), help="A temperature to hold at (several times); default 1, 2 and 4; of an ensemble the only one.", least=0.01, most=1000
    )
    size: int | None = option(None, help="With --from: side of the views in pixels; default the images' own up to 64, else 224.", least=1)
    flip: str = option("auto", help="Mirror views left to right; auto: not for digits.", choices=("auto", "on", "off"))
    pad: int | None = option(None, help="Pixels by which crops that are not resized may reach outside; default size/8.", least=0)
    scale: tuple[float, ...] = option((), help="Share of the area that a resized crop takes; default 0.25 1.", values="LOW HIGH")
    ratio: tuple[float, ...] = option((), help="Width over height of a resized crop; default 0.75 1.3333.", values="LOW HIGH")
    decode: str = option(
        "exact", help="scaled: decode JPEGs no larger than resized crops need, quicker for large photographs.", choices=("exact", "scaled")
    )
    seed: int = option(0, help="Seed of the views.", least=0)
    batch: int = option(256, help="Samples in a batch; batches do not cross shards.", least=1)
    code: tuple[str, ...] = option((), help="package.module:function, when a teacher is your own function; may be given several times.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    name: str | None = option(None, help="Name in logits/; default SUBSET--TEACHER.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")


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


def run(config: CacheConfig) -> Outcome:
    """Fill a logit cache. Raises UsageError, MismatchError, SourceError and ExistsError."""
    config = _recipes.applied("cache", config)
    data = Dataset.open(_workspace.one(config.subset, _workspace.SUBSETS, "SUBSET"))
    plan = _plan_given(config, data) if config.from_ is not None else _plan_taught(config, data)
    folder, name = _workspace.place(config.out, config.name, _workspace.LOGITS, f"{data.manifest.name}--{plan.named}")
    identity = Identity("logits", name, plan.settings, plan.inputs)
    if config.dry_run:
        return _estimate(plan, folder, look(folder, identity, overwrite=config.overwrite))
    if not config.overwrite and (there := _settled_views(folder, identity)) >= plan.views:
        say(f"already done: {count(there, 'view')} there")
        return _outcome(folder)
    with Build.begin(folder, identity, overwrite=config.overwrite, append=True) as build:
        there = LogitCache.open(folder).views if (folder / "manifest.json").is_file() else 0
        if plan.views <= there:
            build.abandon()
            say(f"already done: {count(there, 'view')} there")
        else:
            _fill(plan, build, there)
    return _outcome(folder)


# --- what is to be done


def _plan_taught(config: CacheConfig, data: Dataset) -> Plan:
    """With a teacher, or an ensemble."""
    saved = [open_model(_workspace.one(config.teacher, _workspace.TEACHERS, "--teacher")), *map(open_model, config.ensemble)]
    if config.size is not None:
        raise UsageError(f"--size {config.size} goes with --from: views have the size of the teacher's input")
    from kdprune_data.learn import views  # which imports torch: after what a mistyped folder is told

    _asking.check_alike(saved, data)
    crops = views.Crops.of(config.pad, config.scale, config.ratio, config.decode)
    size = saved[0].architecture.size
    if config.views == "identity":
        _refuse_crops(config, "--views identity shows the image itself, and {} is of crops")
    policy = views.policy_for(data.sizes[data.usable()], data.classes, size=size, flip=config.flip, seed=config.seed, crops=crops)
    policy = {"all": views.every_crop, "identity": views.identity}.get(config.views, lambda one: one)(policy)
    if (policy.views or 0) > MOST_VIEWS:
        raise UsageError(
            f"--views all is {policy.views:,} distinct crops with --pad {policy.pad}: at most {MOST_VIEWS:,}; give a smaller pad"
        )
    settings: dict[str, Any] = {"dtype": config.dtype, "policy": policy.to_dict(), "precision": "float32", "batch": config.batch}
    if len(saved) > 1:
        settings["ensemble"] = {"temperature": _only_temperature(config)}
    named = "+".join(one.manifest.name for one in saved)
    inputs = [data.manifest.as_input("data"), *(one.manifest.as_input("teacher") for one in saved)]

    def source() -> Source:
        return _teachers(config, saved, data, policy)

    return _stored(config, Plan(data, policy.views or int(config.views), None, config.dtype, settings, inputs, named, source))


def _teachers(config: CacheConfig, saved: list[Saved], data: Dataset, policy: Policy) -> Source:
    from kdprune_data.learn.inference import choose_device
    from kdprune_data.learn.stream import Images

    nets, device = [one.load(code=config.code) for one in saved], choose_device(config.device)
    temperature = _only_temperature(config) if len(saved) > 1 else None
    return _asking.Teachers(Images(data), policy, saved, nets, device, temperature, config.batch, config.jobs)


def _only_temperature(config: CacheConfig) -> float:
    if len(config.temperature) != 1:
        raise UsageError("the mean of several teachers' probabilities holds at one temperature: give --temperature once, the training's")
    return config.temperature[0]


def _plan_given(config: CacheConfig, data: Dataset) -> Plan:
    """With logits from elsewhere."""
    for flag, given in (("--teacher", config.teacher), ("--ensemble", config.ensemble), ("--code", config.code)):
        if given:
            raise UsageError(f"--from takes logits from elsewhere and {flag} asks a teacher: give one of the two")
    _refuse_crops(config, "the views of --from are what its file says, and {} is of those that are drawn")
    assert config.from_ is not None
    given_ = _given.read(config.from_, data, config.size)
    if config.views not in ("8", str(given_.views), given_.policy.kind):
        raise UsageError(
            f"--views {config.views}: {config.from_} has {count(given_.views, 'view')} of each sample, which are taken; leave it out"
        )
    source = {"name": config.from_.name, "sha256": given_.sha256}
    settings = {"dtype": config.dtype, "policy": given_.policy.to_dict(), "source": source}
    plan = Plan(data, given_.views, None, config.dtype, settings, [data.manifest.as_input("data")], config.from_.stem, lambda: given_)
    return _stored(config, plan)


def _refuse_crops(config: CacheConfig, why: str) -> None:
    """Raise UsageError for an option that says how crops are drawn; {} in `why` becomes its flag."""
    flags = {
        "--flip": config.flip == "on",
        "--pad": config.pad is not None,
        "--scale": config.scale,
        "--ratio": config.ratio,
        "--decode": config.decode != "exact",
        "--seed": config.seed,
    }
    for flag in (flag for flag, given in flags.items() if given):
        raise UsageError(f"{why.format(flag)}: leave it out")


def _stored(config: CacheConfig, plan: Plan) -> Plan:
    """With the way to store that is asked for."""
    if config.fidelity is None:
        if config.temperature and "ensemble" not in plan.settings:
            raise UsageError("--temperature says where --fidelity, or an ensemble, holds: what is stored plain holds at any; leave it out")
        return plan
    if config.dtype != "float16":
        raise UsageError(f"--dtype {config.dtype} is how logits are stored plain, and --fidelity stores them coded: give one of the two")
    asked = tuple(sorted(set(config.temperature))) or _storing.TEMPERATURES
    coded = {"dtype": CODED, "fidelity": config.fidelity, "temperatures": list(asked)}
    return replace(plan, fidelity=Fidelity(config.fidelity, asked), settings={**plan.settings, **coded})


def _settled_views(folder: Path, identity: Identity) -> int:
    """The views of a finished cache with nothing of an interrupted run to clear away, whose disk may be read-only; 0 for any other."""
    finished = Build.look(folder, identity) == "finished" and not (folder / PARTIAL).exists()
    return LogitCache.open(folder).views if finished else 0


# --- doing it


def _fill(plan: Plan, build: Build, there: int) -> None:
    """Add the views from `there` on, shard by shard, and seal."""
    data, source = plan.data, plan.source()
    shards, spans, new = plan.shards, plan.spans(there), plan.views - there
    store, size = _store(plan, source, build, there, spans)
    asked = getattr(source, "device", None)
    many = len(data.usable()) * new >= SOME_VIEWS
    what = f"caching {count(new, 'view')} of {count(len(data.usable()), 'sample')}{f' on {asked}' if asked else ''}"
    say(f"{what}: about {megabytes(size)}" + (f", about {duration(_tried(plan, source, there)[0])}" if many else ""))
    covered = [(a, b) for a, b, _ in LogitCache.open(build.folder).parts] if there else []
    wanted = [files.view_path(a, b, shard) for a, b in {*covered, *spans} for shard in shards]
    once = [path(shard) for path in _once(plan) for shard in shards]
    build.keep_only([*wanted, *once, *([CODEBOOK] if plan.fidelity else [])])
    todo = [(span, shard) for span in spans for shard in shards if not _stands(plan, build, span, shard)]
    left = sum(len(data.rows_of(shard)) * (last - first + 1) for (first, last), shard in todo)
    with bar("cache", total=len(data.usable()) * new, unit="view", initial=len(data.usable()) * new - left) as progress:
        for span, shard in todo:
            _fill_shard(source, store, build, shard, span, progress.update)
    counts = {"samples": len(data.usable()), "views": plan.views, "classes": len(data.classes)}
    build.seal(counts=counts, classes=data.classes, content=data.manifest.content)


def _store(plan: Plan, source: Source, build: Build, there: int, spans: list[tuple[int, int]]) -> tuple[Store, int]:
    """How it is stored, and about how many bytes the new views take."""
    if plan.fidelity is None:
        return PlainStore(plan.dtype), plan.bytes(there, plan.view_bytes)
    first = LogitCache.open(build.folder).parts[0] if there else (*spans[0], 0)
    store, choice = _storing.coded_store(source, build, plan.fidelity, first[1] - first[0] + 1)
    if choice is not None:
        return store, plan.bytes(there, choice.view_bytes + _geometry_bytes(plan), choice.base_bytes)
    standing = [f for f in build.files() if f.path.startswith("views-")]
    done = sum(len(plan.data.rows_of(files.shard_of(f.path))) * len(files.views_of(f.path)) for f in standing)
    return store, int(len(plan.data.usable()) * (plan.views - there) * sum(f.bytes for f in standing) / max(done, 1))


def _geometry_bytes(plan: Plan) -> float:
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


def _estimate(plan: Plan, folder: Path, state: str) -> Outcome:
    """What filling would do: bytes of the view files, seconds from a few samples of the very work, which a code is then tried on."""
    rows = plan.data.usable()
    there = LogitCache.open(folder).views if state == "finished" else 0
    new = max(plan.views - there, 0)
    state = "grown" if there and new else state
    seconds, said = _tried(plan, plan.source(), there) if new else (0.0, [])
    each, base = plan.view_bytes, 0.0
    if plan.fidelity is not None and new and (choice := _choice_of_few(plan, said)):
        each, base = choice.view_bytes + _geometry_bytes(plan), choice.base_bytes
    return Estimate(folder, state, {"sample": len(rows), "view": new}, plan.bytes(there, each, base), seconds).outcome()


def _tried(plan: Plan, source: Source, there: int) -> tuple[float, list[list[NDArray[np.float32]]]]:
    """The seconds that the views from `there` on would take, by a few samples of the very work; and what was said of up to 8 views of
    these."""
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

    return measure_growing(work(), len(rows) * (plan.views - there)), said


def _choice_of_few(plan: Plan, said: list[list[NDArray[np.float32]]]) -> _storing.Choice | None:
    """About how a coded cache would be coded; None where too little was said to tell: then the plain size is the most it takes."""
    assert plan.fidelity is not None
    logits = np.stack([np.concatenate(one) for one in said])
    try:
        return _storing.choose(logits, plan.fidelity, plan.views) if logits.shape[1] >= _storing.LEAST_SAMPLES else None
    except KdpruneError:  # no step is fine enough for directions that were learned from so few
        return None


def _outcome(folder: Path) -> Outcome:
    cache = LogitCache.open(folder)
    made = cache.manifest
    counts, size = made.counts, sum(f.bytes for f in made.files)
    per_view = size / (counts["samples"] * counts["views"])
    text = (
        f"{folder}: {count(counts['views'], 'view')} of {count(counts['samples'], 'sample')}, {megabytes(size)} "
        f"({per_view:.{0 if per_view >= 100 else 1}f} bytes a view), {made.config['dtype']}"
    )
    kl = cache.kl
    if cache.coded:
        text += "; mean KL(full || stored) " + ", ".join(f"{value:.2g} at temperature {tau}" for tau, value in kl.items())
        asked = made.config["fidelity"]
        text += "" if max(kl.values()) <= asked else f": above the {asked:g} asked for, which the samples it was chosen on kept"
    facts = {"folder": str(folder), "counts": counts, "bytes": size, "bytes_per_view": round(per_view, 3), "kl": kl, "digest": made.digest}
    return Outcome(folder, facts, text)
