"""What is wrong between the sections of a recipe, told before any work: a score that is read and that no section makes.

Only steps that the recipe itself links are looked at: what is found in the workspace is checked by the command that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprune_pipelines import _columns
from kdprune_pipelines._steps import Link, Step, found_of
from kdprune_pipelines._training import kept_epochs

from kdprune_data.errors import UsageError
from kdprune_data.formats.manifest import NAME, Manifest
from kdprune_data.formats.scores import KINDS_OF_VECTORS, SCORES


@dataclass(frozen=True)
class Trained:
    """What is known of a teacher. where: as messages name it; epochs: how many are recorded, None where only the work tells; kept: those
    whose weights are kept, likewise; logits: whether they are recorded."""

    where: str
    epochs: int | None = None
    kept: Sequence[int] | None = None
    logits: bool = True


def check_scores(step: Step, made: Sequence[Step]) -> None:
    """Raise UsageError for a [score] whose settings are none, or whose teacher cannot give what it asks for."""
    config: Any = step.config
    teacher = _teacher(step, made)
    if config.epoch is not None and teacher.kept is not None and config.epoch not in teacher.kept:
        kept = ", ".join(map(str, teacher.kept)) or "none"
        raise UsageError(
            f"epoch = {config.epoch}: {teacher.where} keeps the weights after epoch {kept}; choose one, or give it keep_epochs"
        )
    for score in _columns.check_settings(config.set):
        if lacks := _lacks(score, step, made):
            raise UsageError(f"set {score}.* is for a score that is not made: {lacks}")


def check_reads(step: Step, made: Sequence[Step], needs: dict[str, str]) -> None:
    """Raise UsageError where a [select] reads what the [score] that it follows does not make. needs: names, each with what reads it."""
    link = step.links.get("scores")
    if link is None or made[link.step].command != "score":
        return
    for name, reader in needs.items():
        if lacks := _lacks(name, made[link.step], made):
            what = f"method {name} ranks by a score that" if reader == name else f"{reader} needs {name}, which"
            raise UsageError(f"{what} {made[link.step].label} does not make: {lacks}")


def _lacks(name: str, score: Step, made: Sequence[Step]) -> str:
    """What to do so that a step makes a score or vectors; empty where it does."""
    config: Any = score.config
    also = _columns.asked(config.also)
    if name in KINDS_OF_VECTORS:
        implied = name == "embedding" and any(SCORES[one].source == "embedding" for one in also)
        return "" if getattr(config, name) or implied else f"add {name} = true to {score.title}"
    if SCORES[name].asked:
        return "" if name in also else f'add also = ["{name}"] to {score.title}'
    return _lacks_dynamics(name, _teacher(score, made)) if SCORES[name].source == "dynamics" else ""


def _lacks_dynamics(name: str, teacher: Trained) -> str:
    from kdprune_data.scores import FROM_DYNAMICS  # which imports torch

    score = FROM_DYNAMICS[name]
    if teacher.epochs == 0:
        return f"{teacher.where} is adopted and has no training dynamics"
    if score.logits and not teacher.logits:
        return f'add record = "logits" to {teacher.where}'
    if teacher.epochs is not None and teacher.epochs < score.least:
        return f"it needs {score.least} recorded epochs or more, and {teacher.where} has {teacher.epochs}: train for longer"
    return ""


def _teacher(step: Step, made: Sequence[Step]) -> Trained:
    """The teacher that a step reads, made by the recipe or there already."""
    found = found_of(step, "teacher")
    if isinstance(found, Link) and made[found.step].command == "teacher":
        return _to_be(made[found.step])
    if isinstance(found, Path) and (found / NAME).is_file():
        return _there(found)
    return Trained("the teacher")


def _to_be(step: Step) -> Trained:
    config: Any = step.config
    if config.weights is not None:
        return Trained(step.label, 0, None, False)
    epochs = config.epochs if config.steps is None else None
    kept = None if epochs is None else kept_epochs(config.keep_epochs, epochs)
    return Trained(step.label, epochs, kept, config.record == "logits")


def _there(folder: Path) -> Trained:
    manifest = Manifest.read(folder)
    epochs = 0 if manifest.config.get("recipe") is None else int(manifest.counts.get("epochs", 0))
    kept = sorted(int(f.path[6:].split(".")[0]) for f in manifest.files if f.path.startswith("epoch-"))
    return Trained(str(folder), epochs, kept, manifest.config.get("record") == "logits")
