"""pipelines/index.py where shards are not as ours: other members, text labels, no digests; and what other commands make of such sets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import index, select, verify
from kdprune_pipelines._console import Outcome

from kdprune_data.errors import MismatchError, SourceError, UsageError
from kdprune_data.formats import adopt, tar
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest, sha256_file
from kdprune_data.formats.members import UNNAMED, Members

Images = list[tuple[bytes, int]]
Cli = Callable[..., Any]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
READING = adopt.Reading(Members(), "key", keep_bad=False, digests=True)


def run(shards: list[Path], out: Path, **settings: Any) -> Outcome:
    return index.run(index.IndexConfig.from_dict({"shards": shards, "out": out} | settings))


def packed(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as target:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def theirs(tmp_path: Path, small_images: Images) -> Path:
    """Three shards of twenty samples: an image and a second one, the label as a word in a text, and as word and number in JSON."""
    for shard in range(3):
        files = []
        for n in range(20 * shard, 20 * shard + 20):
            (data, label), (other, _) = small_images[3 * n % 200], small_images[(3 * n + 4) % 200]
            about = {"meta": {"word": WORDS[label], "number": label}, "text": "x" * n}
            key = f"{'long/' * 25}{n:03d}"
            files += [(f"{key}.jpg", data), (f"{key}.rgb.png", other), (f"{key}.json", json.dumps(about).encode())]
            files += [(f"{key}.txt", f"{WORDS[label]}\n".encode())]
        packed(tmp_path / "theirs" / f"s-{shard}.tar", files)
    return tmp_path / "theirs"


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


# --- members


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ({"label_member": "txt"}, sorted(WORDS)),
        ({"label_member": "json:meta.word"}, sorted(WORDS)),
        ({"label_member": "json:meta.number"}, [f"class {n}" for n in range(10)]),
        ({"label_member": "txt", "classes": "names.txt"}, WORDS),
        ({"label_member": "json:meta.number", "classes": "names.txt", "image_member": "rgb.png"}, WORDS),
        ({"label_member": "txt", "image_member": ".RGB.png", "no_digests": True}, sorted(WORDS)),
    ],
    ids=str,
)
def test_any_members_then_verify_and_select(
    theirs: Path, tmp_path: Path, small_images: Images, settings: dict[str, Any], classes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set, subsets of it with and without tars, and a subset of a subset are whole, and have the labels that the members say."""
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("\n".join(WORDS))
    before = state(theirs)
    run([theirs], Path("train"), **settings)
    for data, out, ids_only in (("train", "half", False), ("train", "ids", True), ("half", "quarter", False)):
        select.run(select.SelectConfig(data=Path(data), frac="0.5", out=Path(out), ids_only=ids_only))
    for folder in ("train", "half", "ids", "quarter"):
        read = Dataset.open(folder)
        assert list(read.classes) == classes
        for row, key in enumerate(read.ids):
            n = int(key[-3:])
            image = small_images[(3 * n + 4) % 200 if "image_member" in settings else 3 * n % 200][0]
            word = WORDS[small_images[3 * n % 200][1]]
            assert read.classes[read.labels[row]] in (word, f"class {WORDS.index(word)}")
            assert read.image_bytes(row) == image
        assert verify.run(verify.VerifyConfig(Path(folder))).facts["faults"] == []
    assert state(theirs) == before


