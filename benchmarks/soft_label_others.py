"""Codes of soft labels that the coded cache is compared with: plain numbers, the largest few logits, rounded rows, and a sample's mean with
rounded residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from soft_label_parts import TEMPERATURES, Array, Code, Coded, Part, Stepped

from kdprune_data.formats import lowrank
from kdprune_data.formats.logit_files import stored

LEAST_STEP, LARGEST_STEP = 1 / 16, 8.0
"""Between these, in shares of the step, are steps that depend on probabilities."""


def plain(dtype: str, *, zstd: bool = False) -> Code:
    """z - max(z) in a type of numbers."""

    def code(part: Part) -> Coded:
        kept = (stored(full, dtype) for full in part.full)
        return Coded([], (([one.T], lambda tau, one=one: one) for one in kept), zstd)

    return code


def largest(k: int, *, zstd: bool = False) -> Code:
    """The largest k, always with the label's: class numbers, float16 logits, and one number for all others, which share alike what is left.

    That number is right for one temperature alone; each temperature gets its own here, as if the cache had been made for it, and its bytes
    are counted once.
    """

    def view(full: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[list[Array], Callable[[float], Array]]:
        z = full - full.max(1, keepdims=True)
        classes = z.shape[1]
        ranked = z.copy()
        ranked[np.arange(len(z)), labels] = np.inf
        at = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(z, at, 1).astype(np.float16)
        others = z.astype(np.float64)
        np.put_along_axis(others, at, -np.inf, 1)

        def rest(tau: float) -> Array:
            left = tau * np.log(np.exp(others / tau).sum(1, keepdims=True) / max(classes - k, 1) + 1e-300)
            return np.maximum(left, np.finfo(np.float16).min).astype(np.float16)

        def again(tau: float) -> Array:
            found = np.repeat(rest(tau).astype(np.float64), classes, 1)
            np.put_along_axis(found, at, kept.astype(np.float64), 1)
            return found

        return [at.astype(np.uint8 if classes <= 256 else np.uint16).T, kept.T, rest(TEMPERATURES[0])], again

    return lambda part: Coded([], (view(full, part.labels) for full in part.full), zstd)


def affine(bits: int, *, zstd: bool = False) -> Code:
    """Whole numbers of so many bits between a row's least and largest logit, and these two as float16."""

    def view(full: NDArray[np.float32]) -> tuple[list[Array], Callable[[float], Array]]:
        z = full - full.max(1, keepdims=True)
        low = z.min(1, keepdims=True).astype(np.float16)
        step = (-low.astype(np.float32) / (2**bits - 1)).astype(np.float16)
        scale = np.maximum(step.astype(np.float32), 1e-7)
        whole = np.clip(np.rint((z - low) / scale), 0, 2**bits - 1).astype(np.uint8)
        again = whole * scale + low
        if bits == 4:
            pairs = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)))
            whole = pairs[:, ::2] | pairs[:, 1::2] << 4
        return [whole.T, low, step], lambda tau: again

    return lambda part: Coded([], (view(full) for full in part.full), zstd)


def residuals(part: Part, steps: Callable[[Array], Array], *, ranked: bool = False, unit: float = 0.0) -> Coded:
    """A sample's mean logits, and of each view what is left, rounded in steps that depend on the mean. steps: mean logits of shape (n, c)
    to steps of shape (n, c) or (n, 1); ranked: the class with the smallest step comes first, not class 0; unit: the mean is rounded to so
    many nats, 0: it is float16."""
    exact = lowrank.centre(part.full).mean(0)
    mean = np.rint(exact / unit).astype(np.int16) if unit else exact.astype(np.float16)
    own = mean.astype(np.float64) * (unit or 1)
    step = np.broadcast_to(steps(own), own.shape)
    order = np.argsort(step, axis=1, kind="stable")

    def view(full: NDArray[np.float32]) -> tuple[list[Array], Callable[[float], Array]]:
        whole = np.rint((lowrank.centre(full) - own) / step)
        again = own + whole * step
        if ranked:
            whole = np.take_along_axis(whole, order, 1)
        # What a byte does not hold is kept beside the bytes: its place and its value.
        beyond = np.flatnonzero(np.abs(whole) > 127)
        kept = [np.clip(whole, -127, 127).astype(np.int8).T, beyond.astype(np.int32), whole.ravel()[beyond].astype(np.int16)]
        return kept, lambda tau: again

    return Coded([mean.T], map(view, part.full))


def uniform(step: float, part: Part) -> Coded:
    """All residuals in one step."""
    return residuals(part, lambda own: np.full((len(own), 1), step))


def by_probability(step: float, part: Part) -> Coded:
    """Steps of `step` / sqrt(p C), p being the probability in the mean, within bounds."""

    def steps(own: Array) -> Array:
        p = np.exp(lowrank.log_softmax(own, 1))
        return step * np.clip(1 / np.sqrt(p * own.shape[1]), LEAST_STEP, LARGEST_STEP)

    return residuals(part, steps)


def by_kl(step: float, part: Part, *, ranked: bool = False, rounded: bool = False) -> Coded:
    """Steps of `step` / sqrt(w), w being what KL at the temperatures gives for a small error squared: the sum of p_tau / tau^2."""

    def steps(own: Array) -> Array:
        weight = sum(np.exp(lowrank.log_softmax(own, tau)) / tau**2 for tau in TEMPERATURES)
        return step * np.clip(1 / np.sqrt(weight * own.shape[1]), LEAST_STEP, LARGEST_STEP)

    return residuals(part, steps, ranked=ranked, unit=step / 4 if rounded else 0)


FIXED: dict[str, Code] = {
    "float32": plain("float32"),
    "float16": plain("float16"),
    "float16, zstd": plain("float16", zstd=True),
    "top-10, float16": largest(10),
    "top-40, float16": largest(40),
    "top-40, float16, zstd": largest(40, zstd=True),
    "int4 a row": affine(4),
    "int4 a row, zstd": affine(4, zstd=True),
    "int8 a row": affine(8),
    "int8 a row, zstd": affine(8, zstd=True),
    "mean + residual, step 0.5": lambda part: uniform(0.5, part),
    "mean + residual, step 1 / sqrt(p C)": lambda part: by_probability(1.0, part),
}
"""Codes as they are."""
STEPPED: dict[str, Stepped] = {
    "mean + residual, one step": uniform,
    "mean + residual, step by p": by_probability,
    "mean + residual, step by KL": by_kl,
    "mean + residual, step by KL, ranked": partial(by_kl, ranked=True),
    "rounded mean + residual, step by KL, ranked": partial(by_kl, ranked=True, rounded=True),
}
"""Codes whose step is chosen for a fidelity."""
