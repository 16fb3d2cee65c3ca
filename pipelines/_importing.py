"""What `import` decides before it reads an image, how it shares out the memory, and its dry run."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
from kdprune_pipelines._console import Outcome, count
from kdprune_pipelines._estimate import Estimate, look, measure
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.shard import Handling, Sample, check
from kdprune_data.formats.shards import BATCH_SAMPLES, Limits
from kdprune_data.formats.tar import BLOCK
from kdprune_data.sources import Outline, Source, numbered
from kdprune_data.sources.base import READ_BYTES
from kdprune_data.sources.noise import with_noise
from kdprune_data.sources.shuffle import Shuffle, spool, unspool

INDEX_BYTES = 150
"""About what a sample's rows in `index.parquet` and the side files take."""
MOST_WINDOW = 256_000_000


class Shares(NamedTuple):
    """What parts of an import may hold, in bytes, so that all together stay within `--memory`: a batch that was read, the shuffle's
    bucket, the window of samples on their way into shards. The rest is what Python and its libraries lose between them."""

    read: int
    shuffle: int
    window: int

    @classmethod
    def of(cls, memory: int) -> Shares:
        """The shares of so many bytes."""
        return cls(min(memory // 16, READ_BYTES), memory // 2, min(memory // 8, MOST_WINDOW))


@dataclass(frozen=True)
class Plan:
    """What becomes of the samples. `holdout`, `noise`: rates, None for none; `shuffled`: in hash order, else in the source's."""

    holdout: Decimal | None
    noise: Decimal | None
    shuffled: bool
    seed: int
    noise_seed: int

    def aside(self, outline: Outline) -> NDArray[np.bool_]:
        """Which samples go to val: bool of shape (n,)."""
        apart = np.zeros(len(outline.uids), np.bool_)
        if self.holdout is not None:
            hashes = order.order_hash(outline.uids, self.seed, "holdout")
            apart[np.argsort(hashes, kind="stable")[: order.keep_count(self.holdout, len(apart))]] = True
        return apart

    def labels(self, outline: Outline, aside: NDArray[np.bool_], classes: int) -> NDArray[np.int32]:
        """The labels that are written: int32 of shape (n,), -1 for none."""
        if self.noise is None:
            return outline.labels
        stay = np.where(aside, np.int32(-1), outline.labels)
        changed = with_noise(outline.uids, stay, classes=classes, rate=self.noise, seed=self.noise_seed)
        return np.where(aside, outline.labels, changed).astype(np.int32)

    def order(self, source: Source, scratch: Path, shares: Shares) -> Shuffle | None:
        """The shuffle, if there is to be one."""
        if not self.shuffled:
            return None
        hashes = order.order_hash(source.outline.uids, self.seed, "import")
        return Shuffle(scratch, hashes=hashes, memory=shares.shuffle, expected_bytes=source.bytes)


def holdout_rate(text: str | None, split: str, samples: int) -> Decimal | None:
    """The fraction to set apart. Raises UsageError for another split than train, and where one of the two parts would be empty."""
    if text is None:
        return None
    if split != "train":
        raise UsageError(f"--holdout goes with --split train, not {split}: it sets part of train apart as val")
    try:
        rate = order.fraction(text)
    except UsageError:
        raise UsageError(f"--holdout {text} is no fraction to set apart as val: give a number above 0 and below 1, such as 0.1") from None
    aside = order.keep_count(rate, samples)
    if not 0 < aside < samples:
        raise UsageError(f"--holdout {rate} sets {aside:,} of {count(samples, 'sample')} apart: train and val need at least one each")
    return rate


class Place(NamedTuple):
    """Where a split goes, and what it is."""

    folder: Path
    identity: Identity


class Way(NamedTuple):
    """How an import goes about it: the limits of shards, `--memory` in bytes, threads, and what becomes of images."""

    limits: Limits
    memory: int
    jobs: int
    handling: Handling


@dataclass
class Weighed:
    """Bytes of the images that a dry run has tried: as they came, and as they would be stored."""

    came: int = 0
    stored: int = 0

    def of(self, size: int) -> int:
        """What so many bytes of images would be when stored."""
        return size * self.stored // self.came if self.came else size


def estimate(source: Source, plan: Plan, places: Mapping[str, Place], way: Way, *, overwrite: bool = False) -> Outcome:
    """What the import would make, and in what time: of at most 3 seconds of reading, spooling (in memory), checking and packing.

    Where images are resized, what they take is scaled from those that were tried.
    """
    states = {split: look(place.folder, place.identity, overwrite=overwrite) for split, place in places.items()}
    shuffle = plan.order(source, Path(), Shares.of(way.memory))
    spools = shuffle is not None and shuffle.spools
    seconds, weighed = 0.0, Weighed()
    if any(state != "finished" for state in states.values()):
        seconds = measure(_work(source, way, weighed, spools=spools), len(source))
    aside = int(plan.aside(source.outline).sum())
    outcomes = {}
    for split, place in places.items():
        samples = aside if len(places) > 1 and split == "val" else len(source) - aside
        size = weighed.of(source.bytes) * samples // len(source) + samples * (BLOCK * 5 // 2 + INDEX_BYTES)
        shards = max(-(-samples // way.limits.samples), -(-size // way.limits.bytes))
        counts = {"sample": samples, "class": len(source.classes), "shard": shards}
        outcomes[split] = Estimate(place.folder, states[split], counts, size, seconds * samples / len(source)).outcome()
    first, *rest = outcomes
    facts = {**outcomes[first].facts, "spools": spools} | {split: outcomes[split].facts for split in rest}
    return Outcome(None, facts, "\n".join(one.text for one in outcomes.values()))


def _work(source: Source, way: Way, weighed: Weighed, *, spools: bool) -> Iterator[int]:
    """Import samples into nothing, a batch for each thread at a time; yields how many."""
    batch: list[Sample] = []
    jobs, handling = way.jobs, replace(way.handling, keep_bad=True)
    with ThreadPoolExecutor(jobs) as pool:
        for row, item in numbered(source):
            if spools:
                file = io.BytesIO()
                spool(file, row, item)
                file.seek(0)
                _, item = next(unspool(file))
            batch.append(Sample(item.key, item.data, item.label, item.origin, item.others))
            if len(batch) >= jobs * BATCH_SAMPLES or row + 1 == len(source):
                parts = [batch[n::jobs] for n in range(jobs)]
                for part, checked in zip(parts, pool.map(lambda part: check(part, handling, decode=True), parts), strict=True):
                    for sample, found in zip(part, checked, strict=True):
                        hashlib.sha256(sample.record()).digest()
                        weighed.came += len(sample.data)
                        weighed.stored += len(sample.data if found.data is None else found.data)
                yield len(batch)
                batch = []
