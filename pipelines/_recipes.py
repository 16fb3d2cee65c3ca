"""TOML files that hold options: a section per command, whose keys are that command's options. `docs/recipes.md`.

`kdprune.toml` in the workspace is one, a recipe is another: a file, or one of those that come with the package, by its name. Every value is
checked where it stands, so that a message names the file and the section. `settle` puts the layers of options over each other.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from kdprune_pipelines._console import detail

from kdprune_data.config import Config, field_types
from kdprune_data.errors import UsageError, first_line, unknown

C = TypeVar("C", bound=Config)
SUFFIX = ".toml"
ORDER = ("import", "index", "teacher", "score", "select", "cache", "export", "distill", "evaluate", "verify")
"""The commands that a recipe may hold a section for, in the order of work."""
WAYS = {"select": ("method", "column"), "distill": ("loss",)}
OF_WAY = {"select": ("set", "keep", "skip_hardest", "hard", "memory"), "distill": ("set",)}
"""Options of a command that name a method (or a loss), and those that belong to the one that is named."""
CODE = ("model", "code")
"""Options that may name a function of the user's own to run: such a name is taken from the command line alone."""


@dataclass(frozen=True)
class Recipe:
    """A TOML file that was read. `where`: as messages name it; `name`: of the packaged recipe, or the file's without `.toml`."""

    where: str
    name: str
    text: str
    sections: Mapping[str, Any]

    def tables(self, command: str) -> list[Mapping[str, Any]]:
        """A command's sections as they stand: none, one, or several where it is an array of tables."""
        found = self.sections.get(command, [])
        return list(found) if isinstance(found, list) else [found]

    def titles(self, command: str) -> list[str]:
        """How messages name these sections: `[select]`, or `[[select]] 2`, counted from 1."""
        several = isinstance(self.sections.get(command), list)
        return [f"[[{command}]] {n}" if several else f"[{command}]" for n in range(1, len(self.tables(command)) + 1)]


def read(path: Path) -> Recipe:
    """Read a TOML file. Raises UsageError when it cannot be read or is not TOML."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, where a TOML file is expected: move it away")
    try:
        text = path.read_bytes().decode()
        return Recipe(str(path), path.stem, text, tomllib.loads(text.removeprefix("\ufeff")))  # some editors mark UTF-8 so
    except OSError as error:
        if not path.is_symlink() and not path.exists():
            raise UsageError(f"{path} does not exist: give a TOML file, or the name of a recipe ({', '.join(names())})") from None
        raise UsageError(f"{path} cannot be read ({error.strerror}): mend it, or move it away") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}): mend it, or move it away") from None


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(found.name.removesuffix(SUFFIX) for found in _folder().iterdir() if found.name.endswith(SUFFIX))


def find(name: str) -> Recipe:
    """A recipe by the name of a packaged one, or by its file (a path that ends in `.toml`, or with a slash). Raises UsageError."""
    if not name.isprintable():
        raise UsageError(f"recipe {name!r} has a name that cannot be written down: rename the file")
    if "/" in name or name.endswith(SUFFIX):
        recipe = read(Path(name))
    elif name in names():
        text = (_folder() / f"{name}{SUFFIX}").read_text(encoding="utf-8")
        recipe = Recipe(f"recipe {name!r}", name, text, tomllib.loads(text))
    else:
        raise UsageError(f"{unknown('recipe', name, names())}; a file of your own ends in {SUFFIX}")
    check_sections(recipe, ORDER)
    return recipe


def _folder() -> Any:
    return resources.files("kdprune_pipelines") / "recipes"


def check_sections(recipe: Recipe, known: Collection[str]) -> None:
    """Raise UsageError for a section of no command, or for what stands outside a section."""
    for section, values in recipe.sections.items():
        if section not in known and not isinstance(values, dict | list):
            raise UsageError(f"{recipe.where}: {section} = {_short(values)} stands outside a section: write it under its command's")
        if section not in known:
            raise unknown(f"section of {recipe.where}", section, known)
        if not all(isinstance(one, dict) for one in recipe.tables(section)) or values == []:
            raise UsageError(f"{recipe.where}: {section} = {_short(values)} stands outside a section: write it under [{section}]")


def options(recipe: Recipe, command: str, config: type[Config]) -> dict[str, Any]:
    """The options in a command's only section, checked; none where it has no section. Raises UsageError when it has several."""
    tables = recipe.tables(command)
    if len(tables) > 1:
        raise UsageError(f"{recipe.where} has {len(tables)} sections [[{command}]], and options are taken from one: leave one")
    return checked(recipe.where, recipe.titles(command)[0], tables[0], config) if tables else {}


def checked(where: str, title: str, table: Mapping[str, Any], config: type[Config]) -> dict[str, Any]:
    """One section's options as a command takes them. Raises UsageError, naming file and section."""
    found: dict[str, Any] = {}
    for written, value in table.items():
        key = config.field_of(written.replace("-", "_"), f"option in {title} of {where}")
        if key in found:
            raise UsageError(f"{where} {title} gives {key!r} twice, with a dash and without: leave one")
        found[key] = value
    try:
        if isinstance(found.get("set"), dict):
            found["set"] = list(_pairs(found["set"]))
        return config.checked(found)
    except UsageError as error:
        raise UsageError(f"{where} {title}: {error}") from None


