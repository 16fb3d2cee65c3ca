"""`kdprune-data run`: see `kdprune_pipelines.run`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.run import RunConfig, run

EXAMPLES = """\
kdprune-data run --list
kdprune-data run small --show
kdprune-data run recipe.toml --dry-run
kdprune-data run recipe.toml"""

command = _command("run", RunConfig, run, EXAMPLES)
