"""Why soft labels are not what their teacher says: each usual mistake is made on purpose, and the one that gives what is stored is named.

A supposition is two arrays that would agree if it were true: what the teacher says, and what is stored, after the mistake. Those that only
look at the numbers come before those that ask the teacher again. Two suppositions need no second look at the images: logits that stand in
other rows are searched for in the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from kdprune_pipelines._witness import F64, I64, TEMPERATURES, Limits, Pairs, Witness, shifted, softmax

from kdprune_data.errors import KdpruneError

if TYPE_CHECKING:
    from torch import Tensor

    from kdprune_data.learn.views import Geometry, Policy

LOOKED_AT = 32
"""Pairs that suppositions are tried on."""
SHARDS_READ = 256
"""Whole views of shards that a search for swapped shards reads, about."""
SQUARED = 2000
"""Classes up to which it is looked for where each of them stands."""
ENOUGH = 0.25
"""A supposition that can be about some of the pairs alone is tried where it is about this share of them."""
CLOSE = 0.05
"""Logits that differ by less than this share of their spread are another precision's, not another network's."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = (0.5, 0.5, 0.5)
UNKNOWN = "another teacher, other weights, or a teacher in train mode, likely"
NEARBY = "the same teacher, likely, in another precision (bf16, TF32), or with another decoder or resize kernel"


class Supposition(NamedTuple):
    """What would be the matter, and what would then be the same: float64 of shape (k, c) both, of the k pairs that it speaks of."""

    text: str
    said: F64
    stored: F64


@dataclass(frozen=True)
class Case:
    """The pairs that do not agree; said: what the teacher says of them, z - max(z), float64 of shape (n, c)."""

    witness: Witness
    pairs: Pairs
    said: F64

    @property
    def places(self) -> I64:
        """Where the pairs' rows stand in the cache."""
        return self.witness.joined.place[self.pairs.rows]

    @property
    def shards(self) -> I64:
        """Of each pair the shard, as its number among the cache's."""
        return np.searchsorted(self.witness.joined.starts, self.places, side="right") - 1

    def with_boxes(self, boxes: Geometry | None, text: str) -> Supposition:
        """That the teacher saw other boxes."""
        return Supposition(text, self.witness.says(self.pairs.rows, boxes), self.pairs.stored)

    def drawn(self, policy: Policy, view: int) -> Geometry:
        """The boxes of a policy, in the view that comes so many after each pair's own."""
        from kdprune_data.learn.views import Geometry, geometry

        data, rows, numbers = self.witness.data, self.pairs.rows, self.pairs.views + view
        each = [geometry(policy, data.uids[[row]], data.sizes[[row]], int(n)) for row, n in zip(rows, numbers, strict=True)]
        sides = [np.concatenate([getattr(one, side) for one in each]) for side in ("top", "left", "height", "width", "flip")]
        return Geometry(*sides)


def cause(witness: Witness, pairs: Pairs, said: F64, limits: Limits) -> str:
    """What explains pairs that do not agree: a clause for a message. said: float64 of shape (n, c), what the teacher says of them."""
    first = np.arange(min(len(said), LOOKED_AT))
    case = Case(witness, pairs.take(first), said[first])
    fitting = (one for suspect in SUSPECTS for one in suspect(case) if limits.fit(one.said, one.stored))
    # Of a plain cache one fits to the last digit. What is coded is known roughly, and several may fit: then it is the nearest.
    found = (
        next(fitting, None)
        if limits.kl is None
        else min(fitting, key=lambda one: float(np.abs(one.said - one.stored).mean()), default=None)
    )
    if found is not None:
        return found.text
    off = np.sqrt(np.mean((case.said - case.pairs.stored) ** 2))
    return NEARBY if off < CLOSE * case.said.std() else UNKNOWN


def _scaled(case: Case) -> Iterator[Supposition]:
    """Divided by a temperature, or turned into probabilities."""
    said, stored = case.said, case.pairs.stored
    ratio = float((said * stored).sum() / max(float((said * said).sum()), 1e-12))
    if ratio > 0:
        yield Supposition(f"they are divided by {1 / ratio:.2g}, as by a temperature", said * ratio, stored)
    for tau in TEMPERATURES:
        yield Supposition(f"probabilities (at temperature {tau:g}) are stored, not logits", shifted(softmax(said, tau)), stored)


def _other_classes(case: Case) -> Iterator[Supposition]:
    """The same numbers in each row, in another order."""
    said, stored, names = case.said, case.pairs.stored, case.witness.data.classes
    text = "another class order: each row holds the right numbers in other columns"
    if len(names) <= SQUARED:
        apart = np.zeros((len(names), len(names)))
        for one, other in zip(said, stored, strict=True):
            np.maximum(apart, np.abs(one[:, None] - other), out=apart)
        column = apart.argmin(1)  # where each class of the teacher's stands
        if len(np.unique(column)) == len(column):
            moved = [f"{names[a]!r} in that of {names[b]!r}" for a, b in enumerate(column.tolist()) if a != b][:2]
            yield Supposition(f"{text} ({', '.join(moved)})", said, stored[:, column])
    yield Supposition(text, np.sort(said, 1), np.sort(stored, 1))


