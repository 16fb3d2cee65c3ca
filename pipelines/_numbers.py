"""The numbers that a selection reads of samples: scores by name, the `embedding`, the `logits`, from one scores folder, the one given or
found by convention; a column of somebody's file stands in for one score. What is lacking is named with the command that provides it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from kdprune_pipelines import _advice as advice
from kdprune_pipelines import _workspace as workspace
from kdprune_pipelines._picks import join
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import MismatchError, SourceError, UsageError
from kdprune_data.formats import foreign
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.foreign import Named
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import KINDS_OF_VECTORS, SCORES, Scores
from kdprune_data.selectors import Pool


@dataclass(frozen=True)
class Column:
    """A column of somebody's file that stands in for a score: its name, its numbers, which end is hard, and the file."""

    name: str
    listed: Named
    hard: str
    path: Path


def open_column(path: Path, column: str | None, hard: str | None) -> Column:
    """A column of somebody's Parquet file. hard: which end of it is, where the file and its name do not tell.

    Raises UsageError where the file, the column or the hard end is not said, SourceError for a file that cannot be used.
    """
    if not path.is_file():
        raise UsageError(f"--scores {path} does not exist: give a scores folder or a Parquet file")
    if column is None:
        raise UsageError(f"which column of {path} ranks? name it with --column")
    listed = foreign.read_scores(path, column)
    return Column(column, listed, hard_end(path, column, listed.metadata or {}, hard), path)


def hard_end(path: Path, column: str, metadata: Mapping[str, str], given: str | None) -> str:
    """Which end of a column of somebody's file is the hard one, `high` or `low`: as given, as the file says of the column, or as for our
    score of that name.

    Raises UsageError where nobody says, SourceError where the file says something else.
    """
    known = SCORES[column].hard if column in SCORES else None
    stated = metadata.get("hard")
    if stated not in (None, "high", "low"):
        raise SourceError(f"{path}: column {column!r} says that its hard end is {stated!r}: expected high or low; mend the file")
    end = given or stated or known
    if end is None:
        raise UsageError(f"which end of column {column!r} is the hard one? say --hard high or --hard low")
    return end


def columns_of(path: Path | None, column: str | None) -> list[str]:
    """The columns that `--where` may name in the file of somebody's that ranks: the one that does, and all numbers."""
    if column is None or path is None or not path.is_file():
        return [] if column is None else [column]
    return [column, *(name for name in foreign.number_columns(path) if name != column)]


