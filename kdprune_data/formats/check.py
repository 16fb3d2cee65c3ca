"""Re-reading artefacts: every promise of `docs/formats.md` that can be checked from the folder alone.

Each check yields `Fault`s, naming the file and, where one can be told, the sample. `files` compares digests; the others look inside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdprune_data import images, order
from kdprune_data.errors import KdpruneError, some
from kdprune_data.formats import dataset, dynamics, journal, logits, subset, table, tar
from kdprune_data.formats import manifest as m
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import SCORES

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Fault:
    """Something that is not as promised: the file, and what about it."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def files(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """Every file is there, with its bytes and its sha256; those outside too, where a digest was recorded. `tick` gets bytes read."""
    for file in (*manifest.files, *manifest.side, *manifest.outside):
        path = m.place(folder, file.path)
        if file.path == journal.NAME and (folder / m.PARTIAL).is_dir():
            continue  # a finished cache to which views are being added: it is written before the manifest is
        if not path.is_file():
            if file not in manifest.side or file.path not in (subset.RANKING, journal.NAME):  # which stay behind when a subset travels
                yield Fault(str(path), "is missing")
            continue
        size = path.stat().st_size
        if size != file.bytes:
            yield Fault(str(path), f"has {size:,} bytes, the manifest says {file.bytes:,}")
        elif file.sha256 is not None and m.sha256_file(path) != file.sha256:
            yield Fault(str(path), "was changed: its sha256 is not the manifest's")
        tick(size)


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
    path, manifest = str(found.folder / dataset.INDEX), found.manifest
    wrong = found.ids[order.uids_of(found.ids) != found.uids]
    if len(wrong):
        yield Fault(path, f"the uid of {some(wrong)} is not its id's")
    if order.first_repeat(found.uids):
        yield Fault(path, "two samples share an id")
    if (np.diff(found.shards) < 0).any() or found.shards.max(initial=0) >= len(found.shard_paths):
        yield Fault(path, "the rows are not in the order of the shards")
    if found.labels.max(initial=-1) >= len(found.classes):
        yield Fault(path, f"sample {found.ids[found.labels.argmax()]!r} has label {found.labels.max()}, of {len(found.classes)} classes")
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
    for key, value in counts.items():
        if manifest.counts.get(key) != value:
            yield Fault(str(found.folder / m.NAME), f"says {key} {manifest.counts.get(key)}, the index gives {value}")


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
        if dataset.image_digest(data) != found.sha256[row].tobytes():
            yield Fault(str(path), f"sample {one['id']!r}: its image's sha256 is not the index's")
        elif record is None or record.key != one["key"] or record.length != one["length"]:
            yield Fault(str(path), f"sample {one['id']!r}: there is no such record at byte {one['offset']:,}")
        elif not any(part.data == one["image_offset"] and part.size == lengths[n] for part in record.members.values()):
            yield Fault(str(path), f"sample {one['id']!r}: its image is no member of its record")
        else:
            yield from _sample(found, path, row, record, buffer, data)


def _sample(found: Dataset, path: Path, row: int, record: tar.Record, buffer: tar.Buffer, data: bytes) -> Iterator[Fault]:
    member = record.members.get("cls")
    text = "" if member is None else bytes(buffer[member.data : member.data + member.size]).decode("ascii", "replace").strip()
    label = int(found.labels[row])
    if (int(text) if text.isdigit() else -1 if not text else None) != label:
        yield Fault(str(path), f"sample {found.ids[row]!r}: its .cls member is {text!r}, the index says {label}")
    try:
        shape: tuple[int, ...] = images.decode(data).shape[:2]
    except KdpruneError:
        shape = (0, 0)
    expected = tuple(found.sizes[row].tolist()) if found.ok[row] else shape
    if shape != expected:
        yield Fault(str(path), f"sample {found.ids[row]!r}: decodes to {shape[1]} x {shape[0]} pixels, the index says otherwise")


def _side_files(found: Dataset) -> Iterator[Fault]:
    sizes = found.folder / "sizes.json"
    per_shard = np.bincount(found.shards, minlength=len(found.shard_paths)).tolist()
    try:
        if json.loads(sizes.read_bytes()) != dict(zip(dataset.shard_names(found.shard_paths), per_shard, strict=True)):
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
    path = found.folder / dataset.SELECTION
    kept = table.read(path, subset.SCHEMA)
    for name in ("id", "uid", "sha256", "label"):
        if not kept[name].equals(found.index[name]):
            yield Fault(str(path), f"its column {name} is not the index's")
    counts = found.manifest.counts
    if counts["kept"] != len(found):
        yield Fault(str(found.folder / m.NAME), f"says kept {counts['kept']}, there are {len(found)}")
    config = found.manifest.config
    if config["method"] != "keys" and counts["kept"] != order.keep_count(order.fraction(config["frac"]), counts["candidates"]):
        yield Fault(str(path), f"{counts['kept']:,} of {counts['candidates']:,} kept is not the fraction {config['frac']}")


def scores(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A scores artefact: every part has the columns, all finite; ids are unique and as many as the manifest says."""
    ids: list[str] = []
    for file in (f for f in manifest.files if f.path.startswith("part-")):
        part = table.read(folder / file.path)
        if part.schema.names != ["id", "label", *manifest.config["columns"]]:
            yield Fault(str(folder / file.path), f"has columns {', '.join(part.schema.names)}")
            continue
        ids += part["id"].to_pylist()
        for name in manifest.config["columns"]:
            values = part[name].to_numpy()
            if part.schema.field(name).type != pa.float32() or not np.isfinite(values).all():
                at = np.flatnonzero(~np.isfinite(values))[:1]
                yield Fault(str(folder / file.path), f"{name} is not finite for {[part['id'][int(n)].as_py() for n in at]}")
            hard = (part.schema.field(name).metadata or {}).get(b"hard", b"").decode()
            if hard != SCORES[name].hard:
                yield Fault(str(folder / file.path), f"says that the hard end of {name} is {hard!r}, it is {SCORES[name].hard!r}")
        yield from _vectors(folder, file.path, len(part))
        tick(len(part))
    if len(ids) != manifest.counts["samples"] or len(set(ids)) != len(ids):
        yield Fault(
            str(folder), f"has {len(ids):,} rows of {len(set(ids)):,} ids, the manifest says {manifest.counts['samples']:,} samples"
        )


