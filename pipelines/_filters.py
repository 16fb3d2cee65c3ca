"""What narrows the candidates of `select` before anything is kept: `--where`, then `--dedup`. How many are kept does not change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from kdprune_pipelines._console import count, say
from kdprune_pipelines._methods import many, seconds
from kdprune_pipelines._numbers import Numbers
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError, some
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.scores import SCORES
from kdprune_data.selectors import dedup
from kdprune_data.selectors.dedup import Kept
from kdprune_data.selectors.where import Where, parse

Rows = NDArray[np.int64]
DEDUPS = ("exact", "near")
EPS = 0.01
MANY = 0.2
"""The share of the candidates above which near duplicates are more than one expects."""
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

    def needs(self, theirs: Collection[str] = ()) -> dict[str, str]:
        """What they read of a scores folder, each with the option that does. theirs: columns that come from elsewhere.

        Raises UsageError for what is no expression.
        """
        scores = {name: "--where" for name in SCORES if name in self.names(theirs) and name not in theirs}
        return scores | ({"embedding": "--dedup near"} if self.dedup == "near" else {})

    def names(self, theirs: Collection[str]) -> frozenset[str]:
        """The columns that the expression names. Raises UsageError for what is none."""
        return frozenset(self._parsed((), theirs).names) if self.where else frozenset()

    def config(self, candidates: int) -> dict[str, Any]:
        """What enters the manifest; candidates: how many `where` leaves. Raises UsageError for too many clusters."""
        found: dict[str, Any] = {"where": self.where.strip()} if self.where else {}
        if self.dedup:
            found["dedup"] = self.dedup
        if self.dedup == "near":
            found |= {"dedup_eps": self.eps, "dedup_clusters": self._clusters(candidates)}
        return found

    def wanted(self, parent: Dataset, numbers: Numbers, rows: Rows) -> Rows:
        """The rows that the expression holds for. Raises UsageError for what is none."""
        if self.where is None:
            return rows
        found = self._parsed(parent.classes, numbers.theirs)
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
            how = dedup.Near(self.eps, self._clusters(len(rows)), seed, memory)
            found = dedup.near(uids, numbers.vectors("embedding", rows), how)
        self._tell(len(rows), found, parent.ids[rows[found.conflicts]])
        return Kept(rows[found.rows], found.groups, rows[found.conflicts])

    def seconds(self, numbers: Numbers, candidates: int, memory: int) -> float:
        """Say what looking for near duplicates is about to take; the seconds of that. Raises UsageError where the memory is too little."""
        if self.dedup != "near":
            return 0.0
        width, _ = numbers.widths(["embedding"])
        dedup.check_memory(candidates, width, memory)
        clusters = self._clusters(candidates)
        most = float(candidates) * width * (dedup.ROUNDS * clusters * (clusters > 1) + candidates / clusters)
        say(f"dedup near: {count(candidates, 'sample')} in {count(clusters, 'cluster')}, up to {many(most)} multiplications")
        return seconds(most)

    def _clusters(self, candidates: int) -> int:
        if self.clusters is not None:
            dedup.check_clusters(self.clusters, candidates)
        return self.clusters or dedup.default_clusters(candidates)

    def _tell(self, before: int, found: Kept, conflicts: Iterable[str]) -> None:
        gone = before - len(found.rows)
        what = f"{gone:,} left out, duplicates of {count(found.groups, 'sample')} that stay" if gone else "no duplicates"
        say(f"dedup {self.dedup}: {len(found.rows):,} of {count(before, 'candidate')}; {what}")
        if self.dedup == "near" and gone > MANY * before:
            share = f"{gone / before:.0%} of the candidates count as near duplicates at eps {self.eps:g}"
            say(f"{share}: if that is too many, give a smaller --dedup-eps")
        if len(found.conflicts):
            groups = count(len(found.conflicts), "group")
            say(f"{groups} of the same image with labels that disagree, kept under {some(conflicts)}: look at these labels")

    def _parsed(self, classes: Any, theirs: Iterable[str]) -> Where:
        numbers = dict.fromkeys([*NUMBERS, *SCORES, *theirs])
        return parse(self.where or "", list(numbers), {"id": None, "class": list(classes) or None})


def check_digests(parent: Dataset) -> None:
    """Raise UsageError for a data set whose images have no digests to compare."""
    if not parent.has_digests:
        raise UsageError(
            f"--dedup exact compares the digests of images, and {parent.folder} has none: adopt it with `kdprune-data index` without "
            "--no-digests"
        )


def check_enough(keep: int, left: int, of: int, which: str) -> None:
    """Raise UsageError where fewer candidates are left than are to be kept, with the largest fraction that could be."""
    if keep > left:
        most = order.shortest((Decimal(left) / of).quantize(Decimal("1e-6"), ROUND_FLOOR))
        way = f"keep fewer (--frac {most} at most), or leave more" if left else "leave more"
        raise UsageError(f"{keep:,} of {count(of, 'sample')} are to be kept, and {which} leaves {left:,}: {way}")


def _columns(parent: Dataset, numbers: Numbers, rows: Rows, found: Where) -> Mapping[str, NDArray[Any]]:
    """The columns that an expression names, of some rows."""
    foreign = None if numbers.column is None else numbers.column.name
    return {name: _own(parent, rows, name) if name in OWN and name != foreign else numbers.compared(name, rows) for name in found.names}


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
