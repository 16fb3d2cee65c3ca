"""`import`: any labelled images -> WebDataset shards and their index.

1. Open the source (Parquet, WebDataset shards, class folders, digits): its keys and labels are known before any image. A val or
   test split takes the class list of the train split beside it, and may lack samples of some classes; one that has others is refused.
2. Read it once, in its own order, into a shuffle; or leave the shuffle out.
3. Write the samples, image bytes untouched, into shards of `data/SPLIT`; with `--max-side N`, larger images resized and encoded anew; with
   `--holdout RATE`, those with the smallest holdout hashes into `data/val` instead; with `--label-noise RATE`, some of the others under
   another class.

`--memory` bounds what is held on the way.

Writes: `shard-*.tar index.parquet sizes.json SHA256SUMS README.md manifest.json`, for each split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from kdprune_pipelines._console import Outcome, count, megabytes, say, say_unusable, track
from kdprune_pipelines._importing import Place, Plan, Shares, Way, estimate, holdout_rate
from kdprune_pipelines._workspace import DATA, check_classes

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import SourceError, UsageError, some
from kdprune_data.formats import dataset, indexing
from kdprune_data.formats.build import SPOOL, Build
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import NAME, Manifest
from kdprune_data.formats.shard import Handling, Sample
from kdprune_data.formats.shards import Limits, ShardWriter
from kdprune_data.formats.shrink import ENCODER, MOST_SIDE, QUALITY, Shrink
from kdprune_data.images import EXTENSIONS
from kdprune_data.share.cards import Card, dataset_card
from kdprune_data.sources import Item, Source, SourceOptions, numbered, open_source
from kdprune_data.sources.noise import noise_rate
from kdprune_data.sources.shuffle import Shuffle


@dataclass(frozen=True)
class ImportConfig(Config):
    """Settings of `import`."""

    source: tuple[str, ...] = option(
        help="Parquet files or WebDataset shards (several, patterns in quotes, a folder), a folder of class folders, or the word digits.",
        argument=True,
    )
    split: str = option("train", help="Which split this is.", choices=("train", "val", "test"))
    holdout: str | None = option(None, help="Fraction of train to set apart as val, chosen by hash (0.1 = a tenth).")
    out: Path | None = option(
        None, help="Exact folder to write; default data/SPLIT. With --holdout, val is written beside it: to the folder val."
    )
    shuffle: str = option(
        "auto",
        help="Put the samples into hash order; auto: not those of WebDataset shards, which keep theirs.",
        choices=("auto", "on", "off"),
    )
    image_column: str | None = option(None, help="Parquet: the column that holds the images.")
    label_column: str | None = option(None, help="Parquet: the column that holds the labels.")
    image_member: str | None = option(None, help="WebDataset: the extension of the image, where a sample has several.")
    label_member: str | None = option(
        None, help="WebDataset: the member that holds the label: cls (where none is named), txt or json:FIELD."
    )
    classes: Path | None = option(None, help="WebDataset: text file of class names, one a line, in label order.")
    id: str = option("key", help="WebDataset: name samples by key, or by SHARD/key where shards repeat keys.", choices=("key", "shard"))
    label_noise: str | None = option(None, help="Share of train's labels to change to another class, chosen by hash: for experiments.")
    noise_seed: int = option(0, help="Seed of the label noise.", least=0, most=2**64 - 1)
    max_side: int | None = option(
        None,
        help="Resize images whose longer side is above so many pixels to it, as JPEG, once and for all: large photographs are then read as "
        "fast as small ones. All others keep their bytes.",
        least=16,
        most=MOST_SIDE,
    )
    quality: int | None = option(None, help=f"JPEG quality of resized images; default {QUALITY}.", least=1, most=100)
    on_bad: str = option("error", help="Images that do not decode: stop, or keep them in the shards, unused.", choices=("error", "keep"))
    seed: int = option(0, help="Seed of the shuffle and of the holdout.", least=0, most=2**64 - 1)
    shard_samples: int = option(dataset.SHARD_SAMPLES, help="Most samples in a shard.", least=1)
    shard_bytes: int = option(dataset.SHARD_BYTES, help="Most bytes in a shard.", least=4096)
    memory: int = option(
        2_000_000_000,
        help="Most bytes of samples held at a time: read, shuffled and checked. Beside them: the program itself, about 0.7 kB a sample "
        "for the index, and the image that each thread decodes.",
        least=1_000_000,
    )
    jobs: int = option(2, help="Threads that check images.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Say what would be made, how large and in what time; touch nothing.")

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # a single one, given to the class itself
            object.__setattr__(self, "source", (self.source,))
        super().__post_init__()


def run(config: ImportConfig) -> Outcome:
    """Import a source. Raises UsageError, SourceError and ExistsError, with nothing half-made left visible."""
    if config.quality is not None and config.max_side is None:
        raise UsageError("--quality goes with --max-side: images that are not resized keep their bytes")
    source = open_source(config.source, _options(config))
    plan = _plan(config, source)
    folders = {config.split: config.out or DATA / config.split}
    if plan.holdout:
        folders["val"] = folders["train"].parent / "val"
        if folders["val"].resolve() == folders["train"].resolve():
            raise UsageError(f"--out {config.out} is called val, where --holdout puts val: choose another name for train")
        say(f"train: {folders['train']}; val ({plan.holdout} of it): {folders['val']}")
    check_classes(config.split, folders[config.split], source.classes)
    places = {
        split: Place(folder, Identity("dataset", split, _resolved(config, split, source, plan), [])) for split, folder in folders.items()
    }
    if config.dry_run:
        way = Way(_limits(config), config.memory, config.jobs, _handling(config))
        return estimate(source, plan, places, way, overwrite=config.overwrite)
    with ExitStack() as stack:
        builds = {split: stack.enter_context(Build.begin(*place, overwrite=config.overwrite)) for split, place in places.items()}
        if any(build.done is None for build in builds.values()):
            manifests = _made(config, builds, source, plan)
        else:
            manifests = {split: build.done for split, build in builds.items() if build.done}
            say("already done")
    facts = {split: {"folder": str(folders[split]), "content": m.content, "counts": m.counts} for split, m in manifests.items()}
    return Outcome(folders[config.split], facts, "\n".join(_describe(folders[split], m) for split, m in manifests.items()))


def _limits(config: ImportConfig) -> Limits:
    return Limits(config.shard_samples, config.shard_bytes)


def _handling(config: ImportConfig) -> Handling:
    shrink = None if config.max_side is None else Shrink(config.max_side, config.quality or QUALITY)
    return Handling(config.on_bad == "keep", shrink)


def _options(config: ImportConfig) -> SourceOptions:
    return SourceOptions(
        config.split,
        image_column=config.image_column,
        label_column=config.label_column,
        image_member=config.image_member,
        label_member=config.label_member,
        classes=config.classes,
        id=config.id,
        train=_train_classes(config),
        read_bytes=Shares.of(config.memory).read,
    )


def _train_classes(config: ImportConfig) -> Sequence[str]:
    """The classes of the train split that a val or test split goes beside, if there is one."""
    train = (config.out or DATA / config.split).parent / "train"
    return () if config.split == "train" or not (train / NAME).is_file() else Manifest.load(train, kinds=("dataset",)).classes


def _plan(config: ImportConfig, source: Source) -> Plan:
    shuffled = source.shuffles if config.shuffle == "auto" else config.shuffle == "on"
    noise = None
    if config.label_noise is not None:
        if config.split != "train":
            raise UsageError(f"--label-noise goes with --split train, not {config.split}: what is measured on has its true labels")
        noise = noise_rate(config.label_noise, len(source.classes))
    return Plan(holdout_rate(config.holdout, config.split, len(source)), noise, shuffled, config.seed, config.noise_seed)


def _resolved(config: ImportConfig, split: str, source: Source, plan: Plan) -> dict[str, Any]:
    """The settings that decide what one split becomes."""
    shrink = _handling(config).shrink
    resized = {} if shrink is None else {"max_side": shrink.side, "quality": shrink.quality, "encoder": ENCODER}
    noise = {} if plan.noise is None or split != "train" else {"label_noise": order.shortest(plan.noise), "noise_seed": config.noise_seed}
    return (
        source.describe()
        | noise
        | resized
        | {
            "split": split,
            "of": config.split,
            "holdout": order.shortest(plan.holdout) if plan.holdout else None,
            "shuffle": plan.shuffled,
            "on_bad": config.on_bad,
            "seed": config.seed,
            "shard_samples": config.shard_samples,
            "shard_bytes": config.shard_bytes,
        }
    )


def _made(config: ImportConfig, builds: dict[str, Build], source: Source, plan: Plan) -> dict[str, Manifest]:
    """Write the splits that are not done. A source that is refused leaves nothing: it will be another one, or other settings, next time."""
    try:
        read = f"{count(len(source), 'sample')}, {count(len(source.classes), 'class')}, {megabytes(source.bytes)}"
        say(f"reading {config.source[0] if len(config.source) == 1 else some(config.source)}: {read}")
        if source.left_out:
            say(f"left out: {count(len(source.left_out), 'file')} not named like an image ({some(source.left_out)})")
        for note in source.notes:
            say(note)
        return _write(config, builds, source, plan)
    except SourceError:
        for build in builds.values():
            build.discard()
        raise


def _write(config: ImportConfig, builds: dict[str, Build], source: Source, plan: Plan) -> dict[str, Manifest]:
    aside = plan.aside(source.outline)
    labels = plan.labels(source.outline, aside, len(source.classes))
    missing = {split: build for split, build in builds.items() if build.done is None}
    shuffle = plan.order(source, next(iter(missing.values())).scratch(SPOOL), Shares.of(config.memory))
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_writer(config, split, missing, plan)) for split in missing}
        for row, item in _in_order(source, shuffle):
            split = "val" if aside[row] else config.split
            if split in writers:
                label = None if item.label is None else int(labels[row])
                sample = Sample(item.key, item.data, label, item.origin, item.others, item.label)
                writers[split].add(sample)
        indices = {split: writer.finish() for split, writer in writers.items()}
    made = {split: _seal(config, builds[split], split, indices[split], writers[split], source.classes) for split in missing}
    return {split: build.done or made[split] for split, build in builds.items()}


def _writer(config: ImportConfig, split: str, missing: Mapping[str, Build], plan: Plan) -> ShardWriter:
    """The writer of a split, which shares the window with the others."""
    handling = _handling(config)
    shares = len(missing) * (1 if handling.shrink is None else 4)  # what is resized stays in memory beside what it was
    return ShardWriter(
        missing[split],
        limits=_limits(config),
        jobs=config.jobs,
        handling=handling,
        window=Shares.of(config.memory).window // shares,
        noisy=plan.noise is not None and split == "train",
    )


def _in_order(source: Source, shuffle: Shuffle | None) -> Iterator[tuple[int, Item]]:
    """The samples in the order in which they are written, each with its row in the source."""
    rows: Iterable[tuple[int, Item]] = numbered(source)
    if shuffle is not None:
        shuffle.collect(track(rows, "read", total=len(source)))
        rows = shuffle
    yield from track(rows, "write", total=len(source))


def _seal(config: ImportConfig, build: Build, split: str, index: pa.Table, writer: ShardWriter, classes: Sequence[str]) -> Manifest:
    say_unusable(indexing.unusable(index))
    facts = indexing.write_index(build, index, classes, writer.names)
    counts, shrink = facts.counts, _handling(config).shrink
    note = ""
    if shrink is not None:
        counts |= {"resized": writer.resized}
        note = (
            f"{writer.resized:,} of the images were resized on import, to {shrink.side:,} pixels on their longer side, and encoded as JPEG "
            f"of quality {shrink.quality}; the others have the bytes that they came with."
        )
    card = Card(split, split, sorted(writer.kinds & set(EXTENSIONS)), counts["labelled"] > 0, note)
    build.write("README.md", dataset_card(card, counts, classes).encode())
    return build.seal(counts=counts, classes=list(classes), content=facts.content, side=["README.md"])


def _describe(folder: Path, manifest: Manifest) -> str:
    counts = manifest.counts
    bad = counts["samples"] - counts["ok"]
    size = megabytes(sum(f.bytes for f in manifest.files))
    left = f", {count(bad, 'sample')} that do not decode" if bad else ""
    noisy = f", {count(counts['noisy'], 'label')} changed" if "noisy" in counts else ""
    resized = f", {count(counts['resized'], 'image')} resized" if "resized" in counts else ""
    empty = [name for name, n in zip(manifest.classes, counts["per_class"], strict=True) if not n]
    without = f" ({len(empty):,} without a sample: {some(empty)})" if empty else ""
    return (
        f"{folder}: {count(counts['samples'], 'sample')} of {count(len(manifest.classes), 'class')}{without} "
        f"in {count(counts['shards'], 'shard')}, {size}{left}{noisy}{resized}; content {manifest.content[:12]}"
    )
