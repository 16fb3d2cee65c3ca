"""Large images made smaller on their way into shards: decoded by the one contract, resized, encoded anew. `docs/formats.md`, "Resized
images"."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ENCODER = "Pillow: Lanczos, JPEG 4:2:0"
"""What makes resized images: goes into the manifest, so that another one would make another data set."""
QUALITY = 90
MOST_SIDE = 65_500
"""What libjpeg encodes at most, in pixels."""


@dataclass(frozen=True)
class Shrink:
    """Which images are resized, and to what. `side`: pixels of the longer side that an image may have; `quality`: of the JPEG, 1 to 100."""

    side: int
    quality: int = QUALITY

    def apply(self, pixels: NDArray[np.uint8]) -> tuple[bytes, int, int] | None:
        """The resized image as a JPEG, its height and its width; None for one that is small enough as it is.

        pixels: uint8 of shape (height, width, 3).
        """
        height, width, _ = pixels.shape
        longer = max(height, width)
        if longer <= self.side:
            return None
        height, width = (max(1, (2 * one * self.side + longer) // (2 * longer)) for one in (height, width))
        made = io.BytesIO()
        small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        small.save(made, "JPEG", quality=self.quality, subsampling="4:2:0")
        return made.getvalue(), height, width
