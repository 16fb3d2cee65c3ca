"""The coded form of logits: whole numbers along a few directions that all samples share. `docs/formats.md`, "Logits".

1. `fit` learns from a probe the mean of the logits and their principal directions, mostly of what views of one sample differ in.
2. A `Codebook` turns logits into whole numbers, `base` once a sample and `residual` for each view, and back into the same float32 on
   any machine. `kdprune_data.formats.rounding` chooses its step, and the numbers.

Why not the largest few logits, the field's habit: their tail is what distillation is about, and a sample's views share nearly all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import KdpruneError

UNIT = 1024
"""Directions are unit vectors in whole numbers of this many parts; the mean is in such parts of a step."""
DEAD_ZONE = 0.6
"""Residuals that are rounded each by itself are rounded down below this: at equal KL it takes about 7 % fewer bytes than 0.5."""
MOST_DIRECTIONS = 512
LARGEST = 127
"""What a residual reaches."""
EXACT = 2**24
"""Whole numbers below this are exact in float32, and so are their sums, in whatever order."""
FIT_VECTORS = 8192
"""Directions are learned from this many vectors at most."""


def multiple_for(views: int) -> int:
    """How many base steps a residual step is, for a first range of so many views.

    A base that is finer than the residuals makes these smaller, and is paid for once a sample.
    """
    return 1 if views == 1 else 2 if views < 16 else 4


@dataclass(frozen=True)
class Codebook:
    """What decoding needs. vectors: int32 of shape (k + 1, c), the mean and then the directions; step: nats of one unit of `base`;
    multiple: units of `base` in one of `residual`."""

    vectors: NDArray[np.int32]
    step: float
    multiple: int

    @property
    def directions(self) -> int:
        """How many there are."""
        return len(self.vectors) - 1

    def decode(self, base: NDArray[np.int16], residual: NDArray[np.int8]) -> NDArray[np.float32]:
        """Logits less their largest: float32 of shape (n, c). base, residual: of shape (n, k)."""
        whole = self.whole(base, residual)
        whole -= whole.max(1, keepdims=True)
        found = whole.astype(np.float32, copy=False)
        found *= np.float32(self.step / UNIT)
        return found

    def whole(self, base: NDArray[np.int16], residual: NDArray[np.int8]) -> NDArray[np.floating]:
        """Logits in parts of a step, whole numbers in float32 or float64, exactly: of shape (n, c). base, residual: of shape (n, k)."""
        most = max(int(base.max(initial=0)), -int(base.min(initial=0))) + 128 * self.multiple
        kind: type[np.floating] = np.float32 if most * self._reach[1] + self._reach[0] < EXACT else np.float64
        vectors = self._vectors32 if kind is np.float32 else self._vectors64
        number: NDArray[np.floating] = residual.astype(kind)
        number *= self.multiple
        number += base
        whole: NDArray[np.floating] = number @ vectors[1:]
        whole += vectors[0]
        return whole

    @cached_property
    def _reach(self) -> tuple[int, int]:
        """The largest number of the mean, and how far the directions reach together."""
        size = np.abs(self.vectors, dtype=np.int64).max(1)
        return int(size[0]), int(size[1:].sum())

    @cached_property
    def _vectors32(self) -> NDArray[np.float32]:
        return self.vectors.astype(np.float32)

    @cached_property
    def _vectors64(self) -> NDArray[np.float64]:
        return self.vectors.astype(np.float64)

    def base_of(self, mean: NDArray[np.floating]) -> NDArray[np.int16]:
        """What rounds the mean logits of samples: int16 of shape (n, k). mean: of shape (n, c)."""
        return np.asarray(np.clip(np.rint(self._coordinates(mean)), -32767, 32767), np.int16)

    def residual_of(self, logits: NDArray[np.floating], base: NDArray[np.int16]) -> NDArray[np.int8]:
        """What a view adds to the base, each number rounded by itself: int8 of shape (n, k). logits: of shape (n, c)."""
        apart = (self._coordinates(logits) - base) / self.multiple
        whole = np.floor(np.abs(apart) + (1 - DEAD_ZONE)) * np.sign(apart)
        return np.asarray(np.clip(whole, -LARGEST, LARGEST), np.int8)

    def _coordinates(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Along the directions, in units of the base: float64 of shape (n, k)."""
        centred = centre(logits) / self.step - self.vectors[0] / UNIT
        return np.asarray(centred @ self._back)

    @cached_property
    def _back(self) -> NDArray[np.float64]:
        """From logits to what they are along the directions. With 1,000 classes it takes as long to make as thousands of rows to round."""
        return np.asarray(np.linalg.pinv(self.vectors[1:] / UNIT))


