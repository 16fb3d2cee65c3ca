"""What a selection is asked for, and what it keeps: duplicates are left out, then a method chooses, or a list is taken as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

import numpy as np
from kdprune_pipelines import _methods as methods
from kdprune_pipelines._console import count, say
from kdprune_pipelines._filters import Filters, check_enough
from kdprune_pipelines._methods import RANKED, Choice
from kdprune_pipelines._numbers import Numbers
from kdprune_pipelines._picks import Picks, say_short
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.selectors import SELECTORS, Pool

UPWARDS = Context(prec=2, rounding=ROUND_CEILING)
"""A least value that is told is enough when it is given."""


def how_many(text: str, candidates: int, noun: str = "sample") -> tuple[int, Decimal]:
    """How many of the candidates a fraction keeps, and the fraction. Raises UsageError where it keeps none."""
    frac = order.fraction(text)
    keep = order.keep_count(frac, candidates)
    if keep < 1:
        needed = 1 / Decimal(2 * candidates)
        raise UsageError(f"--frac {frac} of {count(candidates, noun)} keeps none: at least {needed.normalize(UPWARDS):f} is needed")
    return keep, frac


@dataclass(frozen=True)
class Task:
    """What is asked for: keep so many of `everyone`, the rows that decode, a fraction `frac`; candidates: those that `--where` leaves; by a
    choice, or exactly the rows listed. settings: what of it enters the manifest."""

    parent: Dataset
    everyone: NDArray[np.int64]
    candidates: NDArray[np.int64]
    numbers: Numbers
    filters: Filters
    keep: int
    frac: Decimal
    settings: Mapping[str, Any]
    choice: Choice | None = None
    listed: NDArray[np.int64] | None = None

    @property
    def method(self) -> str:
        """As the manifest says it."""
        return "keys" if self.choice is None else self.choice.name

    @property
    def is_slow(self) -> bool:
        """Whether choosing compares samples with one another."""
        return self.choice is not None and (self.filters.dedup == "near" or self.choice.method.cost is not None)


def pick(task: Task) -> Picks:
    """What is kept. Raises UsageError where too few candidates are left, SourceError or MismatchError where one lacks a number."""
    everyone = task.everyone
    if task.choice is None:
        listed = np.zeros(0, np.int64) if task.listed is None else task.listed
        found = Picks(task.parent, everyone, np.searchsorted(everyone, listed), counts={"candidates": len(everyone)})
    else:
        found = _chosen(task, task.choice)
    say(f"keep {len(found.rows):,} of {count(len(everyone), 'sample')} by {task.method}")
    if task.choice is not None and task.choice.params.balance == "uniform":
        say_short(found)
    return found


def _chosen(task: Task, choice: Choice) -> Picks:
    """What a method keeps of the candidates, and how they became as many."""
    parent, params, filters = task.parent, choice.params, task.filters
    unique = filters.unique(parent, task.numbers, task.candidates, seed=params.seed, memory=params.memory)
    check_enough(task.keep, len(unique.rows), len(task.everyone), "--dedup")
    counts = {"candidates": len(task.everyone)}
    if filters.where:
        counts["after_where"] = len(task.candidates)
    if filters.dedup:
        counts["after_dedup"] = len(unique.rows)
    if filters.dedup == "exact":
        counts["label_conflicts"] = len(unique.conflicts)
    tell_cost(task, choice, unique.rows)
    pool = task.numbers.pool(choice.needs, unique.rows)
    picked = choice.method.select(pool, task.keep, params)
    if picked.left_out:
        counts["after_cut"] = len(unique.rows) - picked.left_out
        which = "hardest" if choice.method is SELECTORS[RANKED] else "of lowest aum"
        say(f"{choice.name}: {picked.left_out:,} of {count(len(unique.rows), 'candidate')}, those {which}, are left out first")
    scores = None if choice.ranks_by is None else np.asarray(pool.scores[choice.ranks_by], np.float32)
    return Picks(parent, unique.rows, picked.indices, scores, picked.order, picked.weights, counts)


def tell_cost(task: Task, choice: Choice, rows: NDArray[np.int64]) -> float:
    """Say what a method that compares samples is about to take; the seconds of that. Raises UsageError where its memory is too little."""
    if choice.method.cost is None:
        return 0.0
    pool = Pool(task.parent.uids[rows], task.parent.labels[rows])
    found = choice.cost(pool, task.keep, task.numbers.widths(choice.needs))
    say(methods.told(choice, pool, found))
    return methods.seconds(found.multiplications)
