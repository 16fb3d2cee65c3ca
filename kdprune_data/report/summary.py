"""What a table of scores looks like: quantiles, means by class, rank correlations. Arrays in, arrays out; no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def quantiles(values: NDArray[np.floating], at: Sequence[float] = QUANTILES) -> NDArray[np.float64]:
    """The values' quantiles, straight lines between neighbours: place p (n - 1) of the n values sorted, from 0.

    values: float of shape (n,), n at least 1, finite; at: shares in [0, 1]. Returns float64 of the shape of `at`.
    """
    ordered = np.sort(values).astype(np.float64)
    place = np.asarray(at, np.float64) * (len(ordered) - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, len(ordered) - 1)
    part = place - low
    # Not low + part * (high - low): that may miss a value which both neighbours have, or be infinite.
    found: NDArray[np.float64] = np.where(ordered[low] == ordered[high], ordered[low], ordered[low] * (1 - part) + ordered[high] * part)
    return found


def class_means(values: NDArray[np.floating], labels: NDArray[np.integer], classes: int) -> NDArray[np.float64]:
    """The mean of each class, NaN where it has no sample; samples whose label is negative are left out.

    values: float of shape (n,); labels: integers below `classes`, of shape (n,). Returns float64 of shape (classes,).
    """
    there = labels >= 0
    sizes = np.bincount(labels[there], minlength=classes)
    sums = np.bincount(labels[there], weights=values[there].astype(np.float64), minlength=classes)
    means: NDArray[np.float64] = np.divide(sums, sizes, out=np.full(classes, np.nan), where=sizes > 0)
    return means


def average_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their places.

    values: of shape (n,), finite. Returns float64 of shape (n,).

    >>> average_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, member, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    means: NDArray[np.float64] = (last - (sizes - 1) / 2)[member]
    return means


def rank_correlations(columns: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each two columns: Pearson's of their average ranks; NaN where a column has one value alone.

    columns: k of shape (n,), finite. Returns float64 of shape (k, k), symmetric. Source: Spearman, "The proof and measurement of
    association between two things", American Journal of Psychology, 1904.
    """
    found = np.full((len(columns), len(columns)), np.nan)
    ranks = [_unit(average_ranks(column)) for column in columns]
    for i, one in enumerate(ranks):
        for j, other in enumerate(ranks[: i + 1]):
            if one is not None and other is not None:
                found[i, j] = found[j, i] = 1.0 if i == j else min(1.0, max(-1.0, float(one @ other)))
    return found


def _unit(ranks: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Ranks about their mean, of length 1; None where they are all equal."""
    about = ranks - (len(ranks) + 1) / 2
    length = float(np.sqrt(about @ about))
    return about / length if length else None


def hardness(means: Mapping[str, NDArray[np.float64]], spread: Mapping[str, float], hard: Mapping[str, str]) -> NDArray[np.float64]:
    """How hard each class is: the mean, over the scores, of how many standard deviations its mean lies to the hard side of all classes'.

    means: by score, float64 of shape (c,), NaN for a class without samples; spread: the standard deviation of each score's values; hard:
    `high` or `low`. A score that does not vary says nothing. Returns float64 of shape (c,), NaN for a class without samples.
    """
    sides = [
        (1 if hard[name] == "high" else -1) * (of - np.nanmean(of)) / spread[name]
        for name, of in means.items()
        if spread[name] > 0 and not np.isnan(of).all()
    ]
    classes = len(next(iter(means.values())))
    return np.mean(sides, axis=0) if sides else np.where(np.isnan(next(iter(means.values()))), np.nan, np.zeros(classes))
