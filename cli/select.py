"""`kdprune-data select`: see `kdprune_pipelines.select`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.select import SelectConfig, run

EXAMPLES = """\
kdprune-data select --frac 0.5 --method random
kdprune-data select --frac 0.1 --method el2n --keep easy
kdprune-data select --frac 0.3 --scores theirs.parquet --column difficulty --hard high
kdprune-data select --keys ids.txt --ids-only"""

command = _command("select", SelectConfig, run, EXAMPLES)
