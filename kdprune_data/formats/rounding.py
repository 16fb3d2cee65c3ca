"""Which whole numbers a view is coded by: those that cost the fewest bits for the KL divergence that they leave.

Rounding each number to its nearest keeps all classes alike; but softmax hardly looks at classes of small probability, and directions can
make up for one another. So each number is moved, one direction after another, where the bits that it saves are worth the KL it costs:

    cost = sum over temperatures of KL + price * bits,    KL = d' F d / (2 tau^2),  F = diag(p) - p p',  d = what is wrong with the logits

to second order in d, p being the teacher's softmax at temperature tau. At equal KL this takes half the bytes (docs/soft-labels.md). It is
the writer's affair: a reader adds up what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import KdpruneError
from kdprune_data.formats.lowrank import LARGEST, UNIT, Codebook, Space, centre, log_softmax, mean_kl

PRICE = 0.08
"""KL that a bit may cost, as a share of the KL that is aimed at: its slope where some twenty numbers a view are not 0."""
SWEEPS = 2
CHEAPER = (1.0, 0.4, 0.15, 0.03)
"""Shares of PRICE that are tried in turn, until a step is found that keeps the bound."""
LESSONS = 2
"""How many times in turn residuals are rounded, and what numbers cost is learned from them."""
FINEST, HALVINGS = 16, 6
"""How many times the step is halved to find one that is fine enough, and then the interval in which the largest lies."""
TRIED = 4
"""Views on which a step is tried."""
AT_ONCE = 512
"""Rows that are rounded together: what they take stays in the processor's cache."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Rounding:
    """How the residuals of a codebook are rounded. price: KL that a bit may cost, in nats; zero, fall: float64 of shape (k,), for each
    direction the share of numbers that are 0, and by what the share falls from each magnitude above 0 to the next."""

    temperatures: Sequence[float]
    price: float
    zero: NDArray[np.float64]
    fall: NDArray[np.float64]

    @classmethod
    def learn(cls, residuals: Sequence[NDArray[np.int8]], temperatures: Sequence[float], price: float) -> Rounding:
        """From residuals, int8 of shape (n, k) each, as they were rounded before."""
        size = np.abs(np.concatenate(residuals).astype(np.int64))
        other = (size > 0).sum(0)
        mean = (size.sum(0) + 1) / (other + 1)
        zero, fall = 1 - (other + 0.5) / (len(size) + 1), 1 - 1 / np.maximum(mean, 1.02)
        return cls(temperatures, price, np.round(zero, 6), np.round(fall, 6))

    @classmethod
    def of_json(cls, stored: dict[str, Any], temperatures: Sequence[float]) -> Rounding:
        """As `to_json` gave it."""
        return cls(temperatures, float(stored["price"]), np.array(stored["zero"], np.float64), np.array(stored["fall"], np.float64))

    def to_json(self) -> dict[str, Any]:
        """For the metadata of a codebook: views that are added later are rounded alike."""
        return {"price": self.price, "zero": self.zero.tolist(), "fall": self.fall.tolist()}

    def bits(self) -> F32:
        """What each magnitude costs: float32 of shape (k, LARGEST + 2), endless beyond LARGEST."""
        above = np.arange(1, LARGEST + 1)
        others = -np.log2((1 - self.zero) / 2 * (1 - self.fall))[:, None] - (above - 1) * np.log2(self.fall)[:, None]
        return np.hstack([-np.log2(self.zero)[:, None], others, np.full((len(self.zero), 1), np.inf)]).astype(np.float32)

    def residual_of(self, book: Codebook, logits: NDArray[np.floating], base: NDArray[np.int16]) -> NDArray[np.int8]:
        """What a view adds to the base: int8 of shape (n, k). logits: of shape (n, c); base: of shape (n, k)."""
        found, cost = book.residual_of(logits, base), self.price * self.bits()
        for at in order.batches(np.arange(len(logits)), AT_ONCE):
            found[at] = _moved(book, logits[at], base[at], found[at], (self.temperatures, cost))
        return found


