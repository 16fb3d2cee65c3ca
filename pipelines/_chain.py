"""From the sections of a recipe to the steps of a chain, before anything runs. `docs/recipes.md`.

1. Each section becomes its command's configuration, so that whatever is wrong in it is said at once.
2. An input that a section does not give is what the recipe itself makes of that kind; where it makes several, the section becomes a step
   for each. What the recipe does not make is left to the command, which finds it by convention.
3. Two steps that would write one folder are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from kdprune_pipelines import _recipes, _workspace
from kdprune_pipelines._recipes import ORDER, Recipe
from kdprune_pipelines._steps import INPUTS, UNSET, Link, Step, fits, found_of, given, input_of, linked, name_of, place_of, same

from kdprune_data.config import Config, field_types
from kdprune_data.errors import UsageError

SPLIT_OF = {"evaluate": "test"}
"""Which split is a command's `data`, where it is not train."""
OF_A_CACHE = ("export", "distill")
"""Commands that read a subset and a logit cache of it."""
REQUIRED = ("model", "artefact")
"""Inputs that a command asks for and that a recipe may leave out: they are what the recipe makes."""


def steps_of(recipe: Recipe, configs: Mapping[str, type[Config]], code: Sequence[str]) -> list[Step]:
    """The whole recipe as steps, in the order of work. Raises UsageError for anything in it that cannot be."""
    made: list[Step] = []
    for command in ORDER:
        for title, table in zip(recipe.titles(command), recipe.tables(command), strict=True):
            config = configs[command]
            written = _recipes.checked(recipe.where, title, table, config)
            try:
                values = _recipes.settle(command, config, written).values
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
    for name in chain.from_iterable(_recipes.functions(values, config).values()):
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
        of = " and ".join(str(place_of(link, made)) for link in told)
        yield dataclasses.replace(step, name=name_of(step, made), of=of)


def _combinations(command: str, config: Config, made: Sequence[Step]) -> Iterator[dict[str, Link]]:
    paths = {option: path for option in INPUTS if (path := given(config, option))}
    named = {option: link for option, path in paths.items() if (link := linked(path, made))}
    asks = command == "verify" and getattr(config, "teacher", None) is not None
    ways = {option: links for option in _open(command, config) if (links := _makers(command, option, made))}
    if asks and "artefact" in ways:  # about soft labels
        ways["artefact"] = [link for link in ways["artefact"] if made[link.step].command == "cache"]
    for one in product(*ways.values()):
        chosen = named | dict(zip(ways, one, strict=True))
        caches = _caches(Step(command, "", config, chosen), made) if command in OF_A_CACHE else []
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
        if command == "verify" and option != "artefact":  # it asks a teacher only where its section names one
            continue
        yield option


def needs_scores(config: Any) -> bool:
    """Whether a selection reads a scores folder: its method does, or a filter. Raises UsageError for settings or filters that are none."""
    return bool(config.needs())


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
        "artefact": ("teacher", "score", "select", "cache", "export", "distill"),
    }[option]
    sets = [Link(n, split) for n, step in enumerate(made) for split in step.splits] if option == "artefact" else []
    return sets + [Link(n) for n, step in enumerate(made) if step.command in kinds]


def _caches(step: Step, made: Sequence[Step]) -> list[int]:
    """The recipe's caches for a student or an export: those of its subset, else those of the data that the subset is chosen from; of its
    teacher, where the section names one, cached or live."""
    config: Any = step.config
    if config.logits is not None:
        return []
    caches = [n for n, step in enumerate(made) if step.command == "cache"]
    for named in (getattr(config, "teacher", None), getattr(config, "live", None)):
        if named is not None:
            caches = [n for n in caches if same(found_of(made[n], "teacher"), named, made)]
    wanted = found_of(step, "subset")
    while True:
        found = [n for n in caches if same(found_of(made[n], "subset"), wanted, made)]
        if found or not isinstance(wanted, Link) or made[wanted.step].command != "select":
            return found
        wanted = input_of(made[wanted.step], "data") or _workspace.DATA / "train"


def _check_folders(recipe: Recipe, made: Sequence[Step]) -> None:
    """Raise UsageError when two steps would write one folder."""
    seen: list[tuple[Path, Step]] = []
    for step in made:
        for _, folder in step.folders:
            for other, first in seen:
                if fits(folder, other) or fits(other, folder):
                    raise UsageError(f"{recipe.where}: {_twice(first, step, folder)}")
            seen.append((folder, step))


def _twice(one: Step, two: Step, folder: Path) -> str:
    """What is wrong when two steps would write one folder, and what to do."""
    if one.title != two.title:
        return f"{one.title} and {two.title} would write {folder} twice: give each a name of its own"
    keys = [option for option, link in two.links.items() if one.links.get(option) != link]
    said = ", ".join(f"`{key}`" for key in keys)
    return f"{one.title}, which runs several times, would write {folder} twice: write one section for each, with {said} and `name`"
