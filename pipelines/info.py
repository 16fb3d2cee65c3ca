"""`info`: what an artefact is, and where it came from: kind, counts, settings, files, and its ancestors back to the source.

Of scores also how they are distributed, by class too, and how they agree; of a subset the weights of its samples; of a logit cache what
storing takes and loses; of a list that `pick` made its settings and its table.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdprune_pipelines import _bf16, _distribution, _soft, _weighing
from kdprune_pipelines._console import Outcome, count, megabytes
from kdprune_pipelines._tables import PAGE

from kdprune_data.config import Config, option
from kdprune_data.formats import listed
from kdprune_data.formats.dataset import read_weights
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest

SHOWN = 12


@dataclass(frozen=True)
class InfoConfig(Config):
    """Settings of `info`."""

    artefact: Path = option(
        help="The folder of a data set, subset, teacher, student, scores, logit cache or export; or a list.", argument=True
    )


def run(config: InfoConfig) -> Outcome:
    """Describe an artefact, or a list. Raises UsageError when it is none, FormatError when its files are broken."""
    if config.artefact.is_file() and (facts_of_list := listed.read_facts(config.artefact)) is not None:
        return _list(config.artefact, facts_of_list)
    manifest = Manifest.load(config.artefact)
    facts = {
        "folder": str(config.artefact),
        "kind": manifest.kind,
        "name": manifest.name,
        "digest": manifest.digest,
        "content": manifest.content,
        "counts": manifest.counts,
        "classes": list(manifest.classes),
        "config": manifest.config,
        "bytes": sum(f.bytes for f in (*manifest.files, *manifest.side)),
        "files": [asdict(f) for f in manifest.files],
        "side": [asdict(f) for f in manifest.side],
        "outside": [asdict(f) for f in manifest.outside],
        "inputs": list(manifest.inputs),
        "made": manifest.made,
    }
    facts |= _more(config.artefact, manifest)
    return Outcome(config.artefact, facts, "\n".join(_describe(config.artefact, manifest, facts)))


def _list(path: Path, made: listed.Facts) -> Outcome:
    """What a list says of itself."""
    size = path.stat().st_size
    facts = {"file": str(path), "kind": "list", "bytes": size, "counts": made.counts, "config": made.config, "inputs": list(made.inputs)}
    lines = [
        f"{path}: list, {megabytes(size)}",
        f"  counts    {', '.join(f'{key} {_plain(value)}' for key, value in made.counts.items())}",
        *(f"  {'' if n else 'settings':<9} {line}" for n, line in enumerate(_settings(made.config))),
        "  made from",
        *(f"    {one['name']}: {count(one['rows'], 'row')}, {megabytes(one['bytes'])}, footer {one['footer'][:12]}" for one in made.inputs),
    ]
    return Outcome(path, facts, "\n".join(lines))


def _more(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What stands in the files and in no manifest."""
    if manifest.kind == "scores":
        return {"scores": _distribution.facts(folder, manifest)}
    if manifest.kind == "logits":
        return {"soft_labels": _soft_labels(folder)}
    return {"weights": _weighing.facts(read_weights(folder)[1])} if manifest.kind == "subset" else {}


def _soft_labels(folder: Path) -> dict[str, Any]:
    """What a logit cache takes, loses and holds for, and what its teachers were shown: bytes of a view of a sample, everything included;
    mean KL(full || stored) by temperature; the temperatures from the lowest to the highest, null for all; of each teacher the side of its
    inputs in pixels, and their normalisation."""
    cache = LogitCache.open(folder)
    size = sum(f.bytes for f in cache.manifest.files)
    views = cache.views * int(cache.manifest.counts["samples"])
    shown = [
        {"name": one["name"], "size": one["config"]["architecture"]["size"], **one["config"]["normalisation"]}
        for one in cache.teachers
        if {"architecture", "normalisation"} <= one["config"].keys()
    ]
    return {"bytes_per_view": round(size / views, 3), "kl": cache.kl, "temperatures": cache.temperatures, "teachers": shown}


def _describe(folder: Path, manifest: Manifest, facts: Mapping[str, Any]) -> Iterator[str]:
    files = [*manifest.files, *manifest.side]
    yield f"{folder}: {manifest.kind} {manifest.name!r}"
    yield f"  files     {count(len(files), 'file')}, {megabytes(sum(f.bytes for f in files))}"
    if manifest.outside:
        size = megabytes(sum(f.bytes for f in manifest.outside))
        yield f"  outside   {count(len(manifest.outside), 'shard')}, {size}, read where they lie ({Path(manifest.outside[0].path).parent})"
    shown = [f"{key} {_plain(value)}" for key, value in manifest.counts.items() if key not in ("per_class", "bf16")]
    yield f"  counts    {', '.join(shown)}"
    for n, line in enumerate(_wrapped(_bf16.spoken(manifest.counts["bf16"])) if "bf16" in manifest.counts else ()):
        yield f"  {'' if n else 'bf16':<9} {line}"
    names = list(manifest.classes)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    yield f"  classes   {len(names):,}: {', '.join(names[:SHOWN])}{more}"
    if "per_class" in manifest.counts and names:
        per_class = manifest.counts["per_class"]
        yield f"  per class {min(per_class):,} to {max(per_class):,} samples"
    if "weights" in facts:
        yield f"  weights   {_weighing.spoken(facts['weights'])}"
    if "soft_labels" in facts:
        found = facts["soft_labels"]
        lost = ", ".join(f"{kl:.2g} at temperature {tau}" for tau, kl in found["kl"].items())
        yield f"  stored    {found['bytes_per_view']:,.1f} bytes a view of a sample; mean KL(full || stored) {lost}"
        held = found["temperatures"]
        yield f"  holds     {'at any temperature' if held is None else f'at {_soft.spoken(held)}'}"
        for n, one in enumerate(found["teachers"]):
            mean, std = (" ".join(f"{value:.4g}" for value in one[key]) for key in ("mean", "std"))
            yield f"  {'' if n else 'inputs':<9} of {one['name']}: {one['size']} pixels, less mean {mean}, by deviation {std}"
    for n, line in enumerate(_settings(manifest.config)):
        yield f"  {'settings' if n == 0 else '':<9} {line}"
    yield f"  digest    {manifest.digest}"
    yield f"  content   {manifest.content}"
    made = manifest.made
    yield f"  made      {made.get('time')} in {made.get('seconds')} s, kdprune-data {made.get('versions', {}).get('kdprune-data')}"
    if manifest.inputs:
        yield "  made from"
        yield from _lineage(manifest.inputs, "    ")
    if "scores" in facts:
        yield from _distribution.lines(facts["scores"])


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            own = value is None and prefix.startswith("settings.")  # of a method or a score, which finds it out
            yield from _wrapped(f"{prefix}{key} = {'auto' if own else _plain(value)}")


def _wrapped(text: str) -> list[str]:
    """Lines that a page is wide enough for, beside the heading."""
    return textwrap.wrap(text, PAGE - 12, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value) or "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _lineage(inputs: Any, indent: str) -> Iterator[str]:
    for one in inputs:
        counts = one["counts"]
        samples = f", {count(counts['samples'], 'sample')}" if "samples" in counts else ""
        yield f"{indent}{one['role']}: {one['kind']} {one['name']!r}{samples}, digest {one['digest'][:12]}, content {one['content'][:12]}"
        yield from _lineage(one["inputs"], indent + "  ")
