"""`kdprune-data export`: see `kdprune_pipelines.export`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.export import ExportConfig, run

EXAMPLES = """\
kdprune-data export
kdprune-data export subsets/random-0.5-s0 --views 2 --name two
kdprune-data export --dry-run"""

command = _command("export", ExportConfig, run, EXAMPLES)
