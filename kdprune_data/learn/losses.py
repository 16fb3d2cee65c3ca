"""The loss of the paper: labels and teacher, mixed by one weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprune_data.errors import UsageError


@dataclass(frozen=True)
class Mix:
    """How label and teacher are mixed: the teacher's weight, from 0 to 1; the temperature of both softmaxes; `smoothing`: the share of the
    label that cross-entropy spreads over all classes."""

    alpha: float
    temperature: float
    smoothing: float = 0.0


def kl(student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of softmax at a temperature, mean over the batch; not scaled by temperature^2.

    student, teacher: logits, float of shape (n, c); weights: see `weighted_mean`, None: all alike. Source: Hinton, Vinyals and Dean,
    "Distilling the knowledge in a neural network", 2015.
    """
    said, target = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    if weights is None:
        return F.kl_div(said, target, reduction="batchmean", log_target=True)
    return weighted_mean(F.kl_div(said, target, reduction="none", log_target=True).sum(1), weights)


def cross_entropy(student: Tensor, labels: Tensor, *, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of the labels, mean over the batch.

    student: logits, float of shape (n, c); labels: int64 of shape (n,); weights: see `weighted_mean`, None: all alike.
    """
    if weights is None:
        return F.cross_entropy(student, labels, label_smoothing=smoothing)
    return weighted_mean(F.cross_entropy(student, labels, label_smoothing=smoothing, reduction="none"), weights)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(w * l) / sum(w): a sample of weight 2 counts as two of weight 1. 0 where all weights are.

    losses, weights: float of shape (n,), weights finite and not negative. Returns a scalar of the losses' type.
    """
    least = torch.finfo(losses.dtype).tiny
    # By the largest first: the sum of very large weights would be infinite, that of very small ones nothing.
    scaled = weights.to(losses.dtype) / weights.to(losses.dtype).max().clamp(min=least)
    return (losses * (scaled / scaled.sum().clamp(min=least))).sum()


def distillation(student: Tensor, teacher: Tensor | None, labels: Tensor, *, mix: Mix, weights: Tensor | None = None) -> Tensor:
    """(1 - alpha) * CE(label) + alpha * temperature^2 * KL(teacher || student), batch means.

    student, teacher: logits, float of shape (n, c); labels: int64 of shape (n,); weights: of the samples in both means, float of shape
    (n,), finite and not negative, None: all alike. Source: Ben-Baruch et al., "Distilling the knowledge in data pruning", ICML 2025; the
    temperature^2 is Hinton's, so that alpha means the same at any temperature.

    Raises UsageError when alpha weighs a teacher and there is none.
    """
    alpha, tau = mix.alpha, mix.temperature
    if alpha > 0 and teacher is None:
        raise UsageError(f"alpha {alpha:g} weighs the teacher's logits, and there are none: give a logit cache, or alpha 0")
    total = student.new_zeros(())
    if alpha < 1:
        total = total + (1 - alpha) * cross_entropy(student, labels, smoothing=mix.smoothing, weights=weights)
    if alpha > 0 and teacher is not None:
        total = total + alpha * tau**2 * kl(student, teacher, tau, weights)
    return total


def auto_alpha(kept: float) -> float:
    """The provisional weight of distillation for a kept fraction: 0.9 up to a tenth, linear in log10 to 0.5 at everything.

    >>> auto_alpha(0.02), auto_alpha(1.0)
    (0.9, 0.5)
    """
    return round(min(0.9, 0.5 - 0.4 * math.log10(kept)), 4)
