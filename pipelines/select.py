"""`select`: which samples to keep, and pruned shards of them.

1. Candidates: the samples of the data set that decode. k = floor(frac * N + 1/2).
2. Rank them (at random by hash, by a recorded or foreign score) and keep k, balanced by class; or take somebody's list as it is.
3. Plan the new shards from the index, copy the records byte for byte, write `selection.parquet`.

Writes `subsets/METHOD-FRACTION-sSEED`. With `--ids-only`, no tars: the subset reads its parent's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from kdprune_pipelines import _workspace as workspace
from kdprune_pipelines._console import Outcome, count, megabytes, say, track
from kdprune_pipelines._estimate import Estimate, look
from kdprune_pipelines._picks import Picks, cost, join, listed_rows, say_short
from numpy.typing import NDArray

from kdprune_data import order, selectors
from kdprune_data.config import Config, option
from kdprune_data.errors import MismatchError, SourceError, UsageError, unknown
from kdprune_data.formats import dataset, indexing, subset
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.formats.scores import SCORES, Scores
from kdprune_data.formats.shards import Limits
from kdprune_data.selectors.base import BALANCES, ENDS
from kdprune_data.selectors.ranked import RankedParams
from kdprune_data.share.cards import Card, dataset_card
from kdprune_data.sources import foreign

RANKING_LIMIT = 10_000_000
UPWARDS = Context(prec=2, rounding=ROUND_CEILING)
"""A least value that is told is enough when it is given."""


def _check_method(name: str) -> None:
    if name not in ("random", *SCORES):
        raise unknown("method", name, ["random", *SCORES])


@dataclass(frozen=True)
class SelectConfig(Config):
    """Settings of `select`. Raises UsageError for options that do not go together."""

    data: Path | None = option(None, help="The data set (or subset) to choose from; default data/train.", argument=True)
    frac: str | None = option(None, help="Fraction of the samples to KEEP, above 0 and at most 1.", check=order.fraction)
    method: str | None = option(None, help=f"random (the default) or a recorded score: {', '.join(SCORES)}.", check=_check_method)
    scores: Path | None = option(None, help="Scores folder, or anybody's Parquet file of scores (with --column).")
    column: str | None = option(None, help="Column of --scores FILE.parquet to rank by.")
    hard: str | None = option(None, help="Which end of a foreign column is the hard one.", choices=("high", "low"))
    keep: str | None = option(None, help="Which samples a score keeps; default its hard end.", choices=ENDS)
    keys: Path | None = option(None, help="Keep exactly these ids (.txt, .parquet or .npy) instead of ranking.")
    balance: str = option("class", help="Keep class proportions, equal class shares, or neither.", choices=BALANCES)
    seed: int = option(0, help="Seed of the random order and of ties.", least=0)
    ids_only: bool = option(False, help="Write no tars: the subset reads its parent's.")
    ranks: bool = option(False, help=f"Write ranking.parquet above {RANKING_LIMIT:,} samples too.")
    name: str | None = option(None, help="Name in subsets/; default METHOD-FRACTION-sSEED.", check=workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    shard_samples: int = option(dataset.SHARD_SAMPLES, help="Most samples in a shard.", least=1)
    shard_bytes: int = option(dataset.SHARD_BYTES, help="Most bytes in a shard.", least=4096)
    jobs: int = option(2, help="Threads that copy shards.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.frac is None) == (self.keys is None):
            raise UsageError("say what to keep: either --frac FRACTION (above 0, at most 1) or --keys FILE")
        if self.keys and (self.method or self.scores or self.column):
            raise UsageError("--keys is a list by itself: it goes without --method, --scores and --column")
        if self.method and self.column:
            raise UsageError("--method and --column were both given: --column names the column of --scores FILE to rank by; give one")
        if self.keep and (self.keys or (self.method or self.column or "random") == "random"):
            raise UsageError(f"--keep {self.keep} chooses an end of a score, and none ranks here: name one with --method or --column")
        if self.hard and not self.column:
            raise UsageError(f"--hard {self.hard} is for a column of somebody's --scores FILE: recorded scores know which end is hard")
        if self.column and not self.scores:
            raise UsageError("--column names a column of a Parquet file: give the file with --scores FILE")


@dataclass(frozen=True)
class Choice:
    """How to choose: what enters the manifest, and what ranks."""

    method: str
    settings: dict[str, Any]
    scores: NDArray[np.float64] | None = None
    hard_is_high: bool = True
    inputs: tuple[dict[str, Any], ...] = ()
    rows: NDArray[np.int64] | None = None


def run(config: SelectConfig) -> Outcome:
    """Select a subset. Raises UsageError, MismatchError, SourceError and ExistsError."""
    started = time.monotonic()
    parent = Dataset.open(workspace.data(config.data, "train", option="DATA"))
    candidates = parent.usable()
    choice = _choice(config, parent, candidates)
    keep, frac = _how_many(config, choice, len(candidates))
    folder, name = workspace.place(config.out, config.name, workspace.SUBSETS, f"{choice.method}-{order.shortest(frac)}-s{config.seed}")
    settings = choice.settings | {
        "method": choice.method,
        "frac": order.shortest(frac),
        "seed": None if config.keys else config.seed,
        "ids_only": config.ids_only,
        "shard_samples": config.shard_samples,
        "shard_bytes": config.shard_bytes,
    }
    identity = Identity("subset", name, settings, [parent.manifest.as_input("data"), *choice.inputs])
    if config.dry_run:
        state = look(folder, identity, overwrite=config.overwrite)
        return _estimate(config, folder, state, _pick(config, parent, candidates, choice, keep), started)
    with Build.begin(folder, identity, overwrite=config.overwrite) as build:
        try:
            made = build.done or _write(config, build, _pick(config, parent, candidates, choice, keep))
        except SourceError:  # the parent's shards are damaged: what was copied of them is no start
            build.discard()
            raise
        if build.done:
            say("already done")
    return _outcome(folder, made)


def _choice(config: SelectConfig, parent: Dataset, candidates: NDArray[np.int64]) -> Choice:
    if config.keys:
        listed = foreign.read_ids(config.keys)
        return Choice("keys", {"keys": sha256_file(config.keys)}, rows=listed_rows(config.keys, listed, parent))
    method = config.column or config.method or "random"
    ranking: dict[str, Any] = {"balance": config.balance}
    if method == "random" and not config.column:
        if config.scores:
            raise UsageError("--scores was given but --method is random, which uses none: name a score with --method or --column")
        return Choice("random", ranking)
    ranking["keep"] = config.keep or "hard"
    if config.scores is not None and not config.scores.is_dir():
        return _foreign_choice(config, config.scores, parent, candidates, ranking)
    return _recorded_choice(config, method, parent, candidates, ranking)


def _recorded_choice(config: SelectConfig, method: str, parent: Dataset, candidates: NDArray[np.int64], ranking: dict[str, Any]) -> Choice:
    if method not in SCORES:
        raise unknown("method", method, ["random", *SCORES])
    known = workspace.contents(parent.manifest.as_input("data"))
    where = workspace.one(config.scores, workspace.SCORES, "--scores", lambda m: m.content in known)
    scores = Scores.open(where)
    if scores.manifest.content not in known:
        raise MismatchError(f"{where} scores other data than {parent.folder}: run `kdprune-data score --data {parent.folder}` for these")
    uids, values = scores.read(method)
    joined = join(parent, candidates, uids, values.astype(np.float64), str(where))
    return Choice(method, ranking, joined, SCORES[method].hard == "high", (scores.manifest.as_input("scores"),))


def _foreign_choice(config: SelectConfig, path: Path, parent: Dataset, candidates: NDArray[np.int64], ranking: dict[str, Any]) -> Choice:
    if not path.is_file():
        raise UsageError(f"--scores {path} does not exist: give a scores folder or a Parquet file")
    if config.column is None:
        raise UsageError(f"which column of {path} ranks? name it with --column")
    listed = foreign.read_scores(path, config.column)
    known = SCORES[config.column].hard if config.column in SCORES else None
    stated = (listed.metadata or {}).get("hard")
    if stated not in (None, "high", "low"):
        raise SourceError(f"{path}: column {config.column!r} says that its hard end is {stated!r}: expected high or low; mend the file")
    hard = config.hard or stated or known
    if hard is None:
        raise UsageError(f"which end of column {config.column!r} is the hard one? say --hard high or --hard low")
    values = listed.values if listed.values is not None else np.zeros(0)
    joined = join(parent, candidates, listed.uids, values, str(path))
    settings = ranking | {"scores_file": sha256_file(path), "column": config.column, "hard": hard}
    return Choice(config.column, settings, joined, hard == "high")


def _how_many(config: SelectConfig, choice: Choice, candidates: int) -> tuple[int, Decimal]:
    if choice.rows is not None:
        return len(choice.rows), round(Decimal(len(choice.rows)) / candidates, 6)
    frac = order.fraction(config.frac or "")
    keep = order.keep_count(frac, candidates)
    if keep < 1:
        needed = 1 / Decimal(2 * candidates)
        raise UsageError(f"--frac {frac} of {count(candidates, 'sample')} keeps none: at least {needed.normalize(UPWARDS):f} is needed")
    return keep, frac


def _pick(config: SelectConfig, parent: Dataset, candidates: NDArray[np.int64], choice: Choice, keep: int) -> Picks:
    """Rank and choose, or take the list as it is."""
    scores = None if choice.scores is None else choice.scores.astype(np.float32)
    if choice.rows is not None:
        found = Picks(parent, candidates, np.searchsorted(candidates, choice.rows), scores, None)
    else:
        pool = selectors.Pool(parent.uids[candidates], parent.labels[candidates])
        if choice.scores is None:
            picked = selectors.select("random", pool, keep, selectors.Params(config.seed, config.balance))
        else:
            hard = {choice.method: "high" if choice.hard_is_high else "low"}
            pool = replace(pool, scores={choice.method: choice.scores}, hard=hard)
            ranked = RankedParams(config.seed, config.balance, score=choice.method, end=config.keep or "hard")
            picked = selectors.select("score", pool, keep, ranked)
        found = Picks(parent, candidates, picked.indices, scores, picked.order)
    say(f"keep {len(found.rows):,} of {count(len(candidates), 'sample')} by {choice.method}")
    if choice.rows is None and config.balance == "uniform":
        say_short(found)
    return found


def _write(config: SelectConfig, build: Build, picks: Picks) -> Manifest:
    """Plan, copy and seal."""
    parent, rows = picks.parent, picks.rows
    outside: list[File] = []
    if config.ids_only:
        outside = _parents_shards(parent, build.folder)
        index, names = parent.index.take(rows).combine_chunks(), indexing.shard_names(parent.shard_paths)
    else:
        plan = subset.plan(parent, rows, Limits(config.shard_samples, config.shard_bytes))
        names = list(track(subset.copy(parent, plan, build, config.jobs), "copy", total=len(plan.names), unit="shard"))
        index = subset.index_of(parent, plan)
    subset.write_selection(build, index, None if picks.scores is None else picks.scores[picks.places], None)
    facts = indexing.write_index(build, index, parent.classes, names)
    if picks.ranking is not None and _writes_ranking(config, picks):
        subset.write_ranking(build, parent.ids[picks.candidates].tolist(), picks.scores, picks.ranking)
    build.write("README.md", _card(build, parent, index, facts).encode())
    counts = facts.counts | {"candidates": len(picks.candidates), "kept": len(rows)}
    side = ["README.md", subset.RANKING]
    return build.seal(counts=counts, classes=parent.classes, content=facts.content, side=side, outside=outside)


def _writes_ranking(config: SelectConfig, picks: Picks) -> bool:
    return picks.ranking is not None and (len(picks.candidates) <= RANKING_LIMIT or config.ranks)


def _estimate(config: SelectConfig, folder: Path, state: str, picks: Picks, started: float) -> Outcome:
    """What selecting would do; what has been done for it so far is part of the time."""
    limits = None if config.ids_only else Limits(config.shard_samples, config.shard_bytes)
    found = cost(picks, limits, jobs=config.jobs, ranking=_writes_ranking(config, picks))
    counts = {"sample": len(picks.rows)} | ({} if config.ids_only else {"shard": found.shards})
    return Estimate(folder, state, counts, found.bytes, time.monotonic() - started + found.seconds).outcome()


def _parents_shards(parent: Dataset, folder: Path) -> list[File]:
    """The parent's shards as files outside the subset: by a relative path, so that a workspace can be moved; adopted ones stay put."""
    known = parent.manifest.outside or [f for f in parent.manifest.files if f.path.endswith(".tar")]
    adopted = any(Path(f.path).is_absolute() for f in parent.manifest.outside)
    paths = [str(p) if adopted else os.path.relpath(p.resolve(), folder.resolve()) for p in parent.shard_paths]
    return [File(path, f.bytes, f.sha256) for path, f in zip(paths, known, strict=True)]


