"""`kdprune-data distill`: see `kdprune_pipelines.distill`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.distill import DistillConfig, run

EXAMPLES = """\
kdprune-data distill
kdprune-data distill subsets/random-0.1-s0 --model resnet8 --steps 5000 --alpha 0.9
kdprune-data distill --logits none
kdprune-data distill --recipe few-steps --name few-steps --dry-run"""

command = _command("distill", DistillConfig, run, EXAMPLES)
