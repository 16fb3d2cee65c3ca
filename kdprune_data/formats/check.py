"""Re-reading artefacts: every promise of `docs/formats.md` that can be checked from the folder alone.

Each check yields `Fault`s, naming the file and, where one can be told, the sample. `files` compares digests; the others look inside. Data
sets and subsets have a file of their own, `check_data.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdprune_data import order
from kdprune_data.errors import some
from kdprune_data.formats import dynamics, indexing, journal, logit_files, subset, table
from kdprune_data.formats import manifest as m
from kdprune_data.formats.logits import LogitCache, read_view
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import SCORES, read_vectors

Tick = Callable[[int], None]
RANGES = {
    "el2n": (0, 2**0.5),
    "margin": (0, 1),
    "confidence": (0, 1),
    "correct": (0, 1),
    "p_true": (0, 1),
    "density": (-1, 1),
    "aum": (-inf, inf),
}
"""Between what the values of a score lie; of those not listed, at least 0."""
SLACK = 1e-5
"""By how much a rounded value may lie outside."""


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


def scores(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A scores artefact: every part has the columns, all finite; ids are unique and as many as the manifest says."""
    yield from _probe(folder, manifest)
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
            least, most = RANGES.get(name, (0, inf))
            for n in np.flatnonzero((values < least - SLACK) | (values > most + SLACK))[:1].tolist():
                one = part["id"][n].as_py()
                yield Fault(str(folder / file.path), f"{name} of {one!r} is {values[n]:.4g}: it is from {least:.4g} to {most:.4g}")
            hard = (part.schema.field(name).metadata or {}).get(b"hard", b"").decode()
            if hard != SCORES[name].hard:
                yield Fault(str(folder / file.path), f"says that the hard end of {name} is {hard!r}, it is {SCORES[name].hard!r}")
        yield from _vectors(folder, file.path, len(part), manifest)
        tick(len(part))
    if len(ids) != manifest.counts["samples"] or len(set(ids)) != len(ids):
        yield Fault(
            str(folder), f"has {len(ids):,} rows of {len(set(ids)):,} ids, the manifest says {manifest.counts['samples']:,} samples"
        )


def _vectors(folder: Path, part: str, samples: int, manifest: Manifest) -> Iterator[Fault]:
    """The embeddings and logits beside a part, where the manifest says that there are: a row for each of its samples."""
    listed = {file.path for file in manifest.files}
    for what in ("embedding", "logits"):
        path = folder / f"{what}-{part[5:11]}.arrow"
        if (path.name in listed) != bool(manifest.config[what]):
            yield Fault(str(path), "is not listed" if manifest.config[what] else f"is listed, and the config says that there is no {what}")
        elif path.is_file():
            reader = table.ipc_open(path)
            rows = sum(len(reader.get_batch(n)) for n in range(reader.num_record_batches))
            if rows != samples:
                yield Fault(str(path), f"has {rows:,} rows, {part} has {samples:,}")
            elif not np.isfinite(read_vectors(path, what)).all():
                yield Fault(str(path), "holds a number that is not finite")


