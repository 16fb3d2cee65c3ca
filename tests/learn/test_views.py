"""learn/views.py against docs/formats.md, "Views": geometry and rendering written once more, slowly, in plain Python."""

from __future__ import annotations

import hashlib
import io
import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from kdprune_data import order
from kdprune_data.errors import FormatError, UsageError
from kdprune_data.images import SCALED_DECODER, decode
from kdprune_data.learn import resize, views
from kdprune_data.learn.policy import FLOAT32, KERNELS, UINT8
from kdprune_data.learn.views import Crops, Geometry, Normalisation, Policy

MASK = 2**64 - 1
IDS = [*(f"{n:08d}" for n in range(40)), "a", "class/x_y", "é", ""]
SHAPES = [(1, 1), (1, 2), (2, 1), (1, 1000), (1000, 1), (3, 5), (8, 8), (32, 31), (64, 200), (500, 375), (37, 4000)]
PAD = Policy("pad-crop", 8, True, 0, pad=1)
RESIZED = Policy("resized-crop", 16, True, 0)


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int
    flip: bool


# --- the page, in plain Python


def mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uid(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draws(policy: Policy, one: str, view: int) -> list[float]:
    state = mix(mix(mix(uid(f"view/{view}")) ^ policy.seed) ^ uid(one))
    found = []
    for _ in range(43):
        found.append((state >> 11) / 2**53)
        state = mix(state)
    return found


def box(policy: Policy, one: str, shape: tuple[int, int], view: int) -> Box:
    u = draws(policy, one, view)
    if policy.kind == "pad-crop":
        reach = 2 * policy.pad + 1
        return Box(
            math.floor(u[0] * reach) - policy.pad,
            math.floor(u[1] * reach) - policy.pad,
            policy.size,
            policy.size,
            policy.flip and u[2] < 0.5,
        )
    (h, w), (a0, a1), (r0, r1) = shape, policy.scale, policy.ratio
    flip = policy.flip and u[42] < 0.5
    for t in range(10):
        area = w * h * (a0 + (a1 - a0) * u[2 + 4 * t])
        ratio = math.exp(math.log(r0) + (math.log(r1) - math.log(r0)) * u[3 + 4 * t])
        width, height = math.floor(math.sqrt(area * ratio) + 0.5), math.floor(math.sqrt(area / ratio) + 0.5)
        if 0 < width <= w and 0 < height <= h:
            return Box(math.floor(u[4 + 4 * t] * (h - height + 1)), math.floor(u[5 + 4 * t] * (w - width + 1)), height, width, flip)
    height, width = h, w
    if w / h < r0:
        height = max(1, min(h, math.floor(w / r0 + 0.5)))
    elif w / h > r1:
        width = max(1, min(w, math.floor(h * r1 + 0.5)))
    return Box((h - height) // 2, (w - width) // 2, height, width, flip)


def cut(image: np.ndarray, one: Box) -> np.ndarray:
    """A box of an image, pixel by pixel."""
    h, w = image.shape[:2]
    out = np.zeros((one.height, one.width, 3), np.uint8)
    for y in range(one.height):
        for x in range(one.width):
            if 0 <= one.top + y < h and 0 <= one.left + x < w:
                out[y, one.width - 1 - x if one.flip else x] = image[one.top + y, one.left + x]
    return out


def matrix(of: int, to: int) -> np.ndarray:
    """Antialiased bilinear interpolation along one axis: a triangle as wide as the larger of an input and an output pixel."""
    scale = of / to
    reach = max(scale, 1.0)
    rows = []
    for i in range(to):
        weights = np.array([max(0.0, 1 - abs((j + 0.5 - (i + 0.5) * scale) / reach)) for j in range(of)])
        rows.append(weights / weights.sum())
    return np.array(rows)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """In float64, not rounded."""
    return np.einsum("yh,hwc,xw->yxc", matrix(image.shape[0], height), image.astype(np.float64), matrix(image.shape[1], width))


def drawn(policy: Policy, ids: list[str], shapes: list[tuple[int, int]], view: int) -> list[Box]:
    found = views.geometry(policy, order.uids_of(ids), np.array(shapes, np.int32), view)
    assert [side.dtype for side in vars(found).values()] == [np.int32] * 4 + [np.bool_]
    return [Box(*(side[n].item() for side in vars(found).values())) for n in range(len(ids))]


def geometry_of(boxes: list[Box]) -> Geometry:
    top, left, height, width, flip = zip(*boxes, strict=True)
    return Geometry(*(np.array(side, np.int32) for side in (top, left, height, width)), np.array(flip, bool))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- geometry


@pytest.mark.parametrize("view", [0, 1, 7, 9999])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**64 - 1])
@pytest.mark.parametrize(("size", "pad"), [(1, 0), (8, 1), (15, 1), (32, 4), (64, 8)])
@pytest.mark.parametrize("flip", [False, True])
def test_pad_crops_are_those_of_the_page(size: int, pad: int, flip: bool, seed: int, view: int) -> None:
    policy = Policy("pad-crop", size, flip, seed, pad=pad)
    shapes = [(size, size)] * len(IDS)
    assert drawn(policy, IDS, shapes, view) == [box(policy, one, (size, size), view) for one in IDS]