def _other_boxes(case: Case) -> Iterator[Supposition]:
    """The teacher saw other pixels of the right image."""
    boxes = case.pairs.boxes
    yield case.with_boxes(replace(boxes, flip=~boxes.flip), "they are of mirrored images: flips are inverted")
    yield case.with_boxes(None, "another policy: they are of the images as they are evaluated, without augmentation")
    sizes, zero = case.witness.data.sizes[case.pairs.rows], np.zeros_like(boxes.top)
    whole = replace(boxes, top=zero, left=zero, height=sizes[:, 0], width=sizes[:, 1], flip=np.zeros_like(boxes.flip))
    yield case.with_boxes(whole, "another policy: they are of whole images, without augmentation")
    policy = case.witness.policy
    if not _is_drawn(policy):
        return
    yield case.with_boxes(case.drawn(policy, 0), "they are of the boxes that the policy draws, and other boxes are stored")
    for by in (1, -1):
        other, views = case.pairs.views + by, case.witness.joined.cache.views
        most = policy.views or (views if views > 1 else np.inf)  # of a single view the next one may be drawn, if there is one
        at = np.flatnonzero((other >= 0) & (other < most))
        if len(at) >= ENOUGH * len(other):
            few = replace(case, pairs=case.pairs.take(at), said=case.said[at])
            text = f"they are those of another view, number v {'+' if by > 0 else '-'} 1 in the place of v"
            yield few.with_boxes(few.drawn(policy, by), text)
    for asked, what in _policies(policy):
        if asked.views is not None and case.pairs.views.max() >= asked.views:
            continue
        yield case.with_boxes(case.drawn(asked, 0), f"another policy: they are of views with {what}")


def _is_drawn(policy: Policy) -> bool:
    """Whether its boxes can be drawn anew; those of somebody else's file cannot."""
    return policy.kind != "given"


