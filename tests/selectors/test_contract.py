"""What every method owes, whatever it does: one contract over all of SELECTORS. A new method is held to it by being registered."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.errors import KdpruneError, SourceError, UsageError
from kdprune_data.formats.scores import SCORES
from kdprune_data.selectors import SELECTORS, Params, Picked, Pool, Size
from kdprune_data.selectors.base import BALANCES, EMBEDDING, LOGITS, SHARED

METHODS = list(SELECTORS)
NESTED = [name for name in METHODS if SELECTORS[name].nested]
CUT = [name for name in METHODS if hasattr(SELECTORS[name].params(), "cut")]
COSTLY = [name for name in METHODS if SELECTORS[name].cost]
SIZES = [[1], [7], [1, 1], [13, 0, 8], [1] * 6, [30, 3, 17]]
SHARES = ("correct", "p_true", "confidence", "margin")
"""Scores from 0 to 1."""


def pool_of(sizes: list[int], seed: int = 0, *, width: int = 6) -> Pool:
    """Classes of these sizes, shuffled, with every score there is, an embedding and logits. `forgetting` has few levels."""
    rng = np.random.default_rng([seed, *sizes])
    n, classes = sum(sizes), max(2, len(sizes))
    uids = rng.permutation(np.unique(rng.integers(0, 2**64, n + 4, np.uint64, endpoint=False)))[:n]
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    scores = {name: rng.random(n) if name in SHARES else rng.gamma(2, size=n) for name in SCORES}
    scores |= {"forgetting": rng.integers(0, 4, n).astype(np.float64), "aum": rng.normal(size=n)}
    centres = rng.normal(size=(classes, width))
    return Pool(
        uids,
        labels,
        scores,
        {name: score.hard for name, score in SCORES.items()},
        centres[labels] + rng.normal(size=(n, width)) / 2,
        rng.normal(size=(n, classes)) + 2 * np.eye(classes)[labels],
    )


def permuted(pool: Pool, rows: np.ndarray) -> Pool:
    """The pool's rows in another order."""
    assert pool.embedding is not None
    assert pool.logits is not None
    scores = {name: values[rows] for name, values in pool.scores.items()}
    moved = {"scores": scores, "embedding": pool.embedding[rows], "logits": pool.logits[rows]}
    return replace(pool, uids=pool.uids[rows], labels=pool.labels[rows], **moved)


def arrays(pool: Pool) -> dict[str, np.ndarray]:
    """All that a pool holds, by name."""
    assert pool.embedding is not None
    assert pool.logits is not None
    return {"uids": pool.uids, "labels": pool.labels, EMBEDDING: pool.embedding, LOGITS: pool.logits, **pool.scores}


def params_of(name: str, **common: object) -> Params:
    """A method's default settings, but for the seed and the like."""
    return SELECTORS[name].params(**common)


