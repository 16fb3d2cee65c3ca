"""`select`: which samples to keep, and pruned shards of them.

1. Candidates: of the N samples of the data set that decode, those that `--where` and `--dedup` leave. k = floor(frac * N + 1/2).
2. Keep k of them by a method, balanced by class; or take somebody's list as it is.
3. Plan the new shards from the index, copy the records byte for byte, each image compared with its digest (`--unchecked`: not), write
   `selection.parquet`.

Writes `subsets/METHOD-FRACTION-sSEED`. With `--ids-only`, no tars: the subset reads its parent's.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kdprune_pipelines import _methods as methods
from kdprune_pipelines import _workspace as workspace
from kdprune_pipelines._choosing import Task, how_many, pick, tell_cost
from kdprune_pipelines._console import Outcome, count, megabytes, say
from kdprune_pipelines._estimate import Estimate, look
from kdprune_pipelines._filters import DEDUPS, EPS, OWN, Filters, check_digests, check_enough
from kdprune_pipelines._methods import Choice
from kdprune_pipelines._numbers import Column, Numbers, columns_of, open_column, open_scores
from kdprune_pipelines._picks import Picks, cost, listed_rows, rough_cost
from kdprune_pipelines._pruned import Copying, prune

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.formats import copying, dataset, foreign, indexing, subset
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.formats.scores import SCORES
from kdprune_data.formats.shards import Limits
from kdprune_data.selectors import SELECTORS
from kdprune_data.selectors.base import BALANCES, ENDS
from kdprune_data.selectors.ranked import RankedParams
from kdprune_data.share.cards import Card, dataset_card

RANKING_LIMIT = 10_000_000


@dataclass(frozen=True)
class SelectConfig(Config):
    """Settings of `select`. Raises UsageError for options that do not go together."""

    data: Path | None = option(None, help="The data set (or subset) to choose from; default data/train.", argument=True)
    frac: str | None = option(None, help="Fraction of the samples to KEEP, above 0 and at most 1.", check=order.fraction)
    method: str | None = option(None, help="How to choose, one of the methods below; default random.", check=methods.check_name)
    set: tuple[str, ...] = option((), help="A setting of the method; may be given several times.")
    scores: Path | None = option(None, help="Scores folder, or anybody's Parquet file of scores (with --column).")
    column: str | None = option(None, help="Column of --scores FILE.parquet to rank by.")
    hard: str | None = option(None, help="Which end of a foreign column is the hard one.", choices=("high", "low"))
    keep: str | None = option(None, help="Which samples a score keeps; default its hard end.", choices=ENDS)
    skip_hardest: float | None = option(None, help="Fraction that a score leaves out first, from its hard end.", least=0, most=0.999)
    where: str | None = option(None, help="Choose only among samples for which this holds, such as 'label != 7 and el2n < 1.2'.")
    dedup: str | None = option(None, help="Choose only one of each set of equal or nearly equal images.", choices=DEDUPS)
    dedup_eps: float | None = option(None, help=f"Near is a cosine above 1 - this; default {EPS}.", least=1e-6, most=1)
    dedup_clusters: int | None = option(None, help="Near is looked for within so many clusters; default one per 1,000 samples.", least=1)
    keys: Path | None = option(None, help="Keep exactly these ids (.txt, .parquet or .npy) instead of ranking.")
    balance: str = option("class", help="Keep class proportions, equal class shares, or neither.", choices=BALANCES)
    seed: int = option(0, help="Seed of the random order and of ties.", least=0)
    memory: int | None = option(None, help=f"Most bytes of a method's own arrays; default {methods.MEMORY:,}.", least=1)
    ids_only: bool = option(False, help="Write no tars: the subset reads its parent's.")
    normalize: bool = option(False, help="Leave out PAX headers that hold nothing but times: half of foreign shards of small images.")
    ranks: bool = option(False, help=f"Write ranking.parquet above {RANKING_LIMIT:,} samples too.")
    name: str | None = option(None, help="Name in subsets/; default METHOD-FRACTION-sSEED.", check=workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    shard_samples: int = option(dataset.SHARD_SAMPLES, help="Most samples in a shard.", least=1)
    shard_bytes: int = option(dataset.SHARD_BYTES, help="Most bytes in a shard.", least=4096)
    unchecked: bool = option(False, help="Copy without hashing each image first: then only verify notices that one was damaged.")
    jobs: int = option(2, help="Threads that copy shards.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frac is not None and self.keys is not None:
            raise UsageError("--frac and --keys were both given: --keys keeps exactly the ids listed; give one")
        if self.frac is None and self.keys is None:
            raise UsageError("say what to keep: either --frac FRACTION (above 0, at most 1) or --keys FILE")
        if self.keys and (self.method or self.scores or self.column):
            raise UsageError("--keys is a list by itself: it goes without --method, --scores and --column")
        if self.keys and (self.where or self.dedup or self.set):
            raise UsageError("--keys is a list by itself: it goes without --where, --dedup and --set")
        if self.method and self.column:
            raise UsageError("--method and --column were both given: --column names the column of --scores FILE to rank by; give one")
        if self.hard and self.scores and not self.scores.is_dir() and not self.column:
            raise UsageError(f"--hard {self.hard} says which end of a column of {self.scores} is hard: name the column with --column")
        if self.hard and not self.column:
            raise UsageError(f"--hard {self.hard} is for a column of somebody's --scores FILE: recorded scores know which end is hard")
        if self.column and not self.scores:
            raise UsageError("--column names a column of a Parquet file: give the file with --scores FILE")
        if self.column:
            methods.check_column(self.column)
        self._check_useful()
        if not self.keys:
            _method(self)
            if not self.column:
                Filters(self.where).needs()

    @property
    def copying(self) -> Copying | None:
        """How records are copied; None where they are not."""
        limits = Limits(self.shard_samples, self.shard_bytes)
        return None if self.ids_only else Copying(limits, self.jobs, checked=not self.unchecked, normalize=self.normalize)

    def needs(self) -> dict[str, str]:
        """What the method and the filters read of a scores folder, each with what reads it."""
        if self.keys:
            return {}
        of_method = dict.fromkeys(_method(self).needs, self.method or "random")
        found = Filters(self.where, self.dedup).needs(columns_of(self.scores, self.column)) | of_method
        return {name: reader for name, reader in found.items() if name != self.column}

    def _check_useful(self) -> None:
        """Refuse what would change nothing."""
        method = "keys" if self.keys else self.column or self.method or "random"
        ranks = bool(self.column) or methods.of_score(method)
        if self.keep and not ranks:
            raise UsageError(f"--keep {self.keep} chooses an end of a score, and none ranks here: name one with --method or --column")
        if self.skip_hardest is not None and not ranks:
            raise UsageError(
                f"--skip-hardest {self.skip_hardest:g} leaves out the hard end of a score, and none ranks here: name one with --method or "
                "--column"
            )
        for option_, given in (("--dedup-eps", self.dedup_eps), ("--dedup-clusters", self.dedup_clusters)):
            if given is not None and self.dedup != "near":
                raise UsageError(f"{option_} {given:g} is for --dedup near: leave it out, or give that")
        for option_, changed in (("--balance", self.balance != "class"), ("--seed", self.seed != 0), ("--ranks", self.ranks)):
            if self.keys and changed:
                raise UsageError(f"{option_} changes how samples are ranked, and --keys is a list that is kept as it is: leave it out")
        if self.ids_only and self.unchecked:
            raise UsageError("--unchecked leaves out the check of images that are copied, and --ids-only copies none: leave it out")
        if self.ids_only and self.normalize:
            raise UsageError("--normalize leaves out headers of what is copied, and --ids-only copies nothing: give one of them")
        heavy = self.dedup == "near" or (not ranks and methods.compares(method))
        if self.memory is not None and not heavy:
            raise UsageError(
                f"--memory {self.memory} bounds methods that compare samples and --dedup near, and {method} is neither: leave it out"
            )


def run(config: SelectConfig) -> Outcome:
    """Select a subset. Raises UsageError, MismatchError, SourceError and ExistsError."""
    started = time.monotonic()
    parent = Dataset.open(workspace.data(config.data, "train", option="DATA"))
    task = _listed(config, parent) if config.keys else _ranked(config, parent)
    derived = f"{task.method}-{order.shortest(task.frac)}-s{config.seed}"
    if config.name is None and config.out is None:
        _check_derived(derived, config.column)
    folder, name = workspace.place(config.out, config.name, workspace.SUBSETS, derived)
    settings = {
        **task.settings,
        "method": task.method,
        "frac": order.shortest(task.frac),
        "seed": None if config.keys else config.seed,
        "ids_only": config.ids_only,
        "shard_samples": config.shard_samples,
        "shard_bytes": config.shard_bytes,
    } | ({"normalize": True} if config.normalize else {})
    identity = Identity("subset", name, settings, [parent.manifest.as_input("data"), *task.numbers.inputs()])
    if config.dry_run:
        state = look(folder, identity, overwrite=config.overwrite)
        return _estimate(config, task, folder, state, started)
    with Build.begin(folder, identity, overwrite=config.overwrite) as build:
        try:
            made = build.done or _write(config, build, pick(task))
        except SourceError:  # the parent's shards are damaged: what was copied of them is no start
            build.discard()
            raise
        if build.done:
            say("already done")
    return _outcome(folder, made)


def _check_derived(name: str, column: str | None) -> None:
    """Raise UsageError where the name of a column cannot be part of a folder's."""
    if column is not None and not re.fullmatch(r"[\w+-][\w.+-]*", column):
        raise UsageError(f"--column {column!r} cannot be part of a folder's name ({name!r}): give one with --name NAME")
    workspace.plain_name(name)


