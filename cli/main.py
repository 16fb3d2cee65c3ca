"""`kdprune-data`: the group of commands, loaded one at a time so that `--help` is fast. How they end: `kdprune_cli.endings`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from kdprune_cli import endings
from kdprune_cli.endings import SIGNALS, Interrupted

from kdprune_data._version import __version__
from kdprune_data.errors import unknown

COMMANDS = {
    "import": "Any labelled images -> WebDataset shards and their index.",
    "index": "Adopt WebDataset shards where they lie.",
    "teacher": "Train a network on all the data, or adopt one.",
    "score": "One pass of the teacher: scores of every sample.",
    "select": "Keep a fraction: ids and pruned shards.",
    "pick": "Keep a fraction of a table of ids and scores: a list of ids.",
    "cache": "The teacher's logits for many views of each sample.",
    "distill": "Train a student from shards and cached soft labels.",
    "export": "Plain WebDataset shards with the soft labels inside.",
    "evaluate": "Accuracy of a teacher or student on the test set.",
    "info": "What is this folder, and where did it come from?",
    "verify": "Is this folder whole, and what it says it is?",
    "run": "The whole chain, or what is left of it, from one TOML file.",
    "demo": "The whole job on real digits, in a minute or two.",
    "completion": "Completion of commands and options for your shell.",
}


def module_of(name: str) -> str:
    """The module of a command."""
    return f"kdprune_cli.{name}_" if name == "import" else f"kdprune_cli.{name}"


class Lazy(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import `kdprune_cli.NAME`, and let it take what the group takes."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(module_of(name)).command
        if not any(parameter.name == "verbose" for parameter in command.params):
            command.params += _habits()
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named first. Raises UsageError for one that there is not, suggesting the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run what was asked for. Raises Interrupted on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table above: asking each command would import it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands from the table above, likewise; and the group's options."""
        commands = [CompletionItem(name, help=about) for name, about in COMMANDS.items() if name.startswith(incomplete)]
        return commands + click.Command.shell_complete(self, ctx, incomplete)


def _verbose(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Details from here to the end of the command, asked for before or after its name."""
    root = ctx.find_root()
    if wanted and not ctx.resilient_parsing and not root.meta.get("verbose"):
        from kdprune_pipelines._console import verbose

        root.meta["verbose"] = True
        root.with_resource(verbose())


def _habits() -> list[click.Parameter]:
    """What the group and every command take."""
    verbose = click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_verbose,
        help="Say more while working: files written and read, with the time, on stderr.",
    )
    return [verbose, click.Option(["--debug"], is_flag=True, expose_value=False, help="Show a traceback when something fails.")]


EPILOG = """\b
The whole job, in an empty folder:
  kdprune-data import photos/ --split train --holdout 0.1
  kdprune-data teacher
  kdprune-data score
  kdprune-data select --frac 0.5 --method random
  kdprune-data cache
  kdprune-data distill
"""


@click.command(
    cls=Lazy,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Train on a fraction of your images without losing accuracy: score, select, cache soft labels, distil. "
    "FRACTION is always what is KEPT.",
)
@click.version_option(__version__, prog_name="kdprune-data")
def group() -> None:
    """The group itself does nothing."""


group.params += _habits()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    SIGNALS.watch()
    if sys.stderr is None:  # closed by whoever started us
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    if hasattr(sys.stdout, "reconfigure"):  # names of files and classes that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    code = call(sys.argv[1:] if arguments is None else arguments)
    SIGNALS.done()
    sys.exit(code)


def call(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are said as `endings.report` does."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    SIGNALS.as_json = "--json" in options
    try:
        group.main(args=arguments or ["--help"], prog_name="kdprune-data", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        return endings.report(error, debug="--debug" in options, as_json=SIGNALS.as_json)
    return 0


if __name__ == "__main__":
    main()
