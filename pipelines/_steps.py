"""A step of a recipe's chain: its command, its settings, which of its inputs earlier steps make, and where what it makes will stand.

A folder's name follows from what it is made of. What only the work tells (the exact fraction kept, and the alpha that follows from it) is
`*` in a name foretold, which then stands for every name that fits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdprune_pipelines import _workspace
from kdprune_pipelines._columns import name_of as name_of_scores
from kdprune_pipelines._models import plain

from kdprune_data import order
from kdprune_data.config import Config
from kdprune_data.formats.manifest import NAME, Manifest

USUAL = {
    "teacher": _workspace.TEACHERS,
    "score": _workspace.SCORES,
    "select": _workspace.SUBSETS,
    "cache": _workspace.LOGITS,
    "export": _workspace.EXPORTS,
    "distill": _workspace.STUDENTS,
}
UNSET = Path("made-by-an-earlier-step")
INPUTS = ("data", "val", "subset", "teacher", "scores", "model", "artefact", "keys", "weights", "init", "logits", "live")
"""The options that name what a step reads, where their value is a path."""
UNKNOWN = "*"


@dataclass(frozen=True)
class Link:
    """An input that an earlier step makes; `split`: which of its data sets; `given`: the path by which the section names it, if it does."""

    step: int
    split: str | None = None
    given: Path | None = None


@dataclass(frozen=True)
class Step:
    """One run of one command. `config` lacks the inputs in `links` that it does not give. `name`: that of its artefact, foretold."""

    command: str
    title: str
    config: Config
    links: Mapping[str, Link] = field(default_factory=dict)
    name: str = ""
    of: str = ""
    """Where its section has become several steps: of what this one is."""

    @property
    def label(self) -> str:
        """How messages and tables name it."""
        return f"{self.title} for {self.of}" if self.of else self.title

    @property
    def splits(self) -> dict[str, Path]:
        """The data sets that an import or an adoption makes."""
        config: Any = self.config
        if self.command not in ("import", "index"):
            return {}
        folder = config.out or _workspace.DATA / config.split
        aside = {"val": folder.parent / "val"} if getattr(config, "holdout", None) else {}
        return {config.split: folder, **aside}

    @property
    def folder(self) -> Path | None:
        """Where its artefact goes, as far as that can be foretold; None where it makes none."""
        config: Any = self.config
        if self.splits:
            return self.splits[config.split]
        return (config.out or USUAL[self.command] / self.name) if self.command in USUAL else None

    @property
    def folders(self) -> list[tuple[str | None, Path]]:
        """All that it makes: (split, folder), the split None where it is no data set."""
        return list(self.splits.items()) or ([(None, self.folder)] if self.folder else [])


def given(config: Config, option: str) -> Path | None:
    """The path that a section gives for an input, if it gives one."""
    value = getattr(config, option, None)
    if option == "logits" and isinstance(value, str) and value != "none":
        return Path(value)
    return value if isinstance(value, Path) and value != UNSET else None


def linked(path: Path, made: Sequence[Step]) -> Link | None:
    """The earlier step that makes a given path, or the folder that it lies in."""
    places = [_whole(one) for one in (path, *path.parents)]
    for n, step in enumerate(made):
        for split, folder in step.folders:
            if any(fits(one, _whole(folder)) for one in places):
                return Link(n, split, path)
    return None


def _whole(path: Path) -> Path:
    """A path from the root, without `..`."""
    return Path(os.path.normpath(Path.cwd() / path))


def fits(path: Path, foretold: Path) -> bool:
    """Whether a folder may be the one foretold."""
    if path.parent != foretold.parent:
        return False
    return re.fullmatch(re.escape(foretold.name).replace(re.escape(UNKNOWN), ".*"), path.name) is not None


def input_of(step: Step, option: str) -> Link | Path | None:
    """What a step reads: what an earlier step makes, a folder, or None where its command finds it."""
    return step.links.get(option) or given(step.config, option)


def found_of(step: Step, option: str) -> Link | Path | None:
    """An input, looked for as the command will: the only one in its usual place."""
    usual = {"subset": _workspace.SUBSETS, "teacher": _workspace.TEACHERS}.get(option)
    there = input_of(step, option)
    if there is None and usual is not None:
        candidates = _workspace.candidates(usual)
        return candidates[0] if len(candidates) == 1 else None
    return there


def place_of(one: Link | Path, made: Sequence[Step]) -> Path | None:
    """The folder of an input."""
    if isinstance(one, Path):
        return one
    step = made[one.step]
    return one.given or (step.splits[one.split] if one.split else step.folder)


def same(one: Link | Path | None, other: Link | Path | None, made: Sequence[Step]) -> bool:
    """Whether two inputs are one folder; where neither is known, the command finds the same for both."""
    if one is None or other is None:
        return one is other
    a, b = place_of(one, made), place_of(other, made)
    return a is not None and b is not None and _whole(a) == _whole(b)


def name_of(step: Step, made: Sequence[Step]) -> str:
    """The name of what a step makes, as its command derives it; none where it makes nothing."""
    config: Any = step.config
    if getattr(config, "name", None) or getattr(config, "out", None):
        return str(config.name if getattr(config, "name", None) else config.out.name)

    def of(option: str) -> str:
        return _input_name(found_of(step, option), made)

    model = plain(str(getattr(config, "model", "")))
    match step.command:
        case "teacher":
            return f"{model}-s{config.seed}"
        case "score":
            return name_of_scores(of("teacher"), epoch=config.epoch, proxies=config.proxies, epochs=config.epochs)
        case "select":
            how = "keys" if config.keys else config.column or config.method or "random"
            return f"{how}-{order.shortest(order.fraction(config.frac)) if config.frac else UNKNOWN}-s{config.seed}"
        case "cache":
            return f"{of('subset')}--{of('teacher')}"
        case "export":
            return of("logits")
        case "distill":
            return f"{of('subset')}--{model}-a{_alpha(step, made)}-s{config.seed}"
    return str(getattr(config, "split", ""))


def _input_name(found: Link | Path | None, made: Sequence[Step]) -> str:
    """What an input calls itself: a data set by its split, all else by its folder, unless that was renamed."""
    if isinstance(found, Link):
        return found.split or made[found.step].name
    if found is None or not (found / NAME).is_file():
        return found.name if found else UNKNOWN
    return Manifest.read(found).name


def _alpha(step: Step, made: Sequence[Step]) -> str:
    """The weight of the teacher in a student's name; of an automatic one the digits that do not depend on how the fraction is rounded."""
    config: Any = step.config
    if config.alpha != "auto":
        try:
            return f"{float(config.alpha):g}"
        except ValueError:
            return str(config.alpha)  # which the command refuses
    cached = config.logits != "none" and (input_of(step, "logits") or _workspace.candidates(_workspace.LOGITS))
    if not (cached or config.live):
        return "0"
    from kdprune_data.learn.losses import auto_alpha  # which imports torch

    kept = _kept(found_of(step, "subset"), made)
    if kept is None:
        return UNKNOWN
    least, most = (f"{auto_alpha(one):g}" for one in (kept[1], kept[0]))
    alike = [a for n, a in enumerate(least) if most.startswith(least[: n + 1])]
    return least if least == most else "".join(alike) + UNKNOWN


def _kept(found: Link | Path | None, made: Sequence[Step]) -> tuple[float, float] | None:
    """Between which fractions of the original data lies what an input keeps; None where that cannot be foretold."""
    if isinstance(found, Path):
        exact = _workspace.root_fraction(Manifest.read(found).as_input("data")) if (found / NAME).is_file() else None
        return None if exact is None else (exact, exact)
    if found is None or found.split is not None:
        return None if found is None else (1.0, 1.0)
    step = made[found.step]
    config: Any = step.config
    above = _kept(input_of(step, "data") or _workspace.DATA / "train", made)
    if step.command != "select" or not config.frac or above is None:
        return None
    part = float(order.fraction(config.frac))
    # Whole samples are kept: the exact share is a little off, by less than this for any hundred samples.
    return above[0] * part * 0.98, min(1.0, above[1] * part * 1.02)
