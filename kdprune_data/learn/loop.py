"""The training loop, one for teachers and students: a `Recipe`, a feed of batches, a loss; what it learned is saved so that it can go on.

Position is (seed, epoch): batches, views and dropout of an epoch are functions of these alone, so a run that continues from the
checkpoint of an epoch ends with the weights of one that was never interrupted (same device, thread count and versions).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdprune_data import order
from kdprune_data.errors import FormatError, KdpruneError, UsageError
from kdprune_data.learn.stream import Batch, Feed
from kdprune_data.learn.views import Normalisation

SAVE_EVERY = 20.0
"""Seconds between checkpoints of short epochs; what is saved does not depend on it."""


@dataclass(frozen=True)
class Recipe:
    """How to train. `steps`, where given, ends training there instead of after `epochs`; warm-up is linear, then a cosine to zero."""

    epochs: int = 30
    steps: int | None = None
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As it stands in manifests."""
        return asdict(self) | {"optimizer": "sgd-nesterov", "schedule": "cosine"}


@dataclass(frozen=True)
class Plan:
    """A recipe laid over a data set: how many steps in all, how many epochs that begins, how many steps in each."""

    steps: int
    epochs: int
    per_epoch: int

    @classmethod
    def of(cls, recipe: Recipe, per_epoch: int) -> Plan:
        """Raises UsageError when there would be nothing to do."""
        steps = recipe.epochs * per_epoch if recipe.steps is None else recipe.steps
        if steps < 1:
            raise UsageError(f"{steps} training steps: at least one epoch or step is needed")
        return cls(steps, math.ceil(steps / per_epoch), per_epoch)

    def lr_at(self, step: int, recipe: Recipe) -> float:
        """The learning rate of one step, counted from 0. Warm-up takes at most half of training."""
        warm = min(recipe.warmup_epochs * self.per_epoch, self.steps // 2)
        if step < warm:
            return recipe.lr * (step + 1) / warm
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))


@dataclass(frozen=True)
class Hooks:
    """What the stage wants to know and do. `observe(batch, logits)` before each update, logits detached; `after_epoch(epoch, row)` with the
    epoch counted from 1 and its metrics; `tick(samples)` for progress; `validate` returns (loss, accuracy)."""

    observe: Callable[[Batch, Tensor], None] | None = None
    after_epoch: Callable[[int, Mapping[str, Any]], None] | None = None
    tick: Callable[[int], None] | None = None
    validate: Callable[[], tuple[float, float]] | None = None
    validate_every: int = 1


LossOf = Callable[[Tensor, Batch], Tensor]


