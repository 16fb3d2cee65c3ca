"""d2 against a slow reference written from its definition; the graph of neighbours against brute force."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import floor, isqrt

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.errors import UsageError
from kdprune_data.selectors import Params, Pool
from kdprune_data.selectors.base import BALANCES
from kdprune_data.selectors.d2 import D2Params, difficulty, passed
from kdprune_data.selectors.neighbours import nearest, on_grid

SIZES = [[1], [2], [12], [13, 0, 8], [1, 1, 1], [30, 9]]


def pool_of(sizes: list[int], *, whole: bool = False, hard: str = "high", seed: int = 0) -> Pool:
    """Classes of these sizes; `whole` has many equal points, equal distances, equal scores, and zero vectors."""
    rng = np.random.default_rng([seed, *sizes])
    n = sum(sizes)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    vectors = rng.integers(-1, 2, (n, 3)).astype(np.float64) if whole else rng.normal(size=(n, 4))
    scores = {"forgetting": rng.integers(0, 4, n).astype(np.float64), "aum": rng.normal(size=n)}
    if not whole:
        scores["forgetting"] = rng.gamma(2, size=n)
    return Pool(order.uids_of(map(str, range(n))), labels, scores, {"forgetting": hard, "aum": "low"}, embedding=vectors)


def grid(vector: np.ndarray) -> list[int]:
    """A vector at unit length, in whole multiples of 2^-25."""
    length = float(np.sqrt((vector**2).sum()))
    return [round(x / length * 2**25) if length else 0 for x in vector.tolist()]


def ref_near(points: list[list[int]], k: int) -> list[list[tuple[int, float]]]:
    """Of each point, the k nearest others (of equally near ones the earlier), in their order, with distances."""
    found = []
    for i, p in enumerate(points):
        apart = {j: sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for j, q in enumerate(points) if j != i}
        chosen = sorted(apart, key=lambda j: (apart[j], j))[:k]
        found.append([(j, float(np.sqrt(float(apart[j]))) / 2**25) for j in sorted(chosen)])
    return found


def ref_d2(pool: Pool, keep: int, params: D2Params) -> list[int]:
    """The definition, per class: messages forward over the graph, then the largest phi again and again, which takes from its neighbours."""
    assert pool.embedding is not None
    hashes = order.order_hash(pool.uids, params.seed, "select").tolist()
    left = sorted(ref_left(pool, keep, params), key=lambda row: hashes[row])
    sign = 1 if pool.hard[params.score] == "high" else -1
    lowest = min(0.0, *(sign * float(pool.scores[params.score][row]) for row in left))
    kept = []
    for members, budget in ref_groups(pool, left, keep, params):
        s = [sign * float(pool.scores[params.score][row]) - lowest for row in members]
        near = ref_near([grid(pool.embedding[row]) for row in members], params.neighbours)
        phi = [s[i] for i in range(len(members))]
        for i, neighbours in enumerate(near):
            for j, d in neighbours:
                phi[i] += float(np.exp(-d)) * s[j]
        there = set(range(len(members)))
        for _ in range(budget):
            best = max(there, key=lambda i: (phi[i], -i))
            there.remove(best)
            kept.append(members[best])
            for j, d in near[best]:
                phi[j] -= float(np.exp(-params.gamma * d)) * phi[best]
    return sorted(kept)


def ref_budgets(pool: Pool, rows: list[int], keep: int, balance: str) -> Counter[int]:
    """How many of each class: seats by Sainte-Lague's quotients (2r + 1) / 2n, or by places r; of equal ones the lower class."""
    sizes = Counter(pool.labels[rows].tolist())
    quotas = [(Fraction(2 * r + 1, 2 * n) if balance == "class" else Fraction(r), label) for label, n in sizes.items() for r in range(n)]
    return Counter(label for _, label in sorted(quotas)[:keep])


def ref_left(pool: Pool, keep: int, params: D2Params) -> list[int]:
    """All but those of lowest aum: of each class in proportion; with balance `none` of all."""
    n = len(pool.uids)
    hashes = order.order_hash(pool.uids, params.seed, "select").tolist()
    cut = params.cut if params.cut is not None else min(0.3, max(0.0, 0.375 - 0.75 * keep / n))
    count = floor(cut * n + 0.5 + 1e-9)
    by_aum = sorted(range(n), key=lambda row: (pool.scores["aum"][row], hashes[row]))
    if params.balance == "none":
        return sorted(by_aum[count:])
    out = ref_budgets(pool, by_aum, count, "class")
    gone = {row for label, few in out.items() for row in [row for row in by_aum if pool.labels[row] == label][:few]}
    return sorted(set(range(n)) - gone)


def ref_groups(pool: Pool, left: list[int], keep: int, params: Params) -> list[tuple[list[int], int]]:
    """What is left, by class, each with its share; or all at once."""
    if params.balance == "none":
        return [(left, keep)]
    budget = ref_budgets(pool, left, keep, params.balance)
    return [([row for row in left if pool.labels[row] == label], count) for label, count in budget.items()]


