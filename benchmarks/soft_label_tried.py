"""What was tried around the coded cache and is not kept: other roundings and directions, and guesses of a view from its box or others.

Every variant is the kept code (`kdprune_data.formats.lowrank`) with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from soft_label_parts import TEMPERATURES, Array, Coded, Part, Said, Stepped

from kdprune_data.formats import lowrank
from kdprune_data.formats.lowrank import DEAD_ZONE, UNIT, Space

LEAST_WEIGHT = 0.02
"""Rows that weigh less in KL get no coarser step."""
LEAST_NOISE = 0.05
"""What comes back of an earlier view is at least so far from it, in shares of its variance."""
PRICE, SWEEPS = 0.075, 2
"""What a bit may cost, as a share of the KL that is aimed at; and how often every number is looked at."""
FEW_VIEWS = 16
"""From so many views on a sample may have coefficients of its own."""


class Guess(Protocol):
    """What a view's residuals along the directions are, by what the reader has by then."""

    arrays: Sequence[Array]
    """What is kept for it once a sample."""

    def of(self, v: int, before: Sequence[Array]) -> Array:
        """Of view v: shape (n, k). before: the residuals of earlier views, as they come back."""
        ...


@dataclass(frozen=True)
class Variant:
    """The kept code, and what can be changed in it. scale: what rows' steps are multiplied by, of the logits that the base stands for;
    guess: made from a part and its residuals, of shape (v, n, k), in steps; nats: how much KL a bit is worth, 0: only a dead zone."""

    space: Space
    multiple: int
    dead: float = DEAD_ZONE
    nats: float = 0.0
    scale: Callable[[Array], Array] | None = None
    guess: Callable[[Part, Array], Guess] | None = None

    def __call__(self, step: float, part: Part) -> Coded:
        book = self.space.codebook(step, self.multiple)
        directions, mean = book.vectors[1:] / UNIT, book.vectors[0] / UNIT
        back = np.linalg.pinv(directions)
        base = book.base_of(lowrank.centre(part.full).mean(0))
        size = self.multiple * (1.0 if self.scale is None else self.scale(book.decode(base, np.zeros(base.shape, np.int8))))
        residual = np.stack([((lowrank.centre(full) / book.step - mean) @ back - base) / size for full in part.full])
        guess = None if self.guess is None else self.guess(part, residual)

        def views() -> Iterator[tuple[list[Array], Callable[[float], Array]]]:
            before: list[Array] = []
            count = counted(rounded(residual, self.dead))
            for v, own in enumerate(residual):
                known = np.zeros(own.shape) if guess is None else guess.of(v, before)
                whole = rounded(own - known, self.dead)
                if self.nats:
                    form = metric(part.full[v], directions * book.step) * np.square(size).reshape(-1, 1, 1)
                    whole = weighed(whole, own - known, form, self.nats * bits(count))
                    count = (count if v else 0) + counted(whole)
                before.append(known + whole)
                again = ((base + size * before[-1]) @ directions + mean) * book.step
                yield [whole.astype(np.int8).T], lambda tau, again=again: again

        return Coded([base.T, *(guess.arrays if guess else ())], views())


def rounded(numbers: Array, dead: float) -> Array:
    """Down below `dead`."""
    return np.asarray(np.clip(np.sign(numbers) * np.floor(np.abs(numbers) + 1 - dead), -127, 127))


# --- rounding by what it costs


def counted(whole: Array) -> Array:
    """How often every whole number from -128 to 127 comes along each direction: shape (k, 256). whole: shape (..., k)."""
    return np.stack([np.bincount(one.ravel().astype(int) + 128, minlength=256) for one in np.moveaxis(whole, -1, 0)])


def bits(count: Array) -> Array:
    """What the numbers take that come so often: shape (k, 256)."""
    return np.asarray(-np.log2((count + 0.05) / (count + 0.05).sum(1, keepdims=True)))


def metric(full: Array, directions: Array) -> Array:
    """KL of an error along the directions, summed over the temperatures, as a quadratic form for each row: shape (n, k, k)."""
    p = [np.exp(lowrank.log_softmax(full, tau)) / tau for tau in TEMPERATURES]
    weight = sum(one / tau for one, tau in zip(p, TEMPERATURES, strict=True))
    along = np.stack([one @ directions.T for one in p], 1)
    return np.asarray(((weight[:, None] * directions) @ directions.T - along.transpose(0, 2, 1) @ along) / 2)


