"""What a method reads of a pool, checked: a score by name, the embedding, the logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import SourceError, UsageError
from kdprune_data.selectors.base import Pool


def score_of(pool: Pool, name: str) -> NDArray[np.floating]:
    """A score of every candidate. Raises UsageError where the pool has none of the name, SourceError where one is not finite."""
    if name not in pool.scores:
        raise UsageError(f"this method needs the score {name!r}: run `kdprune-data score`, or give --scores FILE --column NAME")
    return _finite(pool, np.asarray(pool.scores[name]), name)


def embedding_of(pool: Pool) -> NDArray[np.float64]:
    """The embedding of every candidate, float64 of shape (n, d). Raises as `score_of` does."""
    if pool.embedding is None:
        raise UsageError("this method needs the embedding: run `kdprune-data score --embedding`")
    return _finite(pool, np.asarray(pool.embedding, np.float64), "embedding").astype(np.float64, copy=False)


def logits_of(pool: Pool) -> NDArray[np.float64]:
    """The logits of every candidate, float64 of shape (n, c). Raises as `score_of` does."""
    if pool.logits is None:
        raise UsageError("this method needs the logits: run `kdprune-data score --logits`")
    return _finite(pool, np.asarray(pool.logits, np.float64), "logits").astype(np.float64, copy=False)


def _finite(pool: Pool, values: NDArray[np.floating], name: str) -> NDArray[np.floating]:
    bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if bad.any():
        raise SourceError(
            f"{name} is not a finite number for {int(bad.sum()):,} of {len(values):,} candidates (the first has uid "
            f"{int(pool.uids[bad].min())}): every candidate needs one"
        )
    return values