def _card(build: Build, parent: Dataset, index: pa.Table, facts: indexing.Facts) -> str:
    identity = build.identity
    shards = [build.folder / f.path for f in build.files() if f.path.endswith(".tar")]
    how = f"by {identity.config['method']}, fraction {identity.config['frac']}"
    how += "" if identity.config["seed"] is None else f", seed {identity.config['seed']}"
    note = f"Kept from {parent.manifest.name!r} of {count(len(parent), 'sample')} (content `{parent.manifest.content}`) {how}."
    members = parent.members
    images = [members.image] if members.image and shards else subset.image_members(shards, index)
    if members.label != "cls":
        note += f" Classes are numbers in `index.parquet`; the members say them their way (`{members.label}`)."
    labelled = facts.counts["labelled"] > 0 and members.label == "cls"
    card = Card(identity.name, _split(parent.manifest.as_input("data")), images, labelled, note)
    return dataset_card(card, facts.counts, parent.classes)


def _split(described: Mapping[str, Any]) -> str:
    """The split of the data set that a subset was chosen from in the end."""
    parents = [one for one in described["inputs"] if one["role"] == "data"]
    return _split(parents[0]) if parents else str(described["config"].get("split", "train"))


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts = made.counts
    size = megabytes(sum(f.bytes for f in made.files))
    per_class = counts["per_class"]
    text = (
        f"{folder}: kept {counts['kept']:,} of {count(counts['candidates'], 'sample')}, {min(per_class, default=0):,} to "
        f"{max(per_class, default=0):,} per class, {size}; content {made.content[:12]}"
    )
    return Outcome(folder, {"folder": str(folder), "content": made.content, "counts": counts}, text)
