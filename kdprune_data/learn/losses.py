"""The loss of the paper: labels and teacher, mixed by one weight. What the teacher's part can be is in `learn/soft.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kdprune_data.errors import UsageError
from kdprune_data.learn.soft import Soft, Taught, kl, weighted_mean

__all__ = ["Mix", "Soft", "auto_alpha", "cross_entropy", "distillation", "kl", "weighted_mean"]


@dataclass(frozen=True)
class Mix:
    """How label and teacher are mixed: the teacher's weight, from 0 to 1; the temperature of both softmaxes; `smoothing`: the share of the
    label that cross-entropy spreads over all classes; `soft`: the loss against the teacher's logits."""

    alpha: float
    temperature: float
    smoothing: float = 0.0
    soft: Soft = Soft()


def cross_entropy(student: Tensor, labels: Tensor, *, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of the labels, mean over the batch.

    student: logits, float of shape (n, c); labels: int64 of shape (n,); weights: see `weighted_mean`, None: all alike.
    """
    if weights is None:
        return F.cross_entropy(student, labels, label_smoothing=smoothing)
    return weighted_mean(F.cross_entropy(student, labels, label_smoothing=smoothing, reduction="none"), weights)


def distillation(student: Tensor, teacher: Tensor | None, labels: Tensor, *, mix: Mix, weights: Tensor | None = None) -> Tensor:
    """(1 - alpha) * CE(label) + alpha * temperature^2 * KL(teacher || student), batch means; or another loss of `soft.LOSSES` for the KL.

    student, teacher: logits, float of shape (n, c); labels: int64 of shape (n,); weights: of the samples in both means, float of shape
    (n,), finite and not negative, None: all alike. Source: Ben-Baruch et al., "Distilling the knowledge in data pruning", ICML 2025; the
    temperature^2 is Hinton's, so that alpha means the same at any temperature. `mse`, which knows no temperature, is taken as it is.

    Raises UsageError when alpha weighs a teacher and there is none.
    """
    alpha, tau = mix.alpha, mix.temperature
    if alpha > 0 and teacher is None:
        raise UsageError(f"alpha {alpha:g} weighs the teacher's logits, and there are none: give a logit cache, or alpha 0")
    total = student.new_zeros(())
    if alpha < 1:
        total = total + (1 - alpha) * cross_entropy(student, labels, smoothing=mix.smoothing, weights=weights)
    if alpha > 0 and teacher is not None:
        loss = mix.soft.kind
        scale = tau**2 if loss.tempered else 1.0
        total = total + alpha * scale * loss.of(Taught(student, teacher.to(student.dtype), labels, tau, weights), mix.soft.settings)
    return total


def auto_alpha(kept: float) -> float:
    """The provisional weight of distillation for a kept fraction: 0.9 up to a tenth, linear in log10 to 0.5 at everything.

    >>> auto_alpha(0.02), auto_alpha(1.0)
    (0.9, 0.5)
    """
    return round(min(0.9, 0.5 - 0.4 * math.log10(kept)), 4)
