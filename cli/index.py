"""`kdprune-data index`: see `kdprune_pipelines.index`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.index import IndexConfig, run

EXAMPLES = """\
kdprune-data index shards/*.tar --split train
kdprune-data index 'shards/*.tar' --split test --no-digests
kdprune-data index /data/set/*.tar --out data/train --classes names.txt"""

command = _command("index", IndexConfig, run, EXAMPLES)
