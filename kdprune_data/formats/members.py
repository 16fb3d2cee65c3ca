"""Which members of a sample are its image and its label, and which class numbers the labels are.

Shards that others wrote name their members as they like. `Members` finds the image and the label in one record; `numbering` turns the
labels that were met, numbers or texts, into class numbers. `docs/formats.md`, "Adopted".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kdprune_data.errors import SourceError, UsageError, some
from kdprune_data.formats import tar
from kdprune_data.images import MEMBERS

JSON = "json:"
CLASSES_LIMIT = 1_000_000
"""Most classes that numbers alone may make: a larger one is no class number but an id."""
MIRRORING = "mirroring is right for photographs, wrong for digits: --flip off"
UNNAMED = f"classes are unnamed: name them with --classes FILE ({MIRRORING})"
UNLABELLED = "no sample has a label: name the members that hold them with --label-member, if there are any"


@dataclass(frozen=True)
class Members:
    """Where a sample's image and label are. `image`: the member's extension, None for the one that is an image's; `label`: `cls`, `txt` or
    `json:FIELD`."""

    image: str | None = None
    label: str = "cls"

    @classmethod
    def parse(cls, image: str | None, label: str) -> Members:
        """From the options' texts. Raises UsageError for what is no extension or no place of a label."""
        plain = None if image is None else image.removeprefix(".").lower()
        if plain is not None and (not plain or "/" in plain or plain != plain.strip()):
            raise UsageError(f"--image-member {image!r} is no extension: give what follows the key and its dot, such as jpg or rgb.png")
        if label not in ("cls", "txt") and not (label.startswith(JSON) and label.removeprefix(JSON).strip()):
            raise UsageError(f"--label-member {label!r} is none that can be read: give cls, txt or json:FIELD (dots go into nested fields)")
        return cls(plain, label)

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Members:
        """Those recorded for a data set or subset, given as an input's description: a subset has those of the set it was chosen from."""
        config = root_config(described)
        return cls(config.get("image_member"), config.get("label_member", "cls"))

    def image_of(self, record: tar.Record, where: str) -> tar.Member:
        """The image member. `where`: the shard, for messages. Raises SourceError unless there is exactly one."""
        have = " ".join(f".{extension}" for extension in record.members)
        if self.image is not None:
            if self.image not in record.members:
                raise SourceError(f"{where} sample {record.key!r} has no member .{self.image} among {have}: mend it, or name another")
            return record.members[self.image]
        found = [e for e in MEMBERS if e in record.members]
        if len(found) != 1:
            many = "more than one" if found else "no"
            advice = f"say which with --image-member {found[0]}" if found else "expected one, or name it with --image-member EXT"
            raise SourceError(f"{where} sample {record.key!r} has {many} image among its members {have}: {advice}")
        return record.members[found[0]]

    def label_of(self, buffer: tar.Buffer, record: tar.Record, where: str) -> int | str | None:
        """The label as it stands: a class number (`cls`, a number in JSON), a text (`txt`, a string in JSON), or None where there is none.

        Raises SourceError, naming shard, sample and value, for anything else.
        """
        member = record.members.get(self.label_extension)
        if member is None:
            return None
        return self.label_in(bytes(buffer[member.data : member.data + member.size]), where, record.key)

    @property
    def label_extension(self) -> str:
        """The extension of the member that holds the label."""
        return "json" if self.label.startswith(JSON) else self.label

    def label_in(self, raw: bytes, where: str, key: str) -> int | str | None:
        """The label in the bytes of its member. `where`, `key`: the shard and the sample, for messages. Raises as `label_of` does."""
        extension = self.label_extension
        if extension == "cls" and raw.isdigit() and len(raw) < 10:
            return int(raw)
        at = f"{where} sample {key!r}"
        if extension == "json":
            return _from_json(raw, self.label.removeprefix(JSON), at)
        return _class_number(raw.strip(), at) if extension == "cls" else _text(raw, at, "its .txt member")


