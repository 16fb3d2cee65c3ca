"""scores/embedding.py: each score against plain loops on random and on awkward points, k-means against what must hold of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.scores import FROM_EMBEDDING, Embedded, embedding
from kdprune_data.scores.clusters import Points, fit, means, nearest

Row = list[float]


def embedded(points: Any, labels: Any = None, dtype: type = np.float32) -> Embedded:
    array = np.asarray(points, dtype)
    uids = order.uids_of(f"sample-{n}" for n in range(len(array)))
    given = np.zeros(len(array)) if labels is None else labels
    return Embedded(uids, np.asarray(given, np.int32), array, seed=0)


def compute(name: str, data: Embedded, **settings: Any) -> NDArray[np.float64]:
    score = FROM_EMBEDDING[name]
    return score.compute(data, score.settings(**settings))


def made(n: int, d: int, classes: int, seed: int = 0, dtype: type = np.float32) -> Embedded:
    random = np.random.default_rng([n, d, classes, seed])
    labels = random.integers(classes, size=n)
    return embedded(random.normal(size=(classes, d))[labels] * 3 + random.normal(size=(n, d)), labels, dtype)


POOLS = {
    "random": made(60, 5, 4),
    "float16": made(60, 5, 4, dtype=np.float16),
    "one class": made(40, 3, 1),
    "one number": made(30, 1, 2),
    "one sample": embedded([[1.0, -2.0]]),
    "two samples": embedded([[1.0, 0.0], [0.0, 1.0]], [0, 1]),
    "a class of one": embedded([[0.0, 1.0], [1.0, 1.0], [9.0, 0.0], [2.0, 1.0]], [3, 3, 7, 3]),
    "all equal": embedded([[0.1, 0.2, 0.3]] * 12, [0, 1, 2] * 4),
    "duplicates": embedded([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]] * 6, [0, 0, 1] * 6),
    "zeros": embedded([[0.0, 0.0]] * 4 + [[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]], [0, 1, 0, 1, 0, 1, 0]),
    "opposite": embedded([[1.0, 0.0], [-1.0, 0.0]] * 5, [0, 1] * 5),
    "largest of float16": embedded([[65504.0, -65504.0], [65504.0, 65504.0], [0.0, 65504.0]], [0, 0, 0], np.float16),
    "smallest of float16": embedded([[6e-8, 0.0], [0.0, 6e-8], [6e-8, 6e-8]], [0, 1, 1], np.float16),
}


# --- the definitions, in plain loops


def length(v: Row) -> float:
    return math.sqrt(math.fsum(x * x for x in v))


def plain_unit(v: Row) -> Row:
    return [x / length(v) for x in v] if any(v) else v


def cosine(a: Row, b: Row) -> float:
    return math.fsum(x * y for x, y in zip(plain_unit(a), plain_unit(b), strict=True))


def distance(a: Row, b: Row) -> float:
    return length([x - y for x, y in zip(a, b, strict=True)])


def plain_median(values: Row) -> float:
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def plain_class_distance(points: list[Row], labels: list[int]) -> Row:
    found = []
    for point, label in zip(points, labels, strict=True):
        members = [other for other, its in zip(points, labels, strict=True) if its == label]
        found.append(distance(point, [plain_median([member[k] for member in members]) for k in range(len(point))]))
    return found


def plain_density(points: list[Row], neighbours: int) -> Row:
    found = []
    for i, point in enumerate(points):
        near = sorted((cosine(point, other) for j, other in enumerate(points) if j != i), reverse=True)[:neighbours]
        found.append(sum(near) / len(near) if near else 0.0)
    return found


def plain_prototype(points: list[Row], centroids: list[Row], *, angle: bool) -> Row:
    if angle:
        points = [plain_unit(point) for point in points]
    best = [min(distance(point, centroid) for centroid in centroids) for point in points]
    return [d * d / 2 for d in best] if angle else best


def rows(data: Embedded) -> list[Row]:
    found: list[Row] = data.embedding.astype(float).tolist()
    return found


@pytest.mark.parametrize("pool", POOLS)
def test_class_distance_is_its_definition(pool: str) -> None:
    data = POOLS[pool]
    assert compute("class_distance", data).tolist() == pytest.approx(plain_class_distance(rows(data), data.labels.tolist()), abs=1e-9)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("neighbours", [1, 3, 10, 500])
def test_density_is_its_definition(pool: str, neighbours: int) -> None:
    assert compute("density", POOLS[pool], neighbours=neighbours).tolist() == pytest.approx(
        plain_density(rows(POOLS[pool]), neighbours), abs=1e-9
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("angle", [True, False])
@pytest.mark.parametrize("clusters", [None, 1, 3, 100])
def test_prototype_is_the_distance_to_the_nearest_of_centroids_that_are_means(pool: str, angle: bool, clusters: int | None) -> None:
    """The centroids are at rest: each is the mean of the points that are nearest to it, and the score is the distance to it."""
    data = POOLS[pool]
    by_hash = np.argsort(order.order_hash(data.uids, 0, "clusters"))
    count = clusters or len(set(data.labels.tolist()))
    points = Points(data.embedding, by_hash, cosine=angle, memory=0)
    centroids = fit(points, data.uids[by_hash], count, seed=0, iterations=100, cosine=angle).tolist()
    distinct = {tuple(np.round(plain_unit(point) if angle else point, 12)) for point in rows(data)}
    assert len(centroids) == min(count, len(distinct))
    own: dict[int, list[Row]] = {}
    for point in points[slice(None)].tolist():
        near = [distance(point, centroid) for centroid in centroids]
        own.setdefault(min(range(len(near)), key=near.__getitem__), []).append(point)
    for k, members in own.items():
        mean = [sum(column) / len(members) for column in zip(*members, strict=True)]
        if angle and length(mean) < 1e-9:
            continue  # opposite directions have no mean: the centroid stays
        assert centroids[k] == pytest.approx(plain_unit(mean) if angle else mean, rel=1e-9, abs=1e-9)
    found = compute("prototype", data, clusters=clusters, distance="cosine" if angle else "euclidean")
    assert found.tolist() == pytest.approx(plain_prototype(rows(data), centroids, angle=angle), rel=1e-7, abs=1e-9)


def plain_lloyd(points: list[Row], centroids: list[Row], *, angle: bool) -> list[Row]:
    """From given centroids, until no point changes its cluster; a cluster that is empty, or has no mean direction, stays where it is."""
    points = [plain_unit(point) for point in points] if angle else points
    before: list[int] = []
    for _ in range(100):
        member = [min(range(len(centroids)), key=lambda k, point=point: distance(point, centroids[k])) for point in points]
        if member == before:
            break
        before = member
        for k in range(len(centroids)):
            own = [point for point, its in zip(points, member, strict=True) if its == k]
            if own:
                mean = [math.fsum(column) / len(own) for column in zip(*own, strict=True)]
                centroids[k] = (plain_unit(mean) if length(mean) > 1e-12 else centroids[k]) if angle else mean
    return centroids


@pytest.mark.parametrize("angle", [True, False])
@pytest.mark.parametrize("clusters", [1, 2, 4, 9])
@pytest.mark.parametrize("fitted", [7, 20, 60, 50_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_prototype_is_that_of_lloyd(monkeypatch: pytest.MonkeyPatch, angle: bool, clusters: int, fitted: int, seed: int) -> None:
    """From the first centroids on, of the samples that find them: the first ones by their hash; and then all are measured."""
    data = made(60, 3, 4, seed)
    monkeypatch.setattr(embedding, "FIT", fitted)
    by_hash = np.argsort(order.order_hash(data.uids, 0, "clusters"))[:fitted]
    points = Points(data.embedding, by_hash, cosine=angle, memory=0)
    first = fit(points, data.uids[by_hash], clusters, seed=0, iterations=0, cosine=angle)
    there = {tuple(point) for point in points[slice(None)].tolist()}
    assert all(tuple(one) in there for one in first.tolist())
    assert len(first) == min(clusters, fitted)
    chosen = [rows(data)[n] for n in by_hash.tolist()]
    centroids = plain_lloyd(chosen, first.tolist(), angle=angle)
    expected = plain_prototype(rows(data), centroids, angle=angle)
    found = compute("prototype", data, clusters=clusters, distance="cosine" if angle else "euclidean")
    assert found.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


# --- by hand


def test_class_distance_by_hand() -> None:
    """Medians (1, 0) of class 0, one far point among three moving nothing, and (0, 2) of class 1, between two."""
    data = embedded([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 0, 1, 1])
    assert compute("class_distance", data).tolist() == [1, 0, 99, 1, 1]


def test_density_by_hand() -> None:
    """A right angle between two pairs that are alike but for length."""
    data = embedded([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 7.0]])
    assert compute("density", data, neighbours=1).tolist() == [1, 1, 1, 1]
    assert compute("density", data, neighbours=3).tolist() == pytest.approx([1 / 3] * 4)


def test_prototype_by_hand() -> None:
    """Two far pairs: the centroids are their middles; as directions, their bisectors."""
    data = embedded([[0.0, 1.0], [0.0, 3.0], [50.0, 0.0], [54.0, 0.0]], [0, 0, 1, 1])
    assert compute("prototype", data, distance="euclidean").tolist() == pytest.approx([1, 1, 2, 2])
    assert compute("prototype", data).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-12)
    spread = embedded([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]], [0, 0, 1])
    assert compute("prototype", spread, clusters=1, distance="euclidean").tolist() == pytest.approx([math.sqrt(13) / 3] * 2 + [4 / 3])
    assert compute("prototype", spread, clusters=1).tolist() == pytest.approx([1 - math.sqrt(0.5)] * 2 + [2])
    assert compute("prototype", spread, clusters=3).tolist() == [0, 0, 0]


def test_an_embedding_of_zeros_has_no_direction() -> None:
    """It is at a right angle to everything, other zeros too."""
    data = embedded([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert compute("density", data, neighbours=1).tolist() == [0, 0, 1, 1]
    assert compute("prototype", data, clusters=2).tolist() == pytest.approx([0, 0, 0, 0])


# --- clusters


def test_centroids_of_clear_clusters_are_found() -> None:
    """Far groups of unequal size, more dimensions than two: k-means++ starts in each."""
    random = np.random.default_rng(0)
    centres = np.array(list(itertools.product([0.0, 100.0], repeat=3)))
    points = np.concatenate([centre + random.normal(size=(size, 3)) for centre, size in zip(centres, range(3, 60, 7), strict=False)])
    data = embedded(points)
    for seed in range(5):
        found = compute("prototype", replace(data, seed=seed), clusters=8, distance="euclidean")
        assert found.max() < 6


def test_first_centroids_are_drawn_by_squared_distance() -> None:
    """Each point comes first a third of the time; after 0, the second is 2 rather than 1 four times in five."""
    data = embedded([[0.0], [1.0], [2.0]])
    points = Points(data.embedding, np.arange(3), cosine=False, memory=10**6)
    drawn = [tuple(fit(points, data.uids, 2, seed=seed, iterations=0, cosine=False)[:, 0]) for seed in range(3000)]
    first = [pair for pair in drawn if pair[0] == 0]
    assert len(first) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert sum(pair == (0, 2) for pair in first) / len(first) == pytest.approx(0.8, abs=0.03)
    assert all(a != b for a, b in drawn)


def test_a_cluster_that_loses_its_points_stays() -> None:
    """And, of directions, one whose points cancel out; of two centroids at one place, the first gets the points."""
    points = Points(np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0]], np.float32), np.arange(3), cosine=True, memory=0)
    before = np.array([[0.6, 0.8], [0.0, 1.0], [0.0, 1.0]])
    member = np.array([0, 0, 1])
    assert means(points, member, before, cosine=True).tolist() == before.tolist()
    assert means(points, member, before, cosine=False).tolist() == [[0, 0], [0, 1], [0, 1]]
    assert nearest(points[slice(None)], before).tolist() == [0, 1, 1]


def test_density_within_clusters() -> None:
    """Far pairs: each sample's neighbours are its own pair; a sample that is a cluster by itself is alone."""
    data = embedded([[1.0, 0.0], [1.0, 0.02], [0.0, 1.0], [0.01, 1.0], [-1.0, -1.0]])
    found = compute("density", data, clusters=3)
    alike = [cosine([1.0, 0.0], [1.0, 0.02]), cosine([0.0, 1.0], [0.01, 1.0])]
    assert found.tolist() == pytest.approx([alike[0], alike[0], alike[1], alike[1], 0.0], abs=1e-7)
    assert np.array_equal(compute("density", data, clusters=1), compute("density", data))


