"""`kdprune-data pick`: see `kdprune_pipelines.pick`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.pick import PickConfig, run

EXAMPLES = """\
kdprune-data pick theirs.parquet --frac 0.1
kdprune-data pick scores/NAME --frac 0.3 --column el2n --skip-hardest 0.05
kdprune-data pick theirs.parquet --frac 0.5 --column difficulty --hard high --balance none --out half.parquet"""

NOTES = """\
A table has these columns:
  id                texts or whole numbers; or key, uid, __key__
  label             class numbers; --balance none needs none
  NAME              numbers, where --column NAME ranks by them
  uid               uint64, if at all: our 64-bit names of the ids, which saves hashing them
  ok                bool, if at all: rows where it is not true are passed over"""

command = _command("pick", PickConfig, run, EXAMPLES, NOTES)
