"""Scores from what one network says of a batch, in eval mode: each a function of `Outputs`, found by name in `FROM_OUTPUTS`.

All are computed in float64 from the logits, so that a score does not depend on the batch it was computed in, and no temperature is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What a network says of n samples: logits, float of shape (n, c); labels, int64 of shape (n,); embedding, float of shape (n, d), the
    input of the Linear layer that makes the logits; bias: whether that layer has one."""

    logits: Tensor
    labels: Tensor
    embedding: Tensor
    bias: bool = True

    @cached_property
    def log_p(self) -> Tensor:
        """float64 of shape (n, c)."""
        return F.log_softmax(self.logits.double(), 1)

    @cached_property
    def p(self) -> Tensor:
        """float64 of shape (n, c)."""
        return self.log_p.exp()


def el2n(out: Outputs) -> Tensor:
    """Norm of the error vector softmax(z) - onehot(y): float64 of shape (n,), in [0, sqrt(2)]. High is hard.

    Source: Paul, Ganguli and Dziugaite, "Deep learning on a data diet", NeurIPS 2021, definition 2.2.
    """
    norms: Tensor = torch.linalg.vector_norm(out.p - F.one_hot(out.labels, out.logits.shape[1]), dim=1)
    return norms


def grand(out: Outputs) -> Tensor:
    """Norm of the loss gradient of the last layer (weights and bias, if it has one): float64 of shape (n,). High is hard.

    The gradient is the outer product of softmax(z) - onehot(y) and (h, 1), so its norm is el2n * sqrt(1 + |h|^2): no backward pass. Without
    a bias it is el2n * |h|.
    Source: Paul et al. 2021, definition 2.1, restricted to the last layer.
    """
    return el2n(out) * (float(out.bias) + out.embedding.double().square().sum(1)).sqrt()


def entropy(out: Outputs) -> Tensor:
    """-sum p log p, in nats: float64 of shape (n,). High is hard."""
    entropies: Tensor = torch.special.entr(out.p).sum(1)
    return entropies


def margin(out: Outputs) -> Tensor:
    """Largest probability minus the second largest: float64 of shape (n,). Low is hard."""
    best = out.p.topk(min(2, out.p.shape[1]), 1).values
    return best[:, 0] - best[:, 1] if best.shape[1] > 1 else best[:, 0]


def confidence(out: Outputs) -> Tensor:
    """Largest probability: float64 of shape (n,). Low is hard."""
    return out.p.max(1).values


def loss(out: Outputs) -> Tensor:
    """Cross-entropy of the label, in nats: float64 of shape (n,). High is hard."""
    return -out.log_p.gather(1, out.labels[:, None])[:, 0]


FROM_OUTPUTS: dict[str, Callable[[Outputs], Tensor]] = {
    "el2n": el2n,
    "grand": grand,
    "entropy": entropy,
    "margin": margin,
    "confidence": confidence,
    "loss": loss,
}
