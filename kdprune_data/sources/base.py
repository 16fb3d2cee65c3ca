"""What every source is: named, classed, and a stream of items whose keys and labels are known before an image is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError

KEY_BYTES = 90
READ_BYTES = 64_000_000
"""What a source may hold of what it has read and not yet handed on, unless it is told less."""
KEYS_AT_ONCE = 65_536


class Item(NamedTuple):
    """One sample: its key, the encoded image as it came, its class number (None = unlabelled), where it came from (for messages), and the
    members that go along with it, as (extension, bytes)."""

    key: str
    data: bytes
    label: int | None
    origin: str
    others: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class SourceOptions:
    """What a source may need to know. `train`: for another split, the classes of the train split that it goes with; `read_bytes`: how much
    it may hold of what it has read; the others are options of `import`, None or as below where they were not given."""

    split: str
    image_column: str | None = None
    label_column: str | None = None
    image_member: str | None = None
    label_member: str | None = None
    classes: Path | None = None
    id: str = "key"
    train: Sequence[str] = ()
    read_bytes: int = READ_BYTES


@dataclass(frozen=True)
class Outline:
    """What is known of a source's n samples before an image is read, in its order: `uids` uint64 of shape (n,); `labels` int32 of shape
    (n,), -1 = none."""

    uids: NDArray[np.uint64]
    labels: NDArray[np.int32]


class Source(Protocol):
    """A set of labelled images somewhere."""

    @property
    def name(self) -> str:
        """What kind of source it is: goes into the manifest."""
        ...

    @property
    def shuffles(self) -> bool:
        """Whether `--shuffle auto` puts it into hash order: not where its own order is somebody's choice already."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The class names, in label order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the source, for the manifest: plain JSON, no paths of this machine."""
        ...

    @property
    def outline(self) -> Outline:
        """Its samples without their images. Raises SourceError when two have the same key, or a label is none."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """Files that were passed over because they are no images."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What its user should know of its labels, a line each: that there are none, or no names of classes."""
        ...

    def __len__(self) -> int: ...

    @property
    def bytes(self) -> int:
        """About how many bytes of images there are, for planning."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


def numbered(source: Source) -> Iterator[tuple[int, Item]]:
    """The items with their places in the source. Raises SourceError when there are others than the outline says, or in another order."""
    uids = source.outline.uids
    row = -1
    for row, item in enumerate(source):
        if row == len(uids):
            raise SourceError(
                f"the source changed while it was read: it has more samples than the {len(uids):,} listed before; import it again"
            )
        if order.uids_of((item.key,))[0] != uids[row]:
            raise SourceError(f"the source changed while it was read: {item.origin} is not what was listed there before; import it again")
        yield row, item
    if row + 1 != len(uids):
        raise SourceError(f"the source changed while it was read: {row + 1:,} samples of the {len(uids):,} listed before; import it again")


def outlined(
    keys: Iterable[str], labels: NDArray[np.int32], named: Callable[[int], tuple[str, str]], advice: str = "rename one"
) -> Outline:
    """The outline of samples with these keys. `named`: (origin, key) of a row, for messages; `advice`: what to do about equal keys.

    Raises SourceError when two keys are the same, naming both origins.
    """
    feed = iter(keys)
    parts = []
    while chunk := list(islice(feed, KEYS_AT_ONCE)):
        parts.append(order.uids_of(chunk))
    uids = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    twice = order.first_repeat(uids)
    if twice is not None:
        (a, key), (b, _) = (named(row) for row in sorted(twice))
        raise SourceError(f"{a} and {b} have the same key {key!r}: {advice}")
    return Outline(uids, labels)


def listing(files: Iterable[tuple[str, int]]) -> str:
    """sha256 (hex) over `name NUL bytes LF` of a source's files: tells two sources apart without reading them, or naming their place."""
    return hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in files).encode("utf-8", "surrogateescape")).hexdigest()


def places_of(own: Sequence[str], classes: Sequence[str]) -> NDArray[np.int32]:
    """For each of a source's own classes, its place in `classes`, which holds them all: int32 of shape (len(own),)."""
    if list(own) == list(classes):  # two may have one name
        return np.arange(len(own), dtype=np.int32)
    places = {name: n for n, name in enumerate(classes)}
    return np.asarray([places[name] for name in own], np.int32)


def is_utf8(name: str) -> bool:
    """Whether a name of the file system's is text: `os` makes surrogates of bytes that are not."""
    return not any("\udc80" <= c <= "\udcff" for c in name)


def is_inside(path: str) -> bool:
    """Whether a path is relative and never climbs: what a tar's member may be called."""
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts


def key_of(path: str, advice: str = "rename the file") -> str:
    """The key of a relative path: no last extension, no dots in the last part, printable ASCII, at most 90 bytes.

    >>> key_of("cats/a.b.jpg"), key_of("ünder.png")
    ('cats/a_b', '%C3%BCnder')
    """
    pure = PurePosixPath(path)
    if not is_inside(path):
        raise SourceError(f"{path!r} makes no key: only relative paths without `..` name a sample; {advice}")
    stem = pure.name[: -len(pure.suffix)] if pure.suffix else pure.name
    plain = str(pure.with_name(stem.replace(".", "_"))) if stem else ""
    key = "".join(c if " " <= c <= "~" else quote(c, safe="", errors="surrogateescape") for c in plain)
    if not key or len(key) > KEY_BYTES:
        limit = f"{len(key)} bytes long: at most {KEY_BYTES} fit" if key else "empty"
        raise SourceError(f"{path!r} makes the key {key!r}, which is {limit}; {advice}")
    return key
