"""`index`: adopt WebDataset shards where they lie, untouched.

1. Walk the headers of every tar; group members into samples; take each sample's image and label.
2. Decode every image once, hash it, hash the tar. With `--no-digests`, read headers and labels alone.
3. When all shards are read, number the classes and write `index.parquet sizes.json manifest.json` to `data/SPLIT`; the manifest lists the
   tars in `outside`.

Every command then reads the set as if it had been imported. Shards that an interrupted run has read are not read again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from kdprune_pipelines._console import Outcome, bar, count, say, say_unusable, track
from kdprune_pipelines._estimate import Estimate, look, measure
from kdprune_pipelines._workspace import DATA, check_classes

from kdprune_data.config import Config, option
from kdprune_data.errors import ExistsError, SourceError, UsageError, some
from kdprune_data.formats import adopt, foreign, indexing, manifest, table
from kdprune_data.formats.build import Build, relocate
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import File, Manifest
from kdprune_data.formats.members import UNLABELLED, UNNAMED, Members, Numbering, classes_beside, numbering
from kdprune_data.images import MEMBERS
from kdprune_data.sources.base import is_utf8, listing
from kdprune_data.sources.patterns import expand

NO_DIGESTS = "no digests: later changes are not noticed, verify compares less, and the content is not that of an import of these images"


@dataclass(frozen=True)
class IndexConfig(Config):
    """Settings of `index`."""

    shards: tuple[Path, ...] = option(
        help="The tars, in order: files, shard-{000..009}.tar or 'shards/*.tar' in quotes, or a folder of them.", argument=True
    )
    split: str = option("train", help="Which split this is.", choices=("train", "val", "test"))
    out: Path | None = option(None, help="Exact folder to write; default data/SPLIT.")
    image_member: str | None = option(None, help="Extension of the members that are the images; default the one that is an image's.")
    label_member: str = option("cls", help="Where the labels are: cls or txt members, or json:FIELD (a.b: field b in field a).")
    classes: Path | None = option(None, help="Text file of class names, one a line, in label order; default the numbers, or sorted texts.")
    id: str = option("key", help="What names a sample: its key, or SHARD/key where shards repeat keys.", choices=("key", "shard"))
    no_digests: bool = option(False, help="Read no image whole and hash nothing: quick, but later changes are not noticed.")
    on_bad: str = option("error", help="Images that do not decode: stop, or index them as unusable.", choices=("error", "keep"))
    jobs: int = option(2, help="Threads that read shards.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Say what would be done and how long it would take, and touch nothing.")


@dataclass(frozen=True)
class Work:
    """What is to be indexed, where to, and how: `names` are the classes of `--classes`, or None."""

    config: IndexConfig
    paths: Sequence[Path]
    folder: Path
    names: list[str] | None
    reading: adopt.Reading

    @property
    def identity(self) -> Identity:
        """What is being made."""
        settings = {
            "source": "webdataset",
            "split": self.config.split,
            "source_files": listing((p.name, p.stat().st_size) for p in self.paths),
            "image_member": self.reading.members.image,
            "label_member": self.reading.members.label,
            "digests": self.reading.digests,
            "id": self.config.id,
            "on_bad": self.config.on_bad,
            "classes": self.names,
        }
        return Identity("dataset", self.config.split, settings, [])


def run(config: IndexConfig) -> Outcome:
    """Index shards in place. Raises UsageError, SourceError and ExistsError."""
    work = _plan(config)
    if config.dry_run:
        return _estimate(work).outcome()
    with Build.begin(work.folder, work.identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            return _outcome(work.folder, _again(work, build.done))
        say(f"indexing {count(len(work.paths), 'shard')} in place")
        if config.no_digests:
            say(NO_DIGESTS)
        try:
            made = _write(work, build)
        except (SourceError, UsageError):  # once mended, they will be other shards, or other settings
            build.discard()
            raise
    return _outcome(work.folder, made)


def _plan(config: IndexConfig) -> Work:
    paths = expand(config.shards)
    if not paths:
        raise UsageError("which shards? give tars, a pattern in quotes, or a folder of them")
    if strange := [str(p) for p in paths if not is_utf8(str(p.absolute()))]:
        raise UsageError(f"{some(strange)}: the name is not UTF-8, and a manifest could not list it: rename it")
    if config.id == "shard":
        _check_stems(paths)
    members = Members.parse(config.image_member, config.label_member)
    names = None if config.classes is None else foreign.read_classes(config.classes)
    reading = adopt.Reading(members, config.id, config.on_bad == "keep", not config.no_digests)
    return Work(config, paths, config.out or DATA / config.split, names, reading)


def _check_stems(paths: Sequence[Path]) -> None:
    stem, times = Counter(p.stem for p in paths).most_common(1)[0]
    if times > 1:
        same = some(str(p) for p in paths if p.stem == stem)
        raise UsageError(f"--id shard names samples by their shard's file, and {same} are both called {stem}: rename all but one")


def _write(work: Work, build: Build) -> Manifest:
    """Read all shards, number the classes, write the index and seal."""
    shards = _read(work, build)
    rows = [shard.rows for shard in shards]
    classes = _classes(work, adopt.labels_met(rows, work.paths))
    index = adopt.numbered(pa.concat_tables(rows).combine_chunks(), classes)
    _check(work, index, classes)
    say_unusable(indexing.unusable(index))
    facts = indexing.write_index(build, index, classes.names, indexing.shard_names(work.paths))
    outside = [_file(path, shard.sha256) for path, shard in zip(work.paths, shards, strict=True)]
    return build.seal(counts=facts.counts, classes=classes.names, content=facts.content, outside=outside)


def _classes(work: Work, met: Mapping[int | str, str]) -> Numbering:
    """The classes given, or those of the labels; a val or test split takes train's where its own are among them."""
    own, train = numbering(met, work.names), work.folder.parent / "train"
    if work.names is not None or work.config.split == "train" or not (train / manifest.NAME).is_file():
        return own
    theirs = Manifest.load(train, kinds=("dataset",)).classes
    return Numbering(classes_beside(theirs, own.names, named=own.named), own.named)


