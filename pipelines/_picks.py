"""What `select` keeps of what: a list or a ranking matched with the candidates by id, and what writing it would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from kdprune_pipelines import _pruned
from kdprune_pipelines._console import count, say
from kdprune_pipelines._pruned import Copying, Cost
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import MismatchError, SourceError, some
from kdprune_data.formats import foreign, table, tar
from kdprune_data.formats.dataset import Dataset

TABLE_ROWS = 10_000
"""From so many rows the size of the tables is told."""


@dataclass(frozen=True)
class Picks:
    """What is kept of what: the candidates, rows of the parent, ascending, and the places of the kept ones among them; for the candidates
    the scores and the ranking, for the kept ones the weights, where the method has them; counts: of what was left out first."""

    parent: Dataset
    candidates: NDArray[np.int64]
    places: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None
    ranking: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows kept."""
        return self.candidates[self.places]


def join(
    parent: Dataset, candidates: NDArray[np.int64], uids: NDArray[np.uint64], values: NDArray[np.float64], where: str
) -> NDArray[np.float64]:
    """The candidates' scores, by id. Raises MismatchError for one that is missing, SourceError for one that is no finite number."""
    found = order.locate(uids, parent.uids[candidates])
    missing = parent.ids[candidates[found < 0]]
    if len(missing):
        raise MismatchError(
            f"{where} has no score for {count(len(missing), 'sample')} of {parent.folder} ({some(missing)}): score this data set"
        )
    joined = values[found]
    bad = parent.ids[candidates[~np.isfinite(joined)]]
    if len(bad):
        raise SourceError(
            f"{where} has no finite score for {count(len(bad), 'sample')} ({some(bad)}): every candidate needs a finite number"
        )
    return joined


def listed_rows(path: Path, listed: foreign.Named, parent: Dataset) -> NDArray[np.int64]:
    """The rows of a list of ids, ascending. Raises SourceError for one that is repeated, unknown, or does not decode."""
    if not len(listed.uids):
        raise SourceError(f"{path} lists no ids: nothing to keep")
    twice = order.first_repeat(listed.uids)
    if twice:
        raise SourceError(f"{path} lists {listed.names[twice[0]]!r} more than once: a subset holds each sample once")
    rows = order.locate(parent.uids, listed.uids)
    absent = [str(listed.names[n]) for n in np.flatnonzero(rows < 0)[:4]]
    if absent:
        n = int((rows < 0).sum())
        raise SourceError(f"{path} lists {count(n, 'id')} that {parent.folder} does not have ({some(absent, 4)}): use ids of that data set")
    bad = parent.ids[rows[~parent.ok[rows]]]
    if len(bad):
        raise SourceError(f"{path} lists {count(len(bad), 'sample')} that do not decode ({some(bad)}): leave them out")
    return np.sort(rows)


def say_short(picks: Picks) -> None:
    """Classes that have fewer candidates than an equal share: the others make up for them, which nobody should have to find out."""
    classes = len(picks.parent.classes)
    sizes, kept = (np.bincount(picks.parent.labels[rows], minlength=classes) for rows in (picks.candidates, picks.rows))
    there = np.flatnonzero(sizes)
    share = len(picks.rows) / len(there)
    short = there[sizes[there] < np.floor(share)]
    if len(short):
        by_size = short[np.argsort(sizes[short], kind="stable")]
        names = ", ".join(f"{picks.parent.classes[n]!r} with {sizes[n]:,}" for n in by_size[:3].tolist())
        more = f" and {len(short) - 3:,} more" if len(short) > 3 else ""
        theirs, whole = int(kept[short].sum()), int(sizes[short].sum())
        say(
            f"{count(len(short), 'class')} of {len(there):,} with fewer samples than an equal share of {share:,.1f} ({names}{more}): "
            f"{'all' if theirs == whole else f'{theirs:,} of {whole:,}'} of theirs are kept, and up to {kept.max():,} of the others"
        )


def cost(picks: Picks, how: Copying | None, *, ranking: bool) -> Cost:
    """What writing a subset takes: its shards (how None: there are none), and tables, as large as their first rows tell."""
    parent, rows = picks.parent, picks.rows
    tars = Cost() if how is None else _pruned.cost(parent, rows, how)
    first = parent.index.take(rows[:TABLE_ROWS])
    row = len(table.to_bytes(first)) / len(first)
    tables = int(2 * row * len(rows) + (row + 8) * (len(picks.candidates) if ranking else 0))
    return replace(tars, bytes=tars.bytes + tables)


def rough_cost(parent: Dataset, candidates: NDArray[np.int64], keep: int, how: Copying | None) -> Cost:
    """As `cost`, of any `keep` of the candidates: where choosing takes long. Without a ranking, and without time."""
    record = parent.index["length"].to_numpy()[candidates].mean()
    tars = 0 if how is None else int(record * keep)
    shards = 0 if how is None else max(-(-keep // how.limits.samples), -(-tars // how.limits.bytes))
    first = parent.index.take(candidates[:TABLE_ROWS])
    return Cost(shards, tars + shards * len(tar.END) + int(2 * len(table.to_bytes(first)) / len(first) * keep))