def _pairs(table: Mapping[str, Any], of: str = "") -> Iterator[str]:
    """A table of settings as the `name=value` texts that it stands for: `{ density = { clusters = 9 } }` is `density.clusters=9`."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{of}{key}.")
        elif isinstance(value, str | int | float):
            yield f"{of}{key}={str(value).lower() if isinstance(value, bool) else value}"
        else:
            raise UsageError(f"set: {of}{key} is {_short(value)}: expected a text, a number, true or false")


@dataclass(frozen=True)
class Settled:
    """Options after all layers, and where each that was given in a file stands, for messages."""

    values: dict[str, Any]
    origins: dict[str, str]


def settle(command: str, config: type[Config], given: Mapping[str, Any], file: Recipe | None = None) -> Settled:
    """The options of one command, lowest first: the recipe that `file` (kdprune.toml) names, `file` itself, the recipe that is given, what
    is given (on the command line). A layer that gives `epochs` and no `steps` ends the `steps` of those below it, which would outdo them;
    one that gives `select` another method, or `distill` another loss, ends what goes with that of those below. `scores` of a file that are
    not read are left out. Defaults are left to the caller; `recipe` itself is none of the result.

    Raises UsageError for what cannot be, and for a function to run that only a file names.
    """
    below = {} if file is None else options(file, command, config)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, layer in (
        *_named(below, command, config),
        (f"{'' if file is None else file.where} [{command}]", below),
        *_named(given, command, config),
        ("", given),
    ):
        if "epochs" in layer and "steps" not in layer:
            values.pop("steps", None)
        for key in _ended(command, values, layer):
            detail(f"{key} = {values.pop(key)} of {origins[key]} goes with another {WAYS[command][0]}: left out")
        values |= layer
        origins |= dict.fromkeys(layer, where)
    settled = Settled(values, {key: where for key, where in origins.items() if key in values and key not in given})
    if "scores" in settled.origins and _reads_none(config, values):
        detail(f"scores = {values.pop('scores')} of {settled.origins.pop('scores')} is not read: left out")
    if command in ORDER:
        values.pop("recipe", None)
    _refuse_functions(settled, config)
    return settled


def _ended(command: str, below: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    """What of a command's options goes with the method (or loss) that they name, where a layer above names another."""
    ways = WAYS.get(command, ())
    named, now = ({key: of[key] for key in ways if key in of} for of in (below, layer))
    if not named or not now or now.items() <= named.items():
        return []
    return [key for key in (*ways, *OF_WAY[command], *(["scores"] if "column" in below else [])) if key in below]


def _reads_none(config: type[Config], values: Mapping[str, Any]) -> bool:
    """Whether a selection reads no scores; where its options are wrong, that is said when they are used."""
    try:
        made: Any = config.from_dict(values)
        return hasattr(made, "needs") and made.column is None and not made.needs()
    except UsageError:
        return False


def _named(values: Mapping[str, Any], command: str, config: type[Config]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The layer of the recipe that some options name, if they name one."""
    name = values.get("recipe") if command in ORDER else None
    if name is None:
        return
    recipe = find(str(name))
    found = options(recipe, command, config)
    if not recipe.tables(command):
        raise UsageError(f"{recipe.where} has no section [{command}]: it has {', '.join(f'[{s}]' for s in recipe.sections) or 'none'}")
    if "recipe" in found:
        raise UsageError(f"{recipe.where} [{command}] names another recipe ({found['recipe']!r}): write its options out")
    yield f"{recipe.where} [{command}]", found


def functions(values: Mapping[str, Any], config: type[Config]) -> dict[str, list[str]]:
    """What some options name as functions of the user's to run, by key."""
    plain = {key: kind[0] for key, kind in field_types(config).items()}
    given = {key: values[key] for key in CODE if plain.get(key) is str and key in values}
    named = {key: [str(one) for one in (value if isinstance(value, list | tuple) else [value])] for key, value in given.items()}
    return {key: names for key, each in named.items() if (names := [one for one in each if ":" in one])}


def _refuse_functions(settled: Settled, config: type[Config]) -> None:
    for key, names in functions(settled.values, config).items():
        if key in settled.origins:
            raise UsageError(
                f"{settled.origins[key]} names the function {names[0]!r} to run: functions are run only when named with --{key}"
            )


def applied(command: str, config: C) -> C:
    """A configuration made in Python whose `recipe` is set: the recipe's options for every field that has its default.

    Raises UsageError as `settle` does.
    """
    name = getattr(config, "recipe", None)
    if name is None:
        return config
    fields = {field.name: field for field in dataclasses.fields(config)}
    own = {key: getattr(config, key) for key, field in fields.items() if getattr(config, key) != field.default}
    return type(config)(**settle(command, type(config), own).values)


def origin_of(message: str, origins: Mapping[str, str]) -> str:
    """What to add to a message that speaks of options which were not given on the command line: where they stand."""
    spoken = {key: where for key, where in origins.items() if re.search(rf"{Config.shown(key)}(?![\w-])", message)}
    found = "; ".join(f"{Config.shown(key)} stands in {where}" for key, where in spoken.items())
    return f" ({found})" if found else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
