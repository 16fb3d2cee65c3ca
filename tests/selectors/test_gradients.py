"""CRAIG, facility location and GradMatch against their definitions, in loops over gradients that are written out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls

from kdprune_data import order, selectors
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.selectors import Pool, Size, greedy
from kdprune_data.selectors.gradients import GreedyParams
from kdprune_data.selectors.gradmatch import GradMatchParams, nonnegative

LEVELS = 2**24


def pool_of(n: int, classes: int = 3, width: int = 4, *, kind: str = "random", seed: int = 0) -> Pool:
    """One class of samples (label 1), as an embedding and logits of some kind."""
    rng = np.random.default_rng([seed, n])
    h, z = rng.normal(size=(n, width)), rng.normal(size=(n, classes))
    if kind == "known":  # p = y: every gradient is 0
        z = np.where(np.arange(classes) == 1, 5000.0, 0) * np.ones((n, 1))
    elif kind == "some known":
        z[::3] = [0, 2000, 0]
    elif kind == "zero":
        h = np.zeros_like(h)
    elif kind == "equal":
        h, z = np.ones_like(h), np.ones_like(z)
    elif kind == "twice":
        h, z = np.repeat(h[: -(-n // 2)], 2, 0)[:n], np.repeat(z[: -(-n // 2)], 2, 0)[:n]
    elif kind == "opposed":  # four fifths one way, the others the other way: these do not help
        h = h / 9 + np.where(np.arange(n) % 5, 5.0, -5.0)[:, None]
    return Pool(order.uids_of(str(i) for i in range(n)), np.ones(n, np.int32), embedding=h, logits=z)


KINDS = ("random", "known", "some known", "zero", "equal", "twice")


def hashes(pool: Pool, seed: int = 0) -> list[int]:
    return order.order_hash(pool.uids, seed, "select").tolist()


def gradients(pool: Pool) -> np.ndarray:
    """(softmax(z) - onehot(y)) outer (h, 1), written out: float64 of shape (n, c (d + 1))."""
    found = []
    for h, z, label in zip(pool.embedding, pool.logits, pool.labels.tolist(), strict=True):
        p = np.exp(z - max(z))
        p = p / sum(p)
        p[label] = -sum(p[k] for k in range(len(p)) if k != label)  # p - 1
        found.append(np.outer(p, [*h, 1.0]).ravel())
    return np.array(found)


def similarities(pool: Pool, method: str) -> list[list[int]]:
    """Whole numbers from 0 to 2^24 for every two."""
    g = gradients(pool)
    lengths = [float(np.linalg.norm(one)) for one in g]
    bound = 2 * max(lengths)
    found = [[0] * len(g) for _ in g]
    for i in range(len(g)):
        for j in range(len(g)):
            if method == "craig":
                near = 1 - np.linalg.norm(g[i] - g[j]) / bound if bound else 1.0
            else:
                near = (1 + (g[i] @ g[j] / (lengths[i] * lengths[j]) if lengths[i] and lengths[j] else 0)) / 2
            found[i][j] = round(float(near) * LEVELS)
    return found


def gain(similar: list[list[int]], chosen: list[int], j: int) -> int:
    """What j adds to f(S) = sum over i of max over S of s(i, j)."""
    return sum(max([0, *(row[k] for k in chosen), row[j]]) - max([0, *(row[k] for k in chosen)]) for row in similar)


def ref_greedy(similar: list[list[int]], tie: list[int], keep: int) -> list[int]:
    """All gains of all that are left, in every step."""
    chosen: list[int] = []
    while len(chosen) < keep:
        rest = [j for j in range(len(similar)) if j not in chosen]
        gains = {j: gain(similar, chosen, j) for j in rest}
        chosen.append(min(rest, key=lambda j: (-gains[j], tie[j])))
    return chosen


def ref_clusters(similar: list[list[int]], tie: list[int], chosen: list[int]) -> dict[int, int]:
    """Each sample counted once, for the chosen one it is most similar to; a chosen one for itself."""
    count = dict.fromkeys(chosen, 0)
    for i in range(len(similar)):
        count[i if i in count else min(chosen, key=lambda j: (-similar[i][j], tie[j]))] += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["craig", "facility_location"])
def test_lazy_is_the_plain_greedy_choice(method: str, kind: str) -> None:
    for n in (1, 2, 25):
        pool = pool_of(n, kind=kind)
        similar, tie = similarities(pool, method), hashes(pool)
        expected = ref_greedy(similar, tie, n)
        for keep in {1, 2, n // 3, n} & set(range(1, n + 1)):
            found = selectors.select(method, pool, keep)
            assert found.indices.tolist() == sorted(expected[:keep])
            if method == "facility_location":
                assert found.weights is None
            else:
                counts = ref_clusters(similar, tie, expected[:keep])
                assert found.weights is not None
                assert found.weights.dtype == np.float32
                assert found.weights.tolist() == [counts[row] for row in found.indices.tolist()]
                assert sum(counts.values()) == n


@pytest.mark.parametrize("method", ["craig", "facility_location"])
def test_stochastic_is_nearly_as_good(method: str) -> None:
    pool = pool_of(120)
    similar = similarities(pool, method)
    value = {}
    for way in ("lazy", "stochastic"):
        kept = selectors.select(method, pool, 12, GreedyParams(greedy=way)).indices.tolist()
        value[way] = sum(max(row[j] for j in kept) for row in similar)
    kept = selectors.select("random", pool, 12).indices.tolist()
    by_chance = sum(max(row[j] for j in kept) for row in similar)
    assert abs(value["lazy"] - value["stochastic"]) < 0.2 * (value["lazy"] - by_chance)  # either may be ahead: neither is the best there is


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("keep", [1, 5, 19, 30])
def test_stochastic_looks_at_the_smallest_hashes(epsilon: float, keep: int) -> None:
    pool = pool_of(30)
    similar, tie, chosen = similarities(pool, "craig"), hashes(pool), []
    for step in range(keep):
        drawn = order.order_hash(pool.uids, 0, f"stochastic/{step}").tolist()
        rest = sorted((j for j in range(30) if j not in chosen), key=lambda j: drawn[j])
        looked = rest[: math.ceil(30 / keep * math.log(1 / epsilon))]
        chosen.append(min(looked, key=lambda j: (-gain(similar, chosen, j), tie[j])))
    found = selectors.select("craig", pool, keep, GreedyParams(greedy="stochastic", epsilon=epsilon))
    assert found.indices.tolist() == sorted(chosen)
    assert found.weights is not None
    assert found.weights.sum() == 30


@pytest.mark.parametrize("parts", [1, 2, 5, 8, 16, 32, 1000])
def test_weights_of_craig_are_the_size_of_the_class_in_any_parts(parts: int) -> None:
    pool = pool_of(440)
    pool = replace(pool, labels=np.repeat([0, 1], [400, 40]).astype(np.int32))
    found = selectors.select("craig", pool, 44, GreedyParams(parts=parts))
    assert found.weights is not None
    assert [found.weights[pool.labels[found.indices] == label].sum() for label in (0, 1)] == [400, 40]
    assert np.bincount(pool.labels[found.indices]).tolist() == [40, 4]


def ref_match(pool: Pool, keep: int, *, ridge: float, batch: int) -> tuple[list[int], list[float]]:
    """Rows in the order of choice and their weights, all fits anew by least squares on (g_i, sqrt(lambda) e_i)."""
    g, tie = gradients(pool), hashes(pool)
    total = g.sum(0)
    penalty = math.sqrt(ridge * np.mean([one @ one for one in g]))
    least = 1e-12 * max(abs(one @ total) for one in g)
    chosen: list[int] = []

    def best(residual: np.ndarray, count: int) -> list[int]:
        rest = [row for row in range(len(g)) if row not in chosen]
        return sorted(rest, key=lambda row: (-round((g[row] @ residual) / (least or 1)), tie[row]))[:count]

    def system() -> tuple[np.ndarray, np.ndarray]:
        stacked = np.vstack([g[chosen].T, penalty * np.eye(len(chosen))])
        return stacked, np.concatenate([total, np.zeros(len(chosen))])

    residual = total
    while len(chosen) < keep:
        some = [row for row in best(residual, min(batch, max(1, len(chosen) // 32), keep - len(chosen))) if g[row] @ residual > least]
        if not some:
            break
        chosen += some
        weights = np.linalg.lstsq(*system(), rcond=None)[0]
        residual = total - g[chosen].T @ weights
    weights = nnls(*system())[0].tolist() if chosen else []
    chosen += best(residual, keep - len(chosen))
    return chosen, weights + [0.0] * (keep - len(weights))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ridge", "batch"), [(1.0, 1), (1.0, 16), (0.01, 1)])
def test_gradmatch_is_the_references(kind: str, ridge: float, batch: int) -> None:
    for n in (1, 2, 40, 110):
        pool = pool_of(n, width=5, kind=kind)
        for keep in {1, n // 8, n // 2, n * 4 // 5, n} & set(range(1, n + 1)):
            if kind in ("equal", "twice") and keep > n // 8:
                continue  # what is left over is rounding alone
            chosen, weights = ref_match(pool, keep, ridge=ridge, batch=batch)
            found = selectors.select("gradmatch", pool, keep, GradMatchParams(ridge=ridge, batch=batch))
            assert found.indices.tolist() == sorted(chosen)
            expected = dict(zip(chosen, weights, strict=True))
            assert found.weights is not None
            assert found.weights.tolist() == pytest.approx([expected[row] for row in found.indices.tolist()], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("keep", [36, 38, 40, 45])
def test_gradmatch_keeps_as_many_as_asked(keep: int) -> None:
    """Of 45, 9 would only harm: those that would least come first, with weight 0."""
    pool = pool_of(45, kind="opposed")
    chosen, _ = ref_match(pool, keep, ridge=1000, batch=1)
    found = selectors.select("gradmatch", pool, keep, GradMatchParams(ridge=1000))
    assert found.indices.tolist() == sorted(chosen)
    assert found.weights is not None
    assert (found.weights == 0).sum() == keep - 36


def test_gradmatch_matches_better_the_more_it_keeps_and_better_than_random() -> None:
    pool = pool_of(300, classes=5, width=8)
    g = gradients(pool)

    def error(kept: np.ndarray, weights: Any) -> float:
        return float(np.linalg.norm((weights[:, None] * g[kept]).sum(0) - g.sum(0)))

    errors = []
    for keep in (3, 10, 30, 100):
        found = selectors.select("gradmatch", pool, keep, GradMatchParams(ridge=0.01))
        assert (found.weights >= 0).all()
        by_chance = selectors.select("random", pool, keep).indices
        errors.append(error(found.indices, found.weights))
        assert errors[-1] < error(by_chance, np.full(keep, 300 / keep))
    assert all(more > 2 * less for more, less in pairwise(errors))


@pytest.mark.parametrize("seed", range(6))
def test_nonnegative_least_squares(seed: int) -> None:
    """Against scipy's, where many weights are bound to 0."""
    rng = np.random.default_rng(seed)
    matrix, goal = rng.normal(size=(60, 40)), rng.normal(size=60)
    found = nonnegative(matrix.T @ matrix, matrix.T @ goal)
    assert (found == 0).sum() > 5
    assert found == pytest.approx(nnls(matrix, goal)[0], abs=1e-9)


