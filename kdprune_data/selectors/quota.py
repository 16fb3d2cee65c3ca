"""From a ranking to a subset of exact size: how many of each class, and which.

Every sample gets a quota from its place in the ranking of its class, and the k smallest quotas are kept. One sort, exact for any k, and
nested: a smaller k keeps a prefix of the same list. (Largest remainder is exact too, but not nested: its remainders move when k does.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.selectors.base import Params, Picked, Pool


def places(ranking: NDArray[np.int64], groups: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's 0-based place in the ranking of its group, and its group's size: int64 of shape (n,) each."""
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    grouped = ranking[np.argsort(member[ranking], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    place = np.empty(len(groups), np.int64)
    place[grouped] = np.arange(len(groups)) - starts[member[grouped]]
    return place, sizes[member].astype(np.int64)


def take(pool: Pool, ranking: NDArray[np.int64], keep: int, params: Params) -> Picked:
    """Keep `keep` samples by a ranking of the pool, balanced as asked; the result's `order` is that of keeping.

    `class`: quota (2r + 1) / 2n for place r of a class of n, so classes keep their proportions (Sainte-Lague's rule). `uniform`: quota r,
    so classes get equal shares. `none`: the ranking itself. Ties by class number, then by the order hash.

    Raises UsageError when the pool holds fewer than `keep`, or labels are needed and missing.
    """
    check(pool, keep, params)
    if params.balance == "none":
        kept = ranking
    else:
        place, size = places(ranking, pool.labels)
        # A quotient of integers below 2^26 is rounded to one float64 whatever its terms, so equal quotas compare equal.
        quota = (2 * place + 1) / (2 * size) if params.balance == "class" else place
        kept = np.lexsort((order.order_hash(pool.uids, params.seed, "select"), pool.labels, quota))
    return Picked(np.sort(kept[:keep]), kept.astype(np.int64))


def lowest(pool: Pool, ranking: NDArray[np.int64], count: int, params: Params) -> NDArray[np.int64]:
    """The first `count` rows of a ranking, to be left out before anything is kept: int64 of shape (count,).

    Of each class its proportion, as `take` does with balance `class`, however what is kept will be balanced: so what is left has the
    classes' proportions, and none vanishes that half of would stay. With balance `none` those of the whole ranking.
    """
    if count == 0 or params.balance == "none":
        return ranking[:count]
    kept = take(pool, ranking, count, Params(params.seed, "class")).order
    assert kept is not None
    return kept[:count]


def check(pool: Pool, keep: int, params: Params) -> None:
    """Raise UsageError when the pool holds fewer than `keep`, or labels are needed and missing."""
    n = len(pool.uids)
    if not 1 <= keep <= n:
        raise UsageError(f"cannot keep {keep:,} of {n:,} candidates: choose a fraction that keeps between 1 and {n:,}")
    unlabelled = int((pool.labels < 0).sum())
    if unlabelled and params.balance != "none":
        raise UsageError(f"--balance {params.balance} needs labels and {unlabelled:,} samples have none: use --balance none")


@dataclass(frozen=True)
class Group:
    """Candidates that are selected from by themselves: rows of the pool, int64 of shape (m,), ascending by order hash, so that nothing
    computed from them depends on the order of the pool; and how many of them are kept."""

    rows: NDArray[np.int64]
    keep: int


def groups(pool: Pool, keep: int, params: Params, parts: int = 1) -> list[Group]:
    """The classes, in order (with balance `none` one group of all), and how many `take` would keep of each; only those that keep some.

    parts: each is cut at random into so many, but never into more than are kept of it, so that every part keeps some; for methods whose
    cost grows with the square of a group.
    Raises UsageError as `take` does.
    """
    by_hash = np.argsort(order.order_hash(pool.uids, params.seed, "select"), kind="stable").astype(np.int64)
    if params.balance == "none":
        check(pool, keep, params)
        whole = [Group(by_hash, keep)]
    else:
        kept = pool.labels[take(pool, by_hash, keep, params).indices]
        members = {label: by_hash[pool.labels[by_hash] == label] for label in np.unique(kept).tolist()}
        whole = [Group(rows, int((kept == label).sum())) for label, rows in members.items()]
    return [part for group in whole for part in _cut(group, parts)]


def _cut(group: Group, parts: int) -> list[Group]:
    """Parts of equal size that keep equally many: the first have one more of either, where that does not divide."""
    parts = min(parts, group.keep)
    (size, larger), (keep, more) = divmod(len(group.rows), parts), divmod(group.keep, parts)
    edges = [part * size + min(part, larger) for part in range(parts + 1)]
    return [Group(group.rows[edges[p] : edges[p + 1]], keep + (p < more)) for p in range(parts)]


def narrowed(pool: Pool, leave_out: NDArray[np.int64], keep: int, select: Callable[[Pool], Picked]) -> Picked:
    """What `select` keeps of the candidates without some rows; where it ranks, those come last, as they are given.

    Raises UsageError when fewer than `keep` are left.
    """
    there = np.ones(len(pool.uids), bool)
    there[leave_out] = False
    rows = np.flatnonzero(there).astype(np.int64)
    if keep > len(rows):
        raise UsageError(
            f"cannot keep {keep:,}: {len(leave_out):,} of {len(there):,} candidates are left out first, so {len(rows):,} are left; leave "
            "fewer out, or keep fewer"
        )
    picked = select(subpool(pool, rows))
    ranked = None if picked.order is None else np.concatenate([rows[picked.order], leave_out])
    return replace(picked, indices=rows[picked.indices], order=ranked, left_out=len(leave_out))


def subpool(pool: Pool, rows: NDArray[np.int64]) -> Pool:
    """Some rows of a pool."""
    return replace(
        pool,
        uids=pool.uids[rows],
        labels=pool.labels[rows],
        scores={name: values[rows] for name, values in pool.scores.items()},
        embedding=None if pool.embedding is None else pool.embedding[rows],
        logits=None if pool.logits is None else pool.logits[rows],
    )