def _tell_weights(parent: Dataset) -> None:
    """Weights are for the subset that they were made with: what is chosen from it has its own, or none."""
    if parent.manifest.kind == "subset" and parent.weights.min() < parent.weights.max():
        say(f"the weights of {parent.folder} are left behind: they were fitted to all of its samples together")


def _listed(config: SelectConfig, parent: Dataset) -> Task:
    """Somebody's list."""
    path = config.keys or Path()
    everyone = parent.usable()
    rows = listed_rows(path, foreign.read_ids(path), parent)
    frac = round(Decimal(len(rows)) / len(everyone), 6)
    settings = {"keys": sha256_file(path)}
    return Task(parent, everyone, everyone, Numbers(parent), Filters(), len(rows), frac, settings, listed=rows)


def _ranked(config: SelectConfig, parent: Dataset) -> Task:
    """A method, what it reads, and the candidates that `--where` leaves it."""
    everyone = parent.usable()
    keep, frac = how_many(config.frac or "", len(everyone))
    choice, column = _choice(config)
    filters = Filters(config.where, config.dedup, config.dedup_eps or EPS, config.dedup_clusters)
    numbers = _numbers(config, parent, choice, filters, column)
    if config.dedup == "exact":
        check_digests(parent)
    candidates = filters.wanted(parent, numbers, everyone)
    check_enough(keep, len(candidates), len(everyone), "--where")
    theirs = {} if column is None else {"scores_file": sha256_file(column.path), "column": column.name, "hard": column.hard}
    settings = {"balance": config.balance, **choice.settings, **theirs, **filters.config(len(candidates))}
    return Task(parent, everyone, candidates, numbers, filters, keep, frac, settings, choice)