def weighed(whole: Array, exact: Array, form: Array, price: Array) -> Array:
    """Whole numbers changed one by one, to a neighbour or to 0, where that lowers KL and the price of the bits together."""
    whole, error = whole.copy(), whole - exact
    rows = np.arange(len(whole))
    for k in np.tile(np.arange(whole.shape[1]), SWEEPS):
        own = whole[:, k]
        others = np.stack([own, own - 1, own + 1, np.zeros(len(own))])
        apart = others - own
        slope = (form[:, k] * error).sum(1)
        cost = 2 * apart * slope + apart**2 * form[:, k, k] + price[k][np.clip(others, -128, 127).astype(int) + 128]
        best = others[cost.argmin(0), rows]
        error[:, k] += best - own
        whole[:, k] = best
    return whole


def by_row(own: Array) -> Array:
    """Steps of rows as KL weighs them: 1 / sqrt(sum over tau of (1 - sum of p_tau^2) / tau^2)."""
    weight = sum((1 - (np.exp(lowrank.log_softmax(own, tau)) ** 2).sum(1, keepdims=True)) / tau**2 for tau in TEMPERATURES)
    return np.asarray(1 / np.sqrt(np.maximum(weight, LEAST_WEIGHT)))


# --- other directions


def in_metric(part: Part) -> Space:
    """Principal directions after a change of coordinates in which errors of one length cost alike in KL at the first temperature, on
    average over the samples."""
    full = lowrank.centre(part.full)
    v, n, c = full.shape
    p = np.exp(lowrank.log_softmax(full.reshape(-1, c), TEMPERATURES[0]))
    values, turn = np.linalg.eigh((np.diag(p.sum(0)) - p.T @ p) / len(p))
    values = np.maximum(values, values.max() * 1e-4)
    values /= values[1:].mean()
    there, back = turn * np.sqrt(values) @ turn.T, turn / np.sqrt(values) @ turn.T
    own = full.mean(0)
    mean = own.mean(0)
    vectors = np.concatenate([(full - own).reshape(v * n, c) @ there, (own - mean) @ there]) / np.sqrt(v * n)
    found = np.linalg.eigh(vectors.T @ vectors)[1][:, ::-1].T
    spread = np.sqrt((((full - mean) @ there @ found.T) ** 2).mean((0, 1)))
    return Space(mean, found @ back, spread)


# --- guesses


@dataclass(frozen=True)
class OfBox:
    """A function of the box, with coefficients of each sample's own, fitted to all its views and rounded to half a step.

    features: of shape (n, v, m); arrays: m coefficients, of shape (k, n) each.
    """

    features: Array
    arrays: Sequence[Array]

    @classmethod
    def fit(cls, part: Part, residual: Array, *, quadratic: bool) -> OfBox:
        """By least squares."""
        middle = (part.boxes.max((0, 1)) + part.boxes.min((0, 1)).astype(float)) / 2
        reach = np.maximum(np.ptp(part.boxes, (0, 1)) / 2.0, 0.5)
        top, left, flip = np.moveaxis((part.boxes - middle) / reach, 2, 0)
        columns = [top, left, flip, *([top**2, left**2, top * left, top * flip, left * flip] if quadratic else [])]
        x = np.stack(columns, -1).transpose(1, 0, 2)
        x = x - x.mean(1, keepdims=True)
        across = x.transpose(0, 2, 1)
        found = np.linalg.solve(across @ x + 1e-3 * np.eye(x.shape[2]), across @ residual.transpose(1, 0, 2))
        return cls(x, [np.clip(np.rint(one * 2), -127, 127).astype(np.int8).T for one in found.transpose(1, 0, 2)])

    def of(self, v: int, before: Sequence[Array]) -> Array:
        """See `Guess`."""
        return np.asarray(sum(self.features[:, v, m, None] * one.T / 2 for m, one in enumerate(self.arrays)))


