"""`verify`: is an artefact whole, and what it says it is? Re-reads every byte; any fault is named and ends in exit code 1.

1. The manifest: its own sha256, its digest.
2. Every file: there, its size, its sha256; side files and those outside too.
3. Inside: tars against the index, images against their digests, logits against their rows, geometry against the policy, weights against the
   architecture, exports against their members.
4. With `--teacher`, of a logit cache: some of its soft labels are asked for again, and where they are others the likely cause is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from kdprune_pipelines import _recheck
from kdprune_pipelines._console import Outcome, bar, count, megabytes, say
from kdprune_pipelines._models import WEIGHTS, Saved, epoch_weights, open_model

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import FormatError, KdpruneError, SourceError, UsageError
from kdprune_data.formats import check, check_data, check_export, logit_files
from kdprune_data.formats import manifest as m
from kdprune_data.formats.check import Fault, Tick
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache, boxes_of
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.members import root_config

SHOWN = 20


@dataclass(frozen=True)
class VerifyConfig(Config):
    """Settings of `verify`."""

    artefact: Path = option(help="The folder of a data set, subset, teacher, student, scores, logit cache or export.", argument=True)
    teacher: Path | None = option(None, help="Of a logit cache: the folder of its teacher, which is asked again about some soft labels.")
    ensemble: tuple[Path, ...] = option((), help="Another of its teachers (several times), where it holds what several say together.")
    sample: int = option(256, help="How many soft labels the teacher is asked about.", least=1, most=1_000_000)
    data: Path | None = option(None, help="The images to show the teacher; default the data set of the cache, in data/ or subsets/.")
    seed: int = option(0, help="Seed of the choice of soft labels.", least=0)
    code: tuple[str, ...] = option((), help="package.module:function, when a teacher is your own function; may be given several times.")
    device: str = option("auto", help="Where the teacher computes.", choices=("auto", "cpu", "cuda", "mps"))


@dataclass(frozen=True)
class Asked:
    """A logit cache's teachers, and images that they can be asked about."""

    saved: Sequence[Saved]
    data: Dataset


def run(config: VerifyConfig) -> Outcome:
    """Check an artefact; faults are in the outcome.

    Raises UsageError when the folder is none, or options are not for it, MismatchError when the teacher or the data are not the cache's.
    """
    manifest, faults = _manifest(config.artefact)
    agreement = None
    if manifest is not None:
        asked = _asked(config, manifest)
        faults, damaged = _faults(config.artefact, manifest)
        agreement = None if asked is None or damaged else _agreement(config, asked, faults)
    facts: dict[str, Any] = {"folder": str(config.artefact), "ok": not faults, "faults": [str(f) for f in faults]}
    if agreement is not None:
        ensemble = {"ensemble": [str(folder) for folder in config.ensemble]} if config.ensemble else {}
        facts["asked"] = {"teacher": str(config.teacher), "seed": config.seed} | ensemble | agreement.facts()
    if not faults and manifest is not None:
        return Outcome(config.artefact, facts, _whole(config, manifest, agreement))
    more = [f"and {len(faults) - SHOWN:,} more (all with --json)"] if len(faults) > SHOWN else []
    text = "\n".join([f"{config.artefact}: {count(len(faults), 'fault')}", *(f"  {f}" for f in faults[:SHOWN]), *more])
    return Outcome(config.artefact, facts, text, ok=False)


def _manifest(folder: Path) -> tuple[Manifest | None, list[Fault]]:
    """A folder's manifest, or what is wrong with it. Raises UsageError when the folder is no artefact."""
    try:
        return Manifest.load(folder), []
    except FormatError as error:
        return None, [Fault(str(folder), str(error))]


def _faults(folder: Path, manifest: Manifest) -> tuple[list[Fault], bool]:
    """What is wrong with an artefact, and whether bytes of it are: then what they say is not worth comparing."""
    faults: list[Fault] = []
    try:
        with bar("verify", total=None, unit="B") as progress:
            faults += check.files(folder, manifest, progress.update)
        damaged = bool(faults)
        with bar("look inside", total=None) as progress:
            faults += _inside(folder, manifest, progress.update, damaged=damaged)
    except (FormatError, SourceError) as error:
        return [*faults, Fault(str(folder), str(error))], True
    return faults, damaged


def _whole(config: VerifyConfig, manifest: Manifest, agreement: _recheck.Agreement | None) -> str:
    """What is said of an artefact without a fault."""
    files = [*manifest.files, *manifest.side, *manifest.outside]
    size = megabytes(sum(f.bytes for f in files))
    what = f"{manifest.kind} {manifest.name!r}, {count(len(files), 'file')}, {size}"
    text = f"{config.artefact}: whole: {what}, digest {manifest.digest[:12]}"
    if manifest.kind in ("dataset", "subset") and not root_config(manifest.as_input("data")).get("digests", True):
        text += "; indexed without digests: an image that was replaced by another of its size is not noticed"
    if agreement is not None:
        whose = _recheck.together_named([config.teacher, *config.ensemble])
        text += f"; {count(agreement.pairs, 'soft label')} asked of {whose} again: {agreement.text}"
    elif manifest.config.get("ensemble") is not None:
        text += "; its teachers were not asked: --teacher DIR and --ensemble DIR ask them again about some soft labels"
    elif manifest.kind == "logits":
        text += "; its teacher was not asked: --teacher DIR asks it again about some soft labels"
    return text


