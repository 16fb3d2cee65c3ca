"""Encoded images of a data set on one core, nothing decoded: by row, a batch at a time, each held against its digest."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shards
import webdataset as wds
from common import in_turns, measured, one_core, parser, ratios, report
from kdprune_pipelines import index
from kdprune_pipelines._console import quiet

from kdprune_data import order
from kdprune_data.formats.dataset import Dataset

BATCH = 256
PEER = "WebDataset, iteration"


def peer(paths: list[str]) -> list[bytes]:
    """WebDataset's samples as they come, of which the image is kept."""
    return [sample["jpg"] for sample in wds.WebDataset(paths, shardshuffle=False)]


def adopted(folder: Path, paths: list[str]) -> Dataset:
    """Shards of others, where they lie."""
    if not (folder / "manifest.json").is_file():
        with quiet():
            index.run(index.IndexConfig(shards=tuple(map(Path, paths)), out=folder))
    return Dataset.open(folder)


def loops(data: Dataset) -> dict[str, Callable[[], object]]:
    """What is timed, each over all images."""
    paths, rows = [str(path) for path in data.shard_paths], np.arange(len(data))
    shuffled = order.epoch_order(data.uids, data.shards, seed=0, epoch=0)
    found = data.read(rows)
    assert found == peer(paths)
    source = np.frombuffer(b"".join(found), np.uint8)
    target = np.empty_like(source)

    def ours(rows: np.ndarray) -> None:
        for start in range(0, len(rows), BATCH):
            data.read(rows[start : start + BATCH])

    return {
        PEER: lambda: peer(paths),
        "ours, in order": lambda: ours(rows),
        "ours, in the order of an epoch": lambda: ours(shuffled),
        "limit: copying the bytes": lambda: np.copyto(target, source),
    }


def sets(work: Path, asked: argparse.Namespace) -> dict[str, Dataset]:
    """The data sets to read."""
    theirs = shards.written(work / "theirs", *shards.read(asked.data, asked.samples))
    large = shards.written(work / "large", *shards.read(asked.photos, asked.photo_samples))
    return {
        "small": shards.imported(work / "ours", theirs),
        "small, as WebDataset writes them": adopted(work / "adopted", theirs),
        "photographs": shards.imported(work / "photographs", large),
    }


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=50_000)
    made.add_argument("--photos", type=Path, required=True, help="Parquet file of photographs.")
    made.add_argument("--photo-samples", type=int, default=2_000, help="Photographs, repeated under other keys.")
    made.set_defaults(rounds=5)
    asked = made.parse_args()
    one_core(asked)
    about = measured(asked, ["webdataset", "numpy"], n=asked.samples, batch=BATCH, rounds=asked.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in sets(asked.work or Path(temporary), asked).items():
            seconds = in_turns(loops(data), asked.rounds, cpu=asked.cpu)
            by_peer = ratios(seconds, PEER)
            size = int(data.index["image_length"].to_numpy().mean())
            for way, found in seconds.items():
                row = {"images": name, "bytes": size, "way": way, "us a sample": 1e6 * statistics.median(found) / len(data)}
                goal = "30 times WebDataset" if way.startswith("ours") and name.startswith("small") else None
                rows.append(row | {"times WebDataset": 1 / by_peer[way], "goal": goal})
    report(asked, rows, about)


if __name__ == "__main__":
    main()
