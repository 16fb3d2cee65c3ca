"""The weights of a subset's samples: whether they differ, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from kdprune_pipelines._console import count, say
from numpy.typing import NDArray

from kdprune_data.errors import SourceError
from kdprune_data.formats.dataset import Dataset


def weighing(data: Dataset, how: str) -> NDArray[np.float32] | None:
    """The weights of all rows where those of the samples that decode differ, else None: equal weights are none.

    how: `use` or `ignore`, which is said where it matters. Raises SourceError when all that are to be used are 0.
    """
    weights = uneven(data)
    if how == "use" and weights is None and data.weights[data.usable()[0]] == 0:
        raise SourceError(f"every sample of {data.folder} has weight 0: nothing to learn; select again, or --sample-weights ignore")
    if weights is not None:
        used = "the loss is their weighted mean in each batch" if how == "use" else "they are ignored"
        say(f"samples have weights from {spoken(facts(weights[data.usable()]))}: {used}")
    return weights


def uneven(data: Dataset) -> NDArray[np.float32] | None:
    """The weights of all rows where those of the samples that decode differ, else None."""
    used = data.weights[data.usable()]
    return None if (used == used[0]).all() else data.weights


def facts(weights: NDArray[np.float32]) -> dict[str, Any]:
    """Least, median and largest weight, and how many are 0."""
    exact = weights.astype(np.float64)  # the mean of two in the middle may be too large for float32
    return {"min": float(exact.min()), "median": float(np.median(exact)), "max": float(exact.max()), "zero": int((exact == 0).sum())}


def spoken(found: Mapping[str, Any]) -> str:
    """The facts for people: `0 to 12, median 1 (3 samples of weight 0)`."""
    if found["min"] == found["max"]:
        return f"{found['min']:.6g} for every sample"
    zero = f" ({count(found['zero'], 'sample')} of weight 0)" if found["zero"] else ""
    return f"{found['min']:.6g} to {found['max']:.6g}, median {found['median']:.6g}{zero}"
