"""Training a network on labels, as `teacher` does it and `score --proxies` does it again: what it starts from, its views, its loss.

What is shown, what is learned and what is written follow from a `Setup` alone, so that the two stages train the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdprune_pipelines import _fit
from kdprune_pipelines._fit import Validation

from kdprune_data import order
from kdprune_data.formats import dynamics
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.dynamics import Recorder
    from kdprune_data.learn.models import Architecture
    from kdprune_data.learn.recipe import Plan, Recipe
    from kdprune_data.learn.stream import Feed, Images
    from kdprune_data.learn.views import Normalisation, Policy


@dataclass(frozen=True)
class Setup:
    """Everything that training starts from. `jobs`: threads that decode images."""

    data: Dataset
    images: Images
    architecture: Architecture
    normalisation: Normalisation
    policy: Policy
    recipe: Recipe
    device: torch.device
    jobs: int = 1

    def feed(self) -> Feed:
        """The batches: a new view of every sample each epoch."""
        from kdprune_data.learn.stream import DrawnViews, Feed

        return Feed(self.images, DrawnViews(self.data, self.policy), self.recipe.batch, self.recipe.seed, self.jobs)

    def plan(self) -> Plan:
        """How many steps and epochs there will be. Raises UsageError when there are none."""
        from kdprune_data.learn.recipe import Plan

        return Plan.of(self.recipe, self.feed().steps_per_epoch())


def view_seed(seed: int) -> int:
    """The seed of the views that a network of a seed is trained with: not those cached for a student of the same seed."""
    return order.derived(seed, "views/teacher")


def network(setup: Setup, code: str | None) -> nn.Module:
    """With fresh weights, which no student of the same seed starts from. `code`: the user's own function, where it is one."""
    from kdprune_data.learn import models

    return models.build(setup.architecture, seed=order.derived(setup.recipe.seed, "init/teacher"), code=code)


def job(setup: Setup, net: nn.Module, *, keep: Sequence[int], val: Validation | None = None, recorder: Recorder | None = None) -> _fit.Job:
    """The training: cross-entropy with the labels. `recorder`: notes what the network says of each sample."""
    import torch.nn.functional as F

    from kdprune_data.learn.loop import Hooks, Training

    training = Training(net, setup.feed(), setup.recipe, normalisation=setup.normalisation, device=setup.device)
    validated = training.plan.validated(len(setup.data.usable()), None if val is None else val.samples, most=None)
    hooks = Hooks(observe=None if recorder is None else recorder.observe, partial=recorder, validated=validated)
    smoothing = setup.recipe.label_smoothing
    return _fit.Job(
        training,
        keep,
        lambda logits, batch: F.cross_entropy(logits, batch.labels, label_smoothing=smoothing),
        _fit.validating(hooks, training, val),
    )


def recording(found: _fit.Job, setup: Setup, build: Build, recorder: Recorder, *, logits: bool) -> _fit.Job:
    """The training, with a file of dynamics for every whole epoch; with `logits` one of these too."""
    rows = setup.data.usable()

    def after_epoch(epoch: int, row: Mapping[str, Any]) -> None:
        if row["samples"] == len(rows):  # an epoch cut short by --steps is not recorded: each sample exactly once, or not at all
            if logits:
                dynamics.write_logits(build, epoch, recorder.logits(rows))
            dynamics.write(build, epoch, recorder.take(rows) | {"uid": setup.data.uids[rows]})

    def leaves(epoch: int) -> list[str]:
        plan = found.training.plan
        if epoch * plan.per_epoch > plan.steps:
            return []
        return [dynamics.path_of(epoch), *([dynamics.logits_path(epoch)] if logits else [])]

    return replace(found, hooks=replace(found.hooks, after_epoch=after_epoch), leaves=leaves)


def train(found: _fit.Job, setup: Setup, build: Build) -> Manifest:
    """Train to the end, continuing what is there, and seal the model. Raises KdpruneError when training diverges."""
    _fit.announce(setup.architecture.name, found.training)
    counts = _fit.train(found, build)
    return build.seal(counts=counts, classes=setup.data.classes, content=setup.data.manifest.content)