@dataclass(frozen=True)
class OfEarlier:
    """The best linear guess from earlier views, by how alike views of such boxes are; `nearest`: from the most alike one only.

    boxes: of shape (v, n), numbers of boxes; alike: correlations of their views, of shape (boxes, boxes); noise: of what comes back.
    """

    boxes: Array
    alike: Array
    noise: float
    nearest: bool
    arrays: Sequence[Array] = ()

    def of(self, v: int, before: Sequence[Array]) -> Array:
        """See `Guess`."""
        if not before:
            return np.zeros(1)
        seen, there = np.stack(before, 1), self.boxes[:v].T
        like = self.alike[there, self.boxes[v][:, None]]
        if self.nearest:
            at = like.argmax(1)[:, None]
            weight = np.take_along_axis(like, at, 1) / (1 + self.noise)
            return np.asarray(np.take_along_axis(seen, at[..., None], 1)[:, 0] * weight)
        among = self.alike[there[:, :, None], there[:, None]] + self.noise * np.eye(v)
        return np.asarray((np.linalg.solve(among, like[..., None]) * seen).sum(1))


def likeness(part: Part) -> tuple[Array, Array]:
    """The boxes there are, of shape (boxes, 3), and how their views' deviations from a sample's mean correlate: (boxes, boxes)."""
    apart = lowrank.centre(part.full)
    apart -= apart.mean(0)
    boxes = part.boxes.astype(int)
    total, count = np.zeros((256, 256, 2)), np.full((256, 256, 2), 1e-9)
    for a in range(len(apart)):
        for b in range(a + 1):
            at = tuple(np.abs(boxes[a] - boxes[b]).T)
            np.add.at(total, at, (apart[a] * apart[b]).sum(1))
            np.add.at(count, at, 1)
    found = np.unique(boxes.reshape(-1, 3), axis=0)
    between = tuple(np.abs(found[:, None] - found).transpose(2, 0, 1))
    values, vectors = np.linalg.eigh((total / count)[between] / (total / count)[0, 0, 0])
    return found, np.asarray(vectors * np.maximum(values, 0) @ vectors.T)  # measured ones need not be those of anything


# --- all


def variants(said: Said, views: int, bound: float) -> dict[str, Stepped]:
    """By name; the first is what is kept. Of many views, which take long, only what they change."""
    few, multiple = said.views(views), lowrank.multiple_for(views)
    kept = Variant(lowrank.fit(few.fit.full), multiple, nats=PRICE * bound)
    alone = replace(kept, nats=0.0)
    found: dict[str, Stepped] = {
        "as kept": kept,
        "each number rounded by itself, down below 0.6": alone,
        "directions in the metric of KL": replace(kept, space=in_metric(few.fit)),
    }
    if views < FEW_VIEWS:
        found |= {
            "each number rounded by itself, to the nearest": replace(alone, dead=0.5),
            "each number rounded by itself, down below 0.7": replace(alone, dead=0.7),
            "each by itself, in steps by its row's weight in KL": replace(alone, scale=by_row),
            "a bit at half the price": replace(kept, nats=kept.nats / 2),
            "a bit at 1.4 times the price": replace(kept, nats=kept.nats * 1.4),
        }
    found |= {f"{m} base steps in one of a residual": replace(kept, multiple=m) for m in (1, 2, 4, 8) if m != multiple}
    return found | _guesses(kept, said, views)


def _guesses(kept: Variant, said: Said, views: int) -> dict[str, Stepped]:
    boxes, alike = likeness(said.fit)
    places = {tuple(box): n for n, box in enumerate(boxes.tolist())}

    def earlier(part: Part, residual: Array, *, nearest: bool) -> Guess:
        error = np.mean((residual - rounded(residual, DEAD_ZONE)) ** 2) / np.mean(residual**2)
        numbers = np.array([[places.get(tuple(box), 0) for box in view] for view in part.boxes.tolist()])
        return OfEarlier(numbers, alike, max(float(error), LEAST_NOISE), nearest)

    found: dict[str, Stepped] = {
        "a guess from the nearest earlier view": replace(kept, guess=partial(earlier, nearest=True)),
        "a guess from all earlier views": replace(kept, guess=partial(earlier, nearest=False)),
    }
    if views >= FEW_VIEWS:
        found["a linear function of the box for each sample"] = replace(kept, guess=partial(OfBox.fit, quadratic=False))
        found["a quadratic one"] = replace(kept, guess=partial(OfBox.fit, quadratic=True))
    return found
