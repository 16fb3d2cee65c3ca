"""What the benchmarks of reading share: images of a Parquet file, as shards that WebDataset wrote, as a data set, and with cached soft
labels.

All of it is made in a folder of the caller's, and nothing is made twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from kdprune_pipelines import cache, import_
from kdprune_pipelines._console import quiet

from kdprune_data.formats.dataset import Dataset

SHARD = 10_000


def options(made: argparse.ArgumentParser, *, data: str, samples: int) -> None:
    """Where the images come from, how many, and where to work."""
    made.add_argument("--data", type=Path, required=True, help=f"Parquet file of {data}.")
    made.add_argument(
        "--samples", type=int, default=samples, help="Samples; the images are repeated under other keys where they are fewer."
    )
    made.add_argument("--rounds", type=int, default=7, help="Rounds; each runs every loop once, one after the other.")
    made.add_argument("--work", type=Path, help="Folder to work in, which is kept; default a temporary one.")


def read(path: Path, samples: int) -> tuple[list[bytes], list[int]]:
    """Encoded images and labels of a Parquet file in Hugging Face's layout, repeated as often as needed."""
    table = pq.read_table(path, columns=["image", "label"])
    images = [image["bytes"] for image in table["image"].to_pylist()]
    labels = table["label"].to_pylist()
    times = -(-samples // len(images))
    return (images * times)[:samples], (labels * times)[:samples]


def written(folder: Path, images: list[bytes], labels: list[int], **members: list[bytes]) -> list[str]:
    """Shards of WebDataset's own writer, with its defaults: `jpg`, `cls` and more members, given by extension."""
    paths = sorted(map(str, folder.glob("*.tar")))
    if paths:
        return paths
    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=SHARD, verbose=0) as sink:
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            sink.write({"__key__": f"{n:08d}", "jpg": image, "cls": label} | {name: each[n] for name, each in members.items()})
    return sorted(map(str, folder.glob("*.tar")))


def imported(folder: Path, shards: list[str]) -> Dataset:
    """The same samples as a data set of ours."""
    if not (folder / "manifest.json").is_file():
        with quiet():
            import_.run(import_.ImportConfig(source=tuple(shards), out=folder, shuffle="on"))
    return Dataset.open(folder)


def taught(folder: Path, data: Dataset, views: int) -> Path:
    """A cache of soft labels for padded crops of a data set: random logits, as float16."""
    from kdprune_data.learn.views import geometry, policy_for

    if (folder / "manifest.json").is_file():
        return folder
    policy = policy_for(data.sizes, data.classes, size=None, flip="auto", seed=0)
    random, classes = np.random.default_rng(0), len(data.classes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, writer = folder.with_suffix(".parquet"), None
    for view in range(views):
        boxes = geometry(policy, data.uids, data.sizes, view)
        logits = random.normal(0, 3, (len(data), classes)).astype(np.float32)
        rows = pa.table(
            {
                "id": data.ids.tolist(),
                "view": np.full(len(data), view, np.int32),
                **{side: getattr(boxes, side) for side in ("top", "left", "height", "width", "flip")},
                "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), classes),
            }
        )
        writer = writer or pq.ParquetWriter(file, rows.schema)
        writer.write_table(rows)
    if writer is not None:
        writer.close()
    with quiet():
        cache.run(cache.CacheConfig(subset=data.folder, from_=file, out=folder))
    file.unlink()
    return folder
