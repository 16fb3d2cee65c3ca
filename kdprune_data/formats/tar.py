"""Tar at the level of bytes: write USTAR members, find the members of any tar, group them into samples.

Writing is a header and a payload; reading is one chained walk over the headers, by offset, that never touches the payloads. PAX and GNU
long names are read; only USTAR is written. A *record* is the run of bytes that holds one sample: it can be copied as it stands.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from kdprune_data.errors import SourceError

BLOCK = 512
END = bytes(2 * BLOCK)
Buffer = bytes | mmap.mmap | memoryview

_BLANK = bytearray(BLOCK)
_BLANK[100:156] = b"0000644\0" + b"0000000\0" * 2 + b"0" * 11 + b"\0" + b"0" * 11 + b"\0" + b" " * 8
_BLANK[156:157] = b"0"
_BLANK[257:265] = b"ustar\00000"
_HEADER = bytes(_BLANK)
_BARE_SUM = sum(_HEADER)
_BARE_SIZE_SUM = sum(_HEADER[124:136])
_KEY = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_LINKS_AND_DEVICES = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


def padded(size: int) -> int:
    """A payload's length in the tar: up to the next multiple of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> bytes:
    """One USTAR member, header and padded payload: mode 0644, times and owners 0. `name`: at most 100 ASCII bytes.

    Source: POSIX.1-1988, the ustar interchange format.
    """
    raw = name.encode("ascii")
    if not 0 < len(raw) <= 100:
        raise SourceError(f"member name {name!r} is {len(raw)} bytes long: at most 100 fit a tar header; shorten the file's name")
    size = b"%011o\0" % len(data)
    total = _BARE_SUM - _BARE_SIZE_SUM + sum(size) + sum(raw)
    header = b"%b%b%b%b%b" % (raw.ljust(100, b"\0"), _HEADER[100:124], size, _HEADER[136:148], b"%06o\0 " % total)
    return b"".join((header, _HEADER[156:], data, bytes(padded(len(data)) - len(data))))


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: `start` of its first header (PAX and GNU name headers included), `data` of its payload, `size` in bytes."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header may stand."""
        return self.data + padded(self.size)


@dataclass(frozen=True, slots=True)
class Record:
    """The run of bytes that holds one sample. `members` maps lower-case extensions to members."""

    key: str
    offset: int
    length: int
    members: dict[str, Member]


def scan(buffer: Buffer, name: str) -> list[Member]:
    """Every regular file in a tar, in order. `name` is the tar's own, for messages.

    Raises SourceError for a truncated or damaged tar, links, devices, and names that are absolute or climb out with `..`.
    """
    found: list[Member] = []
    headers: list[int] = []
    at, start, size_end = 0, -1, len(buffer)
    long_name: str | None = None
    long_size: int | None = None
    while at + BLOCK <= size_end:
        head = bytes(buffer[at : at + BLOCK])
        kind = head[156:157]
        if head[0] == 0 and not any(head):
            break
        headers.append(at)
        size = _number(head[124:136], name, at)
        if long_size is not None and kind in (b"0", b"\0"):
            size, long_size = long_size, None
        data = at + BLOCK
        if data + padded(size) > size_end:
            raise _truncated(name, at, data + padded(size), size_end)
        start = at if start < 0 else start
        if kind == b"x":
            path, long_size = _pax(bytes(buffer[data : data + size]), f"{name}: the PAX header at byte {at:,}")
            long_name = path or long_name
        elif kind == b"L":
            long_name = _text(bytes(buffer[data : data + size]))
        elif kind in (b"g", b"K", b"5"):
            long_name = None if kind == b"5" else long_name
            start = -1 if kind != b"K" else start
        elif kind in (b"0", b"\0"):
            found.append(Member(_safe(long_name or _header_name(head), name), start, data, size))
            long_name, start = None, -1
        else:
            what = _LINKS_AND_DEVICES.get(kind, f"of unknown type {kind!r}")
            raise SourceError(
                f"{name}: member {_header_name(head)!r} is {what}: only regular files are read; pack the set again without it"
            )
        at = data + padded(size)
    else:  # no block of zeros met: what is missing may be whole members
        raise SourceError(f"{name} is truncated: it ends at byte {size_end:,} without a tar's end mark; fetch it again")
    _check_sums(buffer, headers, name)
    return found


