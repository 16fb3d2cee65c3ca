"""`kdprune-data`: the group of commands, loaded one at a time so that `--help` is fast, and the only place where errors become exit codes.

0 done, 1 the work failed or a check found a fault, 2 wrong usage, 130 interrupted. A traceback only with `--debug`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from kdprune_data._version import __version__
from kdprune_data.errors import KdpruneError, first_line

COMMANDS = {
    "import": "Any labelled images -> WebDataset shards and their index.",
    "index": "Adopt WebDataset shards where they lie.",
    "teacher": "Train a network on all the data, or adopt one.",
    "score": "One pass of the teacher: scores of every sample.",
    "select": "Keep a fraction: ids and pruned shards.",
    "cache": "The teacher's logits for many views of each sample.",
    "distill": "Train a student from shards and cached soft labels.",
    "evaluate": "Accuracy of a teacher or student on the test set.",
    "info": "What is this folder, and where did it come from?",
    "verify": "Is this folder whole, and what it says it is?",
    "demo": "The whole job on real digits, in a minute or two.",
}


class Lazy(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import `kdprune_cli.NAME`."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"kdprune_cli.{name}_" if name == "import" else f"kdprune_cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table above: asking each command would import it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


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
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def group(debug: bool) -> None:
    """The group itself does nothing."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(call(sys.argv[1:] if arguments is None else arguments))


def call(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""
    debug = "--debug" in arguments
    try:
        group.main(args=arguments or ["--help"], prog_name="kdprune-data", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _usage(error)
    except (KeyboardInterrupt, click.Abort):
        print("\ninterrupted: run the same command again to continue", file=sys.stderr)
        return 130
    except KdpruneError as error:
        return _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains once more while it ends
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}: check the disk and its permissions, then run the same command again", 1, debug)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:  # a fault of ours, said as such
        if debug:
            raise
        name = type(error).__name__
        return _fail(f"unexpected {name}: {first_line(error)}; run again with --debug (kdprune-data --debug ...) and report it", 1, debug)
    return 0


def _usage(error: click.ClickException) -> int:
    context: Any = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    message = " ".join(error.format_message().split())
    return _fail(message + hint, error.exit_code, debug=False)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
