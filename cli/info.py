"""`kdprune-data info`: see `kdprune_pipelines.info`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.info import InfoConfig, run

EXAMPLES = """\
kdprune-data info data/train
kdprune-data info scores/resnet20-s0
kdprune-data info students/NAME --json"""

command = _command("info", InfoConfig, run, EXAMPLES)
