"""The middle of each class by the teacher's loss: neither what it finds obvious nor what it gets wrong.

It is `--method loss --keep middle` under the name by which it is known: the class's budget, taken around its median place.
"""

from __future__ import annotations

from kdprune_data.selectors import ranked
from kdprune_data.selectors.base import Method, Params, Picked, Pool

SCORE = "loss"


def select(pool: Pool, keep: int, params: Params) -> Picked:
    """Keep the `keep` samples nearest to the median place by loss: of each class, or with balance `none` of all. Nested in `keep`.

    Raises as `ranked.select` does.
    """
    middle = ranked.RankedParams(score=SCORE, end="middle", seed=params.seed, balance=params.balance, memory=params.memory)
    return ranked.select(pool, keep, middle)


METHOD = Method(select, "the middle of each class by the teacher's loss", needs=lambda _: (SCORE,))
