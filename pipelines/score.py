"""`score`: one pass of the teacher over the data, a Parquet part per shard.

1. Each shard's images are decoded once; the final network and the early one (for el2n, grand and grand_full) look at them as they are
   evaluated. With `--epoch` it is the network after that epoch; with `--proxies` several others, trained first, and the mean of
   what they give. With `--precision bf16` a probe says first what that costs.
2. Scores from training dynamics (forgetting, aum, correct, ...) are added from the teacher's folder, by id.
3. Scores that `--also` asks for: from the embeddings of all samples, once these are written.

Writes `scores/TEACHER`: `part-NNNNNN.parquet`, and on request `embedding-` and `logits-NNNNNN.arrow`; and `proxies/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _advice, _bf16, _columns, _proxies, _scoring, _trials, _workspace
from kdprune_pipelines._columns import Columns
from kdprune_pipelines._console import Outcome, count, say
from kdprune_pipelines._estimate import MOST_SECONDS, Estimate, growing, look, measure_growing
from kdprune_pipelines._models import WEIGHTS, Saved, epoch_weights, open_model
from kdprune_pipelines._proxies import Proxy
from kdprune_pipelines._scoring import Networks, Scorer

from kdprune_data.config import Config, option
from kdprune_data.errors import UsageError, some
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import SCORES

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ScoreConfig(Config):
    """Settings of `score`. Raises UsageError for options that do not go together."""

    data: Path | None = option(None, help="The data set to score; default data/train.")
    teacher: Path | None = option(None, help="The teacher's folder; default the only one in teachers/.")
    also: tuple[str, ...] = option((), help="Also make this score, which costs more; may be repeated.", choices=(*_columns.ALSO, "all"))
    set: tuple[str, ...] = option((), help="A score's setting, SCORE.NAME=VALUE (forgetting.never=zero); may be repeated.")
    epoch: int | None = option(
        None,
        help="Read all that networks say from the weights after this epoch; default the last, for el2n, grand, grand_full the first kept.",
        least=1,
    )
    proxies: int | None = option(
        None,
        help="Train this many networks as the teacher was, and score by the mean of what they say, all in memory at once; with --epochs.",
        least=1,
        most=1000,
    )
    epochs: int | None = option(None, help="How long to train --proxies, with a learning rate that does not fall.", least=1)
    seed: int = option(0, help="Seed of clusterings, in scores from the embedding.", least=0, most=2**31 - 1)
    embedding: bool = option(False, help="Also write each sample's embedding (the last layer's input), float16.")
    logits: bool = option(False, help="Also write each sample's logits, float16.")
    batch: int = option(256, help="Samples in a batch; batches do not cross shards.", least=1)
    precision: str = option("float32", help=_bf16.HELP, choices=_bf16.PRECISIONS)
    memory: int = option(1_000_000_000, help="Bytes for what scores of --also compute with, beside the embeddings.", least=1_000_000)
    code: str | None = option(None, help="package.module:function, when the teacher is your own function.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    name: str | None = option(None, help="Name in scores/; default the teacher's.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


@dataclass(frozen=True)
class Job:
    """What is to be done: the data, the teacher, the scores, their proxies, and where they go."""

    config: ScoreConfig
    data: Dataset
    saved: Saved
    columns: Columns
    proxies: list[Proxy]
    device: torch.device
    folder: Path
    name: str

    @property
    def vectors(self) -> list[str]:
        """The files beside the parts."""
        wanted = {"embedding": self.config.embedding or bool(self.columns.of("embedding")), "logits": self.config.logits}
        return [what for what, is_wanted in wanted.items() if is_wanted]

    @property
    def early_epoch(self) -> int | None:
        """The epoch whose weights early scores are read from; None: the final ones, or the proxies'."""
        return None if self.proxies else self.config.epoch or self.saved.early_epoch

    @property
    def sources(self) -> dict[str, str]:
        """Which file of the teacher's, or what else, each score comes from."""
        final = WEIGHTS if self.config.epoch is None else epoch_weights(self.config.epoch)
        early = final if self.early_epoch is None else epoch_weights(self.early_epoch)
        mean = (
            f"mean of {len(self.proxies)} {'proxies' if len(self.proxies) > 1 else 'proxy'} after {count(self.config.epochs or 0, 'epoch')}"
        )
        by_kind = {
            "final": mean if self.proxies else final,
            "early": mean if self.proxies else early,
            "dynamics": f"dynamics of {len(self.saved.recorded_epochs)} epochs",
            "embedding": f"{final} (embedding)",
        }
        return {name: by_kind[SCORES[name].source] for name in self.columns.names}

    def identity(self, there: Mapping[str, str]) -> Identity:
        """What is made, of what. there: the digests of inputs noted in the folder, which stand for proxies that are not trained."""
        config = self.config
        settings: dict[str, Any] = {
            "columns": list(self.columns.names),
            "settings": self.columns.stored(),
            "early_epoch": self.early_epoch,
            "epoch": config.epoch,
            "proxies": {"count": config.proxies, "epochs": config.epochs} if self.proxies else None,
            "seed": config.seed if self.columns.of("embedding") else None,
            "embedding": "embedding" in self.vectors,
            "logits": "logits" in self.vectors,
            "batch": config.batch,
            "memory": config.memory if "grand_full" in self.columns.names else None,
            "precision": config.precision,
        }
        inputs = [self.data.manifest.as_input("data"), self.saved.manifest.as_input("teacher")]
        return Identity("scores", self.name, settings, [*inputs, *_proxies.as_inputs(self.proxies, there)])

    def scorer(self) -> Scorer:
        """The work, with its networks; a proxy that is not trained, which is for estimates alone, has its fresh weights."""
        from kdprune_data.learn.stream import Images

        config = self.config
        return Scorer(
            self.columns,
            Images(self.data, keep="off"),  # each is looked at once
            self._networks(),
            self.sources,
            self.vectors,
            batch=config.batch,
            jobs=config.jobs,
            memory=config.memory,
            seed=config.seed,
        )

    def _networks(self) -> Networks:
        config, saved = self.config, self.saved
        if self.proxies:
            early = final = [proxy.load() if proxy.finished() else proxy.network() for proxy in self.proxies]
            teacher = saved.load(code=config.code) if self.vectors else None
        else:
            last: nn.Module = saved.load(code=config.code, epoch=config.epoch)
            first = self.early_epoch
            early = [last if first in (None, config.epoch) else saved.load(code=config.code, epoch=first)]
            final, teacher = [last], last if self.vectors else None
        found = Networks(early, final, teacher, saved.normalisation, saved.architecture.size, self.device)
        return found.in_bf16() if config.precision == "bf16" else found


