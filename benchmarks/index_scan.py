"""Finding the samples of existing shards on one core: the walk over the headers, and all that `index --no-digests` does."""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import shards
import webdataset as wds
from common import in_turns, measured, one_core, parser, ratios, report

from kdprune_data.formats import adopt, tar
from kdprune_data.formats.members import Members
from kdprune_data.formats.reading import TarFile

TARFILE, WEBDATASET = "tarfile, getmembers", "WebDataset, iteration"
HEADERS, RECORDS, ROWS = "ours, headers", "ours, samples as objects", "ours, rows of index --no-digests"
HOW = adopt.Reading(Members(), "key", keep_bad=False, digests=False)


def packed(path: Path, images: list[bytes], labels: list[int]) -> list[Path]:
    """One USTAR shard."""
    with path.open("wb") as file:
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            file.write(tar.member(f"{n:08d}.jpg", image) + tar.member(f"{n:08d}.cls", b"%d" % label))
        file.write(tar.END)
    return [path]


def by_tarfile(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Name, place and size of every member."""
    found = []
    for path in paths:
        with tarfile.open(path) as opened:
            found += [(one.name, one.offset_data, one.size) for one in opened.getmembers()]
    return found


def by_webdataset(paths: list[Path]) -> list[str]:
    """The key of every sample."""
    return [sample["__key__"] for sample in wds.WebDataset([str(path) for path in paths], shardshuffle=False)]


def headers(paths: list[Path]) -> list[tar.Files]:
    """Names, places and sizes of all members, every header checked."""
    made = []
    for path in paths:
        with TarFile(path) as file:
            found = tar.files(file, str(path))
        assert found is not None
        made.append(found)
    return made


def records(paths: list[Path]) -> list[str]:
    """The key of every sample, from objects."""
    made = []
    for path in paths:
        with TarFile(path) as file:
            made += [record.key for record in tar.records(file, str(path))]
    return made


def read(paths: list[Path]) -> None:
    """Every byte."""
    block = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def loops(paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed, once it was seen to find the same."""
    ours = [one for found in headers(paths) for one in zip(found.names, found.data.tolist(), found.sizes.tolist(), strict=True)]
    assert ours == by_tarfile(paths)
    rows = [adopt.from_headers(0, path, HOW) for path in paths]
    assert by_webdataset(paths) == records(paths) == [key for one in rows if one is not None for key in one["key"].to_pylist()]
    return {
        TARFILE: lambda: by_tarfile(paths),
        WEBDATASET: lambda: by_webdataset(paths),
        HEADERS: lambda: headers(paths),
        RECORDS: lambda: records(paths),
        ROWS: lambda: [adopt.from_headers(0, path, HOW) for path in paths],
        "limit: reading the file": lambda: read(paths),
    }


def sets(work: Path, asked: argparse.Namespace) -> dict[str, tuple[list[Path], int]]:
    """The shards, and how many samples they hold."""
    small, labels = shards.read(asked.data, asked.samples)
    large, names = shards.read(asked.photos, asked.photo_samples)
    some = max(1, asked.samples // 4)
    paths = packed(work / "photos.tar", large, names)
    theirs = [Path(path) for path in shards.written(work / "theirs", small[:some], labels[:some])]
    return {
        "small": (packed(work / "small.tar", small, labels), asked.samples),
        "small, as WebDataset writes them": (theirs, some),
        "photographs": (paths, asked.photo_samples),
    }


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=200_000)
    made.add_argument("--photos", type=Path, required=True, help="Parquet file of photographs.")
    made.add_argument("--photo-samples", type=int, default=10_000, help="Photographs, repeated under other keys.")
    made.set_defaults(rounds=3)
    asked = made.parse_args()
    one_core(asked)
    about = measured(asked, ["webdataset", "numpy", "pyarrow"], n=asked.samples, rounds=asked.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, (paths, samples) in sets(asked.work or Path(temporary), asked).items():
            seconds = in_turns(loops(paths), asked.rounds, cpu=asked.cpu)
            by_tarfile, by_webdataset = ratios(seconds, TARFILE), ratios(seconds, WEBDATASET)
            size = sum(path.stat().st_size for path in paths)
            for way, found in seconds.items():
                row = {"shards": name, "MB": round(size / 1e6), "way": way, "us a sample": 1e6 * statistics.median(found) / samples}
                row |= {"times tarfile": 1 / by_tarfile[way], "times WebDataset": 1 / by_webdataset[way]}
                rows.append(row | {"goal": "30 times tarfile" if way == HEADERS else None})
    report(asked, rows, about)


if __name__ == "__main__":
    main()
