"""Symmetric label noise: an exact share of labels becomes another class, chosen and drawn by hash. `docs/formats.md`, "Label noise"."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError


def noise_rate(text: str, classes: int) -> Decimal:
    """The share of labels to change, read as a decimal. Raises UsageError unless it is a number in [0, 1], or for less than two classes."""
    try:
        rate = Decimal(text)
    except InvalidOperation:
        raise UsageError(f"--label-noise {text!r} is not a number: give the share of labels to change, from 0 to 1") from None
    if not (rate.is_finite() and 0 <= rate <= 1):
        raise UsageError(f"--label-noise {text} is out of range: give the share of labels to change, from 0 to 1")
    if classes < 2:
        raise UsageError(f"--label-noise needs at least 2 classes, the source has {classes}: there is no other class to change to")
    return abs(rate)


def with_noise(uids: order.U64, labels: NDArray[np.int32], *, classes: int, rate: Decimal, seed: int) -> NDArray[np.int32]:
    """The labels, floor(rate n + 1/2) of the n that there are changed: those with the smallest order hashes h of the purpose `label-noise`,
    each to (label + 1 + floor(unit(mix(h)) (classes - 1))) mod classes.

    uids: uint64 of shape (n,); labels: int32 of shape (n,), -1 = none, which stays. Returns int32 of shape (n,).
    """
    rows = np.flatnonzero(labels >= 0)
    hashes = order.order_hash(uids[rows], seed, "label-noise")
    chosen = np.argsort(hashes, kind="stable")[: order.keep_count(rate, len(rows))]
    shift = 1 + np.floor(order.unit(order.mix(hashes[chosen])) * (classes - 1)).astype(np.int64)
    noisy = labels.copy()
    noisy[rows[chosen]] = (labels[rows[chosen]] + shift) % classes
    return noisy
