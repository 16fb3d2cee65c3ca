"""pipelines/index.py: shards that others wrote are adopted where they lie, untouched, and are then a data set like any other."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from kdprune_pipelines import index, select, verify
from kdprune_pipelines._console import Outcome

from kdprune_data.errors import ExistsError, KdpruneError, SourceError, UsageError
from kdprune_data.formats import tar
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest

Digests = Callable[[Path], dict[str, str]]
Images = list[tuple[bytes, int]]
PREFIX = "p" * 110  # past USTAR's hundred bytes: PAX headers


def run(shards: list[Path], out: Path, **settings: Any) -> Outcome:
    return index.run(index.IndexConfig.from_dict({"shards": shards, "out": out} | settings))


def refusal(kind: type[KdpruneError], shards: list[Path], out: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        run(shards, out, **settings)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def packed(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as target:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def foreign(tmp_path: Path, small_images: Images) -> list[Path]:
    """Three shards by webdataset's own ShardWriter: long keys (PAX headers), a JSON member beside image and class."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=40, verbose=0) as sink:
        for n, (data, label) in enumerate(small_images[:100]):
            kind = ("jpg", "png", "webp")[n % 3]
            sink.write({"__key__": f"{PREFIX}/{n:03d}", kind: data, "cls": label, "json": {"row": n}})
    return sorted(folder.glob("*.tar"))


