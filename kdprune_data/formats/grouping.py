"""The samples of a tar from the names of all its files at once: what `tar.records` finds one by one.

The names stand in one text, a line each. Where lines, folders and extensions begin is found in its bytes; keys are compared as rows of a
matrix, each with the one before. Names that are not ASCII, and samples that `tar.records` would refuse, are left to it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdprune_data.formats.headers import BLOCK
from kdprune_data.formats.plain import Files
from kdprune_data.formats.windows import I64, blocks

MOST_NAME = 256
"""Bytes of the longest name that is compared in a matrix."""
MOST_KINDS = 32
"""Extensions that are told apart."""
AT_ONCE = 65_536
"""Names in a matrix."""


class Samples(NamedTuple):
    """n samples with m members. `keys`; `starts`, `ends`: of their records, int64 of shape (n,); `files`, `sample`: for each member its
    place among the files of the tar and its sample's place, int64 of shape (m,); `extensions`: those that there are, in lower case, and
    `kinds`: for each member the place of its own among them, int64 of shape (m,)."""

    keys: list[str]
    starts: I64
    ends: I64
    files: I64
    sample: I64
    extensions: list[str]
    kinds: I64

    def only(self, extensions: Collection[str]) -> I64 | None:
        """For each sample the place among the files of its member with one of some extensions, -1 where there is none; None where a sample
        has more than one. int64 of shape (n,)."""
        those = np.isin(self.kinds, [n for n, extension in enumerate(self.extensions) if extension in extensions])
        if np.bincount(self.sample[those], minlength=1).max() > 1:
            return None
        found = np.full(len(self.keys), -1, np.int64)
        found[self.sample[those]] = self.files[those]
        return found


class _Parts(NamedTuple):
    """Where in the text of all names the parts of each name that belongs to a sample are: its line begins, its dot stands, its line ends;
    `files`: which names these are."""

    files: I64
    begins: I64
    dots: I64
    ends: I64


def samples(found: Files) -> Samples | None:
    """The samples that files make. None for what is left to `tar.records`."""
    whole = "\n".join(found.names)
    if not found.names or not whole.isascii():
        return None
    text = np.frombuffer(whole.encode() + b"\n", np.uint8)
    parts = _parts(text)
    if not len(parts.files) or int((parts.ends - parts.begins).max()) > MOST_NAME or _has_leftovers(whole):
        return None
    fresh = ~_same_key(text, parts)
    first = np.flatnonzero(fresh)
    sizes = parts.dots - parts.begins
    keys = [found.names[file][:size] for file, size in zip(parts.files[first].tolist(), sizes[first].tolist(), strict=True)]
    extensions, kinds = _extensions(text, parts)
    sample = np.cumsum(fresh) - 1
    pairs = np.sort(sample * len(extensions) + kinds, kind="stable")  # all but sorted already
    if len(extensions) > MOST_KINDS or len(set(keys)) < len(keys) or (pairs[1:] == pairs[:-1]).any():
        return None
    last = np.append(first[1:], len(fresh)) - 1
    ends = found.data + blocks(found.sizes) * BLOCK
    return Samples(keys, found.starts[parts.files[first]], ends[parts.files[last]], parts.files, sample, extensions, kinds)


def _has_leftovers(whole: str) -> bool:
    """Something may stand in a folder that tar programs leave behind."""
    return "PaxHeader" in whole or "__MACOSX" in whole


def _parts(text: NDArray[np.uint8]) -> _Parts:
    """Names with a key and an extension: a dot in their last part, which does not begin with it, and something behind it."""
    ends = np.flatnonzero(text == ord("\n"))
    begins = np.append(0, ends[:-1] + 1)
    last = begins
    slashes = np.flatnonzero(text == ord("/"))
    if len(slashes):
        before = np.searchsorted(slashes, ends) - 1
        last = np.maximum(begins, np.where(before >= 0, slashes[before] + 1, 0))
    marks = np.append(np.flatnonzero(text == ord(".")), len(text))
    dots = marks[np.searchsorted(marks, last)]
    files = np.flatnonzero((dots > last) & (dots + 1 < ends))
    return _Parts(files, begins[files], dots[files], ends[files])


def _same_key(text: NDArray[np.uint8], parts: _Parts) -> NDArray[np.bool_]:
    """Which names have the key of the one before."""
    sizes = parts.dots - parts.begins
    width = int(sizes.max())
    padded = np.append(text, np.zeros(width, np.uint8))
    rows = np.lib.stride_tricks.sliding_window_view(padded, width)
    same = np.zeros(len(sizes), np.bool_)
    for at in range(1, len(sizes), AT_ONCE):
        some = slice(at - 1, at + AT_ONCE)
        names = rows[parts.begins[some]]
        names[np.arange(width) >= sizes[some, None]] = 0
        same[at : at + AT_ONCE] = (sizes[some][1:] == sizes[some][:-1]) & (names[1:] == names[:-1]).all(1)
    return same


def _extensions(text: NDArray[np.uint8], parts: _Parts) -> tuple[list[str], I64]:
    """The extensions that there are, in lower case, and which each name has."""
    sizes = parts.ends - parts.dots - 1
    width = int(sizes.max())
    padded = np.append(text, np.zeros(width, np.uint8))
    rows = np.lib.stride_tricks.sliding_window_view(padded, width)
    kinds = np.full(len(sizes), -1, np.int64)
    extensions: list[str] = []
    while len(missing := np.flatnonzero(kinds < 0)) and len(extensions) <= MOST_KINDS:
        one = int(missing[0])
        size, start = int(sizes[one]), int(parts.dots[one]) + 1
        alike = missing[sizes[missing] == size]
        own = (rows[parts.dots[alike] + 1][:, :size] == text[start : start + size]).all(1)
        name = text[start : start + size].tobytes().decode("ascii").lower()
        if name not in extensions:
            extensions.append(name)
        kinds[alike[own]] = extensions.index(name)
    return extensions, kinds