@pytest.mark.parametrize("view", [0, 3])
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changed", [{}, {"flip": False}, {"scale": (0.9, 1.0)}, {"scale": (0.01, 0.02), "ratio": (0.2, 5.0)}])
def test_resized_crops_are_those_of_the_page(shape: tuple[int, int], seed: int, view: int, changed: dict[str, Any]) -> None:
    policy = replace(RESIZED, seed=seed, **changed)
    assert drawn(policy, IDS, [shape] * len(IDS), view) == [box(policy, one, shape, view) for one in IDS]


def test_resized_crops_stay_inside_and_within_scale_and_ratio() -> None:
    boxes = [one for view in range(20) for one in drawn(RESIZED, IDS, [(300, 200)] * len(IDS), view)]
    for one in boxes:
        assert 0 <= one.top <= 300 - one.height
        assert 0 <= one.left <= 200 - one.width
        assert 0.24 < one.height * one.width / (300 * 200) <= 1
        assert 0.74 < one.width / one.height < 1.35
    assert {one.flip for one in boxes} == {False, True}
    assert len({one[:4] for one in boxes}) > 0.9 * len(boxes)


@pytest.mark.parametrize(("shape", "expected"), [((1, 1000), (1, 1)), ((1000, 1), (1, 1)), ((30, 4000), (30, 40)), ((4000, 30), (40, 30))])
def test_a_narrow_image_gets_its_largest_centred_box(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    policy = replace(RESIZED, scale=(0.9, 1.0))
    centred = ((shape[0] - expected[0]) // 2, (shape[1] - expected[1]) // 2, *expected)
    assert {one[:4] for one in drawn(policy, IDS, [shape] * len(IDS), 0)} == {centred}


@pytest.mark.parametrize("policy", [PAD, RESIZED])
def test_geometry_depends_on_seed_id_and_view_alone(policy: Policy) -> None:
    shapes = [(8, 8)] * len(IDS)
    together = drawn(policy, IDS, shapes, 2)
    assert drawn(policy, IDS[::-1], shapes, 2) == together[::-1]
    assert drawn(policy, IDS[7:8], shapes[:1], 2) == together[7:8]
    assert drawn(policy, IDS, shapes, 3) != together
    assert drawn(replace(policy, seed=1), IDS, shapes, 2) != together


def test_pad_crops_reach_every_place_and_both_sides_alike() -> None:
    boxes = [one for view in range(100) for one in drawn(PAD, IDS, [(8, 8)] * len(IDS), view)]
    counts = {place: sum(one[:2] == place for one in boxes) for place in [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]}
    assert sum(counts.values()) == len(boxes)
    assert all(abs(n - len(boxes) / 9) < 5 * math.sqrt(len(boxes) / 9) for n in counts.values())
    assert abs(sum(one.flip for one in boxes) - len(boxes) / 2) < 5 * math.sqrt(len(boxes) / 4)


# --- rendering


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((8, 8), 8), ((1, 1), 1), ((5, 9), 7), ((32, 32), 32), ((3, 3), 9)])
def test_crops_padding_and_flips_are_exact(shape: tuple[int, int], size: int, as_list: bool) -> None:
    random = np.random.default_rng(size)
    reach = max(*shape, size) + 2  # some boxes lie wholly outside
    boxes = [Box(*random.integers(-reach, reach, 2).tolist(), size, size, bool(n % 2)) for n in range(60)]
    images = np.stack([noise(*shape, seed=n) for n in range(60)])
    found = views.render(list(images) if as_list else images, geometry_of(boxes), size)
    assert found.dtype == torch.uint8
    assert found.shape == (60, 3, size, size)
    expected = np.stack([cut(image, one) for image, one in zip(images, boxes, strict=True)])
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)


