"""Running a network over a data set without training it: devices, batches of outputs, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kdprune_data import order
from kdprune_data.errors import UsageError, unknown
from kdprune_data.learn import views
from kdprune_data.learn.memory import keep_freed, sent
from kdprune_data.learn.stream import Images, prefetch
from kdprune_data.learn.views import Normalisation

DEVICES = ("auto", "cpu", "cuda", "mps")
TOP = 5
T = TypeVar("T")
Begun = TypeVar("Begun")
R = TypeVar("R")


def choose_device(name: str) -> torch.device:
    """`auto`: cuda where there is one, then mps, then cpu. Raises UsageError for one that is not there.

    Choosing cuda sets torch, for this process, to full float32 and to the same kernels every time; choosing cpu lets the process keep the
    memory that it frees.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if name not in there:
        raise unknown("device", name, DEVICES)
    if not there[name]:
        raise UsageError(f"--device {name}: there is none on this machine; use --device cpu")
    if name == "cuda":
        _make_exact()
    if name == "cpu":
        keep_freed()
    return torch.device(name)


def _make_exact() -> None:
    """Make CUDA compute what manifests say of it."""
    # A manifest says precision float32; torch lets cuDNN round convolutions to TF32's 10 bits of mantissa unless told.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Tensors are promised to be the same on the same device and versions: no algorithm chosen by a race, none that adds in any order.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@contextmanager
def evaluating(net: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The network on the device, in eval mode, without gradients; its mode is put back."""
    was = net.training
    net.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stub lacks it
    try:
        with torch.inference_mode():
            yield net
    finally:
        net.train(was)


def evaluation_batches(
    images: Images, batches: Iterable[NDArray[np.int64]], *, size: int, threads: int = 1
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(rows, uint8 images of shape (n, 3, size, size)) of each batch of rows, as they are evaluated."""

    def make(some: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        return some, joined([views.evaluation(images.get(some[at]), size) for at in images.few(some)])

    yield from prefetch(make, batches, threads)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a batch, one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def overlapped(begin: Callable[[T], Begun], end: Callable[[Begun], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """`end(begin(item))` of every item, in order. On CUDA, where `begin` only queues what is to be computed, an item ends when the next has
    begun: while the results of one are worked on here, the device computes those of the next."""
    if device.type != "cuda":
        for item in items:
            yield end(begin(item))
        return
    begun: list[Begun] = []
    for item in items:
        begun.append(begin(item))
        if len(begun) > 1:
            yield end(begun.pop(0))
    for last in begun:
        yield end(last)


@dataclass(frozen=True)
class Evaluation:
    """How a network did on labelled samples. Shares in [0, 1]; `loss` in nats; `per_class` is None for a class without samples;
    `top5`: the label is among the five largest logits, None where there are no more than five classes."""

    samples: int
    accuracy: float
    loss: float
    per_class: Sequence[float | None]
    top5: float | None = None

    @property
    def worst(self) -> int:
        """The class with the lowest accuracy (the first of equals)."""
        present = [(share, n) for n, share in enumerate(self.per_class) if share is not None]
        return min(present)[1]


@dataclass(frozen=True)
class Predictor:
    """A network and what goes before it: how inputs are normalised, their side in pixels, and where it runs."""

    net: nn.Module
    normalisation: Normalisation
    size: int
    device: torch.device


def together(each: Sequence[Tensor], temperature: float | None) -> Tensor:
    """What several networks say together, of their logits of shape (n, c) each: tau log(mean p), float32 of shape (n, c), p being their
    softmax at temperature tau, so that its own softmax at tau is the mean. Of one network, without a temperature, its logits."""
    if temperature is None:
        return each[0]
    logs = torch.stack([torch.log_softmax(z.double() / temperature, 1) for z in each])
    return (temperature * (torch.logsumexp(logs, 0) - math.log(len(each)))).float()


def labelled(images: Images) -> NDArray[np.int64]:
    """The rows that can be evaluated on: they decode and have a label. Raises UsageError when there are none."""
    data = images.data
    rows = data.usable()[data.labels[data.usable()] >= 0]
    if not len(rows):
        raise UsageError(f"{data.folder} has no labelled samples: nothing to evaluate on")
    return rows


def evaluate(
    predictor: Predictor,
    images: Images,
    *,
    rows: NDArray[np.int64] | None = None,
    batch: int = 256,
    tick: Callable[[int], None] | None = None,
) -> Evaluation:
    """Accuracy and cross-entropy over the labelled samples that decode, or some `rows` of them; `tick` gets the samples of each batch done.

    Raises UsageError when there are none.
    """
    data, device = images.data, predictor.device
    rows = labelled(images) if rows is None else rows
    loss = 0.0
    right, among = np.zeros(len(data), bool), np.zeros(len(data), bool)
    with evaluating(predictor.net, device) as net:

        def begin(item: tuple[NDArray[np.int64], Tensor]) -> tuple[NDArray[np.int64], Tensor, Tensor, Tensor]:
            some, pixels = item
            logits = net(predictor.normalisation.apply(sent(pixels, device))).float()
            labels = sent(torch.from_numpy(data.labels[some].astype(np.int64)), device)
            best = logits.topk(min(TOP, logits.shape[1])).indices
            lost = F.cross_entropy(logits, labels, reduction="sum")
            return some, lost, logits.argmax(1) == labels, (best == labels[:, None]).any(1)

        batches = evaluation_batches(images, order.batches(rows, batch), size=predictor.size)
        for some, lost, is_right, is_among in overlapped(begin, lambda found: found, batches, device):
            loss += float(lost)
            right[some], among[some] = is_right.cpu().numpy(), is_among.cpu().numpy()
            if tick is not None:
                tick(len(some))
    classes = len(data.classes)
    n = np.bincount(data.labels[rows], minlength=classes)
    hits = np.bincount(data.labels[rows], weights=right[rows], minlength=classes)
    per_class = [float(h / k) if k else None for h, k in zip(hits, n, strict=True)]
    top5 = float(among[rows].mean()) if classes > TOP else None
    return Evaluation(len(rows), float(right[rows].mean()), loss / len(rows), per_class, top5)
