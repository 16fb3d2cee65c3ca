"""Scores from training dynamics: each a function of the `History` of all samples over all recorded epochs, found in `FROM_DYNAMICS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class History:
    """What a network in train mode said of n samples in each of t epochs, before the update: correct, bool of shape (t, n);
    logit_margin, float32 of shape (t, n)."""

    correct: NDArray[np.bool_]
    logit_margin: NDArray[np.float32]


def forgetting(past: History) -> NDArray[np.float64]:
    """How often a sample went from right to wrong, from one presentation to the next: float64 of shape (n,). High is hard.

    A sample that was never right gets the number of presentations, as in the paper's own code (many copies give it 0, the easiest).
    Source: Toneva et al., "An empirical study of example forgetting during deep neural network learning", ICLR 2019.
    """
    right = past.correct
    events = (right[:-1] & ~right[1:]).sum(0)
    return np.where(right.any(0), events, len(right)).astype(np.float64)


def aum(past: History) -> NDArray[np.float64]:
    """Area under the margin: mean over epochs of the label's logit minus the largest other. float64 of shape (n,). Low is hard.

    Source: Pleiss et al., "Identifying mislabeled data using the area under the margin ranking", NeurIPS 2020.
    """
    return np.asarray(past.logit_margin.mean(0, dtype=np.float64))


def correct(past: History) -> NDArray[np.float64]:
    """Share of presentations that were right: float64 of shape (n,), in [0, 1]. Low is hard."""
    return np.asarray(past.correct.mean(0, dtype=np.float64))


FROM_DYNAMICS: dict[str, Callable[[History], NDArray[np.float64]]] = {"forgetting": forgetting, "aum": aum, "correct": correct}
