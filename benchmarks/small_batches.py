"""Training batches of small images on one core: shuffled, cropped with padding, mirrored, normalised float32, soft labels joined."""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import shards
import torch
import webdataset as wds
from common import in_turns, measured, one_core, parser, ratios, report
from PIL import Image
from torchvision.transforms import v2

from kdprune_data.learn.loader import SoftLabelDataset

BATCH = 256
PEER = "WebDataset + Pillow + v2"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def peer(paths: list[str], side: int) -> Iterator[list[torch.Tensor]]:
    """WebDataset, Pillow and torchvision's transforms, as their documentation puts them together; without an end, so that no round fills
    the buffer of its shuffle anew."""
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomCrop(side, padding=side // 8),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    stages = wds.WebDataset(paths, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int)
    return iter(stages.batched(BATCH).repeat())


def check(dataset: SoftLabelDataset) -> None:
    """What is compared is the same: a batch of ours is Pillow's pixels and torchvision's crops, by the boxes that the cache says."""
    data, source = dataset.feed.images.data, dataset.feed.views
    rows = dataset.feed.plan(0)[0]
    batch, (boxes, logits) = next(iter(dataset)), source.show(rows, 0)
    assert logits is not None
    for n, row in enumerate(rows.tolist()):
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(data.image_bytes(row))).convert("RGB"))
        pad = source.policy.size // 8
        cut = v2.functional.crop(
            v2.functional.pad(image, [pad] * 4), int(boxes.top[n]) + pad, int(boxes.left[n]) + pad, *[source.policy.size] * 2
        )
        cut = cut.flip(2) if boxes.flip[n] else cut
        norm = dataset.normalisation
        made = v2.functional.normalize(v2.functional.to_dtype(cut, torch.float32, scale=True), list(norm.mean), list(norm.std))
        assert torch.allclose(batch["image"][n], made, atol=1e-5)
    assert np.array_equal(batch["logits"].numpy(), logits.astype(np.float32))
    assert batch["image"].dtype == torch.float32


def loops(work: Path, asked: argparse.Namespace) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, and how many batches each makes."""
    theirs = shards.written(work / "theirs", *shards.read(asked.data, asked.samples))
    data = shards.imported(work / "ours", theirs)
    logits = shards.taught(work / "logits", data, views=2)
    ways = {keep: SoftLabelDataset(data.folder, logits, batch_size=BATCH, in_memory=keep) for keep in ("off", "on")}
    for dataset in ways.values():
        check(dataset)
    for _ in ways["on"]:  # every image is decoded once
        pass
    side, many = int(data.sizes[0, 0]), min(asked.batches, len(ways["on"]))
    fewer = max(1, many // 5)
    endless = [peer(paths, side) for paths in (theirs, [str(path) for path in data.shard_paths])]
    whole = np.zeros((len(data), 3, side, side), np.float32)
    rows = [np.asarray(some) for some in ways["on"].feed.plan(0)[:many]]

    def drain(batches: Iterator[Any], n: int) -> None:
        for _ in islice(batches, n):
            pass

    return {
        PEER: (lambda: drain(endless[0], fewer), fewer),
        "the same, of the shards that were imported": (lambda: drain(endless[1], fewer), fewer),
        "streaming": (lambda: drain(iter(ways["off"]), many), many),
        "in memory": (lambda: drain(iter(ways["on"]), many), many),
        "limit: copying an array": (lambda: [whole[some] for some in rows], many),
    }


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=50_000)
    made.add_argument("--batches", type=int, default=40, help=f"Batches of {BATCH} of a timed loop; the peer's has a fifth of them.")
    asked = made.parse_args()
    one_core(asked)
    packages = ["webdataset", "torchvision", "pillow", "simplejpeg", "numpy"]
    about = measured(asked, packages, n=asked.samples, batch=BATCH, rounds=asked.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        timed = loops(asked.work or Path(temporary), asked)
        seconds = in_turns({name: loop for name, (loop, _) in timed.items()}, asked.rounds, cpu=asked.cpu)
    each = {name: [s / timed[name][1] for s in found] for name, found in seconds.items()}
    by_peer, goals = ratios(each, PEER), {"streaming": "12 times the peer", "in memory": "50 times the peer"}
    rows = [
        {
            "batches": name,
            "samples/s": round(BATCH / statistics.median(found)),
            "times the peer": 1 / by_peer[name],
            "goal": goals.get(name),
        }
        for name, found in each.items()
    ]
    report(asked, rows, about)


if __name__ == "__main__":
    main()
