"""images.py: decoding equals Pillow's, to the grey level; the PNGs written are pinned to the byte."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from kdprune_data import images
from kdprune_data.errors import SourceError


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def saved(image: Image.Image, form: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real 24 x 24 colour image: three digits, one per channel."""
    from sklearn.datasets import load_digits

    red, green, blue = np.floor(load_digits().images[:3] * (255 / 16) + 0.5).astype(np.uint8)
    return Image.fromarray(np.stack([red, green, blue], 2)).resize((24, 24))


# --- decoding


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", mode) for mode in ("RGB", "L", "1", "CMYK")]
    + [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")]
    + [("WEBP", mode) for mode in ("RGB", "L", "RGBA")],
)
def test_every_mode_is_converted_as_pillow_does(photo: Image.Image, form: str, mode: str) -> None:
    image = photo.convert("I").convert("I;16") if mode == "I;16" else photo.convert(mode)
    data = saved(image, form)
    found = images.decode(data)
    assert (found.dtype, found.shape) == (np.uint8, (24, 24, 3))
    assert np.array_equal(found, by_pillow(data))


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palette_with_transparency_is_converted_in_silence(photo: Image.Image, form: str) -> None:
    """Pillow would warn, and warnings are errors here."""
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    data = saved(palette, form, transparency=bytes(range(0, 256, 16)) if form == "PNG" else 3)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        wanted = by_pillow(data)
    assert [str(w.message)[:32] for w in met] == (["Palette images with Transparency"] if form == "PNG" else [])
    assert np.array_equal(images.decode(data), wanted)


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")])
def test_a_large_image_is_decoded_in_silence(photo: Image.Image, form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit, here 300 pixels. Ours alone counts; the user's own code is still warned."""
    data = saved(photo.convert(mode), form)
    wanted = by_pillow(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert np.array_equal(images.decode(data), wanted)
    with pytest.warns(Image.DecompressionBombWarning):
        by_pillow(data)


@pytest.mark.parametrize("settings", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}, {"optimize": True}])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (64, 48)])
def test_every_kind_of_jpeg_equals_pillow(photo: Image.Image, size: tuple[int, int], settings: dict[str, object]) -> None:
    data = saved(photo.resize(size), "JPEG", **settings)
    assert np.array_equal(images.decode(data), by_pillow(data))


@pytest.mark.parametrize(("file", "n"), [("cifar10/test.parquet", 200), ("tiny100/test.parquet", 200), ("photos/train.parquet", 10)])
def test_real_images_equal_pillow(real_data: Path, file: str, n: int) -> None:
    for row in next(pq.ParquetFile(real_data / file).iter_batches(n)).to_pylist():
        assert np.array_equal(images.decode(row["image"]["bytes"]), by_pillow(row["image"]["bytes"]))


def test_orientation_tags_are_not_applied(photo: Image.Image) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees
    lying = photo.resize((30, 20))
    data = saved(lying, "JPEG", exif=tags)
    assert images.decode(data).shape == (20, 30, 3)
    assert np.array_equal(images.decode(data), images.decode(saved(lying, "JPEG")))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.8])
def test_an_image_cut_short_is_refused(photo: Image.Image, form: str, keep: float) -> None:
    data = saved(photo.resize((64, 64)), form)
    with pytest.raises(SourceError, match=r"^not an image that decodes \(\w+\)$"):
        images.decode(data[: int(len(data) * keep)])


@pytest.mark.parametrize("own_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_picture_of_too_many_pixels_is_refused_unread(own_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own_limit)  # people lift it for other images of theirs
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20_000).to_bytes(4, "big") + (9_000).to_bytes(4, "big") + b"\x08\0\0\0\0"
    data = head + zlib.crc32(head[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    with pytest.raises(SourceError, match=r"^an image of more pixels than the 178,956,970 that are decoded at most; scale it down$"):
        images.decode(data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"\xff\xd8", None),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "webp"),
        (b"RIFF\x00\x00\x00\x00WAVE", None),
        (b"GIF89a", None),
        (b"", None),
    ],
)
def test_extension_is_told_by_the_first_bytes(data: bytes, kind: str | None) -> None:
    assert images.extension(data) == kind


# --- writing


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 5), (8, 8, 3), (1, 1, 3), (255, 256), (300, 256), (160, 160, 3)])
def test_a_png_is_read_by_pillow_as_it_was(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(images.encode_png(pixels))) as found:
        assert found.mode == ("L" if len(shape) == 2 else "RGB")
        assert np.array_equal(np.asarray(found), pixels)
    rgb = pixels if len(shape) == 3 else np.repeat(pixels[:, :, None], 3, 2)
    assert np.array_equal(images.decode(images.encode_png(pixels)), rgb)


@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        ((8, 8), "0380e3d3d0b3f8426873d0a27999809b1860cbf2784b242408d4ab4f1cef4ba6"),
        ((8, 8, 3), "5ae162b8169f749d8e88fc0ec267d8bcc6eafb49fe5886a289be02713f3b352d"),
        ((255, 256), "e516a4695bdbe789fd65aafd4c7cfe92d76f32d348076f04816563270aee15d5"),  # 65,535 bytes: one stored block to the brim
        ((256, 256), "5c513f3ae75c2e7aa00700e54209b75d3f2a854a1f675504f6e6e741bc40dc9d"),  # one more row: two blocks
    ],
)
def test_the_bytes_of_a_png_are_pinned(shape: tuple[int, ...], digest: str) -> None:
    """No compression library has a say: pixels n * 7 % 251 give these bytes everywhere."""
    pixels = (np.arange(np.prod(shape)) * 7 % 251).astype(np.uint8).reshape(shape)
    assert hashlib.sha256(images.encode_png(pixels)).hexdigest() == digest
