"""What `teacher` and `distill` share: their options, and a model folder written while a network trains.

The folder gets `epoch-NNN.safetensors` for the epochs kept, then `model.safetensors` and `metrics.jsonl`. `.partial/last.ckpt/` is what an
interrupted run continues from; it goes with `.partial/`, after the manifest is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines._console import Outcome, bar, count, say
from kdprune_pipelines._models import WEIGHTS, epoch_weights

from kdprune_data.config import Config, option
from kdprune_data.errors import UsageError
from kdprune_data.formats import manifest as m
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.loop import Hooks, LossOf, Recipe, Training
    from kdprune_data.learn.models import Architecture
    from kdprune_data.learn.views import Normalisation, Policy

LAST = "last.ckpt"


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Settings of everything that trains."""

    val: Path | None = option(None, help="The data set to validate on; default data/val, where there is one.")
    epochs: int = option(30, help="Passes over the data.", least=0)
    steps: int | None = option(None, help="Train for exactly this many steps instead of --epochs.", least=1)
    batch: int = option(128, help="Samples in a batch.", least=1)
    lr: float = option(
        0.1, help="Peak learning rate (SGD, Nesterov momentum 0.9; linear warm-up of an epoch, then a cosine to 0).", least=0
    )
    weight_decay: float = option(5e-4, help="Weight decay; not on norms and biases.", least=0)
    size: int | None = option(None, help="Side of the input in pixels; default the images' own up to 64, else 224.", least=1)
    flip: str = option("auto", help="Mirror views left to right; auto: not for digits.", choices=("auto", "on", "off"))
    stem: str = option(
        "auto", help="small: 3x3 convolution and no max-pool; auto: small up to 64 pixels.", choices=("auto", "small", "standard")
    )
    norm: str = option("batch", help="Normalisation layers.", choices=("batch", "group"))
    seed: int = option(0, help="Seed of weights, order and views.", least=0, most=2**31 - 1)
    keep_epochs: tuple[int, ...] = option((), help="Epochs whose weights are kept; default 10 % of training, and the end.", least=1)
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    name: str | None = option(None, help="Name in its usual place.")
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")

    def recipe(self) -> Recipe:
        """As the training loop takes it."""
        from kdprune_data.learn.loop import Recipe

        return Recipe(self.epochs, self.steps, self.batch, self.lr, weight_decay=self.weight_decay, seed=self.seed)


