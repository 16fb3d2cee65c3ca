"""Tar at the level of bytes: write USTAR members, find the members of any tar, group them into samples.

Writing is a header and a payload; reading is one chained walk over the headers, by offset, that never touches the payloads. PAX and GNU
long names are read; only USTAR is written. A *record* is the run of bytes that holds one sample: it can be copied as it stands.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from kdprune_data.errors import SourceError
from kdprune_data.formats import headers, plain
from kdprune_data.formats.headers import BLOCK as BLOCK  # where others look for it
from kdprune_data.formats.headers import Buffer as Buffer
from kdprune_data.formats.plain import Files

END = bytes(2 * BLOCK)
MOST_BYTES = 8**11 - 1
"""A member's size stands in 11 octal digits."""

_BLANK = bytearray(BLOCK)
_BLANK[100:156] = b"0000644\0" + b"0000000\0" * 2 + b"0" * 11 + b"\0" + b"0" * 11 + b"\0" + b" " * 8
_BLANK[156:157] = b"0"
_BLANK[257:265] = b"ustar\00000"
_HEADER = bytes(_BLANK)
_BARE_SUM = sum(_HEADER)
_BARE_SIZE_SUM = sum(_HEADER[124:136])
_LEFT_OVER = re.compile(r"(^|/)(PaxHeaders?(\.\d+)?|__MACOSX)/")
"""Folders in which tar programs that did not know PAX headers, and macOS, leave what they know of each file, under the file's own name."""


def padded(size: int) -> int:
    """A payload's length in the tar: up to the next multiple of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> bytes:
    """One USTAR member, header and padded payload: mode 0644, times and owners 0. `name`: at most 100 ASCII bytes.

    Raises SourceError for a longer name, and more data than a header can tell. Source: POSIX.1-1988, the ustar interchange format.
    """
    return b"".join((header(name, len(data)), data, bytes(padded(len(data)) - len(data))))


def header(name: str, size: int) -> bytes:
    """The header of a member with `size` bytes of data. Raises SourceError as `member` does."""
    raw = name.encode("ascii")
    if not 0 < len(raw) <= 100:
        raise SourceError(f"member name {name!r} is {len(raw)} bytes long: at most 100 fit a tar header; shorten the file's name")
    if size > MOST_BYTES:
        raise SourceError(f"member {name!r} has {size:,} bytes: at most {MOST_BYTES:,} fit a tar header; leave it out, or cut it")
    octal = b"%011o\0" % size
    total = _BARE_SUM - _BARE_SIZE_SUM + sum(octal) + sum(raw)
    head = b"%b%b%b%b%b" % (raw.ljust(100, b"\0"), _HEADER[100:124], octal, _HEADER[136:148], b"%06o\0 " % total)
    return head + _HEADER[156:]


class Member(NamedTuple):
    """A file in a tar: `start` of its first header (PAX and GNU name headers included), `data` of its payload, `size` in bytes."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header may stand."""
        return self.data + padded(self.size)


class Record(NamedTuple):
    """The run of bytes that holds one sample. `members` maps lower-case extensions to members."""

    key: str
    offset: int
    length: int
    members: dict[str, Member]


def scan(buffer: Buffer, name: str) -> list[Member]:
    """Every regular file in a tar, in order. `name` is the tar's own, for messages.

    Raises SourceError for what is no tar, a truncated or damaged one, several behind one another, links, devices and sparse files, and
    names that are absolute or climb out with `..`.
    """
    return list(_members(buffer, name))


def files(buffer: Buffer, name: str) -> Files | None:
    """`scan` of a plain tar, a column each; None for what is left to `walk`. Raises SourceError as `scan` does, where it is not left."""
    headers.check_tar(buffer, name)
    found = plain.files(buffer)
    if found is not None:
        headers.check_end(buffer, found.end, name)
    return found


def _members(buffer: Buffer, name: str) -> Iterable[Member]:
    """See `scan`; all is checked before the first one is yielded."""
    found = files(buffer, name)
    if found is None:
        return walk(buffer, name)
    return map(Member._make, zip(found.names, *(column.tolist() for column in found[1:4]), strict=True))


