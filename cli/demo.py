"""`kdprune-data demo`: see `kdprune_pipelines.demo`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.demo import DemoConfig, run

EXAMPLES = """\
kdprune-data demo
kdprune-data demo --out elsewhere --seeds 5"""

command = _command("demo", DemoConfig, run, EXAMPLES)
