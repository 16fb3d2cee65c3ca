"""formats/copying.py: the planned bytes and their digests, however many threads share the work, whatever the parent becomes meanwhile."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from kdprune_pipelines import index
from numpy.typing import NDArray

from kdprune_data.errors import FormatError, SourceError
from kdprune_data.formats import copying, subset
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import sha256_file
from kdprune_data.formats.shards import Limits

Rows = NDArray[np.int64]
WHOLE = Limits(10**6, 10**9)


@pytest.fixture
def parent(digits: Path, tmp_path: Path) -> Dataset:
    """1,294 digits in three shards, to be damaged."""
    return Dataset.open(shutil.copytree(digits / "data" / "train", tmp_path / "train"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three records, or four: hundreds to share."""
    monkeypatch.setattr(subset, "BYTES", 10_000)


def begun(folder: Path) -> Build:
    return Build.begin(folder, Identity("subset", folder.name, {}, []))


def copied(parent: Dataset, rows: Rows, folder: Path, limits: Limits = WHOLE, *, jobs: int = 2, checked: bool = True) -> list[bytes]:
    """The tars, which are what was noted of them."""
    plan = subset.plan(parent, rows, limits)
    with begun(folder) as build:
        assert list(copying.copy(parent, plan, build, jobs, checked=checked)) == plan.names
        for file in build.files():
            assert (file.bytes, file.sha256) == ((folder / file.path).stat().st_size, sha256_file(folder / file.path))
    return [(folder / name).read_bytes() for name in plan.names]


def records(parent: Dataset, rows: Rows) -> list[bytes]:
    tars = [path.read_bytes() for path in parent.shard_paths]
    index = parent.index.take(rows).to_pylist()
    return [tars[one["shard"]][one["offset"] : one["offset"] + one["length"]] for one in index]


def at_work() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("ThreadPoolExecutor")]


def spoil(parent: Dataset, row: int) -> None:
    """Another byte in an image."""
    with parent.shard_paths[int(parent.shards[row])].open("r+b") as file:
        at = parent.index["image_offset"][row].as_py() + 40
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("samples", [10**6, 300, 7])
@pytest.mark.parametrize("every", [1, 2, 50])
def test_the_records_one_behind_another(parent: Dataset, tmp_path: Path, jobs: int, samples: int, every: int) -> None:
    rows = np.arange(3, len(parent), every)
    tars = copied(parent, rows, tmp_path / "x", Limits(samples, 10**9), jobs=jobs)
    whole = records(parent, rows)
    assert tars == [b"".join(whole[at : at + samples]) + bytes(1024) for at in range(0, len(rows), samples)]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_first_sample_that_was_changed_is_named_and_nothing_is_left(parent: Dataset, tmp_path: Path, jobs: int) -> None:
    for row in (1200, 703, 950):
        spoil(parent, row)
    with pytest.raises(SourceError) as caught:
        copied(parent, np.arange(len(parent)), tmp_path / "x", jobs=jobs)
    path, sample = parent.shard_paths[1], parent.ids[703]
    assert str(caught.value) == (
        f"{path} was changed: sample {sample!r} is not the image that was indexed; make or fetch {parent.folder} again"
    )
    assert not list((tmp_path / "x").rglob("*.tmp"))
    assert not list((tmp_path / "x").rglob("*.tar"))
    assert not at_work()


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("length", [0, 1024, 200_000])
def test_a_shard_that_was_cut_off(parent: Dataset, tmp_path: Path, checked: bool, length: int) -> None:
    os.truncate(parent.shard_paths[1], length)
    ends = parent.index["offset"].to_numpy() + parent.index["length"].to_numpy()
    first = parent.ids[np.flatnonzero((parent.shards == 1) & (ends > length))[0]]
    with pytest.raises(SourceError, match=rf"shard-000001.tar was changed: sample '{first}' is not the image that was indexed"):
        copied(parent, np.arange(len(parent)), tmp_path / "x", checked=checked)
    assert not list((tmp_path / "x").rglob("*.tmp"))


