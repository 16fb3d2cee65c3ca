"""What every method takes and gives, and what is known of it before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import Settings, option

BALANCES = ("class", "uniform", "none")
ENDS = ("hard", "easy", "middle")
EMBEDDING, LOGITS = "embedding", "logits"
"""What a method may need beside scores."""


@dataclass(frozen=True)
class Pool:
    """The candidates. All arrays have one row per candidate, in any order: no method's result depends on it.

    uids: uint64 of shape (n,), distinct; labels: int32 of shape (n,), -1 = none; scores: by name, floating of shape (n,); hard: of each
    score, which end is the hard one, `high` or `low`; embedding: floating of shape (n, d); logits: floating of shape (n, c).
    """

    uids: NDArray[np.uint64]
    labels: NDArray[np.int32]
    scores: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    hard: Mapping[str, str] = field(default_factory=dict)
    embedding: NDArray[np.floating] | None = None
    logits: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Params(Settings):
    """Settings that every method has; a method's own ones stand in a subclass, and are given with `--set name=value`."""

    seed: int = option(0, help="Seed of the random order and of ties.", least=0)
    balance: str = option("class", help="Keep class proportions, equal class shares, or neither.", choices=BALANCES)
    memory: int = option(1_000_000_000, help="Most bytes that a method's own arrays may take.", least=1)


SHARED = ("seed", "balance", "memory")
"""The settings that are options of their own."""


@dataclass(frozen=True)
class Picked:
    """indices: int64 of shape (keep,), ascending; order: int64 of shape (n,), the ranking, best first, where the method ranks all the
    candidates; weights: float32 of shape (keep,), for the indices, where it weighs: how much of the others each stands for; left_out: how
    many candidates a cut-off took away first."""

    indices: NDArray[np.int64]
    order: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Size:
    """How much there is to select from. groups: of each class (or of all at once), how many candidates and how many are kept, two int64 of
    shape (g,); width: numbers in an embedding; classes: numbers in a row of logits."""

    candidates: NDArray[np.int64]
    kept: NDArray[np.int64]
    width: int = 0
    classes: int = 0


@dataclass(frozen=True)
class Cost:
    """What a method takes at most: multiplications, and bytes of its own arrays (without the pool's)."""

    multiplications: float
    bytes: float


@dataclass(frozen=True)
class Method:
    """One method. select: (pool, keep, params) to Picked; about: a line for `--help`; params: its settings; needs: from its settings, the
    names of the scores it reads, and `embedding` or `logits`; cost: from the size and its settings, None where it is a sort; nested: a
    smaller fraction is kept inside a larger one."""

    select: Callable[[Pool, int, Any], Picked]
    about: str
    params: type[Params] = Params
    needs: Callable[[Any], tuple[str, ...]] = lambda _: ()
    cost: Callable[[Size, Any], Cost] | None = None
    nested: bool = True