def counts_of_keeping(n: int) -> list[int]:
    """One, all, and some between."""
    return sorted({1, 2, n // 10, n // 3, n // 2, n - 1, n} & set(range(1, n + 1)))


def cases(name: str) -> Iterator[tuple[Pool, int, Params]]:
    """Pools, counts and settings."""
    for sizes in SIZES:
        pool = pool_of(sizes)
        for balance in BALANCES:
            for keep in counts_of_keeping(len(pool.uids)):
                yield pool, keep, params_of(name, balance=balance, seed=keep)


def check(found: Picked, n: int, keep: int) -> None:
    """Unique rows in range, exactly as many as asked; an order of all; a weight each."""
    assert found.indices.dtype == np.int64
    assert found.indices.shape == (keep,)
    assert np.all(np.diff(found.indices) > 0)
    assert 0 <= found.indices[0] <= found.indices[-1] < n
    if found.order is not None:
        assert sorted(found.order.tolist()) == list(range(n))
        assert np.array_equal(np.sort(found.order[:keep]), found.indices)
    if found.weights is not None:
        assert found.weights.dtype == np.float32
        assert found.weights.shape == (keep,)
        assert np.isfinite(found.weights).all()
        assert found.weights.min() >= 0


def refusal(name: str, pool: Pool, keep: int, params: Params, kind: type[KdpruneError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        selectors.select(name, pool, keep, params)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", METHODS)
def test_default_settings(name: str) -> None:
    pool = pool_of([20, 30])
    found = selectors.select(name, pool, 10)
    assert np.array_equal(found.indices, selectors.select(name, pool, 10, params_of(name)).indices)


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_subset_whatever_the_order_of_the_pool(name: str) -> None:
    """Rows, their weights and their ranking, by uid. The scores' ties and doubled points are settled by the hash."""
    pool = pool_of([30, 1, 40])
    assert pool.embedding is not None
    pool.embedding[:20] = pool.embedding[20:40]
    for balance in BALANCES:
        params = params_of(name, balance=balance, seed=3)
        straight = by_uid(pool, selectors.select(name, pool, 25, params))
        assert by_uid(pool, selectors.select(name, pool, 25, params)) == straight
        for seed in range(3):
            other = permuted(pool, np.random.default_rng(seed).permutation(71))
            assert by_uid(other, selectors.select(name, other, 25, params)) == straight


def by_uid(pool: Pool, found: Picked) -> tuple[dict[int, float], list[int]]:
    """What was kept and with which weights, and in which order, without row numbers."""
    weights = np.ones(len(found.indices)) if found.weights is None else found.weights
    kept = dict(zip(pool.uids[found.indices].tolist(), weights.tolist(), strict=True))
    return kept, [] if found.order is None else pool.uids[found.order].tolist()


@pytest.mark.parametrize("name", METHODS)
def test_exact_unique_in_range_and_in_balance(name: str) -> None:
    """And each class gives as many as `random` keeps; after a cut-off to within what its rounding and that of `random` make."""
    for pool, keep, params in cases(name):
        found = selectors.select(name, pool, keep, params)
        check(found, len(pool.uids), keep)
        if params.balance != "none":
            random = selectors.select("random", pool, keep, Params(balance=params.balance)).indices
            kept, by_chance = (np.bincount(pool.labels[rows], minlength=6) for rows in (found.indices, random))
            within = 2 if name in CUT and keep < len(pool.uids) / 2 else 0
            assert np.abs(kept - by_chance).max() <= within


@pytest.mark.parametrize(
    ("balance", "keep", "cut"),
    [
        ("class", 32, None),
        ("class", 64, 0.25),
        ("class", 160, 0.5),
        ("class", 32, 0.9),
        ("uniform", 32, None),
        ("uniform", 45, 0.25),
        ("uniform", 6, 0.9),
    ],
)
@pytest.mark.parametrize("name", CUT)
def test_a_cut_off_leaves_classes_their_proportions(name: str, balance: str, keep: int, cut: float | None) -> None:
    """Where sizes divide, each gives exactly what `random` takes of it, though the smallest class has all of the lowest aum."""
    pool = pool_of([200, 100, 20])
    skewed = replace(pool, scores=pool.scores | {"aum": pool.scores["aum"] - 50 * pool.labels})
    found = selectors.select(name, skewed, keep, params_of(name, balance=balance, cut=cut))
    random = selectors.select("random", pool, keep, Params(balance=balance))
    assert np.bincount(pool.labels[found.indices]).tolist() == np.bincount(pool.labels[random.indices]).tolist()


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("cut", [0.0, 0.25, 0.6])
def test_a_cut_off_narrows_the_candidates_and_never_the_count(name: str, cut: float) -> None:
    pool = pool_of([40, 60])
    by_aum = np.argsort(pool.scores["aum"])
    each = [by_aum[pool.labels[by_aum] == label][: round(size * cut)] for label, size in enumerate((40, 60))]
    for balance in BALANCES:
        lowest = set(by_aum[: round(100 * cut)].tolist() if balance == "none" else np.concatenate(each).tolist())
        found = selectors.select(name, pool, 40, params_of(name, cut=cut, balance=balance))
        check(found, 100, 40)
        assert not lowest & set(found.indices.tolist())
    if cut:
        line = refusal(name, pool, 90, params_of(name, cut=cut))
        assert line.startswith(
            f"cannot keep 90: {round(100 * cut)} of 100 candidates are left out first, so {round(100 - 100 * cut)} are left"
        )
        assert "aum" in SELECTORS[name].needs(params_of(name, cut=cut))
    else:
        assert "aum" not in set(SELECTORS[name].needs(params_of(name, cut=cut))) - {getattr(params_of(name), "score", None)}


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_changed(name: str) -> None:
    pool = pool_of([20, 30])
    before = {what: array.copy() for what, array in arrays(pool).items()}
    for array in arrays(pool).values():
        array.flags.writeable = False
    for balance in BALANCES:
        selectors.select(name, pool, 12, params_of(name, balance=balance))
    assert all(np.array_equal(array, before[what]) for what, array in arrays(pool).items())


def flat(what: str) -> Callable[[Pool], Pool]:
    """A pool where something is the same of every sample."""

    def change(pool: Pool) -> Pool:
        assert pool.embedding is not None
        assert pool.logits is not None
        if what == "scores":
            return replace(pool, scores={name: np.full(len(values), 0.5) for name, values in pool.scores.items()})
        return replace(
            pool, embedding=np.tile(pool.embedding[:1], (len(pool.uids), 1)), logits=np.tile(pool.logits[:1], (len(pool.uids), 1))
        )

    return change


CHANGES: dict[str, Callable[[Pool], Pool]] = {
    "scores equal": flat("scores"),
    "vectors equal": flat("vectors"),
    "all equal": lambda pool: flat("vectors")(flat("scores")(pool)),
    "scores 0": lambda pool: replace(pool, scores={name: np.zeros(len(values)) for name, values in pool.scores.items()}),
    "embedding 0": lambda pool: replace(pool, embedding=np.zeros((len(pool.uids), 3))),
    "embedding of one number": lambda pool: replace(pool, embedding=np.asarray(pool.embedding)[:, :1]),
    "embedding large": lambda pool: replace(pool, embedding=np.asarray(pool.embedding) * 1e4),
    "surely right": lambda pool: replace(pool, logits=1e3 * np.eye(np.asarray(pool.logits).shape[1])[pool.labels]),
    "surely wrong": lambda pool: replace(pool, logits=-1e3 * np.eye(np.asarray(pool.logits).shape[1])[pool.labels]),
    "float16": lambda pool: replace(pool, embedding=np.asarray(pool.embedding, np.float16), logits=np.asarray(pool.logits, np.float16)),
    "float32": lambda pool: replace(pool, scores={name: values.astype(np.float32) for name, values in pool.scores.items()}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_odd_pools(name: str, change: str) -> None:
    """Still exact, and still independent of order. (A warning is an error here.)"""
    for sizes in ([1], [9], [12, 0, 8]):
        pool = CHANGES[change](pool_of(sizes))
        n = len(pool.uids)
        other = permuted(pool, np.arange(n)[::-1])
        for balance in BALANCES:
            for keep in sorted({1, 1 + n // 3, n}):
                found = selectors.select(name, pool, keep, params_of(name, balance=balance))
                check(found, n, keep)
                assert by_uid(other, selectors.select(name, other, keep, params_of(name, balance=balance))) == by_uid(pool, found)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", NESTED)
def test_nested(name: str, balance: str) -> None:
    """Those that say so: each subset lies in the next."""
    pool = pool_of([40, 7, 1, 22])
    before: set[int] = set()
    for keep in (1, 4, 7, 8, 20, 35, 36, 63, 70):
        kept = set(selectors.select(name, pool, keep, params_of(name, balance=balance)).indices.tolist())
        assert before <= kept
        before = kept


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_number_is_refused_by_name(name: str, bad: float) -> None:
    """In whatever the method needs, of any candidate; in what it does not need it is nobody's business."""
    needs = SELECTORS[name].needs(params_of(name))
    for what in [*SCORES, EMBEDDING, LOGITS]:
        pool = pool_of([20, 30])
        arrays(pool)[what][17] = bad
        if what in needs:
            line = refusal(name, pool, 5, params_of(name), SourceError)
            assert line.startswith(f"{what} is not a finite number for 1 of 50 candidates (the first has uid {pool.uids[17]})")
        else:
            check(selectors.select(name, pool, 5, params_of(name)), 50, 5)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_lacking_is_refused_with_the_command_that_provides_it(name: str) -> None:
    """And nothing but the needs is needed."""
    pool, params = pool_of([20, 30]), params_of(name)
    needs = SELECTORS[name].needs(params)
    least = replace(
        pool,
        scores={what: values for what, values in pool.scores.items() if what in needs},
        embedding=pool.embedding if EMBEDDING in needs else None,
        logits=pool.logits if LOGITS in needs else None,
    )
    check(selectors.select(name, least, 5, params), 50, 5)
    for what in needs:
        without = {what: None} if what in (EMBEDDING, LOGITS) else {"scores": {n: v for n, v in least.scores.items() if n != what}}
        line = refusal(name, replace(least, **without), 5, params)
        assert what in line
        assert "`kdprune-data score" in line


@pytest.mark.parametrize("keep", [0, -1, 51, 1000])
@pytest.mark.parametrize("name", METHODS)
def test_more_than_there_are_or_none_is_refused(name: str, keep: int) -> None:
    line = refusal(name, pool_of([20, 30]), keep, params_of(name))
    assert line == f"cannot keep {keep:,} of 50 candidates: choose a fraction that keeps between 1 and 50"


@pytest.mark.parametrize("name", METHODS)
def test_classes_need_labels(name: str) -> None:
    pool = pool_of([20, 30])
    pool.labels[7] = -1
    for balance in ("class", "uniform"):
        line = refusal(name, pool, 5, params_of(name, balance=balance))
        assert "needs labels and 1 samples have none" in line


@pytest.mark.parametrize("name", METHODS)
def test_without_labels(name: str) -> None:
    """With balance `none` a method selects, unless it needs labels for something else, and says so."""
    pool = pool_of([20, 30])
    pool.labels[:] = -1
    try:
        check(selectors.select(name, pool, 5, params_of(name, balance="none")), 50, 5)
    except UsageError as error:
        assert str(error).startswith(f"{name} needs labels and 50 samples have none")  # noqa: PT017 - some raise it, some need not


def settings() -> Iterator[tuple[str, str, str, object]]:
    """Every setting of every method that has limits: method, name, what is wrong, and a value that is."""
    for name in METHODS:
        for field in dataclasses.fields(SELECTORS[name].params):
            limits = field.metadata
            if field.name in SHARED:
                continue
            if limits["least"] is not None:
                yield name, field.name, "too small", type(limits["least"])(limits["least"] - 1)
            if limits["most"] is not None:
                yield name, field.name, "too large", limits["most"] + 1
            if limits["choices"]:
                yield name, field.name, "unknown", "neither"
            if limits["least"] is not None and isinstance(field.default, float):
                yield name, field.name, "not a finite number", np.nan


@pytest.mark.parametrize(("name", "setting", "wrong", "value"), list(settings()))
def test_settings_out_of_range_are_refused(name: str, setting: str, wrong: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{setting}.*{wrong}|{wrong}.*{setting}"):
        SELECTORS[name].params(**{setting: value})


@pytest.mark.parametrize("name", METHODS)
def test_settings_have_defaults_and_numbers_have_limits(name: str) -> None:
    """So that `--set` can be checked, and left out."""
    for field in dataclasses.fields(SELECTORS[name].params):
        assert field.default is not dataclasses.MISSING
        assert field.metadata["help"]
        assert field.metadata["least"] is not None or isinstance(field.default, str), field.name


# --- cost and memory

SLACK = 400_000
"""Bytes of what every method has for its groups: hashes, places, lists of rows."""


@pytest.mark.parametrize("name", COSTLY)
def test_memory_is_what_cost_says(name: str) -> None:
    """Measured, at a size where pairs take far more than the pool: with memory enough, and with a tenth of what it takes then."""
    pool, sizes, keep = pool_of([700, 500], width=8), np.array([700, 500]), 300
    cost = SELECTORS[name].cost
    assert cost is not None
    size = Size(sizes, np.array([175, 125]), 8, 2)
    ample = cost(size, params_of(name)).bytes
    assert 0 < cost(size, params_of(name)).multiplications < np.inf
    picked = [taken(name, pool, keep, params_of(name), ample)]
    for memory in (int(ample), int(ample) // 2, int(ample) // 10):
        params = params_of(name, memory=memory)
        told = cost(size, params).bytes
        if told <= memory:
            picked.append(taken(name, pool, keep, params, told))
    assert all(np.array_equal(found.indices, picked[0].indices) for found in picked)


def taken(name: str, pool: Pool, keep: int, params: Params, told: float) -> Picked:
    """What is selected, in no more bytes than were told."""
    selectors.select(name, pool, keep, params)  # what is imported on the way is not the method's
    tracemalloc.start()
    found = selectors.select(name, pool, keep, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= told + SLACK, f"{name} took {peak:,} bytes and told {told:,}"
    return found


def test_seeds_matter_where_there_is_chance() -> None:
    for name in ("random", "ccs", "dual_beta"):
        pool = pool_of([60, 60])
        kept = {tuple(selectors.select(name, pool, 12, params_of(name, seed=seed)).indices.tolist()) for seed in range(4)}
        assert len(kept) == 4


def test_the_hash_is_the_only_chance() -> None:
    """A sample's own uid decides where all else is equal: `select` hashes, ascending."""
    pool = CHANGES["all equal"](pool_of([40]))
    first = np.argsort(order.order_hash(pool.uids, 5, "select"))[:7]
    for name in ("random", "ccs"):
        params = params_of(name, seed=5, **({"cut": 0.0} if name in CUT else {}))
        assert np.array_equal(np.sort(first), selectors.select(name, pool, 7, params).indices)
