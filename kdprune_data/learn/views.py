"""Views: deterministic crops of a sample, and the one way to render them, for teacher and student alike.

A `Policy` (learn/policy.py) says what kind of views a data set gets. `geometry` draws the boxes of one view of many samples,
from (policy seed, id, view) alone, so ranges of views can be made on different machines and a student can replay what its teacher saw.
`render` turns decoded images and boxes into uint8 batches. `docs/formats.md`, "Views", states both exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.learn.policy import Crops, Policy, every_crop, flips, identity, own_size, policy_for
from kdprune_data.learn.resize import Pixels, evaluation, resize

TRIES = 10
__all__ = [
    "Crops",
    "Geometry",
    "Normalisation",
    "Pixels",
    "Policy",
    "evaluation",
    "every_crop",
    "flips",
    "geometry",
    "identity",
    "own_size",
    "policy_for",
    "render",
]


@dataclass(frozen=True)
class Geometry:
    """The boxes of one view of n samples, in each image's own pixels: int32 of shape (n,), and flip, bool of shape (n,)."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]

    def take(self, at: NDArray[np.int64]) -> Geometry:
        """The boxes of some of the samples, by place."""
        return Geometry(self.top[at], self.left[at], self.height[at], self.width[at], self.flip[at])


def geometry(policy: Policy, uids: NDArray[np.uint64], sizes: NDArray[np.int32], view: int) -> Geometry:
    """The boxes of one view. uids: uint64 of shape (n,); sizes: int32 of shape (n, 2), heights and widths.

    Raises UsageError for a view that the policy has not, or boxes that it does not draw.
    """
    if policy.views is not None and not 0 <= view < policy.views:
        raise UsageError(f"there are {policy.views} views of policy {policy.kind}, numbered from 0: {view} is none of them")
    if policy.kind == "given":
        raise UsageError(
            "the boxes of these views were given by whoever made the logits: nothing draws them; use the cache that holds them"
        )
    if policy.kind == "identity":
        return _whole(sizes)
    if policy.kind == "every-crop":
        return _every_crop(policy, uids, view)
    state = order.order_hash(uids, policy.seed, f"view/{view}")
    if policy.kind == "resized-crop":
        return _resized_crops(policy, state, sizes)
    reach = 2 * policy.pad + 1
    draws = _draws(state, 3)
    top, left = (np.floor(u * reach).astype(np.int32) - policy.pad for u in draws[:2])
    side = np.full(len(uids), policy.size, np.int32)
    return Geometry(top, left, side, side, policy.flip & (draws[2] < 0.5))