def _read(work: Work, build: Build) -> list[adopt.Shard]:
    """Every shard, in order, with a pool of threads."""
    sizes = [path.stat().st_size for path in work.paths]
    found = []
    with ThreadPoolExecutor(work.config.jobs) as pool, bar("index", total=sum(sizes), unit="B") as progress:
        reading = pool.map(partial(adopt.read_shard, build, reading=work.reading), range(len(sizes)), work.paths)
        for shard, size in zip(reading, sizes, strict=True):
            found.append(shard)
            progress.update(size)
    return found


def _check(work: Work, index: pa.Table, classes: Numbering) -> None:
    """Raise SourceError for no samples, labels that are nowhere, and ids that repeat; UsageError for classes that are not train's."""
    members, shards = work.reading.members, some(p.name for p in work.paths)
    if not len(index):
        wanted = f".{members.image}" if members.image else f".{' .'.join(MEMBERS)}"
        raise SourceError(f"no sample with an image in {shards}: expected members {wanted}")
    if members.label != "cls" and index["label"].null_count == len(index):
        raise SourceError(f"no sample in {shards} has a label where --label-member {members.label} says: name the right one")
    adopt.check_ids(index, work.paths)
    check_classes(work.config.split, work.folder, classes.names)
    if index["label"].null_count == len(index):
        say(UNLABELLED)
    elif not classes.named:
        say(UNNAMED)


def _file(path: Path, sha256: str | None) -> File:
    """A shard as the manifest lists it."""
    return File(str(path.absolute()), path.stat().st_size, sha256)


def _again(work: Work, made: Manifest) -> Manifest:
    """A second run: nothing to do, or the same shards have moved. Raises ExistsError for others of the same names and sizes."""
    if [f.path for f in made.outside] == [str(p.absolute()) for p in work.paths]:
        say("already done")
        return made
    digests: list[str | None] = [None] * len(work.paths)
    if work.reading.digests:
        with ThreadPoolExecutor(work.config.jobs) as pool:
            hashed = pool.map(manifest.sha256_file, work.paths)
            digests = list(track(hashed, "hash", total=len(work.paths), unit="shard"))
    if digests != [f.sha256 for f in made.outside]:
        raise ExistsError(f"{work.folder} is the index of other shards ({made.outside[0].path}): choose another --out, or --overwrite")
    how = "the same shards" if work.reading.digests else "shards of the same names and sizes"
    say(f"{how}, in another place: their paths are noted")
    return relocate(work.folder, made, [_file(path, digest) for path, digest in zip(work.paths, digests, strict=True)])


def _estimate(work: Work) -> Estimate:
    """What the run would do, from the samples that can be read in 3 seconds."""
    state = look(work.folder, work.identity, overwrite=work.config.overwrite)
    total = sum(path.stat().st_size for path in work.paths)
    rows, read = indexing.Rows(0, adopt.SCHEMA), 0

    def sampled() -> Iterator[int]:
        nonlocal read
        for path in work.paths:
            for row, size in adopt.sample_rows(path, work.reading):
                rows.add(**row)
                read += size
                yield size
        read = total  # headers and padding between samples are no samples

    seconds = measure(sampled(), total)
    samples = rows.table()
    share = total / read if read else 0.0
    threads = min(work.config.jobs, os.cpu_count() or 1, len(work.paths))
    counts = {"shard": len(work.paths), "sample": round(len(samples) * share)}
    return Estimate(work.folder, state, counts, round(len(table.to_bytes(samples)) * share), seconds / threads)


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts = made.counts
    text = f"{folder}: {count(counts['samples'], 'sample')} of {count(len(made.classes), 'class')} in {count(counts['shards'], 'shard')}"
    for n, what in ((counts["samples"] - counts["ok"], "that do not decode"), (counts["samples"] - counts["labelled"], "without a label")):
        text += f", {n:,} {what}" if n else ""
    return Outcome(folder, {"folder": str(folder), "content": made.content, "counts": counts}, f"{text}; content {made.content[:12]}")
