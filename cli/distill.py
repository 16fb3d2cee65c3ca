"""`kdprune-data distill`: see `kdprune_pipelines.distill`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.distill import DistillConfig, run

EXAMPLES = """\
kdprune-data distill
kdprune-data distill subsets/random-0.1-s0 --model resnet8 --steps 5000 --alpha 0.9
kdprune-data distill --logits none
kdprune-data distill --loss dkd --set beta=4 --name dkd
kdprune-data distill --alpha 0 --label-smoothing 0.1 --name smoothed
kdprune-data distill --live teachers/resnet20-s0 --name live
kdprune-data distill --recipe few-steps --name few-steps --dry-run"""

NOTES = """\
Losses, each with its settings; all but mse at --temperature, and scaled by its square:
  kl                KL(teacher || student)
  dkd               its part of the label and its part of the other classes, apart
                    --set alpha=1.0 beta=8.0
  dist              what correlations of probabilities, over classes and over samples, lack to 1
                    --set beta=1.0 gamma=1.0
  mse               squared difference of logits, each row less its mean"""

command = _command("distill", DistillConfig, run, EXAMPLES, NOTES)