def test_density_within_clusters_is_at_most_the_exact_one() -> None:
    """Where each cluster holds as many neighbours as are asked for."""
    data = made(300, 6, 3)
    exact, near = compute("density", data, neighbours=3), compute("density", data, neighbours=3, clusters=3)
    assert (near <= exact + 1e-12).all()
    assert np.mean(near == exact) > 0.8


# --- what must hold of each


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("prototype", {}), ("prototype", {"distance": "euclidean"}), ("class_distance", {}), ("density", {}), ("density", {"clusters": 2})],
)
def test_the_order_of_samples_changes_nothing(pool: str, name: str, settings: dict[str, Any]) -> None:
    """To the last bit; and what is given is left as it is."""
    data = POOLS[pool]
    before = data.embedding.copy()
    found = compute(name, data, **settings)
    assert (found.shape, found.dtype) == (data.labels.shape, np.float64)
    assert np.isfinite(found).all()
    places = np.random.default_rng(1).permutation(len(found))
    moved = replace(data, uids=data.uids[places], labels=data.labels[places], embedding=data.embedding[places])
    assert np.array_equal(compute(name, moved, **settings), found[places])
    assert np.array_equal(data.embedding, before)


@pytest.mark.parametrize("name", FROM_EMBEDDING)
def test_memory_changes_nothing(name: str) -> None:
    """But the last bits of a product of matrices, which density rounds off."""
    data = made(700, 8, 3)
    whole = compute(name, data)
    for memory in (1, 100_000, 600_000):
        assert np.array_equal(compute(name, replace(data, memory=memory)), whole)


