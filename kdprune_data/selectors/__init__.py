"""Which samples to keep: one method a file, each a pure function `select(pool, keep, params) -> Picked`, found by name in `SELECTORS`.

A method that ranks returns the whole ranking and is nested: the subset at a smaller fraction is inside the subset at a larger one.
Numbers in, row numbers out; nothing here reads files or imports torch.
"""

from __future__ import annotations

from kdprune_data.errors import unknown
from kdprune_data.selectors import (
    ccs,
    craig,
    d2,
    dual_beta,
    facility_location,
    gradmatch,
    herding,
    kcenter,
    mdslr,
    moderate,
    random,
    ranked,
)
from kdprune_data.selectors.base import Cost, Method, Params, Picked, Pool, Size

__all__ = ["SELECTORS", "Cost", "Method", "Params", "Picked", "Pool", "Size", "method", "select"]

SELECTORS: dict[str, Method] = {
    "random": random.METHOD,
    "score": ranked.METHOD,
    "ccs": ccs.METHOD,
    "moderate": moderate.METHOD,
    "mdslr": mdslr.METHOD,
    "d2": d2.METHOD,
    "dual_beta": dual_beta.METHOD,
    "herding": herding.METHOD,
    "kcenter": kcenter.METHOD,
    "craig": craig.METHOD,
    "facility_location": facility_location.METHOD,
    "gradmatch": gradmatch.METHOD,
}


def method(name: str) -> Method:
    """A method by name. Raises UsageError for an unknown one."""
    if name not in SELECTORS:
        raise unknown("method", name, SELECTORS)
    return SELECTORS[name]


def select(name: str, pool: Pool, keep: int, params: Params | None = None) -> Picked:
    """Keep `keep` samples of the pool by a method, with its default settings or those given.

    Raises UsageError for an unknown one, when the pool holds fewer, or lacks what the method needs.
    """
    found = method(name)
    return found.select(pool, keep, found.params() if params is None else params)
