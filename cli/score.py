"""`kdprune-data score`: see `kdprune_pipelines.score`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.score import ScoreConfig, run

EXAMPLES = """\
kdprune-data score
kdprune-data score --teacher teachers/resnet20-s1 --embedding"""

command = _command("score", ScoreConfig, run, EXAMPLES)
