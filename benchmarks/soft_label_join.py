"""What soft labels beside images cost on one core: rows of a cache joined by batch, and an extra member of every tar record."""

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
import webdataset as wds
from common import in_turns, measured, one_core, parser, report

from kdprune_data.formats.logits import LogitCache
from kdprune_data.learn.decoded import Images
from kdprune_data.learn.stream import BoxesOnly, Feed, cached_views

BATCH, FEW = 256, 2_000


def member(logits: np.ndarray[Any, Any]) -> bytes:
    """Logits as an .npy file."""
    file = io.BytesIO()
    np.save(file, logits, allow_pickle=False)
    return file.getvalue()


def peer(paths: list[str]) -> Iterator[Any]:
    """WebDataset's own way: what is in the record comes with it, and .npy members are decoded."""
    return iter(wds.WebDataset(paths, shardshuffle=False).decode().repeat())


def drain(things: Iterator[Any], n: int) -> None:
    """The next n of them."""
    for _ in islice(things, n):
        pass


def loops(work: Path, asked: argparse.Namespace) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, and how many samples each reads."""
    images, _ = shards.read(asked.data, asked.samples)
    labels = [n % asked.classes for n in range(len(images))]
    theirs = shards.written(work / "theirs", images, labels)
    data = shards.imported(work / "ours", theirs)
    cache = LogitCache.open(shards.taught(work / "logits", data, views=2))
    source = cached_views(data, cache)
    of_id = dict(zip(data.ids.tolist(), range(len(data)), strict=True))
    few = [member(source.joined.read(np.asarray([of_id[f"{n:08d}"]]), 0).logits[0]) for n in range(min(FEW, len(images)))]
    fuller = shards.written(work / "fuller", images[: len(few)], labels[: len(few)], npy=few)
    plain = shards.written(work / "plain", images[: len(few)], labels[: len(few)])
    for sample in islice(peer(fuller), 10):  # what is compared is the same
        assert np.array_equal(sample["npy"], source.joined.read(np.asarray([of_id[sample["__key__"]]]), 0).logits[0])
    kept = Images(data, keep="on")
    kept.get(data.usable())
    with_them, without = (Feed(kept, views, BATCH, 0, threads=0) for views in (source, BoxesOnly(source)))
    many = min(asked.batches, with_them.steps_per_epoch())
    there, here = peer(fuller), peer(plain)

    def batches(feed: Feed) -> Callable[[], object]:
        return lambda: drain(feed.epoch(0), many)

    rows = with_them.plan(0)[:many]
    alone = lambda: [source.joined.read(some, 0).logits for some in rows]  # noqa: E731  # one of several loops
    return {
        "batches of images": (batches(without), many * BATCH),
        "batches of images and soft labels": (batches(with_them), many * BATCH),
        "soft labels alone": (alone, many * BATCH),
        "WebDataset, without": (lambda: drain(here, len(few)), len(few)),
        "WebDataset, an .npy member": (lambda: drain(there, len(few)), len(few)),
    }


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=50_000)
    made.add_argument("--classes", type=int, default=1_000)
    made.add_argument("--batches", type=int, default=40, help=f"Batches of {BATCH} of a timed loop.")
    asked = made.parse_args()
    one_core(asked)
    about = measured(asked, ["webdataset", "pyarrow", "numpy"], n=asked.samples, classes=asked.classes, batch=BATCH, rounds=asked.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        timed = loops(asked.work or Path(temporary), asked)
        seconds = in_turns({name: loop for name, (loop, _) in timed.items()}, asked.rounds, cpu=asked.cpu)
    each = {name: [1e6 * s / timed[name][1] for s in found] for name, found in seconds.items()}
    bases = {"batches of images and soft labels": "batches of images", "WebDataset, an .npy member": "WebDataset, without"}
    rows = []
    for name, found in each.items():
        row: dict[str, Any] = {"loop": name, "us a sample": statistics.median(found), "us more than without": None, "goal": None}
        if name in bases:
            row["us more than without"] = statistics.median(a - b for a, b in zip(found, each[bases[name]], strict=True))
        if name == "batches of images and soft labels":
            row["goal"] = "1 us more"
        rows.append(row)
    report(asked, rows, about)


if __name__ == "__main__":
    main()