def run(config: ScoreConfig) -> Outcome:
    """Score a data set. Raises UsageError, MismatchError, SourceError, FormatError and ExistsError."""
    data = Dataset.open(_workspace.data(config.data, "train", option="--data"))
    saved = open_model(_workspace.one(config.teacher, _workspace.TEACHERS, "--teacher"))
    data.same_classes(saved.manifest.classes, str(saved.folder))
    unlabelled = data.ids[data.usable()[data.labels[data.usable()] < 0]]
    if len(unlabelled):
        raise UsageError(
            f"{data.folder} has {count(len(unlabelled), 'sample')} without a label ({some(unlabelled)}): these scores need labels"
        )
    job = _job(config, data, saved)
    noted = _proxies.noted(job.folder)
    identity = job.identity(noted)
    if config.dry_run:
        return _estimate(job, look(job.folder, identity, overwrite=config.overwrite))
    if look(job.folder, identity, overwrite=config.overwrite) != "finished" and job.proxies:
        _proxies.make_all(job.proxies)
        identity = job.identity(noted)
    with Build.begin(job.folder, identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            say("already done")
            return _outcome(job.folder, build.done)
        return _outcome(job.folder, _score(job, build))


def _check(config: ScoreConfig) -> None:
    """Raise UsageError for options that do not go together."""
    if config.proxies is not None and config.epochs is None:
        raise UsageError(f"--proxies {config.proxies} says how many networks to train, and --epochs for how long: give both")
    if config.epochs is not None and config.proxies is None:
        raise UsageError(f"--epochs {config.epochs} says how long to train --proxies: give both, or --epoch for the teacher's own weights")
    if config.epoch is not None and config.proxies is not None:
        raise UsageError(
            f"--epoch {config.epoch} chooses weights of the teacher and --proxies scores by other networks: give one of the two"
        )


def _job(config: ScoreConfig, data: Dataset, saved: Saved) -> Job:
    from kdprune_data.learn.inference import choose_device

    _check_epoch(config, saved)
    columns = _columns.chosen(saved, data, config.also, config.set, code=config.code)
    implied = columns.of("embedding")
    if implied and not config.embedding:
        say(f"{', '.join(implied)}: from the embeddings, which are written too, as with --embedding")
    device, proxies = choose_device(config.device), list[Proxy]()
    if config.proxies is not None and config.epochs is not None:
        how = {"jobs": config.jobs, "code": config.code}
        proxies = _proxies.of(saved, data, count=config.proxies, epochs=config.epochs, device=device, how=how)
    elif config.epoch is None and saved.early_epoch is None:
        *first, last = columns.of("early")
        say(f"the teacher keeps no early epoch: {', '.join(first)}{' and ' if first else ''}{last} are read from its final weights")
    derived = _columns.name_of(saved.manifest.name, epoch=config.epoch, proxies=config.proxies, epochs=config.epochs)
    folder, name = _workspace.place(config.out, config.name, _workspace.SCORES, derived)
    return Job(config, data, saved, columns, proxies, device, folder, name)


def _check_epoch(config: ScoreConfig, saved: Saved) -> None:
    kept = saved.kept_epochs
    if config.epoch is not None and config.epoch not in kept:
        named = f"{'epoch' if len(kept) == 1 else 'epochs'} {', '.join(str(e) for e in kept)}"
        there = f"the weights after {named}; choose one of these, or make" if kept else "no epoch's weights; make"
        asked = config.epoch
        raise UsageError(f"--epoch {asked}: {saved.folder} keeps {there} a teacher with `{_advice.keeping(saved.manifest, asked)}`")


def _score(job: Job, build: Build) -> Manifest:
    _tell_dependence(job)
    past = _columns.past(job.saved, job.data, job.columns)
    scorer = job.scorer()
    cost = {"bf16": _bf16.of_scores(scorer)} if job.config.precision == "bf16" else {}
    counts = {"samples": len(job.data.usable()), "shards": _scoring.score(scorer, build, past)} | cost
    return build.seal(counts=counts, classes=job.data.classes, content=job.data.manifest.content)


def _tell_dependence(job: Job) -> None:
    """A line where the scores are those of a network that may teach too, of data that it was trained on, in part at least."""
    saved = job.saved
    known = _workspace.contents(job.data.manifest.as_input("data"))
    if job.proxies or not known & _workspace.contents(_columns.data_of(saved)):
        return
    other = "another network" if saved.manifest.config.get("recipe") is None else "--proxies, or with another seed's teacher"
    say(f"the network that scores, {saved.manifest.name}, learned from these samples: for scores independent of it, score with {other}")


def _estimate(job: Job, state: str) -> Outcome:
    """What scoring would do: bytes before compression, seconds from a few batches of the very work, and from a few trials of the rest."""
    data, scorer = job.data, job.scorer()
    rows = data.usable()
    each = 4 * (1 + len(job.columns.names))  # the label and the scores
    dimensions = 0

    def work() -> Iterator[int]:
        nonlocal each, dimensions
        for n, (columns, vectors) in enumerate(_scoring.scored(scorer, growing(rows, job.config.batch))):
            if n == 0:
                each += sum(values.nbytes for values in vectors.values())
                dimensions = vectors["embedding"].shape[1] if "embedding" in vectors else 0
            yield len(columns["loss"])

    counts = {"sample": len(rows), "shard": len(np.unique(data.shards[rows]))}
    if state == "finished":
        return Estimate(job.folder, state, counts, 0, 0.0).outcome()
    seconds = measure_growing(work(), len(rows))
    if job.columns.of("embedding"):
        seconds += _trials.seconds(scorer, dimensions, MOST_SECONDS)
    proxies, of_proxies, training = _proxies.estimate(job.proxies)
    if job.proxies:
        counts["untrained network"] = proxies
    size = each * len(rows) + sum(len(one) for one in data.ids[rows]) + of_proxies
    return Estimate(job.folder, state, counts, size, seconds + training).outcome()


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts = made.counts
    text = f"{folder}: {count(counts['samples'], 'sample')}, {', '.join(made.config['columns'])}"
    return Outcome(folder, {"folder": str(folder), "counts": counts, "columns": made.config["columns"], "digest": made.digest}, text)
