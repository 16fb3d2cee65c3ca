"""`kdprune-data select`: see `kdprune_pipelines.select`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines._methods import table_of_methods
from kdprune_pipelines.select import SelectConfig, run

EXAMPLES = """\
kdprune-data select --frac 0.5 --method random
kdprune-data select --frac 0.1 --method el2n --keep easy
kdprune-data select --frac 0.1 --method el2n --skip-hardest 0.05 --name offset
kdprune-data select --frac 0.1 --method ccs --set bins=20 --set cut=0.2
kdprune-data select --frac 0.2 --method herding --where "label != 7 and el2n < 1.2"
kdprune-data select --frac 0.5 --dedup exact --name unique
kdprune-data select --frac 0.3 --scores theirs.parquet --column difficulty --hard high
kdprune-data select --keys ids.txt --ids-only"""
NOTES = table_of_methods()

command = _command("select", SelectConfig, run, EXAMPLES, NOTES)
