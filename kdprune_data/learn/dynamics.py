"""What a network says of each sample while it learns: collected batch by batch, handed over epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdprune_data.learn.memory import sent
from kdprune_data.learn.stream import Batch


class Recorder:
    """Training dynamics of n rows; `observe` each batch before its update, `take` the epoch when it is over.

    The numbers wait on the device where the network computes: no step is held up to fetch them. classes: whole logits are kept too, of so
    many classes, less the largest of each row, in float16; None: they are not.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu", classes: int | None = None) -> None:
        self._values = torch.full((n, 3), float("nan"), device=device)
        self._correct = torch.zeros(n, dtype=torch.bool, device=device)
        self._logits = None if classes is None else torch.zeros((n, classes), dtype=torch.float16, device=device)

    def observe(self, batch: Batch, logits: Tensor) -> None:
        """logits: float of shape (n, c), as the network in train mode gave them for the augmented batch."""
        z = logits.float()
        labels = batch.labels[:, None]
        own = z.gather(1, labels)[:, 0]
        others = z.scatter(1, labels, float("-inf")).max(1).values if z.shape[1] > 1 else torch.zeros_like(own)
        loss = F.cross_entropy(z, batch.labels, reduction="none")
        rows = sent(torch.from_numpy(batch.rows), self._values.device)
        self._values[rows] = torch.stack([(-loss).exp(), own - others, loss], 1)
        self._correct[rows] = z.argmax(1) == batch.labels
        if self._logits is not None:
            least = torch.finfo(torch.float16).min
            self._logits[rows] = (z - z.max(1, keepdim=True).values).clamp(min=least).half()

    def take(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns `p_true logit_margin loss correct` of some rows; NaN where a sample was not shown."""
        p_true, margin, loss = self._values.cpu().numpy()[rows].T
        found = {"p_true": p_true, "logit_margin": margin, "loss": loss, "correct": self._correct.cpu().numpy()[rows]}
        self._values.fill_(float("nan"))
        return found

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """The logits of some rows in this epoch, float16 of shape (n, c), less the largest of each."""
        assert self._logits is not None
        return np.asarray(self._logits.cpu().numpy()[rows])

    def state(self) -> dict[str, Tensor]:
        """What was noted so far in this epoch, as a checkpoint keeps it."""
        return {"values": self._values, "correct": self._correct} | ({} if self._logits is None else {"logits": self._logits})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self._values.copy_(state["values"])
        self._correct.copy_(state["correct"])
        if self._logits is not None:
            self._logits.copy_(state["logits"])