def logit_cache(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """A logit cache: every view of every shard belongs to its rows, its teacher and its policy, and its labels are where they were."""
    cache = LogitCache.open(folder)
    yield from _probe(folder, manifest)
    yield from _losses(cache)
    total, first, uids = 0, min(p[1] for p in cache.parts if p[0] == 0), []
    checked: set[object] = set()  # each file's digest once, not for every view
    for shard in cache.shards:
        rows, where = cache.rows(shard), str(folder / logit_files.rows_path(shard))
        total += len(rows)
        ids, labels = rows["id"].to_pylist(), indexing.labels_of(rows["label"])
        uids.append(order.uids_of(ids))
        if labels.max(initial=-1) >= len(manifest.classes):
            yield Fault(where, f"has label {labels.max()}, of {len(manifest.classes)} classes")
        if rows["height"].null_count or rows["width"].null_count:
            yield Fault(where, "has images without a height or width")
        correct = np.zeros(len(rows), np.int32)
        for view in range(cache.views):
            found = read_view(cache, shard, view, checked)
            correct += logit_files.top1(found.logits, labels) & (view <= first)
            values = found.logits.astype(np.float32)
            off = np.flatnonzero(~np.isfinite(values).all(1) | (values.max(1) != 0))
            if len(off):
                what = f"the logits of {some(ids[n] for n in off[:3])} are not finite with largest value 0"
                yield Fault(f"{folder} view {view} of shard {shard}", what)
            tick(len(rows))
        wrong = np.flatnonzero(correct != rows["top1_correct"].to_numpy())
        if len(wrong):
            yield Fault(where, f"the top1_correct of {some(ids[n] for n in wrong[:4])} is not what its first {first + 1} views give")
    if order.first_repeat(np.concatenate(uids)) is not None:
        yield Fault(str(folder), "has two rows of one id")
    counts = {"samples": total, "views": cache.views, "classes": len(manifest.classes)}
    for name, counted in counts.items():
        if manifest.counts.get(name) != counted:
            yield Fault(str(folder), f"has {counted:,} {name}, the manifest says {manifest.counts.get(name)}")


def _probe(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """What bf16 cost is stated where a network was asked in it, and only there."""
    asked, stated = manifest.config.get("precision") == "bf16", manifest.counts.get("bf16")
    if asked == (stated is None):
        what = "does not count what that cost" if asked else "counts what bf16 cost"
        yield Fault(str(folder / m.NAME), f"says precision {manifest.config.get('precision')} and {what}")
    elif stated is not None and not all(0 <= kl < inf for kl in stated["kl"].values()):
        yield Fault(str(folder / m.NAME), f"says that bf16 cost a KL of {stated['kl']}")


def _losses(cache: LogitCache) -> Iterator[Fault]:
    """What is stated of KL: by every file (FormatError where one does not), for the temperatures and the fidelity that were asked for."""
    config = cache.manifest.config
    stated = {"the views": sorted(map(float, cache.kl))}
    if cache.coded:
        facts = logit_files.read_codebook(cache.folder / logit_files.CODEBOOK)[1]
        stated["the codebook"] = facts["temperatures"]
        if facts["fidelity"] != config["fidelity"]:
            yield Fault(
                str(cache.folder / logit_files.CODEBOOK), f"is for fidelity {facts['fidelity']}, the manifest says {config['fidelity']}"
            )
    for what, found in stated.items():
        if cache.coded and found != sorted(config["temperatures"]):
            yield Fault(str(cache.folder), f"{what} state KL at temperatures {found}, the manifest says {config['temperatures']}")


def training_dynamics(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """A teacher's dynamics: in every epoch each sample exactly once, with numbers that agree with one another."""
    first: Any = None
    logits_of = {f.path for f in manifest.files if f.path.endswith(".arrow")}
    for file in (f for f in manifest.files if f.path.startswith(f"{dynamics.FOLDER}/epoch-")):
        path = folder / file.path
        number = int(file.path[15:].split(".")[0])
        epoch = dynamics.read(folder, number, dynamics.SCHEMA.names)
        first = epoch["uid"] if first is None else first
        if not np.array_equal(epoch["uid"], first) or len(np.unique(first)) != manifest.counts["samples"]:
            yield Fault(str(path), "does not hold each sample exactly once")
        if not all(np.isfinite(epoch[name]).all() for name in ("p_true", "logit_margin", "loss")):
            yield Fault(str(path), "holds a number that is not finite")
        elif not np.allclose(np.exp(-epoch["loss"]), epoch["p_true"], atol=1e-5):
            yield Fault(str(path), "p_true and loss do not agree")
        if manifest.config.get("record") == "logits":
            if dynamics.logits_path(number) not in logits_of:
                yield Fault(str(path), "has no file of logits beside it")
            else:
                yield from _recorded_logits(folder, number, len(epoch["uid"]), len(manifest.classes))


def _recorded_logits(folder: Path, epoch: int, rows: int, classes: int) -> Iterator[Fault]:
    """One epoch's logits: a row for each sample, the largest number of each being 0."""
    path = str(folder / dynamics.logits_path(epoch))
    found = dynamics.read_logits(folder, epoch)
    if found.shape != (rows, classes):
        yield Fault(path, f"holds logits of shape {found.shape}: expected {(rows, classes)}")
    elif not np.isfinite(found).all() or found.max(1).any():
        yield Fault(path, "holds a row whose largest logit is not 0, or a number that is not finite")
