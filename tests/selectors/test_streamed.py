"""Rows that are read in parts: what is kept is what `ranked.select` keeps of them in memory, row for row, whatever the limits are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.selectors import Pool, places, ranked, tally
from kdprune_data.selectors.base import BALANCES, ENDS
from kdprune_data.selectors.parts import Piece, in_turn
from kdprune_data.selectors.ranked import RankedParams
from kdprune_data.selectors.streamed import edges, settle


@dataclass
class Table:
    """Arrays, cut into parts and pieces."""

    uids: NDArray[np.uint64]
    labels: NDArray[np.integer] | None
    scores: NDArray[np.floating]
    seed: int
    cuts: list[int]
    piece: int

    @property
    def parts(self) -> int:
        return len(self.cuts) - 1

    @property
    def about(self) -> int:
        return len(self.scores)

    def _slices(self, part: int) -> list[slice]:
        first, last = self.cuts[part : part + 2]
        return [slice(at, min(at + self.piece, last)) for at in range(first, last, self.piece)]

    def read(self, part: int) -> Iterator[Piece]:
        for own in self._slices(part):
            yield Piece(None if self.labels is None else self.labels[own], self.scores[own])

    def hashes(self, part: int, rows: list[NDArray[np.int64]]) -> list[NDArray[np.uint64]]:
        own = [self.uids[piece][some] for piece, some in zip(self._slices(part), rows, strict=True)]
        return [order.order_hash(uids, self.seed, "select") for uids in own]

    def name(self, part: int, piece: int, row: int) -> str:
        return str(self._slices(part)[piece].start + row)


def table_of(rng: np.random.Generator, n: int, balance: str, params: RankedParams, hard: str) -> tuple[Table, Pool]:
    """A random table: few or many classes, scores with and without ties, of either sign, with -0.0 beside 0.0."""
    kinds = [
        rng.random(n),
        rng.normal(size=n) * 1e-3,
        rng.poisson(2, n),
        rng.integers(-2, 3, n),
        rng.choice([-0.0, 0.0, 1.0], n),
        np.full(n, 0.5),
        np.sort(rng.random(n)),
    ]
    scores = kinds[rng.integers(len(kinds))].astype(rng.choice([np.float32, np.float64]))
    labels = (rng.integers(0, rng.integers(1, 9), n) * rng.choice([1, 3]) + rng.choice([0, 5])).astype(rng.choice([np.int32, np.int64]))
    uids = order.uids_of(map(str, rng.permutation(n)))
    cuts = [0, *sorted(rng.integers(0, n + 1, rng.integers(0, 4)).tolist()), n]
    harder = scores if hard == "high" else -scores
    table = Table(uids, None if balance == "none" else labels, harder, params.seed, cuts, int(rng.choice([3, 50, 10_000])))
    return table, Pool(uids, labels.astype(np.int32), {params.score: scores}, {params.score: hard})


def kept(table: Table, keep: int, params: RankedParams, jobs: int = 1) -> NDArray[np.int64]:
    counted = tally.tally(table, params.balance, jobs)
    found = settle(table, counted, edges(table, counted, keep, params, jobs), jobs)
    masks = [found.mask(part, at, piece) for part in range(table.parts) for at, piece in enumerate(table.read(part))]
    return np.flatnonzero(np.concatenate(masks))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("balance", BALANCES)
def test_as_in_memory(monkeypatch: pytest.MonkeyPatch, balance: str, end: str) -> None:
    """With limits so small that samples mislead, classes take turns, and class numbers are searched."""
    rng = np.random.default_rng([BALANCES.index(balance), ENDS.index(end)])
    for case in range(250):
        monkeypatch.setattr(tally, "SAMPLE", int(rng.choice([1, 16, 1 << 20])))
        monkeypatch.setattr(tally, "DENSE", int(rng.choice([2, 1 << 22])))
        monkeypatch.setattr(tally, "MERGED", int(rng.choice([1, 1 << 22])))
        monkeypatch.setattr(places, "LEAST", int(rng.choice([1, 8, 64])))
        monkeypatch.setattr(places, "SURE", float(rng.choice([0, 0.3, 5])))
        monkeypatch.setattr(places, "COLLECTED", int(rng.choice([10, 100, 1 << 25])))
        monkeypatch.setattr(places, "CLASSES", int(rng.choice([1, 3, 1 << 18])))
        params = RankedParams(int(rng.integers(3)), balance, end=end, skip_hardest=float(rng.choice([0, 0.1, 0.37])))
        n, hard = int(rng.choice([3, 30, 300])), str(rng.choice(["high", "low"]))
        table, pool = table_of(rng, n, balance, params, hard)
        keep = int(rng.integers(1, n - order.keep_count(order.fraction(params.skip_hardest or "1e-9"), n) + 1))
        wanted = ranked.select(pool, keep, params).indices
        assert np.array_equal(kept(table, keep, params, jobs=1 + (case % 25 == 0)), wanted), (case, n, keep, params, hard)


@pytest.mark.parametrize("scores", ["uniform", "poisson"])
def test_a_sample_brackets_large_classes(scores: str) -> None:
    """With the limits that are used: 20 classes of 5,000."""
    rng = np.random.default_rng(0)
    n = 100_000
    values = (rng.random(n) if scores == "uniform" else rng.poisson(2, n)).astype(np.float32)
    labels, uids = (np.arange(n) % 20).astype(np.int32), rng.permutation(n).astype(np.uint64)
    params = RankedParams(seed=1)
    pool = Pool(uids, labels, {params.score: values}, {params.score: "high"})
    table = Table(uids, labels, values, 1, [0, 30_000, n], 7_000)
    assert np.array_equal(kept(table, 33_333, params, jobs=2), ranked.select(pool, 33_333, params).indices)


def plain(scores: list[float], labels: list[int]) -> Table:
    return Table(np.arange(len(scores), dtype=np.uint64), np.array(labels), np.array(scores), 0, [0, len(scores)], 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(SourceError, match=r"2 of 4 rows have no finite score \(the first is '2'\)"):
        tally.tally(plain([0.0, 1.0, bad, bad], [0, 0, 0, 0]), "class", 1)


def test_labels_that_are_missing_are_refused() -> None:
    with pytest.raises(UsageError, match="--balance uniform needs labels and 2 rows have none: use --balance none"):
        tally.tally(plain([0.0, 1.0, 2.0], [-1, 4, -1]), "uniform", 1)


def test_more_than_there_are_is_refused() -> None:
    table = plain([0.0, 1.0, 2.0, 3.0], [0, 0, 1, 1])
    counted = tally.tally(table, "class", 1)
    with pytest.raises(UsageError, match="cannot keep 5 of 4 candidates"):
        edges(table, counted, 5, RankedParams(), 1)
    with pytest.raises(UsageError, match="cannot keep 3: 2 of 4 candidates are left out first, so 2 are left"):
        edges(table, counted, 3, RankedParams(skip_hardest=0.5), 1)


def test_parts_are_made_in_order_and_not_far_ahead() -> None:
    begun: list[int] = []

    def work(part: int) -> int:
        begun.append(part)
        return part

    results = in_turn(work, 100, 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(begun) < 10
    results.close()  # type: ignore[attr-defined]  # it is a generator
    assert list(in_turn(work, 9, 1)) == list(in_turn(work, 9, 3)) == list(range(9))
