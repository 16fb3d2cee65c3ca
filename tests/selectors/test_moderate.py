"""moderate and mdslr against slow references written from their definitions."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from fractions import Fraction
from statistics import median

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.errors import UsageError
from kdprune_data.selectors import Params, Pool, Size, moderate
from kdprune_data.selectors.base import BALANCES
from kdprune_data.selectors.ranked import RankedParams

SIZES = [[1], [8], [31], [20, 31], [13, 0, 8], [1, 1, 1], [2, 40]]


def pool_of(sizes: list[int], *, whole: bool = False, seed: int = 0) -> Pool:
    """Classes of these sizes; embeddings of whole numbers have many equal distances, and doubled points."""
    rng = np.random.default_rng([seed, *sizes])
    n = sum(sizes)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    vectors = rng.integers(0, 2, (n, 4)).astype(np.float64) if whole else rng.normal(size=(n, 5)) + labels[:, None]
    loss = rng.integers(0, 5, n) / 4 if whole else rng.gamma(1, size=n)
    return Pool(order.uids_of(map(str, range(n))), labels, {"loss": loss}, {"loss": "high"}, embedding=vectors)


def ref_distances(pool: Pool) -> list[float]:
    """To the median of one's class, coordinate by coordinate."""
    assert pool.embedding is not None
    vectors, labels = pool.embedding.tolist(), pool.labels.tolist()
    found = []
    for vector, label in zip(vectors, labels, strict=True):
        fellows = [other for other, its in zip(vectors, labels, strict=True) if its == label]
        centre = [median(other[i] for other in fellows) for i in range(len(vector))]
        found.append(sum((x - m) ** 2 for x, m in zip(vector, centre, strict=True)) ** 0.5)
    return found


def ref_kept(pool: Pool, values: list[float], keep: int, params: Params) -> list[int]:
    """The middle: places by value, of a class or of all, then whoever is nearest to the median place; quotas as for any ranking."""
    hashes = order.order_hash(pool.uids, params.seed, "select").tolist()
    of = [0] * len(values) if params.balance == "none" else pool.labels.tolist()
    away, quota = {}, {}
    for group in set(of):
        members = sorted((row for row in range(len(values)) if of[row] == group), key=lambda row: (-values[row], hashes[row]))
        n = len(members)
        away |= {row: abs(Fraction(2 * place - (n - 1), n)) for place, row in enumerate(members)}
        for r, row in enumerate(sorted(members, key=lambda row: (away[row], hashes[row]))):
            quota[row] = Fraction(2 * r + 1, 2 * n) if params.balance == "class" else Fraction(r)
    return sorted(sorted(quota, key=lambda row: (quota[row], of[row], hashes[row]))[:keep])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("method", ["moderate", "mdslr"])
def test_they_are_the_references(method: str, balance: str, whole: bool) -> None:
    for sizes in SIZES:
        pool = pool_of(sizes, whole=whole)
        values = ref_distances(pool) if method == "moderate" else pool.scores["loss"].tolist()
        n = len(values)
        for keep in {1, n // 10, n // 3, n // 2, n - 1, n} - {0}:
            params = Params(balance=balance, seed=keep)
            assert selectors.select(method, pool, keep, params).indices.tolist() == ref_kept(pool, values, keep, params)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_distances_are_the_references(kind: type[np.floating]) -> None:
    for sizes in SIZES:
        pool = pool_of(sizes)
        assert pool.embedding is not None
        stored = replace(pool, embedding=pool.embedding.astype(kind))
        assert moderate.class_distances(stored, 10**9) == pytest.approx(np.array(ref_distances(stored)), rel=1e-12)


def test_distances_do_not_depend_on_memory_or_order() -> None:
    pool = pool_of([500, 300])
    assert pool.embedding is not None
    whole = moderate.class_distances(pool, 10**9)
    for memory in (1, 1000, 40_000, 100_000):
        assert np.array_equal(moderate.class_distances(pool, memory), whole)
    rows = np.random.default_rng(1).permutation(800)
    other = Pool(pool.uids[rows], pool.labels[rows], embedding=pool.embedding[rows])
    assert np.array_equal(moderate.class_distances(other, 10**9), whole[rows])


@pytest.mark.parametrize("memory", [100_000, 1_000_000, 10**9])
def test_a_wide_embedding_is_taken_in_blocks(memory: int) -> None:
    """2,000 samples of 256 numbers are 16 MB in float64, of which no more is held than was allowed, and told."""
    rng = np.random.default_rng(0)
    pool = Pool(order.uids_of(map(str, range(2000))), np.zeros(2000, np.int32), embedding=rng.normal(size=(2000, 256)).astype(np.float16))
    told = moderate.cost(Size(np.array([2000]), np.array([500]), 256), Params(memory=memory)).bytes
    assert told <= memory
    tracemalloc.start()
    moderate.class_distances(pool, memory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= told + 2000 * 256 + 100_000  # the check for finite numbers holds a byte for each


def test_the_middle_by_hand() -> None:
    """Eleven points of a class on a line, 0 to 10, and their median 5: distances 5 4 3 2 1 0 1 2 3 4 5. The middle of those is 3."""
    pool = Pool(order.uids_of(map(str, range(11))), np.zeros(11, np.int32), embedding=np.arange(11.0)[:, None])
    assert set(selectors.select("moderate", pool, 2).indices.tolist()) <= {2, 8, 3, 7}
    assert selectors.select("moderate", pool, 1).indices[0] in (2, 8)
    kept = set(selectors.select("moderate", pool, 9).indices.tolist())
    assert 5 not in kept
    assert len(kept & {0, 10}) == 1


def test_a_wide_class_is_kept_in_proportion_unless_balance_is_none() -> None:
    """The paper's global middle can lose a class whose distances are all large."""
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1, 2], 100).astype(np.int32)
    pool = Pool(order.uids_of(map(str, range(300))), labels, embedding=rng.normal(size=(300, 8)) * np.array([1, 10, 100])[labels][:, None])
    kept = {balance: np.bincount(labels[selectors.select("moderate", pool, 60, Params(balance=balance)).indices], minlength=3).tolist()
            for balance in BALANCES}  # fmt: skip
    assert kept == {"class": [20, 20, 20], "uniform": [20, 20, 20], "none": [0, 60, 0]}


def test_moderate_needs_labels_for_its_centres_whatever_the_balance() -> None:
    pool = pool_of([5, 5])
    pool.labels[3] = -1
    with pytest.raises(UsageError, match="moderate needs labels and 1 samples have none"):
        selectors.select("moderate", pool, 2, Params(balance="none"))


@pytest.mark.parametrize("balance", BALANCES)
def test_mdslr_is_the_middle_by_loss(balance: str) -> None:
    pool = pool_of([40, 60], whole=True)
    same = selectors.select("score", pool, 33, RankedParams(score="loss", end="middle", balance=balance, seed=4))
    found = selectors.select("mdslr", pool, 33, Params(balance=balance, seed=4))
    assert found.order is not None
    assert np.array_equal(found.order, same.order)