ROUNDED = {FLOAT32: 0.51, UINT8: 1.02}
"""How far a kernel may be from a plain resize in float64: rounded to the nearest once, or along lines and then along columns."""


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (23, 31), (200, 150)])
def test_resized_crops_are_within_a_grey_level_of_a_plain_resize(shape: tuple[int, int], size: int, kernel: str) -> None:
    boxes = drawn(replace(RESIZED, size=size), IDS[:8], [shape] * 8, 1)
    images = [noise(*shape, seed=n) for n in range(8)]
    found = views.render(images, geometry_of(boxes), size, kernel=kernel).permute(0, 2, 3, 1).numpy().astype(np.float64)
    for one, image, pixels in zip(boxes, images, found, strict=True):
        assert np.abs(pixels - resized(cut(image, one), size, size)).max() <= ROUNDED[kernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_resized_boxes_that_reach_outside_are_padded_before_the_resize(kernel: str) -> None:
    image, one = noise(20, 10), Box(-3, 4, 30, 12, True)
    found = views.render([image], geometry_of([one]), 9, kernel=kernel)[0].permute(1, 2, 0).numpy().astype(np.float64)
    assert np.abs(found - resized(cut(image, one), 9, 9)).max() <= ROUNDED[kernel]


def test_the_kernel_of_whole_numbers_mirrors_last() -> None:
    """Which costs less, and makes of a mirrored view the other one's mirror image, to the grey level."""
    image = noise(41, 30)
    boxes = geometry_of([Box(3, 2, 30, 25, False), Box(3, 2, 30, 25, True)])
    plain, mirrored = views.render([image, image], boxes, 9, kernel=UINT8)
    assert torch.equal(mirrored, plain.flip(2))


# --- scaled decoding


def jpeg(height: int, width: int) -> bytes:
    """A smooth picture: what a scaled decoder leaves out of it is little."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(y / 40), 128 + 100 * np.cos(x / 50), 128 + 60 * np.sin((x + y) / 60)], 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(
    ("side", "size", "eighths"), [(400, 224, 8), (447, 224, 8), (448, 224, 4), (900, 224, 2), (896, 112, 1), (90, 112, 8)]
)
def test_an_image_is_decoded_no_larger_than_its_box_needs(side: int, size: int, eighths: int) -> None:
    data = jpeg(1001, 1203)
    image = views.Scalable(data, (1001, 1203))
    box = geometry_of([Box(40, 60, side, side + 5, True)])
    policy = replace(RESIZED, size=size, decoder=SCALED_DECODER)
    found = views.shown(policy, [image], box)
    assert list(image._at) == [eighths]
    assert image.at(eighths).shape[:2] == (-(-1001 * eighths // 8), -(-1203 * eighths // 8))
    exact = views.shown(policy, [decode(data)], box)
    assert (found.int() - exact.int()).abs().max() <= (0 if eighths == 8 else 12)  # edges are rounded to pixels of the scaled image
    assert (found.int() - exact.int()).abs().float().mean() <= 1.5


def test_what_is_no_jpeg_is_decoded_whole() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(600, 500)).save(file, "png")
    image, box = views.Scalable(file.getvalue(), (600, 500)), geometry_of([Box(0, 0, 600, 500, False)])
    assert torch.equal(views.render([image], box, 32), views.render([noise(600, 500)], box, 32))


@pytest.mark.parametrize(
    "box", [Box(-50, -20, 700, 700, False), Box(500, 580, 300, 300, True), Box(599, 799, 1, 1, False), Box(0, 0, 600, 800, True)]
)
def test_scaled_boxes_may_be_anywhere(box: Box) -> None:
    """Of the wanted size, and close to what the whole image gives, padding included."""
    data = jpeg(600, 800)
    found = views.render([views.Scalable(data, (600, 800))], geometry_of([box]), 64)
    exact = views.render([decode(data)], geometry_of([box]), 64)
    assert found.shape == exact.shape
    assert (found.int() - exact.int()).abs().float().mean() <= 4


def test_a_box_of_the_asked_size_is_not_resized() -> None:
    """One batch with both kinds: what is exact stays exact."""
    boxes = [Box(2, 3, 8, 8, False), Box(0, 0, 16, 16, True), Box(-1, 9, 8, 8, True)]
    images = np.stack([noise(16, 16, seed=n) for n in range(3)])
    found = views.render(images, geometry_of(boxes), 8).permute(0, 2, 3, 1).numpy()
    for n in (0, 2):
        assert np.array_equal(found[n], cut(images[n], boxes[n]))


@pytest.mark.parametrize("policy", [PAD, replace(RESIZED, size=8)])
def test_a_list_and_an_array_of_images_render_alike(policy: Policy) -> None:
    images = np.stack([noise(8, 8, seed=n) for n in range(len(IDS))])
    boxes = views.geometry(policy, order.uids_of(IDS), np.full((len(IDS), 2), 8, np.int32), 0)
    assert torch.equal(views.render(images, boxes, 8), views.render(list(images), boxes, 8))


# --- evaluation


@pytest.mark.parametrize("as_list", [False, True])
def test_squares_of_the_size_are_evaluated_as_they_are(as_list: bool) -> None:
    images = np.stack([noise(8, 8, seed=n) for n in range(5)])
    found = views.evaluation(list(images) if as_list else images, 8)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize("size", [2, 6, 28])  # not 1: torch 2.15 resizes to several rows of one column wrongly
@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (40, 30), (30, 40), (1, 25), (25, 1), (100, 33)])
def test_others_are_resized_by_the_shorter_side_and_cut_in_the_centre(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    short = math.floor(size * 256 / 224 + 0.5)
    height, width = (max(short, side * short // min(shape)) for side in shape)
    whole = resized(image, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    expected = whole[top : top + size, left : left + size]
    for images in ([image], image[None]):
        found = views.evaluation(images, size)[0].permute(1, 2, 0).numpy().astype(np.float64)
        long = max(shape) >= resize.LONG * min(shape)  # which is computed in float32
        assert np.abs(found - expected).max() <= ROUNDED[FLOAT32 if long else UINT8]


def test_the_sides_of_evaluation_are_those_everybody_uses() -> None:
    """256 for 224: a checkerboard of two halves keeps its border in the middle."""
    image = np.zeros((256, 512, 3), np.uint8)
    image[:, 256:] = 255
    found = views.evaluation([image], 224)[0, 0].numpy()
    assert (found[:, :112] == 0).all()
    assert (found[:, 112:] == 255).all()


@pytest.mark.parametrize("shape", [(20, 400), (400, 20), (3, 900), (900, 3), (300, 3001), (3001, 300), (64, 513), (1, 70), (70, 1)])
@pytest.mark.parametrize("size", [8, 64])
def test_long_images_are_evaluated_as_if_resized_whole(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], size: int) -> None:
    """Equal but for sums that round otherwise, by one grey level."""
    image = noise(*shape, seed=sum(shape))
    found = views.evaluation([image], size)
    monkeypatch.setattr(resize, "LONG", 10**9)
    whole = views.evaluation([image], size)
    differs = (found.int() - whole.int()).abs()
    assert differs.max() <= 1
    assert (differs > 0).float().mean() <= 0.35


@pytest.mark.parametrize("shape", [(2, 2_000_000), (2_000_000, 2)])
def test_a_very_long_image_takes_no_gigabytes(shape: tuple[int, int]) -> None:
    """Resized whole it would be 256 by 256 million pixels. Its ends do not matter, its middle does."""
    image = np.zeros((*shape, 3), np.uint8)
    image[10:-10, :] = 100
    image[:, 10:-10] = 100
    found = views.evaluation([image], 224)
    assert (found == 100).all()
    middle = [slice(n // 2 - 1, n // 2 + 1) for n in shape]
    image[middle[0], middle[1]] = 200
    assert views.evaluation([image], 224).max() == 200


# --- policies


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (list("0123456789"), False),
        ([" 3 ", "4"], False),
        (["7"], False),
        ([], True),
        (["cat", "dog"], True),
        (["0", "1", "ten"], True),
        ([str(n) for n in range(11)], True),
    ],
)
def test_digits_are_never_mirrored(classes: list[str], expected: bool) -> None:
    assert views.flips(classes) is expected


@pytest.mark.parametrize(
    ("shapes", "size", "kind", "side", "pad"),
    [
        ([(8, 8)] * 3, None, "pad-crop", 8, 1),
        ([(32, 32)] * 3, None, "pad-crop", 32, 4),
        ([(64, 64)], None, "pad-crop", 64, 8),
        ([(65, 65)] * 3, None, "resized-crop", 224, 0),
        ([(65, 65)] * 3, 65, "pad-crop", 65, 8),
        ([(8, 8)] * 3, 16, "resized-crop", 16, 0),
        ([(8, 9)] * 3, None, "resized-crop", 224, 0),
        ([(8, 8), (8, 7)], None, "resized-crop", 224, 0),
        ([(1, 1)], None, "pad-crop", 1, 0),
    ],
)
def test_the_policy_of_a_data_set(shapes: list[tuple[int, int]], size: int | None, kind: str, side: int, pad: int) -> None:
    found = views.policy_for(np.array(shapes, np.int32), ["a", "b"], size=size, flip="auto", seed=3)
    assert (found.kind, found.size, found.pad, found.flip, found.seed) == (kind, side, pad, True, 3)


@pytest.mark.parametrize(
    ("crops", "kind", "values"),
    [
        (Crops(), "pad-crop", {"pad": 1}),
        (Crops(pad=0), "pad-crop", {"pad": 0}),
        (Crops(pad=7), "pad-crop", {"pad": 7}),
        (Crops(scale=(0.08, 1.0)), "resized-crop", {"scale": (0.08, 1.0), "ratio": (0.75, 4 / 3)}),
        (Crops(ratio=(1.0, 1.0)), "resized-crop", {"scale": (0.25, 1.0), "ratio": (1.0, 1.0)}),
    ],
)
def test_crops_that_are_asked_for(crops: Crops, kind: str, values: dict[str, object]) -> None:
    found = views.policy_for(np.array([(8, 8)] * 2, np.int32), ["a"], size=None, flip="auto", seed=0, crops=crops)
    assert (found.kind, {key: getattr(found, key) for key in values}) == (kind, values)
    boxes = views.geometry(found, np.arange(50, dtype=np.uint64), np.full((50, 2), 8, np.int32), 0)
    if kind == "pad-crop":
        assert max(abs(int(boxes.top.min())), int(boxes.top.max())) == found.pad


@pytest.mark.parametrize(
    ("pad", "scale", "ratio", "message"),
    [
        (8, (), (), "--pad 8 is too large for views of 8 pixels: at most 7"),
        (1, (0.5, 1.0), (), "--scale and --ratio ask for resized crops"),
        (None, (0.5,), (), "--scale 0.5 is no range"),
        (None, (0.0, 1.0), (), "--scale 0 1 is no range: give LOW HIGH, both above 0 and at most 1, LOW first"),
        (None, (0.5, 1.1), (), "--scale 0.5 1.1 is no range"),
        (None, (), (2.0, 1.0), "--ratio 2 1 is no range: give LOW HIGH, both above 0, LOW first"),
    ],
)
def test_crops_that_cannot_be(pad: int | None, scale: tuple[float, ...], ratio: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        views.policy_for(np.array([(8, 8)], np.int32), ["a"], size=None, flip="auto", seed=0, crops=Crops.of(pad, scale, ratio))


def test_scaled_decoding_is_for_crops_that_are_resized() -> None:
    sizes = np.array([(8, 8)], np.int32)
    crops = Crops.of(None, (), (), "scaled")
    with pytest.raises(UsageError, match="--decode scaled is for crops that are resized, and these are cut as they are: leave it out"):
        views.policy_for(sizes, ["a"], size=None, flip="auto", seed=0, crops=crops)
    found = views.policy_for(sizes, ["a"], size=16, flip="auto", seed=0, crops=crops)
    assert (found.kind, found.scaled, found.to_dict()["decoder"]) == ("resized-crop", True, "libjpeg-turbo scaled, Pillow")


def test_a_pad_where_images_are_resized_is_refused() -> None:
    with pytest.raises(UsageError, match="not all images are squares of 224 pixels: leave it out"):
        views.policy_for(np.array([(80, 90)], np.int32), ["a"], size=None, flip="auto", seed=0, crops=Crops(pad=1))


@pytest.mark.parametrize(("flip", "classes", "expected"), [("auto", "01", False), ("on", "01", True), ("off", "ab", False)])
def test_flip_is_asked_for_or_automatic(flip: str, classes: str, expected: bool) -> None:
    assert views.policy_for(np.array([(8, 8)], np.int32), list(classes), size=None, flip=flip, seed=0).flip is expected


@pytest.mark.parametrize(
    "policy",
    [
        PAD,
        RESIZED,
        replace(RESIZED, scale=(0.08, 1.0), seed=2**31),
        replace(RESIZED, resize=FLOAT32),
        replace(RESIZED, decoder=SCALED_DECODER),
        views.identity(replace(RESIZED, decoder=SCALED_DECODER)),
    ],
)
def test_a_policy_survives_its_manifest(policy: Policy) -> None:
    assert Policy.from_dict(policy.to_dict()) == policy


@pytest.mark.parametrize("policy", [PAD, RESIZED])
@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"decoder": "somebody's"},
        {"kernel": "bicubic"},
        {"kind": "three-augment"},
        {"angle": 10},
    ],
    ids=str,
)
def test_a_policy_that_would_render_otherwise_is_refused(policy: Policy, change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="not one that this version renders"):
        Policy.from_dict(policy.to_dict() | change)


@pytest.mark.parametrize("policy", [PAD, RESIZED])
def test_a_policy_without_one_of_its_values_is_refused(policy: Policy) -> None:
    for key in policy.to_dict():
        with pytest.raises(FormatError, match="not one that this version renders"):
            Policy.from_dict({k: v for k, v in policy.to_dict().items() if k != key})


# --- normalisation


def test_normalisation() -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 1.0)
    pixels = torch.from_numpy(np.stack([noise(4, 5, seed=n) for n in range(3)])).permute(0, 3, 1, 2)
    before = pixels.clone()
    found = Normalisation(mean, std).apply(pixels)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.equal(pixels, before)


# --- every crop there is, and the image itself


@pytest.mark.parametrize(("pad", "flip", "count"), [(0, False, 1), (0, True, 2), (1, False, 9), (1, True, 18), (4, True, 162)])
def test_every_crop_shows_each_distinct_crop_once(pad: int, flip: bool, count: int) -> None:
    """And in an order of each sample's own."""
    policy = views.every_crop(Policy("pad-crop", 8, flip, 3, pad=pad))
    assert policy.views == count
    uids = order.uids_of([f"s{n}" for n in range(20)])
    sizes = np.full((20, 2), 8, np.int32)
    drawn = [views.geometry(policy, uids, sizes, view) for view in range(count)]
    for n in range(20):
        assert len({(int(b.top[n]), int(b.left[n]), bool(b.flip[n])) for b in drawn}) == count
    tops = np.stack([b.top for b in drawn])
    assert (tops.min(), tops.max()) == (-pad, pad)
    assert all((b.height == 8).all() and (b.width == 8).all() for b in drawn)
    assert any(b.flip.any() for b in drawn) == flip
    if count > 2:
        orders = {tuple((int(b.top[n]), int(b.left[n]), bool(b.flip[n])) for b in drawn) for n in range(20)}
        assert len(orders) > 10
    with pytest.raises(UsageError, match=rf"there are {count} views of policy every-crop, numbered from 0: {count} is none"):
        views.geometry(policy, uids, sizes, count)
    assert Policy.from_dict(policy.to_dict()) == policy


def test_every_crop_is_of_padded_crops() -> None:
    with pytest.raises(UsageError, match="resized crops have no end, give a number"):
        views.every_crop(Policy("resized-crop", 32, True, 0))


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(8, 8, (0, 0, 8, 8)), (9, 20, (0, 5, 9, 9)), (30, 7, (11, 0, 7, 7)), (1, 1, (0, 0, 1, 1)), (1, 6, (0, 2, 1, 1))],
)
def test_identity_is_the_largest_centred_square(height: int, width: int, box: tuple[int, ...]) -> None:
    policy = views.identity(Policy("resized-crop", 8, True, 5))
    assert (policy.views, policy.flip, policy.size) == (1, False, 8)
    found = views.geometry(policy, order.uids_of(["a"]), np.array([[height, width]], np.int32), 0)
    assert tuple(int(side[0]) for side in (found.top, found.left, found.height, found.width)) == box
    assert not found.flip.any()
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    shown = views.render(image, found, 8)
    assert shown.shape == (1, 3, 8, 8)
    if (height, width) == (8, 8):
        assert np.array_equal(shown[0].permute(1, 2, 0).numpy(), image[0])


def test_given_boxes_are_not_drawn() -> None:
    with pytest.raises(UsageError, match="given by whoever made the logits"):
        views.geometry(Policy("given", 8, False, 0), order.uids_of(["a"]), np.array([[8, 8]], np.int32), 0)


def test_images_that_are_a_tensor_already_are_rendered_alike() -> None:
    """As they are where they stay on a device for all views."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    for view in range(3):
        boxes = views.geometry(PAD, order.uids_of([f"s{n}" for n in range(20)]), np.full((20, 2), 8, np.int32), view)
        assert torch.equal(views.render(images, boxes, 8), views.render(torch.from_numpy(images), boxes, 8))
