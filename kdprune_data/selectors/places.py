"""The score at a place of each class, when the rows do not fit in memory: the classes' order statistics, exactly.

A sample brackets the place between two scores. One reading counts, for each class, the rows above, at, between and below the two, and
collects those between; there the place is found by partition. Where the sample was wrong, which the counts tell, another reading looks on
that side. Where more would be collected than fits, the classes take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data.selectors.classwise import Sorted, by_class, merged
from kdprune_data.selectors.parts import Rows, in_turn
from kdprune_data.selectors.tally import Tally

Bounds = tuple[NDArray[np.floating], NDArray[np.floating]]

COLLECTED = 1 << 25
"""Most rows that are collected at a time."""
CLASSES = 1 << 18
"""Most classes that are counted at a time."""
SURE = 5.0
"""Standard deviations of a sample's quantile that the bracket reaches to either side."""
LEAST = 64
"""A sample of fewer rows of a class brackets nothing."""


@dataclass(frozen=True)
class Places:
    """Of each class the score at the place asked for, floating of shape (c,), and how many rows are above it, and equal to it: int64 of
    shape (c,). Where no place was asked for: NaN and zeros."""

    scores: NDArray[np.floating]
    above: NDArray[np.int64]
    equal: NDArray[np.int64]


@dataclass
class _Search:
    """The brackets of all classes, and most rows between; `lower` and `upper` themselves are counted apart."""

    wanted: NDArray[np.int64]
    lower: NDArray[np.floating]
    upper: NDArray[np.floating]
    between: NDArray[np.int64]


def places(rows: Rows, tally: Tally, wanted: NDArray[np.int64], jobs: int) -> Places:
    """The score at the 0-based place `wanted`, from the highest score on, of each class: int64 of shape (c,), below 0 where none is asked
    for."""
    classes = len(tally.sizes)
    found = Places(np.full(classes, np.nan, tally.scores.dtype), np.zeros(classes, np.int64), np.zeros(classes, np.int64))
    left = np.flatnonzero(wanted >= 0)
    if not len(left):
        return found
    search = _brackets(tally, wanted)
    while len(left):
        for group in groups(left, search.between[left]):
            _look(rows, tally, group, search, found, jobs=jobs)
        left = left[np.isnan(found.scores[left])]
    return found


def groups(classes: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Classes, ascending, cut into groups of `COLLECTED` rows and `CLASSES` classes at most, but of one class at least."""
    at = 0
    ends = np.cumsum(rows)
    while at < len(classes):
        before = int(ends[at] - rows[at])
        by_rows = int(np.searchsorted(ends, before + COLLECTED, side="right"))
        by_number = int(np.searchsorted(classes, classes[at] + CLASSES))
        end = max(at + 1, min(by_rows, by_number))
        yield classes[at:end]
        at = end


def _brackets(tally: Tally, wanted: NDArray[np.int64]) -> _Search:
    """From the sample: where the place must be, all but certainly."""
    kind, classes = tally.scores.dtype, len(tally.sizes)
    search = _Search(wanted, np.full(classes, -np.inf, kind), np.full(classes, np.inf, kind), tally.sizes.copy())
    starts, grouped = merged([by_class(tally.places, tally.scores, classes)], classes, kind)
    sizes = np.diff(starts)
    for one in np.flatnonzero((wanted >= 0) & (sizes >= LEAST)).tolist():
        n = int(sizes[one])
        share = 1 - (int(wanted[one]) + 0.5) / int(tally.sizes[one])
        width = SURE * np.sqrt(n * share * (1 - share)) + 2
        low, high = int(share * n - width), int(share * n + width)
        ends_at = [at for at in (low, high) if 0 <= at < n]
        values = np.partition(grouped[starts[one] : starts[one + 1]], ends_at) if ends_at else grouped
        if 0 <= low < n:
            search.lower[one] = values[low]
        if 0 <= high < n:
            search.upper[one] = values[high]
        if search.lower[one] == search.upper[one]:  # of which rows are counted, not collected
            search.lower[one] = np.nextafter(search.upper[one], kind.type(-np.inf))
        search.between[one] = int(tally.sizes[one] * min(1.0, 2 * (width + 1) / n))
    return search


def _look(rows: Rows, tally: Tally, group: NDArray[np.int64], search: _Search, found: Places, *, jobs: int) -> None:
    """Find the places of some classes, or narrow their brackets to the side where they are."""
    first, count = int(group[0]), int(group[-1] - group[0]) + 1
    lower, upper = (np.full(count, np.inf, tally.scores.dtype) for _ in range(2))
    lower[group - first], upper[group - first] = search.lower[group], search.upper[group]
    counts = np.zeros((count, 5), np.int64)
    collected: list[Sorted[np.floating]] = []
    for part in in_turn(lambda part: _read(rows, part, tally, first, (lower, upper)), rows.parts, jobs):
        for counted, between in part:
            counts += counted
            collected.append(between)
    starts, scores = merged(collected, count, tally.scores.dtype)
    for one in group.tolist():
        at = one - first
        _settle(one, counts[at, ::-1].cumsum(), scores[starts[at] : starts[at + 1]], search, found)


def _settle(one: int, upto: NDArray[np.int64], between: NDArray[np.floating], search: _Search, found: Places) -> None:
    """One class, from how many rows are above its bracket, at its upper end or above, and so on down, and the scores between."""
    place, (above, at_upper, inside, at_lower, size) = int(search.wanted[one]), upto.tolist()
    if place < above:
        search.lower[one], search.upper[one], search.between[one] = search.upper[one], np.inf, above
    elif place < at_upper:
        found.scores[one], found.above[one], found.equal[one] = search.upper[one], above, at_upper - above
    elif place < inside:
        nth = inside - 1 - place
        value = np.partition(between, nth)[nth]
        found.scores[one] = value
        found.above[one] = at_upper + np.count_nonzero(between > value)
        found.equal[one] = np.count_nonzero(between == value)
    elif place < at_lower:
        found.scores[one], found.above[one], found.equal[one] = search.lower[one], inside, at_lower - inside
    else:
        search.lower[one], search.upper[one], search.between[one] = -np.inf, search.lower[one], size - at_lower


def _read(rows: Rows, part: int, tally: Tally, first: int, bounds: Bounds) -> list[tuple[NDArray[np.int64], Sorted[np.floating]]]:
    """Of each piece of a part: how many rows of each class are below, at the lower end of, between, at the upper end of and above its
    bounds, int64 of shape (count, 5); the scores of those between, by class."""
    lower, upper = bounds
    count = len(lower)
    found = []
    for piece in rows.read(part):
        number, scores = tally.places_of(piece), piece.scores
        if count < len(tally.sizes):
            here = np.flatnonzero((number >= first) & (number < first + count))
            number, scores = number[here] - first, scores[here]
        high, low = upper.take(number), lower.take(number)
        where = (scores > high).view(np.uint8) + (scores >= high).view(np.uint8)
        where += (scores > low).view(np.uint8)
        where += (scores >= low).view(np.uint8)
        cell = np.multiply(number, 5, dtype=np.int64)
        cell += where
        counts = np.bincount(cell, minlength=5 * count).reshape(count, 5)
        between = np.flatnonzero(where == 2)
        found.append((counts, by_class(number[between], scores[between], count)))
    return found
