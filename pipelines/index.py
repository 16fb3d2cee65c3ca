"""`index`: adopt WebDataset shards where they lie, untouched.

1. Walk the headers of every tar; group members into samples; take each sample's image and class number.
2. Decode every image once, hash it, hash the tars.
3. Write `index.parquet sizes.json manifest.json` to `data/SPLIT`; the manifest lists the tars in `outside`.

Every command then reads the set as if it had been imported.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from kdprune_pipelines._console import Outcome, count, say, track
from kdprune_pipelines._workspace import DATA, check_classes

from kdprune_data.config import Config, option
from kdprune_data.errors import ExistsError, SourceError, UsageError, some
from kdprune_data.formats import dataset, manifest, tar
from kdprune_data.formats.build import Build, relocate
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import File, Manifest
from kdprune_data.formats.shards import check_image
from kdprune_data.images import MEMBERS
from kdprune_data.sources import foreign
from kdprune_data.sources.base import listing


@dataclass(frozen=True)
class IndexConfig(Config):
    """Settings of `index`."""

    shards: tuple[Path, ...] = option(help="The tar files, in order.", argument=True)
    split: str = option("train", help="Which split this is.", choices=("train", "val", "test"))
    out: Path | None = option(None, help="Exact folder to write; default data/SPLIT.")
    classes: Path | None = option(None, help="Text file of class names, one a line, in label order; default the numbers.")
    id: str = option("key", help="What names a sample: its key, or SHARD/key where shards repeat keys.", choices=("key", "shard"))
    on_bad: str = option("error", help="Images that do not decode: stop, or index them as unusable.", choices=("error", "keep"))
    jobs: int = option(2, help="Threads that read shards.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")


def run(config: IndexConfig) -> Outcome:
    """Index shards in place. Raises UsageError, SourceError and ExistsError."""
    missing = [str(p) for p in config.shards if not p.is_file()]
    if missing:
        raise UsageError(f"no such file: {some(missing)}; give the tars themselves, in order")
    folder = config.out or DATA / config.split
    settings = {
        "source": "webdataset",
        "split": config.split,
        "source_files": listing((p.name, p.stat().st_size) for p in config.shards),
        "id": config.id,
        "on_bad": config.on_bad,
    }
    names = _class_names(config.classes)
    with Build.begin(folder, Identity("dataset", config.split, settings | {"classes": names}, []), overwrite=config.overwrite) as build:
        if build.done is not None:
            return _outcome(folder, _again(config, folder, build.done))
        say(f"indexing {count(len(config.shards), 'shard')} in place")
        index = _read(config)
        classes = _classes(names, dataset.labels_of(index["label"]).max(initial=-1))
        check_classes(config.split, folder, classes)
        facts = dataset.write_index(build, index, classes, dataset.shard_names(config.shards))
        made = build.seal(counts=facts.counts, classes=classes, content=facts.content, outside=_hashed(config))
    return _outcome(folder, made)


def _hashed(config: IndexConfig) -> list[File]:
    """The shards as the manifest lists them."""
    with ThreadPoolExecutor(config.jobs) as pool:
        digests = list(track(pool.map(manifest.sha256_file, config.shards), "hash", total=len(config.shards), unit="shard"))
    return [File(str(p.absolute()), p.stat().st_size, d) for p, d in zip(config.shards, digests, strict=True)]


def _again(config: IndexConfig, folder: Path, made: Manifest) -> Manifest:
    """A second run: nothing to do, or the same shards have moved. Raises ExistsError for others of the same names and sizes."""
    if [f.path for f in made.outside] == [str(p.absolute()) for p in config.shards]:
        say("already done")
        return made
    now = _hashed(config)
    if [f.sha256 for f in now] != [f.sha256 for f in made.outside]:
        raise ExistsError(f"{folder} is the index of other shards ({made.outside[0].path}): choose another --out, or --overwrite")
    say("the same shards, in another place: their paths are noted")
    return relocate(folder, made, now)


def _read(config: IndexConfig) -> pa.Table:
    work = [(n, path, config) for n, path in enumerate(config.shards)]
    with ThreadPoolExecutor(config.jobs) as pool:
        found = list(track(pool.map(_read_shard, work), "index", total=len(work), unit="shard"))
    table = pa.concat_tables(found).combine_chunks()
    if not len(table):
        raise SourceError(f"no sample with an image in {some(p.name for p in config.shards)}: expected members .{' .'.join(MEMBERS)}")
    return table


def _read_shard(work: tuple[int, Path, IndexConfig]) -> pa.Table:
    number, path, config = work
    rows = dataset.Rows(number)
    buffer = tar.map_file(path)
    for record in tar.records(buffer, str(path)):
        image = _image_member(record, path)
        data = buffer[image.data : image.data + image.size]
        height, width = check_image(data, f"{path} sample {record.key!r}", config.on_bad == "keep")
        rows.add(
            id=f"{path.stem}/{record.key}" if config.id == "shard" else record.key,
            key=record.key,
            offset=record.offset,
            length=record.length,
            label=_label(buffer, record, path),
            image_offset=image.data,
            image_length=image.size,
            sha256=dataset.image_digest(data),
            width=width,
            height=height,
            ok=height > 0,
        )
    return rows.table()


def _image_member(record: tar.Record, path: Path) -> tar.Member:
    found = [record.members[e] for e in MEMBERS if e in record.members]
    if len(found) != 1:
        have = "no" if not found else "more than one"
        raise SourceError(f"{path} sample {record.key!r} has {have} image among its members .{' .'.join(record.members)}: expected one")
    return found[0]


def _label(buffer: tar.Buffer, record: tar.Record, path: Path) -> int | None:
    member = record.members.get("cls")
    if member is None:
        return None
    text = bytes(buffer[member.data : member.data + member.size]).strip()
    if not text.isdigit() or int(text) >= 2**31:
        raise SourceError(f"{path} sample {record.key!r}: its .cls member is {text[:20]!r}, not a class number; mend the set")
    return int(text)


def _class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"--classes {path} does not exist: give a text file with one class name a line")
    return foreign.read_lines(path)


def _classes(names: list[str] | None, top: int) -> list[str]:
    if names is None:
        return [f"class {n}" for n in range(top + 1)]
    if top >= len(names):
        raise SourceError(f"a sample has class number {top}, the class file {len(names)} names: add the missing names")
    return names


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts = made.counts
    text = f"{folder}: {count(counts['samples'], 'sample')} of {count(len(made.classes), 'class')} in {count(counts['shards'], 'shard')}"
    return Outcome(folder, {"folder": str(folder), "content": made.content, "counts": counts}, f"{text}; content {made.content[:12]}")
