"""How many of each class are kept, from nothing but the sizes of the classes: what `quota.take` comes to, without a ranking."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EXACT_IN_FLOAT = 1 << 25
"""Below so many in a class, quotients (2r + 1) / 2n are one float64 each, and equal only where they are."""


def shares(sizes: NDArray[np.int64], keep: int, balance: str) -> NDArray[np.int64]:
    """How many of each class `quota.take` keeps when it keeps `keep` in all.

    sizes: int64 of shape (c,), of the classes in ascending order of their numbers; with balance `none` of all rows as one class.
    Returns int64 of shape (c,), whose sum is `keep`, which is at most that of the sizes.
    """
    if balance == "none":
        return np.full(1, keep, np.int64)
    return _equal(sizes, keep) if balance == "uniform" else _proportional(sizes, keep)


def _equal(sizes: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """The smallest r of all classes, ties by class number: all to one level, and one more of the first that have it."""
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the highest level that is not too many
        level = (low + high + 1) // 2
        low, high = (level, high) if int(np.minimum(sizes, level).sum()) <= keep else (low, level - 1)
    found = np.minimum(sizes, low)
    found[np.flatnonzero(sizes > low)[: keep - int(found.sum())]] += 1
    return found


def _proportional(sizes: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """The smallest (2r + 1) / 2n of all classes, ties by class number.

    Below a bound t a class of n has n t + 1/2 of them at most, and n t - 1/2 at least, so c classes together N t, give or take c / 2. Those
    below (keep - c / 2) / N are kept therefore, and none above (keep + c / 2) / N: what lies between is sorted. In whole numbers.
    """
    total, classes = int(sizes.sum()), len(sizes)
    below, above = max(0, 2 * keep - classes), 2 * keep + classes  # the bounds, times 2 N
    sure = np.array([(n * below + total - 1) // (2 * total) for n in sizes.tolist()], np.int64)
    most = np.array([min(n, (n * above + total) // (2 * total)) for n in sizes.tolist()], np.int64)
    open_ = np.maximum(most - sure, 0)
    number = np.repeat(np.arange(classes), open_)
    place = np.arange(len(number)) - np.repeat(np.cumsum(open_) - open_, open_) + sure[number]
    first = _by_quota(place, sizes[number], number)[: keep - int(sure.sum())]
    return sure + np.bincount(number[first], minlength=classes)


def _by_quota(place: NDArray[np.int64], size: NDArray[np.int64], number: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of (2 place + 1) / (2 size), ties by number: int64 of shape (m,)."""
    if size.max(initial=0) < EXACT_IN_FLOAT:
        return np.lexsort((number, (2 * place + 1) / (2 * size))).astype(np.int64)
    # Two different quotients with denominators below 2^33 are 2^-66 apart at least.
    keys = [((2 * p + 1) << 80) // (2 * n) for p, n in zip(place.tolist(), size.tolist(), strict=True)]
    return np.array(sorted(range(len(keys)), key=lambda at: (keys[at], number[at])), np.int64)
