"""`verify`: is an artefact whole, and what it says it is? Re-reads every byte; any fault is named and ends in exit code 1.

1. The manifest: its own sha256, its digest.
2. Every file: there, its size, its sha256; side files and those outside too.
3. Inside: tars against the index, images against their digests, logits against their rows, geometry against the policy, weights against the
   architecture, exports against their members.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kdprune_pipelines._console import Outcome, bar, count, megabytes
from kdprune_pipelines._models import WEIGHTS, Saved, epoch_weights, open_model

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import FormatError, KdpruneError, SourceError
from kdprune_data.formats import check, check_data, check_export, logits
from kdprune_data.formats import manifest as m
from kdprune_data.formats.check import Fault, Tick
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.members import root_config

SHOWN = 20


@dataclass(frozen=True)
class VerifyConfig(Config):
    """Settings of `verify`."""

    artefact: Path = option(help="The folder of a data set, subset, teacher, student, scores, logit cache or export.", argument=True)


def run(config: VerifyConfig) -> Outcome:
    """Check an artefact. Raises UsageError when the folder is none; faults are in the outcome."""
    faults: list[Fault] = []
    manifest = None
    try:
        manifest = Manifest.load(config.artefact)
        with bar("verify", total=None, unit="B") as progress:
            faults += check.files(config.artefact, manifest, progress.update)
        with bar("look inside", total=None) as progress:
            faults += _inside(config.artefact, manifest, progress.update, damaged=bool(faults))
    except (FormatError, SourceError) as error:
        faults.append(Fault(str(config.artefact), str(error)))
    facts = {"folder": str(config.artefact), "ok": not faults, "faults": [str(f) for f in faults]}
    if not faults and manifest is not None:
        files = [*manifest.files, *manifest.side, *manifest.outside]
        size = megabytes(sum(f.bytes for f in files))
        what = f"{manifest.kind} {manifest.name!r}, {count(len(files), 'file')}, {size}"
        text = f"{config.artefact}: whole: {what}, digest {manifest.digest[:12]}"
        if manifest.kind in ("dataset", "subset") and not root_config(manifest.as_input("data")).get("digests", True):
            text += "; indexed without digests: an image that was replaced by another of its size is not noticed"
        return Outcome(config.artefact, facts, text)
    more = [f"and {len(faults) - SHOWN:,} more (all with --json)"] if len(faults) > SHOWN else []
    text = "\n".join([f"{config.artefact}: {count(len(faults), 'fault')}", *(f"  {f}" for f in faults[:SHOWN]), *more])
    return Outcome(config.artefact, facts, text, ok=False)


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
    off = 0 if policy.kind == "pad-crop" else 1
    for shard in cache.shards:
        rows = cache.rows(shard)
        ids = rows["id"].to_pylist()
        uids = order.uids_of(ids)
        sizes = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1)
        for view in range(cache.views):
            found = logits.read_view(cache, shard, view)
            drawn = views.geometry(policy, uids, sizes, view)
            near = [np.abs(getattr(found, side) - getattr(drawn, side)) <= off for side in logits.GEOMETRY]
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
