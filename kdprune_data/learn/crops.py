"""Crops of images of one size, exact: padding, cutting and mirroring, for a whole batch at once. No pixel is ever computed.

On the CPU lines of pixels are copied as they stand, three bytes a pixel; on other devices one gather picks every pixel. Both give the same.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdprune_data.learn.geometry import Geometry

Pixels = NDArray[np.uint8]


def crop(images: Pixels, boxes: Geometry, size: int) -> Pixels:
    """The boxes, all of `size`, of images, uint8 of shape (n, h, w, 3): uint8 of shape (n, size, size, 3)."""
    n, h, w, _ = images.shape
    y0, y1, x0, x1 = _margins(boxes, size, h, w)
    high, wide = h + y0 + y1, w + x0 + x1
    if (y0, y1, x0, x1) == (0, 0, 0, 0):
        padded = np.ascontiguousarray(images)
    else:
        padded = np.zeros((n, high, wide, 3), np.uint8)
        padded[:, y0 : y0 + h, x0 : x0 + w] = images
    # Every run of `size` pixels in a line as one thing of 3 * size bytes, wherever in the line it begins: numpy copies it in one go.
    runs = np.ndarray((n, high, wide - size + 1), np.dtype((np.void, 3 * size)), padded, strides=(3 * high * wide, 3 * wide, 3))
    lines = (boxes.top + y0)[:, None] + np.arange(size)
    cut = runs[np.arange(n)[:, None], lines, (boxes.left + x0)[:, None]]
    pixels = cut.reshape(-1).view(np.dtype((np.void, 3))).reshape(n, size, size)
    mirrored = np.flatnonzero(boxes.flip)
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    whole: Pixels = pixels.reshape(-1).view(np.uint8).reshape(n, size, size, 3)
    return whole


def crop_there(images: Tensor, boxes: Geometry, size: int) -> Tensor:
    """As `crop`, on the device of the images."""
    n, h, w, _ = images.shape
    y0, y1, x0, x1 = _margins(boxes, size, h, w)
    padded = F.pad(images, (0, 0, x0, x1, y0, y1))
    along = np.arange(size)
    mirrored = np.where(boxes.flip[:, None], size - 1 - along, along)
    rows, columns = (boxes.top + y0)[:, None] + along, (boxes.left + x0)[:, None] + mirrored
    # One transfer for both: a device waits for each.
    where = torch.from_numpy(np.stack([rows, columns]).astype(np.int64)).to(images.device, non_blocking=True)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded[which, where[0, :, :, None], where[1, :, None, :]]


def _margins(boxes: Geometry, size: int, height: int, width: int) -> tuple[int, int, int, int]:
    """How far boxes reach over the images' edges: top, bottom, left, right."""
    reach = (-boxes.top.min(), boxes.top.max() + size - height, -boxes.left.min(), boxes.left.max() + size - width)
    top, bottom, left, right = (max(int(over), 0) for over in reach)
    return top, bottom, left, right