def _choice(config: SelectConfig) -> tuple[Choice, Column | None]:
    """The method with its settings, and the column of another's file where one ranks."""
    column = None
    if config.scores is not None and not config.scores.is_dir() and (config.column or config.method in SCORES):
        column = open_column(config.scores, config.column, config.hard)
    elif config.column:
        raise UsageError(f"--column {config.column} is a column of a Parquet file, and --scores {config.scores} is a folder: give --method")
    return _method(config), column


def _method(config: SelectConfig) -> Choice:
    """The method with its settings. Raises UsageError for what it has not."""
    name = config.column or config.method or "random"
    if not config.column and name in SELECTORS:
        return methods.choose(name, config.set, seed=config.seed, balance=config.balance, memory=config.memory)
    skip, end = config.skip_hardest or 0.0, config.keep or "hard"
    params = RankedParams(config.seed, config.balance, config.memory or methods.MEMORY, score=name, end=end, skip_hardest=skip)
    return methods.rank(name, config.set, params)


def _numbers(config: SelectConfig, parent: Dataset, choice: Choice, filters: Filters, column: Column | None) -> Numbers:
    """Where what is read comes from: a scores folder, where the method or a filter reads one."""
    theirs = [] if column is None else columns_of(column.path, column.name)
    needs = filters.needs(theirs) | {name: choice.name for name in choice.needs if column is None or name != column.name}
    given = config.scores if column is None else None
    file = None if column is None else column.path
    named = [name for name in theirs if name in filters.names(theirs) and name not in OWN]
    others = {} if file is None else {name: foreign.read_scores(file, name) for name in named}
    if not needs:
        if given is not None:
            raise UsageError(f"--scores was given but --method is {choice.name}, which uses none: name a score with --method or --column")
        return Numbers(parent, None, column, others)
    if given is not None and given.is_file():
        raise UsageError(f"--scores {given} is a file, and a scores folder is read: give one, or rank by a column with --column")
    return Numbers(parent, open_scores(given, parent, needs, file=file), column, others)