@dataclass(frozen=True)
class Numbers:
    """What a selection may read of the samples of a data set: a scores folder, the column of somebody's file that ranks, and others of
    that file that `--where` names."""

    parent: Dataset
    scores: Scores | None = None
    column: Column | None = None
    others: Mapping[str, Named] = field(default_factory=dict)

    def score(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """A score of some rows. Raises MismatchError or SourceError where one has none."""
        if self.column is not None and name == self.column.name:
            listed, where = self.column.listed, str(self.column.path)
            values = np.zeros(0) if listed.values is None else listed.values
            return join(self.parent, rows, listed.uids, values, where)
        scores = self._folder()
        uids, found = scores.read(name)
        return join(self.parent, rows, uids, found.astype(np.float64), str(scores.folder))

    def compared(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """A score of some rows for `--where`: NaN where a column of somebody's file has none. Raises as `score` does, but for that."""
        if name not in self.theirs or self.column is None:
            return self.score(name, rows)
        listed = self.theirs[name]
        values = np.zeros(0) if listed.values is None else listed.values
        found = order.locate(listed.uids, self.parent.uids[rows])
        if len(rows) and not (found >= 0).any():
            raise MismatchError(f"{self.column.path} has no score for any sample of {self.parent.folder}: give scores of this data set")
        return np.where(found < 0, np.nan, values[found])

    @property
    def theirs(self) -> dict[str, Named]:
        """The columns of somebody's file, by name."""
        return dict(self.others) | ({} if self.column is None else {self.column.name: self.column.listed})

    def hard(self, name: str) -> str:
        """Which end of a score is the hard one."""
        return self.column.hard if self.column is not None and name == self.column.name else SCORES[name].hard

    def vectors(self, what: str, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """The `embedding` or `logits` of some rows, float16 of shape (n, d). Raises MismatchError where one has none."""
        scores = self._folder()
        uids, found = scores.vectors(what)
        places = join(self.parent, rows, uids, np.arange(len(uids), dtype=np.float64), str(scores.folder))
        return found[places.astype(np.int64)]

    def pool(self, needs: Sequence[str], rows: NDArray[np.int64]) -> Pool:
        """The candidates with all that a method reads of them."""
        names = [name for name in needs if name not in KINDS_OF_VECTORS]
        embedding, logits = (self.vectors(what, rows) if what in needs else None for what in KINDS_OF_VECTORS)
        scores = {name: self.score(name, rows) for name in names}
        hard = {name: self.hard(name) for name in names}
        return Pool(self.parent.uids[rows], self.parent.labels[rows], scores, hard, embedding, logits)

    def widths(self, needs: Sequence[str]) -> tuple[int, int]:
        """Numbers in an embedding and in a row of logits, 0 where none is read."""
        found = [self._folder().width(what) if what in needs else 0 for what in KINDS_OF_VECTORS]
        return found[0], found[1]

    def inputs(self) -> tuple[dict[str, Any], ...]:
        """As a manifest lists them."""
        return () if self.scores is None else (self.scores.manifest.as_input("scores"),)

    def _folder(self) -> Scores:
        if self.scores is None:
            raise UsageError("this selection reads scores and none were found: give a folder with --scores")
        return self.scores


def open_scores(given: Path | None, parent: Dataset, needs: Mapping[str, str], *, file: Path | None = None) -> Scores:
    """The one scores folder that has all that is read: the one given, or found by convention. needs: the names, each with what reads it;
    file: the Parquet file that `--scores` names instead, if it does.

    Raises UsageError where there is none, several, or what is read is lacking, naming the command that provides it; MismatchError where
    the folder given scores other data.
    """
    known = workspace.contents(parent.manifest.as_input("data"))
    folder = given or _found(known, parent, needs, file)
    scores = Scores.open(folder)
    if scores.manifest.content not in known:
        raise MismatchError(f"{folder} scores other data than {parent.folder}: run `kdprune-data score --data {parent.folder}` for these")
    lacking = _lacking(scores.manifest, needs)
    if lacking:
        how, made = advice.again(scores.manifest, folder, lacking, parent.manifest, parent.folder)
        then = f", and give --scores {made}" if given else "; where both fit, name one with --scores"
        raise UsageError(f"{_who(folder, known, given)} {_needed(lacking, needs)}: {how}{'' if file else then}")
    return scores


def _found(known: set[str], parent: Dataset, needs: Mapping[str, str], file: Path | None) -> Path:
    """The folder in its usual place that has all that is read, or else the one that has most of it. Raises UsageError."""
    fitting = workspace.candidates(workspace.SCORES, lambda m: m.content in known)
    if not fitting and (file or "tdds" in needs or advice.score_command(needs) != "kdprune-data score"):
        how, other = advice.first(list(needs), parent.manifest, parent.folder), "" if file else ", or give a folder with --scores"
        raise UsageError(f"no fitting score in {workspace.SCORES}/, which is to have {_needed(needs, needs)}: {how}{other}")
    lacks = {folder: len(_lacking(Manifest.read(folder), needs)) for folder in fitting}
    whole = [folder for folder in fitting if not lacks[folder]]
    if file and len(whole) > 1:
        raise UsageError(
            f"{file} has no {_needed(needs, needs)}, and several in {workspace.SCORES}/ have it: {', '.join(one.name for one in whole)}; "
            "copy the column into the file, or keep one of them there"
        )
    if whole or not fitting:
        return workspace.one(None, workspace.SCORES, "--scores", lambda m: m.content in known and not _lacking(m, needs))
    return min(fitting, key=lambda folder: (lacks[folder], _is_special(Manifest.read(folder))))


def _who(folder: Path, known: set[str], given: Path | None) -> str:
    """What lacks something: a folder, or all that there are."""
    fitting = [] if given else workspace.candidates(workspace.SCORES, lambda m: m.content in known)
    named = ", ".join(one.name for one in fitting)
    return f"none of those in {workspace.SCORES}/ ({named}) has" if len(fitting) > 1 else f"{folder} has no"


def _is_special(scores: Manifest) -> bool:
    """Whether scores are not those of the teacher's final network."""
    return bool(scores.config.get("epoch") or scores.config.get("proxies"))


def _lacking(manifest: Manifest, needs: Iterable[str]) -> list[str]:
    has = {*manifest.config["columns"], *(what for what in KINDS_OF_VECTORS if manifest.config[what])}
    return [name for name in needs if name not in has]


def _needed(names: Iterable[str], needs: Mapping[str, str]) -> str:
    """`embedding and aum, which d2 needs`."""
    listed = list(names)
    readers = list(dict.fromkeys(needs[name] for name in listed))
    return f"{_and(listed)}, which {_and(readers)} need{'s' if len(readers) == 1 else ''}"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
