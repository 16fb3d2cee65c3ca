"""From the sections of a recipe to the steps of a chain, before anything runs. `docs/recipes.md`.

1. Each section becomes its command's configuration, so that whatever is wrong in it is said at once.
2. An input that a section does not give is what the recipe itself makes of that kind; where it makes several, the section becomes a step
   for each. What the recipe does not make is left to the command, which finds it by convention.
3. Two steps that would write one folder are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from kdprune_pipelines import _recipes, _workspace
from kdprune_pipelines._recipes import STAGES, Recipe

from kdprune_data import order
from kdprune_data.config import Config, field_types
from kdprune_data.errors import UsageError

USUAL = {
    "teacher": _workspace.TEACHERS,
    "score": _workspace.SCORES,
    "select": _workspace.SUBSETS,
    "cache": _workspace.LOGITS,
    "distill": _workspace.STUDENTS,
}
SPLIT_OF = {"evaluate": "test"}
"""Which split is a command's `data`, where it is not train."""
REQUIRED = ("model", "artefact")
"""Inputs that a command asks for and that a recipe may leave out: they are what the recipe makes."""
UNSET = Path("made-by-an-earlier-step")


@dataclass(frozen=True)
class Link:
    """An input that an earlier step makes; `split`: which of its data sets."""

    step: int
    split: str | None = None


@dataclass(frozen=True)
class Step:
    """One run of one command. `config` lacks the inputs in `links`. `name`: that of its artefact, as far as it can be foretold."""

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


def steps_of(recipe: Recipe, configs: Mapping[str, type[Config]], code: Sequence[str]) -> list[Step]:
    """The whole recipe as steps, in the order of work. Raises UsageError for anything in it that cannot be."""
    made: list[Step] = []
    for command in STAGES:
        for title, table in zip(recipe.titles(command), recipe.tables(command), strict=True):
            config = configs[command]
            given = _recipes.checked(recipe.where, title, table, config)
            try:
                values = _recipes.settle(command, config, given).values
                _check_functions(values, config, code)
                made += _steps(command, title, _config(config, values), made)
            except UsageError as error:
                raise type(error)(f"{recipe.where} {title}: {error}") from error
    if not made:
        raise UsageError(f"{recipe.where} has no section: write at least one, such as [select]")
    _check_folders(recipe, made)
    return made


def _config(config: type[Config], values: Mapping[str, Any]) -> Config:
    missing = [f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING and f.name not in values]
    for key in missing:
        if key not in REQUIRED:
            raise UsageError(f"{key!r} is missing: every such section needs it")
    return config.from_dict({**values, **dict.fromkeys(missing, UNSET)})


def _check_functions(values: Mapping[str, Any], config: type[Config], code: Sequence[str]) -> None:
    for name in _recipes.functions(values, config).values():
        if name not in code:
            raise UsageError(
                f"names the function {name!r} to run: functions are run only when named on the command line: add --code {name}"
            )


def _steps(command: str, title: str, config: Config, made: Sequence[Step]) -> Iterator[Step]:
    """A section's steps: one for each combination of the inputs that the recipe makes."""
    found = list(_combinations(command, config, made))
    for links in found:
        step = Step(command, title, config, links)
        vary = {option: link for option, link in links.items() if any(other.get(option) != link for other in found)}
        told = [link for option, link in vary.items() if option != "logits" or len(vary) == 1]  # a student's cache follows from its subset
        of = " and ".join(str(_place(link, made)) for link in told)
        yield dataclasses.replace(step, name=_name(step, made), of=of)


def _combinations(command: str, config: Config, made: Sequence[Step]) -> Iterator[dict[str, Link]]:
    ways = {option: links for option in _open(command, config) if (links := _makers(command, option, made))}
    for one in product(*ways.values()):
        chosen = dict(zip(ways, one, strict=True))
        caches = _caches(config, chosen, made) if command == "distill" else []
        yield from ({**chosen, "logits": Link(n)} for n in caches)
        if not caches:
            yield chosen


