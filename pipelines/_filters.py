"""What narrows the candidates of `select` before anything is kept: `--where`, then `--dedup`. How many are kept does not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from kdprune_pipelines._console import count, say
from kdprune_pipelines._methods import many, seconds
from kdprune_pipelines._numbers import Numbers
from numpy.typing import NDArray

from kdprune_data.errors import UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.scores import SCORES
from kdprune_data.selectors import dedup
from kdprune_data.selectors.dedup import Kept
from kdprune_data.selectors.where import Where, parse

Rows = NDArray[np.int64]
DEDUPS = ("exact", "near")
EPS = 0.05
NUMBERS = ("label", "width", "height")
OWN = ("id", "class", *NUMBERS)
"""The columns of any data set."""


@dataclass(frozen=True)
class Filters:
    """where: the expression as given; dedup: None, `exact` or `near`, which has eps and clusters (None: by the number of candidates)."""

    where: str | None = None
    dedup: str | None = None
    eps: float = EPS
    clusters: int | None = None

    def needs(self, column: str | None = None) -> dict[str, str]:
        """What they read of a scores folder, each with the option that does. column: a score that comes from elsewhere.

        Raises UsageError for what is no expression.
        """
        names = self._parsed((), column).names if self.where else frozenset()
        scores = {name: "--where" for name in SCORES if name in names and name != column}
        return scores | ({"embedding": "--dedup near"} if self.dedup == "near" else {})

    def config(self, candidates: int) -> dict[str, Any]:
        """What enters the manifest; candidates: how many `where` leaves."""
        found: dict[str, Any] = {"where": " ".join(self.where.split())} if self.where else {}
        if self.dedup:
            found["dedup"] = self.dedup
        if self.dedup == "near":
            found |= {"dedup_eps": self.eps, "dedup_clusters": self.clusters or dedup.default_clusters(candidates)}
        return found

    def wanted(self, parent: Dataset, numbers: Numbers, rows: Rows) -> Rows:
        """The rows that the expression holds for. Raises UsageError for what is none."""
        if self.where is None:
            return rows
        column = None if numbers.column is None else numbers.column.name
        found = self._parsed(parent.classes, column)
        kept = rows[found.test(_columns(parent, numbers, rows, found))]
        say(f"where: {len(kept):,} of {count(len(rows), 'candidate')}")
        return kept

    def unique(self, parent: Dataset, numbers: Numbers, rows: Rows, *, seed: int, memory: int) -> Kept:
        """The rows without duplicates. Raises UsageError where what tells them is not there."""
        uids = parent.uids[rows]
        if self.dedup is None:
            return Kept(rows, 0)
        if self.dedup == "exact":
            check_digests(parent)
            found = dedup.exact(uids, parent.sha256[rows], parent.labels[rows], seed=seed)
        else:
            self.seconds(numbers, len(rows), memory)
            clusters = self.clusters or dedup.default_clusters(len(rows))
            found = dedup.near(uids, numbers.vectors("embedding", rows), dedup.Near(self.eps, clusters, seed, memory))
        self._tell(len(rows), found)
        return Kept(rows[found.rows], found.groups, found.conflicts)

    def seconds(self, numbers: Numbers, candidates: int, memory: int) -> float:
        """Say what looking for near duplicates is about to take; the seconds of that. Raises UsageError where the memory is too little."""
        if self.dedup != "near":
            return 0.0
        width, _ = numbers.widths(["embedding"])
        dedup.check_memory(candidates, width, memory)
        clusters = self.clusters or dedup.default_clusters(candidates)
        most = float(candidates) * width * (dedup.ROUNDS * clusters * (clusters > 1) + candidates / clusters)
        say(f"dedup near: {count(candidates, 'sample')} in {count(clusters, 'cluster')}, up to {many(most)} multiplications")
        return seconds(most)

    def _tell(self, before: int, found: Kept) -> None:
        gone = before - len(found.rows)
        what = f"{gone:,} left out, duplicates of {count(found.groups, 'sample')} that stay" if gone else "no duplicates"
        say(f"dedup {self.dedup}: {len(found.rows):,} of {count(before, 'candidate')}; {what}")
        if found.conflicts:
            say(f"{count(found.conflicts, 'group')} of the same image with labels that disagree: look at these labels")

    def _parsed(self, classes: Any, column: str | None) -> Where:
        numbers = dict.fromkeys([*NUMBERS, *SCORES, *([] if column is None else [column])])
        return parse(self.where or "", list(numbers), {"id": None, "class": list(classes) or None})


def reads_scores(column: str | None, method: str | None, where: str | None, dedup: str | None) -> bool:
    """Whether a selection reads a scores folder: its method, unless it is random or a column of another's file, or a filter.

    Raises UsageError for an expression that is none.
    """
    return (not column and method not in (None, "random")) or bool(Filters(where, dedup).needs(column))


def check_digests(parent: Dataset) -> None:
    """Raise UsageError for a data set whose images have no digests to compare."""
    if not parent.has_digests:
        raise UsageError(
            f"--dedup exact compares the digests of images, and {parent.folder} has none: adopt it with `kdprune-data index` without "
            "--no-digests"
        )


def check_enough(keep: int, left: int, of: int, which: str) -> None:
    """Raise UsageError where fewer candidates are left than are to be kept."""
    if keep > left:
        raise UsageError(f"{keep:,} of {count(of, 'sample')} are to be kept, and {which} leaves {left:,}: keep fewer, or leave more")


def _columns(parent: Dataset, numbers: Numbers, rows: Rows, found: Where) -> Mapping[str, NDArray[Any]]:
    """The columns that an expression names, of some rows."""
    foreign = None if numbers.column is None else numbers.column.name
    return {name: _own(parent, rows, name) if name in OWN and name != foreign else numbers.score(name, rows) for name in found.names}


def _own(parent: Dataset, rows: Rows, name: str) -> NDArray[Any]:
    """A column that a data set has by itself."""
    labels = parent.labels[rows]
    match name:
        case "id":
            return np.asarray(parent.ids[rows])
        case "class":
            return np.asarray(np.array([*parent.classes, None], object)[labels])
        case "label":
            return np.asarray(np.where(labels < 0, np.nan, labels), np.float64)
    return np.asarray(parent.sizes[rows, 0 if name == "height" else 1], np.float64)
