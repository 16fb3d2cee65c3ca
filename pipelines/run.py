"""`run`: the whole chain from one TOML file, or what is left of it.

1. Turn the recipe into steps (`_chain`): all of it is checked before anything is done.
2. Run each step as its command would: what is finished is skipped, what is unfinished continued, what is something else refused.
3. After every step write `runs/NAME.json`: the recipe, each step's options, folder, digest and time, and the results of evaluation.

`kdprune.toml` has no say in the steps, so that the record says everything. With `--dry-run` nothing is touched.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprune_pipelines import (
    _checks,
    _recipes,
    _workspace,
    cache,
    distill,
    evaluate,
    export,
    import_,
    index,
    score,
    select,
    teacher,
    verify,
)
from kdprune_pipelines._chain import REQUIRED, needs_scores, steps_of
from kdprune_pipelines._console import Outcome, duration, megabytes, quiet, say
from kdprune_pipelines._recipes import Recipe
from kdprune_pipelines._record import Record
from kdprune_pipelines._steps import INPUTS, UNSET, USUAL, Link, Step, given

from kdprune_data.config import Config, field_types, option
from kdprune_data.errors import KdpruneError, UsageError
from kdprune_data.formats.manifest import NAME, Manifest

STAGES: dict[str, tuple[type[Config], Callable[[Any], Outcome]]] = {
    "import": (import_.ImportConfig, import_.run),
    "index": (index.IndexConfig, index.run),
    "teacher": (teacher.TeacherConfig, teacher.run),
    "score": (score.ScoreConfig, score.run),
    "select": (select.SelectConfig, select.run),
    "cache": (cache.CacheConfig, cache.run),
    "export": (export.ExportConfig, export.run),
    "distill": (distill.DistillConfig, distill.run),
    "evaluate": (evaluate.EvaluateConfig, evaluate.run),
    "verify": (verify.VerifyConfig, verify.run),
}

OWN_ADVICE = re.compile(r"use --(?:name|out) \S+ for another, or --overwrite to replace it$")
RUN_ADVICE = (
    "give its section another `name` or `out` (where it runs several times: write a section for each), or remove that folder; "
    "run --overwrite would replace every step's"
)
"""A stage's advice on a folder that was made with other settings, and what it comes to in a recipe."""


@dataclass(frozen=True)
class RunConfig(Config):
    """Settings of `run`."""

    recipe: str | None = option(None, help="A TOML file, or the name of a recipe that comes with the package.", argument=True)
    code: tuple[str, ...] = option((), help="package.module:function of your own that the recipe may run; may be given several times.")
    list: bool = option(False, help="List the recipes that come with the package.")
    show: bool = option(False, help="Print the recipe, to be read, or kept in a file and changed.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")
    overwrite: bool = option(False, help="Replace what stands in the folders.")


def run(config: RunConfig) -> Outcome:
    """Run a recipe. Raises what the stages raise, naming the section."""
    if config.list:
        found = [_recipes.find(name) for name in _recipes.names()]
        lines = [f"{one.name:<12} {re.split('[.:]( |$)', one.text.lstrip('# '), maxsplit=1, flags=re.M)[0]}" for one in found]
        return Outcome(None, {"recipes": [one.name for one in found]}, "\n".join(lines))
    if config.recipe is None:
        raise UsageError(f"which recipe? give a TOML file, or one of those that come with the package: {', '.join(_recipes.names())}")
    recipe = _recipes.find(config.recipe)
    if config.show:
        return Outcome(None, {"name": recipe.name, "text": recipe.text}, recipe.text.rstrip("\n"))
    steps = steps_of(recipe, {command: one for command, (one, _) in STAGES.items()}, config.code)
    for step in steps:
        with _named(recipe, step):
            _check(step, steps)
    chain = Chain(config, recipe, steps)
    return chain.estimate() if config.dry_run else chain.work()


@contextmanager
def _named(recipe: Recipe, step: Step) -> Iterator[None]:
    """Put the recipe's and the section's name before a message."""
    try:
        yield
    except KdpruneError as error:
        raise type(error)(f"{recipe.where} {step.label}: {OWN_ADVICE.sub(RUN_ADVICE, str(error))}") from error