class Training:
    """A network being trained. `metrics` holds a row for each epoch that was validated or was the last."""

    def __init__(self, model: nn.Module, feed: Feed, recipe: Recipe, *, normalisation: Normalisation, device: torch.device) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.feed = feed
        self.recipe = recipe
        self.normalisation = normalisation
        self.device = device
        self.plan = Plan.of(recipe, feed.steps_per_epoch())
        self.epoch = 0
        self.metrics: list[dict[str, Any]] = []
        self._optimizer = torch.optim.SGD(_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=True)

    @property
    def step(self) -> int:
        """Steps done at the end of the epochs done."""
        return min(self.epoch * self.plan.per_epoch, self.plan.steps)

    def run(self, loss_of: LossOf, hooks: Hooks, checkpoint: Checkpoint | None = None) -> None:
        """Train to the end, from where the checkpoint stands. Raises KdpruneError when the loss is no longer a number."""
        if checkpoint is not None:
            checkpoint.load(self)
        saved = time.monotonic()
        while self.epoch < self.plan.epochs:
            loss, right, seen = self._run_epoch(loss_of, hooks)
            self.epoch += 1
            last = self.epoch == self.plan.epochs
            row: dict[str, Any] = {
                "epoch": self.epoch,
                "steps": self.step,
                "samples": seen,
                "lr": self.plan.lr_at(self.step - 1, self.recipe),
            }
            row |= {"train_loss": loss, "train_accuracy": right, "val_loss": None, "val_accuracy": None}
            if last or self.epoch % hooks.validate_every == 0:
                if hooks.validate is not None:
                    row["val_loss"], row["val_accuracy"] = hooks.validate()
                self.metrics.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
            if hooks.after_epoch is not None:
                hooks.after_epoch(self.epoch, row)
            if checkpoint is not None and not last and time.monotonic() - saved > SAVE_EVERY:
                checkpoint.save(self)
                saved = time.monotonic()

    def _run_epoch(self, loss_of: LossOf, hooks: Hooks) -> tuple[float, float, int]:
        """One epoch: mean loss, accuracy before each update, and samples."""
        self.model.train()
        # Dropout and its like draw from torch's generator: seeded per epoch, so that a continued run draws the same.
        torch.manual_seed(order.derived(self.recipe.seed, f"dropout/{self.epoch}"))
        total, right, seen = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        steps_left = self.plan.steps - self.step
        for n, batch in enumerate(self.feed.epoch(self.epoch)):
            if n >= steps_left:
                break
            for group in self._optimizer.param_groups:
                group["lr"] = self.plan.lr_at(self.epoch * self.plan.per_epoch + n, self.recipe)
            images = self.normalisation.apply(batch.images.to(self.device, non_blocking=True))
            moved = Batch(batch.rows, images, batch.labels.to(self.device), None if batch.logits is None else batch.logits.to(self.device))
            logits = self._forward(images)
            loss = loss_of(logits, moved)
            if hooks.observe is not None:
                hooks.observe(moved, logits.detach())
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's stub lacks it
            self._optimizer.step()
            total += loss.detach() * len(batch.rows)
            right += (logits.detach().argmax(1) == moved.labels).sum()
            seen += len(batch.rows)
            if hooks.tick is not None:
                hooks.tick(len(batch.rows))
        # The loss is taken before each update: the weights tell of the last one.
        if not bool(torch.isfinite(total)) or not all(bool(torch.isfinite(v).all()) for v in self.model.state_dict().values()):
            raise KdpruneError(f"the loss is not a number any more in epoch {self.epoch + 1}: lower --lr (it is {self.recipe.lr:g})")
        return float(total) / seen, float(right) / seen, seen

    def _forward(self, images: Tensor) -> Tensor:
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits: Tensor = self.model(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            # Where an image has shrunk to one pixel, a batch of one has nothing to take a deviation of.
            raise UsageError(
                f"batch norm cannot learn from a batch of {len(images)}: at least 2 samples and --batch 2, or --norm group"
            ) from None
        return logits.float()

    def state(self) -> dict[str, Tensor]:
        """Weights and momentum, by name."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        momentum = {f"momentum/{names[id(p)]}": s["momentum_buffer"] for p, s in self._optimizer.state.items()}
        return {f"model/{k}": v for k, v in weights(self.model).items()} | {k: v.detach().cpu().contiguous() for k, v in momentum.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        own = self.model.state_dict()
        own.update({k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")})
        self.model.load_state_dict(own)
        for name, p in self.model.named_parameters():
            if f"momentum/{name}" in state:
                buffer = state[f"momentum/{name}"].to(p.device)
                # Memory laid out as the parameter's, or the sums below would round in another order.
                self._optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(buffer)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay on norms and biases: they are the parameters of fewer than two dimensions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers on the CPU, as they are saved."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}


class Checkpoint:
    """`last.ckpt/` of an unfinished model folder: `state.json` names the newest state file, which is written whole before it is named."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, training: Training) -> None:
        """Save the state after an epoch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"state-{training.epoch:06d}.safetensors"
        save_file(training.state(), self.folder / f".{name}.tmp")
        (self.folder / f".{name}.tmp").replace(self.folder / name)
        note = {"epoch": training.epoch, "file": name, "metrics": training.metrics}
        beside = self.folder / ".state.json.tmp"
        beside.write_text(json.dumps(note), encoding="utf-8")
        beside.replace(self.folder / "state.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, training: Training) -> None:
        """Continue from the saved state, if there is one. Raises FormatError when it cannot be read."""
        note = self.folder / "state.json"
        if not note.is_file():
            return
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
            state = load_file(self.folder / found["file"])
        except Exception as error:  # json, safetensors and the file system each have their own
            raise FormatError(f"{note} cannot be read ({type(error).__name__}): start again with --overwrite") from None
        training.restore(state)
        training.epoch, training.metrics = found["epoch"], found["metrics"]
