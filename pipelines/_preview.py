"""`--dry-run` of what trains: how many steps, how many bytes, and how long, from a few seconds of real steps and of real validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdprune_pipelines import _estimate
from kdprune_pipelines._console import Outcome
from kdprune_pipelines._fit import Job, Validation, predictor, samples_in_all

from kdprune_data.formats.identity import Identity

if TYPE_CHECKING:
    from kdprune_data.learn.inference import Predictor

METRICS_BYTES = 200
"""About what a row of metrics.jsonl takes."""
VALIDATED_AT_ONCE = 64


@dataclass(frozen=True)
class Place:
    """What would be written, and where."""

    folder: Path
    identity: Identity
    overwrite: bool


def estimate(place: Place, job: Job, val: Validation | None, *, per_epoch_bytes: int = 0) -> Outcome:
    """What training would make and take, from at most 3 s of it and 3 s of validating; nothing is touched. `per_epoch_bytes`: of files
    that every epoch writes. Raises as the run itself would at once."""
    from kdprune_data.learn.weights import weights

    training, plan = job.training, job.training.plan
    state = _estimate.look(place.folder, place.identity, overwrite=place.overwrite)
    of_weights = sum(v.nbytes for v in weights(training.learned).values())
    size = of_weights * (1 + len(job.keep)) + plan.epochs * (per_epoch_bytes + METRICS_BYTES)
    counts = {
        "sample": len(training.feed.images.data.usable()),
        "epoch": plan.epochs,
        "step": plan.steps,
        "parameter": sum(p.numel() for p in training.model.parameters()),
    }
    seconds = 0.0
    if state != "finished":
        if val is not None:
            every = range(1, plan.epochs + 1)
            times = sum(1 for e in every if job.hooks.validated is None or e in job.hooks.validated)
            seconds = validation_seconds(predictor(training), val) * times
        seconds += _estimate.measure(steps(job), samples_in_all(training))
    return _estimate.Estimate(place.folder, state, counts, size, seconds).outcome()


def steps(job: Job) -> Iterator[int]:
    """Real steps, one after the other, each waited for. The end of an epoch has no hooks here."""
    import torch

    for samples in job.training.steps(job.loss_of, replace(job.hooks, after_epoch=None, validate=None)):
        if job.training.device.type == "cuda":
            torch.cuda.synchronize(job.training.device)
        yield samples


def validation_seconds(network: Predictor, val: Validation) -> float:
    """Seconds that one validation takes, from at most 3 s of it."""
    from kdprune_data.learn.inference import evaluate, labelled

    rows = labelled(val.images)

    def work() -> Iterator[int]:
        for first in range(0, len(rows), VALIDATED_AT_ONCE):
            some = rows[first : first + VALIDATED_AT_ONCE]
            evaluate(network, val.images, rows=some)
            yield len(some)

    return _estimate.measure(work(), len(rows))