def _open(command: str, config: Any) -> Iterator[str]:
    """The inputs of a command that its section does not give."""
    for option in ("data", "val", "subset", "teacher", "scores", "model", "artefact"):
        is_input = option in field_types(type(config)) and field_types(type(config))[option][0] is Path
        if not is_input or getattr(config, option) not in (None, UNSET):
            continue
        if (option == "scores" and not needs_scores(config)) or (command == "distill" and option == "teacher"):
            continue
        yield option


def needs_scores(config: Any) -> bool:
    """Whether a selection ranks by a recorded score."""
    return not (config.keys or config.column) and config.method not in (None, "random")


def _makers(command: str, option: str, made: Sequence[Step]) -> list[Link]:
    """What the recipe makes that could be this input."""
    if option in ("data", "val"):
        split = "val" if option == "val" else SPLIT_OF.get(command, "train")
        found = [Link(n, split) for n, step in enumerate(made) if split in step.splits]
        if len(found) > 1:
            raise UsageError(f'the recipe makes {len(found)} {split} splits: say which with {option} = "FOLDER"')
        return found
    kinds = {
        "teacher": ("teacher",),
        "scores": ("score",),
        "subset": ("select",),
        "model": ("teacher", "distill"),
        "artefact": ("teacher", "score", "select", "cache", "distill"),
    }[option]
    sets = [Link(n, split) for n, step in enumerate(made) for split in step.splits] if option == "artefact" else []
    return sets + [Link(n) for n, step in enumerate(made) if step.command in kinds]


def _caches(config: Any, links: Mapping[str, Link], made: Sequence[Step]) -> list[int]:
    """The recipe's caches for a student: those of its subset, else those of the data that the subset is chosen from."""
    if config.logits is not None or config.teacher is not None:
        return []
    wanted: Link | Path | None = links.get("subset", config.subset)
    while wanted is not None:
        found = [n for n, step in enumerate(made) if step.command == "cache" and _same(_input(step, "subset"), wanted, made)]
        if found or not isinstance(wanted, Link) or wanted.split is not None:
            return found
        wanted = _input(made[wanted.step], "data") or _workspace.DATA / "train"
    return []


def _input(step: Step, option: str) -> Link | Path | None:
    given: Path | None = getattr(step.config, option)
    return step.links.get(option, given)


def _same(one: Link | Path | None, other: Link | Path, made: Sequence[Step]) -> bool:
    return one is not None and _place(one, made) == _place(other, made)


def _place(one: Link | Path, made: Sequence[Step]) -> Path | None:
    if isinstance(one, Path):
        return Path(one)
    step = made[one.step]
    return step.splits[one.split] if one.split else step.folder


def _name(step: Step, made: Sequence[Step]) -> str:
    """The name of what a step makes, as its command derives it; none where it makes nothing."""
    config: Any = step.config
    if getattr(config, "name", None) or getattr(config, "out", None):
        return str(config.name if getattr(config, "name", None) else config.out.name)

    def of(option: str) -> str:
        found = _input(step, option)
        place = None if found is None else _place(found, made)
        return place.name if place else ""

    model = str(getattr(config, "model", "")).replace(":", "-").replace("/", "-")
    match step.command:
        case "teacher":
            return f"{model}-s{config.seed}"
        case "score":
            return of("teacher")
        case "select":
            how = "keys" if config.keys else config.column or config.method or "random"
            return f"{how}-{order.shortest(order.fraction(config.frac)) if config.frac else config.keys.name}-s{config.seed}"
        case "cache":
            return f"{of('subset')}--{of('teacher')}"
        case "distill":
            alpha = config.alpha if config.alpha != "auto" else "0" if config.logits == "none" else "*"
            return f"{of('subset')}--{model}-a{alpha}-s{config.seed}"
    return str(getattr(config, "split", ""))


def _check_folders(recipe: Recipe, made: Iterable[Step]) -> None:
    """Raise UsageError when two steps would write one folder."""
    seen: dict[Path, Step] = {}
    for step in made:
        for folder in step.splits.values() or ([step.folder] if step.folder else []):
            if folder in seen:
                one, two = seen[folder].title, step.title
                both = f"{one} and {two}" if one != two else f"{one}, which runs several times,"
                raise UsageError(f"{recipe.where}: {both} would write {folder} twice: give each a name of its own")
            seen[folder] = step