def _asked(config: VerifyConfig, manifest: Manifest) -> Asked | None:
    """The teacher to ask, and the data to ask about; None where no teacher is given.

    Raises UsageError for options without use and where no data are found, MismatchError when the teacher or the data are not the cache's.
    """
    given = [f.name for f in fields(config) if f.name != "artefact" and getattr(config, f.name) != f.default]
    if given and manifest.kind != "logits":
        raise UsageError(f"--{given[0]} is for logit caches, and {config.artefact} is of kind {manifest.kind}: leave it out")
    if config.teacher is None:
        if given:
            raise UsageError(f"--{given[0]} is for asking a teacher, and none is given: add --teacher DIR, or leave it out")
        return None
    saved = _recheck.check_asked(config.artefact, manifest, [open_model(folder) for folder in (config.teacher, *config.ensemble)])
    data = Dataset.open(config.data or _recheck.data_of(config.artefact, manifest))
    for classes, whose in ((manifest.classes, config.artefact), *((one.manifest.classes, one.folder) for one in saved)):
        data.same_classes(classes, str(whose))
    return Asked(saved, data)


def _agreement(config: VerifyConfig, asked: Asked, faults: list[Fault]) -> _recheck.Agreement | None:
    """Ask the teacher again; a fault is added where it says something else. None where other faults leave nothing to ask about."""
    from kdprune_data.learn.inference import choose_device
    from kdprune_data.learn.stream import Images

    device = choose_device(config.device)
    nets = [one.load(code=config.code) for one in asked.saved]
    try:
        cache = LogitCache.open(config.artefact)
        witness = _recheck.witness_of(cache.join(asked.data), Images(asked.data), asked.saved, nets=nets, device=device)
        total = min(config.sample, len(asked.data.usable()) * cache.views)
        with bar("ask the teacher", total=total, unit="soft label") as progress:
            found = _recheck.recheck(witness, views=cache.views, sample=total, seed=config.seed, tick=progress.update)
    except KdpruneError as error:
        if not faults:
            raise
        say(f"the teacher could not be asked: {error}")
        return None
    if found.fault is not None:
        faults.append(Fault(str(config.artefact), found.fault))
    return found


def _inside(folder: Path, manifest: Manifest, tick: Tick, *, damaged: bool) -> Iterator[Fault]:
    """What the files say, by kind. An error while reading is a fault like any other; of a damaged file the fault is known."""
    checks = {
        "dataset": check_data.data,
        "subset": check_data.data,
        "scores": check.scores,
        "logits": _logits,
        "model": _model,
        "export": check_export.contents,
    }
    try:
        yield from checks[manifest.kind](folder, manifest, tick)
    except KdpruneError as error:
        yield Fault(str(folder), str(error))
    except Exception:  # of a damaged file any library can make anything
        if not damaged:
            raise
    extra = sorted(_unlisted(folder, manifest))
    if extra:
        yield Fault(str(folder / extra[0]), f"{count(len(extra), 'file')} in the folder that the manifest does not list")


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    if (folder / m.PARTIAL).is_dir():
        return  # a finished cache to which views are being added
    listed = {f.path for f in (*manifest.files, *manifest.side)} | {m.NAME}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative not in listed:
            yield relative


def _logits(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A logit cache: what `check.logit_cache` says, and every box is the one that the policy draws."""
    from kdprune_data.learn import views

    yield from check.logit_cache(folder, manifest, tick)
    cache = LogitCache.open(folder)
    policy = views.Policy.from_dict(cache.policy)
    # exp and log differ in the last bit between machines, and a rounded side or place with them by a pixel.
    off = 1 if policy.kind == "resized-crop" else 0
    if policy.kind == "given":
        return
    for shard in cache.shards:
        rows = cache.rows(shard)
        ids = rows["id"].to_pylist()
        uids = order.uids_of(ids)
        sizes = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1)
        for view in range(cache.views):
            found = boxes_of(cache, shard, view)
            drawn = views.geometry(policy, uids, sizes, view)
            near = [np.abs(getattr(found, side) - getattr(drawn, side)) <= off for side in logit_files.GEOMETRY]
            same = np.all([*near, found.flip == drawn.flip], axis=0)
            if not same.all():
                where = f"view {view} of shard {shard}"
                yield Fault(str(folder), f"{where}: the box of {ids[int(np.argmin(same))]!r} is not the one its policy draws")


def _model(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A model: weights are finite and fit the architecture, metrics are JSON lines, dynamics are complete."""
    saved = open_model(folder)
    for name in [WEIGHTS, *(epoch_weights(e) for e in saved.kept_epochs)]:
        yield from _weights(saved, folder / name)
    for n, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            json.loads(line)
        except ValueError:
            yield Fault(str(folder / "metrics.jsonl"), f"line {n} is not JSON")
    yield from check.training_dynamics(folder, manifest)


def _weights(saved: Saved, path: Path) -> Iterator[Fault]:
    import torch
    from safetensors import SafetensorError, safe_open

    from kdprune_data.learn.models import build
    from kdprune_data.learn.weights import load_weights

    if ":" not in saved.architecture.name:  # the user's own function is not run to check a file
        try:
            load_weights(build(saved.architecture, seed=0), path)
        except KdpruneError as error:
            yield Fault(str(path), str(error))
            return
    try:
        with safe_open(path, "pt") as file:
            broken = [key for key in file.keys() if not bool(torch.isfinite(file.get_tensor(key).float()).all())]  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        yield Fault(str(path), f"cannot be read as safetensors ({error})")
        return
    if broken:
        yield Fault(str(path), f"{broken[0]} holds numbers that are not finite")
