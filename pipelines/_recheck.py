"""Are the soft labels of a cache what its teacher says? Some are asked for again, and where they differ the likely cause is named.

1. (row, view) pairs are chosen by hash; their stored boxes are rendered and shown to the teacher (`_witness.py`).
2. Differences are measured, and compared with what rounding, other batches and other devices may do.
3. Where they are larger, the usual mistakes are tried one by one (`_suspects.py`).

`verify --teacher` does this for many pairs, `distill` for a few before it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _workspace
from kdprune_pipelines._console import count, say
from kdprune_pipelines._models import Saved, open_model
from kdprune_pipelines._suspects import cause
from kdprune_pipelines._witness import TEMPERATURES, Limits, Pairs, Witness, chosen, softmax, together_named
from numpy.typing import NDArray

from kdprune_data.errors import KdpruneError, MismatchError, UsageError
from kdprune_data.formats.logits import Joined, LogitCache
from kdprune_data.formats.lowrank import kl
from kdprune_data.formats.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.stream import Images, ViewSource

__all__ = ["Agreement", "AtHand", "Limits", "Witness", "at_start", "check_asked", "data_of", "recheck", "together_named", "witness_of"]


@dataclass(frozen=True)
class AtHand:
    """Where a cache's teachers may be found: a folder that was given, or else `teachers/`; `code`: functions of the user's that may run."""

    given: Path | None
    code: Sequence[str] = ()


@dataclass(frozen=True)
class Agreement:
    """How what is stored of some (row, view) pairs agrees with what the teacher says again. `largest` and `mean`: absolute differences of
    z - max(z); `probability`: the largest of softmax; `kl`: mean KL(full || stored) by temperature; `top1`: the share of pairs in which the
    teacher's largest logit is a largest one stored; `differing`: pairs farther apart than `allowed`; `fault`: what is the matter, in a
    line, None where they agree."""

    pairs: int
    largest: float
    mean: float
    probability: float
    kl: Mapping[float, float]
    top1: float
    differing: int
    allowed: str
    fault: str | None = None
    cause: str | None = None

    @property
    def text(self) -> str:
        """The figures, for people."""
        named = " / ".join(f"{tau:g}" for tau in self.kl)
        losses = " / ".join(f"{value:.2g}" for value in self.kl.values())
        return f"largest difference {self.largest:.2g}, mean {self.mean:.2g}, KL {losses} at temperature {named}, {self.agreement}"

    @property
    def agreement(self) -> str:
        """That of the top 1."""
        return "top 1 the same in all" if self.top1 == 1 else f"top 1 the same in {self.top1:.1%}"

    def facts(self) -> dict[str, Any]:
        """For machines."""
        numbers = {"largest": self.largest, "mean": self.mean, "probability": self.probability, "top1": self.top1}
        losses = {f"{tau:g}": value for tau, value in self.kl.items()}
        return {"pairs": self.pairs, "differing": self.differing, **numbers, "kl": losses, "cause": self.cause}


def recheck(
    witness: Witness,
    *,
    views: int,
    sample: int,
    seed: int,
    limits: Limits | None = None,
    tick: Callable[[int], None] | None = None,
) -> Agreement:
    """Ask the teacher again about `sample` pairs of the first `views` views; `tick` gets the number of each batch done.

    Raises SourceError for an image or a teacher that cannot be used, FormatError as the cache's reader does.
    """
    limits = limits or Limits.of(witness.joined.cache)
    pairs = witness.read(*chosen(witness.data, views, sample, seed))
    said = witness.says(pairs.rows, pairs.boxes, tick=tick)
    off = np.abs(said - pairs.stored)
    at = np.flatnonzero(limits.far(said, pairs.stored))
    top = pairs.stored[np.arange(len(said)), said.argmax(1)] >= pairs.stored.max(1)
    figures: dict[str, Any] = {
        "pairs": len(said),
        "largest": float(off.max()),
        "mean": float(off.mean()),
        "probability": float(np.abs(softmax(said) - softmax(pairs.stored)).max()),
        "kl": {tau: max(0.0, float(kl(said, pairs.stored, tau).mean())) for tau in TEMPERATURES},
        "top1": float(top.mean()),
        "differing": len(at),
        "allowed": limits.text,
    }
    found = Agreement(**figures)
    if not limits.disagree(said, pairs.stored):
        return found
    at = at if len(at) else np.arange(len(said))
    why = cause(witness, pairs.take(at), said[at], limits)
    return Agreement(**figures, fault=_fault(witness, pairs, at, found, why), cause=why)


def _fault(witness: Witness, pairs: Pairs, at: NDArray[np.int64], found: Agreement, why: str) -> str:
    """What is the matter, by how much, why, and what to do."""
    numbers = f"largest difference {found.largest:.2g}, mean {found.mean:.2g}, where {found.allowed}; {found.agreement}"
    which = f"{len(at):,} of {count(found.pairs, 'soft label')}{_alike(witness, pairs, at)}"
    says = "says" if len(witness.saved) == 1 else "together say"
    return f"{which} are not what {witness.name} {says} of them again ({numbers}): {why}; make the cache again (cache --overwrite)"


def _alike(witness: Witness, pairs: Pairs, at: NDArray[np.int64]) -> str:
    """What those that differ have in common, where others were looked at too."""
    joined = witness.joined
    numbers = np.asarray(joined.cache.shards)
    shards = numbers[np.searchsorted(joined.starts, joined.place[pairs.rows], side="right") - 1]
    for what, each in (("view", pairs.views), ("shard", shards)):
        bad = np.unique(each[at])
        if len(bad) == 1 and (each == bad[0]).sum() == len(at) and len(np.unique(each)) > 1:
            return f", all those of {what} {bad[0]},"
    return ""


def check_asked(folder: Path, cache: Manifest, asked: Sequence[Saved]) -> list[Saved]:
    """The teachers to ask, in the cache's order. Raises MismatchError unless they are those that it was made by, each of them; of logits
    from elsewhere, of which nothing tells, any one may be asked."""
    makers = [one for one in cache.inputs if one["role"] == "teacher"]
    if not makers and len(asked) > 1:
        raise MismatchError(f"{folder} holds logits from elsewhere, which do not say how several teachers were mixed: leave out --ensemble")
    if not makers:
        return list(asked)
    known = {one["digest"]: f"{one['name']} ({one['digest'][:12]})" for one in makers}
    whose = f"teacher{'s' if len(known) > 1 else ''} {together_named(list(known.values()))}"
    there = {one.manifest.digest: one for one in asked}
    for digest, one in there.items():
        if digest not in known:
            raise MismatchError(
                f"{folder} holds the logits of {whose}, not of {one.folder} ({digest[:12]}): "
                "give its own teacher, or run cache with this one"
            )
    if absent := [name for digest, name in known.items() if digest not in there]:
        raise MismatchError(f"{folder} holds what {whose} say together: give {together_named(absent)} too, with --ensemble DIR")
    return [there[digest] for digest in known]


def witness_of(joined: Joined, images: Images, saved: Sequence[Saved], *, nets: Sequence[nn.Module], device: torch.device) -> Witness:
    """The teachers of a cache, and their networks, ready to be asked."""
    from kdprune_data.learn.inference import Predictor

    cache, size = joined.cache, int(joined.cache.policy["size"])
    made = [Predictor(net, one.normalisation, size, device) for net, one in zip(nets, saved, strict=True)]
    ensemble = cache.manifest.config.get("ensemble")
    return Witness(joined, images, saved, made, None if ensemble is None else float(ensemble["temperature"]))


def data_of(folder: Path, cache: Manifest) -> Path:
    """The data set that a cache was made for, or else one chosen from it, by content. Raises UsageError when neither is here."""
    there = [*_workspace.folders(_workspace.DATA), *_workspace.folders(_workspace.SUBSETS)]
    about: list[tuple[Path, Manifest]] = []
    for one in there:
        try:
            about.append((one, Manifest.read(one, kinds=("dataset", "subset"))))
        except KdpruneError:  # some other, damaged folder is no concern of this cache's
            continue
    same = [one for one, found in about if found.content == cache.content]
    part = [one for one, found in about if cache.content in _workspace.contents(found.as_input("data"))]
    if not (same or part):
        raise UsageError(f"no images of {folder} in data/ or subsets/ here: give the data set that it was made for with --data")
    found = (same or part)[0]
    say(f"data: {found}")
    return found


def at_start(cache: LogitCache, shown: ViewSource, images: Images, *, sample: int, device: torch.device, at_hand: AtHand) -> None:
    """Before a training with a cache: ask its teachers again about a few of the soft labels that are used, if they are at hand.

    Says what came of it; silent where one is not there, or is a function of the user's that was not named. Raises MismatchError where soft
    labels are not what the teachers say.
    """
    from kdprune_data.learn.stream import CachedViews

    if not sample or not isinstance(shown, CachedViews) or not (saved := _found(cache, at_hand)):
        return
    try:
        nets = [one.load(code=at_hand.code) for one in saved]
    except KdpruneError as error:  # training does without it
        say(f"{together_named([one.folder for one in saved])}, of which the soft labels are, cannot be asked about them again: {error}")
        return
    witness = witness_of(shown.joined, images, saved, nets=nets, device=device)
    found = recheck(witness, views=shown.count, sample=sample, seed=0)
    if found.fault is not None:
        raise MismatchError(f"{cache.folder}: {found.fault}")
    figures = f"largest difference {found.largest:.2g}, {found.agreement}"
    say(f"{count(found.pairs, 'soft label')} asked of {witness.name} again: {figures}")


def _found(cache: LogitCache, at_hand: AtHand) -> list[Saved]:
    """The cache's teachers, where all are at hand and may be run, else none."""
    there: dict[str, Saved] = {}
    makers = [one["digest"] for one in cache.teachers]
    for folder in [*([] if at_hand.given is None else [at_hand.given]), *_workspace.folders(_workspace.TEACHERS)] if makers else ():
        try:
            if (digest := Manifest.read(folder).digest) in makers and digest not in there:
                there[digest] = open_model(folder)
        except KdpruneError:  # some other, damaged folder is no concern of a student's
            continue
    saved = [there[digest] for digest in makers if digest in there]
    return saved if len(saved) == len(makers) and all(one.may_run(at_hand.code) for one in saved) else []
