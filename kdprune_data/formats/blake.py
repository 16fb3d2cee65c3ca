"""`order.uids_of` of very many ids: BLAKE2b with a digest of 8 bytes, computed of thousands of texts at once and without Python objects.

All texts of a block go through the rounds together, as four rows of the algorithm's state at a time; numpy leaves other threads to work
meanwhile. Source of the algorithm and its constants: RFC 7693. (Texts of more than 128 bytes go the usual way.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

BLOCK = 1 << 13
"""Texts that go through the rounds together: their state is a megabyte."""
LONGEST = 128
"""Bytes that one application of the compression takes."""
FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
START = np.array(
    [
        0x6A09E667F3BCC908,
        0xBB67AE8584CAA73B,
        0x3C6EF372FE94F82B,
        0xA54FF53A5F1D36F1,
        0x510E527FADE682D1,
        0x9B05688C2B3E6C1F,
        0x1F83D9ABFB41BD6B,
        0x5BE0CD19137E2179,
    ],
    np.uint64,
)
OURS = np.uint64(0x01010000 ^ 8)
"""What a digest of 8 bytes without a key adds to the first word."""
ORDER = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
"""The order of the words in a round; the last two rounds begin again."""
TURNS = (((np.uint64(32), np.uint64(32)), (np.uint64(24), np.uint64(40))), ((np.uint64(16), np.uint64(48)), (np.uint64(63), np.uint64(1))))
"""How far d and b are turned to the right (or, which is the same, to the left), in either half of a step."""


@dataclass(frozen=True)
class Texts:
    """Texts as arrow holds them, to be read 8 bytes at a time. starts, sizes: int64 of shape (n,), in bytes; data: uint8, with room behind
    the last."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, ids: pa.Array) -> Texts:
        """Of strings, or what can be told as strings; none null."""
        text = ids.cast(pa.large_string())
        offsets = (
            np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1] if len(text) else np.zeros(1, np.int64)
        )
        begin, end = int(offsets[0]), int(offsets[-1])
        data = np.zeros(end - begin + 16, np.uint8)
        if end > begin:
            data[: end - begin] = np.frombuffer(text.buffers()[2], np.uint8)[begin:end]
        return cls(offsets[:-1] - begin, np.diff(offsets), data)

    def words(self, rows: slice) -> Iterator[U64]:
        """The first 8 bytes of each text, then the next, to the end of the longest; zeros behind a text's own."""
        starts, sizes = self.starts[rows], self.sizes[rows]
        shortest, longest = (int(sizes.min()), int(sizes.max())) if len(sizes) else (0, 0)
        if shortest == longest:  # the texts stand side by side at equal distances
            for at in range(0, longest, 8):
                word = np.ndarray(len(sizes), "<u8", self.data, int(starts[0]) + at, (longest,)).copy()
                yield word & FIRST_BYTES[longest - at] if longest - at < 8 else word
            return
        anywhere = np.ndarray(len(self.data) - 7, "<u8", self.data, 0, (1,))
        for at in range(0, longest, 8):
            word = anywhere[np.minimum(starts + at, len(anywhere) - 1)]
            yield word if shortest >= at + 8 else word & FIRST_BYTES[np.clip(sizes - at, 0, 8)]

    def __len__(self) -> int:
        return len(self.sizes)


def uids(ids: pa.Array) -> U64:
    """What `order.uids_of` gives of these ids: uint64 of shape (n,). ids: strings, or what can be told as strings; none null."""
    texts = Texts.of(ids)
    found = np.empty(len(texts), np.uint64)
    long = np.flatnonzero(texts.sizes > LONGEST)
    if len(long):
        texts = Texts(texts.starts, np.where(texts.sizes > LONGEST, 0, texts.sizes), texts.data)
    for top in range(0, len(texts), BLOCK):
        rows = slice(top, min(top + BLOCK, len(texts)))
        found[rows] = _compressed(list(texts.words(rows)), texts.sizes[rows].astype(np.uint64))
    for row, text in zip(long.tolist(), ids.take(pa.array(long)).to_pylist(), strict=True):
        found[row] = int.from_bytes(hashlib.blake2b(str(text).encode(), digest_size=8).digest(), "little")
    return found


def _compressed(words: list[U64], sizes: U64) -> U64:
    """The first word of each digest. words: the texts, as `Texts.words` gives them; sizes: their bytes."""
    state = np.empty((16, len(sizes)), np.uint64)
    state[:] = np.concatenate([START, START])[:, None]
    state[0] ^= OURS
    state[12] ^= sizes
    state[14] = ~state[14]  # the one block is the last
    spare = np.empty((4, len(sizes)), np.uint64)
    a, b, c, d = (state[row : row + 4] for row in (0, 4, 8, 12))
    for number in range(12):
        order = ORDER[number % 10]
        for half, (of_d, of_b) in enumerate(TURNS):
            _add_words(a, words, order[half:8:2])
            np.add(a, b, a)
            np.bitwise_xor(d, a, d)
            _turn(d, of_d, spare)
            np.add(c, d, c)
            np.bitwise_xor(b, c, b)
            _turn(b, of_b, spare)
        for half, (of_d, of_b) in enumerate(TURNS):  # along the diagonals: each row with the next one's neighbour
            _add_words(a, words, order[8 + half :: 2])
            np.add(a[:3], b[1:], a[:3])
            np.add(a[3], b[0], a[3])
            np.bitwise_xor(d[:3], a[1:], d[:3])
            np.bitwise_xor(d[3], a[0], d[3])
            _turn(d, of_d, spare)
            np.add(c[:3], d[1:], c[:3])
            np.add(c[3], d[0], c[3])
            np.bitwise_xor(b[:3], c[1:], b[:3])
            np.bitwise_xor(b[3], c[0], b[3])
            _turn(b, of_b, spare)
    digests: U64 = (START[0] ^ OURS) ^ state[0] ^ state[8]
    return digests


def _add_words(a: U64, words: list[U64], order: tuple[int, ...]) -> None:
    for row, word in enumerate(order):
        if word < len(words):  # the others are zeros
            np.add(a[row], words[word], a[row])


def _turn(row: U64, bits: tuple[np.uint64, np.uint64], spare: U64) -> None:
    """Rotate."""
    right, left = bits
    np.right_shift(row, right, spare)
    np.left_shift(row, left, row)
    np.bitwise_or(row, spare, row)
