"""Re-reading data sets and subsets: tars against the index, images and labels against both, and the tables beside them.

Part of `check`, which see. Adopted shards are read by the settings they were adopted with (`members.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import images, order
from kdprune_data.errors import KdpruneError, SourceError, some
from kdprune_data.formats import dataset, indexing, subset, table, tar
from kdprune_data.formats import manifest as m
from kdprune_data.formats.check import Fault, Tick
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest


def data(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A data set or subset: tars, images and index agree; ids, counts and content are what they say. `tick` gets samples."""
    found = Dataset.open(folder)
    yield from _index(found)
    for shard, path in enumerate(found.shard_paths):
        rows = np.flatnonzero(found.shards == shard)
        try:
            yield from _shard(found, shard, path, rows)
        except KdpruneError as error:
            yield Fault(str(path), str(error))
        tick(len(rows))
    yield from _side_files(found)
    if manifest.kind == "subset":
        yield from _selection(found)


def _index(found: Dataset) -> Iterator[Fault]:
    path, manifest = str(found.folder / indexing.INDEX), found.manifest
    wrong = found.ids[order.uids_of(found.ids) != found.uids]
    if len(wrong):
        yield Fault(path, f"the uid of {some(wrong)} is not its id's")
    if order.first_repeat(found.uids):
        yield Fault(path, "two samples share an id")
    if (np.diff(found.shards) < 0).any() or found.shards.max(initial=0) >= len(found.shard_paths):
        yield Fault(path, "the rows are not in the order of the shards")
    if found.labels.max(initial=-1) >= len(found.classes):
        yield Fault(path, f"sample {found.ids[found.labels.argmax()]!r} has label {found.labels.max()}, of {len(found.classes)} classes")
    if found.has_digests != found.origin.get("digests", True):
        yield Fault(path, "has rows without the sha256 of their image" if not found.has_digests else "has digests that none should have")
    longest, most = int(found.sizes.max(initial=0)), found.origin.get("max_side")
    if most is not None and longest > most:
        yield Fault(path, f"has an image of {longest:,} pixels on a side, and was imported with --max-side {most:,}")
    if m.content_of(found.ids, found.sha256, found.labels) != manifest.content:
        yield Fault(path, "ids, images and labels do not give the manifest's content")
    labelled = found.labels[found.labels >= 0]
    counts = {
        "samples": len(found),
        "ok": int(found.ok.sum()),
        "labelled": len(labelled),
        "per_class": np.bincount(labelled, minlength=len(found.classes)).tolist(),
        "shards": len(found.shard_paths),
    }
    if "label_true" in found.index.column_names:
        yield from _true_labels(found, path)
        counts["noisy"] = int((found.labels != found.true_labels).sum())
    elif "noisy" in manifest.counts:
        yield Fault(path, "has no column label_true, and the manifest counts noisy labels")
    for key, value in counts.items():
        if manifest.counts.get(key) != value:
            yield Fault(str(found.folder / m.NAME), f"says {key} {manifest.counts.get(key)}, the index gives {value}")


def _true_labels(found: Dataset, path: str) -> Iterator[Fault]:
    """The labels before noise changed some: none where there is none, else a class."""
    true = found.true_labels
    if len(wrong := found.ids[(true < 0) != (found.labels < 0)]):
        yield Fault(path, f"{some(wrong)}: one of label and label_true is empty, the other is not")
    for row in np.flatnonzero((true < -1) | (true >= len(found.classes)))[:1].tolist():
        yield Fault(path, f"sample {found.ids[row]!r} has label_true {true[row]}, of {len(found.classes)} classes")


