"""formats/members.py: which member is the image, which the label, and which class number a label is."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from kdprune_data.errors import SourceError, UsageError
from kdprune_data.formats import tar
from kdprune_data.formats.members import CLASSES_LIMIT, Members, numbering

NAMES = ["cat", "dog", "747"]


def record(**members: bytes) -> tuple[bytes, tar.Record]:
    """A tar of one sample `s`; `_` in a name stands for a dot."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as target:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"s.{extension.replace('_', '.')}")
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    (found,) = tar.records(out.getvalue(), "x.tar")
    return out.getvalue(), found


def label(member: str, **members: bytes) -> int | str | None:
    return Members.parse(None, member).label_of(*record(**members), "x.tar")


# --- options


@pytest.mark.parametrize(("given", "is_"), [(None, None), ("jpg", "jpg"), (".JPG", "jpg"), ("rgb.PNG", "rgb.png")])
def test_an_image_member_is_an_extension(given: str | None, is_: str | None) -> None:
    assert Members.parse(given, "cls") == Members(is_, "cls")


@pytest.mark.parametrize(
    ("image", "label", "says"),
    [
        ("", "cls", "--image-member '' is no extension"),
        ("a/b", "cls", "--image-member 'a/b' is no extension"),
        (None, "json", "--label-member 'json' is none that can be read: give cls, txt or json:FIELD"),
        (None, "json: ", "--label-member 'json: ' is none"),
        (None, "CLS", "--label-member 'CLS' is none"),
    ],
)
def test_options_that_are_none(image: str | None, label: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Members.parse(image, label)
    assert str(caught.value).startswith(says)


# --- the image


@pytest.mark.parametrize(
    ("wanted", "members", "found"),
    [
        (None, {"jpg": b"j", "seg_png": b"p", "cls": b"1"}, b"j"),
        (None, {"jpeg": b"j", "json": b"{}"}, b"j"),
        ("seg.png", {"jpg": b"j", "seg_png": b"p"}, b"p"),
        ("png", {"jpg": b"j", "png": b"p"}, b"p"),
        ("bin", {"jpg": b"j", "bin": b"b"}, b"b"),
    ],
)
def test_the_image_is_the_one_that_was_named_or_the_only_one(wanted: str | None, members: dict[str, bytes], found: bytes) -> None:
    data, one = record(**members)
    image = Members.parse(wanted, "cls").image_of(one, "x.tar")
    assert data[image.data : image.data + image.size] == found


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (None, "has more than one image among its members .jpg .png .txt: say which with --image-member jpg"),
        ("seg.png", "has no member .seg.png among .jpg .png .txt: mend it, or name another"),
    ],
)
def test_an_image_that_cannot_be_told(wanted: str | None, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        Members.parse(wanted, "cls").image_of(record(jpg=b"", png=b"", txt=b"")[1], "x.tar")
    assert str(caught.value) == f"x.tar sample 's' {says}"


# --- labels


@pytest.mark.parametrize(
    ("member", "members", "is_"),
    [
        ("cls", {"cls": b" 7\n"}, 7),
        ("cls", {"txt": b"7"}, None),
        ("txt", {"txt": "\ufeff M\u00fcller \r\n".encode()}, "M\u00fcller"),
        ("txt", {"txt": b"7"}, "7"),
        ("txt", {"cls": b"7"}, None),
        ("json:y", {"json": b'{"y": 7}'}, 7),
        ("json:y", {"json": b'{"y": 7.0}'}, 7),
        ("json:y", {"json": b'{"y": "cat"}'}, "cat"),
        ("json:y", {"json": b'{"y": null}'}, None),
        ("json:y", {"json": b"{}"}, None),
        ("json:y", {"cls": b"7"}, None),
        ("json:a.b.c", {"json": b'{"a": {"b": {"c": 7}}}'}, 7),
        ("json:a.b.c", {"json": b'{"a": {"b": 7}}'}, None),
        ("json:a.b", {"json": b'{"a.b": 7, "a": {"b": 8}}'}, 7),
        ("json:a.b.c", {"json": b'{"a": {"b.c": 7}}'}, 7),
    ],
)
def test_labels(member: str, members: dict[str, bytes], is_: int | str | None) -> None:
    found = label(member, **members)
    assert (found, type(found)) == (is_, type(is_))


@pytest.mark.parametrize("value", [True, -1, 1.5, 2**31, [1], {"a": 1}, "", " ", "a\nb", float("nan")])
def test_json_values_that_are_no_label(value: object) -> None:
    with pytest.raises(SourceError, match=r"^x.tar sample 's': the field 'y' of its .json member is "):
        label("json:y", json=json.dumps({"y": value}).encode())


@pytest.mark.parametrize(
    ("member", "data", "says"),
    [
        ("cls", b"cat", "its .cls member is b'cat', not a class number"),
        ("cls", b"9" * 5000, "not a class number"),
        ("txt", b"", "its .txt member is '', not a label on one line"),
        ("txt", b"a man\nrides a horse", "not a label on one line"),
        ("txt", b"\xff", "not UTF-8 text"),
        ("json:y", b"[1]", "its .json member is b'[1]', not a JSON object"),
        ("json:y", b"{", "not a JSON object"),
        ("json:y", b"\xff", "not a JSON object"),
        ("json:y", b"[" * 100_000, "not a JSON object"),
    ],
)
def test_members_that_hold_no_label(member: str, data: bytes, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        label(member, **{member.partition(":")[0]: data})
    assert str(caught.value).startswith("x.tar sample 's': ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- class numbers


@pytest.mark.parametrize(
    ("met", "names", "classes", "numbers"),
    [
        ([], None, [], []),
        ([3, 1], None, ["class 0", "class 1", "class 2", "class 3"], [3, 1]),
        ([0, 1], NAMES, NAMES, [0, 1]),
        (["3", "1"], None, ["class 0", "class 1", "class 2", "class 3"], [3, 1]),
        (["1", 0], None, ["class 0", "class 1"], [1, 0]),
        (["dog", "cat"], None, ["cat", "dog"], [1, 0]),
        (["dog", "747"], NAMES, NAMES, [1, 2]),
        (["1", "0"], NAMES, NAMES, [1, 0]),
        (["1", "0"], ["1", "0"], ["1", "0"], [0, 1]),
        ([0], ["crane", "crane"], ["crane", "crane"], [0]),
    ],
)
def test_numbering(met: list[int | str], names: list[str] | None, classes: list[str], numbers: list[int]) -> None:
    found = numbering(dict.fromkeys(met, "x.tar sample 's'"), names)
    assert list(found.names) == classes
    assert [found.number(one) for one in met] == numbers
    assert found.number(None) is None
    assert found.named == (names is not None or classes[:1] not in (["class 0"], []))


@pytest.mark.parametrize(
    ("met", "names", "says"),
    [
        (["dgo"], NAMES, "its label 'dgo' is none of the 3 names in the class file: did you mean 'dog'?"),
        (["xyz"], NAMES, "its label 'xyz' is none of the 3 names in the class file: it has 'cat', 'dog', '747'"),
        (["747", "A320"], None, "labels are all numbers or all texts; mend the set, or list every name with --classes FILE"),
        ([1, "cat"], NAMES, "its label is the number 1, while x.tar sample 'cat' has the text 'cat'"),
        (["1", "747"], NAMES, "its label is the number 1, while x.tar sample '747' has the text '747'"),
        ([3], NAMES, "class number 3, but the class file has 3 names: add the missing names"),
        (["3"], NAMES, "class number 3, but the class file has 3 names"),
        ([CLASSES_LIMIT], None, "class number 1000000 is above 999,999, the most without --classes FILE: renumber"),
        (["crane"], ["crane", "crane"], "the class file has the name 'crane' more than once"),
    ],
)
def test_labels_that_have_no_number(met: list[int | str], names: list[str] | None, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        numbering({one: f"x.tar sample '{one}'" for one in met}, names)
    assert says in str(caught.value)


def test_a_text_that_is_neither_name_nor_number_has_none() -> None:
    with pytest.raises(KeyError):
        numbering({"cat": ""}, None).number("dog")


def test_a_subset_has_the_settings_of_the_set_it_was_chosen_from() -> None:
    root = {"role": "data", "kind": "dataset", "inputs": [], "config": {"image_member": "png", "label_member": "txt"}}
    middle = {
        "role": "data",
        "kind": "subset",
        "inputs": [{"role": "scores", "kind": "scores", "inputs": [], "config": {}}, root],
        "config": {},
    }
    assert Members.of({"kind": "subset", "inputs": [middle], "config": {"image_member": "no"}}) == Members("png", "txt")
    assert Members.of({"kind": "dataset", "inputs": [], "config": {"source": "folder"}}) == Members()