def _moved(
    book: Codebook,
    logits: NDArray[np.floating],
    base: NDArray[np.int16],
    residual: NDArray[np.int8],
    worth: tuple[Sequence[float], F32],
) -> NDArray[np.int8]:
    """The residuals of some rows after every number was moved where that is worth it. worth: the temperatures, and KL by magnitude."""
    temperatures, cost = worth
    unit = (book.vectors[1:] * (book.step * book.multiple / UNIT)).astype(np.float32)
    p = [np.exp(log_softmax(logits, tau)).astype(np.float32) / np.float32(tau) for tau in temperatures]
    weight = np.sum([one / np.float32(tau) for one, tau in zip(p, temperatures, strict=True)], 0)
    along = [one @ unit.T for one in p]  # p' v of each direction v, over tau as p is
    bend = weight @ (unit**2).T - np.sum([one**2 for one in along], 0)  # v' F v of each direction
    found = residual.astype(np.int64)
    wrong = (book.whole(base, residual) * (book.step / UNIT) - centre(logits)).astype(np.float32)
    slope = weight * wrong - np.sum([one * (one * wrong).sum(1, keepdims=True) for one in p], 0)  # F d
    for _ in range(SWEEPS):
        for k in range(len(unit)):
            step = _best_step(found[:, k], slope @ unit[k], bend[:, k], cost[k])
            at = np.flatnonzero(step)
            if len(at):
                found[at, k] += step[at]
                change = weight[at] * unit[k] - np.sum([one[at] * own[at, k, None] for one, own in zip(p, along, strict=True)], 0)
                slope[at] += step[at].astype(np.float32)[:, None] * change
    return found.astype(np.int8)


def _best_step(now: NDArray[np.int64], slope: F32, bend: F32, cost: F32) -> NDArray[np.int64]:
    """By what to move each row's number of one direction: one inward, one outward, to 0, or not at all.

    now, slope, bend: of shape (n,), the numbers, and first and second derivative of KL; cost: KL by magnitude, of shape (LARGEST + 2,).
    """
    size = np.abs(now)
    # What is 0 goes where KL falls.
    away = np.where(now == 0, np.where(slope > 0, -1, 1), np.sign(now))
    steps = np.stack([-away, away, -now])
    price = np.stack([cost[np.maximum(size - 1, 0)], cost[size + 1], cost[np.zeros_like(size)]]) - cost[size]
    gain = steps * slope + 0.5 * steps**2 * bend + price
    gain[0, size == 0] = np.inf
    best = gain.argmin(0)
    rows = np.arange(len(now))
    return np.where(gain[best, rows] < 0, steps[best, rows], 0)


@dataclass(frozen=True)
class Code:
    """A code that was chosen. kl: of the samples that it was chosen on, by temperature."""

    book: Codebook
    rounding: Rounding
    kl: dict[float, float]


def coarsest(space: Space, logits: NDArray[np.float32], *, multiple: int, bound: float, temperatures: Sequence[float]) -> Code:
    """The code of the largest step with which mean KL(full || stored) is within the bound at every temperature.

    logits: float32 of shape (v, n, c), of other samples than the space was learned from; KL is measured on the first TRIED of the views.
    Raises KdpruneError where no step does it.
    """
    own, logits = centre(logits).mean(0), logits[:TRIED]

    def measure(step: float, price: float) -> Code:
        book = space.codebook(step, multiple)
        base = book.base_of(own)
        residuals = [book.residual_of(view, base) for view in logits]
        for _ in range(LESSONS):
            rounding = Rounding.learn(residuals, temperatures, price)
            residuals = [rounding.residual_of(book, view, base) for view in logits]
        again = np.stack([book.decode(base, residual) for residual in residuals])
        return Code(book, rounding, {tau: mean_kl(logits, again, tau) for tau in temperatures})

    least = (np.inf, 0.0)
    for share in CHEAPER:  # the more numbers a view has that are not 0, the less a bit may cost
        price = PRICE * bound * share
        found, worst = _within(lambda step, price=price: measure(step, price), space, bound)  # type: ignore[misc]  # a default binds it
        if found is not None:
            return found
        least = min(least, worst)
    what = f"no code keeps KL within {bound:g} at temperature {least[1]:g} (the best has {least[0]:.3g})"
    raise KdpruneError(f"{what}: leave out --fidelity, or raise it")


def _within(measure: Callable[[float], Code], space: Space, bound: float) -> tuple[Code | None, tuple[float, float]]:
    """The code of the largest step within the bound, None for none; and the largest KL of the best, with its temperature."""
    high = float(max(space.spread.max(), 1e-3)) * 4
    least, since, best = (np.inf, 0.0), 0, None
    for _ in range(FINEST):  # not from the finest up: there whole numbers overflow, and KL grows again
        low = _short(high / 2)
        found = measure(low)
        worst = max((kl, tau) for tau, kl in found.kl.items())
        least, since = (worst, 0) if worst[0] < least[0] else (least, since + 1)
        if worst[0] <= bound:
            best = found
            break
        if since == 2:
            return None, least
        high = low
    for _ in range(HALVINGS if best is not None else 0):
        middle = _short(np.sqrt(low * high))
        found = measure(middle)
        if max(found.kl.values()) <= bound:
            best, low = found, middle
        else:
            high = middle
    return best, least


def _short(step: float) -> float:
    """Few digits: a step stands in the file as text."""
    return float(f"{step:.6g}")