def _truncated(name: str, at: int, end: int, size: int) -> SourceError:
    return SourceError(f"{name} is truncated: a member at byte {at:,} ends at {end:,}, the file at {size:,}; fetch it again")


def _number(field: bytes, name: str, at: int) -> int:
    if field[0] == 0x80:  # GNU: base 256, for sizes that 11 octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    try:
        return _octal(field)
    except ValueError:
        raise SourceError(f"{name} is not a tar, or damaged: no size in the header at byte {at:,}; fetch it again") from None


def _octal(field: bytes) -> int:
    """A number in octal digits. Raises ValueError for signs and underscores too, which `int` would take."""
    digits = field.strip(b"\0 ")
    if digits and not digits.isdigit():
        raise ValueError(field)
    return int(digits or b"0", 8)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _header_name(head: bytes) -> str:
    # The prefix field is POSIX's; in GNU's own headers (magic "ustar  ") those bytes hold times.
    prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(head[:100])}" if prefix else _text(head[:100])


def _pax(body: bytes, where: str) -> tuple[str | None, int | None]:
    """The path and size that a PAX header overrides: records `LENGTH KEY=VALUE LF`. `where` it stands, for messages."""
    path, size = None, None
    at = 0
    while at < len(body):
        digits = body[at:].partition(b" ")[0]
        end = at + (int(digits) if digits.isdigit() else 0)
        key, _, value = body[at + len(digits) + 1 : end - 1].partition(b"=")
        if not at + len(digits) < end <= len(body) or (key == b"size" and not value.isdigit()):
            raise SourceError(f"{where} does not parse: the tar is damaged; fetch it again")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
        at = end
    return path, size


def _safe(member_name: str, tar: str) -> str:
    plain = member_name.removeprefix("./")
    if plain.startswith("/") or ".." in PurePosixPath(plain).parts:
        raise SourceError(f"{tar}: member {member_name!r} points outside the tar: pack the set again with plain relative names")
    if not plain.isascii() and any("\udc80" <= c <= "\udcff" for c in plain):  # bytes that `surrogateescape` carried along
        raise SourceError(f"{tar}: the name of member {member_name!r} is not UTF-8: pack the set again with names that are")
    return plain


def _check_sums(buffer: Buffer, headers: Sequence[int], name: str) -> None:
    """Header checksums, all at once: gathered as a matrix, since a Python loop over 512 bytes costs more than the whole walk."""
    flat = np.frombuffer(buffer, np.uint8)
    for first in range(0, len(headers), 4096):
        starts = np.asarray(headers[first : first + 4096], np.int64)
        heads = flat[starts[:, None] + np.arange(BLOCK)]
        sums = heads.sum(1, dtype=np.int64) - heads[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
        for at, head, total in zip(starts, heads[:, 148:156], sums, strict=True):
            if not _states(head.tobytes(), total):
                raise SourceError(f"{name} is damaged: the header at byte {at:,} fails its checksum; fetch it again")


def _states(field: bytes, total: int) -> bool:
    try:
        return _octal(field) == total
    except ValueError:
        return False


def records(buffer: Buffer, name: str) -> Iterator[Record]:
    """The samples of a tar, by webdataset's rule: members whose names agree up to the first dot of the last path part.

    Names without such a dot belong to no sample. Raises SourceError when a sample's members are not contiguous, or on what `scan` refuses.
    """
    seen: set[str] = set()
    key, members = "", dict[str, Member]()
    for one in scan(buffer, name):
        match = _KEY.match(one.name)
        if match is None:
            continue
        if match[1] != key:
            if members:
                yield _record(key, members)
            key, members = match[1], {}
            if key in seen:
                raise SourceError(f"{name}: the members of sample {key!r} are not contiguous: pack the set again, sorted by name")
            seen.add(key)
        extension = match[2].lower()
        if extension in members:
            raise SourceError(f"{name}: sample {key!r} has two members .{extension}: pack the set again with one of each")
        members[extension] = one
    if members:
        yield _record(key, members)


def _record(key: str, members: dict[str, Member]) -> Record:
    start = next(iter(members.values())).start
    return Record(key, start, max(m.end for m in members.values()) - start, members)


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

    def __reduce__(self) -> tuple[object, ...]:
        return (Maps, (self.paths, self._limit))


def map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a file. Raises SourceError when it is missing or empty."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: it may have been moved; fetch it or index the set again") from None
    except ValueError:
        raise SourceError(f"{path} is empty: fetch it again") from None