@pytest.mark.parametrize("settings", [{"label_member": "txt"}, {"label_member": "json:meta.number", "image_member": "rgb.png"}], ids=str)
def test_a_label_that_changed_in_a_member_is_found(theirs: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run([theirs], tmp_path / "train", **settings)
    select.run(select.SelectConfig(data=tmp_path / "train", frac="1", out=tmp_path / "all"))
    for folder, shard in (("train", theirs / "s-0.tar"), ("all", tmp_path / "all/shard-000000.tar")):
        data = bytearray(shard.read_bytes())
        first = next(tar.records(bytes(data), "x")).members[settings["label_member"].split(":")[0]]
        at = data.index(b'"number": ', first.data) + 10 if "image_member" in settings else first.data
        data[at] ^= 1
        shard.write_bytes(data)
        found = verify.run(verify.VerifyConfig(tmp_path / folder)).facts["faults"]
        assert any("its label" in one for one in found), found


def test_cards_of_subsets_name_the_columns_that_are_there(theirs: Path, tmp_path: Path) -> None:
    """The image as it is called; names in PAX headers too; no `cls` where labels stand elsewhere."""
    for name, settings, image in (("a", {}, "jpg"), ("b", {"image_member": "rgb.png"}, "rgb.png")):
        run([theirs], tmp_path / name, label_member="txt", **settings)
        select.run(select.SelectConfig(data=tmp_path / name, frac="0.5", out=tmp_path / f"{name}-half"))
        card = (tmp_path / f"{name}-half/README.md").read_text()
        assert [line for line in card.splitlines() if line.startswith("  - name:")] == [
            *('  - name: "__key__"', '  - name: "__url__"', f'  - name: "{image}"')
        ]
        assert "Classes are numbers in `index.parquet`; the members say them their way (`txt`)." in card


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"label_member": "json:meta.wrod"}, SourceError, "has a label where --label-member json:meta.wrod says: name the right one"),
        ({"label_member": "json:meta"}, SourceError, "the field 'meta' of its .json member is"),
        (
            {"label_member": "txt", "classes": "names.txt"},
            SourceError,
            "its label 'eight' is none of the 2 names in the class file: did you mean 'eigth'?",
        ),
        ({"image_member": "webp"}, SourceError, "has no member .webp among .jpg .rgb.png .json .txt"),
        ({"image_member": "json"}, SourceError, "not a JPEG, PNG or WebP image"),
        ({"id": "shard", "shards": ["theirs", "again/s-1.tar"]}, UsageError, "are both called s-1: rename all but one"),
        ({"shards": ["theirs", "theirs/s-1.tar"]}, UsageError, "s-1.tar is listed twice"),
        ({"shards": []}, UsageError, "which shards? give tars, a pattern in quotes, or a folder of them"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(
    theirs: Path, tmp_path: Path, settings: dict[str, Any], kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("eigth\nnine\n")
    packed(Path("again/s-1.tar"), [])
    with pytest.raises(kind) as caught:
        index.run(index.IndexConfig.from_dict({"shards": [theirs], "out": "train"} | settings))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("train").exists()


@pytest.mark.parametrize(("settings", "says"), [({}, "no sample has a label"), ({"label_member": "json:meta.number"}, UNNAMED)])
def test_what_is_said_of_classes(
    theirs: Path, tmp_path: Path, settings: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run([theirs], tmp_path / "train", **settings)
    assert says in capsys.readouterr().err
    run([theirs], tmp_path / "named", label_member="txt")
    assert "classes are unnamed" not in capsys.readouterr().err


# --- no digests


def test_without_digests_nothing_is_hashed_and_a_changed_image_is_not_noticed(theirs: Path, tmp_path: Path) -> None:
    run([theirs], tmp_path / "with", label_member="txt")
    run([theirs], tmp_path / "without", label_member="txt", no_digests=True)
    whole, bare = Dataset.open(tmp_path / "with"), Dataset.open(tmp_path / "without")
    assert (whole.has_digests, bare.has_digests) == (True, False)
    assert bare.index["sha256"].null_count == len(bare)
    assert not bare.sha256.any()
    assert bare.index.drop_columns(["sha256"]).equals(whole.index.drop_columns(["sha256"]))  # width, height and ok from the headers alone
    assert {f.sha256 for f in bare.manifest.outside} == {None}
    assert bare.manifest.content != whole.manifest.content
    assert "indexed without digests" in verify.run(verify.VerifyConfig(tmp_path / "without")).text
    offset = bare.index["image_offset"][0].as_py()
    data = bytearray((theirs / "s-0.tar").read_bytes())
    data[offset + bare.index["image_length"][0].as_py() - 3] ^= 1
    (theirs / "s-0.tar").write_bytes(data)
    assert bare.image_bytes(0)
    with pytest.raises(SourceError, match="was changed"):
        whole.image_bytes(0)


@pytest.mark.parametrize("keep", ["error", "keep"])
def test_without_digests_an_image_is_bad_when_its_header_is(tmp_path: Path, small_images: Images, keep: str) -> None:
    cut = [(f"{n}.jpg", small_images[3 * n][0][:-200] if n else b"\xff\xd8\xff no") for n in range(4)]
    shard = packed(tmp_path / "x.tar", cut)
    if keep == "error":
        with pytest.raises(
            SourceError, match="sample '0': not a JPEG, PNG or WebP image with a readable header; mend or remove it, or pass"
        ):
            run([shard], tmp_path / "train", no_digests=True)
        return
    run([shard], tmp_path / "train", no_digests=True, on_bad=keep)
    assert Dataset.open(tmp_path / "train").ok.tolist() == [False, True, True, True]


def test_shards_without_digests_that_moved_are_taken_by_name_and_size(theirs: Path, tmp_path: Path) -> None:
    run([theirs], tmp_path / "train", no_digests=True)
    moved = theirs.rename(tmp_path / "moved")
    run([moved], tmp_path / "train", no_digests=True)
    assert Dataset.open(tmp_path / "train").image_bytes(59)


def test_a_cache_fits_only_data_that_has_digests_as_it_has(chain_copy: Path, kdprune: Cli) -> None:
    """Both without: joined by ids and labels. One without: refused."""
    tars = sorted((chain_copy / "data/train").glob("*.tar"))
    names = chain_copy / "names.txt"
    names.write_text("\n".join(Dataset.open(chain_copy / "data/train").classes))
    run(tars, chain_copy / "data/bare", no_digests=True, classes=names)
    made = kdprune("cache", "data/bare", "--teacher", "teachers/resnet8-s0", "--views", "1", "--out", "logits/bare", cwd=chain_copy)
    assert made.code == 0, made.err
    assert verify.run(verify.VerifyConfig(chain_copy / "logits/bare")).facts["faults"] == []
    cache, bare, whole = LogitCache.open(chain_copy / "logits/bare"), *(Dataset.open(chain_copy / "data" / n) for n in ("bare", "train"))
    assert cache.join(bare).place.tolist() == list(range(len(bare)))
    with pytest.raises(MismatchError, match=r"logits/bare has no digests of its images .* and .*data/train has: nothing tells whether"):
        cache.join(whole)
    (of_whole,) = [p for p in (chain_copy / "logits").iterdir() if p.name != "bare"]
    select.run(select.SelectConfig(data=chain_copy / "data/bare", frac="0.5", out=chain_copy / "half"))
    with pytest.raises(MismatchError, match="half has no digests of its images"):
        LogitCache.open(of_whole).join(Dataset.open(chain_copy / "half"))


def test_rows_that_lost_their_digests_are_a_fault(digits: Path, tmp_path: Path) -> None:
    """A data set that is said to have digests has them."""
    run(Dataset.open(digits / "data/test").shard_paths, tmp_path / "test", no_digests=True)
    made = Manifest.load(tmp_path / "test")
    lying = replace(made, config={**made.config, "digests": True})
    (tmp_path / "test/manifest.json").write_bytes(lying.to_json())
    assert "has rows without the sha256 of their image" in str(verify.run(verify.VerifyConfig(tmp_path / "test")).facts["faults"])


# --- dry runs, interrupted runs


@pytest.mark.parametrize("no_digests", [False, True])
def test_a_dry_run_touches_nothing_and_counts(theirs: Path, tmp_path: Path, no_digests: bool) -> None:
    before = state(tmp_path)
    settings = {"label_member": "txt", "no_digests": no_digests}
    facts = run([theirs], tmp_path / "train", dry_run=True, **settings).facts
    assert state(tmp_path) == before
    assert (facts["state"], facts["counts"]) == ("new", {"shard": 3, "sample": 60})
    run([theirs], tmp_path / "train", **settings)
    size = (tmp_path / "train/index.parquet").stat().st_size
    assert 0.5 * size < facts["bytes"] < 2 * size
    assert run([theirs], tmp_path / "train", dry_run=True, **settings).facts["state"] == "finished"
    with pytest.raises(UsageError, match="label_member is txt, now cls"):
        run([theirs], tmp_path / "train", dry_run=True, no_digests=no_digests)


@pytest.mark.parametrize("touched", [False, True])
def test_a_shard_that_an_interrupted_run_has_read_is_not_read_again(tmp_path: Path, small_images: Images, touched: bool) -> None:
    """Unless its time of change is another: then it may be another file."""
    shard = packed(tmp_path / "x.tar", [("0.jpg", small_images[0][0]), ("0.cls", b"1")])

    def read() -> adopt.Shard:
        with Build.begin(tmp_path / "train", Identity("dataset", "train", {}, [])) as build:
            return adopt.read_shard(build, 0, shard, READING)

    first, about = read(), shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"0.jpg", b"1.jpg").replace(b"0.cls", b"1.cls"))
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns + touched))
    if touched:
        with pytest.raises(SourceError, match="fails its checksum"):
            read()
    else:
        again = read()
        assert again.rows.equals(first.rows)
        assert again.sha256 == first.sha256 != sha256_file(shard)


