"""`select --normalize`: of foreign shards all but the PAX headers that hold nothing but times, byte for byte, and the same samples."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from kdprune_pipelines import index, select, verify
from kdprune_pipelines._console import Outcome

from kdprune_data.errors import SourceError
from kdprune_data.formats import times
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the garbage collector

Images = list[tuple[bytes, int]]
TIMES = (b"mtime", b"atime", b"ctime")
LONG = "p" * 120
"""More than a plain header holds."""


def run(data: Path, out: Path, **settings: Any) -> Outcome:
    return select.run(select.SelectConfig.from_dict({"data": data, "out": out, "frac": "0.5"} | settings))


def adopted(shards: list[Path], out: Path) -> Path:
    index.run(index.IndexConfig(shards=tuple(map(str, shards)), out=out))
    return out


HEADERS: list[tuple[int, float, dict[str, str], str]] = [
    (tarfile.PAX_FORMAT, 1.25, {}, ""),
    (tarfile.PAX_FORMAT, 1795872388.2468083, {"atime": "1.5", "ctime": "1795872388.1"}, ""),
    (tarfile.PAX_FORMAT, 3, {"atime": "1" * 130}, ""),  # a record of three digits' length
    (tarfile.PAX_FORMAT, 3, {"ctime": "1" * 700}, ""),  # a body of two blocks
    (tarfile.PAX_FORMAT, 3, {}, ""),
    (tarfile.PAX_FORMAT, 4.5, {"comment": "not a time"}, ""),
    (tarfile.PAX_FORMAT, 4.5, {"mtimes": "5", "time": "6"}, ""),
    (tarfile.PAX_FORMAT, 4.5, {}, LONG),
    (tarfile.PAX_FORMAT, 4, {}, LONG),
    (tarfile.PAX_FORMAT, 4, {}, "größe-"),
    (tarfile.PAX_FORMAT, 4.5, {"size": ""}, ""),  # told there too: see below
    (tarfile.GNU_FORMAT, 4, {}, LONG),
    (tarfile.GNU_FORMAT, 4, {}, ""),
    (tarfile.USTAR_FORMAT, 4, {}, ""),
]
"""How members are written: format, time, further PAX records, and what their names begin with."""


@pytest.fixture
def foreign(tmp_path: Path, small_images: Images) -> list[Path]:
    """Two shards in which every header stands before images, classes and other members."""
    paths = []
    for shard in range(2):
        path = tmp_path / f"foreign-{shard}.tar"
        with path.open("wb") as file:
            for n in range(100 * shard, 100 * shard + 60):
                data, label = small_images[3 * (n % 60)]
                form, mtime, pax, begins = HEADERS[n % len(HEADERS)]
                for m, (extension, payload) in enumerate([("cls", b"%d" % label), ("jpg", data), ("npy", b"x" * (n * 37 % 3000))]):
                    info = tarfile.TarInfo(f"{begins}{n:03d}.{extension}")
                    info.size, info.mtime, info.uid, info.uname = len(payload), mtime + m, 7, "them"  # type: ignore[assignment]
                    info.pax_headers = {key: value or str(info.size) for key, value in pax.items()}
                    file.write(info.tobuf(form) + payload + bytes(-len(payload) % 512))
                    if n % 5 == m:  # a hidden file, and a folder, in between
                        file.write(tarfile.TarInfo(f"._{n}").tobuf(tarfile.USTAR_FORMAT))
                        folder = tarfile.TarInfo("folder")
                        folder.type, folder.mtime = tarfile.DIRTYPE, 2.5  # type: ignore[assignment]
                        file.write(folder.tobuf(tarfile.PAX_FORMAT))
            file.write(bytes(1024))
        paths.append(path)
    return paths


def keys_of(body: bytes) -> list[bytes]:
    found = []
    while body:
        size = int(body.partition(b" ")[0])
        found.append(body[:size].partition(b" ")[2].partition(b"=")[0])
        body = body[size:]
    return found


def stripped(record: bytes) -> tuple[bytes, int]:
    """A record without those headers, and how many there were: header by header."""
    kept, dropped, at, told = b"", 0, 0, None
    while at < len(record):
        head = record[at : at + 512]
        size, kind = int(head[124:135], 8), head[156:157]
        if told is not None and kind in b"0":
            size, told = told, None
        end = at + 512 + -(-size // 512) * 512
        body = record[at + 512 : at + 512 + size]
        keys = keys_of(body) if kind == b"x" else []
        if b"size" in keys:
            told = int(body.partition(b"size=")[2].partition(b"\n")[0])
        if keys and set(keys) <= set(TIMES):
            dropped += 1
        else:
            kept += record[at:end]
        at = end
    return kept, dropped


def records(read: Dataset) -> list[bytes]:
    tars = [path.read_bytes() for path in read.shard_paths]
    return [tars[one["shard"]][one["offset"] : one["offset"] + one["length"]] for one in read.index.to_pylist()]


def members(read: Dataset) -> list[tuple[str, bytes, int, int, str]]:
    """As tarfile tells them, times in whole seconds: that is what plain headers hold."""
    found = []
    for path in read.shard_paths:
        with tarfile.open(path) as file:
            for one in file:
                data = file.extractfile(one)
                found.append((one.name, b"" if data is None else data.read(), int(one.mtime), one.uid, one.uname))
    return found


def samples(read: Dataset) -> list[dict[str, Any]]:
    """As webdataset reads them."""
    found = wds.WebDataset([str(path) for path in read.shard_paths], shardshuffle=False, empty_check=False)
    return [{key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in found]


@pytest.mark.parametrize(("frac", "jobs"), [("1", 1), ("0.4", 3)])
def test_all_but_the_times_byte_for_byte(
    foreign: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frac: str, jobs: int
) -> None:
    monkeypatch.setattr(times, "AT_ONCE", 20_000)
    parent = adopted(foreign, tmp_path / "set")
    run(parent, tmp_path / "plain", frac=frac, shard_samples=25)
    run(parent, tmp_path / "lean", frac=frac, shard_samples=25, normalize=True, jobs=jobs)
    plain, lean = Dataset.open(tmp_path / "plain"), Dataset.open(tmp_path / "lean")
    wanted = [stripped(record) for record in records(plain)]
    assert records(lean) == [record for record, _ in wanted]
    assert lean.manifest.counts["pax_dropped"] == sum(n for _, n in wanted) > 0
    assert "pax_dropped" not in plain.manifest.counts
    assert all(path.stat().st_size == size + 1024 for path, size in zip(lean.shard_paths, sizes(lean), strict=True))
    assert [lean.image_bytes(n) for n in range(len(lean))] == [plain.image_bytes(n) for n in range(len(plain))]
    assert lean.manifest.content == plain.manifest.content
    assert members(lean) == members(plain)
    assert samples(lean) == samples(plain)
    assert verify.run(verify.VerifyConfig(artefact=tmp_path / "lean")).ok


def sizes(read: Dataset) -> list[int]:
    return np.bincount(read.shards, read.index["length"].to_numpy()).astype(int).tolist()


def test_what_webdataset_has_written_becomes_half_as_large(tmp_path: Path, cifar_rows: Images, capsys: pytest.CaptureFixture[str]) -> None:
    with wds.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=150, verbose=0) as sink:
        for n, (data, label) in enumerate(cifar_rows):
            sink.write({"__key__": f"{n:06d}", "jpg": data, "cls": label})
    parent = adopted(sorted(tmp_path.glob("*.tar")), tmp_path / "set")
    run(parent, tmp_path / "plain")
    capsys.readouterr()
    run(parent, tmp_path / "lean", normalize=True)
    assert "400 PAX headers holding nothing but times left out: 409.6 kB\n" in capsys.readouterr().err
    plain, lean = Dataset.open(tmp_path / "plain"), Dataset.open(tmp_path / "lean")
    assert lean.manifest.counts["pax_dropped"] == 400  # two of each sample
    assert sum(sizes(plain)) - sum(sizes(lean)) == 400 * 1024
    assert sum(sizes(lean)) < 0.6 * sum(sizes(plain))
    assert samples(lean) == samples(plain)
    assert lean.manifest.config == plain.manifest.config | {"normalize": True}
    assert "Kept from" in (tmp_path / "lean/README.md").read_text()
    assert "PAX headers that held nothing but times were left out." in (tmp_path / "lean/README.md").read_text()
    assert "PAX" not in (tmp_path / "plain/README.md").read_text()
    told = [run(parent, tmp_path / "x", normalize=normalize, dry_run=True).facts["bytes"] for normalize in (False, True)]
    assert told[0] - told[1] == 400 * 1024


def test_where_there_is_nothing_to_leave_out(
    digits: Path, tmp_path: Path, digests: Callable[[Path], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    parent = digits / "data/train"
    run(parent, tmp_path / "a" / "x")
    run(parent, tmp_path / "b" / "x", normalize=True)
    assert "so there is nothing to leave out\n" in capsys.readouterr().err
    a, b = (digests(tmp_path / name / "x") for name in "ab")
    assert {name for name in a if a[name] != b[name]} == {"README.md"}
    plain, lean = (Manifest.load(tmp_path / name / "x") for name in "ab")
    assert (plain.files, plain.content, lean.counts) == (lean.files, lean.content, plain.counts | {"pax_dropped": 0})
    assert plain.digest != lean.digest


@pytest.mark.parametrize("damage", ["a size", "a number", "cut", "a longer member"])
def test_headers_that_are_not_what_was_indexed(foreign: list[Path], tmp_path: Path, damage: str) -> None:
    parent = adopted(foreign, tmp_path / "set")
    row = {name: column[50] for name, column in Dataset.open(parent).index.to_pydict().items()}
    data = bytearray(foreign[0].read_bytes())
    header = slice(row["image_offset"] - 512 + 124, row["image_offset"] - 512 + 136)
    if damage == "a size":
        data[header] = b"%011o\0" % (row["image_length"] + 1)
    elif damage == "a number":
        data[header] = b"no number at"
    elif damage == "a longer member":
        data[row["offset"] + 124 : row["offset"] + 136] = b"%011o\0" % 99_999
    foreign[0].write_bytes(data if damage != "cut" else data[: row["offset"] + 700] + bytes(len(data) - row["offset"] - 700))
    with pytest.raises(SourceError) as caught:
        run(parent, tmp_path / "x", frac="1", normalize=True)
    assert str(foreign[0]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
