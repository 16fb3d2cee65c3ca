"""What the methods that read an embedding share: classes one after the other, points read in blocks, and memory that is kept to.

A group's points are float64. They are held where that fits the memory given, and otherwise read anew, block by block, each time: the same
numbers either way, as blocks are cut alike. Sums over the numbers of a point are `einsum`'s, one point after another, so that equal points
give equal numbers to the bit wherever they stand; BLAS does not promise that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import option
from kdprune_data.errors import UsageError
from kdprune_data.selectors.base import Cost, Params, Picked, Pool, Size
from kdprune_data.selectors.quota import Group, groups

PER_CANDIDATE = 200
"""Bytes for hashes, places and a group's vectors, of every candidate."""
ANYWAY = 1_000_000
"""Bytes for what does not grow."""
BLOCK = 2**17
"""Numbers in a block: 1 MB of float64, which stays in a core's cache."""

Chosen = tuple[NDArray[np.int64], NDArray[np.float64] | None]
"""Which of a group's rows are kept, by their places in it, and their weights."""


@dataclass(frozen=True)
class PartsParams(Params):
    """parts: each class (or the whole, with balance `none`) is cut at random into so many, which are selected from by themselves; into no
    more than are kept of it."""

    parts: int = option(1, help="Random parts of each class, each by itself: less time and memory, and not nested.", least=1)


class Points:
    """The points of a group, float64 of shape (m, d), held or read in blocks."""

    def __init__(self, values: NDArray[np.floating], rows: NDArray[np.int64], memory: int, all_candidates: int) -> None:
        self.m, self.d = len(rows), values.shape[1]
        self._values, self._rows = values, rows
        held = held_bytes(all_candidates, self.m, self.d) <= memory
        self._held = values[rows].astype(np.float64) if held else None

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Consecutive blocks, and where they stand."""
        step = max(1, BLOCK // max(1, self.d))
        for start in range(0, self.m, step):
            where = slice(start, min(start + step, self.m))
            held = self._held
            yield where, self._values[self._rows[where]].astype(np.float64) if held is None else held[where]

    def point(self, place: int) -> NDArray[np.float64]:
        """One point, float64 of shape (d,)."""
        return np.asarray(self._values[self._rows[place]], np.float64)

    def mean(self) -> NDArray[np.float64]:
        """The mean of the points, float64 of shape (d,)."""
        total = np.zeros(self.d)
        for _, block in self.blocks():
            total += block.sum(0)
        return total / self.m

    def distances(self, to: NDArray[np.float64]) -> NDArray[np.float64]:
        """The squared distance of each point to one place, float64 of shape (m,). Of differences, so that those of equal points are 0."""
        return self.measure(lambda block: squares(block - to))

    def products(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inner product of each point with a direction, float64 of shape (m,)."""
        return self.measure(lambda block: np.einsum("ij,j->i", block, direction))

    def measure(self, of_block: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
        """A number of each point, float64 of shape (m,), from a function of a block."""
        found = np.empty(self.m)
        for where, block in self.blocks():
            found[where] = of_block(block)
        return found


def squares(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """The squared length of each row, float64 of shape (m,)."""
    found: NDArray[np.float64] = np.einsum("ij,ij->i", block, block)
    return found


def held_bytes(n: int, m: int, d: int) -> int:
    """Most bytes that `Points` of m out of n candidates take, when they are held."""
    return base_bytes(n, d) + 12 * m * d


def base_bytes(n: int, d: int) -> int:
    """Most bytes that a method which reads blocks takes."""
    return ANYWAY + PER_CANDIDATE * n + 5 * 8 * min(n * d, max(BLOCK, d)) + min(n * d, 20_000_000)


def linear_cost(size: Size, params: PartsParams, multiplications: Callable[[int, int], float]) -> Cost:
    """The cost of a method that reads `Points`; multiplications: of a group, from how many there are and how many are kept."""
    n = int(size.candidates.sum())
    held = held_bytes(n, *largest(size, params.parts)[:1], size.width)
    return Cost(
        sum(multiplications(m, k) for m, k in part_sizes(size, params.parts)),
        held if held <= params.memory else base_bytes(n, size.width),
    )


def part_sizes(size: Size, parts: int) -> Iterator[tuple[int, int]]:
    """How many candidates a part has and how many of them are kept, both rounded up, of every part. No group has more than it keeps."""
    for m, k in zip(size.candidates.tolist(), size.kept.tolist(), strict=True):
        of = min(parts, k)
        for _ in range(of):
            yield -(-m // of), -(-k // of)


def largest(size: Size, parts: int) -> tuple[int, int]:
    """The most candidates of a part, and the most that are kept of one."""
    return max(m for m, _ in part_sizes(size, parts)), max(k for _, k in part_sizes(size, parts))


def select_groups(pool: Pool, keep: int, params: PartsParams, choose: Callable[[Group], Chosen]) -> Picked:
    """Keep `keep` samples, by `choose` in each group. The linear algebra within runs on one thread, so that it rounds alike everywhere.

    Raises UsageError as `groups` does.
    """
    from threadpoolctl import threadpool_limits

    rows, weights = [], []
    with threadpool_limits(1, user_api="blas"):
        for group in groups(pool, keep, params, params.parts):
            places, weight = choose(group)
            rows.append(group.rows[places])
            weights.append(weight)
    indices = np.concatenate(rows)
    ascending = np.argsort(indices)
    known = [weight for weight in weights if weight is not None]
    return Picked(indices[ascending], weights=np.concatenate(known)[ascending].astype(np.float32) if known else None)


def size_of(pool: Pool, keep: int, params: Params) -> Size:
    """How much there is to select from. Raises UsageError as `groups` does."""
    found = groups(pool, keep, params)
    return Size(
        np.array([len(group.rows) for group in found], np.int64),
        np.array([group.keep for group in found], np.int64),
        0 if pool.embedding is None else pool.embedding.shape[1],
        0 if pool.logits is None else pool.logits.shape[1],
    )


def smallest_parts(size: Size, params: Params, cost: Callable[[Size, Any], Cost]) -> int | None:
    """The smallest number of parts, above that of the settings, with which a method fits the memory given; None where none does, or it has
    no parts."""
    if "parts" not in {field.name for field in fields(params)}:
        return None
    most = int(size.kept.max())  # no group is cut into more
    low, high = params.own()["parts"], most + 1  # it is above `low`, at most `high`
    while high - low > 1:
        middle = (low + high) // 2
        fit = cost(size, type(params)(**(params.own() | {"parts": middle}))).bytes <= params.memory
        low, high = (low, middle) if fit else (middle, high)
    return high if high <= most else None


def fits(name: str, size: Size, params: Params, cost: Callable[[Size, Any], Cost]) -> Cost:
    """The cost of a method. Raises UsageError where it needs more than the memory given, and says how many parts would fit."""
    found = cost(size, params)
    need = int(found.bytes)
    if need <= params.memory:
        return found
    enough, group = smallest_parts(size, params, cost), largest(size, params.own().get("parts", 1))[0]
    parts = "give " if enough is None else f"give --set parts={enough}, or "
    raise UsageError(
        f"{name} needs {need:,} bytes for groups of up to {group:,} samples, and --memory is {params.memory:,}: {parts}--memory {need}"
    )
