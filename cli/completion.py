"""`completion`: a script that teaches your shell to complete commands, options, choices and folders; its start-up file can read it."""

from __future__ import annotations

from dataclasses import dataclass

from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete
from kdprune_cli.options import command as _command
from kdprune_pipelines._console import Outcome

from kdprune_data.config import Config, option

EXAMPLES = """\
kdprune-data completion bash
kdprune-data completion zsh
kdprune-data completion fish"""
SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
VARIABLE = "_KDPRUNE_DATA_COMPLETE"
"""The environment variable with which the script asks."""


@dataclass(frozen=True)
class CompletionConfig(Config):
    """Settings of `completion`."""

    shell: str = option(help="bash, zsh or fish.", choices=tuple(SHELLS), argument=True)


def run(config: CompletionConfig) -> Outcome:
    """The script of a shell."""
    from kdprune_cli.main import group

    script = SHELLS[config.shell](group, {}, "kdprune-data", VARIABLE).source()
    return Outcome(None, {"shell": config.shell, "script": script}, script)


command = _command("completion", CompletionConfig, run, EXAMPLES)
