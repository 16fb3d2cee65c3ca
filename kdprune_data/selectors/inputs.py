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


def embedding_of(pool: Pool) -> NDArray[np.floating]:
    """The embedding of every candidate, of shape (n, d), as it is stored: a method turns it into float64 piece by piece. Raises as
    `score_of` does."""
    if pool.embedding is None:
        raise UsageError("this method needs the embedding: run `kdprune-data score --embedding`")
    return _finite(pool, np.asarray(pool.embedding), "embedding")


def logits_of(pool: Pool) -> NDArray[np.floating]:
    """The logits of every candidate, of shape (n, c), likewise."""
    if pool.logits is None:
        raise UsageError("this method needs the logits: run `kdprune-data score --logits`")
    return _finite(pool, np.asarray(pool.logits), "logits")


def _finite(pool: Pool, values: NDArray[np.floating], name: str) -> NDArray[np.floating]:
    rows = 1 + 10_000_000 // max(1, values[:1].size)  # in blocks, so that the check takes no memory to speak of
    finite = [
        np.isfinite(values[top : top + rows]).reshape(len(values[top : top + rows]), -1).all(1) for top in range(0, len(values), rows)
    ]
    bad = ~np.concatenate([np.empty(0, bool), *finite])
    if bad.any():
        raise SourceError(
            f"{name} is not a finite number for {int(bad.sum()):,} of {len(values):,} candidates (the first has uid "
            f"{int(pool.uids[bad].min())}): every candidate needs one"
        )
    return values