def _vectors(folder: Path, part: str, samples: int) -> Iterator[Fault]:
    """The embeddings and logits beside a part: a row for each of its samples."""
    for what in ("embedding", "logits"):
        path = folder / f"{what}-{part[5:11]}.arrow"
        if path.is_file():
            reader = table.ipc_open(path)
            rows = sum(len(reader.get_batch(n)) for n in range(reader.num_record_batches))
            if rows != samples:
                yield Fault(str(path), f"has {rows:,} rows, {part} has {samples:,}")


def logit_cache(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A logit cache: every view of every shard belongs to its rows, its teacher and its policy, and its labels are where they were."""
    cache = LogitCache.open(folder)
    total = 0
    for shard in cache.shards:
        rows = cache.rows(shard)
        total += len(rows)
        labels, first = dataset.labels_of(rows["label"]), min(p[1] for p in cache.parts if p[0] == 0)
        correct = np.zeros(len(rows), np.int32)
        if labels.max(initial=-1) >= len(manifest.classes):
            yield Fault(str(folder / logits.rows_path(shard)), f"has label {labels.max()}, of {len(manifest.classes)} classes")
        for view in range(cache.views):
            found = logits.read_view(cache, shard, view)
            correct += logits.top1(found.logits, labels) & (view <= first)
            ids = rows["id"].to_pylist()
            where = f"{folder} view {view} of shard {shard}"
            values = found.logits.astype(np.float32)
            off = np.flatnonzero(~np.isfinite(values).all(1) | (values.max(1) != 0))
            if len(off):
                yield Fault(where, f"the logits of {some(ids[n] for n in off[:3])} are not finite with largest value 0")
            tick(len(rows))
        wrong = np.flatnonzero(correct != rows["top1_correct"].to_numpy())
        if len(wrong):
            where = str(folder / logits.rows_path(shard))
            yield Fault(where, f"the top1_correct of {some(ids[n] for n in wrong[:4])} is not what its first {first + 1} views give")
    if total != manifest.counts["samples"]:
        yield Fault(str(folder), f"has {total:,} rows, the manifest says {manifest.counts['samples']:,} samples")


def training_dynamics(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """A teacher's dynamics: in every epoch each sample exactly once, with numbers that agree with one another."""
    first: Any = None
    for file in (f for f in manifest.files if f.path.startswith(dynamics.FOLDER)):
        path = folder / file.path
        epoch = dynamics.read(folder, int(file.path[15:].split(".")[0]), dynamics.SCHEMA.names)
        first = epoch["uid"] if first is None else first
        if not np.array_equal(epoch["uid"], first) or len(np.unique(first)) != manifest.counts["samples"]:
            yield Fault(str(path), "does not hold each sample exactly once")
        if not all(np.isfinite(epoch[name]).all() for name in ("p_true", "logit_margin", "loss")):
            yield Fault(str(path), "holds a number that is not finite")
        elif not np.allclose(np.exp(-epoch["loss"]), epoch["p_true"], atol=1e-5):
            yield Fault(str(path), "p_true and loss do not agree")