def _shard(found: Dataset, shard: int, path: Path, rows: NDArray[np.int64]) -> Iterator[Fault]:
    """One tar: its records are the index's, each image hashes, decodes and is labelled as the index says."""
    if not path.is_file():
        return  # `files` has said so
    buffer = tar.map_file(path)
    whole = not (found.manifest.kind == "subset" and found.manifest.config.get("ids_only"))
    records = {record.offset: record for record in tar.records(buffer, str(path))}
    if whole and len(records) != len(rows):
        yield Fault(str(path), f"holds {len(records):,} samples, the index says {len(rows):,}")
    columns = {name: found.index[name].take(pa.array(rows)).to_pylist() for name in ("id", "key", "offset", "length", "image_offset")}
    lengths = found.index["image_length"].take(pa.array(rows)).to_pylist()
    for n, row in enumerate(rows.tolist()):
        one = {name: values[n] for name, values in columns.items()}
        record = records.get(one["offset"])
        data = buffer[one["image_offset"] : one["image_offset"] + lengths[n]]
        if found.has_digests and indexing.image_digest(data) != found.sha256[row].tobytes():
            yield Fault(str(path), f"sample {one['id']!r}: its image's sha256 is not the index's")
        elif record is None or record.key != one["key"] or record.length != one["length"]:
            yield Fault(str(path), f"sample {one['id']!r}: there is no such record at byte {one['offset']:,}")
        elif not any(part.data == one["image_offset"] and part.size == lengths[n] for part in _may_be_image(found, record)):
            yield Fault(str(path), f"sample {one['id']!r}: its image is no member of its record")
        else:
            yield from _sample(found, path, row, record, buffer, data)


def _may_be_image(found: Dataset, record: tar.Record) -> list[tar.Member]:
    """The members of a record that may be its image: the one that was named, else any (one that does not decode may be called anything)."""
    named = found.members.image
    return list(record.members.values()) if named is None else [one for extension, one in record.members.items() if extension == named]


def _sample(found: Dataset, path: Path, row: int, record: tar.Record, buffer: tar.Buffer, data: bytes) -> Iterator[Fault]:
    yield from _label(found, path, row, record, buffer)
    try:
        shape: tuple[int, ...] = images.decode(data).shape[:2]
    except KdpruneError:
        shape = (0, 0)
    expected = tuple(found.sizes[row].tolist()) if found.ok[row] else shape
    if shape != expected:
        yield Fault(str(path), f"sample {found.ids[row]!r}: decodes to {shape[1]} x {shape[0]} pixels, the index says otherwise")


def _label(found: Dataset, path: Path, row: int, record: tar.Record, buffer: tar.Buffer) -> Iterator[Fault]:
    """One sample's label is the index's, as the shard's maker wrote it."""
    sample, label = f"sample {found.ids[row]!r}", int(found.labels[row])
    try:
        said = found.members.label_of(buffer, record, str(path))
        number = found.numbering.number(said)
    except SourceError as error:
        yield Fault(str(path), str(error).removeprefix(f"{path} "))
    except KeyError as word:
        yield Fault(str(path), f"{sample}: its label {word} is none of the classes")
    else:
        if (-1 if number is None else number) != label:
            what = "absent" if said is None else repr(said)
            yield Fault(str(path), f"{sample}: its label ({found.members.label}) is {what}, the index says {label}")


def _side_files(found: Dataset) -> Iterator[Fault]:
    sizes = found.folder / "sizes.json"
    per_shard = np.bincount(found.shards, minlength=len(found.shard_paths)).tolist()
    try:
        if json.loads(sizes.read_bytes()) != dict(zip(indexing.shard_names(found.shard_paths), per_shard, strict=True)):
            yield Fault(str(sizes), "its counts are not the index's")
    except ValueError:
        yield Fault(str(sizes), "is not JSON")
    sums = found.folder / "SHA256SUMS"
    listed = {f.path: f.sha256 for f in found.manifest.files}
    wanted = {name for name in listed if name.endswith((".tar", ".parquet"))}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        wanted.discard(name)
        if listed.get(name) != digest:
            yield Fault(str(sums), f"the line of {name!r} is not the manifest's digest")
    if wanted:
        yield Fault(str(sums), f"has no line of {some(sorted(wanted))}")


def _selection(found: Dataset) -> Iterator[Fault]:
    path = found.folder / indexing.SELECTION
    kept = table.read(path, subset.SCHEMA)
    for name in ("id", "uid", "sha256", "label"):
        if not kept[name].equals(found.index[name]):
            yield Fault(str(path), f"its column {name} is not the index's")
    try:
        dataset.read_weights(found.folder)
    except SourceError as error:
        yield Fault(str(path), str(error).removeprefix(f"{path}: "))
    counts = found.manifest.counts
    if counts["kept"] != len(found):
        yield Fault(str(found.folder / m.NAME), f"says kept {counts['kept']}, there are {len(found)}")
    config = found.manifest.config
    if config["method"] != "keys" and counts["kept"] != order.keep_count(order.fraction(config["frac"]), counts["candidates"]):
        yield Fault(str(path), f"{counts['kept']:,} of {counts['candidates']:,} kept is not the fraction {config['frac']}")
