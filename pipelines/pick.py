"""`pick`: which rows of a table of ids, labels and scores to keep, without a data set at hand; the table need not fit in memory.

1. Read the labels and scores of one or several Parquet files: how many rows are kept of each class, and between which scores.
2. Hash the ids of those rows that have the very score at which a class is cut (where the choice is random: of all rows).
3. Read the table once more, and write the rows that are kept into one Parquet file, in its order: `id`, `label`, `score`.

What is kept is, id for id, what `select` keeps of a data set with these ids, labels and scores; `select --keys` takes the file.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprune_pipelines import _keeping as keeping
from kdprune_pipelines import _methods as methods
from kdprune_pipelines._candidates import Candidates, Shuffled
from kdprune_pipelines._choosing import how_many
from kdprune_pipelines._console import Outcome, count, megabytes, say
from kdprune_pipelines._estimate import Estimate
from kdprune_pipelines._numbers import hard_end

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import UsageError
from kdprune_data.formats import listed
from kdprune_data.formats.listed import Facts
from kdprune_data.formats.repeats import spool
from kdprune_data.formats.rows import Table
from kdprune_data.selectors.base import BALANCES, ENDS
from kdprune_data.selectors.ranked import RankedParams
from kdprune_data.selectors.streamed import Kept, edges, settle
from kdprune_data.selectors.tally import tally

RANDOM = "random"


@dataclass(frozen=True)
class PickConfig(Config):
    """Settings of `pick`. Raises UsageError for options that do not go together."""

    tables: tuple[Path, ...] = option(help="Parquet files with ids, labels and scores, or folders of them.", argument=True)
    frac: str | None = option(None, help="Fraction of the rows to KEEP, above 0 and at most 1.", check=order.fraction)
    column: str | None = option(None, help="Column of scores to rank by; without it rows are kept at random.", check=methods.check_column)
    hard: str | None = option(None, help="Which end of the column is the hard one.", choices=("high", "low"))
    keep: str | None = option(None, help="Which rows a score keeps; default its hard end.", choices=ENDS)
    skip_hardest: float | None = option(None, help="Fraction that a score leaves out first, from its hard end.", least=0, most=0.999)
    balance: str = option("class", help="Keep class proportions, equal class shares, or neither.", choices=BALANCES)
    seed: int = option(0, help="Seed of the random order and of ties.", least=0)
    out: Path | None = option(None, help="The Parquet file to write; default METHOD-FRACTION-sSEED.parquet.")
    jobs: int = option(2, help="Threads that read.", least=1, short="j")
    overwrite: bool = option(False, help="Replace the list that stands there.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tables:
            raise UsageError("no table was given: name Parquet files, or folders of them")
        if self.frac is None:
            raise UsageError("say what to keep: --frac FRACTION (above 0, at most 1)")
        for name in ("hard", "keep", "skip_hardest"):
            value = getattr(self, name)
            if value is not None and self.column is None:
                raise UsageError(f"{self.shown(name)} {value} is for a score, and none ranks here: name its column with --column")


def run(config: PickConfig) -> Outcome:
    """Pick the rows to keep. Raises UsageError, SourceError and ExistsError."""
    started = time.monotonic()
    table = Table.open(config.tables, config.column)
    table.check_labels(config.balance)
    hard = None if config.column is None else hard_end(table.files[0].path, config.column, table.metadata(config.column), config.hard)
    settings, inputs = _settings(config, hard), table.described()
    out = config.out or Path(_derived(config))
    if any(file.path.resolve() == out.resolve() for file in table.files):
        raise UsageError(f"--out {out} is the table itself: choose another")
    state = listed.look(out, settings, inputs, overwrite=config.overwrite)
    if config.dry_run:
        return _estimate(config, _candidates(config, table, hard), out, state, started)
    if state == "finished":
        say("already done")
        return _outcome(out, listed.read_facts(out))
    with ExitStack() as stack:
        candidates = _candidates(config, table, hard)
        if isinstance(candidates, Shuffled):
            candidates.fill(stack.enter_context(spool(keeping.existing(out.parent))))
        kept, counts = _choose(config, candidates)
        facts = Facts(settings, inputs, counts)
        keeping.write(out, candidates, kept, keeping.schema_of(table, hard), facts)
    return _outcome(out, facts)


def _candidates(config: PickConfig, table: Table, hard: str | None) -> Candidates:
    kind = Shuffled if hard is None else Candidates
    return kind(table, high=hard != "low", seed=config.seed, labelled=config.balance != "none", jobs=config.jobs)


def _choose(config: PickConfig, candidates: Candidates) -> tuple[Kept, dict[str, int]]:
    """Which rows are kept, and what is counted. Raises UsageError where none are, SourceError where one has no finite score."""
    counted = tally(candidates, config.balance, config.jobs)
    keep, _ = how_many(config.frac or "", counted.rows, "row")
    params = RankedParams(config.seed, config.balance, end=config.keep or "hard", skip_hardest=config.skip_hardest or 0.0)
    ends = edges(candidates, counted, keep, params, config.jobs)
    tied = int(ends.hashed.sum())
    if tied and config.column is not None:
        say(f"{count(tied, 'row')} with a score at which a class is cut: of these, those with the lowest hashes are kept")
    kept = settle(candidates, counted, ends, config.jobs)
    say(f"keep {keep:,} of {count(counted.rows, 'row')} by {config.column or RANDOM}")
    counts = {"candidates": counted.rows, "kept": keep}
    if config.balance != "none":
        counts |= {"classes": len(counted.sizes), "fewest": int(ends.count.min()), "most": int(ends.count.max())}
    return kept, counts


def _settings(config: PickConfig, hard: str | None) -> dict[str, Any]:
    """What changes the list, as it stands in it."""
    settings = {"method": config.column or RANDOM, "frac": _frac(config), "seed": config.seed, "balance": config.balance}
    if hard is not None:
        settings |= {"keep": config.keep or "hard", "hard": hard}
        settings |= {"skip_hardest": config.skip_hardest} if config.skip_hardest else {}
    return settings


def _frac(config: PickConfig) -> str:
    return order.shortest(order.fraction(config.frac or ""))


def _derived(config: PickConfig) -> str:
    """The usual name. Raises UsageError where the column's cannot be part of it."""
    name = f"{config.column or RANDOM}-{_frac(config)}-s{config.seed}.parquet"
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise UsageError(f"--column {config.column!r} cannot be part of a file's name: give one with --out FILE.parquet")
    return name


def _estimate(config: PickConfig, candidates: Candidates, out: Path, state: str, started: float) -> Outcome:
    keep, _ = how_many(config.frac or "", candidates.about, "row")
    schema = keeping.schema_of(candidates.table, None if config.column is None else config.hard)
    size, seconds = keeping.cost(candidates, keep, schema)
    made = Estimate(out, state, {"row": keep}, size, time.monotonic() - started + seconds).outcome()
    return Outcome(None, {"file" if key == "folder" else key: value for key, value in made.facts.items()}, made.text)


def _outcome(out: Path, made: Facts | None) -> Outcome:
    counts, size = dict(made.counts if made else {}), out.stat().st_size
    per_class = f", {counts['fewest']:,} to {counts['most']:,} per class" if "fewest" in counts else ""
    text = f"{out}: kept {counts['kept']:,} of {count(counts['candidates'], 'row')}{per_class}, {megabytes(size)}"
    return Outcome(out, {"file": str(out), "bytes": size, "counts": counts}, text)
