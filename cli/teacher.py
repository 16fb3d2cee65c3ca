"""`kdprune-data teacher`: see `kdprune_pipelines.teacher`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.teacher import TeacherConfig, run

EXAMPLES = """\
kdprune-data teacher
kdprune-data teacher --model resnet56 --epochs 60 --seed 1
kdprune-data teacher --recipe small --dry-run
kdprune-data teacher --model resnet50 --weights resnet50.pth --epochs 0 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"""

command = _command("teacher", TeacherConfig, run, EXAMPLES)