def _check(step: Step, steps: Sequence[Step]) -> None:
    """What would fail hours later for want of an input or a network, before any work. Raises UsageError."""
    config: Any = step.config
    for name in REQUIRED:
        if getattr(config, name, None) == UNSET and name not in step.links:
            raise UsageError(f'{name} is not given, and the recipe makes none: write {name} = "FOLDER"')
    with quiet():
        for name, usual, flag in (("teacher", _workspace.TEACHERS, "--teacher"), ("subset", _workspace.SUBSETS, "SUBSET")):
            if name in _unmet(step) and (name, step.command) != ("teacher", "distill"):
                _workspace.one(None, usual, flag)
        if step.command == "export" and "logits" in _unmet(step) and not _workspace.candidates(_workspace.LOGITS):
            raise UsageError("there is no logit cache in logits/, and the recipe makes none of this subset: add a section [cache]")
        if "data" in _unmet(step):
            _workspace.data(None, "test" if step.command == "evaluate" else "train", "--data")
        if step.command == "select" and needs_scores(config) and "scores" in _unmet(step) and not _workspace.candidates(_workspace.SCORES):
            what = (
                f"method {config.method} ranks by a score"
                if config.method not in (None, "random")
                else "--where or --dedup near reads scores"
            )
            raise UsageError(f"{what}, and there are none in scores/: add a section [score]")
    for name in INPUTS:
        path = given(config, name)
        if path is not None and name not in step.links and not path.exists():
            raise UsageError(f"{name} = {str(path)!r} does not exist, and no earlier step makes it: give one that does")
    if step.command in ("teacher", "distill") and ":" not in config.model:
        from kdprune_data.learn import models

        models.resolve(config.model, classes=2, size=config.size or 224, stem=config.stem, norm=config.norm)
    if step.command == "distill":
        from kdprune_data.learn.soft import Soft

        Soft.choose(config.loss, config.set)
    if step.command == "score":
        _checks.check_scores(step, steps)
    if step.command == "select":
        _checks.check_reads(step, steps, config.needs())


def _unmet(step: Step) -> set[str]:
    """The inputs that neither the section gives nor the recipe makes. (`verify` needs a teacher and data only where it names one.)"""
    lacking = {n for n in field_types(type(step.config)) if getattr(step.config, n) in (None, UNSET) and n not in step.links}
    return lacking - {"teacher", "data"} if step.command == "verify" else lacking


