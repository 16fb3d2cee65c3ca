"""`kdprune-data evaluate`: see `kdprune_pipelines.evaluate`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.evaluate import EvaluateConfig, run

EXAMPLES = """\
kdprune-data evaluate teachers/resnet20-s0
kdprune-data evaluate students/NAME --data data/val --json"""

command = _command("evaluate", EvaluateConfig, run, EXAMPLES)
