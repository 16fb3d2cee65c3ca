"""Last-layer gradients of the cross-entropy, without ever writing them out.

That of a sample is the outer product of e = softmax(z) - onehot(y) and (h, 1), which has c (d + 1) numbers; the inner product of two is
(e_i e_j)(h_i h_j + 1), which has c + d + 2 multiplications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import option
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.selectors.base import Cost, Picked, Pool, Size
from kdprune_data.selectors.inputs import embedding_of, logits_of
from kdprune_data.selectors.points import (
    ANYWAY,
    PER_CANDIDATE,
    Chosen,
    PartsParams,
    fits,
    largest,
    part_sizes,
    select_groups,
    size_of,
    squares,
)
from kdprune_data.selectors.quota import Group

NEEDS = ("embedding", "logits")
GREEDY = ("lazy", "stochastic")
LEVELS = 2.0**24
"""Similarities are whole numbers from 0 to this, which float32 holds exactly: so their sums, in float64, do not depend on any order."""
NUMBERS = 2**20
"""Numbers in a block of products."""
Some = TypeVar("Some", bound=PartsParams)


@dataclass(frozen=True)
class GreedyParams(PartsParams):
    """greedy: `lazy` looks at every candidate, `stochastic` at a random few in each step, so many that 1 - 1/e - epsilon of the best is
    reached in expectation; it needs memory for a part alone, not for its square, and is not nested."""

    greedy: str = option("lazy", help="Every candidate in each step (exact), or a random few.", choices=GREEDY)
    epsilon: float = option(0.01, help="What stochastic may lose: fewer candidates a step as it grows.", least=1e-6, most=0.9)


@dataclass(frozen=True)
class Gradients:
    """Of m samples. errors: e, float64 of shape (m, c); inputs: (h, 1), float64 of shape (m, d + 1); lengths: squared, of shape (m,)."""

    errors: NDArray[np.float64]
    inputs: NDArray[np.float64]
    lengths: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.lengths)

    def products(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """The inner products of some with all: float64 of shape (s, m)."""
        found = self.errors[rows] @ self.errors.T
        found *= self.inputs[rows] @ self.inputs.T
        return found

    def with_total(self) -> NDArray[np.float64]:
        """The inner products of all with the sum of all: float64 of shape (m,)."""
        found: NDArray[np.float64] = np.einsum("ij,ij->i", self.errors @ (self.errors.T @ self.inputs), self.inputs)
        return found

    def blocks(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Rows in blocks, whose products with all take 8 MB."""
        step = max(1, NUMBERS // len(self))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def gradients_of(pool: Pool, rows: NDArray[np.int64]) -> Gradients:
    """The gradients of some of a pool's samples, which have been `checked`."""
    assert pool.embedding is not None
    assert pool.logits is not None
    errors = _errors(pool.logits[rows].astype(np.float64), pool.labels[rows])
    inputs = np.empty((len(rows), pool.embedding.shape[1] + 1))
    inputs[:, :-1] = pool.embedding[rows]
    inputs[:, -1] = 1
    return Gradients(errors, inputs, squares(errors) * squares(inputs))


def _errors(logits: NDArray[np.float64], labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """softmax(z) - onehot(y), in place; that of the label as minus the sum of the others, which keeps its digits when p is nearly 1."""
    logits -= logits.max(1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(1, keepdims=True)
    samples = np.arange(len(labels))
    logits[samples, labels] = 0
    logits[samples, labels] = -logits.sum(1)
    return logits


def checked(pool: Pool, name: str) -> None:
    """Raise UsageError without an embedding, logits or labels, SourceError where a number is not finite or a label has no logit."""
    embedding_of(pool)
    classes = logits_of(pool).shape[1]
    unlabelled = int((pool.labels < 0).sum())
    if unlabelled:
        raise UsageError(f"{name} needs labels and {unlabelled:,} samples have none: take another method, or label them")
    if pool.labels.max(initial=0) >= classes:
        raise SourceError(
            f"a sample has the label {int(pool.labels.max())} and logits are of {classes:,} classes: score with another teacher"
        )


def select_by_gradients(
    name: str, pool: Pool, keep: int, params: Some, *, cost: Callable[[Size, Some], Cost], choose: Callable[[Group, Gradients], Chosen]
) -> Picked:
    """Keep `keep` samples by `choose` in each group. Raises as `checked` and `points.fits` do."""
    checked(pool, name)
    fits(name, size_of(pool, keep, params), params, cost)
    return select_groups(pool, keep, params, lambda group: choose(group, gradients_of(pool, group.rows)))


def gradient_bytes(size: Size, parts: int) -> float:
    """Most bytes that the gradients of a part take, with what making them takes, and blocks of products."""
    m, _ = largest(size, parts)
    row = size.classes + size.width + 1
    return (
        ANYWAY
        + PER_CANDIDATE * float(size.candidates.sum())
        + 8 * (2 * m * row + size.classes * (size.width + 1) + 5 * min(m * m, max(NUMBERS, m)))
    )


def greedy_cost(size: Size, params: GreedyParams) -> Cost:
    """lazy: m^2 (c + d + 1) multiplications and 4 m^2 bytes for a group of m, and the rows that are looked at again; stochastic: as many
    multiplications times ln(1 / epsilon), and no such matrix."""
    m, _ = largest(size, params.parts)
    row, looks = size.classes + size.width + 1, -np.log(params.epsilon)
    lazy = params.greedy == "lazy"
    work = sum(m * (m * row + 10.0 * k) if lazy else m * (m * looks + k) * row for m, k in part_sizes(size, params.parts))
    return Cost(work, gradient_bytes(size, params.parts) + (4.0 * m * m if lazy else 0))


def as_levels(similarity: NDArray[np.float64]) -> NDArray[np.float32]:
    """Similarities from 0 to 1 as whole numbers from 0 to LEVELS; what is given is changed."""
    similarity *= LEVELS
    np.rint(similarity, out=similarity)
    return similarity.astype(np.float32)
