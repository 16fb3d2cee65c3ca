"""Decoding: from encoded bytes to RGB, and the few facts about an image that its first bytes tell.

The contract (`docs/formats.md`, "Decoding"): uint8 RGB; orientation tags are not applied; everything that is not plain RGB is converted as
Pillow does. JPEGs go through simplejpeg, which is libjpeg-turbo with the settings that Pillow uses: equal to the grey level, and six times
faster on small images. Whatever it does not take goes to Pillow, whose word on what is an image is final.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from kdprune_data.errors import SourceError

EXTENSIONS = ("jpg", "png", "webp")
MEMBERS = (*EXTENSIONS, "jpeg")
"""What the image members of shards are called; `jpeg` only in shards that others wrote."""
DECODER = "libjpeg-turbo, Pillow"
SCALED_DECODER = "libjpeg-turbo scaled, Pillow"
"""What policies of views call the decoders: the contract, and the one that decodes JPEGs no larger than they are needed."""
PIXEL_LIMIT = 178_956_970
"""Largest image decoded, in pixels: Pillow's own limit against decompression bombs."""


def extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` from an image's magic bytes, or None."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def size(data: memoryview) -> tuple[int, int]:
    """(height, width) of an image, from its header alone: of a memory map only the pages that it stands in are read.

    Raises SourceError when it is no JPEG, PNG or WebP with a readable header, or has more pixels than PIXEL_LIMIT. Sources: ITU-T T.81,
    the PNG specification, RFC 9649.
    """
    kind = extension(bytes(data[:12]))
    try:
        height, width = {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}[kind or ""](data)
    except (KeyError, IndexError, ValueError, struct.error):
        raise SourceError("not a JPEG, PNG or WebP image with a readable header") from None
    if height * width > PIXEL_LIMIT:
        raise SourceError(f"an image of more pixels than the {PIXEL_LIMIT:,} that are decoded at most; scale it down")
    return height, width


def _png_size(data: memoryview) -> tuple[int, int]:
    width, height = struct.unpack(">II", data[16:24])
    return _positive(height, width)


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            return _positive(*struct.unpack(">HH", data[at + 5 : at + 9]))
        elif marker in (0xD9, 0xDA):
            break
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError


def _webp_size(data: memoryview) -> tuple[int, int]:
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        width, height = struct.unpack("3s3s", data[24:30])
        return int.from_bytes(height, "little") + 1, int.from_bytes(width, "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return _positive(height & 0x3FFF, width & 0x3FFF)
    raise ValueError


def _positive(height: int, width: int) -> tuple[int, int]:
    if height < 1 or width < 1:
        raise ValueError
    return height, width


def decode(data: bytes, eighths: int = 8) -> NDArray[np.uint8]:
    """An encoded image as RGB: uint8 of shape (height, width, 3).

    eighths: 1, 2, 4 or 8; a JPEG is decoded at so many eighths of its size, its sides rounded up, from fewer coefficients of its blocks.

    Raises SourceError when it does not decode whole, or has more pixels than PIXEL_LIMIT.
    """
    if data[:3] == b"\xff\xd8\xff":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if space in ("YCbCr", "RGB", "Gray") and height * width <= PIXEL_LIMIT:
                high, wide = (0 if eighths == 8 else -(-side * eighths // 8) for side in (height, width))
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=high, min_width=wide)
                return pixels
        except ValueError:
            pass  # Pillow decides whether it is an image after all
    try:
        with _open(data) as image:
            if image.width * image.height > PIXEL_LIMIT:  # Pillow's own limit may have been lifted
                raise Image.DecompressionBombError
            image.load()
            # With a palette's transparency in bytes `convert` would warn and drop it; gone before, the pixels are the same (see `_open`).
            image.info.pop("transparency", None)
            return np.array(image.convert("RGB"))  # np.asarray would be read-only, at which torch warns
    except Image.DecompressionBombError:
        raise SourceError(f"an image of more pixels than the {PIXEL_LIMIT:,} that are decoded at most; scale it down") from None
    except Exception as error:  # Pillow's plugins raise anything on damaged data: struct.error, SyntaxError, OSError, ...
        raise SourceError(f"not an image that decodes ({type(error).__name__})") from None


def _open(data: bytes) -> Image.Image:
    """As Image.open, without its DecompressionBombWarning at half of PIXEL_LIMIT, which says nothing to people who import large photos.

    The three formats that shards hold are opened by their own classes, which do not ask for a limit; `decode` does. To silence the warning
    instead, warnings.catch_warnings would do so for every thread, and a filter for the user's own images too: both are global.
    """
    kind = extension(data)
    if kind == "jpg":
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    if kind == "png":
        return PngImagePlugin.PngImageFile(io.BytesIO(data))
    if kind == "webp":
        return WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG with stored (uncompressed) deflate, so that its bytes depend on no compression library.

    pixels: uint8 of shape (height, width) for grey or (height, width, 3) for RGB. Source: the PNG specification, RFC 1950 and 1951.
    """
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    blocks = [raw[at : at + 65535] for at in range(0, len(raw), 65535)]
    stored = b"".join(struct.pack("<BHH", n == len(blocks) - 1, len(b), len(b) ^ 0xFFFF) + b for n, b in enumerate(blocks))
    body = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
