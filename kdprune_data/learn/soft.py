"""The losses that a student can have against its teacher's logits, found by name: `kl`, `dkd`, `dist`, `mse`.

A loss compares the logits of a batch, student's and teacher's for the very same views, and is a mean over the batch in which samples may
have weights. Only differences within a row of the teacher's logits count, in all of them: a cache stores z - max(z). `docs/methods.md`,
"The loss", states them. Adding one: a function, its settings, and a line in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprune_data.config import Settings, option, pairs
from kdprune_data.errors import UsageError, unknown

SPREAD = 1e-12
"""Added to the product of two standard deviations, so that a correlation with what does not vary is 0 and not a division by it."""


@dataclass(frozen=True)
class DkdSettings(Settings):
    """Settings of `dkd`: the weights of its two parts."""

    alpha: float = option(1.0, help="Weight of the label's class against all others.", least=0)
    beta: float = option(8.0, help="Weight of the other classes among themselves.", least=0)


@dataclass(frozen=True)
class DistSettings(Settings):
    """Settings of `dist`: the weights of its two parts."""

    beta: float = option(1.0, help="Weight of the correlation over classes, of each sample.", least=0)
    gamma: float = option(1.0, help="Weight of the correlation over the samples of a batch, of each class.", least=0)


@dataclass(frozen=True)
class Taught:
    """What a loss is of. student, teacher: logits, float of shape (n, c), of one type; labels: int64 of shape (n,); weights: see
    `weighted_mean`, None: all alike."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    temperature: float
    weights: Tensor | None = None