@pytest.mark.parametrize("name", FROM_EMBEDDING)
def test_equal_points_score_the_same(name: str) -> None:
    """To the last bit, so that the order hash decides between them."""
    data = made(150, 7, 2)
    twice = embedded(np.concatenate([data.embedding] * 3), np.concatenate([data.labels] * 3))
    assert len(set(map(tuple, compute(name, twice).reshape(3, -1).T.tolist()))) == 150
    assert all(len(set(column)) == 1 for column in compute(name, twice).reshape(3, -1).T.tolist())


def test_many_blocks() -> None:
    """More samples than a block of k-means or of pairs holds, each found at its own place."""
    data = made(2100, 2, 5)
    found = compute("density", replace(data, memory=1), neighbours=5)
    unit = data.embedding.astype(float) / np.linalg.norm(data.embedding.astype(float), axis=1, keepdims=True)
    for i in range(0, 2100, 300):
        assert found[i] == pytest.approx(np.sort(np.delete(unit @ unit[i], i))[-5:].mean(), abs=1e-11)


def test_the_seed_moves_centroids() -> None:
    data = made(200, 4, 2)
    assert not np.array_equal(compute("prototype", data, clusters=9), compute("prototype", replace(data, seed=1), clusters=9))
    assert np.array_equal(compute("class_distance", data), compute("class_distance", replace(data, seed=1)))
    assert np.array_equal(compute("density", data), compute("density", replace(data, seed=1)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prototype", {"clusters": 0}),
        ("prototype", {"distance": "manhattan"}),
        ("density", {"neighbours": 0}),
        ("density", {"clusters": 0}),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FROM_EMBEDDING[name].settings(**settings)