def test_unchecked_copies_what_is_there(parent: Dataset, tmp_path: Path) -> None:
    spoil(parent, 703)
    rows = np.arange(len(parent))
    assert copied(parent, rows, tmp_path / "x", checked=False) == [b"".join(records(parent, rows)) + bytes(1024)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_hashed_is_what_is_written(parent: Dataset, tmp_path: Path, jobs: int) -> None:
    """The parent is written to all the time, and a checked copy either has the images that were indexed or is refused."""
    path, done = parent.shard_paths[0], threading.Event()
    whole = path.read_bytes()

    def scribble() -> None:
        with path.open("r+b", buffering=0) as file:
            while not done.is_set():
                for data in (bytes(len(whole)), whole):
                    file.seek(0)
                    file.write(data)

    rows, refused = np.arange(500), 0
    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for n in range(20):
            (tar,) = copied(parent, rows, tmp_path / f"u{n}", jobs=jobs, checked=False)
            try:
                (tar,) = copied(parent, rows, tmp_path / f"c{n}", jobs=jobs)
            except SourceError:
                refused += 1
                continue
            for one in parent.index.slice(0, 500).to_pylist():
                assert hashlib.sha256(tar[one["image_offset"] :][: one["image_length"]]).digest() == one["sha256"]
    finally:
        done.set()
        thread.join()
    assert refused > 0


@pytest.mark.parametrize(
    ("before", "after", "stays"), [(True, True, True), (True, False, True), (False, False, True), (False, True, False)]
)
def test_what_an_unchecked_run_has_left_is_not_trusted_by_one_that_checks(
    parent: Dataset, tmp_path: Path, before: bool, after: bool, stays: bool
) -> None:
    rows = np.arange(0, len(parent), 3)
    copied(parent, rows, tmp_path / "x", Limits(200, 10**9), checked=before)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.tar")}
    copied(parent, rows, tmp_path / "x", Limits(200, 10**9), checked=after)
    assert ({path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.tar")} == made) is stays


@pytest.mark.parametrize(
    ("column", "by"),
    [("offset", 1), ("length", 100), ("image_offset", 8), ("image_offset", -512), ("image_offset", 1 << 40), ("image_length", 9999)],
)
def test_an_index_with_places_that_no_record_has_is_refused(parent: Dataset, column: str, by: int) -> None:
    """Records are moved by whole blocks of the tar: other places would not be copied as they are."""
    values = parent.index[column].to_pylist()
    values[7] += by
    changed = parent.index.set_column(parent.index.schema.get_field_index(column), column, pa.array(values, pa.int64()))
    with pytest.raises(FormatError, match=r"index.parquet has places that no record of a tar can have: make or fetch it again"):
        subset.plan(replace(parent, index=changed), np.arange(10), WHOLE)
    subset.plan(replace(parent, index=changed), np.arange(8, 20), WHOLE)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("checked", [True, False])
def test_the_extensions_of_images_are_noted(tmp_path: Path, small_images: list[tuple[bytes, int]], form: int, checked: bool) -> None:
    """By their names, be they ever so long; where a header was damaged that tells one, it is said of the sample."""
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as file:
        for n, (data, label) in enumerate(small_images[:60]):
            key = f"{'long/' * 30 if n % 2 else ''}{n:03d}"
            for extension, payload in ((("jpg", "png", "webp")[n % 3], data), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(payload)
                file.addfile(info, io.BytesIO(payload))
    index.run(index.IndexConfig(shards=(str(tmp_path / "x.tar"),), out=tmp_path / "set"))
    parent = Dataset.open(tmp_path / "set")
    for rows, wanted in ((np.arange(60), ["jpg", "png", "webp"]), (np.arange(1, 60, 6), ["png"]), (np.arange(2, 60, 6), ["webp"])):
        plan = subset.plan(parent, rows, WHOLE)
        with begun(tmp_path / str(wanted)) as build:
            assert copying.image_members(build, list(copying.copy(parent, plan, build, 2, checked=checked))) == wanted
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[parent.index["offset"][31].as_py() + 156] = ord("7")  # the header that has the long name is none of the kind any more
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(SourceError, match=rf"x.tar was changed: sample '{'long/' * 30}031' is not the image that was indexed"):
        copied(parent, np.arange(60), tmp_path / "y", checked=False)


def test_a_copy_that_is_given_up_ends(parent: Dataset, tmp_path: Path) -> None:
    plan = subset.plan(parent, np.arange(len(parent)), Limits(20, 10**9))
    with begun(tmp_path / "x") as build:
        going = copying.copy(parent, plan, build, 3)
        assert next(going) == "shard-000000.tar"
        going.close()
        left = sorted((tmp_path / "x").glob("*.tar"))
        assert len(left) < len(plan.names)
    assert not at_work()
    assert not list((tmp_path / "x").rglob("*.tmp"))
    assert copied(parent, plan.rows, tmp_path / "x", Limits(20, 10**9))[0] == left[0].read_bytes()