def _write(config: SelectConfig, build: Build, picks: Picks) -> Manifest:
    """Plan, copy and seal."""
    parent, rows = picks.parent, picks.rows
    _tell_weights(parent)
    outside: list[File] = []
    copied: Mapping[str, int] = {}
    if config.copying is None:
        outside = _parents_shards(parent, build.folder)
        index, names = parent.index.take(rows).combine_chunks(), indexing.shard_names(parent.shard_paths)
    else:
        made = prune(build, parent, rows, config.copying)
        index, names, copied = made.index, made.names, made.counts
    subset.write_selection(build, index, None if picks.scores is None else picks.scores[picks.places], picks.weights)
    facts = indexing.write_index(build, index, parent.classes, names)
    if picks.ranking is not None and _writes_ranking(config, picks):
        subset.write_ranking(build, parent.index["id"].take(picks.candidates), picks.scores, picks.ranking)
    build.write("README.md", _card(build, parent, facts).encode())
    counts = facts.counts | dict(picks.counts) | {"kept": len(rows), **copied}
    side = ["README.md", subset.RANKING]
    return build.seal(counts=counts, classes=parent.classes, content=facts.content, side=side, outside=outside)


def _writes_ranking(config: SelectConfig, picks: Picks) -> bool:
    return picks.ranking is not None and (len(picks.candidates) <= RANKING_LIMIT or config.ranks)


def _estimate(config: SelectConfig, task: Task, folder: Path, state: str, started: float) -> Outcome:
    """What selecting would do; what has been done for it so far is part of the time. What takes long is not run, but told."""
    choosing = 0.0
    if task.choice is not None and task.is_slow:
        choosing = task.filters.seconds(task.numbers, len(task.candidates), task.choice.params.memory)
        choosing += tell_cost(task, task.choice, task.candidates)
        found = rough_cost(task.parent, task.candidates, task.keep, config.copying)
    else:
        picks = pick(task)
        found = cost(picks, config.copying, ranking=_writes_ranking(config, picks))
    counts = {"sample": task.keep} | ({} if config.ids_only else {"shard": found.shards})
    return Estimate(folder, state, counts, found.bytes, time.monotonic() - started + choosing + found.seconds).outcome()


def _parents_shards(parent: Dataset, folder: Path) -> list[File]:
    """The parent's shards as files outside the subset: by a relative path, so that a workspace can be moved; adopted ones stay put."""
    known = parent.manifest.outside or [f for f in parent.manifest.files if f.path.endswith(".tar")]
    adopted = any(Path(f.path).is_absolute() for f in parent.manifest.outside)
    paths = [str(p) if adopted else os.path.relpath(p.resolve(), folder.resolve()) for p in parent.shard_paths]
    return [File(path, f.bytes, f.sha256) for path, f in zip(paths, known, strict=True)]


def _card(build: Build, parent: Dataset, facts: indexing.Facts) -> str:
    identity = build.identity
    shards = [f.path for f in build.files() if f.path.endswith(".tar")]
    whole = f"{parent.manifest.name!r} of {count(len(parent), 'sample')} (content `{parent.manifest.content}`)"
    note = f"Kept from {whole} {_how(identity.config)}."
    note += " PAX headers that held nothing but times were left out." if identity.config.get("normalize") else ""
    members = parent.members
    images = [members.image] if members.image and shards else copying.image_members(build, shards)
    if members.label != "cls":
        note += f" Classes are numbers in `index.parquet`; the members say them their way (`{members.label}`)."
    labelled = facts.counts["labelled"] > 0 and members.label == "cls"
    card = Card(identity.name, _split(parent.manifest.as_input("data")), images, labelled, note)
    return dataset_card(card, facts.counts, parent.classes)


def _how(made: Mapping[str, Any]) -> str:
    """How a subset was chosen, for its card: `by ccs (bins 50, cut auto, score aum), fraction 0.1, seed 0; only where ...`."""
    own = made.get("settings", {}) | {key: made[key] for key in ("keep", "skip_hardest") if made.get(key, "hard") != "hard"}
    shown = ", ".join(f"{key.replace('_', ' ')} {'auto' if value is None else value}" for key, value in sorted(own.items()))
    how = f"by {made['method']}{f' ({shown})' if shown else ''}, fraction {made['frac']}"
    how += "" if made["seed"] is None else f", seed {made['seed']}"
    how += f"; only where `{made['where']}`" if "where" in made else ""
    if made.get("dedup") == "near":
        return f"{how}; without near duplicates (eps {made['dedup_eps']}, in {count(made['dedup_clusters'], 'cluster')})"
    return how + ("; without exact duplicates" if "dedup" in made else "")


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