def test_the_page_of_formats_says_how_content_is_without_digests(theirs: Path, tmp_path: Path) -> None:
    """Lines `id NUL NUL label LF`, sorted."""
    run([theirs], tmp_path / "train", label_member="txt", no_digests=True)
    rows = pq.read_table(tmp_path / "train/index.parquet").to_pylist()
    lines = sorted(f"{row['id']}\0\0{row['label']}\n".encode() for row in rows)
    assert Manifest.load(tmp_path / "train").content == hashlib.sha256(b"".join(lines)).hexdigest()
    assert np.array_equal([row["height"] for row in rows], Dataset.open(tmp_path / "train").sizes[:, 0])


@pytest.mark.parametrize("torn", [b"", b"PAR1", bytes(300)])
def test_rows_that_a_power_failure_has_torn_are_read_again(tmp_path: Path, small_images: Images, torn: bytes) -> None:
    shard = packed(tmp_path / "x.tar", [("0.jpg", small_images[0][0]), ("0.cls", b"1")])
    with Build.begin(tmp_path / "train", Identity("dataset", "train", {}, [])) as build:
        first = adopt.read_shard(build, 0, shard, READING)
        build.scratch("000000.rows").write_bytes(torn)
        assert adopt.read_shard(build, 0, shard, READING).rows.equals(first.rows)
