"""What `teacher` and `distill` share once they know what to train: a model folder that is written while a network trains.

The folder gets `epoch-NNN.safetensors` for the epochs kept, then `model.safetensors` and `metrics.jsonl`. `.partial/last.ckpt/` is what an
interrupted run continues from; it goes with `.partial/`, after the manifest is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines._console import Outcome, bar, count, duration, say
from kdprune_pipelines._models import WEIGHTS, epoch_weights
from kdprune_pipelines._tensorboard import Board
from kdprune_pipelines._training import LAST

from kdprune_data.errors import FormatError, KdpruneError, some
from kdprune_data.formats import manifest as m
from kdprune_data.formats import standing
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from kdprune_data.learn.checkpoint import Checkpoint
    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.loop import Hooks, LossOf, Training
    from kdprune_data.learn.stream import Images


@dataclass(frozen=True)
class Job:
    """A training run: what to train, by which loss; the epochs to keep; where metrics go besides. `leaves`: the files, beside weights that
    are kept, that each epoch (counted from 1) leaves."""

    training: Training
    keep: Sequence[int]
    loss_of: LossOf
    hooks: Hooks
    board: Board | None = None
    leaves: Callable[[int], Sequence[str]] = lambda _: ()

    def lacks(self, build: Build, epochs: int) -> list[str]:
        """The files of so many epochs that are not whole any more: after a power failure, say."""
        kept = [epoch_weights(epoch) for epoch in self.keep if epoch <= epochs]
        left = [file for epoch in range(1, epochs + 1) for file in self.leaves(epoch)]
        return [file for file in [*kept, *left] if build.finished(file) is None]


@dataclass(frozen=True)
class Validation:
    """Where a network is validated: the images, and how many of them count."""

    images: Images
    samples: int

    def measure(self, predictor: Predictor) -> tuple[float, float]:
        """Loss and accuracy."""
        from kdprune_data.learn.inference import evaluate

        found = evaluate(predictor, self.images)
        return found.loss, found.accuracy


def validation(folder: Path | None, train: Dataset, keep: str) -> Validation | None:
    """The validation data, whose images are kept as those are that are trained on (see `Images`); None where there are none.

    Raises MismatchError for other classes, UsageError when nothing has a label.
    """
    from kdprune_data.learn.inference import labelled
    from kdprune_data.learn.stream import Images

    if folder is None:
        say("no validation data: nothing is validated while training (import with --holdout 0.1 to have some)")
        return None
    data = Dataset.open(folder)
    data.same_classes(train.classes, str(train.folder))
    images = Images(data, keep=keep)
    return Validation(images, len(labelled(images)))


def validating(hooks: Hooks, training: Training, val: Validation | None) -> Hooks:
    """The hooks with a validation of what is learned, where there are data for it."""
    if val is None:
        return hooks
    learned = predictor(training)
    return replace(hooks, validate=lambda: val.measure(learned))


def predictor(training: Training) -> Predictor:
    """What a training learns, as it is evaluated."""
    from kdprune_data.learn.inference import Predictor

    return Predictor(training.learned, training.normalisation, training.feed.views.policy.size, training.device)


def train(job: Job, build: Build) -> dict[str, Any]:
    """Train to the end, continuing what is there, and write the model's files. Returns the counts for the manifest.

    Raises KdpruneError when training diverges, saying what is left to go on from.
    """
    from kdprune_data.learn.checkpoint import Checkpoint
    from kdprune_data.learn.weights import weights

    training = job.training
    before = job.hooks.after_epoch
    checkpoint = Checkpoint(build.scratch(LAST), hashlib.sha256(m.canonical(build.identity.to_json())).hexdigest())
    if lacking := job.lacks(build, checkpoint.epochs):
        say(f"{some(lacking)} of an interrupted run: missing or damaged; training from the beginning")
        checkpoint.forget()
    if checkpoint.load(training, job.hooks.partial):
        say(f"continuing after step {training.step:,} of {training.plan.steps:,}")

    def after_epoch(epoch: int, row: Mapping[str, Any]) -> None:
        if before is not None:
            before(epoch, row)
        if epoch in job.keep:
            save(build, epoch_weights(epoch), weights(training.learned))
        if row["val_accuracy"] is not None or epoch == training.plan.epochs:
            say(_line(row, training.plan.epochs))
        if job.board is not None and training.metrics and training.metrics[-1]["epoch"] == epoch:
            job.board.add(row)

    with bar("train", total=samples_in_all(training), initial=training.samples) as progress:
        try:
            training.run(job.loss_of, replace(job.hooks, after_epoch=after_epoch, tick=progress.update), checkpoint)
        except KdpruneError as error:
            raise (KdpruneError(f"{error}; {_left(build, checkpoint)}") if training.diverged else error) from None
        finally:
            if job.board is not None:
                job.board.close()
    save(build, WEIGHTS, weights(training.learned))
    write_metrics(build, training.metrics)
    return {
        "samples": len(training.feed.images.data.usable()),
        "steps": training.plan.steps,
        "epochs": training.plan.epochs,
        "parameters": sum(p.numel() for p in training.model.parameters()),
    }


def _left(build: Build, checkpoint: Checkpoint) -> str:
    """After a divergence: what there is to go on from."""
    if standing.aside(build.folder).is_dir():
        return f"{build.folder} is left as it was"
    if not checkpoint.exists:
        return "nothing was saved before that"
    return f"the last finite state is kept: --init {checkpoint.folder} with another --name starts from it"


def samples_in_all(training: Training) -> int:
    """Samples that are shown in all, as the progress counts them."""
    return training.plan.steps * len(training.feed.images.data.usable()) // training.plan.per_epoch


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
    train = "" if row["train_accuracy"] is None else f" {row['train_accuracy']:.2%}"  # without a label in the data there is none
    return f"epoch {row['epoch']}/{epochs}: train{train} (loss {row['train_loss']:.3f}){val}"


def outcome(folder: Path, made: Manifest) -> Outcome:
    """What a training stage hands back."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        val = rows[-1]["val_accuracy"] if rows else None
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{folder / 'metrics.jsonl'} is damaged: make or fetch the folder again") from None
    counts = made.counts
    when = " after the last epoch" if counts["epochs"] else ""  # adopted weights had none here
    shown = f", val {val:.2%}{when}" if val is not None else ""
    text = (
        f"{folder}: {made.config['architecture']['name']}, {counts['parameters']:,} parameters, {count(counts['epochs'], 'epoch')}, "
        f"{count(counts['steps'], 'step')} on {count(counts['samples'], 'sample')}{shown}; made in {duration(made.made['seconds'])}"
    )
    return Outcome(folder, {"folder": str(folder), "counts": counts, "val_accuracy": val, "digest": made.digest}, text)
