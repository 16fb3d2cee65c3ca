"""selectors/ against slow references written from docs/formats.md ("Which are kept"), over many class sizes, fractions and seeds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.errors import KdpruneError, SourceError, UsageError
from kdprune_data.selectors import Params, Pool
from kdprune_data.selectors.base import BALANCES, ENDS
from kdprune_data.selectors.quota import groups
from kdprune_data.selectors.ranked import RankedParams

SIZES = [[1], [7], [1, 1], [5, 5], [1, 2, 3, 4], [100, 1], [3, 3, 3, 3, 3], [2, 50, 9], [13, 0, 8], [1] * 20, [30, 30, 31]]
METHODS = ["random", "score"]


def pool_of(sizes: list[int], seed: int = 0, *, levels: int = 4) -> Pool:
    """Classes of these sizes, shuffled; scores on few levels, so that many are equal."""
    rng = np.random.default_rng([seed, *sizes])
    n = sum(sizes)
    uids = rng.permutation(np.unique(rng.integers(0, 2**64, n + 4, np.uint64, endpoint=False)))[:n]
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    return scored(uids, labels, rng.integers(0, levels, n).astype(np.float64) / 3)


def scored(uids: np.ndarray, labels: np.ndarray, scores: np.ndarray, hard: str = "high") -> Pool:
    """A pool with one score, `s`."""
    return Pool(uids, labels, {"s": scores}, {"s": hard})


def params_of(method: str, *, end: str = "hard", **common: object) -> Params:
    """The settings of either method."""
    return RankedParams(score="s", end=end, **common) if method == "score" else Params(**common)


def ref_ranking(pool: Pool, method: str, params: Params) -> list[int]:
    """Best first; ties by the order hash `select`."""
    tie = order.order_hash(pool.uids, params.seed, "select").tolist()
    rows = range(len(tie))
    if method == "random":
        return sorted(rows, key=lambda row: tie[row])
    assert isinstance(params, RankedParams)
    hardness = [score if pool.hard["s"] == "high" else -score for score in pool.scores["s"].tolist()]
    hard_first = sorted(rows, key=lambda row: (-hardness[row], tie[row]))
    if params.end == "hard":
        return hard_first
    if params.end == "easy":
        return sorted(rows, key=lambda row: (hardness[row], tie[row]))
    away: dict[int, Fraction] = {}  # from the middle place of its class (of all), in class sizes
    for group in {0} if params.balance == "none" else set(pool.labels.tolist()):
        members = [row for row in hard_first if params.balance == "none" or pool.labels[row] == group]
        away |= {row: abs(Fraction(2 * place - (len(members) - 1), len(members))) for place, row in enumerate(members)}
    return sorted(rows, key=lambda row: (away[row], tie[row]))


def ref_kept(pool: Pool, method: str, params: Params) -> list[int]:
    """All rows, in the order in which they are kept."""
    ranking = ref_ranking(pool, method, params)
    if params.balance == "none":
        return ranking
    tie = order.order_hash(pool.uids, params.seed, "select").tolist()
    labels = pool.labels.tolist()
    size, seen = Counter(labels), Counter[int]()
    quota = {}
    for row in ranking:
        r, n = seen[labels[row]], size[labels[row]]
        quota[row] = Fraction(2 * r + 1, 2 * n) if params.balance == "class" else Fraction(r)
        seen[labels[row]] += 1
    return sorted(ranking, key=lambda row: (quota[row], labels[row], tie[row]))


@pytest.mark.parametrize("hard", ["high", "low"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("method", METHODS)
def test_every_subset_is_the_references(method: str, balance: str, end: str, hard: str) -> None:
    """Any k of any pool: exact, nested (each is a prefix of one order), and the one the page describes."""
    for sizes in SIZES:
        for seed in range(3):
            pool = replace(pool_of(sizes, seed), hard={"s": hard})
            params = params_of(method, end=end, seed=seed, balance=balance)
            expected = ref_kept(pool, method, params)
            for keep in {1, 2, len(expected) // 3, len(expected) // 2, len(expected) - 1, len(expected)} & set(range(1, len(expected) + 1)):
                found = selectors.select(method, pool, keep, params)
                assert found.indices.tolist() == sorted(expected[:keep])
                assert found.order is not None
                assert found.order.tolist() == expected
                assert found.indices.dtype == found.order.dtype == np.int64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("balance", BALANCES)
def test_nested_and_exact_over_fractions(method: str, balance: str) -> None:
    pool = pool_of([60, 13, 1, 200, 7], levels=50)
    before: set[int] = set()
    for frac in ("0.01", "0.05", "0.1", "0.2", "0.3", "0.5", "0.7", "0.9", "1"):
        keep = order.keep_count(Decimal(frac), 281)
        found = set(selectors.select(method, pool, keep, params_of(method, balance=balance)).indices.tolist())
        assert len(found) == keep == int(Fraction(frac) * 281 + Fraction(1, 2))
        assert before <= found
        before = found
    assert before == set(range(281))


@pytest.mark.parametrize("sizes", [[50, 50], [90, 10], [10, 20, 30, 40], [500, 1, 499]])
@pytest.mark.parametrize("keep", [10, 33, 50, 99])
def test_class_balance_keeps_proportions_to_within_one(sizes: list[int], keep: int) -> None:
    pool = pool_of(sizes)
    kept = np.bincount(pool.labels[selectors.select("random", pool, keep, Params(balance="class")).indices], minlength=len(sizes))
    for size, count in zip(sizes, kept, strict=True):
        assert abs(count - Fraction(keep * size, sum(sizes))) <= 1


@pytest.mark.parametrize(("keep", "shares"), [(3, [1, 1, 1]), (9, [3, 3, 3]), (10, [4, 3, 3]), (16, [7, 3, 6]), (63, [50, 3, 10])])
def test_uniform_balance_gives_equal_shares_until_a_class_is_empty(keep: int, shares: list[int]) -> None:
    pool = pool_of([50, 3, 10])
    kept = selectors.select("random", pool, keep, Params(balance="uniform")).indices
    assert np.bincount(pool.labels[kept]).tolist() == shares


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_pool_does_not_matter(method: str, balance: str, end: str) -> None:
    """Ties are everywhere here (three scores for 300 samples), and are settled by the hash."""
    pool = pool_of([100, 150, 50], levels=3)
    params = params_of(method, seed=5, balance=balance, end=end)
    straight = pool.uids[selectors.select(method, pool, 77, params).order]
    for seed in range(3):
        p = np.random.default_rng(seed).permutation(300)
        other = scored(pool.uids[p], pool.labels[p], pool.scores["s"][p])
        found = selectors.select(method, other, 77, params)
        assert np.array_equal(other.uids[found.order], straight)
        assert set(other.uids[found.indices].tolist()) == set(straight[:77].tolist())


@pytest.mark.parametrize("method", METHODS)
def test_seeds_differ(method: str) -> None:
    pool = pool_of([200, 200], levels=1)
    kept = [set(selectors.select(method, pool, 40, params_of(method, seed=seed)).indices.tolist()) for seed in range(4)]
    for a in range(4):
        for b in range(a):
            assert len(kept[a] & kept[b]) < 20  # 4 are expected


def test_random_does_not_change_when_others_join() -> None:
    """What is kept of a set that grows by other classes, at the same k per class, is what was kept before."""
    pool = pool_of([40, 40])
    more = pool_of([40, 40, 40], seed=9)
    joined = Pool(np.concatenate([pool.uids, more.uids]), np.concatenate([pool.labels, more.labels + 2]))
    before = pool.uids[selectors.select("random", pool, 20, Params()).indices]
    after = joined.uids[selectors.select("random", joined, 50, Params()).indices]
    assert set(before.tolist()) < set(after.tolist())


@pytest.mark.parametrize(
    ("end", "high", "kept"),
    [
        ("hard", True, [7, 8, 9]),
        ("hard", False, [0, 1, 2]),
        ("easy", True, [0, 1, 2]),
        ("easy", False, [7, 8, 9]),
        ("middle", True, [3, 4, 5]),
        ("middle", False, [3, 4, 5]),
    ],
)
def test_ends(end: str, high: bool, kept: list[int]) -> None:
    """Ten samples of one class, scored 0 to 9. The places 3 and 6 are equally near to the middle: the hash takes one."""
    pool = scored(order.uids_of(str(n) for n in range(10)), np.zeros(10, np.int32), np.arange(10.0), "high" if high else "low")
    found = selectors.select("score", pool, 3, params_of("score", end=end)).indices.tolist()
    assert found == (kept if 3 in found or end != "middle" else [4, 5, 6])


def test_middle_is_of_each_class_or_of_all() -> None:
    scores = np.concatenate([np.arange(11.0), 100 + np.arange(11.0)])
    pool = scored(order.uids_of(str(n) for n in range(22)), np.repeat([0, 1], 11).astype(np.int32), scores)
    assert selectors.select("score", pool, 2, params_of("score", end="middle")).indices.tolist() == [5, 16]
    assert selectors.select("score", pool, 2, params_of("score", end="middle", balance="none")).indices.tolist() == [10, 11]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_scores_of_any_width(kind: type[np.floating]) -> None:
    pool = pool_of([30, 30])
    as_kind = scored(pool.uids, pool.labels, (pool.scores["s"] * 3).astype(kind))
    params = params_of("score")
    assert np.array_equal(selectors.select("score", as_kind, 20, params).indices, selectors.select("score", pool, 20, params).indices)


# --- parts


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 10, 1000])
@pytest.mark.parametrize("balance", BALANCES)
def test_parts_share_what_is_kept(balance: str, parts: int) -> None:
    """Each part keeps some: sizes and shares differ by one at most, none keeps more than it has, and together they are the class."""
    for sizes in ([40, 7, 1, 22], [11, 8], [300]):
        pool = pool_of(sizes)
        for keep in range(1, sum(sizes) + 1, 3):
            whole, cut = (groups(pool, keep, Params(balance=balance), n) for n in (1, parts))
            for group in whole:
                of = [part for part in cut if set(part.rows.tolist()) <= set(group.rows.tolist())]
                assert len(of) == min(parts, group.keep)
                assert np.concatenate([part.rows for part in of]).tolist() == group.rows.tolist()
                assert sum(part.keep for part in of) == group.keep
                assert all(1 <= part.keep <= len(part.rows) for part in of)
                for shares in ([part.keep for part in of], [len(part.rows) for part in of]):
                    assert max(shares) - min(shares) <= 1


# --- the hardest left out


def ref_offset(pool: Pool, params: RankedParams, skipped: int) -> list[int]:
    """All rows in the order in which they are kept: what is left without the hardest, as of any pool; then the hardest. These are of each
    class its proportion, unless there is no balance."""
    balance = "none" if params.balance == "none" else "class"
    hardest = ref_kept(pool, "score", replace(params, end="hard", balance=balance))[:skipped]
    left = sorted(set(range(len(pool.uids))) - set(hardest))
    rest = scored(pool.uids[left], pool.labels[left], pool.scores["s"][left], pool.hard["s"])
    return [left[row] for row in ref_kept(rest, "score", params)] + hardest


@pytest.mark.parametrize("hard", ["high", "low"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("balance", BALANCES)
def test_skip_hardest_is_the_references(balance: str, end: str, hard: str) -> None:
    """Any share and any k that is left: floor(share * n + 1/2) are left out, of each class its proportion."""
    for sizes in SIZES:
        pool = replace(pool_of(sizes), hard={"s": hard})
        n = sum(sizes)
        for share in ("0.05", "0.25", "0.5", "0.999"):
            skipped = int(Fraction(share) * n + Fraction(1, 2))
            params = RankedParams(score="s", end=end, balance=balance, skip_hardest=float(share))
            expected = ref_offset(pool, params, skipped)
            for keep in {1, (n - skipped) // 2, n - skipped} & set(range(1, n - skipped + 1)):
                found = selectors.select("score", pool, keep, params)
                assert found.indices.tolist() == sorted(expected[:keep])
                assert found.order is not None
                assert found.order.tolist() == expected


def test_skip_hardest_is_a_window_that_nests() -> None:
    """A hundred samples, scored 0 to 99: without the hardest tenth `hard` keeps what comes below it, at any k inside the next."""
    pool = scored(order.uids_of(str(n) for n in range(100)), np.zeros(100, np.int32), np.arange(100.0))
    for keep in (1, 10, 50, 90):
        found = selectors.select("score", pool, keep, RankedParams(score="s", skip_hardest=0.1))
        assert found.indices.tolist() == list(range(90 - keep, 90))
    middle = selectors.select("score", pool, 10, RankedParams(score="s", skip_hardest=0.1, end="middle"))
    assert middle.indices.tolist() == list(range(40, 50))
    easy = selectors.select("score", pool, 10, RankedParams(score="s", skip_hardest=0.1, end="easy"))
    assert easy.indices.tolist() == list(range(10))


@pytest.mark.parametrize("balance", ["class", "uniform"])
def test_skip_hardest_leaves_classes_their_proportions(balance: str) -> None:
    """The small class is the hardest by far, and a third of each is left out."""
    labels = np.repeat([0, 1, 2], [60, 30, 6]).astype(np.int32)
    pool = scored(order.uids_of(str(n) for n in range(96)), labels, 100.0 * labels + np.arange(96))
    params = RankedParams(score="s", balance=balance, skip_hardest=1 / 3)
    found = selectors.select("score", pool, 64, params).indices
    assert np.bincount(labels[found]).tolist() == [40, 20, 4]
    few = selectors.select("score", pool, 12, params).indices
    assert np.bincount(labels[few]).tolist() == ([7, 4, 1] if balance == "class" else [4, 4, 4])


def test_skip_hardest_leaves_enough_or_is_refused() -> None:
    pool = pool_of([50, 50])
    line = refusal("score", pool, 76, RankedParams(score="s", skip_hardest=0.25), UsageError)
    assert line == "cannot keep 76: 25 of 100 candidates are left out first, so 75 are left; leave fewer out, or keep fewer"
    assert len(selectors.select("score", pool, 75, RankedParams(score="s", skip_hardest=0.25)).indices) == 75
    for share in (-0.1, 1.0, np.nan):
        with pytest.raises(UsageError, match="skip_hardest"):
            RankedParams(skip_hardest=share)


# --- refusals


def refusal(method: str, pool: Pool, keep: int, params: Params, kind: type[KdpruneError]) -> str:
    with pytest.raises(kind) as caught:
        selectors.select(method, pool, keep, params)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0, -1, 11, 1000])
def test_more_than_there_are_or_none_is_refused(method: str, keep: int) -> None:
    line = refusal(method, pool_of([5, 5]), keep, params_of(method), UsageError)
    assert line == f"cannot keep {keep:,} of 10 candidates: choose a fraction that keeps between 1 and 10"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    pool = pool_of([5, 5])
    pool.scores["s"][3] = bad
    line = refusal("score", pool, 2, params_of("score"), SourceError)
    assert line == f"s is not a finite number for 1 of 10 candidates (the first has uid {pool.uids[3]}): every candidate needs one"
    assert len(selectors.select("random", pool, 2, Params()).indices) == 2


def test_missing_scores_labels_and_methods_are_refused() -> None:
    pool = pool_of([5, 5])
    unlabelled = Pool(pool.uids, np.where(pool.labels == 1, -1, pool.labels).astype(np.int32))
    assert "this method needs the score 's'" in refusal("score", unlabelled, 2, params_of("score"), UsageError)
    for balance in ("class", "uniform"):
        line = refusal("random", unlabelled, 2, Params(balance=balance), UsageError)
        assert line == f"--balance {balance} needs labels and 5 samples have none: use --balance none"
    assert len(selectors.select("random", unlabelled, 2, Params(balance="none")).indices) == 2
    line = refusal("rndom", pool, 2, Params(), UsageError)
    assert line == f"unknown method 'rndom'; did you mean 'random'? known: {', '.join(sorted(selectors.SELECTORS))}"
