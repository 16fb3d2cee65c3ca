"""What a score from the embeddings of all samples takes, said before it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from kdprune_pipelines._console import count, duration, megabytes
from kdprune_pipelines._methods import many, seconds

from kdprune_data.config import Settings

if TYPE_CHECKING:
    from kdprune_data.scores import Embedded

LARGE = 1e12
"""From so many multiplications on, the approximation is named."""


def told(name: str, embedded: Embedded, settings: Settings, memory: int) -> str:
    """`density: 50,000 embeddings of 64 numbers, 160 G multiplications, up to 1.0 GB, about 3 min`; and a way to have it cheaper."""
    n, d = embedded.embedding.shape
    work = multiplications(name, embedded, settings)
    cheaper = getattr(settings, "clusters", 1) is None and name == "density" and work >= LARGE
    about = f"{count(n, 'embedding')} of {count(d, 'number')}, {many(work)} multiplications, up to {megabytes(_most(name, n, d, memory))}"
    advice = "; --set density.clusters=K looks for neighbours in one of K clusters alone, about K times as fast" if cheaper else ""
    return f"{name}: {about}, about {duration(seconds(work))}{advice}"


def multiplications(name: str, embedded: Embedded, settings: Settings) -> float:
    """How many there are at most, roughly: k-means may end before its last iteration."""
    from kdprune_data.scores.embedding import FIT, ITERATIONS

    n, d = (float(side) for side in embedded.embedding.shape)
    if name == "class_distance":
        return n * d
    clusters = getattr(settings, "clusters", None)
    if clusters is None and name == "density":
        return n * n * d
    k = clusters or len(np.unique(embedded.labels))
    # An iteration for the first centroids, which cost as much together; and the nearest one of every sample.
    fitted = min(n, FIT) * k * d * (ITERATIONS + 1) + n * k * d
    return float(fitted + (n * n * d / k if name == "density" else 0.0))


def _most(name: str, n: int, d: int, memory: int) -> int:
    """Bytes, roughly: the embeddings as stored, and what is computed with."""
    from kdprune_data.scores.clusters import BLOCK
    from kdprune_data.scores.embedding import MOST_ROWS

    if name == "class_distance":
        return 2 * n * d + min(memory, 32 * n * d)
    kept = 8 * n * d if 8 * n * d <= memory // 2 else 0
    side = min(n, MOST_ROWS if name == "density" else BLOCK)
    return 2 * n * d + min(memory, kept + 24 * side * (side if name == "density" else 0) + 56 * side * d)
