"""Views: deterministic crops of a sample, and the one way to render them, for teacher and student alike.

A `Policy` (learn/policy.py) says what kind of views a data set gets. `geometry` (learn/geometry.py) draws the boxes of one view of many
samples. `render` (learn/render.py) turns decoded images and boxes into uint8 batches, `evaluation` (learn/resize.py) shows images as they
are evaluated; `Normalisation` makes of either what a network takes. `docs/formats.md`, "Views", states all of it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kdprune_data.learn.geometry import Geometry, geometry
from kdprune_data.learn.policy import DECODERS, Crops, Policy, every_crop, flips, identity, own_size, policy_for
from kdprune_data.learn.render import Picture, Scalable, render, shown
from kdprune_data.learn.resize import Pixels, evaluation

__all__ = [
    "DECODERS",
    "Crops",
    "Geometry",
    "Normalisation",
    "Picture",
    "Pixels",
    "Policy",
    "Scalable",
    "evaluation",
    "every_crop",
    "flips",
    "geometry",
    "identity",
    "own_size",
    "policy_for",
    "render",
    "shown",
]


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixel values in [0, 1], taken from inputs before a network sees them."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_dict(self) -> dict[str, list[float]]:
        """As it stands in manifests."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def apply(self, batch: Tensor) -> Tensor:
        """uint8 of shape (n, 3, s, s) to normalised float32 of the same shape, in channels-last memory."""
        n, channels, height, width = batch.shape
        # Whole images as rows: a mean for each of three neighbours in memory takes four times as long as one for each number of a row.
        mean, std = (_repeated(values, height * width, batch.device) for values in (self.mean, self.std))
        scaled = batch.permute(0, 2, 3, 1).reshape(n, -1).to(torch.float32, copy=True)
        scaled.div_(255).sub_(mean).div_(std)
        return scaled.view(n, height, width, channels).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _repeated(values: tuple[float, float, float], times: int, device: torch.device) -> Tensor:
    """Three values over and over, on a device: made once, for a GPU waits for what comes from here."""
    with torch.inference_mode(False):  # or only inference could use it
        return torch.tensor(values, device=device).repeat(times)
