"""Resizing: the kernels of views and of evaluation; and images as they are evaluated, extreme shapes included.

The kernels are torch's antialiased bilinear interpolation, of 8-bit numbers (four times as fast) or in float32. Evaluation resizes the
shorter side and cuts out the centre, so of a very long image most of what would be resized is thrown away; there only the part that is kept
is computed, by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdprune_data.learn.policy import UINT8

Pixels = NDArray[np.uint8]
LONG = 8
"""An image that is this many times as long as it is short, or more, is not resized whole."""


def resize(image: Tensor, height: int, width: int, kernel: str = UINT8) -> Tensor:
    """uint8 of shape (3, h, w) to (3, height, width), by a kernel of learn/policy.py; the two differ by a grey level at most. On the
    CPU."""
    if kernel == UINT8:
        # Named so, a batch of one counts as channels last, which its result is then too: otherwise both are copied once more.
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        return F.interpolate(batch, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    smooth = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True, align_corners=False)
    return smooth[0].round().clamp(0, 255).to(torch.uint8)


def evaluation(images: Pixels | Sequence[Pixels], size: int) -> Tensor:
    """Images as they are evaluated: as they are where they are squares of `size`, else resized to 256/224 of it and the centre cut out.

    Returns uint8 of shape (n, 3, size, size).
    """
    if isinstance(images, np.ndarray) and images.shape[1:3] == (size, size):
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.stack([_centre(image, size) for image in images])


def _centre(image: Pixels, size: int) -> Tensor:
    h, w = image.shape[:2]
    if (h, w) == (size, size):
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    short = (size * 256 + 112) // 224
    high, wide = (short, w * short // h) if h <= w else (h * short // w, short)
    top, left = (high - size) // 2, (wide - size) // 2
    if max(h, w) >= LONG * min(h, w):
        return _long_centre(image, size, (high, wide))
    whole = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return resize(whole, high, wide)[:, top : top + size, left : left + size]


def _long_centre(image: Pixels, size: int, scaled: tuple[int, int]) -> Tensor:
    """The centre of an image resized to `scaled`, from the part of it that the centre is made of; along the longer side line by line."""
    long = 0 if image.shape[0] > image.shape[1] else 1
    first, weights = _taps(image.shape[long], scaled[long], (scaled[long] - size) // 2, size)
    start, end = int(first[0]), int(first[-1]) + weights.shape[1]
    part = image[start:end] if long == 0 else image[:, start:end]
    # The longer side first in memory, whichever it is: (long, short, 3).
    lines = torch.from_numpy(np.ascontiguousarray(part.swapaxes(0, long))).float()
    at, by = torch.from_numpy(first - start), torch.from_numpy(weights)
    made = torch.zeros((size, *lines.shape[1:]))
    for tap in range(weights.shape[1]):
        made += lines[(at + tap).clamp_max(len(lines) - 1)] * by[:, tap, None, None]
    cut = made.permute(2, 0, 1) if long == 0 else made.permute(2, 1, 0)
    shape = (size, scaled[1]) if long == 0 else (scaled[0], size)
    smooth = F.interpolate(cut[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
    off = (scaled[1 - long] - size) // 2
    kept = smooth[:, :, off : off + size] if long == 0 else smooth[:, off : off + size]
    return kept.round().clamp(0, 255).to(torch.uint8)


def _taps(inside: int, outside: int, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The lines that `count` resized ones from `first` on are sums of, where `inside` lines become `outside`.

    Returns the first line of each, int64 of shape (count,), and weights, float32 of shape (count, taps): a triangle as wide as a resized
    line's distance from the next, at least two lines, around its centre; zero where it reaches past the image.
    """
    number: type[np.floating] = np.float32 if outside < 2**20 else np.float64  # as torch does, for as long as that tells lines apart
    half, scale = number(0.5), number(inside) / number(outside)
    reach = np.maximum(scale, number(1))
    centre = scale * (np.arange(first, first + count).astype(number) + half)
    low = np.maximum(np.floor(centre - reach + half), 0).astype(np.int64)
    high = np.minimum(np.floor(centre + reach + half), inside).astype(np.int64)
    tap = np.arange(int((high - low).max()))
    weights = np.maximum(1 - np.abs(((low[:, None] + tap).astype(number) - centre[:, None] + half) / reach), 0)
    weights[tap >= (high - low)[:, None]] = 0
    return low, (weights / weights.sum(1, keepdims=True)).astype(np.float32)
