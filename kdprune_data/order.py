"""All order in the project: which sample comes first, in a shuffle, a selection, a view or an epoch.

Everything here is a pure function of (the sample's id, a seed, a purpose). An id becomes a 64-bit `uid` (BLAKE2b); a uid, a seed and a
purpose become a 64-bit hash (splitmix64's finaliser, three times). Whoever needs an order sorts by such hashes. So no order depends on a
random generator's state or version, on the order of files, on the number of workers, or on what other samples there are: a data set that
grows or is packed anew keeps the relative order of the samples it had. `docs/formats.md`, "Order", states the constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from decimal import ROUND_FLOOR, Decimal, InvalidOperation, localcontext

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import UsageError

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

SHARDS_IN_A_GROUP = 16
"""Shards that are shuffled into one another while training; a streaming reader holds this many open."""


def uids_of(ids: Iterable[str]) -> U64:
    """The 64-bit names of samples: BLAKE2b with an 8-byte digest of each id's UTF-8, read as a little-endian integer.

    Returns uint64 of shape (n,), in the order given.
    """
    begin = hashlib.blake2b(digest_size=8).copy  # faster than a fresh one
    digests = []
    for one in ids:
        hashing = begin()
        hashing.update(one.encode())
        digests.append(hashing.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def mix(x: U64) -> U64:
    """splitmix64's step and finaliser: a bijection of 64-bit integers whose every output bit depends on every input bit.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def order_hash(uids: U64, seed: int, purpose: str) -> U64:
    """A 64-bit hash of each uid for one seed and one purpose; distinct uids have distinct hashes.

    `mix(mix(mix(P) ^ seed) ^ uid)`, P being the purpose's own uid. Two purposes (or two seeds) give unrelated orders.

    Returns uint64 of shape (n,). Raises UsageError when the seed is not in [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed} is out of range: give a whole number from 0 to 2^64 - 1")
    key = mix(mix(uids_of([purpose])) ^ np.uint64(seed))
    return mix(key ^ np.asarray(uids, dtype=np.uint64))


def derived(seed: int, purpose: str) -> int:
    """A seed for one purpose, in [0, 2**63): so that no two random streams of a run are the same one.

    The upper 63 bits of `order_hash` of the empty id. Raises UsageError as `order_hash` does.
    """
    return int(order_hash(uids_of([""]), seed, purpose)[0] >> np.uint64(1))


def unit(hashes: U64) -> NDArray[np.float64]:
    """Hashes as numbers in [0, 1): their upper 53 bits over 2**53, exact in float64. Shape as given."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fraction(text: str | float | Decimal) -> Decimal:
    """A kept fraction, read as a decimal so that 0.1 is a tenth.

    Raises UsageError unless it is a number in (0, 1].
    """
    try:
        value = Decimal(str(text))
    except InvalidOperation:
        raise UsageError(f"fraction {text!r} is not a number: give the fraction to keep, above 0 and at most 1") from None
    if not (value.is_finite() and 0 < value <= 1):
        raise UsageError(f"fraction {text} is out of range: give the fraction to keep, above 0 and at most 1")
    return value


def shortest(value: Decimal) -> str:
    """A decimal in its shortest plain form, for names: 0.50 -> 0.5, 1E-3 -> 0.001.

    >>> shortest(Decimal("0.50")), shortest(Decimal("1"))
    ('0.5', '1')
    """
    return f"{value.normalize():f}"


def keep_count(frac: Decimal, n: int) -> int:
    """How many of n samples a kept fraction is: floor(frac * n + 1/2), exactly.

    >>> keep_count(Decimal("0.5"), 5), keep_count(Decimal("0.1"), 45)
    (3, 5)
    """
    with localcontext(prec=len(frac.as_tuple().digits) + len(str(n)) + 2):  # the default of 28 digits would round long fractions
        return int((frac * n + Decimal("0.5")).to_integral_value(rounding=ROUND_FLOOR))


def locate(have: U64, wanted: U64) -> I64:
    """Where each wanted uid stands in `have` (unique uids, any order): int64 of shape (len(wanted),), -1 where absent."""
    if len(have) == 0:
        return np.full(len(wanted), -1, np.int64)
    by_uid = np.argsort(have, kind="stable")
    place = np.minimum(np.searchsorted(have, wanted, sorter=by_uid), len(have) - 1)
    rows = by_uid[place]
    return np.where(have[rows] == wanted, rows, -1).astype(np.int64)


def first_repeat(uids: U64) -> tuple[int, int] | None:
    """Two places that hold the same uid, or None."""
    by_uid = np.argsort(uids, kind="stable")
    same = np.flatnonzero(uids[by_uid][1:] == uids[by_uid][:-1])
    return (int(by_uid[same[0]]), int(by_uid[same[0] + 1])) if len(same) else None


def epoch_order(uids: U64, shards: NDArray[np.integer], *, seed: int, epoch: int) -> I64:
    """The order of training in one epoch, as places in the arrays given.

    Shards are permuted by hash(seed, epoch), taken in groups of 16, and fully permuted inside a group. It is the only order there is, in
    memory or streaming, whatever the number of workers, ranks or restarts.

    uids: uint64 of shape (n,); shards: integers of shape (n,), each sample's shard. Returns int64 of shape (n,).
    """
    names, member = np.unique(shards, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[_shards_by_hash(names, seed, epoch)] = np.arange(len(names))
    group = rank[member] // SHARDS_IN_A_GROUP
    return np.lexsort((order_hash(uids, seed, f"train-samples/{epoch}"), group)).astype(np.int64)


def shard_order(shards: NDArray[np.integer], *, seed: int, epoch: int) -> I64:
    """The shards of a data set in the order in which an epoch takes them. shards: integers of shape (n,), each sample's shard."""
    names = np.unique(shards)
    return names[_shards_by_hash(names, seed, epoch)].astype(np.int64)


def _shards_by_hash(names: NDArray[np.integer], seed: int, epoch: int) -> I64:
    return np.argsort(order_hash(names.astype(np.uint64), seed, f"train-shards/{epoch}"), kind="stable")


def batches(rows: I64 | Sequence[int], size: int) -> Iterator[I64]:
    """Consecutive batches, as few as `size` allows, all of one length or one less.

    Fixed batches would leave a last one of any length, down to a single sample, every epoch: batch normalisation then learns from noise
    (258 samples in batches of 64 lost two points of accuracy to a last batch of 2), and dropping it would break "each sample exactly once
    per epoch".
    """
    rows = np.asarray(rows, np.int64)
    count = -(-len(rows) // size)
    for n in range(count):
        yield rows[n * len(rows) // count : (n + 1) * len(rows) // count]
