"""What every source is: named, classed, and a stream of items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from kdprune_data.errors import SourceError

KEY_BYTES = 90


class Item(NamedTuple):
    """One sample: its key, the encoded image as it came, its class number (None = unlabelled), and where it came from, for messages."""

    key: str
    data: bytes
    label: int | None
    origin: str


@dataclass(frozen=True)
class SourceOptions:
    """What a source may need to know. `train`: for another split, the classes of the train split that it goes with."""

    split: str
    image_column: str | None = None
    label_column: str | None = None
    train: Sequence[str] = ()


class Source(Protocol):
    """A set of labelled images somewhere."""

    @property
    def name(self) -> str:
        """What kind of source it is: goes into the manifest."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The class names, in label order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the source, for the manifest: plain JSON, no paths of this machine."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """Files that were passed over because they are no images."""
        ...

    def __len__(self) -> int: ...

    @property
    def bytes(self) -> int:
        """About how many bytes of images there are, for planning."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


def listing(files: Iterable[tuple[str, int]]) -> str:
    """sha256 (hex) over `name NUL bytes LF` of a source's files: tells two sources apart without reading them, or naming their place."""
    return hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in files).encode("utf-8", "surrogateescape")).hexdigest()


def classes_of(own: Sequence[str], train: Sequence[str]) -> Sequence[str]:
    """The class list of a split whose own is `own`: train's where that holds them all, as a val or test split may lack a class.

    >>> classes_of(["cat", "dog"], ["ant", "cat", "dog"]), classes_of(["cat", "eel"], ["ant", "cat"])
    (['ant', 'cat', 'dog'], ['cat', 'eel'])
    """
    plain = len(set(own)) == len(own) and len(set(train)) == len(train)  # ImageNet has two classes named `crane`: no name tells which
    return train if plain and set(own) <= set(train) else own


def is_inside(path: str) -> bool:
    """Whether a path is relative and never climbs: what a tar's member may be called."""
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts


def key_of(path: str) -> str:
    """The key of a relative path: no last extension, no dots in the last part, printable ASCII, at most 90 bytes.

    >>> key_of("cats/a.b.jpg"), key_of("ünder.png")
    ('cats/a_b', '%C3%BCnder')
    """
    pure = PurePosixPath(path)
    if not is_inside(path):
        raise SourceError(f"{path!r} makes no key: only relative paths without `..` name a sample; rename the file")
    stem = pure.name[: -len(pure.suffix)] if pure.suffix else pure.name
    plain = str(pure.with_name(stem.replace(".", "_"))) if stem else ""
    key = "".join(c if " " <= c <= "~" else quote(c, safe="", errors="surrogateescape") for c in plain)
    if not key or len(key) > KEY_BYTES:
        limit = f"{len(key)} bytes long: at most {KEY_BYTES} fit" if key else "empty"
        raise SourceError(f"{path!r} makes the key {key!r}, which is {limit}; rename the file")
    return key