@dataclass(frozen=True)
class Space:
    """Where logits lie. mean: float64 of shape (c,); directions: float64 of shape (k, c), unit vectors, the most important first; spread:
    float64 of shape (k,), the deviation along each, in nats."""

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]
    spread: NDArray[np.float64]

    def codebook(self, step: float, multiple: int) -> Codebook:
        """With a step of the residuals, in nats. Directions along which nothing reaches a third of a base step are left out."""
        unit = step / multiple
        wide = max(1, int((self.spread >= unit / 3).sum()))
        mean = np.rint(self.mean / unit * UNIT)
        if np.abs(mean).max() >= 2**31:
            raise KdpruneError(
                f"logits of a mean of up to {np.abs(self.mean).max():.3g} cannot be coded in steps of {step:.3g}: use --dtype float32"
            )
        return Codebook(np.asarray(np.vstack([mean, np.rint(self.directions[:wide] * UNIT)]), np.int32), unit, multiple)


def centre(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logits less their mean over the classes, which no softmax sees: float64, shape as given."""
    wide = logits.astype(np.float64)
    return np.asarray(wide - wide.mean(-1, keepdims=True))


def fit(logits: NDArray[np.float32]) -> Space:
    """Mean and principal directions of some samples' logits. logits: of shape (v, n, c), v views of n samples."""
    v, n, _ = logits.shape
    apart = centre(logits)
    mean = apart.mean((0, 1))
    own = apart.mean(0)
    # Each direction is paid for in every view by what views differ in along it, and once a sample by what samples do.
    vectors = np.concatenate([(apart - own).reshape(v * n, -1) / np.sqrt(v * n), (own - mean) / np.sqrt(v * n)])
    if len(vectors) > FIT_VECTORS:
        at = np.arange(FIT_VECTORS) * len(vectors) // FIT_VECTORS
        vectors = vectors[at] * np.sqrt(len(vectors) / FIT_VECTORS)
    directions = _principal(vectors)
    spread = np.sqrt((((apart - mean) @ directions.T) ** 2).mean((0, 1)))
    return Space(mean, directions, spread)


def _principal(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Right singular vectors, of the largest singular value first: float64 of shape (k, c), at most MOST_DIRECTIONS."""
    m, c = vectors.shape
    if c <= m:
        return np.ascontiguousarray(np.linalg.eigh(vectors.T @ vectors)[1][:, ::-1][:, :MOST_DIRECTIONS].T)
    values, left = np.linalg.eigh(vectors @ vectors.T)
    kept = np.flatnonzero(values > 1e-12 * max(values[-1], 1e-300))[::-1][:MOST_DIRECTIONS]
    found = (left[:, kept] / np.sqrt(values[kept])).T @ vectors
    return np.asarray(found if len(kept) else np.eye(1, c))


def mean_kl(full: NDArray[np.floating], stored: NDArray[np.floating], temperature: float) -> float:
    """Mean KL(full || stored) of softmax at a temperature, in nats. full, stored: logits, of shape (..., c)."""
    return float(kl(full, stored, temperature).mean())


def kl(full: NDArray[np.floating], stored: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """KL(full || stored) of softmax at a temperature, in nats: logits of shape (..., c) twice to float64 of shape (...)."""
    p, q = log_softmax(full, temperature), log_softmax(stored, temperature)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def log_softmax(logits: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """log of softmax(logits / temperature), float64, shape as given."""
    z = logits.astype(np.float64) / temperature
    z -= z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))