def _whole(sizes: NDArray[np.int32]) -> Geometry:
    """The largest centred square of every image."""
    side = sizes.min(1)
    top, left = ((sizes[:, n] - side) // 2 for n in (0, 1))
    return Geometry(top, left, side, side.copy(), np.zeros(len(sizes), bool))


def _every_crop(policy: Policy, uids: NDArray[np.uint64], view: int) -> Geometry:
    """Crop (a + view * b) mod N of the N there are, a and b drawn for each sample, b without a divisor in common with N."""
    count, reach = policy.views or 1, 2 * policy.pad + 1
    strides = np.array([b for b in range(1, count + 1) if math.gcd(b, count) == 1], np.int64)
    first, which = _draws(order.order_hash(uids, policy.seed, "every-crop"), 2)
    start, stride = np.floor(first * count).astype(np.int64), strides[np.floor(which * len(strides)).astype(np.int64)]
    number = (start + view * stride) % count
    crop = number % reach**2
    top, left = ((n - policy.pad).astype(np.int32) for n in (crop // reach, crop % reach))
    side = np.full(len(uids), policy.size, np.int32)
    return Geometry(top, left, side, side.copy(), number >= reach**2)


def _draws(state: NDArray[np.uint64], n: int) -> list[NDArray[np.float64]]:
    """n numbers in [0, 1) for every sample: the hash, then splitmix64 of it, again and again."""
    found = []
    for _ in range(n):
        found.append(order.unit(state))
        state = order.mix(state)
    return found


def _resized_crops(policy: Policy, state: NDArray[np.uint64], sizes: NDArray[np.int32]) -> Geometry:
    """Inception-style crops, all samples at once: the first of ten tries that fits, else the largest centred box of an allowed ratio."""
    u = _draws(state, 2 + 4 * TRIES + 1)
    h, w = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    (a0, a1), (r0, r1) = policy.scale, (float(np.log(r)) for r in policy.ratio)
    height, width = (side.astype(np.float64) for side in _centred(policy, h, w))
    top, left = np.floor((h - height) / 2), np.floor((w - width) / 2)
    open_ = np.ones(len(sizes), bool)
    for t in range(TRIES):
        area = h * w * (a0 + (a1 - a0) * u[2 + 4 * t])
        ratio = np.exp(r0 + (r1 - r0) * u[3 + 4 * t])
        cw, ch = np.floor(np.sqrt(area * ratio) + 0.5), np.floor(np.sqrt(area / ratio) + 0.5)
        fits = open_ & (cw > 0) & (ch > 0) & (cw <= w) & (ch <= h)
        y, x = np.floor(u[4 + 4 * t] * (h - ch + 1)), np.floor(u[5 + 4 * t] * (w - cw + 1))
        for mine, new in ((height, ch), (width, cw), (top, y), (left, x)):
            mine[fits] = new[fits]
        open_ &= ~fits
    y, x, ch, cw = (side.astype(np.int32) for side in (top, left, height, width))
    return Geometry(y, x, ch, cw, policy.flip & (u[2 + 4 * TRIES] < 0.5))


def _centred(policy: Policy, h: NDArray[np.float64], w: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = policy.ratio
    height = np.where(w / h < low, np.floor(w / low + 0.5), h)
    width = np.where(w / h > high, np.floor(h * high + 0.5), w)
    return np.maximum(np.minimum(height, h), 1), np.maximum(np.minimum(width, w), 1)


def render(images: Pixels | Tensor | Sequence[Pixels], boxes: Geometry, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Views as a batch: uint8 of shape (n, 3, size, size), on the device.

    images: uint8 of shape (n, h, w, 3), as a tensor only for boxes of `size`; or n arrays of shape (h, w, 3). Exact for crops, padding and
    flips; a box of another size than `size` is resized.
    """
    plain = bool((boxes.height == size).all() and (boxes.width == size).all())
    if isinstance(images, Tensor):
        return _render_crops(images.to(device), boxes, size)
    if isinstance(images, np.ndarray) and plain:
        return _render_crops(torch.from_numpy(images).to(device), boxes, size)
    return torch.stack([_render_one(image, boxes, n, size, device) for n, image in enumerate(images)])


def _render_crops(images: Tensor, boxes: Geometry, size: int) -> Tensor:
    """All crops in one gather over the padded images."""
    n, h, w, _ = images.shape
    reach = [(-boxes.left.min(), boxes.left.max() + size - w), (-boxes.top.min(), boxes.top.max() + size - h)]
    (x0, x1), (y0, y1) = ((max(int(a), 0), max(int(b), 0)) for a, b in reach)
    padded = F.pad(images, (0, 0, x0, x1, y0, y1))
    along = np.arange(size)
    rows = torch.from_numpy(boxes.top[:, None] + along + y0).long().to(images.device)
    mirrored = np.where(boxes.flip[:, None], size - 1 - along, along)
    columns = torch.from_numpy(boxes.left[:, None] + mirrored + x0).long().to(images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _render_one(image: Pixels, boxes: Geometry, n: int, size: int, device: torch.device | str) -> Tensor:
    top, left, height, width = (int(side[n]) for side in (boxes.top, boxes.left, boxes.height, boxes.width))
    h, w = image.shape[:2]
    inside = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    cut = torch.from_numpy(np.ascontiguousarray(inside)).to(device).permute(2, 0, 1)
    # A box may lie wholly outside; then one margin is all of it.
    margins = (
        min(max(-left, 0), width),
        min(max(left + width - w, 0), width),
        min(max(-top, 0), height),
        min(max(top + height - h, 0), height),
    )
    if any(margins):
        cut = F.pad(cut, margins)
    if boxes.flip[n]:
        cut = cut.flip(2)
    return cut if (height, width) == (size, size) else resize(cut, size, size)


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
        mean, std = (torch.tensor(v, device=batch.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        scaled = batch.to(torch.float32, memory_format=torch.channels_last)
        return scaled.div_(255).sub_(mean).div_(std)
