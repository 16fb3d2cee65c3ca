"""Selection by a score from rows that do not fit in memory: exactly what `ranked.select` keeps of them, with their order hashes asked for
only where scores are equal at the edge of what is kept.

1. `tally.tally` reads the table once: the sizes of the classes, from which alone follows how many of each are kept (`shares.shares`).
2. `edges` finds, of each class, the scores between which it is kept (`places.places`).
3. `settle` reads the order hashes of the rows at these very scores, where not all of them are kept.
4. `Kept.mask` tells of any piece which of its rows are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.selectors.classwise import Sorted, by_class, merged
from kdprune_data.selectors.parts import Piece, Rows, in_turn
from kdprune_data.selectors.places import groups, places
from kdprune_data.selectors.ranked import RankedParams
from kdprune_data.selectors.shares import shares
from kdprune_data.selectors.tally import Tally

Hashes = NDArray[np.uint64]
Scores = NDArray[np.floating]


@dataclass(frozen=True)
class Edge:
    """One end of what is kept of each class: a score, floating of shape (c,), NaN where there is no end; and of the rows that have it, in
    ascending order of their hashes, those from `start` to before `stop` are kept, of `equal` in all: int64 of shape (c,) each."""

    scores: Scores
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    equal: NDArray[np.int64]

    @property
    def is_open(self) -> NDArray[np.bool_]:
        """Whether some of the rows are kept, and not all: bool of shape (c,)."""
        return ~np.isnan(self.scores) & (self.stop > self.start) & (self.stop - self.start < self.equal)


@dataclass(frozen=True)
class Edges:
    """What is kept of each class: the scores between the two ends, and of the ends what they say. count: how many are kept, int64 of shape
    (c,). odd: where of two rows, the last at the upper end and the last at the lower one, that with the lower hash is kept, bool of shape
    (c,)."""

    upper: Edge
    lower: Edge
    count: NDArray[np.int64]
    odd: NDArray[np.bool_]

    @property
    def hashed(self) -> NDArray[np.int64]:
        """How many order hashes are asked for, of each class: int64 of shape (c,)."""
        same = self.upper.scores == self.lower.scores
        of_upper = np.where((self.upper.is_open | self.odd) & ~same, self.upper.equal, 0)
        return of_upper + np.where(self.lower.is_open | self.odd, self.lower.equal, 0)


@dataclass(frozen=True)
class Ties:
    """Rows of equal scores, of which some are kept. upper, lower: their scores, floating of shape (c,), NaN where there are none; kept: of
    each piece of a part, for its rows that have one of these scores, bool of shape (m,)."""

    upper: Scores
    lower: Scores
    kept: Mapping[tuple[int, int], NDArray[np.bool_]] = field(repr=False)

    def find(self, number: NDArray[np.integer], scores: Scores) -> NDArray[np.int64]:
        """The rows of a piece that have one of these scores, ascending."""
        tied = scores == self.lower[number]
        if not np.isnan(self.upper).all():
            tied |= scores == self.upper[number]
        return np.flatnonzero(tied)


@dataclass(frozen=True)
class Kept:
    """Which rows are kept: those with scores above `lower` and below `upper`, floating of shape (c,), and of the tied ones some."""

    tally: Tally
    lower: Scores
    upper: Scores
    ties: list[Ties]

    def mask(self, part: int, at: int, piece: Piece) -> NDArray[np.bool_]:
        """Which rows of a piece, the one at place `at` of a part, are kept: bool of shape (n,)."""
        number = self.tally.places_of(piece)
        kept: NDArray[np.bool_] = piece.scores > self.lower[number]
        if not np.isposinf(self.upper).all():
            kept &= piece.scores < self.upper[number]
        for ties in self.ties:
            kept[ties.find(number, piece.scores)] = ties.kept[part, at]
        return kept


def edges(rows: Rows, tally: Tally, keep: int, params: RankedParams, jobs: int) -> Edges:
    """What is kept of each class when `keep` rows are, as `ranked.select` does with these settings (but for `score`: rows have one).

    Raises UsageError where there are fewer rows.
    """
    total = tally.rows
    if not 1 <= keep <= total:
        raise UsageError(f"cannot keep {keep:,} of {total:,} candidates: choose a fraction that keeps between 1 and {total:,}")
    skipped = order.keep_count(order.fraction(params.skip_hardest), total) if params.skip_hardest else 0
    if keep > total - skipped:
        raise UsageError(
            f"cannot keep {keep:,}: {skipped:,} of {total:,} candidates are left out first, so {total - skipped:,} are left; leave fewer "
            "out, or keep fewer"
        )
    skip = shares(tally.sizes, skipped, "none" if params.balance == "none" else "class")
    count = shares(tally.sizes - skip, keep, params.balance)
    return _easy(rows, tally, skip, count, jobs=jobs) if params.end == "easy" else _hard(rows, tally, skip, count, params.end, jobs=jobs)


def _easy(rows: Rows, tally: Tally, skip: NDArray[np.int64], count: NDArray[np.int64], *, jobs: int) -> Edges:
    """The lowest `count`, of those that the highest `skip` leave; of each class."""
    end = places(rows, tally, np.where(count > 0, tally.sizes - count, -1), jobs)
    first = np.maximum(skip - end.above, 0)  # of those left out some may have this very score
    needed = count - (tally.sizes - end.above - end.equal)
    nowhere = Edge(np.full(len(count), np.nan, tally.scores.dtype), first, first, first)
    return Edges(Edge(end.scores, first, first + needed, end.equal), nowhere, count, np.zeros(len(count), bool))


def _hard(rows: Rows, tally: Tally, skip: NDArray[np.int64], count: NDArray[np.int64], end: str, *, jobs: int) -> Edges:
    """The highest `count`, or those around the middle, of those that the highest `skip` leave; of each class."""
    spare = tally.sizes - skip - count
    start = skip + (spare // 2 if end == "middle" else 0)
    odd = (spare % 2 == 1) & (count > 0) & (end == "middle")
    high = places(rows, tally, np.where((count > 0) & ((start > 0) | odd), start - 1 + odd, -1), jobs)
    low = places(rows, tally, np.where(count > 0, start + count - 1 + odd, -1), jobs)
    first, last = start - high.above, start + count - low.above
    same = high.scores == low.scores  # then the lower edge tells of both
    upper = Edge(high.scores, np.where(same, 0, first), np.where(same, 0, high.equal), high.equal)
    return Edges(upper, Edge(low.scores, np.where(same, first, 0), last, low.equal), count, odd)


def settle(rows: Rows, tally: Tally, found: Edges, jobs: int) -> Kept:
    """Which of the rows at the edges are kept."""
    kind = tally.scores.dtype.type
    lower, upper = found.lower.scores.copy(), found.upper.scores.copy()
    whole = found.lower.stop - found.lower.start == found.lower.equal
    lower[whole] = np.nextafter(lower[whole], kind(-np.inf))
    whole = found.upper.stop - found.upper.start == found.upper.equal
    upper[whole & ~found.odd] = np.nextafter(upper[whole & ~found.odd], kind(np.inf))
    lower[np.isnan(lower)] = -np.inf
    upper[np.isnan(upper)] = np.inf
    lower[found.count == 0] = np.inf
    hashed = found.hashed
    asked = np.flatnonzero(hashed)
    ties = [_tied(rows, tally, group, found, jobs=jobs) for group in groups(asked, hashed[asked])]
    return Kept(tally, lower, upper, ties)


def _tied(rows: Rows, tally: Tally, group: NDArray[np.int64], found: Edges, *, jobs: int) -> Ties:
    """The rows at the edges of some classes."""
    upper, lower = (np.full(len(tally.sizes), np.nan, tally.scores.dtype) for _ in range(2))
    same = found.upper.scores == found.lower.scores
    for scores, edge, others in ((upper, found.upper, ~same), (lower, found.lower, np.ones(len(same), bool))):
        some = group[(edge.is_open | found.odd)[group] & others[group]]
        scores[some] = edge.scores[some]
    ties = Ties(upper, lower, {})
    first, count = int(group[0]), int(group[-1] - group[0]) + 1
    read: dict[tuple[int, int], tuple[NDArray[np.integer], Hashes]] = {}
    pieces: list[Sorted[np.uint64]] = []
    for part, one in enumerate(in_turn(lambda part: _hashes(rows, part, tally, ties, (first, count)), rows.parts, jobs)):
        read |= {(part, at): (slots, own) for at, (slots, own, _) in enumerate(one)}
        pieces += [ordered for _, _, ordered in one]
    starts, hashes = merged(pieces, 2 * count, np.dtype(np.uint64))
    pieces.clear()
    least, most = np.ones(2 * count, np.uint64), np.zeros(2 * count, np.uint64)  # none, until it is said
    for one in group.tolist():
        slot = 2 * (one - first)
        pair = [hashes[starts[at] : starts[at + 1]] for at in (slot, slot + 1)]
        for at, (begin, end) in zip((slot, slot + 1), _ranges(one, pair, found), strict=True):
            own = pair[at - slot]
            if begin < end and len(own):
                near = np.partition(own, (begin, end - 1))
                least[at], most[at] = near[begin], near[end - 1]
    kept = {at: (own >= least[slots]) & (own <= most[slots]) for at, (slots, own) in read.items()}
    return Ties(upper, lower, kept)


def _ranges(one: int, pair: list[Hashes], found: Edges) -> list[tuple[int, int]]:
    """Which places by hash are kept of a class's rows, at its upper and at its lower edge."""
    start, stop = int(found.upper.start[one]), int(found.upper.stop[one])
    begin, end = int(found.lower.start[one]), int(found.lower.stop[one])
    if found.odd[one] and len(pair[0]):
        # Two rows are as far from the middle: the upper one at place `start` of its edge, the lower one at place `end` of its own.
        high, low = np.partition(pair[0], start)[start], np.partition(pair[1], end)[end]
        start, end = (start, end) if high < low else (start + 1, end + 1)
    return [(start, stop), (begin, end)]


Tied = tuple[NDArray[np.integer], Hashes, Sorted[np.uint64]]


def _hashes(rows: Rows, part: int, tally: Tally, ties: Ties, classes: tuple[int, int]) -> list[Tied]:
    """Of each piece of a part, for its tied rows: twice the class (counted from the first) and one more at its lower edge; their hashes, as
    they come and in this order."""
    first, count = classes
    slots, tied = [], []
    for piece in rows.read(part):
        number = tally.places_of(piece)
        tied.append(ties.find(number, piece.scores))
        own = number[tied[-1]].astype(np.int64)
        slots.append((2 * (own - first) + (piece.scores[tied[-1]] == ties.lower[own])).astype(np.int32))
    hashes = rows.hashes(part, tied)
    return [(slot, own, by_class(slot, own, 2 * count)) for slot, own in zip(slots, hashes, strict=True)]
