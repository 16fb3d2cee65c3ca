"""sources/webdataset.py: foreign shards packed anew: order, names, labels and the members that go along; what is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kdprune_data.errors import KdpruneError, SourceError, UsageError
from kdprune_data.formats.members import UNLABELLED, UNNAMED
from kdprune_data.formats.reading import TarFile
from kdprune_data.sources import Item, SourceOptions, numbered, open_source

Images = list[tuple[bytes, int]]
Members = Sequence[tuple[str, bytes]]


def pack(path: Path, members: Members) -> Path:
    """A tar by Python's tarfile, GNU names and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as found:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 12345, 0o600
            found.addfile(info, io.BytesIO(data))
    return path


def items(*where: Path, **options: Any) -> list[Item]:
    return list(open_source([str(w) for w in where], SourceOptions(**{"split": "train"} | options)))


def refusal(kind: type[KdpruneError], *where: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        source = open_source([str(w) for w in where], SourceOptions(**{"split": "train"} | options))
        assert source.outline is None  # everything but images is looked at when a source is listed
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def shards(tmp_path: Path, small_images: Images) -> list[Path]:
    """Two shards of six digits each: image, JSON, label and a mask, the label not always last."""
    found = []
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for n in range(6 * shard, 6 * shard + 6):
            data, label = small_images[n]
            facts = json.dumps({"name": f"digit {label}", "deep": {"label": label}}).encode()
            members += [(f"a/{n:03d}.JPEG", data), (f"a/{n:03d}.json", facts), (f"a/{n:03d}.cls", b"%d\n" % label)]
            members += [(f"a/{n:03d}.Mask.PNG", b"mask %d" % n)]
        found.append(pack(tmp_path / "shards" / f"part-{shard}.tar", members))
    return found


def test_samples_come_in_the_order_of_the_shards(shards: list[Path], small_images: Images) -> None:
    source = open_source([str(s) for s in shards], SourceOptions("train"))
    found = list(source)
    assert (len(source), source.name, source.shuffles) == (12, "webdataset", False)
    assert [i.key for i in found] == [f"a/{n:03d}" for n in range(12)]
    assert [(i.data, i.label) for i in found] == small_images[:12]
    assert source.outline.labels.tolist() == [label for _, label in small_images[:12]]
    for n, item in enumerate(found):
        assert [extension for extension, _ in item.others] == ["json", "mask.png"]
        assert item.others[1][1] == b"mask %d" % n
        assert item.origin == f"{shards[n // 6]} sample 'a/{n:03d}'"
    assert sum(len(i.data) for i in found) < source.bytes


def test_a_folder_a_glob_braces_and_a_list_are_the_same(shards: list[Path]) -> None:
    listed = items(*shards)
    folder = shards[0].parent
    for where in (folder, folder / "part-*.tar", folder / "part-{0..1}.tar"):
        assert items(where) == listed
    assert [i.key for i in items(*shards[::-1])] == [i.key for i in listed[6:] + listed[:6]]


@pytest.mark.parametrize(
    ("option", "classes", "label_of"),
    [
        (None, [f"class {n}" for n in range(10)], lambda label: label),
        ("json:deep.label", [f"class {n}" for n in range(10)], lambda label: label),
        ("json:name", [f"digit {n}" for n in range(10)], lambda label: label),
    ],
)
def test_labels_and_classes(tmp_path: Path, small_images: Images, option: str | None, classes: list[str], label_of: Any) -> None:
    members: list[tuple[str, bytes]] = []
    for n, (data, label) in enumerate(small_images[:40]):
        facts = json.dumps({"name": f"digit {label}", "deep": {"label": label}}).encode()
        members += [(f"{n}.jpg", data), (f"{n}.json", facts), *([] if option else [(f"{n}.cls", b"%d" % label)])]
    path = pack(tmp_path / "x.tar", members)
    source = open_source([str(path)], SourceOptions("train", label_member=option))
    assert list(source.classes) == classes
    assert [i.label for i in source] == [label_of(label) for _, label in small_images[:40]]


@pytest.mark.parametrize(
    ("train", "texts", "classes", "labels"),
    [
        ([], ["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        (["ant", "cat", "dog"], ["dog", "cat", "dog"], ["ant", "cat", "dog"], [2, 1, 2]),
        (["ant", "cat"], ["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["ünder"], ["ünder"], ["ünder"], [0]),
    ],
)
def test_texts_become_classes(
    tmp_path: Path, small_images: Images, train: list[str], texts: list[str], classes: list[str], labels: list[int]
) -> None:
    """Sorted, or numbered as in train where its classes hold them."""
    members = [one for n, text in enumerate(texts) for one in ((f"{n}.jpg", small_images[0][0]), (f"{n}.txt", text.encode()))]
    source = open_source([str(pack(tmp_path / "x.tar", members))], SourceOptions("test", label_member="txt", train=train))
    assert list(source.classes) == classes
    assert [i.label for i in source] == labels
    assert ("classes" in source.describe()) == (classes == train and len(train) > len(set(texts)))


def test_classes_from_a_file(tmp_path: Path, shards: list[Path], small_images: Images) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {n}" for n in reversed(range(10))))
    source = open_source([str(s) for s in shards], SourceOptions("train", classes=names))
    assert list(source.classes) == [f"digit {n}" for n in reversed(range(10))]
    assert source.describe()["classes"] == list(source.classes)
    names.write_text("zero\none")
    assert "but the class file has 2 names" in refusal(SourceError, *shards, classes=names)
    assert "does not exist: give a text file" in refusal(UsageError, *shards, classes=tmp_path / "none.txt")


def test_repeated_keys_are_refused_naming_both(tmp_path: Path, small_images: Images) -> None:
    data = small_images[0][0]
    paths = [pack(tmp_path / f"{s}.tar", [(f"{k}.jpg", data) for k in keys]) for s, keys in (("a", "xyz"), ("b", "qy"))]
    line = f"{paths[0]} sample 'y' and {paths[1]} sample 'y' have the same key 'y': name samples by their shards too, with --id shard"
    assert refusal(SourceError, *paths).startswith(line)
    assert [i.key for i in items(*paths, id="shard")] == ["a/x", "a/y", "a/z", "b/q", "b/y"]


@pytest.mark.parametrize(
    ("members", "options", "says"),
    [
        (
            [("x.jpg", b"\x89PNG\r\n\x1a\n"), ("x.png", b"p")],
            {"image_member": "jpg"},
            "its member .png has the name that its image gets: choose that one with --image-member, or",
        ),
        ([("x.jpg", b"j"), ("x.bin", b"b")], {}, "its member .bin has the name that its image gets"),
        ([("x.jpg", b"j"), ("x.ü", b"1")], {}, "its member .ü makes the name 'x.ü': at most 100 bytes of printable ASCII"),
        ([("x" * 90 + ".jpg", b"j"), ("x" * 90 + ".far-too-long", b"1")], {}, "at most 100 bytes of printable ASCII fit"),
        ([("x" * 91 + ".jpg", b"j")], {}, "which is 91 bytes long: at most 90 fit; pack the set again with another"),
        ([("x.jpg", b"j"), ("x.png", b"p")], {}, "more than one image"),
        ([("x.jpg", b"j"), ("x.cls", b"cat")], {}, "its .cls member is b'cat', not a class number"),
        ([("x.jpg", b"j"), ("x.cls", b"1000000")], {}, "class number 1000000 is above"),
        ([("x.jpg", b"j")], {"label_member": "txt"}, "x.tar' has a label in txt: name another member"),
        ([], {}, "x.tar': nothing to import"),
    ],
)
def test_shards_that_cannot_be_imported(tmp_path: Path, members: Members, options: dict[str, str], says: str) -> None:
    assert says in refusal(SourceError, pack(tmp_path / "x.tar", members), **options)


def test_a_tar_is_read_slice_by_slice(shards: list[Path]) -> None:
    raw = shards[0].read_bytes()
    with TarFile(shards[0]) as found:
        assert len(found) == len(raw)
        for part in (slice(0, 512), slice(512, 700), slice(len(raw) - 3, len(raw) + 100), slice(9, 9), slice(20, 10)):
            assert found[part] == raw[part]


def test_a_tar_that_became_shorter_is_refused(shards: list[Path]) -> None:
    with TarFile(shards[0]) as found:
        os.truncate(shards[0], 1000)
        with pytest.raises(
            SourceError, match=r"part-0.tar changed while it was read: it ends at byte 1,000, before 2,000; import it again"
        ):
            found[512:2000]


@pytest.mark.long
def test_more_than_one_call_reads(tmp_path: Path) -> None:
    """2 GiB are what Linux reads at once."""
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.truncate(2**31 + 5)
        file.seek(2**31 + 2)
        file.write(b"end")
    with TarFile(path) as found:
        assert found[3 : 2**31 + 5][-4:] == b"\0end"


@pytest.mark.parametrize(
    ("label", "found", "notes"),
    [
        (None, [("cls", b"1")], [UNNAMED]),
        (None, [("txt", b"cat")], [UNLABELLED]),
        ("txt", [("txt", b"cat")], []),
        ("txt", [("txt", b"cat"), ("cls", b"1")], ["left out: the .cls members of 2 samples, whose labels come from txt"]),
        (
            "json:n",
            [("json", b'{"n": 1}'), ("cls", b"7")],
            ["left out: the .cls members of 2 samples, whose labels come from json:n", UNNAMED],
        ),
    ],
)
def test_what_is_said_of_labels(
    tmp_path: Path, small_images: Images, label: str | None, found: list[tuple[str, bytes]], notes: list[str]
) -> None:
    members = [(f"{n}.{e}", data) for n in range(2) for e, data in [("jpg", small_images[n][0]), *found]]
    source = open_source([str(pack(tmp_path / "x.tar", members))], SourceOptions("train", label_member=label))
    assert list(source.notes) == notes
    assert {e for item in source for e, _ in item.others} == {e for e, _ in found} - {"cls"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({0: ["a", "c"], 1: ["d", "e"]}, r"part-0.tar sample 'c' is not what was listed there before"),
        ({0: ["a"], 1: ["b", "c", "d"]}, r"part-0.tar changed while it was read: it has 1 samples, not the 2 listed before"),
        ({0: ["a", "b", "x"]}, r"part-0.tar changed while it was read: it has 3 samples, not the 2 listed before"),
        ({1: ["c"]}, r"part-1.tar changed while it was read: it has 1 samples, not the 2 listed before"),
    ],
)
def test_shards_that_change_while_they_are_read(tmp_path: Path, small_images: Images, changed: dict[int, list[str]], says: str) -> None:
    def write(shard: int, keys: list[str]) -> Path:
        members = [one for k in keys for one in ((f"{k}.jpg", small_images[ord(k) % 9][0]), (f"{k}.cls", b"1"))]
        return pack(tmp_path / f"part-{shard}.tar", members)

    source = open_source([str(write(n, keys)) for n, keys in enumerate((["a", "b"], ["c", "d"]))], SourceOptions("train"))
    assert len(source.outline.uids) == 4
    for shard, keys in changed.items():
        write(shard, keys)
    with pytest.raises(SourceError, match=says):
        list(numbered(source))
