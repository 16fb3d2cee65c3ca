"""The logits that soft-label codes are compared on: a teacher's, two networks' side by side, and synthetic ones of more classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kdprune_pipelines._asking import Teachers
from kdprune_pipelines._models import Saved
from kdprune_pipelines._storing import PROBE_SAMPLES
from numpy.typing import NDArray
from soft_label_parts import Array, Part, Said

from kdprune_data import order
from kdprune_data.formats import lowrank
from kdprune_data.formats.dataset import Dataset

BATCH = 256
FEATURES = 256
"""Of the synthetic logits."""


def halves(name: str, part: Part, size: int) -> Said:
    """As `cache` parts a probe: directions from its first half, steps from its second; what is left of the samples is measured."""
    n = part.full.shape[1]
    probe = min(PROBE_SAMPLES, n // 2)
    return Said(name, *(part.samples(slice(*ends)) for ends in ((0, probe // 2), (probe // 2, probe), (probe, n))), size)


@dataclass(frozen=True)
class Asked:
    """Which views of which samples of which data set, and in how many threads they are made."""

    data: Path
    samples: int
    views: int
    threads: int = 1


def taught(asked: Asked, saved: Saved, epoch: int | None, kept: Path | None) -> Part:
    """What a teacher says of views of some samples, smallest by order hash first, as `cache` would ask it: with its final weights, or those
    after a kept epoch. kept: a file that holds it from an earlier run, or is written."""
    import torch

    from kdprune_data.learn import views as boxes
    from kdprune_data.learn.stream import Images

    images = Images(Dataset.open(asked.data))
    found = images.data
    rows = found.usable()
    rows = rows[np.argsort(order.order_hash(found.uids[rows], 0, "probe"), kind="stable")[: asked.samples]]
    policy = boxes.policy_for(found.sizes[found.usable()], found.classes, size=saved.architecture.size, flip="auto", seed=0)
    if policy.kind != "pad-crop":
        raise SystemExit(
            f"{asked.data}: views of this benchmark are padded crops, and these images would be resized; give images of one size"
        )
    name = f"{saved.manifest.digest} {epoch} {found.manifest.digest} {asked.samples} {asked.views}"
    if kept is not None and kept.is_file():
        with np.load(kept, allow_pickle=False) as there:
            if str(there["name"]) != name:
                raise SystemExit(f"{kept} holds other logits than those asked for: delete it, or name another file")
            return Part(there["full"], there["labels"], there["boxes"])
    net = saved.load(code=None, epoch=epoch)
    source = Teachers(images, policy, (saved,), (net,), torch.device("cpu"), None, BATCH, asked.threads)
    part = Part(_said(source, rows, asked.views), found.labels[rows].astype(np.int64), _boxes(source, rows, asked.views))
    if kept is not None:
        np.savez(kept, name=name, full=part.full, labels=part.labels, boxes=part.boxes)
    return part


def _said(source: Teachers, rows: NDArray[np.int64], views: int) -> NDArray[np.float32]:
    said: list[list[Array]] = [[] for _ in range(views)]
    for view, logits in source.said(rows, range(views), order.batches(np.arange(len(rows)), BATCH)):
        said[view].append(logits)
    return np.stack([np.concatenate(one) for one in said])


def _boxes(source: Teachers, rows: NDArray[np.int64], views: int) -> NDArray[np.int8]:
    drawn = [source.boxes(rows, view) for view in range(views)]
    return np.stack([np.stack([box.top, box.left, box.flip], 1) for box in drawn]).astype(np.int8)


def beside(one: Part, other: Part) -> Part:
    """The logits of two networks for the same views as those of one, which knows both sets of classes."""
    return Part(np.concatenate([one.full, other.full], 2), one.labels, one.boxes)


def synthetic(like: Part, classes: int, samples: int) -> Part:
    """Logits of a random head on Gaussian features, as large and as alike between views as a real teacher's.

    Of FEATURES features the i-th has a variance as 1 / i. A view is the sample's features and noise of the same spectrum, whose variance
    is to the samples' as in `like`, on average and from sample to sample; the standard deviation of the logits is that in `like`. Labels
    are the classes of the largest mean logit. The boxes are those of `like`, and tell nothing.
    """
    random = np.random.default_rng(0)
    real = lowrank.centre(like.full)
    own = real.mean(0)
    noise = ((real - own) ** 2).mean((0, 2))[:samples] * len(real) / max(len(real) - 1, 1)
    share = noise / ((own - own.mean(0)) ** 2).mean()
    spectrum = np.sqrt(1 / np.arange(1, FEATURES + 1))
    head = random.normal(size=(FEATURES, classes)) / np.sqrt((spectrum**2).sum()) * np.sqrt(((own - own.mean(0)) ** 2).mean())
    base = random.normal(size=(len(share), FEATURES)) * spectrum
    views = len(like.full)
    full = np.empty((views, len(share), classes), np.float32)
    for v in range(views):
        full[v] = (base + np.sqrt(share)[:, None] * random.normal(size=base.shape) * spectrum) @ head
    return Part(full, (base @ head).argmax(1), like.boxes[:, :samples])


def facts(part: Part) -> dict[str, float]:
    """What a reader needs to judge logits by."""
    z = lowrank.centre(part.full)
    p = np.exp(lowrank.log_softmax(z, 1)).max(-1)
    own = z.mean(0)
    return {
        "top 1 is the label": float((z.argmax(-1) == part.labels).mean()),
        "largest p": float(p.mean()),
        "deviation of logits": float((z - own.mean(0)).std()),
        "of views from their mean": float((z - own).std()),
    }