class Chain:
    """The steps of one recipe at work."""

    def __init__(self, config: RunConfig, recipe: Recipe, steps: Sequence[Step]) -> None:
        self._config, self._recipe, self._steps = config, recipe, steps
        self._folders: dict[int, Path] = {}
        self._rows: list[tuple[str, str, str, float]] = []
        self._ok = True

    def work(self) -> Outcome:
        """Run every step and record it."""
        started = time.monotonic()
        record = Record(self._recipe, overwrite=self._config.overwrite)
        record.begin()
        for n, step in enumerate(self._steps):
            say(f"{n + 1}/{len(self._steps)} {step.label}")
            with _named(self._recipe, step):
                self._one(n, step, record)
        record.finish()
        seconds = round(time.monotonic() - started, 1)
        facts = {"name": self._recipe.name, "record": str(record.path), "stages": record.facts["stages"], "seconds": seconds}
        text = f"{_table(self._rows)}\n{record.path}: {len(self._steps)} of {len(self._steps)} done in {duration(seconds)}"
        return Outcome(None, facts, text, self._ok)

    def _one(self, n: int, step: Step, record: Record) -> None:
        began, stamps = time.monotonic(), _stamps(step)
        config = self._filled(step)
        if self._config.overwrite and "overwrite" in field_types(type(config)):
            again: dict[str, Any] = {"overwrite": not record.replaced_already(step.label)}
            config = dataclasses.replace(config, **again)
        outcome = STAGES[step.command][1](config)
        seconds = round(time.monotonic() - began, 3)
        folder = outcome.folder if step.folder is not None else None
        result = dict(outcome.facts) if step.command in ("evaluate", "verify") else None
        made = folder is None or stamps.get(folder / NAME) != (folder / NAME).stat().st_mtime_ns
        if folder is not None:
            self._folders[n] = folder
        digest = None if folder is None else Manifest.read(folder).digest
        where = None if folder is None else str(folder)
        record.add(step.label, step.command, config, folder=where, digest=digest, made=made, seconds=seconds, result=result)
        if not made:
            say(f"{step.label}: skipped: already done")
        self._ok &= outcome.ok
        self._rows.append((step.title, where or _looked_at(config), _result(step, outcome, made), seconds))

    def _filled(self, step: Step) -> Config:
        """A step's configuration with the folders that earlier steps made, and leave to run the functions that were named."""
        made = {name: self._made(link, step, name) for name, link in step.links.items() if link.given is None}
        config: Any = dataclasses.replace(step.config, **made)
        asks = "code" in field_types(type(config)) and not config.code and bool(self._config.code)
        asks = asks and (step.command != "distill" or config.live)  # a student of a cache runs no teacher
        if asks and field_types(type(config))["code"][2]:  # it may ask several teachers, of which it runs only those that are named
            config = dataclasses.replace(config, code=self._config.code if step.command != "verify" or config.teacher is not None else ())
        elif asks:
            folder = getattr(config, {"evaluate": "model", "distill": "live"}.get(step.command, "teacher"))
            with quiet():
                folder = folder or _workspace.one(None, _workspace.TEACHERS, "--teacher")
            name = Manifest.load(folder, kinds=("model",)).config["architecture"]["name"]
            config = dataclasses.replace(config, code=name if name in self._config.code else None)
        filled: Config = config
        return filled

    def _made(self, link: Link, step: Step, name: str) -> Path | str:
        maker = self._steps[link.step]
        folder = maker.splits[link.split] if link.split else self._folders[link.step]
        return folder if field_types(type(step.config))[name][0] is Path else str(folder)

    def estimate(self) -> Outcome:
        """What each step would do, of those whose inputs are there. Touches nothing."""
        stages: list[dict[str, Any]] = []
        lines = []
        for n, step in enumerate(self._steps):
            waits = [link.step for link in step.links.values() if link.step not in self._folders]
            if waits:
                last = self._steps[max(waits)].label
                facts, text = {"after": last}, f"after {last}"
            else:
                with _named(self._recipe, step):
                    facts, text = self._estimated(n, step)
            stages.append({"section": step.label, "command": step.command} | facts)
            lines.append(f"{step.label}: {text}")
        told = [one for stage in stages for one in _parts(stage)]
        size, seconds = (sum(one.get(what, 0) for one in told) for what in ("bytes", "seconds"))
        later = sum("after" in one for one in stages)
        waiting = f"; {later} of {len(stages)} wait for others and are not in it" if later else ""
        lines.append(f"in all about {megabytes(size)}, about {duration(seconds)} on this machine{waiting}")
        total = {"dry_run": True, "name": self._recipe.name, "stages": stages, "bytes": size, "seconds": round(seconds, 1)}
        return Outcome(None, total, "\n".join(lines))

    def _estimated(self, n: int, step: Step) -> tuple[dict[str, Any], str]:
        config = self._filled(step)
        if "dry_run" not in field_types(type(config)):
            return {"state": "new"}, "no estimate" if step.command in USUAL or step.splits else f"{_looked_at(config)} would be read"
        changes: dict[str, Any] = {"dry_run": True} | ({"overwrite": True} if self._config.overwrite else {})
        with quiet():
            outcome = STAGES[step.command][1](dataclasses.replace(config, **changes))
        facts = dict(outcome.facts)
        if all(one["state"] == "finished" for one in _parts(facts)):
            self._folders[n] = Path(facts["folder"])
        return facts, outcome.text


def _parts(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a dry run told: of the artefact, and of those made with it (a val split set apart)."""
    return [facts, *(one for one in facts.values() if isinstance(one, dict) and "state" in one)]


def _stamps(step: Step) -> Mapping[Path, int]:
    """When the manifests were written that stand where a step may write."""
    out = getattr(step.config, "out", None)
    folders = [*step.splits.values(), *([out] if out else [])]
    usual = [USUAL[step.command]] if step.command in USUAL else []
    paths = [*(folder / NAME for folder in folders), *(path for place in usual for path in place.glob(f"*/{NAME}"))]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def _looked_at(config: Any) -> str:
    """The folder that a step looks at and leaves as it is."""
    return str(getattr(config, "artefact", None) or config.model)


def _result(step: Step, outcome: Outcome, made: bool) -> str:
    if step.command == "evaluate":
        return f"accuracy {outcome.facts['accuracy']:.2%}"
    if step.command == "verify":
        return "whole" if outcome.ok else f"{len(outcome.facts['faults'])} faults"
    val = outcome.facts.get("val_accuracy")
    return ("made" if made else "already done") + (f", val {val:.2%}" if val is not None else "")


def _table(rows: Sequence[tuple[str, str, str, float]]) -> str:
    """The steps of a finished run, for people."""
    lines = [("stage", "folder", "result", "seconds"), *((a, b, c, f"{d:.1f}") for a, b, c, d in rows)]
    a, b, c, d = (max(len(line[n]) for line in lines) for n in range(4))
    return "\n".join(_lines(lines, (a, b, c, d)))


def _lines(lines: Sequence[tuple[str, str, str, str]], widths: tuple[int, int, int, int]) -> Iterator[str]:
    a, b, c, d = widths
    for one, two, three, four in lines:
        yield f"{one:<{a}}  {two:<{b}}  {three:<{c}}  {four:>{d}}"
