"""scikit-learn's `digits`: 1,797 real handwritten digits of 8x8 pixels, shipped with the library: always at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.images import encode_png
from kdprune_data.sources.base import Item, Outline, outlined

TEST_SHARE = order.fraction("0.2")


class DigitsSource:
    """The train or test split: the fifth of the samples with the smallest order hash is the test split."""

    name = "digits"
    shuffles = True
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()
    classes = tuple("0123456789")

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise UsageError(f"digits has no split {split!r}: import train (with --holdout 0.1 for val) or test")
        self.split = split

    @cached_property
    def _data(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from sklearn.datasets import load_digits  # half a second of imports

        digits = load_digits()
        return np.floor(digits.images * (255 / 16) + 0.5).astype(np.uint8), digits.target.astype(np.int64)

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        n = len(self._data[1])
        by_hash = np.argsort(order.order_hash(order.uids_of(f"{row:08d}" for row in range(n)), 0, "digits"))
        cut = order.keep_count(TEST_SHARE, n)
        return np.sort(by_hash[:cut] if self.split == "test" else by_hash[cut:])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {"source": self.name}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """About 150 bytes an image."""
        return 150 * len(self)

    @cached_property
    def outline(self) -> Outline:
        """See `Source`."""
        labels = self._data[1][self._rows].astype(np.int32)
        keys = [f"{row:08d}" for row in self._rows.tolist()]
        return outlined(keys, labels, lambda row: (f"digits row {keys[row]}", keys[row]))

    def __iter__(self) -> Iterator[Item]:
        images, labels = self._data
        for row in self._rows.tolist():
            yield Item(f"{row:08d}", encode_png(images[row]), int(labels[row]), f"digits row {row}")
