"""`kdprune-data import`: see `kdprune_pipelines.import_`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.import_ import ImportConfig, run

EXAMPLES = """\
kdprune-data import photos/ --split train --holdout 0.1
kdprune-data import train.parquet --split train
kdprune-data import 'shards/*.tar' --shuffle on --dry-run
kdprune-data import digits --split test"""

command = _command("import", ImportConfig, run, EXAMPLES)
