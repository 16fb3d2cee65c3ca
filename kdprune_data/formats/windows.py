"""Where the headers of a tar stand, found many at a time: the first half of `plain`, which see.

Where members are small, a window of the tar is read, every block of it that has the magic of a header is a candidate, and the chain is
verified for all of them at once: each ends where the next one stands. Where members are large, the chain is walked from size to size, and
only the blocks of the headers are read. Blocks are handled as rows of 64 words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdprune_data.formats.headers import BLOCK, Buffer

I64 = NDArray[np.int64]
U64 = NDArray[Any]
"""Words of 64 bits; numpy's stubs take such a word and a whole number together for signed."""

WINDOW = 4096
"""Blocks that are read at a time where members are small."""
NEAR = 3
"""Blocks that are read with a header where members are large: after that of a label stand the label and the header of the next image."""
FAR = 64
"""Blocks between two headers, on average, from which on members are large: reading so many takes as long as asking for a few."""
AT_ONCE = 2048
"""Headers of large members that are found together."""


class Window(NamedTuple):
    """Headers that were found together. `words`: blocks of the tar, uint64 of shape (m, 64), `width` of them in a row; `rows`: which of
    them are headers; `places`: at which byte each stands."""

    words: U64
    width: int
    rows: I64
    places: I64


def windows(buffer: Buffer) -> Iterator[Window]:
    """All headers that follow one another from the first byte on."""
    at, far = 0, False
    while True:
        found = _far(buffer, at) if far else _close(buffer, at)
        if found is None:
            return
        window, end = found
        yield window
        far = end - at > FAR * BLOCK * len(window.rows)
        at = end


def _close(buffer: Buffer, at: int) -> tuple[Window, int] | None:
    """The headers of a window that begins with one, and the byte at which the next one stands; None where it begins with none."""
    read = buffer[at : at + WINDOW * BLOCK]
    words = np.frombuffer(read, "<u8", len(read) // BLOCK * 64).reshape(-1, 64)
    rows = np.flatnonzero(have_magic(words))
    if not len(rows) or rows[0]:
        return None
    sizes, fine = sizes_in(words[rows, 15], words[rows, 16])
    after = rows + 1 + blocks(sizes)
    if not fine.all() or not np.array_equal(after[:-1], rows[1:]):  # there are tars, or texts on them, among the files
        kept = _chained(rows.tolist(), after.tolist(), fine.tolist())
        rows, after = rows[kept], after[kept]
    if not len(rows):
        return None
    return Window(words, WINDOW, rows, at + rows * BLOCK), at + int(after[-1]) * BLOCK


def _chained(rows: list[int], after: list[int], fine: list[bool]) -> list[int]:
    """Of the candidates (places among them), those that stand where the one before ends."""
    places = {row: n for n, row in enumerate(rows)}
    kept: list[int] = []
    at = 0
    while (n := places.get(at)) is not None and fine[n]:
        kept.append(n)
        at = after[n]
    return kept


def _far(buffer: Buffer, at: int) -> tuple[Window, int] | None:
    """As `_close`, for headers that stand far apart: few blocks are read at each, and the next one's place follows from its size.

    What it makes of the size of a damaged header is no matter: `_judge` holds every header against its checksum.
    """
    read, rows, places = list[bytes](), list[int](), list[int]()
    width, base, first = NEAR * BLOCK, -NEAR * BLOCK, -NEAR
    up, down, window = 2 * BLOCK - 1, -BLOCK, b""
    while len(places) < AT_ONCE:
        if (offset := at - base) > width - BLOCK:
            window = bytes(buffer[at : at + width])
            base, offset, first = at, 0, first + NEAR
            read.append(window)
        try:
            size = int(window[offset + 124 : offset + 135], 8)
        except ValueError:  # the end mark, or what is no size
            break
        places.append(at)
        rows.append(first + offset // BLOCK)
        at += (size + up) & down
    if not places:
        return None
    read[-1] = read[-1].ljust(width, b"\0")
    words = np.frombuffer(b"".join(read), "<u8").reshape(-1, 64)
    return Window(words, NEAR, np.array(rows, np.int64), np.array(places, np.int64)), at


def have_magic(words: U64) -> NDArray[np.bool_]:
    """`ustar` stands at byte 257, where all but the oldest tars have it."""
    found: NDArray[np.bool_] = (words[:, 32] & 0x0000FFFFFFFFFF00) == int.from_bytes(b"\0ustar\0\0", "little")
    return found


def sizes_in(first: U64, last: U64) -> tuple[I64, NDArray[np.bool_]]:
    """The sizes in headers, and which of them are 11 octal digits and a NUL or a space. `first`, `last`: bytes 120 to 127, 128 to 135."""
    high, low = (first >> 32) ^ 0x30303030, last ^ 0x0030303030303030
    fine = ((high & 0xF8F8F8F8) | (low & 0xDFF8F8F8F8F8F8F8)) == 0
    return (octal(high << 32).astype(np.int64) << 21) + octal(low << 8).astype(np.int64), fine


def octal(digits: U64) -> U64:
    """The number that 8 octal digits are, one a byte, the first in the lowest."""
    pairs = ((digits << 3) + (digits >> 8)) & 0x00FF00FF00FF00FF
    fours = ((pairs << 6) + (pairs >> 16)) & 0x0000FFFF0000FFFF
    return ((fours << 12) + (fours >> 32)) & 0xFFFFFFFF


def blocks(sizes: I64) -> I64:
    """The blocks that files of some sizes take."""
    return (sizes + (BLOCK - 1)) >> 9
