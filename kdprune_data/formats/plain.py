"""Plain tars, whose headers are read many at a time: what `tar.walk` finds one by one, in a tenth of its time.

1. `windows` finds where headers stand.
2. The headers of a window are judged, as a matrix: sizes, kinds, checksums, names.
3. Members, the PAX headers before them, and names are put together.

Plain is USTAR, and PAX as far as its headers tell times and names. Anything else, and anything wrong, is left to `tar.walk`, which reads
what can be read and says what is wrong with the rest: here no error is raised. Sources: as of `headers`.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import SourceError
from kdprune_data.formats import headers
from kdprune_data.formats.headers import BLOCK, Buffer
from kdprune_data.formats.windows import I64, U64, Window, blocks, have_magic, octal, sizes_in, windows

LEAST_BYTES = 1 << 16
"""Below this a tar has too few headers for a matrix of them to be quicker."""

_X, _FOLDER, _GLOBAL = ord("x"), ord("5"), ord("g")
TIME = b"NN mtime="
TIME_BYTES = 48
"""Of a PAX header, the bytes that are looked at for a time."""


class Files(NamedTuple):
    """The regular files of a tar, in order: `names`, and int64 of shape (n,) for where a file's first header and its data start, and how
    many bytes it has; `end`: the byte of the tar's end mark."""

    names: list[str]
    starts: I64
    data: I64
    sizes: I64
    end: int


class _Heads(NamedTuple):
    """What headers say: an entry each; `names`: of regular files alone, a line each; `paths`: of the PAX headers, by place, those with a
    path."""

    places: I64
    kinds: I64
    sizes: I64
    names: str
    paths: dict[int, str]


class _NotPlainError(Exception):
    """Something is here that only the careful walk can read, or refuse."""


def files(buffer: Buffer) -> Files | None:
    """The regular files of a plain tar; None where it is not plain, or not whole. What follows the end mark is not looked at."""
    if len(buffer) < LEAST_BYTES:
        return None
    try:
        found = [_judge(window, buffer) for window in windows(buffer)]
        return _together(found, buffer) if found else None
    except _NotPlainError:
        return None


# --- what they say


def _judge(window: Window, buffer: Buffer) -> _Heads:
    """Sizes, kinds and names of headers. Raises _NotPlainError for one that is damaged, or of a kind that is not read here."""
    heads = window.words[window.rows]
    sizes, fine = sizes_in(heads[:, 15], heads[:, 16])
    kinds = ((heads[:, 19] >> 32) & 0xFF).astype(np.int64)
    regular, pax = _are_regular(kinds), kinds == _X
    known = regular | pax | (kinds == _FOLDER) | (kinds == _GLOBAL)
    if not (fine & known & have_magic(heads) & _have_sums(heads)).all():
        raise _NotPlainError
    paths = _paths(window, sizes, np.flatnonzero(pax), buffer) if pax.any() else {}
    return _Heads(window.places, kinds, sizes, _names(heads if regular.all() else heads[regular]), paths)


def _are_regular(kinds: I64) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.logical_or.reduce([kinds == kind[0] for kind in headers.REGULAR])
    return found


def _have_sums(heads: U64) -> NDArray[np.bool_]:
    """The checksum is the sum of a header's bytes, with spaces in its own place."""
    field = (heads[:, 18] >> 32) | (heads[:, 19] << 32)
    digits = field ^ 0x2000303030303030  # six digits, a NUL and a space
    lanes = 0x00FF00FF00FF00FF  # four sums of 16 bits each in a word: at most 64 * 2 * 255
    odd = heads >> 8
    odd &= lanes
    odd += heads & lanes
    sums = odd.sum(1) - (field & lanes) - ((field >> 8) & lanes)
    total = (sums & 0xFFFF) + ((sums >> 16) & 0xFFFF) + ((sums >> 32) & 0xFFFF) + (sums >> 48) + 8 * 32
    wrong: NDArray[np.bool_] = (digits & 0xFFFFF8F8F8F8F8F8 != 0) | (octal(digits << 16) != total)
    for n in np.flatnonzero(wrong).tolist():  # written in another way, perhaps
        wrong[n] = not headers.states(int(field[n]).to_bytes(8, "little"), int(total[n]))
    return ~wrong


