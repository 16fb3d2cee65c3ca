"""The training loop, one for teachers and students: a `Recipe`, a feed of batches, a loss; what it learned is saved so that it can go on.

Position is (seed, epoch, step): batches, views and the first state of dropout's generator in an epoch are functions of these alone, and a
checkpoint holds the rest, so a run that continues from one ends with the weights of one that was never interrupted (same device, thread
count and versions).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from kdprune_data import order
from kdprune_data.errors import KdpruneError, UsageError, first_line
from kdprune_data.learn.average import Average
from kdprune_data.learn.checkpoint import Checkpoint
from kdprune_data.learn.hooks import Hooks, LossOf
from kdprune_data.learn.memory import arriving
from kdprune_data.learn.recipe import Plan, Recipe
from kdprune_data.learn.stream import Batch, Feed
from kdprune_data.learn.views import Normalisation

__all__ = ["Checkpoint", "Hooks", "LossOf", "Plan", "Recipe", "Training"]
SAVE_EVERY = 5.0
"""Seconds between checkpoints, at least; what is learned does not depend on it."""
SAVE_SHARE = 20.0
"""A checkpoint comes no sooner than this many times what the last one cost: at most a twentieth of the time goes into them."""
CHECK_EVERY = 50
"""Steps after which the loss is looked at: seldom enough that a GPU does not wait for it."""


class Training:
    """A network being trained: `epoch` epochs and `within` steps of the next one are done; `metrics` holds the rows that are kept.

    teacher: what is asked for the soft labels of each batch (`live.Teacher`), in the place of those in the feed; None: nothing is.
    """

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        recipe: Recipe,
        *,
        normalisation: Normalisation,
        device: torch.device,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.feed = feed
        self.recipe = recipe
        self.normalisation = normalisation
        self.device = device
        self.teacher = teacher
        self.plan = Plan.of(recipe, feed.steps_per_epoch())
        self.epoch = 0
        self.within = 0
        self.seen = 0
        self.metrics: list[dict[str, Any]] = []
        self.diverged = False
        self._saved, self._pause = 0.0, 0.0
        self._loss, self._right = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        self._optimizer = _optimizer(model, recipe, device)
        self._average = None if recipe.ema is None else Average(self.model, recipe.ema)
        # One program for each of an epoch's two lengths of batch, whichever comes first: a continued run computes as the first did.
        self._compiled = torch.compile(self.model, dynamic=False) if recipe.compile else None

    @property
    def step(self) -> int:
        """Steps done."""
        return min(self.epoch * self.plan.per_epoch + self.within, self.plan.steps)

    @property
    def samples(self) -> int:
        """Samples shown so far."""
        return self.epoch * len(self.feed.images.data.usable()) + (self.seen if self.within else 0)

    @property
    def learned(self) -> nn.Module:
        """The network that is the result: the average, where one is kept."""
        return self.model if self._average is None else self._average.module

    def run(self, loss_of: LossOf, hooks: Hooks, checkpoint: Checkpoint | None = None) -> None:
        """Train to the end, saving now and then in the checkpoint. To go on from one, `load` it before.

        Raises KdpruneError, and sets `diverged`, when a number is no number.
        """
        for _ in self.steps(loss_of, hooks, checkpoint):
            pass

    def steps(self, loss_of: LossOf, hooks: Hooks, checkpoint: Checkpoint | None = None) -> Iterator[int]:
        """As `run`, step by step: the samples of each."""
        self._saved, self._pause = time.monotonic(), SAVE_EVERY
        while self.epoch < self.plan.epochs:
            for samples in self._epoch_steps(loss_of, hooks):
                yield samples
                if self.within < self.plan.per_epoch:
                    self._save_when_due(hooks, checkpoint)
            self._end_epoch(hooks)
            self._save_when_due(hooks, checkpoint)

    def _save_when_due(self, hooks: Hooks, checkpoint: Checkpoint | None) -> None:
        """A checkpoint now and then, never of a state that is no good, and none of the end."""
        if checkpoint is None or self.step == self.plan.steps or time.monotonic() - self._saved <= self._pause:
            return
        began = time.monotonic()
        self._check(everything=True)
        checkpoint.save(self, hooks.partial)
        self._saved = time.monotonic()
        self._pause = max(SAVE_EVERY, SAVE_SHARE * (self._saved - began))

    def _epoch_steps(self, loss_of: LossOf, hooks: Hooks) -> Iterator[int]:
        """What is left of an epoch."""
        self.model.train()
        if self.within == 0:
            # Dropout and its like draw from torch's generator; in the middle of an epoch its state is the checkpoint's.
            torch.manual_seed(order.derived(self.recipe.seed, f"dropout/{self.epoch}"))
            self._loss.zero_()
            self._right.zero_()
            self.seen = 0
        left = min(self.plan.per_epoch - self.within, self.plan.steps - self.step)
        with closing(self.feed.epoch(self.epoch, self.within)) as batches:
            for batch in arriving(islice(batches, left), self.device):
                self._learn(batch, loss_of, hooks)
                self.within += 1
                self.seen += len(batch.rows)
                if self.step % CHECK_EVERY == 0:
                    self._check()
                if hooks.tick is not None:
                    hooks.tick(len(batch.rows))
                yield len(batch.rows)

    def _learn(self, batch: Batch, loss_of: LossOf, hooks: Hooks) -> None:
        """One step, of a batch on the device. On CUDA nothing here waits for what is computed."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.lr_at(self.step, self.recipe)
        moved = replace(batch, images=self.normalisation.apply(batch.images))
        if self.teacher is not None:
            moved = replace(moved, logits=self.teacher(batch.images))
        with self._compiling():
            logits = self._forward(moved.images)
            loss = loss_of(logits, moved)
            if hooks.observe is not None:
                hooks.observe(moved, logits.detach())
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's stub lacks it
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._optimizer.step()
        if self._average is not None:
            self._average.follow(self.model)
        self._loss += loss.detach() * len(batch.rows)
        self._right += (logits.detach().argmax(1) == moved.labels).sum()

    def _forward(self, images: Tensor) -> Tensor:
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits: Tensor = (self.model if self._compiled is None else self._compiled)(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            # Where an image has shrunk to one pixel, a batch of one has nothing to take a deviation of.
            raise UsageError(
                f"batch norm cannot learn from a batch of {len(images)}: at least 2 samples and --batch 2, or --norm group"
            ) from None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """One line for a failure of the compiler, which works at the first steps."""
        try:
            yield
        except Exception as error:  # torch's compiler has dozens of its own
            if self._compiled is None or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise KdpruneError(f"--compile failed ({type(error).__name__}: {first_line(error)}): leave it out") from error

    def _end_epoch(self, hooks: Hooks) -> None:
        """The epoch's row of metrics, its validation, and what the stage does with it."""
        # The loss is taken before each update: the weights tell of the last one.
        self._check(everything=True)
        last, rate = self.step == self.plan.steps, self.plan.lr_at(self.step - 1, self.recipe)
        row: dict[str, Any] = {"epoch": self.epoch + 1, "steps": self.step, "samples": self.seen, "lr": rate}
        labelled = self._labelled()
        row |= {"train_loss": float(self._loss) / self.seen, "train_accuracy": float(self._right) / labelled if labelled else None}
        row |= {"val_loss": None, "val_accuracy": None}
        if hooks.validate is not None and (last or hooks.validated is None or self.epoch + 1 in hooks.validated):
            row["val_loss"], row["val_accuracy"] = hooks.validate()
            if not math.isfinite(row["val_loss"]):  # huge weights may be finite, and what they make of images not
                raise self._divergence()
        self.epoch, self.within = self.epoch + 1, 0
        if last or hooks.noted is None or self.epoch in hooks.noted:
            self.metrics.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        if hooks.after_epoch is not None:
            hooks.after_epoch(self.epoch, row)

    def _labelled(self) -> int:
        """Samples of the epoch so far that have a label."""
        data = self.feed.images.data
        if (data.labels[data.usable()] >= 0).all():
            return self.seen
        shown = self.feed.plan(self.epoch)[: self.within]
        return sum(int((data.labels[rows] >= 0).sum()) for rows in shown)

    def _check(self, *, everything: bool = False) -> None:
        """Refuse to go on from a loss that is no number; with `everything`, from such weights and momentum too."""
        fine = bool(torch.isfinite(self._loss))
        if fine and (not everything or all(bool(torch.isfinite(v).all()) for v in self._tensors().values())):
            return
        raise self._divergence()

    def _divergence(self) -> KdpruneError:
        self.diverged = True
        rate = self.plan.lr_at(self.step - 1, self.recipe)
        clip = "" if self.recipe.clip is not None else ", or give --clip 1"
        return KdpruneError(
            f"training has diverged: after step {self.step} (epoch {self.epoch + 1}, learning rate {rate:g}) the loss or a weight is not a "
            f"finite number; lower --lr (it is {self.recipe.lr:g}){clip}"
        )

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, where it is: `model/`, `momentum/` and `average/` tensors by name."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"momentum/{names[id(p)]}": s["momentum_buffer"] for p, s in self._optimizer.state.items()}
        return found if self._average is None else found | {f"average/{k}": v for k, v in self._average.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that going on needs, by name, on the CPU: weights, momentum, average; generators and sums of the epoch."""
        found = self._tensors() | {"sums/loss": self._loss, "sums/right": self._right, "rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            found["rng/mps"] = torch.mps.get_rng_state()
        return {k: v.detach().cpu().contiguous().clone() for k, v in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises KeyError or RuntimeError when it is another training's."""
        own = self.model.state_dict()
        own.update(_part(state, "model/"))
        self.model.load_state_dict(own)
        if self._average is not None:
            self._average.load_state_dict(_part(state, "average/"))
        parameters, momentum = dict(self.model.named_parameters()), _part(state, "momentum/")
        for name, buffer in momentum.items():
            p = parameters[name]
            # Memory laid out as the parameter's, or the sums below would round in another order.
            self._optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(buffer)
        self._loss.copy_(state["sums/loss"])
        self._right.copy_(state["sums/right"])
        torch.set_rng_state(state["rng/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng/cuda"], self.device)
        elif self.device.type == "mps":
            torch.mps.set_rng_state(state["rng/mps"])


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """SGD, on CUDA in one kernel for all parameters."""
    groups, fused = _groups(model, recipe.weight_decay), True if device.type == "cuda" else None
    nesterov = recipe.momentum > 0  # without momentum torch has no Nesterov
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay on norms and biases: they are the parameters of fewer than two dimensions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