def root_config(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the data set that a subset, given as an input's description, was chosen from in the end; a data set's is its own."""
    while described["kind"] == "subset":
        described = next(one for one in described["inputs"] if one["role"] == "data")
    found: Mapping[str, Any] = described["config"]
    return found


def _class_number(text: bytes, at: str) -> int:
    if not text.isdigit() or len(text) > 10 or int(text) >= 2**31:
        raise SourceError(f"{at}: its .cls member is {text[:20]!r}, not a class number; mend the set")
    return int(text)


def _text(raw: bytes, at: str, what: str) -> str:
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise SourceError(f"{at}: {what} is {raw[:20]!r}, not UTF-8 text; mend the set") from None
    if not text or "\n" in text:
        raise SourceError(f"{at}: {what} is {text[:40]!r}, not a label on one line; mend the set")
    return text


def _from_json(raw: bytes, field: str, at: str) -> int | str | None:
    try:
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise SourceError(f"{at}: its .json member is {raw[:20]!r}, not a JSON object; mend the set") from None
    found = _field(value, field)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, str):
        return _text(found.encode("utf-8", "surrogatepass"), at, f"the field {field!r} of its .json member")
    if found is None or (isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**31):
        return found
    raise SourceError(f"{at}: the field {field!r} of its .json member is {str(found)[:40]!r}, no class number and no text; mend the set")


def _field(value: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none; a field whose own name holds the dots goes first."""
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return _field(value.get(head), rest) if rest else None


@dataclass(frozen=True)
class Numbering:
    """Which class number each label is. `names`: the classes, in label order; `named`: the numbers had names, or the labels were texts."""

    names: Sequence[str]
    named: bool

    def number(self, label: int | str | None) -> int | None:
        """A label's class number, None for none: a text is its place among the names, else the number that its digits write.

        Raises KeyError for a text that is neither.
        """
        if not isinstance(label, str):
            return label
        found = self._places.get(label)
        if found is None and not is_number(label):
            raise KeyError(label)
        return int(label) if found is None else found

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: n for n, name in enumerate(self.names)}


def numbering(met: Mapping[int | str, str], names: Sequence[str] | None) -> Numbering:
    """How the labels that were met are numbered. `met`: each distinct label and where it was met first; `names`: the class list, if given.

    Numbers, and texts that all are numbers, stand as they are; other texts are places in the class list, or without one among them all,
    sorted.
    Raises SourceError for a mix, a text that is not in the list, and a number that the list or CLASSES_LIMIT does not reach.
    """
    texts = {label for label in met if isinstance(label, str)}
    named = texts & set(names or ())
    words = {text for text in texts - named if not is_number(text)}
    if names is not None and words:
        raise _unknown_class(min(words), met, names)
    numbers = [label for label in met if label not in named and label not in words]
    if numbers and (named or words):
        number, word = min(numbers, key=str), min(named or words)
        raise SourceError(
            f"{met[number]}: its label is the number {number}, while {met[word]} has the text {word!r}: labels are all numbers or all "
            f"texts; mend the set" + ("" if names is not None else ", or list every name with --classes FILE")
        )
    if names is None and words:
        return Numbering(sorted(words), named=True)
    if named:
        _check_once(names or (), named)
    top = max(numbers, key=int, default=-1)
    if names is None and int(top) >= CLASSES_LIMIT:
        raise SourceError(f"{met[top]}: class number {top} is above {CLASSES_LIMIT - 1:,}, the most without --classes FILE: renumber")
    if names is not None and int(top) >= len(names):
        raise SourceError(f"{met[top]}: class number {top}, but the class file has {len(names):,} names: add the missing names")
    return Numbering(list(names) if names is not None else invented(int(top) + 1), named=names is not None)


def classes_of(own: Sequence[str], train: Sequence[str]) -> Sequence[str]:
    """The class list of a split whose own is `own`: train's where that holds them all, as a val or test split may lack a class.

    >>> classes_of(["cat", "dog"], ["ant", "cat", "dog"]), classes_of(["cat", "eel"], ["ant", "cat"])
    (['ant', 'cat', 'dog'], ['cat', 'eel'])
    """
    plain = len(set(own)) == len(own) and len(set(train)) == len(train)  # ImageNet has two classes named `crane`: no name tells which
    return train if plain and set(own) <= set(train) else own


def classes_beside(train: Sequence[str], own: Sequence[str], *, named: bool) -> Sequence[str]:
    """The class list of a val or test split: train's where it holds all of its own, by name, or by number where neither has names."""
    if not named and list(train) != invented(len(train)):
        return own
    return classes_of(own, train)


def invented(n: int) -> list[str]:
    """The names of n classes that have none."""
    return [f"class {i}" for i in range(n)]


def is_number(text: str) -> bool:
    """Whether a text writes a class number in decimal digits."""
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**31


def _unknown_class(text: str, met: Mapping[int | str, str], names: Sequence[str]) -> SourceError:
    near = difflib.get_close_matches(text, names, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"it has {some(names)}"
    return SourceError(f"{met[text]}: its label {text!r} is none of the {len(names):,} names in the class file: {advice}")


def _check_once(names: Sequence[str], used: set[str]) -> None:
    twice = {name for name in used if list(names).count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise SourceError(f"the class file has the name {min(twice)!r} more than once: which class is a sample with that label? rename one")
