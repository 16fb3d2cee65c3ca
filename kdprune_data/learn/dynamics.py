"""What a network says of each sample while it learns: collected batch by batch, handed over epoch by epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdprune_data.learn.stream import Batch


class Recorder:
    """Training dynamics of n rows; `observe` each batch before its update, `take` the epoch when it is over."""

    def __init__(self, n: int) -> None:
        self._values = np.full((n, 3), np.nan, np.float32)
        self._correct = np.zeros(n, bool)

    def observe(self, batch: Batch, logits: Tensor) -> None:
        """logits: float of shape (n, c), as the network in train mode gave them for the augmented batch."""
        z = logits.float()
        labels = batch.labels[:, None]
        own = z.gather(1, labels)[:, 0]
        others = z.scatter(1, labels, float("-inf")).max(1).values if z.shape[1] > 1 else torch.zeros_like(own)
        loss = F.cross_entropy(z, batch.labels, reduction="none")
        self._values[batch.rows] = torch.stack([(-loss).exp(), own - others, loss], 1).cpu().numpy()
        self._correct[batch.rows] = (z.argmax(1) == batch.labels).cpu().numpy()

    def take(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns `p_true logit_margin loss correct` of some rows; NaN where a sample was not shown."""
        p_true, margin, loss = self._values[rows].T
        found = {"p_true": p_true, "logit_margin": margin, "loss": loss, "correct": self._correct[rows]}
        self._values[:] = np.nan
        return found
