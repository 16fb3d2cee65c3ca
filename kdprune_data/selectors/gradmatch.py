"""GradMatch: samples and weights whose gradients add up to the gradient of their class, by orthogonal matching pursuit.

K. Killamsetty, D. Sivasubramanian, G. Ramakrishnan, A. De, R. Iyer, "GRAD-MATCH: gradient matching based data subset selection for
efficient deep model training", ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import option
from kdprune_data.selectors.base import Cost, Method, Picked, Pool, Size
from kdprune_data.selectors.gradients import NEEDS, Gradients, gradient_bytes, select_by_gradients
from kdprune_data.selectors.points import PartsParams, largest, part_sizes

EQUAL = 1e-12
"""Numbers that differ by less than this share of the largest are equal: they differ by rounding."""


@dataclass(frozen=True)
class GradMatchParams(PartsParams):
    """ridge: lambda, over the mean squared length of the class's gradients; batch: how many samples are taken between two fits, at most,
    and never more than one for every 32 that are chosen already: so the first 64 are one by one whatever it is."""

    ridge: float = option(1.0, help="Penalty on squared weights, in mean squared lengths of a gradient.", least=1e-6, most=1e6)
    batch: int = option(16, help="Most samples taken between two fits: 1 is the definition, more is faster.", least=1)


def select(pool: Pool, keep: int, params: GradMatchParams) -> Picked:
    """Of each class, weights w >= 0, of which k are not bound to 0, that make ||sum w_i g_i - sum g||^2 + lambda |w|^2 small. Nested.

    Exactly k: where no more gradients help, those follow that would do the least harm, with weight 0. The weights are those of non-negative
    least squares at the end; while choosing, they may have any sign.

    Raises as `craig.select` does.
    """
    return select_by_gradients(
        "gradmatch", pool, keep, params, cost=cost, choose=lambda group, gradients: match(gradients, group.keep, params)
    )


def cost(size: Size, params: GradMatchParams) -> Cost:
    """k m (k / 2 + c + d + 1) + 2 k^3 multiplications for k kept of m, and the larger of 8 k m and 33 k^2 bytes."""
    m, k = largest(size, params.parts)
    row = size.classes + size.width + 1
    work = sum(k * m * (k / 2 + row) + 2.0 * k**3 for m, k in part_sizes(size, params.parts))
    return Cost(work, gradient_bytes(size, params.parts) + max(8.0 * m * (k + 4 * min(params.batch, 1 + k // 32)), 33.0 * k * k))


def match(gradients: Gradients, keep: int, params: GradMatchParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places, in the order of choice, and their weights, float64 of shape (keep,)."""
    total = gradients.with_total()
    ridge = params.ridge * float(gradients.lengths.mean())
    chosen, fitted = _pursue(gradients, keep, ridge, params.batch, total)
    weights = np.zeros(keep)
    if fitted:
        gram = np.empty((fitted, fitted))
        for start in range(0, fitted, 256):
            gram[start : start + 256] = gradients.products(chosen[start : min(start + 256, fitted)])[:, chosen[:fitted]]
        gram[np.diag_indices(fitted)] += ridge
        weights[:fitted] = nonnegative(gram, total[chosen[:fitted]])
    return chosen, weights


def _pursue(gradients: Gradients, keep: int, ridge: float, batch: int, total: NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
    """Places in the order of choice, and how many of them were chosen before no gradient was left that would help.

    Always the gradient with the largest product with what is not yet matched. With the ridge a gradient g_i is (g_i, sqrt(lambda) e_i), so
    they are independent, and fitting all weights anew is one more row of a Cholesky factor L of their products: `rows` is inv(L) times the
    products of the chosen with all, `left` the products of all with what is not yet matched.
    """
    m, left = len(gradients), total.copy()
    rows, chosen, done = np.empty((keep, m)), np.empty(keep, np.int64), 0
    free = np.ones(m, bool)
    least = EQUAL * float(np.abs(total).max())
    while done < keep:
        some = _largest(left, free, min(batch, max(1, done // 32), keep - done), least)
        some = some[left[some] > least]
        if not len(some):
            break
        new = gradients.products(some)
        new -= rows[:done, some].T @ rows[:done]
        for one, place in enumerate(some.tolist()):
            row = new[one] - rows[done : done + one, place] @ rows[done : done + one]
            pivot = np.sqrt(row[place] + ridge)
            row /= pivot
            left -= row * (left[place] / pivot)
            rows[done + one], chosen[done + one], free[place] = row, place, False
        done += len(some)
    chosen[done:] = _largest(left, free, keep - done, least)
    return chosen, done


def _largest(values: NDArray[np.float64], free: NDArray[np.bool_], count: int, least: float) -> NDArray[np.int64]:
    """The free places with the largest values, largest first; what differs by about `least` is equal, and in the order of places."""
    keys = np.where(free, np.rint(values / (least or 1.0)), -np.inf)
    return np.array([np.argmax(keys)]) if count == 1 else np.argsort(-keys, kind="stable")[:count]


def nonnegative(gram: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The w >= 0 that makes w gram w - 2 target w smallest, gram being positive definite: float64 of shape (k,).

    Block principal pivoting: all wrong signs change sides at once; when that makes no fewer of them three times, the last alone does,
    which always ends. J. Portugal, J. Judice, L. Vicente, Mathematics of Computation 63, 1994.
    """
    inside = np.ones(len(target), bool)
    fewest, chances = len(target) + 1, 3
    while True:
        weights = np.zeros(len(target))
        weights[inside] = np.linalg.solve(gram[np.ix_(inside, inside)], target[inside])
        slope = gram[:, inside] @ weights[inside] - target
        wrong = np.where(inside, weights < -EQUAL * np.abs(weights).max(), slope < -EQUAL * np.abs(target).max())
        count = int(wrong.sum())
        if count == 0:
            return np.maximum(weights, 0)
        chances = 3 if count < fewest else chances - 1
        fewest = min(fewest, count)
        inside ^= wrong if chances >= 0 else np.arange(len(target)) == np.flatnonzero(wrong)[-1]


METHOD = Method(select, "samples whose weighted gradients add up to that of their class", GradMatchParams, lambda _: NEEDS, cost)
