"""The loss of the paper: labels and teacher, mixed by one weight."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kdprune_data.errors import UsageError


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softmax at a temperature, mean over the batch; not scaled by temperature^2.

    student, teacher: logits, float of shape (n, c). Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    target = F.log_softmax(teacher / temperature, 1)
    return F.kl_div(F.log_softmax(student / temperature, 1), target, reduction="batchmean", log_target=True)


def distillation(
    student: Tensor, teacher: Tensor | None, labels: Tensor, *, alpha: float, temperature: float, smoothing: float = 0.0
) -> Tensor:
    """(1 - alpha) * CE(label) + alpha * temperature^2 * KL(teacher || student), batch means.

    student, teacher: logits, float of shape (n, c); labels: int64 of shape (n,); smoothing: the share of the label that CE spreads
    over all classes. Source: Ben-Baruch et al., "Distilling the knowledge in data pruning", ICML 2025; the temperature^2 is Hinton's, so
    that alpha means the same at any temperature.

    Raises UsageError when alpha weighs a teacher and there is none.
    """
    if alpha > 0 and teacher is None:
        raise UsageError(f"alpha {alpha:g} weighs the teacher's logits, and there are none: give a logit cache, or alpha 0")
    total = student.new_zeros(())
    if alpha < 1:
        total = total + (1 - alpha) * F.cross_entropy(student, labels, label_smoothing=smoothing)
    if alpha > 0 and teacher is not None:
        total = total + alpha * temperature**2 * kl(student, teacher, temperature)
    return total


def auto_alpha(kept: float) -> float:
    """The provisional weight of distillation for a kept fraction: 0.9 up to a tenth, linear in log10 to 0.5 at everything.

    >>> auto_alpha(0.02), auto_alpha(1.0)
    (0.9, 0.5)
    """
    return round(min(0.9, 0.5 - 0.4 * math.log10(kept)), 4)
