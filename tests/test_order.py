"""order.py against a second implementation, in plain Python integers and fractions, written from docs/formats.md ("Order") alone."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from kdprune_data import order
from kdprune_data.errors import UsageError

WORD = 2**64
IDS = ["", "a", "00000000", "00001797", "cats/a_b", "kätze/01", "shard-000000/n01440764_1", "x" * 90, "猫/1"]
SEEDS = [0, 1, 12345, 2**31, 2**63, 2**64 - 1]
PURPOSES = ["import", "holdout", "select", "view/0", "view/7", "train-samples/12"]


def ref_mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def ref_uid(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def ref_hash(uid: int, seed: int, purpose: str) -> int:
    return ref_mix(ref_mix(ref_mix(ref_uid(purpose)) ^ seed) ^ uid)


def some_uids(n: int, seed: int = 0) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(0, WORD, n + 8, np.uint64, endpoint=False))[:n]


@pytest.mark.parametrize(
    ("name", "uid"),
    [  # `printf NAME | b2sum -l 64`, bytes reversed
        ("00000000", 0xFCF46940ED7E2B0B),
        ("kätze/01", 0x006006F98B8201FB),
        ("select", 0x2EE4B96FD31AA4FC),
    ],
)
def test_uid_is_what_b2sum_says(name: str, uid: int) -> None:
    assert order.uids_of([name]).tolist() == [uid]


@pytest.mark.parametrize(
    ("x", "expected"),
    [  # the first outputs of splitmix64 from the seeds 0 and 1234567, as published with it
        (0, 0xE220A8397B1DCDAF),
        (0x9E3779B97F4A7C15, 0x6E789E6AA1B965F4),
        (1234567, 6457827717110365317),
        (1234567 + 0x9E3779B97F4A7C15, 3203168211198807973),
    ],
)
def test_mix_is_splitmix64(x: int, expected: int) -> None:
    assert order.mix(np.array([x], np.uint64)).tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "seed", "purpose", "expected"),
    [  # computed by the functions above, once; a change here would reorder everybody's data
        ("00000000", 0, "select", 16758444408302776224),
        ("kätze/01", 0, "import", 1870195931392762527),
        ("00000000", 1, "select", 15928980694429893000),
        ("00000000", 2**64 - 1, "view/7", 10158338842971058992),
        ("a", 3, "train-samples/12", 6890468921318029311),
    ],
)
def test_order_hash_known_answers(name: str, seed: int, purpose: str, expected: int) -> None:
    assert order.order_hash(order.uids_of([name]), seed, purpose).tolist() == [expected]


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_order_hash_equals_the_reference(seed: int, purpose: str) -> None:
    uids = order.uids_of(IDS)
    assert uids.tolist() == [ref_uid(name) for name in IDS]
    uids = np.concatenate([uids, np.array([0, 1, WORD - 1], np.uint64), some_uids(50, seed % 1000)])
    found = order.order_hash(uids, seed, purpose)
    assert found.dtype == np.uint64
    assert found.tolist() == [ref_hash(uid, seed, purpose) for uid in uids.tolist()]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=rf"^seed {seed} is out of range: give a whole number from 0 to 2\^64 - 1$"):
        order.order_hash(order.uids_of(["a"]), seed, "select")


@pytest.mark.parametrize(
    ("seed", "purpose"), [(0, "init/teacher"), (0, "init/student"), (1, "init/teacher"), (7, "dropout/0"), (2**64 - 1, "views/teacher")]
)
def test_derived_seeds(seed: int, purpose: str) -> None:
    assert order.derived(seed, purpose) == ref_hash(ref_uid(""), seed, purpose) >> 1 < 2**63


def test_derived_seeds_differ() -> None:
    purposes = ["init/teacher", "init/student", "views/teacher", *(f"dropout/{epoch}" for epoch in range(50))]
    assert len({order.derived(seed, purpose) for seed in range(50) for purpose in purposes}) == 50 * len(purposes)


def test_unit_is_exact_and_below_one() -> None:
    hashes = np.array([0, 2047, 2048, 2**63, WORD - 1, 0x123456789ABCDEF0], np.uint64)
    assert [Fraction(u) for u in order.unit(hashes).tolist()] == [Fraction(h >> 11, 2**53) for h in hashes.tolist()]
    assert order.unit(hashes).max() < 1


# --- how many


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 10, 15, 25, 45, 99, 1797, 45_000, 1_281_167, 10**12 + 1])
@pytest.mark.parametrize(
    "frac", ["0.1", "0.3", "0.7", "0.5", "0.05", "0.25", "0.15", "0.333333", "0.001", "1e-3", "0.9999999", "1", "1.0", "0.50"]
)
def test_keep_count_is_the_floor_of_the_exact_fraction_and_a_half(frac: str, n: int) -> None:
    assert order.keep_count(order.fraction(frac), n) == math.floor(Fraction(frac) * n + Fraction(1, 2))


@pytest.mark.parametrize(
    ("frac", "n", "kept"),
    [
        ("0.5", 5, 3),  # Python's round(2.5) is 2
        ("0.5", 1, 1),
        ("0.1", 45, 5),  # 4.5 again
        ("0.3", 5, 2),  # 0.3 * 5 in floats is 1.5, in halves up
        ("0.7", 45, 32),  # 0.7 * 45 in floats is 31.499999999999996
        ("0.15", 10, 2),
        ("0.35", 10, 4),  # float 3.5
        ("0.145", 100, 15),  # 0.145 * 100 in floats is 14.499999999999998
        ("0." + "4" + "9" * 39, 1, 0),  # more digits than decimal's usual 28
        ("0." + "3" * 30, 3, 1),
    ],
)
def test_keep_count_where_floats_or_rounding_to_even_go_astray(frac: str, n: int, kept: int) -> None:
    assert order.keep_count(order.fraction(frac), n) == kept


@pytest.mark.parametrize(("given", "read"), [(0.1, "0.1"), ("0.10", "0.10"), (1, "1"), (Decimal("0.3"), "0.3"), ("1e-3", "0.001")])
def test_fraction_is_read_as_a_decimal(given: str | float | Decimal, read: str) -> None:
    assert order.fraction(given) == Decimal(read)


@pytest.mark.parametrize("given", ["0", "-0.1", "1.0001", "50%", "", "nan", "inf", "half", 0, 2])
def test_fraction_out_of_range_is_refused_in_one_line(given: str | float) -> None:
    with pytest.raises(UsageError, match=r"^fraction .* give the fraction to keep, above 0 and at most 1$") as caught:
        order.fraction(given)
    assert str(given) in str(caught.value)


@pytest.mark.parametrize(("given", "shown"), [("0.50", "0.5"), ("1", "1"), ("1.000", "1"), ("1E-3", "0.001"), ("0.333333", "0.333333")])
def test_shortest(given: str, shown: str) -> None:
    assert order.shortest(Decimal(given)) == shown


# --- finding and repeats


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (5, 0), (100, 40), (1000, 2000)])
def test_locate_equals_a_dictionary(n: int, m: int) -> None:
    rng = np.random.default_rng(n + m)
    pool = rng.permutation(some_uids(n + m))
    have, others = pool[:n], pool[n:]
    wanted = rng.permutation(np.concatenate([rng.choice(have, m) if n else others[:0], others[: m // 2]]))
    places = {uid: row for row, uid in enumerate(have.tolist())}
    found = order.locate(have, wanted)
    assert found.dtype == np.int64
    assert found.tolist() == [places.get(uid, -1) for uid in wanted.tolist()]


@pytest.mark.parametrize(("values", "expected"), [([], None), ([5], None), ([3, 1, 2], None), ([7, 1, 7], (0, 2)), ([9, 4, 4, 9], (1, 2))])
def test_first_repeat(values: list[int], expected: tuple[int, int] | None) -> None:
    assert order.first_repeat(np.array(values, np.uint64)) == expected


# --- the order of training


def ref_epoch(uids: list[int], shards: list[int], seed: int, epoch: int) -> list[int]:
    """Straight from the table in docs/formats.md: shards permuted, groups of 16, samples permuted inside a group."""
    walk = sorted(set(shards), key=lambda shard: ref_hash(shard, seed, f"train-shards/{epoch}"))
    out: list[int] = []
    for first in range(0, len(walk), 16):
        group = set(walk[first : first + 16])
        rows = [row for row, shard in enumerate(shards) if shard in group]
        out += sorted(rows, key=lambda row: ref_hash(uids[row], seed, f"train-samples/{epoch}"))
    return out


@pytest.mark.parametrize("epoch", [0, 1, 29])
@pytest.mark.parametrize(("n", "shards"), [(1, 1), (50, 1), (300, 15), (300, 16), (300, 17), (400, 40), (64, 64)])
def test_epoch_order_equals_the_reference(n: int, shards: int, epoch: int) -> None:
    uids = some_uids(n)
    member = np.sort(np.concatenate([np.arange(shards), np.random.default_rng(n).integers(0, shards, n - shards)]))
    found = order.epoch_order(uids, member, seed=3, epoch=epoch)
    assert found.tolist() == ref_epoch(uids.tolist(), member.tolist(), 3, epoch)
    assert sorted(found.tolist()) == list(range(n))


def test_epoch_order_does_not_depend_on_the_order_of_rows() -> None:
    uids, shards = some_uids(500), np.repeat(np.arange(50), 10)
    shuffled = np.random.default_rng(0).permutation(500)
    straight = uids[order.epoch_order(uids, shards, seed=0, epoch=2)]
    assert np.array_equal(straight, uids[shuffled][order.epoch_order(uids[shuffled], shards[shuffled], seed=0, epoch=2)])


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    uids, shards = some_uids(1000), np.zeros(1000, np.int32)
    orders = [order.epoch_order(uids, shards, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for a, one in enumerate(orders):
        for other in orders[a + 1 :]:
            assert (one == other).mean() < 0.02


@pytest.mark.parametrize(
    ("n", "size", "lengths"),
    [
        (0, 4, []),
        (1, 4, [1]),
        (4, 4, [4]),
        (5, 4, [2, 3]),  # not 4 and a straggler
        (6, 4, [3, 3]),
        (9, 4, [3, 3, 3]),
        (3, 1, [1, 1, 1]),
        (258, 64, [51, 52, 51, 52, 52]),
    ],
)
def test_batches(n: int, size: int, lengths: list[int]) -> None:
    rows = np.arange(n) * 7
    found = list(order.batches(rows, size))
    assert [len(batch) for batch in found] == lengths
    assert [row for batch in found for row in batch.tolist()] == rows.tolist()
