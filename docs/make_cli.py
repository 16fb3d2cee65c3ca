"""Makes docs/cli.md from the commands themselves: `python docs/make_cli.py`. A test compares the page with what this would make."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from kdprune_cli.main import COMMANDS, group, module_of

from kdprune_data.config import Config

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# Commands

This page is made from the commands themselves, by `python docs/make_cli.py`; `--help` after a command says the same.

**In every command**

| option | |
|---|---|
| `--json` | one JSON object on stdout instead of text; when the command fails, `{"error": {"message", "exit_code", "type"}}` |
| `-v`, `--verbose` | say more while working: files written and read, with the time; before or after the command's name |
| `--debug` | a traceback when something fails; before or after the command's name |
| `-h`, `--help` | what the command does, its options, examples |

**Output.** Results go to stdout and nothing else does; what is said while working goes to stderr: with a progress bar on a terminal,
elsewhere with a line every ten seconds (`train: 12% (5,400 of 45,000 samples), 620 samples/s, 64 s left`). What was said is also kept in
the artefact's `log.txt`.

**Exit codes.** 0 done; 1 the work failed, or `verify` found a fault; 2 wrong usage: nothing was done; 130 interrupted by Ctrl-C; 143 by
SIGTERM. An error is one line on stderr. `type` in the JSON object is `UsageError` (with `ExistsError` among them, exit code 2),
`SourceError`, `FormatError`, `MismatchError`, `Interrupted`, or the name of an error of Python's.

**Again.** The same command continues what was interrupted, at whatever moment, or says "already done". With other settings it refuses,
unless `--overwrite` is given.

**Settings.** An option that is not given comes from the recipe that `--recipe` names, then from `kdprune.toml` in the current folder, where
there is one, then from its default. Both files have a section for each command, whose keys are the command's options, with `-` or `_`;
[recipes.md](recipes.md) tells more of them:

```toml
[teacher]
model = "resnet56"
epochs = 60

[select]
frac = 0.1
```
"""


def page() -> str:
    """The whole text of docs/cli.md."""
    contents = "\n".join(f"- [`{name}`](#{name}): {about[:1].lower() + about[1:].rstrip('.')}" for name, about in COMMANDS.items())
    return "\n".join([HEAD, contents, *(line for name in COMMANDS for line in section(name))]) + "\n"


def section(name: str) -> Iterator[str]:
    """One command: what it does, how it is called, examples, options."""
    module = importlib.import_module(module_of(name))
    command: Any = group.get_command(click.Context(group), name)
    fields = fields_of(vars(module))
    yield from ("", f"## {name}", "", " ".join(command.help.split()), "")
    arguments = [shown(parameter) for parameter in command.params if isinstance(parameter, click.Argument)]
    yield from (f"`{' '.join(['kdprune-data', name, *arguments, '[OPTIONS]'])}`", "", "```sh", *module.EXAMPLES.splitlines(), "```", "")
    if notes := vars(module).get("NOTES"):
        yield from ("```text", *notes.splitlines(), "```", "")
    yield from ("| option | default | |", "|---|---|---|")
    for parameter in command.params:
        if parameter.name in fields:
            field = fields[parameter.name]
            yield f"| {names(parameter)} | {default(field)} | {cell(meaning(field))} |"


def fields_of(module: dict[str, Any]) -> dict[str, dataclasses.Field[Any]]:
    """The settings of a command, by name."""
    found = next(v for v in module.values() if inspect.isclass(v) and issubclass(v, Config) and v is not Config)
    return {field.name: field for field in dataclasses.fields(found)}


def shown(argument: click.Argument) -> str:
    """`DATA`, in brackets where it need not be given, with dots where there may be several."""
    text = str(argument.name).upper() + ("..." if argument.nargs == -1 else "")
    return text if argument.required else f"[{text}]"


def names(parameter: click.Parameter) -> str:
    """The spellings of an option, with what it takes."""
    if isinstance(parameter, click.Argument):
        return f"`{shown(parameter)}`"
    spelled = ", ".join(f"`{name}`" for name in parameter.opts[:-1])
    value = "|".join(map(str, parameter.type.choices)) if isinstance(parameter.type, click.Choice) else parameter.metavar or ""
    last = f"{parameter.opts[-1]} {value}".strip()
    return cell(f"{spelled}, `{last}`" if spelled else f"`{last}`")


def default(field: dataclasses.Field[Any]) -> str:
    """The default, where there is one to tell."""
    plain = field.default in (None, (), "", dataclasses.MISSING) or field.default is False
    return "" if plain else f"`{field.default}`"


def meaning(field: dataclasses.Field[Any]) -> str:
    """The help text, with the limits of a number."""
    least, most = field.metadata["least"], field.metadata["most"]
    limits = [f"{words} {limit:,}" for words, limit in (("at least", least), ("at most", most)) if limit is not None]
    text = field.metadata["help"]
    return f"{text.removesuffix('.')} ({', '.join(limits)})." if limits else text


def cell(text: str) -> str:
    """Text as it may stand in a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
