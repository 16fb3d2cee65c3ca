"""What a stage wants of the training loop: to be told, and to have a say at the end of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kdprune_data.learn.stream import Batch

LossOf = Callable[[Tensor, Batch], Tensor]
"""The loss of a batch: (logits, batch) to a scalar."""


class Partial(Protocol):
    """What a stage gathers during an epoch: part of a checkpoint in the middle of one."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What the stage wants to know and do. `observe(batch, logits)` before each update, logits detached; `partial` what it gathers so;
    `after_epoch(epoch, row)` with the epoch counted from 1 and its metrics; `tick(samples)` for progress; `validate` returns (loss,
    accuracy) and is called after the epochs in `validated`; `noted`: whose rows of metrics are kept (None: all)."""

    observe: Callable[[Batch, Tensor], None] | None = None
    partial: Partial | None = None
    after_epoch: Callable[[int, Mapping[str, Any]], None] | None = None
    tick: Callable[[int], None] | None = None
    validate: Callable[[], tuple[float, float]] | None = None
    validated: Collection[int] | None = None
    noted: Collection[int] | None = None