def test_webdatasets_shards_are_adopted_untouched(foreign: list[Path], tmp_path: Path, small_images: Images) -> None:
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in foreign]
    assert b"path=" in before[0][0]  # PAX indeed
    run(foreign, tmp_path / "train")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in foreign] == before
    read = Dataset.open(tmp_path / "train")
    assert read.ids.tolist() == [f"{PREFIX}/{n:03d}" for n in range(100)]
    assert read.shards.tolist() == [n // 40 for n in range(100)]
    assert [(read.image_bytes(n), read.labels[n]) for n in range(100)] == small_images[:100]
    assert list(read.classes) == [f"class {n}" for n in range(10)]
    assert {p.name for p in (tmp_path / "train").iterdir()} == {"index.parquet", "sizes.json", "SHA256SUMS", "manifest.json", "log.txt"}
    assert json.loads((tmp_path / "train" / "sizes.json").read_bytes()) == {"part-000.tar": 40, "part-001.tar": 40, "part-002.tar": 20}
    assert [f.path for f in read.manifest.outside] == [str(path) for path in foreign]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("jobs", [1, 4])
def test_a_subset_copies_the_records_byte_for_byte(tmp_path: Path, small_images: Images, form: int, jobs: int) -> None:
    """Long-name headers and members that we know nothing of are part of the record."""
    prefix = "long/" * 40 if form != tarfile.USTAR_FORMAT else "d/"
    shards = []
    for shard in range(3):
        files = []
        for n in range(30 * shard, 30 * shard + 30):
            data, label = small_images[n]
            kind = ("jpg", "png", "webp")[n % 3]
            files += [(f"{prefix}{n}.{kind}", data), (f"{prefix}{n}.cls", b"%d\n" % label), (f"{prefix}{n}.notes.txt", b"n" * n)]
        shards.append(packed(tmp_path / "theirs" / f"{shard}.tar", files, form))
    run(shards, tmp_path / "train", jobs=jobs)
    out = tmp_path / "half"
    select.run(select.SelectConfig.from_dict({"data": tmp_path / "train", "frac": "0.5", "out": out, "shard_samples": 20, "jobs": jobs}))
    whole, kept = Dataset.open(tmp_path / "train"), Dataset.open(out)
    assert len(kept) == 45
    row_of = {name: n for n, name in enumerate(whole.ids.tolist())}
    for n, name in enumerate(kept.ids.tolist()):
        at = row_of[name]
        theirs, ours = (
            read.shard_paths[read.shards[row]].read_bytes()[read.index["offset"][row].as_py() :][: read.index["length"][row].as_py()]
            for read, row in ((whole, at), (kept, n))
        )
        assert theirs == ours
        assert kept.image_bytes(n) == whole.image_bytes(at) == small_images[int(name.rsplit("/", 1)[1])][0]
    with tarfile.open(kept.shard_paths[0]) as found:
        members = found.getnames()
    assert members[:3] == [f"{kept.ids[0]}.{e}" for e in (members[0].rsplit(".", 1)[1], "cls", "notes.txt")]
    for path in kept.shard_paths:
        assert list(tar.records(path.read_bytes(), path.name))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_adopted_set_is_the_imported_one(digits: Path, tmp_path: Path, split: str) -> None:
    """The same `content`, in whatever shards; with the class file, the same classes."""
    imported = Dataset.open(digits / "data" / split)
    names = tmp_path / "classes.txt"
    names.write_text("".join(f"{name}\n" for name in imported.classes))
    run(imported.shard_paths, tmp_path / split, classes=names)
    adopted = Dataset.open(tmp_path / split)
    assert adopted.manifest.content == imported.manifest.content
    assert adopted.index.equals(imported.index)
    assert adopted.manifest.counts == imported.manifest.counts
    assert list(adopted.classes) == list(imported.classes)


def test_a_subset_of_the_adopted_set_is_the_subset_of_the_imported_one(digits: Path, tmp_path: Path) -> None:
    imported = Dataset.open(digits / "data" / "train")
    run(imported.shard_paths, tmp_path / "train")
    tars = []
    for name, data in (("a", tmp_path / "train"), ("b", digits / "data" / "train")):
        select.run(select.SelectConfig.from_dict({"data": data, "frac": "0.3", "out": tmp_path / name}))
        found = Dataset.open(tmp_path / name)
        tars.append(([path.read_bytes() for path in found.shard_paths], found.manifest.content, found.index))
    assert tars[0] == tars[1]


def test_shards_that_repeat_keys(tmp_path: Path, small_images: Images) -> None:
    shards = [packed(tmp_path / f"{s}.tar", [("0.jpg", small_images[0][0]), ("0.cls", b"1")]) for s in ("a", "b")]
    line = refusal(SourceError, shards, tmp_path / "train")
    assert line == f"sample '0' is in {shards[0]} and in {shards[1]}: ids must be unique; pass --id shard to name samples SHARD/key"
    run(shards, tmp_path / "train", id="shard")
    read = Dataset.open(tmp_path / "train")
    assert read.ids.tolist() == ["a/0", "b/0"]
    assert read.index["key"].to_pylist() == ["0", "0"]


def test_shards_of_one_name_in_several_folders(tmp_path: Path, small_images: Images) -> None:
    shards = [packed(tmp_path / s / "x.tar", [(f"{s}.jpg", small_images[0][0]), (f"{s}.cls", b"1")]) for s in ("a", "b")]
    run(shards, tmp_path / "train")
    assert json.loads((tmp_path / "train" / "sizes.json").read_bytes()) == {"0/x.tar": 1, "1/x.tar": 1}
    select.run(select.SelectConfig.from_dict({"data": tmp_path / "train", "frac": "1", "ids_only": True, "out": tmp_path / "all"}))
    assert json.loads((tmp_path / "all" / "sizes.json").read_bytes()) == {"0/x.tar": 1, "1/x.tar": 1}


def test_shards_in_an_order_that_is_not_that_of_their_names(foreign: list[Path], tmp_path: Path) -> None:
    run(foreign[::-1], tmp_path / "train")
    read = Dataset.open(tmp_path / "train")
    assert read.ids.tolist()[::99] == [f"{PREFIX}/080", f"{PREFIX}/039"]
    assert json.loads((tmp_path / "train" / "sizes.json").read_bytes()) == {"part-000.tar": 40, "part-001.tar": 40, "part-002.tar": 20}
    assert verify.run(verify.VerifyConfig(tmp_path / "train")).ok


def test_the_same_again_and_other_settings(
    foreign: list[Path], tmp_path: Path, digests: Digests, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(foreign, tmp_path / "train")
    before = digests(tmp_path / "train")
    capsys.readouterr()
    assert run(foreign, tmp_path / "train", jobs=4) == first
    assert "already done" in capsys.readouterr().err
    for settings, says in (({"id": "shard"}, "(id is key, now shard)"), ({"on_bad": "keep"}, "(on_bad is error, now keep)")):
        with pytest.raises(ExistsError) as caught:
            run(foreign, tmp_path / "train", **settings)
        assert says in str(caught.value)
    with pytest.raises(ExistsError, match="source_files is"):
        run(foreign[:2], tmp_path / "train")
    assert digests(tmp_path / "train") == before
    run(foreign[:2], tmp_path / "train", overwrite=True)
    assert Manifest.load(tmp_path / "train").counts["samples"] == 80


def test_threads_change_no_byte(foreign: list[Path], tmp_path: Path, digests: Digests) -> None:
    run(foreign, tmp_path / "a", jobs=1)
    run(foreign, tmp_path / "b", jobs=4)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert Manifest.load(tmp_path / "a").digest == Manifest.load(tmp_path / "b").digest


def test_relative_paths_hold_from_anywhere(foreign: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run([Path(os.path.relpath(path)) for path in foreign], Path("train"))
    monkeypatch.chdir("/")
    assert Dataset.open(tmp_path / "train").image_bytes(0)


def test_unlabelled_and_bad_samples(tmp_path: Path, small_images: Images) -> None:
    files = [("0.jpg", small_images[0][0]), ("0.cls", b"1"), ("1.png", small_images[1][0]), ("2.jpg", b"\xff\xd8\xff no"), ("2.cls", b"0")]
    shard = packed(tmp_path / "x.tar", files)
    line = refusal(SourceError, [shard], tmp_path / "train")
    assert line.startswith(f"{shard} sample '2': not an image that decodes")
    run([shard], tmp_path / "train", on_bad="keep")
    read = Dataset.open(tmp_path / "train")
    assert read.labels.tolist() == [1, -1, 0]
    assert read.ok.tolist() == [True, True, False]
    assert read.manifest.counts == {"samples": 3, "ok": 2, "shards": 1, "labelled": 2, "per_class": [1, 1]}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no sample with an image in 'x.tar': expected members .jpg .png .webp .jpeg"),
        ([("README", b"x")], "no sample with an image in 'x.tar'"),
        ([("0.cls", b"1")], "sample '0' has no image among its members .cls: expected one"),
        (
            [("0.jpg", b"x"), ("0.png", b"x")],
            "sample '0' has more than one image among its members .jpg .png: say which with --image-member jpg",
        ),
        ([("0.jpg", b"IMAGE"), ("0.cls", b"cat")], "sample '0': its .cls member is b'cat', not a class number; mend the set"),
        ([("0.jpg", b"IMAGE"), ("0.cls", b"-1")], "its .cls member is b'-1', not a class number"),
        ([("0.jpg", b"IMAGE"), ("0.cls", b"")], "its .cls member is b'', not a class number"),
        ([("0.jpg", b"IMAGE"), ("0.cls", b"2147483648")], "its .cls member is b'2147483648', not a class number"),
        ([("0.jpg", b"IMAGE"), ("1.jpg", b"IMAGE"), ("0.cls", b"1")], "the members of sample '0' are not contiguous"),
        ([("../0.jpg", b"IMAGE")], "points outside the tar"),
    ],
)
def test_shards_that_cannot_be_adopted(tmp_path: Path, small_images: Images, files: list[tuple[str, bytes]], says: str) -> None:
    shard = packed(tmp_path / "x.tar", [(name, small_images[0][0] if data == b"IMAGE" else data) for name, data in files])
    assert says in refusal(SourceError, [shard], tmp_path / "train")


def test_class_files(foreign: list[Path], tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    assert "classes.txt does not exist: give a text file with one class name a line" in refusal(
        UsageError, foreign, tmp_path / "train", classes=names
    )
    names.write_text("a\nb\n")
    line = refusal(SourceError, foreign, tmp_path / "train", classes=names)
    assert line.endswith(": class number 9, but the class file has 2 names: add the missing names")
    assert line.startswith(f"{foreign[0]} sample '{PREFIX}/")
    names.write_text("a\n\nb\n")
    assert "classes.txt: line 2 is empty; give one class name a line" in refusal(UsageError, foreign, tmp_path / "train", classes=names)
    names.write_text("\n")
    assert "classes.txt: it is empty; give" in refusal(UsageError, foreign, tmp_path / "train", classes=names)
    names.write_bytes(b"gr\xfcn\n" * 10)
    assert "classes.txt is not UTF-8 text (byte 2): save it as UTF-8" in refusal(SourceError, foreign, tmp_path / "train", classes=names)
    names.write_bytes(b"\xef\xbb\xbf" + b"".join(b"digit %d\r\n" % n for n in range(10)))  # as some editors save it
    run(foreign, tmp_path / "train", classes=names)
    assert list(Dataset.open(tmp_path / "train").classes) == [f"digit {n}" for n in range(10)]


def test_missing_and_empty_files(foreign: list[Path], tmp_path: Path) -> None:
    line = refusal(UsageError, [*foreign, tmp_path / "no.tar"], tmp_path / "train")
    assert line == f"no such file: '{tmp_path / 'no.tar'}'; give files, a pattern in quotes, or a folder of .tar files"
    (tmp_path / "empty.tar").write_bytes(b"")
    assert "empty.tar is empty: fetch it again" in refusal(SourceError, [tmp_path / "empty.tar"], tmp_path / "train")


@pytest.mark.parametrize("split", ["val", "test"])
def test_another_split_must_have_the_classes_of_train_and_may_lack_some(tmp_path: Path, small_images: Images, split: str) -> None:
    run([packed(tmp_path / "a.tar", [("0.jpg", small_images[0][0]), ("0.cls", b"3")])], tmp_path / "train")
    more = packed(tmp_path / "b.tar", [("1.jpg", small_images[1][0]), ("1.cls", b"7")])
    line = refusal(UsageError, [more], tmp_path / split, split=split)
    assert "8 against 4, differing in class 4, class 5, class 6" in line
    assert "--classes FILE" in line
    fewer = packed(tmp_path / "c.tar", [("1.jpg", small_images[1][0]), ("1.cls", b"1")])
    run([fewer], tmp_path / split, split=split)
    assert list(Dataset.open(tmp_path / split).classes) == [f"class {n}" for n in range(4)]


def test_a_shard_that_changed_later_is_noticed(foreign: list[Path], tmp_path: Path) -> None:
    run(foreign, tmp_path / "train")
    foreign[1].unlink()
    read = Dataset.open(tmp_path / "train")
    assert read.image_bytes(0)
    with pytest.raises(SourceError, match=r"part-001.tar does not exist: it may have been moved; fetch it or index the set again"):
        read.image_bytes(40)


def test_without_digests_a_shard_that_became_shorter_is_noticed(foreign: list[Path], tmp_path: Path) -> None:
    run(foreign, tmp_path / "train", no_digests=True)
    read = Dataset.open(tmp_path / "train")
    rows = read.rows_of(1)
    before = read.read(rows)
    data = foreign[1].read_bytes()
    foreign[1].write_bytes(data[: read.index["image_offset"][int(rows[-1])].as_py() + 10])
    read = Dataset.open(tmp_path / "train")
    assert read.read(rows[:-1]) == before[:-1]
    with pytest.raises(SourceError, match=rf"was changed: sample '{read.ids[rows[-1]]}' is not the image that was indexed; make or fetch"):
        read.read(rows)


def test_shards_that_moved_are_found_again_and_others_are_not_taken_for_them(foreign: list[Path], tmp_path: Path) -> None:
    run(foreign, tmp_path / "train")
    before = Dataset.open(tmp_path / "train")
    moved = [path.rename(tmp_path / path.name) for path in foreign]
    run(moved, tmp_path / "train")
    after = Dataset.open(tmp_path / "train")
    assert (after.manifest.digest, after.shard_paths) == (before.manifest.digest, moved)
    assert after.image_bytes(99)
    other = tmp_path / "others"
    other.mkdir()
    for path in moved:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # the same name and size, another file
        (other / path.name).write_bytes(data)
    with pytest.raises(ExistsError, match="is the index of other shards"):
        run(sorted(other.iterdir()), tmp_path / "train")


def test_an_ids_only_subset_of_adopted_shards_can_be_moved(foreign: list[Path], tmp_path: Path) -> None:
    run(foreign, tmp_path / "here/train")
    select.run(select.SelectConfig(data=tmp_path / "here/train", frac="0.5", ids_only=True, out=tmp_path / "here/ids"))
    there = (tmp_path / "here/ids").rename(tmp_path / "deeper-ids")
    assert verify.run(verify.VerifyConfig(artefact=there)).ok