METHODS = ("craig", "facility_location", "gradmatch")


def params_of(method: str, **some: object) -> Any:
    return selectors.method(method).params(**some)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("balance", ["class", "uniform", "none"])
def test_the_order_of_samples_does_not_matter(method: str, balance: str) -> None:
    """Nor does a class of its own: more classes, with duplicates among them."""
    pool = pool_of(90, kind="twice")
    pool = replace(pool, labels=np.random.default_rng(0).integers(0, 3, 90).astype(np.int32))
    shuffled = np.random.default_rng(1).permutation(90)
    other = Pool(pool.uids[shuffled], pool.labels[shuffled], embedding=pool.embedding[shuffled], logits=pool.logits[shuffled])
    params = params_of(method, balance=balance, parts=2)
    one, two = (selectors.select(method, some, 33, params) for some in (pool, other))
    weights = [
        dict(
            zip(
                some.uids[found.indices].tolist(), [] if found.weights is None else found.weights.tolist(), strict=found.weights is not None
            )
        )
        for some, found in ((pool, one), (other, two))
    ]
    assert set(pool.uids[one.indices].tolist()) == set(other.uids[two.indices].tolist())
    assert weights[0].keys() == weights[1].keys()
    assert list(weights[0].values()) == pytest.approx([weights[1][uid] for uid in weights[0]], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_kept_to_or_parts_are_named(method: str) -> None:
    pool = pool_of(800)
    size = Size(np.array([800]), np.array([400]), 4, 3)
    cost = selectors.method(method).cost
    need = int(cost(size, params_of(method)).bytes)
    with pytest.raises(UsageError, match=rf"^{method} needs {need:,} bytes for groups of up to 800 samples, and --memory is ") as caught:
        selectors.select(method, pool, 400, params_of(method, memory=need - 1))
    parts = int(str(caught.value).split("parts=")[1].split(",")[0])
    assert str(caught.value).endswith(f": give --set parts={parts}, or --memory {need}")
    assert cost(size, params_of(method, parts=parts)).bytes < need <= cost(size, params_of(method, parts=parts - 1)).bytes
    assert len(selectors.select(method, pool, 400, params_of(method, memory=need - 1, parts=parts)).indices) == 400
    with pytest.raises(UsageError, match=f": give --memory {need}$"):
        selectors.select(method, pool, 400, params_of(method, memory=1))


@pytest.mark.parametrize("method", METHODS)
def test_what_they_refuse(method: str) -> None:
    pool = pool_of(10)
    with pytest.raises(UsageError, match="needs the embedding"):
        selectors.select(method, replace(pool, embedding=None), 2)
    with pytest.raises(UsageError, match="needs the logits"):
        selectors.select(method, replace(pool, logits=None), 2)
    with pytest.raises(UsageError, match=f"^{method} needs labels and 10 samples have none"):
        selectors.select(method, replace(pool, labels=np.full(10, -1, np.int32)), 2, params_of(method, balance="none"))
    with pytest.raises(SourceError, match="label 3 and logits are of 3 classes"):
        selectors.select(method, replace(pool, labels=np.full(10, 3, np.int32)), 2)
    bad = pool.logits.copy()
    bad[4, 1] = np.nan
    with pytest.raises(SourceError, match="logits is not a finite number for 1 of 10 candidates"):
        selectors.select(method, replace(pool, logits=bad), 2)


# --- as many samples as take several blocks (of 2^20 numbers)


def test_choices_and_clusters_over_several_blocks() -> None:
    """Of similarities on few levels, so that many are equal; in blocks of 699 rows."""
    m = 1500
    similar = np.random.default_rng(0).integers(0, 4, (m, m)).astype(np.float32)
    similar = np.maximum(similar, similar.T)
    chosen = np.random.default_rng(1).permutation(m)[:1200]
    first = np.sort(chosen)
    nearest = first[similar[:, first].argmax(1)]
    nearest[first] = first
    assert greedy.clusters(lambda some: similar[some], chosen, m).tolist() == np.bincount(nearest, minlength=m)[chosen].tolist()
    uids = order.uids_of(str(n) for n in range(m))
    by_looking_at_all = greedy.stochastic(lambda some: similar[some], uids, 2, seed=0, epsilon=0.01)
    assert by_looking_at_all.tolist() == greedy.lazy(similar, 2).tolist()
    equal = np.ones((m, m), np.float32)
    assert greedy.stochastic(lambda some: equal[some], uids, 1, seed=0, epsilon=0.01).tolist() == [0]


def test_craig_over_several_blocks() -> None:
    """1,100 samples in blocks of 953, by distances of gradients that are written out."""
    pool = pool_of(1100)
    g = gradients(pool)
    away = np.array([np.linalg.norm(g - one, axis=1) for one in g])
    similar = np.rint((1 - away / (2 * np.linalg.norm(g, axis=1).max())) * LEVELS)
    tie, best = np.array(hashes(pool)), np.zeros(1100)
    chosen: list[int] = []
    while len(chosen) < 25:
        gains = np.maximum(similar, best).sum(1)
        gains[chosen] = -1
        top = np.flatnonzero(gains == gains.max())
        chosen.append(int(top[np.argmin(tie[top])]))
        best = np.maximum(best, similar[chosen[-1]])
    found = selectors.select("craig", pool, 25)
    assert found.indices.tolist() == sorted(chosen)
    nearest = np.array(found.indices)[similar[found.indices].argmax(0)]
    assert found.weights is not None
    assert found.weights.tolist() == np.bincount(nearest, minlength=1100)[found.indices].tolist()
