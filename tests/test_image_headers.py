"""images.py: the size of an image from its header alone is the size that decoding gives, and needs no more than the header."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdprune_data import images
from kdprune_data.errors import SourceError

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg-progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg-grey": ("JPEG", "L", {}),
    "jpeg-cmyk": ("JPEG", "CMYK", {}),
    "jpeg-exif": ("JPEG", "RGB", {"exif": b"Exif\0\0" + b"\xff" * 60_000, "comment": b"\xff\xc0" * 100}),
    "jpeg-profile": ("JPEG", "RGB", {"icc_profile": b"\xff\xd8" * 70_000}),
    "png": ("PNG", "RGB", {}),
    "png-grey": ("PNG", "L", {}),
    "png-palette": ("PNG", "P", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp-lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp-alpha": ("WEBP", "RGBA", {}),
    "webp-alpha-lossless": ("WEBP", "RGBA", {"lossless": True}),
    "webp-exif": ("WEBP", "RGB", {"exif": b"Exif\0\0" + bytes(100)}),
}


def encoded(kind: str, height: int, width: int) -> bytes:
    form, mode, settings = KINDS[kind]
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, **settings)
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (37, 300), (300, 2)])
def test_the_size_is_that_of_the_decoded_image(kind: str, size: tuple[int, int]) -> None:
    data = encoded(kind, *size)
    assert images.size(memoryview(data)) == images.decode(data).shape[:2] == size


def test_tables_before_the_frame_header_are_passed_over() -> None:
    """Their marker, C4, is among those of frames; where they stand is up to the writer."""
    data = encoded("jpeg", 37, 300)
    at = data.index(b"\xff\xc4")
    tables = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    moved = data[:2] + tables + data[2:]
    assert images.size(memoryview(moved)) == images.decode(moved).shape[:2] == (37, 300)


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_is_enough_and_less_is_refused(kind: str) -> None:
    data = memoryview(encoded(kind, 50, 60))
    enough = next(n for n in range(len(data)) if _readable(data[:n]))
    assert enough < len(data) - 20
    assert images.size(data[:enough]) == (50, 60)


def _readable(data: memoryview) -> bool:
    try:
        return images.size(data) is not None
    except SourceError:
        return False


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(50),
        b"\xff\xd8\xff\xd9" + bytes(50),
        b"\xff\xd8\xff\xda" + bytes(50),
        b"\xff\xd8\xff" + bytes(50),
        b"\xff\xd8\xff" + b"\xff" * 50,
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"RIFF\0\0\0\0WEBPVP9 " + bytes(50),
        b"RIFF\0\0\0\0WEBPVP8 " + bytes(50),
    ],
)
def test_what_has_no_size_is_refused(data: bytes) -> None:
    with pytest.raises(SourceError, match=r"^not a JPEG, PNG or WebP image with a readable header$"):
        images.size(memoryview(data))


def test_more_pixels_than_are_decoded_are_refused() -> None:
    data = bytearray(encoded("png", 2, 2))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    with pytest.raises(SourceError, match="more pixels than the 178,956,970 that are decoded at most"):
        images.size(memoryview(data))
