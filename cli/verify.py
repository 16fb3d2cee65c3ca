"""`kdprune-data verify`: see `kdprune_pipelines.verify`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.verify import VerifyConfig, run

EXAMPLES = """\
kdprune-data verify data/train
kdprune-data verify subsets/random-0.5-s0
kdprune-data verify logits/random-0.5-s0--resnet20-s0 --teacher teachers/resnet20-s0"""

command = _command("verify", VerifyConfig, run, EXAMPLES)
