"""`--help`: complete, true, and so light that it answers at once."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from kdprune_cli.main import COMMANDS, call, group, module_of

from kdprune_data import __version__
from kdprune_data.config import Config

EVERYWHERE = {"as_json", "verbose", "debug"}
"""Options that every command has, and its settings have not."""
HEAVY = ("torch", "torchvision", "sklearn", "datasets", "pandas")


def command(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def config_of(name: str) -> type[Config]:
    """The settings of a command: of its stage, or, where it is none, in its own file."""
    for module in (module_of(name).replace("kdprune_cli", "kdprune_pipelines"), module_of(name)):
        with contextlib.suppress(ModuleNotFoundError):
            found = vars(importlib.import_module(module))
            return next(v for v in found.values() if isinstance(v, type) and v.__module__ == module and issubclass(v, Config))
    raise AssertionError(name)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert call(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_the_group_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    text = shown(capsys, *arguments)
    for name, about in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", text, re.MULTILINE), name


def test_every_file_is_a_command_and_every_command_a_file() -> None:
    folder = Path(importlib.import_module("kdprune_cli").__path__[0])
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "main", "options", "endings"}
    assert {name.removesuffix("_") for name in files} == set(COMMANDS) == set(group.list_commands(click.Context(group)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = shown(capsys, name, "--help")
    assert command(name).help
    fields = {f.name: f for f in dataclasses.fields(config_of(name)) if f.metadata}
    for parameter in command(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in text
            assert re.sub(r"\s+", "", parameter.help.split("  [")[0]) in re.sub(r"\s+", "", text)
    assert {p.name for p in command(name).params} - EVERYWHERE == set(fields)
    assert "Traceback" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_shown_and_are_the_ones_used(name: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(config_of(name)) if f.metadata}
    for parameter in command(name).params:
        if isinstance(parameter, click.Option) and parameter.name in fields:
            default = fields[parameter.name].default
            plain = default in (None, ()) or default is False or default is dataclasses.MISSING
            assert plain == ("[default: " not in (parameter.help or "")), parameter.name
            assert plain or f"[default: {default}]" in (parameter.help or "")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_use_what_there_is(name: str) -> None:
    """Every line of the examples parses, up to files that are not here."""
    lines = [line.strip() for line in (command(name).epilog or "").splitlines() if line.strip().startswith("kdprune-data ")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["kdprune-data", name]
        command(name).make_context(name, words[2:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "--version").strip().endswith(__version__)


def test_help_loads_nothing_heavy() -> None:
    """In a process of its own: what this one has loaded does not count."""
    code = f"""
import sys
from kdprune_cli.main import COMMANDS, call
for line in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    assert call(line) == 0
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (line, heavy)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
