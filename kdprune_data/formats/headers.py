"""The headers of a tar, USTAR's, PAX's and GNU's: numbers, names, checksums, and every way in which a file is not a tar to be read.

`tar.walk` walks; what it meets is read and judged here. Sources: POSIX.1-1988 (ustar), POSIX.1-2001 (pax), the GNU tar manual.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np

from kdprune_data.errors import SourceError

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")

_OTHERS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
}


class Buffer(Protocol):
    """The bytes of a tar: in memory, mapped, or read from its file slice by slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


def check_tar(buffer: Buffer, name: str) -> None:
    """Raise SourceError for a compressed file, and for one too short to be a tar."""
    first = bytes(buffer[:8])
    for magic, (kind, unpack) in _COMPRESSED.items():
        if first.startswith(magic):
            raise SourceError(
                f"{name} is compressed ({kind}): samples are read in place, which that does not allow; `{unpack} {name} > NEW.tar` first"
            )
    if len(buffer) < BLOCK:
        raise SourceError(f"{name} is not a tar, or is truncated: it has {len(buffer):,} bytes, a tar {BLOCK} at least; fetch it again")


def check_end(buffer: Buffer, at: int, name: str) -> None:
    """Raise SourceError when anything but zeros follows the end mark at a byte: readers would differ on whether that is there."""
    step = 1 << 20
    for start in range(at, len(buffer), step):
        if bytes(buffer[start : start + step]).strip(b"\0"):
            raise SourceError(
                f"{name} goes on after its end mark at byte {at:,}, as tars put behind one another do: what follows would not be read; "
                f"unpack it (tar --ignore-zeros) and pack it again"
            )


def not_a_file(tar: str, member: str, kind: bytes) -> SourceError:
    """The error for a member that is no regular file. `kind`: its type byte."""
    what = _OTHERS.get(kind, f"of unknown type {kind!r}")
    return SourceError(f"{tar}: member {member!r} is {what}: only regular files are read; pack the set again without it")


def number(field: bytes, name: str, at: int) -> int:
    """The number in a size field, octal or GNU's base 256. Raises SourceError for what is none."""
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


def text(raw: bytes) -> str:
    """The text of a field that ends with NUL; bytes that are no UTF-8 are carried along, for `safe` to refuse."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def name_in(head: bytes) -> str:
    """The name in a header of 512 bytes."""
    # The prefix field is POSIX's; in GNU's own headers (magic "ustar  ") those bytes hold times.
    prefix = text(head[345:500]) if head[257:263] == b"ustar\0" else ""
    return f"{prefix}/{text(head[:100])}" if prefix else text(head[:100])


def pax(body: bytes, name: str, header: int) -> tuple[str | None, int | None]:
    """The path and size that a PAX header overrides: records `LENGTH KEY=VALUE LF`. `name`: the tar's; `header`: at which byte it stands.

    Raises SourceError when it does not parse, or says that the member is a sparse file.
    """
    path, size, sparse, at = None, None, False, 0
    while at < len(body):
        digits = body[at:].partition(b" ")[0]
        end = at + (int(digits) if digits.isdigit() else 0)
        key, _, value = body[at + len(digits) + 1 : end - 1].partition(b"=")
        if not at + len(digits) < end <= len(body) or (key == b"size" and not value.isdigit()):
            raise SourceError(f"{name}: the PAX header at byte {header:,} does not parse: the tar is damaged; fetch it again")
        sparse |= key.startswith(b"GNU.sparse.")
        if key in (b"path", b"GNU.sparse.name"):
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
        at = end
    if sparse:
        raise not_a_file(name, path or f"at byte {header:,}", b"S")
    return path, size


def safe(member_name: str, tar: str) -> str:
    """A member's name as it is used. Raises SourceError for one that points outside, is no UTF-8, or holds a line's end."""
    plain = member_name.removeprefix("./")
    if plain.startswith("/") or (".." in plain and ".." in PurePosixPath(plain).parts):
        raise SourceError(f"{tar}: member {member_name!r} points outside the tar: pack the set again with plain relative names")
    if not plain.isascii() and any("\udc80" <= c <= "\udcff" for c in plain):  # bytes that `surrogateescape` carried along
        raise SourceError(f"{tar}: the name of member {member_name!r} is not UTF-8: pack the set again with names that are")
    if "\n" in plain or "\0" in plain:
        raise SourceError(f"{tar}: the name of member {member_name!r} holds an end of line: pack the set again with names on one line")
    return plain


def check_sums(buffer: Buffer, headers: Sequence[int], name: str) -> None:
    """Header checksums, all at once: gathered as a matrix, since a Python loop over 512 bytes costs more than the whole walk."""
    for first in range(0, len(headers), 4096):
        starts = headers[first : first + 4096]
        heads = np.frombuffer(b"".join(buffer[at : at + BLOCK] for at in starts), np.uint8).reshape(-1, BLOCK)
        sums = heads.sum(1, dtype=np.int64) - heads[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
        for at, head, total in zip(starts, heads[:, 148:156], sums, strict=True):
            if not states(head.tobytes(), total):
                what = "damaged" if at else "not a tar, or damaged"
                raise SourceError(f"{name} is {what}: the header at byte {at:,} fails its checksum; fetch it again")


def states(field: bytes, total: int) -> bool:
    """Whether a checksum field writes a total."""
    try:
        return _octal(field) == total
    except ValueError:
        return False
