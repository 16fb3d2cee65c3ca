"""The methods of `select`: their names, what each needs and costs, and how one is chosen with its settings.

A method is an entry of `SELECTORS`, or a score, which the selector `score` ranks by.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from kdprune_pipelines._advice import score_command
from kdprune_pipelines._console import count, duration, megabytes

from kdprune_data.config import pairs
from kdprune_data.errors import UsageError, unknown
from kdprune_data.formats.scores import KINDS_OF_VECTORS, SCORES
from kdprune_data.selectors import SELECTORS, Cost, Method, Params, Pool, Size
from kdprune_data.selectors.base import SHARED
from kdprune_data.selectors.points import fits
from kdprune_data.selectors.quota import groups
from kdprune_data.selectors.ranked import RankedParams

RANKED = "score"
"""The selector behind every score: no method by this name."""
NAMES = [*(name for name in SELECTORS if name != RANKED), *SCORES]
MEMORY = 1_000_000_000


def check_name(name: str) -> None:
    """Raise UsageError for a name that is no method, suggesting the nearest."""
    if name not in NAMES:
        raise unknown("method", name, NAMES)


def check_column(name: str) -> None:
    """Raise UsageError for a column of another's file that would pass for something else: a method, a list, or vectors."""
    if (name in NAMES and name not in SCORES) or name in (*KINDS_OF_VECTORS, "keys"):
        raise UsageError(f"--column {name} has the name of something else that samples are chosen by, and is no score: rename the column")


def of_score(name: str) -> bool:
    """Whether a method is a score that ranks."""
    return name in SCORES


def compares(name: str) -> bool:
    """Whether a method compares samples, which takes time and memory of its own: what `--memory` bounds."""
    return name in NAMES and name in SELECTORS and SELECTORS[name].cost is not None


def table_of_methods() -> str:
    """For `--help`: every method with what it needs and which command provides that, a line or two each."""
    lines = ["Methods, each with what it needs:"]
    for name in NAMES:
        if name in SELECTORS:
            method = SELECTORS[name]
            lines += [f"  {name:<18}{method.about}", *_needed(method.needs(method.params())), *_settable(method.params())]
    lines += ["  and each score, of which --keep and --skip-hardest choose what is kept:"]
    for name, score in SCORES.items():
        lines.append(f"  {name:<18}{score.hard} is hard; {_provider((name,))}")
    return "\n".join(lines)


def _needed(needs: Sequence[str]) -> list[str]:
    return [f"  {'':<18}needs {', '.join(needs)}: {_provider(needs)}"] if needs else []


def _settable(params: Params) -> list[str]:
    """The settings with their defaults, as `--set` takes them."""
    shown = [f"{name}={'auto' if value is None else value}" for name, value in params.own().items() if name not in SHARED]
    return [f"  {'':<18}--set {' '.join(shown)}"] if shown else []


def _provider(needs: Sequence[str]) -> str:
    teacher = "teacher --record logits, " if "tdds" in needs else ""
    return teacher + score_command(needs).removeprefix("kdprune-data ")


@dataclass(frozen=True)
class Choice:
    """How to choose. name: of the method, as the manifest says it; needs: what it reads; settings: what of them enters the manifest."""

    name: str
    method: Method
    params: Params
    needs: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def ranks_by(self) -> str | None:
        """The score that `selection.parquet` tells of: the first that the method reads."""
        return next((name for name in self.needs if name not in KINDS_OF_VECTORS), None)

    def cost(self, pool: Pool, keep: int, widths: tuple[int, int]) -> Cost:
        """What choosing takes at most, nothing where it is a sort. Raises UsageError as `points.fits` does."""
        if self.method.cost is None:
            return Cost(0, 0)
        of = groups(pool, keep, self.params)
        size = Size(np.array([len(g.rows) for g in of], np.int64), np.array([g.keep for g in of], np.int64), *widths)
        return fits(self.name, size, self.params, self.method.cost)


def choose(name: str, given: Sequence[str], *, seed: int, balance: str, memory: int | None) -> Choice:
    """A method of `SELECTORS` with its settings, `name=value` each. Raises UsageError for what it has not."""
    method = SELECTORS[name]
    params = method.params.parse(name, pairs(given), seed=seed, balance=balance, memory=memory or MEMORY)
    score = params.own().get("score")
    if score is not None and score not in SCORES:
        raise UsageError(f"--set score={score}: {unknown('score', score, SCORES)}")
    needs = method.needs(params)
    own = {key: value for key, value in params.own().items() if key not in SHARED}
    return Choice(name, method, params, needs, {"settings": own} if own else {})


def rank(name: str, given: Sequence[str], params: RankedParams) -> Choice:
    """The method of a score, recorded or another's. Raises UsageError where settings are given: a score has none."""
    if given:
        raise UsageError(
            f"--set {given[0]}: {name} is a score, which has no settings here: leave it out (--keep and --skip-hardest choose)"
        )
    settings = {"keep": params.end} | ({"skip_hardest": params.skip_hardest} if params.skip_hardest else {})
    return Choice(name, SELECTORS[RANKED], params, (name,), settings)


def told(choice: Choice, pool: Pool, cost: Cost) -> str:
    """A line on what a method is about to take: `herding: 10 classes of up to 5,000 samples, 1.6 G multiplications, 3.0 MB, about 2 s`."""
    of = count(len(pool.uids), "sample")
    if choice.params.balance != "none":
        _, sizes = np.unique(pool.labels, return_counts=True)
        of = f"{count(len(sizes), 'class')} of up to {count(int(sizes.max()), 'sample')}"
    return (
        f"{choice.name}: {of}, {many(cost.multiplications)} multiplications, {megabytes(int(cost.bytes))}, about "
        f"{duration(seconds(cost.multiplications))}"
    )


def seconds(multiplications: float) -> float:
    """About how long multiplications take here, from a few milliseconds of them: products of a matrix and a vector."""
    rng = np.random.default_rng(0)
    matrix, vector = rng.random((4096, 64)), rng.random(64)
    matrix @ vector
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.005:
        matrix @ vector
        done += matrix.size
    return multiplications * (time.perf_counter() - began) / done


def many(n: float) -> str:
    """A large number for people: `1.6 G`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"