@pytest.mark.parametrize("hard", ["high", "low"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("balance", BALANCES)
def test_it_is_the_references(balance: str, whole: bool, hard: str) -> None:
    """Ties, double points, zero vectors, single samples, absent classes, more neighbours than samples."""
    for sizes in SIZES:
        pool = pool_of(sizes, whole=whole, hard=hard)
        n = len(pool.uids)
        for keep in {1, n // 4, n // 2, n} - {0}:
            for k, gamma, cut in ((5, 0.1, None), (1, 0.0, 0.0), (40, 2.0, 0.0)):
                params = D2Params(balance=balance, seed=keep, neighbours=k, gamma=gamma, cut=cut)
                assert selectors.select("d2", pool, keep, params).indices.tolist() == ref_d2(pool, keep, params)


@pytest.mark.parametrize("k", [1, 3, 9, 100])
@pytest.mark.parametrize("whole", [False, True])
def test_neighbours_are_those_of_brute_force(whole: bool, k: int) -> None:
    """To the bit, and whatever the memory."""
    for n in (1, 2, 10, 57):
        vectors = np.asarray(pool_of([n], whole=whole).embedding)
        points = on_grid(vectors, np.arange(n))
        assert points.tolist() == [grid(v) for v in vectors]
        expected = ref_near(points.astype(np.int64).tolist(), k)
        for memory in (10**9, 60_000 + n * (32 * 4 + 250 * k + 500)):
            near, distance = nearest(points, k, memory)
            assert [list(zip(*row, strict=True)) for row in zip(near.tolist(), distance.tolist(), strict=True)] == expected


def test_neighbours_of_real_vectors_are_those_without_a_grid() -> None:
    """The rounding changes no neighbour of continuous data, and no distance by more than 1e-7."""
    vectors = np.random.default_rng(0).normal(size=(300, 32))
    unit = vectors / np.sqrt((vectors**2).sum(1, keepdims=True))
    apart = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in unit] for a in unit])
    np.fill_diagonal(apart, np.inf)
    near, distance = nearest(on_grid(vectors, np.arange(300)), 5, 10**9)
    assert np.array_equal(near, np.sort(np.argsort(apart, axis=1)[:, :5], axis=1))
    assert distance == pytest.approx(np.take_along_axis(apart, near, 1), abs=1e-7)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e20, 1e300])
def test_the_grid_takes_any_length(scale: float) -> None:
    points = on_grid(np.array([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]]) * scale, np.array([0, 1, 2]))
    assert points.tolist() == [[round(0.6 * 2**25), round(0.8 * 2**25)], [0, 0], [-(2**25), 0]]
    assert isqrt(2**50) == 2**25


def test_messages_by_hand() -> None:
    """Three in a row: a and b are one point, c is far off (its message is next to nothing). a: 3 + 2, b: 2 + 3, c: 1.

    a is first among equals and takes all of its own 5 from b, which is left with 0; so c comes next.
    """
    near, distance = np.array([[1], [0], [0]]), np.array([[0.0], [0.0], [50.0]])
    assert passed(np.array([3.0, 2.0, 1.0]), near, distance, keep=3, gamma=0.1).tolist() == [0, 2, 1]
    alone = np.empty((3, 0))
    assert passed(np.array([1.0, 3.0, 2.0]), alone.astype(np.int64), alone, keep=2, gamma=0.1).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("hard", "scores", "expected"),
    [
        ("high", [1.0, 3.0], [1.0, 3.0]),
        ("high", [-1.0, 3.0], [0.0, 4.0]),
        ("low", [1.0, 3.0], [2.0, 0.0]),
        ("low", [-1.0, -3.0], [1.0, 3.0]),
        ("high", [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_difficulty_is_larger_for_harder_and_never_negative(hard: str, scores: list[float], expected: list[float]) -> None:
    pool = Pool(order.uids_of("ab"), np.zeros(2, np.int32), {"s": np.array(scores)}, {"s": hard})
    assert difficulty(pool, "s").tolist() == expected


def test_it_spreads_where_the_score_alone_does_not() -> None:
    """A tight cluster of the hardest and a wide rest: top-k takes the cluster, d2 leaves much of it out."""
    rng = np.random.default_rng(1)
    vectors = np.concatenate([rng.normal(size=(1, 16)) + 1e-3 * rng.normal(size=(40, 16)), rng.normal(size=(160, 16))])
    scores = np.concatenate([np.full(40, 10.0), rng.uniform(5, 9, 160)])
    pool = Pool(order.uids_of(map(str, range(200))), np.zeros(200, np.int32), {"forgetting": scores}, {"forgetting": "high"}, vectors)
    kept = selectors.select("d2", pool, 40, D2Params(cut=0.0)).indices
    assert (kept < 40).sum() < 30


def test_parts_keep_the_count_and_cost_less() -> None:
    pool = pool_of([90, 60])
    for parts in (1, 2, 7, 60, 1000):
        for balance in BALANCES:
            found = selectors.select("d2", pool, 45, D2Params(parts=parts, balance=balance, cut=0.0))
            assert len(set(found.indices.tolist())) == 45
    cost = selectors.method("d2").cost
    assert cost is not None
    size = selectors.Size(np.array([90, 60]), np.array([27, 18]), 4)
    assert cost(size, D2Params(parts=1)).multiplications == (90**2 + 60**2) * 4
    assert cost(size, D2Params(parts=3)).multiplications == (90**2 + 60**2) * 4 / 3
    assert cost(size, D2Params(parts=3)).bytes < cost(size, D2Params(parts=1)).bytes


def test_too_little_memory_is_refused_with_what_helps() -> None:
    with pytest.raises(
        UsageError, match=r"^neighbours among 900 samples take [\d,]+ bytes and --memory is 1,000,000: raise it, or cut .*parts=N$"
    ):
        selectors.select("d2", pool_of([900]), 90, D2Params(memory=1_000_000, cut=0.0))
    assert len(selectors.select("d2", pool_of([900]), 90, D2Params(memory=1_000_000, cut=0.0, parts=10)).indices) == 90
