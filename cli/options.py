"""From a settings dataclass to a click command: every field is an option, its help, choices and default taken from the field.

An option not given comes from `kdprune.toml` in the workspace (a section per command), then from the field's default. The command builds
the settings with `Config.from_dict` and hands them to the stage; what the stage returns is printed, as text or with `--json` as one object.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from kdprune_pipelines._console import Outcome

from kdprune_data.config import Config, field_types
from kdprune_data.errors import UsageError, unknown

SETTINGS = Path("kdprune.toml")
CODE = ("model", "code")
"""Options that may name a function of the user's own to run: such a name is taken from the command line alone."""


def command(name: str, config: type[Config], run: Callable[[Any], Outcome], epilog: str) -> click.Command:
    """The command of a stage. `epilog` holds examples, one a line."""
    types = field_types(config)
    fields = [f for f in dataclasses.fields(config) if f.metadata]
    params = [_parameter(f, types[f.name]) for f in sorted(fields, key=lambda f: not f.metadata["argument"])]
    params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON object."))
    first = (run.__module__ and _first_paragraph(run)) or ""

    def callback(as_json: bool, **given: Any) -> None:
        outcome = run(config.from_dict(_settings(name, config, given)))
        click.echo(json.dumps(outcome.facts, ensure_ascii=False, default=str) if as_json else outcome.text)
        if not outcome.ok:
            raise SystemExit(1)

    examples = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in epilog.splitlines())
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
    if about["argument"]:
        return click.Argument([field.name], type=plain if plain is not Path else str, required=required, nargs=-1 if many else 1)
    flag = "--" + field.name.replace("_", "-")
    names = [flag, field.name] + ([f"-{about['short']}"] if about["short"] else [])
    if plain is bool:
        return click.Option(names, is_flag=True, default=None, help=about["help"])
    value: Any = click.Choice(about["choices"]) if about["choices"] else str if plain is Path else plain
    shown = "" if field.default in (None, (), dataclasses.MISSING) else f"  [default: {field.default}]"
    metavar = None if about["choices"] else field.name.upper() if plain in (str, Path) else "N"
    if field.name == "frac":
        metavar = "FRACTION"
    return click.Option(names, type=value, default=None, required=required, multiple=many, metavar=metavar, help=about["help"] + shown)


def _settings(name: str, config: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of one command: those given on the command line over those of `kdprune.toml`."""
    on_the_line = {key: value for key, value in given.items() if value is not None and value != ()}
    from_file = _from_file(name, config)
    for key in CODE:
        if key not in on_the_line and ":" in str(from_file.get(key, "")):
            raise UsageError(f"{SETTINGS} names the function {from_file[key]!r} to run: functions are run only when named with --{key}")
    return from_file | on_the_line


def _from_file(name: str, config: type[Config]) -> dict[str, Any]:
    if not SETTINGS.is_file():
        return {}
    try:
        sections = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{SETTINGS} cannot be read ({error}): mend it, or move it away") from None
    from kdprune_cli.main import COMMANDS

    for section, values in sections.items():
        if section not in COMMANDS:
            raise unknown(f"section of {SETTINGS}", section, COMMANDS)
        if not isinstance(values, dict):
            raise UsageError(f"{SETTINGS}: {section} = {values!r} stands outside a section: write it under [{section}]")
    found = {key.replace("-", "_"): value for key, value in sections.get(name, {}).items()}
    for key in found:
        if key not in field_types(config):
            raise unknown(f"option in [{name}] of {SETTINGS}", key, field_types(config))
    return found
