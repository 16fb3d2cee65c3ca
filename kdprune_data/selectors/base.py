"""What every method takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BALANCES = ("class", "uniform", "none")
ENDS = ("hard", "easy", "middle")


@dataclass(frozen=True)
class Pool:
    """The candidates. All arrays have one row per candidate, in any order: no method's result depends on it.

    uids: uint64 of shape (n,), distinct; labels: int32 of shape (n,), -1 = none; scores: floating, of shape (n,), finite; embedding:
    floating, of shape (n, d); logits: floating, of shape (n, c).
    """

    uids: NDArray[np.uint64]
    labels: NDArray[np.int32]
    scores: NDArray[np.floating] | None = None
    embedding: NDArray[np.floating] | None = None
    logits: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Params:
    """Settings shared by the methods. `end`: which end of the scores is kept; `hard_is_high`: which end is the hard one."""

    seed: int = 0
    balance: str = "class"
    end: str = "hard"
    hard_is_high: bool = True


@dataclass(frozen=True)
class Picked:
    """indices: int64 of shape (keep,), ascending; order: int64 of shape (n,), the ranking, best first, where the method ranks; weights:
    float32 of shape (keep,), where it weighs."""

    indices: NDArray[np.int64]
    order: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None


Selector = Callable[[Pool, int, Params], Picked]
