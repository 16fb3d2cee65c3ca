"""The boxes of views, drawn from (policy seed, id, view) alone: so ranges of views can be made on different machines, and a student can
replay what its teacher saw. `docs/formats.md`, "Views", states them exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.learn.policy import Policy

TRIES = 10


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