def kept_epochs(asked: Sequence[int], epochs: int) -> list[int]:
    """The epochs to keep: those asked for, or a tenth of training (at least the first); always the last."""
    chosen = set(asked) or {max(1, (epochs + 5) // 10)}
    late = sorted(e for e in chosen if e > epochs)
    if late:
        raise UsageError(f"--keep-epochs {late[0]} is after the end: training has {epochs} epochs")
    return sorted(chosen | {epochs})


@dataclass(frozen=True)
class Job:
    """A training run and the folder it fills."""

    build: Build
    training: Training
    keep: Sequence[int]
    loss_of: LossOf
    hooks: Hooks


def precision(device: torch.device) -> str:
    """In which numbers a network is trained there. It stands in the config: a run does not start in one and go on in another."""
    return "bf16" if device.type == "cuda" else "float32"


def inputs(data: Dataset, *others: Mapping[str, Any], val: Path | None) -> list[Mapping[str, Any]]:
    """What a model is made from. The validation data too: they change no weight, but metrics.jsonl, which is part of the digest."""
    validated = [] if val is None else [Manifest.load(val, kinds=("dataset", "subset")).as_input("val")]
    return [data.manifest.as_input("data"), *others, *validated]


def setting(
    recipe: Recipe, *, architecture: Architecture, normalisation: Normalisation, policy: Policy, precision: str | None
) -> dict[str, Any]:
    """The part of a model's config that every model has. precision: None where nothing is trained."""
    return {
        "precision": precision,
        "architecture": architecture.to_dict(),
        "normalisation": normalisation.to_dict(),
        "policy": policy.to_dict(),
        "recipe": recipe.to_dict(),
    }


def train(job: Job) -> dict[str, Any]:
    """Train to the end, continuing what is there, and write the model's files. Returns the counts for the manifest."""
    from kdprune_data.learn.loop import Checkpoint, weights

    training, build = job.training, job.build
    before = job.hooks.after_epoch
    checkpoint = Checkpoint(build.scratch(LAST))

    def after_epoch(epoch: int, row: Mapping[str, Any]) -> None:
        if before is not None:
            before(epoch, row)
        if epoch in job.keep:
            save(build, epoch_weights(epoch), weights(training.model))
        if row["val_accuracy"] is not None or epoch == training.plan.epochs:
            say(_line(row, training.plan.epochs))

    with bar("train", total=training.plan.steps * training.recipe.batch) as progress:
        training.run(job.loss_of, replace(job.hooks, after_epoch=after_epoch, tick=progress.update), checkpoint)
    save(build, WEIGHTS, weights(training.model))
    write_metrics(build, training.metrics)
    parameters = sum(p.numel() for p in training.model.parameters())
    samples = len(training.feed.images.data.usable())
    return {"samples": samples, "steps": training.plan.steps, "epochs": training.plan.epochs, "parameters": parameters}


def announce(model: str, training: Training) -> None:
    """Say what is about to be trained, on what."""
    policy = training.feed.views.policy
    samples = count(len(training.feed.images.data.usable()), "sample")
    mirrored = "mirrored" if policy.flip else "never mirrored"
    say(
        f"training {model} on {samples} for {count(training.plan.epochs, 'epoch')} ({count(training.plan.steps, 'step')}) on "
        f"{training.device}; views: {policy.kind} at {policy.size} pixels, {mirrored}"
    )


def save(build: Build, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors."""
    from safetensors.torch import save as to_bytes

    build.write(path, to_bytes(dict(tensors)))


def write_metrics(build: Build, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl."""
    build.write("metrics.jsonl", b"".join(m.canonical(row) + b"\n" for row in rows))


def _line(row: Mapping[str, Any], epochs: int) -> str:
    val = "" if row["val_accuracy"] is None else f", val {row['val_accuracy']:.2%} (loss {row['val_loss']:.3f})"
    return f"epoch {row['epoch']}/{epochs}: train {row['train_accuracy']:.2%} (loss {row['train_loss']:.3f}){val}"


def validator(folder: Path | None, predictor: Predictor, train: Dataset) -> Callable[[], tuple[float, float]] | None:
    """A function that gives (loss, accuracy) on the validation data; None where there is none.

    Raises MismatchError when it has other classes than the training data.
    """
    from kdprune_data.learn.inference import evaluate
    from kdprune_data.learn.stream import Images

    if folder is None:
        say("no validation data: nothing is validated while training (import with --holdout 0.1 to have some)")
        return None
    data = Dataset.open(folder)
    data.same_classes(train.classes, str(train.folder))
    images = Images(data)

    def measure() -> tuple[float, float]:
        found = evaluate(predictor, images)
        return found.loss, found.accuracy

    return measure


def outcome(folder: Path, made: Manifest, started: float) -> Outcome:
    """What a training stage hands back."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = rows[-1] if rows else {}
    val = last.get("val_accuracy")
    counts = made.counts
    when = " after the last epoch" if counts["epochs"] else ""  # adopted weights had none here
    shown = f", val {val:.2%}{when}" if val is not None else ""
    text = (
        f"{folder}: {made.config['architecture']['name']}, {counts['parameters']:,} parameters, {count(counts['epochs'], 'epoch')}, "
        f"{count(counts['steps'], 'step')} on {count(counts['samples'], 'sample')}{shown}; {time.monotonic() - started:.0f} s"
    )
    return Outcome(folder, {"folder": str(folder), "counts": counts, "val_accuracy": val, "digest": made.digest}, text)