def _policies(policy: Policy) -> Iterator[tuple[Policy, str]]:
    """The policies that people use, but for one setting this one."""
    yield replace(policy, flip=not policy.flip), f"--flip {'off' if policy.flip else 'on'}"
    if policy.kind == "pad-crop":
        pads = sorted({0, 1, 2, 4, policy.size // 8} - {policy.pad})
        yield from ((replace(policy, pad=pad), f"--pad {pad}") for pad in pads if pad < policy.size)
    if policy.kind == "resized-crop":
        scales = {(0.08, 1.0), (0.25, 1.0), (0.5, 1.0)} - {policy.scale}
        yield from ((replace(policy, scale=scale), f"--scale {scale[0]:g} {scale[1]:g}") for scale in sorted(scales))
    yield from ((replace(policy, seed=seed), f"--seed {seed}") for seed in (0, 1, 42) if seed != policy.seed)


def _other_inputs(case: Case) -> Iterator[Supposition]:
    """The teacher saw the right pixels, normalised in another way."""
    from kdprune_data.learn.views import Normalisation

    ways: list[tuple[str, Callable[[Normalisation, Tensor], Tensor]]] = [
        ("none, pixels from 0 to 1", lambda _, pixels: pixels.float() / 255),
        ("none, pixels from 0 to 255", lambda _, pixels: pixels.float()),
        ("the mean taken off pixels from 0 to 255", lambda own, pixels: own.apply(pixels.float() * 255)),
        ("mean and deviation 0.5", lambda _, pixels: Normalisation(HALF, HALF).apply(pixels)),
        ("that of ImageNet", lambda _, pixels: Normalisation(*IMAGENET).apply(pixels)),
        (
            "its mean and deviation in the order blue, green, red",
            lambda own, pixels: Normalisation(own.mean[::-1], own.std[::-1]).apply(pixels),
        ),
        ("channels in the order blue, green, red", lambda own, pixels: own.apply(pixels.flip(1))),
        ("the mean alone, not divided by the deviation", lambda own, pixels: Normalisation(own.mean, (1.0, 1.0, 1.0)).apply(pixels)),
        ("the teacher's own, twice", lambda own, pixels: own.apply(own.apply(pixels) * 255)),
    ]
    if len(case.witness.saved) > 1:
        for saved in case.witness.saved:
            ways.append((f"that of {saved.folder} for all", lambda _, pixels, theirs=saved.normalisation: theirs.apply(pixels)))  # type: ignore[misc]  # a lambda's default has no type
    for what, normalise in ways:
        said = case.witness.says(case.pairs.rows, case.pairs.boxes, normalise=normalise)
        yield Supposition(f"another normalisation of the teacher's inputs: {what}", said, case.pairs.stored)


def _other_rows(case: Case) -> Iterator[Supposition]:
    """What is said of a row stands in another one, of its shard or in the same place of another shard."""
    fresh = [case.said]
    if _is_drawn(case.witness.policy):  # rows that moved with their boxes: the stored ones are another sample's
        fresh.append(case.witness.says(case.pairs.rows, case.drawn(case.witness.policy, 0)))
    for said in fresh:
        yield from _moved(case, said)
    for said in fresh:
        yield from _swapped(case, said)


def _moved(case: Case, said: F64) -> Iterator[Supposition]:
    """Looks through the pairs' own shards."""
    starts, places, views = case.witness.joined.starts, case.places, case.pairs.views
    found = np.empty(len(places), np.int64)
    for n, shard in enumerate(case.shards.tolist()):
        inside = np.arange(starts[shard], starts[shard + 1])
        stored = case.witness.read_places(inside, np.full(len(inside), views[n])).stored
        found[n] = inside[np.abs(stored - said[n]).sum(1).argmin()]
    by = Counter((found - places).tolist()).most_common(1)[0][0]
    at = np.flatnonzero((places + by >= starts[case.shards]) & (places + by < starts[case.shards + 1]))
    if by and len(at) >= ENOUGH * len(places):
        rows = f"{abs(by):,} row{'s' if abs(by) > 1 else ''} {'before' if by > 0 else 'after'}"
        text = f"each is that of the sample {rows}: a join by position, shifted"
        yield Supposition(text, said[at], case.witness.read_places(places[at] + by, views[at]).stored)
    if (found != places).all():
        text = "they are those of other samples of the same shard: rows in another order"
        yield Supposition(text, said, case.witness.read_places(found, views).stored)


def _swapped(case: Case, said: F64) -> Iterator[Supposition]:
    """Looks at the same place of the other shards."""
    starts, shards = case.witness.joined.starts, case.shards
    if len(starts) <= 2:
        return
    few = np.arange(min(len(shards), max(2, SHARDS_READ // len(starts))))
    at, stored, held = [], [], Counter[tuple[int, int]]()
    for n in few.tolist():
        others = starts[:-1] + case.places[n] - starts[shards[n]]
        there = np.flatnonzero((others < starts[1:]) & (np.arange(len(others)) != shards[n]))
        if not len(there):
            continue
        found = case.witness.read_places(others[there], np.full(len(there), case.pairs.views[n])).stored
        nearest = int(np.abs(found - said[n]).sum(1).argmin())
        at.append(n)
        stored.append(found[nearest])
        held[min(there[nearest], shards[n]), max(there[nearest], shards[n])] += 1
    if at:
        numbers = case.witness.joined.cache.shards
        a, b = held.most_common(1)[0][0]
        text = f"each is that of the sample in the same place of another shard: shards {numbers[a]} and {numbers[b]} are swapped"
        yield Supposition(text, said[at], np.stack(stored))


def _earlier(case: Case) -> Iterator[Supposition]:
    """Weights that a teacher had after another epoch."""
    for n, saved in enumerate(case.witness.saved):
        if not saved.may_run(None):  # the user's own function is run once, not for every epoch
            continue
        whose = "the teacher" if len(case.witness.saved) == 1 else str(saved.folder)
        for epoch in saved.kept_epochs[:-1]:
            try:
                net = saved.load(code=None, epoch=epoch)
            except KdpruneError:
                continue
            predictors = [*case.witness.predictors]
            predictors[n] = replace(predictors[n], net=net)
            said = replace(case.witness, predictors=predictors).says(case.pairs.rows, case.pairs.boxes)
            yield Supposition(f"other weights: those that {whose} had after epoch {epoch}", said, case.pairs.stored)


def _other_mixture(case: Case) -> Iterator[Supposition]:
    """What several teachers say, put together in another way."""
    from kdprune_data.learn.inference import together

    if case.witness.temperature is None:
        return
    each, stored = case.witness.each(case.pairs.rows, case.pairs.boxes), case.pairs.stored
    for saved, one in zip(case.witness.saved, each, strict=True):
        yield Supposition(f"they are those of {saved.folder} alone", shifted(one.numpy()), stored)
    mean = np.mean([one.double().numpy() for one in each], axis=0)
    yield Supposition("they are the mean of the teachers' logits, not of their probabilities", shifted(mean), stored)
    for tau in TEMPERATURES:
        text = f"they are the mean of the teachers' probabilities at temperature {tau:g}, not {case.witness.temperature:g}"
        yield Supposition(text, shifted(together(each, tau).numpy()), stored)


SUSPECTS: tuple[Callable[[Case], Iterator[Supposition]], ...] = (
    _scaled,
    _other_mixture,
    _other_classes,
    _other_rows,
    _other_boxes,
    _other_inputs,
    _earlier,
)
