"""Full-size JPEGs to views of 224 pixels on one core: decoded, cropped, resized and mirrored, to uint8."""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import shards
import torch
from common import in_turns, measured, one_core, parser, ratios, report
from PIL import Image
from torchvision.transforms import v2

from kdprune_data import images as decoding
from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn import views
from kdprune_data.learn.decoded import Images
from kdprune_data.learn.views import DECODERS, Geometry, Policy

SIZE, BATCH = 224, 32
PEER, TENSOR = "Pillow + v2, of the image", "Pillow + v2, of the tensor"


def peer(encoded: list[bytes], *, tensor: bool, scale: tuple[float, float]) -> list[torch.Tensor]:
    """Pillow and torchvision's transforms, uint8 out: as most code has them, and with the image made a tensor first."""
    crop, flip = v2.RandomResizedCrop(SIZE, scale=scale, antialias=True), v2.RandomHorizontalFlip()
    transform = v2.Compose([v2.PILToTensor(), crop, flip] if tensor else [crop, flip, v2.PILToTensor()])
    return [transform(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded]


def check(data: Dataset, policy: Policy, boxes: Geometry) -> None:
    """What is compared is the same: ours is torchvision's resized crop of Pillow's pixels, within two grey levels."""
    rows = data.usable()[:8]
    ours = Images(data, keep="off").rendered(rows, boxes.take(rows), policy)
    for n, row in enumerate(rows.tolist()):
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(data.image_bytes(row))).convert("RGB"))
        box = [int(side[row]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        made = v2.functional.resized_crop(image, *box, [SIZE, SIZE], antialias=True)
        assert ours.dtype == made.dtype
        assert int(((made.flip(2) if boxes.flip[row] else made).int() - ours[n].int()).abs().max()) <= 2


def loops(data: Dataset) -> dict[str, Callable[[], object]]:
    """What is timed, each over all images."""
    rows = data.usable()
    policy = views.policy_for(data.sizes[rows], data.classes, size=SIZE, flip="auto", seed=0)
    boxes = views.geometry(policy, data.uids, data.sizes, 0)
    check(data, policy, boxes)
    images, encoded = Images(data, keep="off"), data.read(rows)
    kept = Images(data, keep="on")
    kept.get(rows)

    def ours(from_: Images, policy: Policy) -> None:
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            from_.rendered(some, boxes.take(some), policy)

    return {
        PEER: lambda: peer(encoded, tensor=False, scale=policy.scale),
        TENSOR: lambda: peer(encoded, tensor=True, scale=policy.scale),
        "ours, exact": lambda: ours(images, policy),
        "ours, decoded scaled": lambda: ours(images, replace(policy, decoder=DECODERS["scaled"])),
        "ours, in memory": lambda: ours(kept, policy),
        "limit: decoding alone": lambda: [decoding.decode(one) for one in encoded],
    }


def larger(encoded: list[bytes], side: int) -> list[bytes]:
    """The same pictures at another size, the longer side given: as a camera would have taken them."""
    made = []
    for one in encoded:
        image, file = Image.open(io.BytesIO(one)).convert("RGB"), io.BytesIO()
        by = side / max(image.size)
        image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
        made.append(file.getvalue())
    return made


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="photographs", samples=100)
    made.add_argument("--side", type=int, default=4000, help="Longer side of the second set, the first of them made so large.")
    asked = made.parse_args()
    one_core(asked)
    about = measured(asked, ["torchvision", "pillow", "simplejpeg", "numpy"], n=asked.samples, size=SIZE, rounds=asked.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        images, labels = shards.read(asked.data, asked.samples)
        few = max(1, asked.samples // 8)
        for name, encoded in {"photographs": images, f"of {asked.side} pixels": larger(images[:few], asked.side)}.items():
            folder = work / name.replace(" ", "-")
            data = shards.imported(folder / "ours", shards.written(folder / "theirs", encoded, labels[: len(encoded)]))
            seconds = in_turns(loops(data), asked.rounds if encoded is images else max(1, asked.rounds // 2), cpu=asked.cpu)
            by_peer, by_tensor = ratios(seconds, PEER), ratios(seconds, TENSOR)
            goals = {"ours, exact": "1.35 times the peer", "ours, decoded scaled": "1.5 times the peer"}
            for way, found in seconds.items():
                row = {"images": name, "pixels": round(float(data.sizes.astype(np.int64).prod(1).mean())), "way": way}
                row |= {"ms an image": 1e3 * statistics.median(found) / len(data), "times the peer": 1 / by_peer[way]}
                rows.append(row | {"times the peer of tensors": 1 / by_tensor[way], "goal": goals.get(way)})
    report(asked, rows, about)


if __name__ == "__main__":
    main()
