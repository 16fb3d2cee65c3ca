"""What `select` takes to write half of a data set, chosen at random, into shards of their own, with the digests of these shards.

Beside it: `cp` of the same bytes, a process a shard; and WebDataset, which reads all samples, selects, and writes with its ShardWriter. All
for photographs and for 32x32 images, from shards as `import` packs them and from shards as WebDataset's writer packs them (see `index`).
`select` is the copying alone, from the index, as the command does it in its process; `the whole command` is all of it, from opening the
data set to the manifest. All is in the page cache; before each run the output of the one before goes, and what is to be written is written.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import shards
import webdataset as wds
from common import drop, in_turns, measured, parser, ratios, report
from kdprune_pipelines import index, select
from kdprune_pipelines._console import quiet
from kdprune_pipelines._pruned import Copying, prune
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.formats import subset
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import SHARD_BYTES, SHARD_SAMPLES, Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.shards import Limits

GOALS = {"photographs": (2.2, 7), "32x32": (2.5, 50)}
"""How many times `cp` it may take, and how many times faster than WebDataset it is to be."""
PEER, SELECT, UNCHECKED, NORMALIZE = "WebDataset, ShardWriter", "select", "select --unchecked", "select --normalize"
Loop = Callable[[], object]


@dataclass(frozen=True)
class Half:
    """Half of a data set: the rows kept and their keys, where to write, with how many threads. Each method is one way to write it."""

    parent: Dataset
    rows: NDArray[np.int64]
    keys: frozenset[str]
    out: Path
    jobs: int

    @classmethod
    def of(cls, parent: Dataset, out: Path, jobs: int) -> Half:
        """As `select --frac 0.5` chooses them."""
        shutil.rmtree(out, ignore_errors=True)
        select.run(select.SelectConfig(data=parent.folder, frac="0.5", ids_only=True, out=out))
        kept = Dataset.open(out)
        return cls(parent, order.locate(parent.uids, kept.uids), frozenset(kept.index["key"].to_pylist()), out, jobs)

    def copied(self, *, checked: bool = True, normalize: bool = False) -> None:
        how = Copying(Limits(), self.jobs, checked=checked, normalize=normalize)
        with Build.begin(self.out, Identity("subset", self.out.name, {}, [])) as build:
            prune(build, self.parent, self.rows, how)

    def command(self) -> None:
        select.run(select.SelectConfig(data=self.parent.folder, frac="0.5", out=self.out, jobs=self.jobs))

    def webdataset(self) -> None:
        self.out.mkdir()
        source = wds.WebDataset([str(path) for path in self.parent.shard_paths], shardshuffle=False)
        with wds.ShardWriter(str(self.out / "%06d.tar"), maxcount=SHARD_SAMPLES, maxsize=SHARD_BYTES, verbose=0) as sink:
            for sample in source.select(lambda sample: sample["__key__"] in self.keys):
                sink.write(sample)

    def ranges(self) -> None:
        """What the kernel takes to copy the joined byte ranges, without a digest, into one file."""
        runs = subset.plan(self.parent, self.rows, Limits()).runs
        ends = np.flatnonzero((runs.shards[1:] != runs.shards[:-1]) | (runs.starts[1:] != runs.ends[:-1]))
        first, last = np.append(0, ends + 1), np.append(ends, len(runs) - 1)
        self.out.mkdir()
        files = [os.open(path, os.O_RDONLY) for path in self.parent.shard_paths]
        with (self.out / "all.tar").open("wb") as file:
            for shard, at, end in zip(runs.shards[first].tolist(), runs.starts[first].tolist(), runs.ends[last].tolist(), strict=True):
                while at < end:
                    at += os.copy_file_range(files[shard], file.fileno(), end - at, at)
        for one in files:
            os.close(one)


def cp(source: Path, out: Path) -> None:
    """A process a shard."""
    out.mkdir()
    for path in sorted(source.glob("*.tar")):
        subprocess.run(["cp", str(path), str(out)], check=True)


def copyfile(source: Path, out: Path) -> None:
    """The same by Python, in this process."""
    out.mkdir()
    for path in sorted(source.glob("*.tar")):
        shutil.copyfile(path, out / path.name)


def main() -> None:
    """Measure what was asked for."""
    made = parser("`select` beside `cp` of the same bytes, and WebDataset.")
    made.add_argument("--photos", type=Path, help="Parquet file of full-size photographs.")
    made.add_argument("--bytes", type=float, default=1e9, help="They are repeated under other keys to so many bytes.")
    made.add_argument("--data", type=Path, help="Parquet file of 32x32 images.")
    made.add_argument("--samples", type=int, default=50_000, help="So many of these; repeated under other keys where they are fewer.")
    made.add_argument("--rounds", type=int, default=7, help="Rounds; each runs every loop once, one after the other.")
    made.add_argument("--peer-rounds", type=int, default=2, help="The same where WebDataset takes part, which takes long.")
    made.add_argument("--work", type=Path, help="Folder to work in, on the disk to be measured, which is kept; default a temporary one.")
    asked = made.parse_args()
    if asked.cpu:
        made.error("--cpu counts the time of this process, and cp is another")
    rows = []
    with tempfile.TemporaryDirectory() as temporary, quiet():
        for name, path in (("photographs", asked.photos), ("32x32", asked.data)):
            if path is not None:
                rows += _images(asked, name, path, (asked.work or Path(temporary)) / name)
    n = {"n": asked.samples, "bytes": int(asked.bytes), "rounds": asked.rounds, "peer_rounds": asked.peer_rounds}
    report(asked, rows, measured(asked, ["webdataset", "numpy", "pyarrow"], **n))


def _images(asked: argparse.Namespace, name: str, path: Path, folder: Path) -> list[dict[str, Any]]:
    """The rows of one kind of images."""
    samples = asked.samples
    if path == asked.photos:
        sizes = [len(image["bytes"]) for image in pq.read_table(path, columns=["image"])["image"].to_pylist()]
        samples = -(-int(asked.bytes) * len(sizes) // sum(sizes))
    theirs = shards.written(folder / "theirs", *shards.read(path, samples))
    adopted = folder / "adopted" / "train"
    if not (adopted / "manifest.json").is_file():
        index.run(index.IndexConfig(shards=tuple(map(Path, theirs)), out=adopted, jobs=asked.threads))
    found = []
    for packed, parent in (("import", shards.imported(folder / "own" / "train", theirs)), ("WebDataset", Dataset.open(adopted))):
        half = Half.of(parent, folder / "out", asked.threads)
        found += [{"images": name, "packed by": packed, **row} for row in _rows(asked, half, GOALS[name])]
    shutil.rmtree(folder / "out")
    return found


def _rows(asked: argparse.Namespace, half: Half, goal: tuple[float, float]) -> list[dict[str, Any]]:
    """The rows of one data set."""
    others: dict[str, Loop] = {}
    if half.parent.manifest.outside:
        ours: dict[str, Loop] = {SELECT: half.copied, NORMALIZE: partial(half.copied, normalize=True)}
        bases = {"cp": [SELECT], "cp of what --normalize writes": [NORMALIZE]}
    else:
        ours = {SELECT: half.copied, UNCHECKED: partial(half.copied, checked=False), "the whole command": half.command}
        bases = {"cp": list(ours)}
        others["shutil.copyfile"] = partial(copyfile, half.out.with_name("source"), half.out)
        if hasattr(os, "copy_file_range"):
            others["copy_file_range alone, no digests"] = half.ranges
    _compare(half, ours)
    seconds, by_cp, size = dict[str, list[float]](), dict[str, float](), dict[str, int]()
    for base, names in bases.items():
        source = half.out.with_name("source")
        shutil.rmtree(source, ignore_errors=True)
        size |= dict.fromkeys([base, *names, *others], _written(half, ours[names[0]]))
        half.out.rename(source)
        loops = {base: partial(cp, source, half.out), **others, **{name: ours[name] for name in names}}
        seconds |= (found := _timed(half, loops, asked.rounds))
        by_cp |= ratios(found, base)
    with_peer = _timed(half, {PEER: half.webdataset, **ours}, asked.peer_rounds)
    seconds[PEER], size[PEER] = with_peer[PEER], _written(half, half.webdataset)
    by_peer = ratios(with_peer, PEER)
    wanted = f"by cp at most {goal[0]:g}, peer by this at least {goal[1]:g}"
    return [
        {
            "what": name,
            "s": statistics.median(some),
            "MB/s": size[name] / statistics.median(some) / 1e6,
            "kept samples/s": len(half.rows) / statistics.median(some),
            "by cp": by_cp.get(name),
            "peer by this": 1 / by_peer[name] if name in ours else None,
            "goal": wanted if name in (SELECT, UNCHECKED) else None,
        }
        for name, some in seconds.items()
    ]


def _timed(half: Half, loops: Mapping[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Seconds of each loop in each round; before each its output goes."""
    before = {f"before {name}": partial(drop, half.out) for name in loops}
    turns = {name: loop for both in zip(before.items(), loops.items(), strict=True) for name, loop in both}
    found = in_turns(turns, rounds)
    return {name: found[name] for name in loops}


def _written(half: Half, loop: Loop) -> int:
    """The bytes of the shards that a loop writes."""
    shutil.rmtree(half.out, ignore_errors=True)
    loop()
    return sum(path.stat().st_size for path in half.out.glob("*.tar"))


def _compare(half: Half, ours: Mapping[str, Loop]) -> None:
    """Raise ValueError unless all write the same samples, in the same order, as WebDataset does."""
    _written(half, half.webdataset)
    wanted = _samples(half.out)
    for name, loop in ours.items():
        _written(half, loop)
        if _samples(half.out) != wanted or len(wanted) != len(half.rows):
            raise ValueError(f"{name} has not written what WebDataset has")


def _samples(folder: Path) -> list[tuple[str, frozenset[tuple[str, bytes]]]]:
    """Keys, and the extensions and digests of their members."""
    found: dict[str, set[tuple[str, bytes]]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            for member in file:
                key, _, extension = member.name.partition(".")
                data = file.extractfile(member)
                found.setdefault(key, set()).add((extension, hashlib.sha256(data.read() if data else b"").digest()))
    return [(key, frozenset(members)) for key, members in found.items()]


if __name__ == "__main__":
    main()
