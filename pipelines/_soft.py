"""The teacher's part in a student's loss as options give it: alpha, temperature, the loss and its settings, and what they ask of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdprune_data.errors import MismatchError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache

if TYPE_CHECKING:
    from kdprune_data.learn.soft import Soft

NAMES = ("kl", "dkd", "dist", "mse")
"""Those of `learn.soft.LOSSES`, which imports torch, and `--help` does not."""
TEMPERATURE = 4.0


def number(alpha: str) -> float:
    """An alpha that is given as a number. Raises UsageError for one that is none, or out of range."""
    try:
        value = float(alpha)
    except ValueError:
        raise UsageError(f"--alpha {alpha!r} is not a number: give auto, or a weight from 0 to 1") from None
    if not 0 <= value <= 1:
        raise UsageError(f"--alpha {alpha} is out of range: from 0 (labels only) to 1 (teacher only)")
    return value


def check_labels(data: Dataset, alpha: float) -> None:
    """Raise UsageError where the labels count and some samples have none."""
    if (unlabelled := _unlabelled(data)) and alpha < 1:
        raise UsageError(f"{data.folder} has {unlabelled:,} samples without a label: train with a logit cache and --alpha 1")


def chosen(name: str, given: Sequence[str], *, data: Dataset, alpha: float, temperature: float) -> Soft:
    """The loss against the teacher's logits. Raises UsageError for settings that it has not, for options that
    change nothing with it, and where it needs labels that are missing."""
    from kdprune_data.learn.soft import Soft

    soft = Soft.choose(name, given)
    if name != "kl" and alpha == 0:
        raise UsageError(f"--loss {name} is of a teacher's logits, and at alpha 0 there are none that count: leave it out")
    if not soft.kind.tempered and temperature != TEMPERATURE:
        raise UsageError(f"--temperature {temperature:g} changes nothing with --loss {name}, which takes logits as they are: leave it out")
    if soft.kind.labelled and (unlabelled := _unlabelled(data)):
        raise UsageError(f"--loss {name} needs the label of every sample, and {data.folder} has {unlabelled:,} without: use --loss kl")
    if soft.kind.labelled and len(data.classes) < 2:
        raise UsageError(f"--loss {name} compares a label's class with the others, and {data.folder} has one class: use --loss kl")
    return soft


def check_held(soft: Soft, temperature: float, cache: LogitCache) -> None:
    """Raise MismatchError where a cache's logits do not hold for what the loss makes of them."""
    held = cache.temperatures
    if held is None:
        return
    at = spoken(held)
    if soft.kind.tempered and not held[0] <= temperature <= held[1]:
        raise MismatchError(
            f"{cache.folder} holds at {at}, --temperature is {temperature:g}: train at one it holds at, or cache with "
            f"--temperature {temperature:g}"
        )
    if not soft.kind.tempered and held[0] == held[1]:
        raise MismatchError(f"{cache.folder} holds at {at}, and --loss {soft.name} takes logits as they are, at none: use --loss kl")


def spoken(held: tuple[float, float]) -> str:
    """At which temperatures, from the lowest to the highest, a cache holds: `temperatures from 1 to 4`."""
    return f"temperature {held[0]:g} alone" if held[0] == held[1] else f"temperatures from {held[0]:g} to {held[1]:g}"


def told(soft: Soft, temperature: float) -> str:
    """For people: `loss dkd (alpha 1, beta 8), temperature 4`; of KL the temperature alone."""
    settings = ", ".join(f"{name} {value:g}" for name, value in soft.settings.own().items())
    which = "" if soft.name == "kl" else f"loss {soft.name}" + (f" ({settings})" if settings else "")
    return ", ".join(part for part in (which, f"temperature {temperature:g}" if soft.kind.tempered else "") if part)


def _unlabelled(data: Dataset) -> int:
    return int((data.labels[data.usable()] < 0).sum())
