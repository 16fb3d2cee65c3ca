"""Scores from training dynamics: each a function of the `History` of all samples over all recorded epochs, found in `FROM_DYNAMICS`.

Epochs are added up one after the other, so that a sample's score is the same to the last bit whatever other samples are scored with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data.config import Settings, option
from kdprune_data.errors import SourceError, UsageError

F64 = NDArray[np.float64]
BLOCK = 4_000_000
"""Logits that are looked at together."""


@dataclass(frozen=True)
class History:
    """What a network in train mode said of n samples in each of t epochs, before the update: correct, bool of shape (t, n); logit_margin
    and p_true (the label's probability), float32 of shape (t, n); logits, from an epoch counted from 0, finite floating of shape (n, c),
    each row up to a constant; None where they were not recorded."""

    correct: NDArray[np.bool_]
    logit_margin: NDArray[np.float32]
    p_true: NDArray[np.float32]
    logits: Callable[[int], NDArray[np.floating]] | None = None


@dataclass(frozen=True)
class DynamicsScore:
    """One score. compute: (history, settings) to float64 of shape (n,); settings: their type; logits: whether it needs them; least: the
    fewest recorded epochs it can be computed from, with fewer `compute` raises SourceError."""

    compute: Callable[[History, Any], F64]
    settings: type[Settings] = Settings
    logits: bool = False
    least: int = 1


@dataclass(frozen=True)
class ForgettingSettings(Settings):
    """never: the score of a sample that was never right, the number of `presentations` or `zero`."""

    never: str = option("presentations", help="What a sample that was never right gets.", choices=("presentations", "zero"))


@dataclass(frozen=True)
class EpochsSettings(Settings):
    """epochs: how many, from the first; all where fewer are recorded."""

    epochs: int = option(30, help="Epochs looked at, from the first.", least=1)


@dataclass(frozen=True)
class WindowSettings(Settings):
    """window: consecutive epochs whose spread is one number; all where fewer are recorded."""

    window: int = option(10, help="Epochs in a window.", least=2)


@dataclass(frozen=True)
class DualSettings(WindowSettings):
    """window as in `WindowSettings`; epochs as in `EpochsSettings`."""

    epochs: int = option(30, help="Epochs looked at, from the first.", least=2)


@dataclass(frozen=True)
class TddsSettings(Settings):
    """epochs: how many, from the first, all by default; window: consecutive epochs whose changes are compared; decay: weight of the last
    window, of each one before (1 - decay) times that of the next."""

    epochs: int | None = option(None, help="Epochs looked at, from the first.", least=3)
    window: int = option(10, help="Epochs in a window.", least=3)
    decay: float = option(0.9, help="Weight of the last window.", least=0.001, most=1)


def forgetting(past: History, settings: ForgettingSettings) -> F64:
    """How often a sample went from right to wrong, from one presentation to the next: float64 of shape (n,). High is hard.

    A sample that was never right gets the number of presentations, as in the paper's own code; with `never` at `zero` it gets 0, the
    easiest, as in many copies.
    Source: Toneva et al., "An empirical study of example forgetting during deep neural network learning", ICLR 2019.
    """
    right = past.correct
    events = (right[:-1] & ~right[1:]).sum(0)
    never = len(right) if settings.never == "presentations" else 0
    return np.where(right.any(0), events, never).astype(np.float64)


def aum(past: History, _: Settings) -> F64:
    """Area under the margin: mean over epochs of the label's logit minus the largest other. float64 of shape (n,). Low is hard.

    Source: Pleiss et al., "Identifying mislabeled data using the area under the margin ranking", NeurIPS 2020.
    """
    return _mean(past.logit_margin)


def correct(past: History, _: Settings) -> F64:
    """Share of presentations that were right: float64 of shape (n,), in [0, 1]. Low is hard.

    Source: Swayamdipta et al., "Dataset cartography", EMNLP 2020.
    """
    return np.asarray(past.correct.mean(0, dtype=np.float64))


def p_true(past: History, settings: EpochsSettings) -> F64:
    """Mean probability of the label over the first epochs: float64 of shape (n,), in [0, 1]. Low is hard.

    Source: Swayamdipta et al. 2020 ("confidence"), over all epochs.
    """
    return _mean(past.p_true[: settings.epochs])


def dyn_unc(past: History, settings: WindowSettings) -> F64:
    """Dynamic uncertainty: the standard deviation (unbiased) of the label's probability in a window of epochs, mean over all windows,
    which slide by one epoch: float64 of shape (n,), at least 0. High is hard.

    Source: He et al., "Large-scale dataset pruning with dynamic uncertainty", CVPR Workshops 2024.
    Raises SourceError for one epoch, which has no deviation.
    """
    return _mean(spread for _, spread in _windows("dyn_unc", past.p_true, settings.window))


def dual(past: History, settings: DualSettings) -> F64:
    """Difficulty and uncertainty: as `dyn_unc`, over the first epochs, each window's deviation times one minus its mean: float64 of shape
    (n,), at least 0. High is hard.

    Source: Cho et al., "Lightweight dataset pruning without full training via example difficulty and prediction uncertainty", ICML 2025.
    Raises SourceError for one epoch.
    """
    windows = _windows("dual", past.p_true[: settings.epochs], settings.window)
    return _mean(spread * (1 - mean) for mean, spread in windows)


def tdds(past: History, settings: TddsSettings) -> F64:
    """Temporal dual-depth scoring: how much the change of the output from epoch to epoch varies: float64 of shape (n,), at least 0. High
    is hard.

    The change is K_t = sum over classes of |p_{t+1} log(p_{t+1} / p_t)|. A window of J epochs holds J - 1 changes; R is the norm of their
    differences from their mean; with decay b and W windows, the score is the sum over k < W of R_k b (1 - b)^(W - 1 - k).
    Source: Zhang et al., "Spanning training progress: temporal dual-depth scoring (TDDS) for enhanced dataset pruning", CVPR 2024.
    Raises UsageError without logits, SourceError for fewer than 3 epochs, whose one change has nothing to differ from.
    """
    if past.logits is None:
        raise UsageError("tdds needs whole logits: make the teacher with --record logits")
    epochs = min(settings.epochs or len(past.correct), len(past.correct))
    _enough("tdds", epochs, 3)
    window = min(settings.window, epochs)
    total = np.zeros(past.correct.shape[1])
    recent: list[F64] = []
    for k, change in enumerate(_changes(past.logits, epochs), start=2 - window):
        recent = [*recent, change][1 - window :]
        if k >= 0:
            mean = _mean(recent)
            spread = np.sqrt(_mean(np.square(one - mean) for one in recent) * len(recent))
            total += spread * settings.decay * (1 - settings.decay) ** (epochs - window - k)
    return total


def _changes(logits: Callable[[int], NDArray[np.floating]], epochs: int) -> Iterator[F64]:
    """K_t of each epoch but the last, two epochs in memory at once."""
    before = logits(0)
    rows = max(1, BLOCK // before.shape[1])
    for epoch in range(1, epochs):
        after = logits(epoch)
        yield np.concatenate([_change(before[at : at + rows], after[at : at + rows]) for at in range(0, len(after), rows)])
        before = after


def _change(before: NDArray[np.floating], after: NDArray[np.floating]) -> F64:
    # A difference of log-softmaxes: of finite logits it is finite, where a ratio of probabilities would be 0 / 0.
    log_p = _log_softmax(after)
    return np.asarray(np.abs(np.exp(log_p) * (log_p - _log_softmax(before))).sum(1))


def _log_softmax(logits: NDArray[np.floating]) -> F64:
    z = np.asarray(logits, np.float64, order="C")
    z = z - z.max(1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))


def _windows(name: str, values: NDArray[np.floating], window: int) -> Iterator[tuple[F64, F64]]:
    """Mean and unbiased standard deviation of each window of epochs: t - window + 1 of them, one where there are fewer epochs than that."""
    _enough(name, len(values), 2)
    window = min(window, len(values))
    for start in range(len(values) - window + 1):
        part = values[start : start + window]
        mean = _mean(part)
        yield mean, np.sqrt(_mean(np.square(one - mean) for one in part) * window / (window - 1))


def _enough(name: str, epochs: int, least: int) -> None:
    if epochs < least:
        raise SourceError(f"{name} needs {least} recorded epochs or more, not {epochs}: train the teacher for longer")


def _mean(rows: Iterable[NDArray[np.floating]]) -> F64:
    """Row after row in float64, so that the mean of a column does not depend on how many columns there are."""
    count, total = 0, np.zeros(())
    for row in rows:
        count, total = count + 1, total + row
    return np.asarray(total / count)


FROM_DYNAMICS: dict[str, DynamicsScore] = {
    "forgetting": DynamicsScore(forgetting, ForgettingSettings),
    "aum": DynamicsScore(aum),
    "correct": DynamicsScore(correct),
    "p_true": DynamicsScore(p_true, EpochsSettings),
    "dyn_unc": DynamicsScore(dyn_unc, WindowSettings, least=2),
    "dual": DynamicsScore(dual, DualSettings, least=2),
    "tdds": DynamicsScore(tdds, TddsSettings, logits=True, least=3),
}
