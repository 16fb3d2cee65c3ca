"""`import`: any labelled images -> WebDataset shards and their index.

1. Open the source (Parquet, class folders, digits). A val or test split takes the class list of the train split beside it, and may lack
   samples of some classes; one that has others is refused.
2. Read it once, in its own order, into a shuffle that holds at most `--memory`.
3. Write the samples in hash order, image bytes untouched, into shards of `data/SPLIT`; with `--holdout RATE`, the samples with the smallest
   holdout hashes into `data/val` instead.

Writes: `shard-*.tar index.parquet sizes.json SHA256SUMS README.md manifest.json`, for each split.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from kdprune_pipelines._console import Outcome, count, megabytes, say, track
from kdprune_pipelines._workspace import DATA, check_classes
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import SourceError, UsageError, some
from kdprune_data.formats import dataset
from kdprune_data.formats.build import SPOOL, Build
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import NAME, Manifest
from kdprune_data.formats.shards import Limits, Sample, ShardWriter
from kdprune_data.images import EXTENSIONS
from kdprune_data.share.cards import Card, dataset_card
from kdprune_data.sources import Item, Source, SourceOptions, open_source
from kdprune_data.sources.shuffle import Shuffle, chunks


@dataclass(frozen=True)
class ImportConfig(Config):
    """Settings of `import`."""

    source: str = option(help="A Parquet file (or a folder of them), a folder of class folders, or the word digits.", argument=True)
    split: str = option("train", help="Which split this is.", choices=("train", "val", "test"))
    holdout: str | None = option(None, help="Fraction of train to set apart as val, chosen by hash (0.1 = a tenth).")
    out: Path | None = option(
        None, help="Exact folder to write; default data/SPLIT. With --holdout, val is written beside it: to the folder val."
    )
    image_column: str | None = option(None, help="Parquet: the column that holds the images.")
    label_column: str | None = option(None, help="Parquet: the column that holds the labels.")
    on_bad: str = option("error", help="Images that do not decode: stop, or keep them in the shards, unused.", choices=("error", "keep"))
    seed: int = option(0, help="Seed of the shuffle and of the holdout.", least=0)
    shard_samples: int = option(dataset.SHARD_SAMPLES, help="Most samples in a shard.", least=1)
    shard_bytes: int = option(dataset.SHARD_BYTES, help="Most bytes in a shard.", least=4096)
    memory: int = option(2_000_000_000, help="Bytes of images the shuffle may hold in memory.", least=1_000_000)
    jobs: int = option(2, help="Threads that check and write shards.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")


def run(config: ImportConfig) -> Outcome:
    """Import a source. Raises UsageError, SourceError and ExistsError, with nothing half-made left visible."""
    source = open_source(config.source, SourceOptions(config.split, config.image_column, config.label_column, _train_classes(config)))
    rate = _rate(config, len(source))
    folders = {config.split: config.out or DATA / config.split}
    if rate:
        folders["val"] = folders["train"].parent / "val"
        say(f"train: {folders['train']}; val ({rate} of it): {folders['val']}")
    check_classes(config.split, folders[config.split], source.classes)
    with ExitStack() as stack:
        builds = {split: stack.enter_context(_begin(config, split, folder, source, rate)) for split, folder in folders.items()}
        if any(build.done is None for build in builds.values()):
            manifests = _made(config, builds, source, rate)
        else:
            manifests = {split: build.done for split, build in builds.items() if build.done}
            say("already done")
    facts = {split: {"folder": str(folders[split]), "content": m.content, "counts": m.counts} for split, m in manifests.items()}
    return Outcome(folders[config.split], facts, "\n".join(_describe(folders[split], m) for split, m in manifests.items()))


def _train_classes(config: ImportConfig) -> Sequence[str]:
    """The classes of the train split that a val or test split goes beside, if there is one."""
    train = (config.out or DATA / config.split).parent / "train"
    return () if config.split == "train" or not (train / NAME).is_file() else Manifest.load(train, kinds=("dataset",)).classes


def _made(config: ImportConfig, builds: dict[str, Build], source: Source, rate: Decimal | None) -> dict[str, Manifest]:
    """Write the splits. A source that is refused leaves nothing: it will be another one, or other settings, next time."""
    try:
        return _write(config, builds, source, rate)
    except SourceError:
        for build in builds.values():
            build.discard()
        raise


def _rate(config: ImportConfig, samples: int) -> Decimal | None:
    if config.holdout is None:
        return None
    if config.split != "train":
        raise UsageError(f"--holdout goes with --split train, not {config.split}: it sets part of train apart as val")
    rate = order.fraction(config.holdout)
    aside = order.keep_count(rate, samples)
    if not 0 < aside < samples:
        raise UsageError(f"--holdout {rate} sets {aside:,} of {count(samples, 'sample')} apart: train and val need at least one each")
    return rate


def _begin(config: ImportConfig, split: str, folder: Path, source: Source, rate: Decimal | None) -> Build:
    resolved: dict[str, Any] = source.describe() | {
        "split": split,
        "of": config.split,
        "holdout": order.shortest(rate) if rate else None,
        "on_bad": config.on_bad,
        "seed": config.seed,
        "shard_samples": config.shard_samples,
        "shard_bytes": config.shard_bytes,
    }
    return Build.begin(folder, Identity("dataset", split, resolved, []), overwrite=config.overwrite)


def _write(config: ImportConfig, builds: dict[str, Build], source: Source, rate: Decimal | None) -> dict[str, Manifest]:
    """Shuffle the source and write every split that is not done."""
    scratch = next(b for b in builds.values() if b.done is None).scratch(SPOOL)
    shuffle = Shuffle(scratch, seed=config.seed, memory=config.memory, expected_bytes=source.bytes)
    say(f"reading {config.source}: {count(len(source), 'sample')}, {count(len(source.classes), 'class')}, {megabytes(source.bytes)}")
    if source.left_out:
        say(f"left out: {count(len(source.left_out), 'file')} not named like an image ({some(source.left_out)})")
    shuffle.collect(track(source, "read", total=len(source)))
    threshold = _threshold(shuffle.uids, config.seed, rate)
    limits = Limits(config.shard_samples, config.shard_bytes)
    kinds: dict[str, set[str]] = {split: set() for split in builds}
    manifests = {split: build.done for split, build in builds.items() if build.done is not None}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(build, limits=limits, jobs=config.jobs, keep_bad=config.on_bad == "keep"))
            for split, build in builds.items()
            if build.done is None
        }
        for chunk in chunks(track(shuffle, "write", total=len(shuffle.uids))):
            for item, aside in zip(chunk, _set_aside(chunk, config.seed, threshold), strict=True):
                split = "val" if aside else config.split
                if split in writers:
                    sample = Sample(item.key, item.data, item.label, item.origin)
                    kinds[split].add(sample.extension)
                    writers[split].add(sample)
        indices = {split: (writer.finish(), writer.names) for split, writer in writers.items()}
    for split, (index, names) in indices.items():
        manifests[split] = _seal(builds[split], split, index, names, source.classes, kinds[split])
    return {split: manifests[split] for split in builds}


def _threshold(uids: NDArray[np.uint64], seed: int, rate: Decimal | None) -> int | None:
    """The largest holdout hash that still goes to val, or None."""
    keep = order.keep_count(rate, len(uids)) if rate else 0
    if not keep:
        return None
    return int(np.partition(order.order_hash(uids, seed, "holdout"), keep - 1)[keep - 1])


def _set_aside(chunk: Sequence[Item], seed: int, threshold: int | None) -> list[bool]:
    """Which of the items go to val."""
    if threshold is None:
        return [False] * len(chunk)
    hashes = order.order_hash(order.uids_of(item.key for item in chunk), seed, "holdout")
    return [bool(aside) for aside in hashes <= np.uint64(threshold)]


def _seal(build: Build, split: str, index: pa.Table, names: list[str], classes: Sequence[str], kinds: set[str]) -> Manifest:
    facts = dataset.write_index(build, index, classes, names)
    card = Card(split, split, sorted(kinds & set(EXTENSIONS)), facts.counts["labelled"] > 0)
    build.write("README.md", dataset_card(card, facts.counts, classes).encode())
    return build.seal(counts=facts.counts, classes=list(classes), content=facts.content, side=["README.md"])


def _describe(folder: Path, manifest: Manifest) -> str:
    counts = manifest.counts
    bad = counts["samples"] - counts["ok"]
    size = megabytes(sum(f.bytes for f in manifest.files))
    left = f", {count(bad, 'sample')} that do not decode" if bad else ""
    return (
        f"{folder}: {count(counts['samples'], 'sample')} of {count(len(manifest.classes), 'class')} "
        f"in {count(counts['shards'], 'shard')}, {size}{left}; content {manifest.content[:12]}"
    )