def kl(student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of softmax at a temperature, mean over the batch; not scaled by temperature^2.

    student, teacher: logits, float of shape (n, c); weights: see `weighted_mean`, None: all alike. Source: Hinton, Vinyals and Dean,
    "Distilling the knowledge in a neural network", 2015.
    """
    said, target = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    if weights is None:
        return F.kl_div(said, target, reduction="batchmean", log_target=True)
    return weighted_mean(_divergence(said, target), weights)


def dkd(of: Taught, settings: DkdSettings) -> Tensor:
    """alpha * TCKD + beta * NCKD, mean over the batch; not scaled by temperature^2.

    TCKD: KL(teacher || student) of (p of the label, 1 - p of the label), NCKD: of softmax over the other classes alone; p is softmax at the
    temperature. KL = TCKD + (1 - teacher's p of the label) NCKD. Raises UsageError where there is no other class. Source: Zhao et al.,
    "Decoupled knowledge distillation", CVPR 2022.
    """
    n, classes = of.student.shape
    if classes < 2:
        raise UsageError("the loss dkd compares the label's class with the others, and there is one class: use --loss kl")
    own = of.labels[:, None]
    # The numbers of the other classes, so that the label's takes no part, however large its logit is.
    others = torch.arange(classes - 1, device=of.labels.device).expand(n, -1)
    others = others + (others >= own)
    (said, rest), (target, rest_target) = (_parted(z / of.temperature, own, others) for z in (of.student, of.teacher))
    losses = settings.alpha * _divergence(said, target) + settings.beta * _divergence(rest, rest_target)
    return _mean(losses, of.weights)


def _parted(z: Tensor, own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of softmax: of the label against all others, shape (n, 2), and of the others among themselves, shape (n, c - 1)."""
    rest = z.gather(1, others)
    return F.log_softmax(torch.cat([z.gather(1, own), rest.logsumexp(1, keepdim=True)], 1), 1), F.log_softmax(rest, 1)


def dist(of: Taught, settings: DistSettings) -> Tensor:
    """beta * (1 - r over classes, mean over the batch) + gamma * (1 - r over the batch, mean over classes); not scaled by temperature^2.

    r: Pearson's correlation of student's and teacher's softmax at the temperature; 0 where one of them does not vary, as in a batch of one.
    Weights of samples count in the mean over the batch, and in means, variances and covariance of r over the batch: a sample of weight 2
    counts as two. Source: Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022, eq. 8 and 9.
    """
    p, q = (F.softmax(z / of.temperature, 1) for z in (of.student, of.teacher))
    n, classes = p.shape
    even = p.new_tensor(1 / n).expand(n) if of.weights is None else shares(of.weights, p)
    of_samples = 1 - _pearson(p, q, p.new_tensor(1 / classes).expand(classes), 1)
    # The sum of shares is 1, or 0 where all weights are: then there is nothing to correlate, and no loss.
    of_classes = even.sum() - _pearson(p, q, even[:, None], 0)
    return settings.beta * _mean(of_samples, of.weights) + settings.gamma * of_classes.mean()


def _pearson(a: Tensor, b: Tensor, share: Tensor, dim: int) -> Tensor:
    """The correlation of a and b along a dimension, in which each element counts by its share."""
    a, b = (x - (share * x).sum(dim, keepdim=True) for x in (a, b))
    root = share.sqrt()
    # Norms, for their gradient at 0 is 0, where that of a square root is infinite.
    spread = torch.linalg.vector_norm(root * a, dim=dim) * torch.linalg.vector_norm(root * b, dim=dim)
    found: Tensor = (share * a * b).sum(dim) / (spread + SPREAD)
    return found


def mse(of: Taught, _: Settings) -> Tensor:
    """Mean over the batch and the classes of the squared difference of logits, each row less its mean; knows no temperature.

    Rows are centred because a cache stores differences only (z - max(z)), and softmax knows no others. It is the limit of twice
    temperature^2 KL as the temperature grows. Source: Kim et al., "Comparing Kullback-Leibler divergence and mean squared error loss in
    knowledge distillation", IJCAI 2021, of logits as they are; the mean over classes is that of the authors' code.
    """
    apart = of.student - of.teacher
    return _mean((apart - apart.mean(1, keepdim=True)).square().mean(1), of.weights)


def _divergence(said: Tensor, target: Tensor) -> Tensor:
    """KL(target || said) of each row, both logarithms: shape (n, k) to (n,)."""
    return F.kl_div(said, target, reduction="none", log_target=True).sum(1)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else weighted_mean(losses, weights)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(w * l) / sum(w): a sample of weight 2 counts as two of weight 1. 0 where all weights are.

    losses, weights: float of shape (n,), weights finite and not negative. Returns a scalar of the losses' type.
    """
    return (losses * shares(weights, losses)).sum()


def shares(weights: Tensor, like: Tensor) -> Tensor:
    """w / sum(w), of another tensor's type; 0 where all weights are. Shape (n,) in and out."""
    least = torch.finfo(like.dtype).tiny
    # By the largest first: the sum of very large weights would be infinite, that of very small ones nothing.
    scaled = weights.to(like.dtype) / weights.to(like.dtype).max().clamp(min=least)
    return scaled / scaled.sum().clamp(min=least)


@dataclass(frozen=True)
class Loss:
    """A loss of LOSSES. of: from what is taught and the loss's settings to a scalar; tempered: it knows a temperature, and is scaled by its
    square, so that its gradients keep their size at any; labelled: it needs the label of every sample."""

    of: Callable[[Taught, Any], Tensor]
    settings: type[Settings] = Settings
    tempered: bool = True
    labelled: bool = False


LOSSES: dict[str, Loss] = {
    "kl": Loss(lambda of, _: kl(of.student, of.teacher, of.temperature, of.weights)),
    "dkd": Loss(dkd, DkdSettings, labelled=True),
    "dist": Loss(dist, DistSettings),
    "mse": Loss(mse, tempered=False),
}


@dataclass(frozen=True)
class Soft:
    """A loss with its settings."""

    name: str = "kl"
    settings: Settings = Settings()

    @classmethod
    def choose(cls, name: str, given: Iterable[str] = ()) -> Soft:
        """By name, with settings as `name=value` texts. Raises UsageError for what is not there."""
        if name not in LOSSES:
            raise unknown("loss", name, LOSSES)
        return cls(name, LOSSES[name].settings.parse(name, pairs(given)))

    @property
    def kind(self) -> Loss:
        """What is known of it."""
        return LOSSES[self.name]

    def own(self) -> dict[str, Any]:
        """As it stands in a student's manifest: nothing for `kl`."""
        settings = self.settings.own()
        return {} if self.name == "kl" else {"loss": self.name} | ({"settings": settings} if settings else {})
