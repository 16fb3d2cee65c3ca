"""From a settings dataclass to a click command: every field is an option, its help, choices and default taken from the field.

An option not given comes from the recipe that `--recipe` names, then from `kdprune.toml` in the workspace (a section per command), then
from the field's default. The command builds the settings with `Config.from_dict` and hands them to the stage; what the stage returns is
printed, as text or with `--json` as one object.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from kdprune_pipelines import _recipes
from kdprune_pipelines._console import Outcome, detail

from kdprune_data.config import Config, field_types
from kdprune_data.errors import KdpruneError, UsageError

SETTINGS = Path("kdprune.toml")
FOLDERS = {"artefact", "data", "live", "logits", "model", "out", "subset", "teacher", "test", "train", "val"}
OR_WORDS = {"logits", "scores", "source"}
"""For completion: the paths that are folders (others may be files), and the options that take a path or a word."""
METAVARS = {"frac": "FRACTION", "set": "NAME=VALUE", "where": "EXPRESSION"}
"""What some options take, where their name does not tell."""


def command(name: str, config: type[Config], run: Callable[[Any], Outcome], epilog: str, notes: str = "") -> click.Command:
    """The command of a stage. `epilog` holds examples, one a line; `notes`: lines that stand before them, as they are."""
    types = field_types(config)
    fields = [f for f in dataclasses.fields(config) if f.metadata]
    params = [_parameter(f, types[f.name]) for f in sorted(fields, key=lambda f: not f.metadata["argument"])]
    params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON object."))
    first = (run.__module__ and _first_paragraph(run)) or ""

    def callback(as_json: bool, **given: Any) -> None:
        outcome = _run(name, config, run, given)
        try:
            click.echo(json.dumps(outcome.facts, default=str) if as_json else outcome.text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise KdpruneError(f"cannot write the result to stdout ({error.strerror}); the work itself is done") from None
        if not outcome.ok:
            raise SystemExit(1)

    notes = f"\b\n{notes}\n\n" if notes else ""
    examples = notes + "\b\nExamples:\n" + "\n".join(f"  {line}" for line in epilog.splitlines())
    return click.Command(name, params=params, callback=callback, help=first, epilog=examples)


def _first_paragraph(run: Callable[[Any], Outcome]) -> str:
    """What the stage's module says of itself, as help text: its first paragraph, without the command's name."""
    import sys

    text = (sys.modules[run.__module__].__doc__ or "").strip().split("\n\n")[0]
    text = text.split(": ", 1)[-1].replace("\n", " ")
    return text[:1].upper() + text[1:]


def _parameter(field: dataclasses.Field[Any], kind: tuple[type, bool, bool]) -> click.Parameter:
    plain, _, many = kind
    about = field.metadata
    required = field.default is dataclasses.MISSING
    value: Any = click.Choice(about["choices"]) if about["choices"] else str if plain is Path else plain
    complete = _paths(field.name) if plain is Path or field.name in OR_WORDS else _methods if field.name == "method" else None
    if about["argument"]:
        return click.Argument([field.name], type=value, required=required, nargs=-1 if many else 1, shell_complete=complete)
    flag = Config.shown(field.name)
    names = [flag, field.name] + ([f"-{about['short']}"] if about["short"] else [])
    if plain is bool:
        return click.Option(names, is_flag=True, default=None, help=about["help"])
    shown = "" if field.default in (None, (), dataclasses.MISSING) else f"  [default: {field.default}]"
    metavar = None if about["choices"] else field.name.rstrip("_").upper() if plain in (str, Path) else "N"
    metavar = METAVARS.get(field.name, metavar)
    if about["values"]:
        at_once = len(about["values"].split())
        return click.Option(names, type=value, default=None, nargs=at_once, metavar=about["values"], help=about["help"] + shown)
    text = about["help"] + shown
    return click.Option(
        names, type=value, default=None, required=required, multiple=many, metavar=metavar, help=text, shell_complete=complete
    )


def _paths(name: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Tells the shell to complete names of folders, or of files too."""
    kind = "dir" if name in FOLDERS else "file"
    return lambda _, __, incomplete: [CompletionItem(incomplete, type=kind)]


def _methods(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of methods."""
    from kdprune_pipelines._methods import NAMES

    return [CompletionItem(name) for name in NAMES if name.startswith(incomplete)]


def _run(name: str, config: type[Config], run: Callable[[Any], Outcome], given: dict[str, Any]) -> Outcome:
    """Run a stage with what was given on the command line over what stands in files; messages say where an option stands."""
    on_the_line = {key: value for key, value in given.items() if value is not None and value != ()}
    workspace = _workspace_settings()
    _check_arguments(name, config, workspace)
    settled = _recipes.settle(name, config, on_the_line, workspace)
    detail(f"{name}: {', '.join(f'{key} = {value}' for key, value in settled.values.items()) or 'all defaults'}")
    try:
        return run(config.from_dict(settled.values))
    except UsageError as error:
        where = _recipes.origin_of(str(error), settled.origins)
        if not where:
            raise
        raise type(error)(f"{error}{where}") from error


def _check_arguments(name: str, config: type[Config], workspace: _recipes.Recipe | None) -> None:
    """Refuse in `kdprune.toml` what a command always takes from its line: it would be ignored there."""
    always = {f.name for f in dataclasses.fields(config) if f.metadata and f.metadata["argument"] and f.default is dataclasses.MISSING}
    if workspace is None:
        return
    for table in workspace.tables(name):
        if given := sorted(always & {key.replace("-", "_") for key in table}):
            raise UsageError(f"{workspace.where} [{name}] gives {given[0]!r}, which is given on the command line: take it out")


def _workspace_settings() -> _recipes.Recipe | None:
    """`kdprune.toml` of the current folder, if there is one. Raises UsageError for one that cannot be used."""
    if not os.path.lexists(SETTINGS):
        return None
    from kdprune_cli.main import COMMANDS

    found = _recipes.read(SETTINGS)
    _recipes.check_sections(found, COMMANDS)
    return found
