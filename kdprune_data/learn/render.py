"""Rendering: from images and boxes to a batch of views, for teacher and student alike. `docs/formats.md`, "Views", states it exactly.

Boxes of the wanted size are cut out (learn/crops.py), which is exact everywhere. Others are resized, by the kernel that the policy names
and on the CPU. Where the policy's decoder scales, an image is a `Scalable`: it is decoded no larger than its box needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdprune_data import images as decoding
from kdprune_data.learn import crops
from kdprune_data.learn.geometry import Geometry
from kdprune_data.learn.policy import FLOAT32, UINT8, Policy
from kdprune_data.learn.resize import Pixels, resize

EIGHTHS = (1, 2, 4, 8)
"""The scales of decoding: those that libjpeg-turbo has fast code for."""


class Scalable:
    """An encoded image that is decoded as large as it is needed, each scale once."""

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self._data = data
        self.size = size
        self._at: dict[int, Pixels] = {}

    def at(self, eighths: int) -> Pixels:
        """Decoded at so many eighths of its size, where it is a JPEG; else whole. Raises SourceError as `images.decode` does."""
        if eighths not in self._at:
            self._at[eighths] = decoding.decode(self._data, eighths)
        return self._at[eighths]


Picture = Pixels | Scalable


def shown(policy: Policy, images: Pixels | Tensor | Sequence[Picture], boxes: Geometry, device: torch.device | str = "cpu") -> Tensor:
    """Views as a policy renders them. See `render`."""
    return render(images, boxes, policy.size, device, kernel=policy.kernel)


def render(
    images: Pixels | Tensor | Sequence[Picture],
    boxes: Geometry,
    size: int,
    device: torch.device | str = "cpu",
    *,
    kernel: str = UINT8,
) -> Tensor:
    """Views as a batch: uint8 of shape (n, 3, size, size), channels last in memory, on the device.

    images: uint8 of shape (n, h, w, 3), as a tensor only for boxes of `size`; or n of them, each of its own shape (h, w, 3). Exact for
    crops, padding and flips; a box of another size than `size` is resized, by one of the kernels in learn/policy.py.
    """
    if isinstance(images, Tensor):
        return crops.crop_there(images.to(device), boxes, size).permute(0, 3, 1, 2)
    if isinstance(images, np.ndarray) and bool((boxes.height == size).all() and (boxes.width == size).all()):
        return torch.from_numpy(crops.crop(images, boxes, size)).permute(0, 3, 1, 2).to(device)
    views = torch.empty((len(images), size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for n, image in enumerate(images):
        views[n] = _one(image, (boxes.top[n], boxes.left[n], boxes.height[n], boxes.width[n]), bool(boxes.flip[n]), size, kernel)
    return views.to(device)


def _one(image: Picture, box: tuple[int, ...], flip: bool, size: int, kernel: str) -> Tensor:
    """One view: uint8 of shape (3, size, size)."""
    if isinstance(image, Scalable):
        image, box = _decoded(image, box, size)
    cut = _cut(image, *map(int, box))
    plain = cut.shape[1:] == (size, size)
    # The float32 kernel takes what is mirrored already, as it always did; the other is the quicker for mirroring last.
    if flip and (plain or kernel == FLOAT32):
        cut = cut.flip(2)
    if plain:
        return cut
    resized = resize(cut, size, size, kernel)
    return resized.flip(2) if flip and kernel != FLOAT32 else resized


def _decoded(image: Scalable, box: tuple[int, ...], size: int) -> tuple[Pixels, tuple[int, ...]]:
    """The image as large as the box needs, and the box in its pixels."""
    top, left, height, width = (int(side) for side in box)
    eighths = next((m for m in EIGHTHS if min(height, width) * m >= 8 * size), 8)
    pixels = image.at(eighths)
    if pixels.shape[:2] == image.size:
        return pixels, box
    y0, y1, x0, x1 = ((edge * eighths + 4) // 8 for edge in (top, top + height, left, left + width))
    return pixels, (y0, x0, max(y1 - y0, 1), max(x1 - x0, 1))


def _cut(image: Pixels, top: int, left: int, height: int, width: int) -> Tensor:
    """A box of an image, zeros where it reaches outside: uint8 of shape (3, height, width), channels last in memory."""
    h, w = image.shape[:2]
    inside = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    cut = torch.from_numpy(np.ascontiguousarray(inside)).permute(2, 0, 1)
    # A box may lie wholly outside; then one margin is all of it.
    margins = (
        min(max(-left, 0), width),
        min(max(left + width - w, 0), width),
        min(max(-top, 0), height),
        min(max(top + height - h, 0), height),
    )
    return F.pad(cut, margins) if any(margins) else cut