def walk(buffer: Buffer, name: str) -> list[Member]:
    """`scan` of what is not plain: header by header, each in all the forms that there are."""
    found: list[Member] = []
    starts: list[int] = []
    at, start, size_end = 0, -1, len(buffer)
    long_name: str | None = None
    long_size: int | None = None
    while at + BLOCK <= size_end:
        head = bytes(buffer[at : at + BLOCK])
        kind = head[156:157]
        if head[0] == 0 and not any(head):
            break
        starts.append(at)
        size = headers.number(head[124:136], name, at)
        if long_size is not None and kind in headers.REGULAR:
            size, long_size = long_size, None
        data = at + BLOCK
        if data + padded(size) > size_end:
            raise _truncated(name, at, data + padded(size), size_end)
        start = at if start < 0 else start
        if kind == b"x":
            path, long_size = headers.pax(bytes(buffer[data : data + size]), name, at)
            long_name = path or long_name
        elif kind == b"L":
            long_name = headers.text(bytes(buffer[data : data + size]))
        elif kind in (b"g", b"K", b"5"):
            long_name = None if kind == b"5" else long_name
            start = -1 if kind != b"K" else start
        elif kind in headers.REGULAR:
            found.append(Member(headers.safe(long_name or headers.name_in(head), name), start, data, size))
            long_name, start = None, -1
        else:
            raise headers.not_a_file(name, long_name or headers.name_in(head), kind)
        at = data + padded(size)
    else:  # no block of zeros met: what is missing may be whole members
        raise SourceError(f"{name} is truncated: it ends at byte {size_end:,} without a tar's end mark; fetch it again")
    headers.check_sums(buffer, starts, name)
    headers.check_end(buffer, at, name)
    return found


def _truncated(name: str, at: int, end: int, size: int) -> SourceError:
    return SourceError(f"{name} is truncated: a member at byte {at:,} ends at {end:,}, the file at {size:,}; fetch it again")


def records(buffer: Buffer, name: str) -> Iterator[Record]:
    """The samples of a tar, by webdataset's rule: members whose names agree up to the first dot of the last path part.

    Names without such a dot belong to no sample, nor do hidden ones (macOS's `._NAME`) and those in folders that tar programs leave behind.
    Raises SourceError when a sample's members are not contiguous, or on what `scan` refuses.
    """
    seen: set[str] = set()
    key, members = "", dict[str, Member]()
    prefix, first, end = "/", 0, 0  # no member's name begins with a slash
    for one in _members(buffer, name):
        path, start, data, size = one
        extension = path[len(prefix) :]
        if not path.startswith(prefix) or not extension or "/" in extension:
            folder, slash, last = path.rpartition("/")
            stem, _, extension = last.partition(".")
            if not stem or not extension or (slash and _LEFT_OVER.search(path)):
                continue
            if members:
                yield Record(key, first, end - first, members)
            key, first, members = f"{folder}{slash}{stem}", start, {}
            prefix = f"{key}."
            if key in seen:
                raise SourceError(f"{name}: the members of sample {key!r} are not contiguous: pack the set again, sorted by name")
            seen.add(key)
        extension = extension.lower()
        if extension in members:
            raise SourceError(f"{name}: sample {key!r} has two members .{extension}: pack the set again with one of each")
        members[extension], end = one, data + padded(size)
    if members:
        yield Record(key, first, end - first, members)


class Maps:
    """Read-only memory maps of a list of files, the most recently used kept open. May be shared by threads."""

    def __init__(self, paths: Sequence[Path], limit: int = 64) -> None:
        self.paths = list(paths)
        self._limit = limit
        self._open: dict[int, mmap.mmap] = {}

    def __getitem__(self, n: int) -> mmap.mmap:
        # A map that is dropped here while another thread reads it lives on until that thread lets go.
        found = self._open.pop(n, None)
        if found is None:
            found = map_file(self.paths[n])
        self._open[n] = found
        if len(self._open) > self._limit:
            self._open.pop(next(iter(self._open)), None)
        return found

    def together(self, numbers: Collection[int]) -> Mapping[int, mmap.mmap] | Maps:
        """The maps of some files, by number: looked up once where they may all be open at a time, else one by one."""
        return {n: self[n] for n in numbers} if len(numbers) <= self._limit else self

    def __reduce__(self) -> tuple[object, ...]:
        return (Maps, (self.paths, self._limit))


def map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a file. Raises SourceError when it is missing or empty."""
    with opened(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise SourceError(f"{path} is empty: fetch it again") from None


def opened(path: Path) -> FileIO:
    """A file, open for reading, without a buffer. Raises SourceError when it is missing."""
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: it may have been moved; fetch it or index the set again") from None
