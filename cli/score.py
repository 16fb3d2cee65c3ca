"""`kdprune-data score`: see `kdprune_pipelines.score`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.score import ScoreConfig, run

EXAMPLES = """\
kdprune-data score
kdprune-data score --teacher teachers/resnet20-s1 --embedding
kdprune-data score --also density --set density.neighbours=5 --name dense
kdprune-data score --epoch 3
kdprune-data score --proxies 2 --epochs 1
kdprune-data score --proxies 10 --epochs 20 --also grand_full --dry-run"""

command = _command("score", ScoreConfig, run, EXAMPLES)
