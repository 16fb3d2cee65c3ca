"""`cache`: what the teacher says of many views of each kept sample.

1. The views' boxes are drawn from (seed, id, view) for the data set's policy, at the teacher's input size.
2. Each sample is decoded once for all new views of a range; every view is rendered and shown to the teacher, in batches that do not cross
   a shard. `--ensemble` asks several teachers; `--from FILE` takes somebody else's logits in their place.
3. Per shard: the rows once, and one file of geometry and logits for each range of views; plain, or with `--fidelity` coded.

Writes `logits/SUBSET--TEACHER`. Views are append-only: asking for more adds files and leaves those that stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _asking, _bf16, _given, _recipes, _storing, _workspace
from kdprune_pipelines._asking import Source
from kdprune_pipelines._console import Outcome, count, megabytes, say
from kdprune_pipelines._estimate import Estimate, look
from kdprune_pipelines._filling import Plan, fill, geometry_bytes, tried
from kdprune_pipelines._models import Saved, open_model
from kdprune_pipelines._storing import Fidelity
from numpy.typing import NDArray

from kdprune_data.config import Config, option
from kdprune_data.errors import KdpruneError, UsageError
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.logit_files import CODED, DTYPES
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import PARTIAL

if TYPE_CHECKING:
    from kdprune_data.learn.policy import Policy

MOST_VIEWS = 10_000


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
    precision: str = option("float32", help=_bf16.HELP, choices=_bf16.PRECISIONS)
    code: tuple[str, ...] = option((), help="package.module:function, when a teacher is your own function; may be given several times.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    name: str | None = option(None, help="Name in logits/; default SUBSET--TEACHER.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")


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
            fill(plan, build, there)
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
    settings: dict[str, Any] = {"dtype": config.dtype, "policy": policy.to_dict(), "precision": config.precision, "batch": config.batch}
    if len(saved) > 1:
        settings["ensemble"] = {"temperature": _only_temperature(config)}
    named = "+".join(one.manifest.name for one in saved)
    inputs = [data.manifest.as_input("data"), *(one.manifest.as_input("teacher") for one in saved)]

    def source() -> Source:
        return _teachers(config, saved, data, policy)

    return _stored(config, Plan(data, policy.views or int(config.views), None, config.dtype, settings, inputs, named, source))


def _teachers(config: CacheConfig, saved: list[Saved], data: Dataset, policy: Policy) -> Source:
    from kdprune_data.learn.inference import choose_device
    from kdprune_data.learn.policy import own_size
    from kdprune_data.learn.stream import Images

    small = own_size(data.sizes[data.usable()]) is not None
    images = Images(data, keep="auto" if small else "off")  # each is decoded once for a range of views, of which few have more than one
    nets, device = [one.load(code=config.code) for one in saved], choose_device(config.device)
    temperature = _only_temperature(config) if len(saved) > 1 else None
    found = _asking.Teachers(images, policy, saved, nets, device, temperature, config.batch, config.jobs)
    return found.in_bf16() if config.precision == "bf16" else found


def _only_temperature(config: CacheConfig) -> float:
    if len(config.temperature) != 1:
        raise UsageError("the mean of several teachers' probabilities holds at one temperature: give --temperature once, the training's")
    return config.temperature[0]


def _plan_given(config: CacheConfig, data: Dataset) -> Plan:
    """With logits from elsewhere."""
    for flag, given in (("--teacher", config.teacher), ("--ensemble", config.ensemble), ("--code", config.code)):
        if given:
            raise UsageError(f"--from takes logits from elsewhere and {flag} asks a teacher: give one of the two")
    if config.precision != "float32":
        raise UsageError(
            f"--precision {config.precision} is of a teacher that is asked, and --from takes logits from elsewhere: leave it out"
        )
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


def _estimate(plan: Plan, folder: Path, state: str) -> Outcome:
    """What filling would do: bytes of the view files, seconds from a few samples of the very work, which a code is then tried on."""
    rows = plan.data.usable()
    there = LogitCache.open(folder).views if state == "finished" else 0
    new = max(plan.views - there, 0)
    state = "grown" if there and new else state
    seconds, said = tried(plan, plan.source(), there) if new else (0.0, [])
    each, base = plan.view_bytes, 0.0
    if plan.fidelity is not None and new and (choice := _choice_of_few(plan, said)):
        each, base = choice.view_bytes + geometry_bytes(plan), choice.base_bytes
    return Estimate(folder, state, {"sample": len(rows), "view": new}, plan.bytes(there, each, base), seconds).outcome()


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
