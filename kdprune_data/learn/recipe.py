"""How to train: a `Recipe`, and the `Plan` that it becomes over a data set: how many steps, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kdprune_data.errors import UsageError, unknown

SCHEDULES = ("cosine", "linear", "constant")
MOST_VALIDATIONS = 30


@dataclass(frozen=True)
class Recipe:
    """How to train. `steps`, where given, ends training there instead of after `epochs`. Warm-up is linear; then `schedule`: a cosine to
    zero, a line to zero, or no change. `clip`: the largest norm of all gradients together; `ema`: the decay, per step, of an average of
    weights and buffers, which is then what was learned; `compile`: run the network through torch.compile."""

    epochs: int = 30
    steps: int | None = None
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    seed: int = 0
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    clip: float | None = None
    ema: float | None = None
    compile: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As it stands in manifests."""
        return asdict(self) | {"optimizer": "sgd-nesterov"}


@dataclass(frozen=True)
class Plan:
    """A recipe laid over a data set: how many steps in all, how many epochs that begins, how many steps in each."""

    steps: int
    epochs: int
    per_epoch: int

    @classmethod
    def of(cls, recipe: Recipe, per_epoch: int) -> Plan:
        """Raises UsageError when there would be nothing to do, or the schedule is not known."""
        steps = recipe.epochs * per_epoch if recipe.steps is None else recipe.steps
        if steps < 1:
            raise UsageError(f"{steps} training steps: at least one epoch or step is needed")
        if recipe.schedule not in SCHEDULES:
            raise unknown("schedule", recipe.schedule, SCHEDULES)
        return cls(steps, math.ceil(steps / per_epoch), per_epoch)

    def lr_at(self, step: int, recipe: Recipe) -> float:
        """The learning rate of one step, counted from 0. Warm-up takes at most half of training."""
        warm = min(recipe.warmup_epochs * self.per_epoch, self.steps // 2)
        if step < warm:
            return recipe.lr * (step + 1) / warm
        done = (step - warm) / max(self.steps - warm, 1)
        if recipe.schedule == "cosine":
            return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
        return recipe.lr * (1 - done) if recipe.schedule == "linear" else recipe.lr

    def validated(self, samples: int, val: int | None, *, most: int | None = MOST_VALIDATIONS) -> frozenset[int]:
        """The epochs (counted from 1) after which to validate: evenly spread, the last among them, and so few that no more samples are
        validated than trained on, unless it is once. samples: in an epoch; val: in the validation data, None where there are none."""
        times = self.epochs if most is None else min(most, self.epochs)
        if val is not None:
            times = min(times, max(1, self.steps * samples // (self.per_epoch * val)))
        return frozenset(-(-n * self.epochs // times) for n in range(1, times + 1))