def _names(heads: U64) -> str:
    """The names in headers, a line each. Raises _NotPlainError where a name holds NUL: what is read of it is up to its first."""
    if not len(heads):
        return ""
    width = next(n for n in range(12, 0, -1) if n == 1 or heads[:, n - 1].any()) if not (heads[:, 12] & 0xFFFFFFFF).any() else 13
    text = np.full((len(heads), 8 * width + 1), ord("\n"), np.uint8)
    text[:, :-1] = np.ascontiguousarray(heads[:, :width]).view(np.uint8)
    text[:, 100:-1] = 0  # the mode
    if (text[:, 1:-1].astype(bool) > text[:, :-2].astype(bool)).any():
        raise _NotPlainError
    whole = text.tobytes().translate(None, b"\0")[:-1].decode("utf-8", "surrogateescape")
    prefixed = np.flatnonzero((heads[:, 43] >> 8) & 0xFF).tolist()
    if not prefixed:
        return whole
    names = whole.split("\n")
    for n in prefixed if len(names) == len(heads) else ():
        names[n] = headers.name_in(heads[n].tobytes())
    return "\n".join(names)


def _paths(window: Window, sizes: I64, pax: I64, buffer: Buffer) -> dict[int, str]:
    """The paths in PAX headers, by the place of the header. `pax`: which headers of the window are such."""
    rows, places, sizes = window.rows[pax], window.places[pax], sizes[pax]
    there = (sizes <= BLOCK) & (rows % window.width + 1 < window.width) & (rows + 1 < len(window.words))
    bodies = window.words[np.where(there, rows + 1, rows), : TIME_BYTES // 8].view(np.uint8)
    found: dict[int, str] = {}
    for n in np.flatnonzero(~(there & _only_times(bodies, sizes))).tolist():
        place, size = int(places[n]), int(sizes[n])
        try:
            path, long_size = headers.pax(bytes(buffer[place + BLOCK : place + BLOCK + size]), "", place)
        except SourceError:
            raise _NotPlainError from None
        if long_size is not None:
            raise _NotPlainError
        if path:
            found[place] = path
    return found


def _only_times(bodies: NDArray[np.uint8], sizes: I64) -> NDArray[np.bool_]:
    """Which PAX headers say one time and nothing else: `NN mtime=1234567890.123 LF`. Python's tarfile, and so webdataset's writer, puts one
    before every member, for a fraction of a second. bodies: uint8 of shape (k, TIME_BYTES), the first bytes of each."""
    digits = bodies ^ 0x30
    numbers = (digits <= 9) | (bodies == ord("."))
    at = np.arange(bodies.shape[1])
    fine = numbers | (at < len(TIME)) | (at >= sizes[:, None] - 1)
    length = digits[:, 0].astype(np.int64) * 10 + digits[:, 1]
    end = np.take_along_axis(bodies, np.clip(sizes - 1, 0, bodies.shape[1] - 1)[:, None], 1)[:, 0]
    named = (bodies[:, 2 : len(TIME)] == np.frombuffer(TIME[2:], np.uint8)).all(1)
    fitting = (length == sizes) & (sizes <= bodies.shape[1]) & (digits[:, :2] <= 9).all(1)
    found: NDArray[np.bool_] = fine.all(1) & fitting & (end == ord("\n")) & named
    return found


# --- together


def _together(found: list[_Heads], buffer: Buffer) -> Files:
    """The files that all headers make. Raises _NotPlainError where they do not, and where no end mark follows them."""
    places, kinds, sizes = (np.concatenate([getattr(heads, what) for heads in found]) for what in ("places", "kinds", "sizes"))
    end = int(places[-1]) + (1 + int(blocks(sizes[-1:])[0])) * BLOCK
    if bytes(buffer[end : end + BLOCK]) != bytes(BLOCK):
        raise _NotPlainError
    regular, pax = _are_regular(kinds), kinds == _X
    follows = np.append(False, pax[:-1])  # a PAX header belongs to the file after it
    if pax[-1] or not (regular | (kinds == _FOLDER))[follows].all():
        raise _NotPlainError
    starts = np.where(follows, np.append(0, places[:-1]), places)
    names = [name for heads in found if heads.names for name in heads.names.split("\n")]
    if len(names) != np.count_nonzero(regular):  # one is on two lines, or empty
        raise _NotPlainError
    if paths := {place: path for heads in found for place, path in heads.paths.items()}:
        names = [paths.get(start, name) for start, name in zip(starts[regular].tolist(), names, strict=True)]
    return Files(_usable(names), starts[regular], places[regular] + BLOCK, sizes[regular], end)


def _usable(names: list[str]) -> list[str]:
    """Names as they are used. Raises _NotPlainError for any that `headers.safe` might refuse."""
    whole = "\n".join(names)
    if whole.startswith("./") or "\n./" in whole:
        names = [name.removeprefix("./") for name in names]
        whole = "\n".join(names)
    climbs = ".." in whole and any(".." in PurePosixPath(name).parts for name in names)
    if climbs or whole.startswith("/") or "\n/" in whole or "\0" in whole or whole.count("\n") >= max(1, len(names)):
        raise _NotPlainError
    if not whole.isascii() and any("\udc80" <= c <= "\udcff" for c in whole):
        raise _NotPlainError
    return names
