"""`kdprune-data cache`: see `kdprune_pipelines.cache`."""

from __future__ import annotations

from kdprune_cli.options import command as _command
from kdprune_pipelines.cache import CacheConfig, run

EXAMPLES = """\
kdprune-data cache
kdprune-data cache subsets/random-0.1-s0 --views 32
kdprune-data cache data/train --dtype float32"""

command = _command("cache", CacheConfig, run, EXAMPLES)
