"""Which samples to keep: one method a file, each a pure function `select(pool, keep, params) -> Picked`, found by name in `SELECTORS`.

A method that ranks returns the whole ranking and is nested: the subset at a smaller fraction is inside the subset at a larger one.
Numbers in, row numbers out; nothing here reads files or imports torch.
"""

from __future__ import annotations

from kdprune_data.errors import unknown
from kdprune_data.selectors import random, ranked
from kdprune_data.selectors.base import Params, Picked, Pool, Selector

__all__ = ["SELECTORS", "Params", "Picked", "Pool", "Selector", "select"]

SELECTORS: dict[str, Selector] = {"random": random.select, "score": ranked.select}


def select(method: str, pool: Pool, keep: int, params: Params) -> Picked:
    """Keep `keep` samples of the pool by a method. Raises UsageError for an unknown one, or when the pool holds fewer."""
    if method not in SELECTORS:
        raise unknown("method", method, SELECTORS)
    return SELECTORS[method](pool, keep, params)
