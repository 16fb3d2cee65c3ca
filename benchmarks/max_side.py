"""Photographs as they are and as `import --max-side` leaves them, on one core: bytes, decoding, and views of 224 pixels, to uint8."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shards
from common import in_turns, measured, one_core, parser, ratios, report
from decode_crop import larger
from kdprune_pipelines import import_
from kdprune_pipelines._console import quiet

from kdprune_data import images as decoding
from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn import views
from kdprune_data.learn.decoded import Images

SIZE, BATCH = 224, 32
WHOLE = "as they are"


def imported(folder: Path, paths: list[str], side: int | None) -> Dataset:
    """The photographs as a data set, resized or not."""
    if not (folder / "manifest.json").is_file():
        with quiet():
            import_.run(import_.ImportConfig(source=tuple(paths), out=folder, max_side=side))
    return Dataset.open(folder)


def decoded_all(data: Dataset) -> Callable[[], object]:
    """Decoding all images, which are in memory."""
    encoded = data.read(data.usable())
    return lambda: [decoding.decode(one) for one in encoded]


def viewed(data: Dataset) -> Callable[[], object]:
    """Reading, decoding, random resized crops and mirroring of all images, as training does."""
    rows, images = data.usable(), Images(data, keep="off")
    policy = views.policy_for(data.sizes[rows], data.classes, size=SIZE, flip="auto", seed=0)
    boxes = views.geometry(policy, data.uids, data.sizes, 0)
    return lambda: [images.rendered(some, boxes.take(some), policy) for some in np.array_split(rows, max(1, len(rows) // BATCH))]


def check(data: dict[str, Dataset], sides: list[int]) -> None:
    """The same samples, none larger than it may be, those that are small enough untouched."""
    whole = data[WHOLE]
    for side in sides:
        some = data[name_of(side)]
        assert np.array_equal(some.ids, whole.ids)
        assert some.sizes.max() <= side
        same = (some.sha256 == whole.sha256).all(1)
        assert np.array_equal(same, whole.sizes.max(1) <= side)


def name_of(side: int) -> str:
    return f"--max-side {side}"


def rows_of(photos: str, data: dict[str, Dataset], asked: argparse.Namespace) -> list[dict[str, object]]:
    """What each of the data sets takes."""
    decoded = in_turns({name: decoded_all(one) for name, one in data.items()}, asked.rounds, cpu=asked.cpu)
    shown = in_turns({name: viewed(one) for name, one in data.items()}, asked.rounds, cpu=asked.cpu)
    faster = ratios(shown, WHOLE)
    return [
        {
            "photographs": photos,
            "imported": name,
            "resized": one.manifest.counts.get("resized"),
            "kB a sample": sum(path.stat().st_size for path in one.shard_paths) / len(one) / 1e3,
            "decoding, ms": 1e3 * statistics.median(decoded[name]) / len(one),
            "decoding and view, ms": 1e3 * statistics.median(shown[name]) / len(one),
            "times as fast": 1 / faster[name],
        }
        for name, one in data.items()
    ]


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="photographs", samples=200)
    made.add_argument("--sides", type=int, nargs="+", default=[512, 256], help="Values of --max-side.")
    made.add_argument("--side", type=int, default=4000, help="Longer side of the second set, the first of them made so large.")
    made.set_defaults(rounds=5)
    asked = made.parse_args()
    one_core(asked)
    about = measured(asked, ["pillow", "simplejpeg", "numpy"], n=asked.samples, size=SIZE, quality=90, rounds=asked.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        encoded, labels = shards.read(asked.data, asked.samples)
        few = max(1, asked.samples // 16)
        for photos, some in {"photographs": encoded, f"of {asked.side} pixels": larger(encoded[:few], asked.side)}.items():
            folder = work / photos.replace(" ", "-")
            theirs = shards.written(folder / "theirs", some, labels[: len(some)])
            data = {WHOLE: imported(folder / "whole", theirs, None)}
            data |= {name_of(side): imported(folder / str(side), theirs, side) for side in asked.sides}
            check(data, asked.sides)
            rows += rows_of(photos, data, asked)
    report(asked, rows, about)


if __name__ == "__main__":
    main()
