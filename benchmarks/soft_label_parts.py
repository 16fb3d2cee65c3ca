"""What the benchmark of soft-label codes works on: logits of many views of some samples, coded, and what they cost.

A code turns a `Part` into a `Coded`: arrays that are kept once a sample and for each view, and the logits that come back. `measure` counts
the bytes of the arrays, compressed where the code compresses, and the KL divergence of what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from kdprune_pipelines._storing import MARGIN, PROBE_VIEWS, TEMPERATURES
from numpy.typing import NDArray

from kdprune_data.formats import lowrank
from kdprune_data.formats.logit_files import ZSTD_LEVEL

Array = NDArray[Any]
HALVINGS = 8


@dataclass(frozen=True)
class Part:
    """full: what a teacher said, float32 of shape (v, n, c), v views of n samples; labels: int64 of shape (n,); boxes: int8 of shape
    (v, n, 3), top, left and flip of each view."""

    full: NDArray[np.float32]
    labels: NDArray[np.int64]
    boxes: NDArray[np.int8]

    def samples(self, at: slice) -> Part:
        """Some of the samples."""
        return Part(self.full[:, at], self.labels[at], self.boxes[:, at])

    def views(self, v: int) -> Part:
        """The first views."""
        return replace(self, full=self.full[:v], boxes=self.boxes[:v])


@dataclass(frozen=True)
class Said:
    """fit: samples that directions and predictors are learned from; chosen: those that steps are chosen on; other: those that are
    measured. `size`: the side of an image in pixels."""

    name: str
    fit: Part
    chosen: Part
    other: Part
    size: int

    def views(self, v: int) -> Said:
        """The first views; of those that a code is learned from no more than `cache` looks at."""
        few = min(v, PROBE_VIEWS)
        return replace(self, fit=self.fit.views(few), chosen=self.chosen.views(few), other=self.other.views(v))


@dataclass(frozen=True)
class Coded:
    """base: what is kept once, an array whose last axis or first is the samples; views: of each view in turn the arrays that are kept,
    and what gives the logits that come back at a temperature; zstd: whether arrays are compressed."""

    base: Sequence[Array]
    views: Iterable[tuple[Sequence[Array], Callable[[float], Array]]]
    zstd: bool = True


Code = Callable[[Part], Coded]
Stepped = Callable[[float, Part], Coded]
"""A code whose fidelity a step decides: the larger, the coarser."""


def packed(arrays: Sequence[Array], level: int = ZSTD_LEVEL, codec: str = "zstd") -> int:
    """Bytes of arrays, each compressed by itself as a buffer of an Arrow file is."""
    made = pa.Codec(codec, compression_level=level)
    return sum(len(made.compress(np.ascontiguousarray(one))) for one in arrays if one.size)


def geometry(said: Said) -> float:
    """Bytes of a view's box and flip as a coded cache keeps them, alike for all codes."""
    boxes, side = said.other.boxes, np.full(said.other.boxes.shape[1], said.size, np.int16 if said.size > 127 else np.int8)
    each = [packed([top, left, side, side, np.packbits(flip)]) for top, left, flip in np.moveaxis(boxes, 2, 1)]
    return float(np.mean(each)) / boxes.shape[1]


def measure(coded: Coded, part: Part, geometry: float, **options: Any) -> dict[str, Any]:
    """Bytes and mean KL(full || stored). options: of `packed`."""
    v, n = part.full.shape[:2]
    lost, view_bytes = dict.fromkeys(TEMPERATURES, 0.0), 0

    def size(arrays: Sequence[Array]) -> int:
        return packed(arrays, **options) if coded.zstd else sum(one.nbytes for one in arrays)

    for full, (arrays, again) in zip(part.full, coded.views, strict=True):
        view_bytes += size(arrays)
        for tau in lost:
            lost[tau] += lowrank.mean_kl(full, again(tau), tau) / v
    base, view = size(coded.base) / n, view_bytes / n / v
    row = {"base, bytes a sample": base, "view, bytes": view, "bytes per view": base / v + view + geometry}
    return row | {f"KL at {tau:g}": kl for tau, kl in lost.items()}


def worst(coded: Coded, part: Part) -> float:
    """The largest of the mean KLs at the temperatures."""
    lost = dict.fromkeys(TEMPERATURES, 0.0)
    for full, (_, again) in zip(part.full, coded.views, strict=True):
        for tau in lost:
            lost[tau] += lowrank.mean_kl(full, again(tau), tau)
    return max(lost.values()) / len(part.full)


def coarsest(code: Stepped, part: Part, bound: float, *, high: float = 32.0) -> float:
    """The largest step within the bound on the samples that steps are chosen on, found as `cache` finds its own."""
    bound *= MARGIN
    low = high / 2
    while worst(code(low, part), part) > bound:
        low, high = low / 2, low
        if low < 1e-6:
            raise SystemExit(f"no step keeps KL within {bound:g}")
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if worst(code(middle, part), part) <= bound else (low, middle)
    return low


def same_kl(code: Stepped, part: Part, bound: float, *, start: float) -> float | None:
    """The largest step with which the largest of the mean KLs is the bound, to a hundredth of it where it can be: codes are compared at one
    KL. None where none has it: with a price on bits KL grows again where steps are small."""
    low, high, step = 0.0, np.inf, start
    for _ in range(16):
        share = worst(code(step, part), part) / bound
        if abs(share - 1) < 0.01:
            return step
        low, high = (max(low, step), high) if share < 1 else (low, min(high, step))
        step = float(np.clip(step * share**-0.6, step / 1.25, step * 1.25))
        if not low < step < high:
            step = float(np.sqrt(low * high))
        if step < start / 8:
            return None
    return low if high < 1.05 * low else None


def entropy(arrays: Sequence[Array]) -> float:
    """Bytes that numbers of shape (k, n) take where each of the k rows is coded by its own frequencies, all arrays by the same, which are
    known: no coder of single numbers does better."""
    bits = 0.0
    for row in np.concatenate(arrays, 1):
        count = np.unique(row, return_counts=True)[1]
        bits -= float((count * np.log2(count / count.sum())).sum())
    return bits / 8
