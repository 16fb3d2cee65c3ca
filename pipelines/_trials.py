"""How long scores from the embedding would take: from trials with made-up embeddings of ever more samples."""

from __future__ import annotations

import time
from math import log2, pow
from typing import TYPE_CHECKING

import numpy as np
from kdprune_pipelines._scoring import Scorer, from_embedding
from numpy.typing import NDArray

from kdprune_data import order

if TYPE_CHECKING:
    from kdprune_data.scores import Embedded

FIRST = 250
"""Samples in the first trial."""


def seconds(scorer: Scorer, dimensions: int, most: float) -> float:
    """Seconds that the scores from the embedding would take, from at most about `most` seconds of trials."""
    names = scorer.columns.of("embedding")
    return sum(_seconds_of(scorer, name, dimensions, most / len(names)) for name in names)


def _seconds_of(scorer: Scorer, name: str, dimensions: int, most: float) -> float:
    """Each trial has twice the samples of the one before; how much longer it takes tells how the cost grows, up to its square."""
    rows, began = scorer.images.data.usable(), time.monotonic()
    trials: list[tuple[int, float]] = []
    n = FIRST
    while True:
        embedded = _made_up(scorer, rows[:n], dimensions)
        start = time.monotonic()
        from_embedding(scorer, name, embedded)
        now = time.monotonic()
        trials.append((len(embedded.uids), now - start))
        if n >= len(rows):
            return trials[-1][1]
        if len(trials) > 1 and now - began + 4 * trials[-1][1] > most:
            break
        n *= 2
    (_, before), (size, last) = trials[-2:]
    power = min(max(log2(max(last, 1e-9) / max(before, 1e-9)), 1.0), 2.0)
    return last * pow(len(rows) / size, power)


def _made_up(scorer: Scorer, rows: NDArray[np.int64], dimensions: int) -> Embedded:
    """Embeddings that are spread evenly, of some rows: numbers from a hash of the samples."""
    from kdprune_data.scores import Embedded

    data = scorer.images.data
    values = order.unit(order.mix(data.uids[rows][:, None] + np.arange(dimensions, dtype=np.uint64)[None]))
    return Embedded(data.uids[rows], data.labels[rows], values.astype(np.float16), scorer.seed, scorer.memory)
