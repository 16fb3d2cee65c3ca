"""What one reading of a table tells: which classes there are and how large, and a sample of the scores in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import SourceError, UsageError
from kdprune_data.order import mix
from kdprune_data.selectors.parts import Piece, Rows, in_turn

SAMPLE = 1 << 20
"""At least so many rows are in a sample, or all; else one of 16."""
DENSE = 1 << 22
"""Class numbers below this are looked up in a table."""
MERGED = 1 << 22


@dataclass(frozen=True)
class Tally:
    """classes: int64 of shape (c,), ascending, or of shape (1,) where no class is asked for; sizes: int64 of shape (c,); of some rows the
    places of their classes among these, integers of shape (m,), and their scores, floating of shape (m,)."""

    classes: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: NDArray[np.integer]
    scores: NDArray[np.floating]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.sizes.sum())

    def places_of(self, piece: Piece) -> NDArray[np.integer]:
        """The place of each row's class among the classes: integers of shape (n,)."""
        return np.zeros(len(piece.scores), np.uint8) if piece.labels is None else self._find(piece.labels)

    @cached_property
    def _find(self) -> Callable[[NDArray[np.integer]], NDArray[np.integer]]:
        return _finder(self.classes)


def _finder(classes: NDArray[np.int64]) -> Callable[[NDArray[np.integer]], NDArray[np.integer]]:
    """What finds the places of labels among the classes: none where these are 0, 1, ..., a table, or where numbers are large a search."""
    top = int(classes[-1])
    if top == len(classes) - 1:
        return lambda labels: labels
    if top >= DENSE:
        return lambda labels: np.searchsorted(classes, labels)
    table = np.zeros(top + 1, np.int32)
    table[classes] = np.arange(len(classes))
    return lambda labels: table[labels]


@dataclass
class _Part:
    """What a part tells. bad: the place (piece, row) of the first score that is no finite number, and how many there are."""

    rows: int = 0
    unlabelled: int = 0
    bad: tuple[int, int] | None = None
    bads: int = 0
    classes: list[NDArray[np.int64]] = field(default_factory=list)
    sizes: list[NDArray[np.int64]] = field(default_factory=list)
    labels: list[NDArray[np.integer]] = field(default_factory=list)
    scores: list[NDArray[np.floating]] = field(default_factory=list)


def tally(rows: Rows, balance: str, jobs: int) -> Tally:
    """Count the classes of a table, with `jobs` threads.

    Raises UsageError where labels are needed and missing or there are no rows, SourceError where a score is no finite number.
    """
    whole, counted = _Part(), 0
    for part, one in enumerate(in_turn(lambda part: _part(rows, part, balance), rows.parts, jobs)):
        if one.bad is not None and whole.bad is None:
            whole.bad, name = one.bad, rows.name(part, *one.bad)
        whole.rows, whole.bads, whole.unlabelled = whole.rows + one.rows, whole.bads + one.bads, whole.unlabelled + one.unlabelled
        whole.classes += one.classes
        whole.sizes += one.sizes
        whole.labels += one.labels
        whole.scores += one.scores
        counted += sum(map(len, one.classes))
        if counted > MERGED:
            _merge(whole)
            counted = 0
    if whole.bad is not None:
        raise SourceError(
            f"{whole.bads:,} of {whole.rows:,} rows have no finite score (the first is {name!r}): every candidate needs a finite number"
        )
    if whole.unlabelled and balance != "none":
        raise UsageError(f"--balance {balance} needs labels and {whole.unlabelled:,} rows have none: use --balance none")
    if not whole.rows:
        raise UsageError("the table has no rows: nothing to keep")
    _merge(whole)
    classes, sizes = whole.classes[0], whole.sizes[0]
    scores = np.concatenate(whole.scores)
    places = _finder(classes)(np.concatenate(whole.labels)) if whole.labels else np.zeros(len(scores), np.uint8)
    return Tally(classes, sizes, places, scores)


def _part(rows: Rows, part: int, balance: str) -> _Part:
    found = _Part()
    step = 16
    while step > 1 and rows.about < step * SAMPLE:
        step //= 2
    for at, piece in enumerate(rows.read(part)):
        n = len(piece.scores)
        finite = np.isfinite(piece.scores)
        if not finite.all():
            found.bad = found.bad or (at, int(np.argmin(finite)))
            found.bads += n - int(np.count_nonzero(finite))
        # One row of each `step`, at a place that no period of the table's meets always.
        starts = np.arange(0, n, step, dtype=np.uint64)
        some = np.minimum(starts + (mix(starts + np.uint64(found.rows)) & np.uint64(step - 1)), max(n, 1) - 1).astype(np.int64)
        found.rows += n
        found.scores.append(piece.scores[some])
        if balance == "none" or piece.labels is None:
            found.unlabelled += n
            sizes, classes = np.array([n]), np.zeros(1, np.int64)
        else:
            found.unlabelled += int(np.count_nonzero(piece.labels < 0))
            found.labels.append(piece.labels[some])
            classes, sizes = _sizes(piece.labels)
        found.classes.append(classes)
        found.sizes.append(sizes)
    return found


def _sizes(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The classes that there are, and their sizes. Rows without a class are none of any."""
    if len(labels) and labels.min() >= 0 and labels.max() < DENSE:
        sizes = np.bincount(labels)
        classes = np.flatnonzero(sizes)
        return classes, sizes[classes]
    classes, sizes = np.unique(labels[labels >= 0].astype(np.int64), return_counts=True)
    return classes, sizes


def _merge(whole: _Part) -> None:
    """One list of classes from many."""
    classes, member = np.unique(np.concatenate(whole.classes), return_inverse=True)
    sizes = np.zeros(len(classes), np.int64)
    np.add.at(sizes, member, np.concatenate(whole.sizes))
    whole.classes, whole.sizes = [classes], [sizes]
