"""`score`: one pass of the teacher over the data, a Parquet part per shard.

1. Each shard's images are decoded once; the final network and the early one (for el2n and grand) look at them as they are evaluated.
2. Scores from training dynamics (forgetting, aum, correct) are added from the teacher's folder, by id.

Writes `scores/TEACHER`: `part-NNNNNN.parquet`, and on request `embedding-` and `logits-NNNNNN.arrow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _workspace
from kdprune_pipelines._console import Outcome, bar, count, say
from kdprune_pipelines._estimate import Estimate, growing, look, measure_growing
from kdprune_pipelines._models import WEIGHTS, Saved, epoch_weights, open_model
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import Config, option
from kdprune_data.errors import FormatError, SourceError, UsageError, some
from kdprune_data.formats import dynamics
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import PART, SCORES, VECTORS, write_part, write_vectors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.stream import Images
    from kdprune_data.scores import Outputs

Columns = dict[str, NDArray[np.float32]]
FLOAT16_MOST = 65504.0


@dataclass(frozen=True)
class ScoreConfig(Config):
    """Settings of `score`."""

    data: Path | None = option(None, help="The data set to score; default data/train.")
    teacher: Path | None = option(None, help="The teacher's folder; default the only one in teachers/.")
    embedding: bool = option(False, help="Also write each sample's embedding (the last layer's input), float16.")
    logits: bool = option(False, help="Also write each sample's logits, float16.")
    batch: int = option(256, help="Samples in a batch; batches do not cross shards.", least=1)
    code: str | None = option(None, help="package.module:function, when the teacher is your own function.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    name: str | None = option(None, help="Name in scores/; default the teacher's.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")


@dataclass(frozen=True)
class Scorer:
    """The networks and what they score with."""

    config: ScoreConfig
    saved: Saved
    images: Images
    final: nn.Module
    early: nn.Module | None
    device: torch.device
    past: dict[str, NDArray[np.float32]]
    """Scores from dynamics of all rows of the data set."""

    @property
    def sources(self) -> dict[str, str]:
        """Which file of the teacher's each score comes from."""
        final, recorded = WEIGHTS, f"dynamics of {len(self.saved.recorded_epochs)} epochs"
        epoch = self.saved.early_epoch
        early = final if epoch is None else epoch_weights(epoch)
        by_kind = {"final": final, "early": early, "dynamics": recorded}
        return {name: by_kind[score.source] for name, score in SCORES.items() if score.source != "dynamics" or name in self.past}


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
    folder, name = _workspace.place(config.out, config.name, _workspace.SCORES, saved.manifest.name)
    past = _from_dynamics(saved, data)
    settings: dict[str, Any] = {
        "columns": [n for n, s in SCORES.items() if s.source != "dynamics" or n in past],
        "early_epoch": saved.early_epoch,
        "embedding": config.embedding,
        "logits": config.logits,
        "batch": config.batch,
        "precision": "float32",
    }
    identity = Identity("scores", name, settings, [data.manifest.as_input("data"), saved.manifest.as_input("teacher")])
    if config.dry_run:
        state = look(folder, identity, overwrite=config.overwrite)
        return _estimate(_scorer(config, saved, data, past), folder, state)
    with Build.begin(folder, identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            say("already done")
            return _outcome(folder, build.done)
        return _outcome(folder, _score(_scorer(config, saved, data, past), build, data))


def _scorer(config: ScoreConfig, saved: Saved, data: Dataset, past: dict[str, NDArray[np.float32]]) -> Scorer:
    from kdprune_data.learn.inference import choose_device
    from kdprune_data.learn.stream import Images

    early = saved.early_epoch
    if early is None:
        say("the teacher keeps no early epoch: el2n and grand are read from its final weights")
    nets = saved.load(code=config.code), saved.load(code=config.code, epoch=early) if early else None
    return Scorer(config, saved, Images(data), *nets, choose_device(config.device), past)


def _from_dynamics(saved: Saved, data: Dataset) -> dict[str, NDArray[np.float32]]:
    """forgetting, aum and correct of every row of the data set that decodes (others 0); nothing where the teacher did not see them all."""
    from kdprune_data.scores import FROM_DYNAMICS, History

    epochs = saved.recorded_epochs
    if not epochs:
        say("the teacher has no training dynamics: forgetting, aum and correct are left out")
        return {}
    if saved.manifest.content not in _workspace.contents(data.manifest.as_input("data")):
        say("the teacher was trained on other data: forgetting, aum and correct are left out")
        return {}
    columns = [dynamics.read(saved.folder, epoch, ["uid", "correct", "logit_margin"]) for epoch in epochs]
    for epoch, one in zip(epochs, columns, strict=True):
        if not np.array_equal(one["uid"], columns[0]["uid"]):
            raise FormatError(
                f"{saved.folder / dynamics.path_of(epoch)} is not of the same samples, in the same order, as that of epoch {epochs[0]}: "
                "make or fetch the teacher again"
            )
    found = order.locate(columns[0]["uid"], data.uids[data.usable()])
    if (found < 0).any():
        say(f"the teacher was trained without {count(int((found < 0).sum()), 'sample')} of these: forgetting, aum and correct are left out")
        return {}
    history = History(*(np.stack([c[name][found] for c in columns]) for name in ("correct", "logit_margin")))
    scores = {}
    for name, score in FROM_DYNAMICS.items():
        scores[name] = np.zeros(len(data), np.float32)
        scores[name][data.usable()] = score(history)
    return scores


def _score(scorer: Scorer, build: Build, data: Dataset) -> Manifest:
    shards = np.unique(data.shards[data.usable()]).tolist()
    samples = len(data.usable())
    say(f"scoring {count(samples, 'sample')} in {count(len(shards), 'shard')} on {scorer.device}")
    if scorer.saved.manifest.content in _workspace.contents(data.manifest.as_input("data")):
        say("the run that made the teacher makes the scores too: for scores that are independent of it, score with another seed's teacher")
    todo = [shard for shard in shards if not _stands(scorer.config, build, shard)]
    left = sum(len(data.rows_of(shard)) for shard in todo)
    with bar("score", total=samples, initial=samples - left) as progress:
        for shard in todo:
            _score_shard(scorer, build, shard, progress.update)
    counts = {"samples": samples, "shards": len(shards)}
    return build.seal(counts=counts, classes=data.classes, content=data.manifest.content)


def _stands(config: ScoreConfig, build: Build, shard: int) -> bool:
    """Whether all files of a shard are whole from an earlier run."""
    names = [PART % shard, *(VECTORS % (what, shard) for what in ("embedding", "logits") if getattr(config, what))]
    return all(build.finished(name) is not None for name in names)


def _score_shard(scorer: Scorer, build: Build, shard: int, tick: Callable[[int], None]) -> None:
    """Score one shard."""
    data, config = scorer.images.data, scorer.config
    rows = data.rows_of(shard)
    pieces: list[Columns] = []
    vectors: dict[str, list[NDArray[np.float16]]] = {"embedding": [], "logits": []}
    for columns, found in _scored(scorer, order.batches(rows, config.batch)):
        pieces.append(columns)
        for what, values in found.items():
            vectors[what].append(values)
        tick(len(columns["loss"]))
    columns = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    columns |= {name: values[rows] for name, values in scorer.past.items()}
    _check_finite(columns, data, rows)
    for what, wanted in (("embedding", config.embedding), ("logits", config.logits)):
        if wanted:
            write_vectors(build, what, shard, np.concatenate(vectors[what]))
    ordered = {name: columns[name] for name in SCORES if name in columns}
    write_part(build, shard, data.ids[rows].tolist(), data.labels[rows], ordered, scorer.sources)


def _scored(scorer: Scorer, batches: Iterable[NDArray[np.int64]]) -> Iterator[tuple[Columns, dict[str, NDArray[np.float16]]]]:
    """The scores of each batch of rows that the networks give, and its embedding and logits."""
    from kdprune_data.learn.inference import evaluating, evaluation_batches

    size = scorer.saved.architecture.size
    with evaluating(scorer.final, scorer.device), evaluating(scorer.early or scorer.final, scorer.device):
        for rows, pixels in evaluation_batches(scorer.images, batches, size=size, threads=scorer.config.jobs):
            final, early = _outputs(scorer, rows, pixels)
            vectors = {"embedding": final.embedding, "logits": final.logits}
            half = {n: v.clamp(-FLOAT16_MOST, FLOAT16_MOST).numpy().astype(np.float16) for n, v in vectors.items()}
            yield _columns(final, early), half


def _estimate(scorer: Scorer, folder: Path, state: str) -> Outcome:
    """What scoring would do: bytes before compression, seconds from a few batches of the very work."""
    data, config = scorer.images.data, scorer.config
    rows = data.usable()
    each = 4 * (1 + len(scorer.sources))  # the label and the scores

    def work() -> Iterator[int]:
        nonlocal each
        for n, (columns, vectors) in enumerate(_scored(scorer, growing(rows, config.batch))):
            if n == 0:
                each += sum(vectors[what].nbytes for what in ("embedding", "logits") if getattr(config, what))
            yield len(columns["loss"])

    seconds = 0.0 if state == "finished" else measure_growing(work(), len(rows))
    size = each * len(rows) + sum(len(one) for one in data.ids[rows])
    counts = {"sample": len(rows), "shard": len(np.unique(data.shards[rows]))}
    return Estimate(folder, state, counts, size, seconds).outcome()


def _outputs(scorer: Scorer, rows: NDArray[np.int64], pixels: torch.Tensor) -> tuple[Outputs, Outputs]:
    import torch

    from kdprune_data.learn.models import features
    from kdprune_data.scores import Outputs

    images = scorer.saved.normalisation.apply(pixels.to(scorer.device))
    labels = torch.from_numpy(scorer.images.data.labels[rows].astype(np.int64))

    def of(net: nn.Module) -> Outputs:
        embedding, logits = features(net, images)
        # Scores are computed in float64, which not every device has.
        return Outputs(logits.cpu(), labels, embedding.cpu())

    final = of(scorer.final)
    return final, of(scorer.early) if scorer.early is not None else final


def _columns(final: Outputs, early: Outputs) -> Columns:
    from kdprune_data.scores import FROM_OUTPUTS

    by_source = {"final": final, "early": early}
    return {name: score(by_source[SCORES[name].source]).float().numpy() for name, score in FROM_OUTPUTS.items()}


def _check_finite(columns: Columns, data: Dataset, rows: NDArray[np.int64]) -> None:
    for name, values in columns.items():
        bad = data.ids[rows[~np.isfinite(values)]]
        if len(bad):
            raise SourceError(
                f"{name} is not a finite number for {count(len(bad), 'sample')} ({some(bad)}): the teacher's weights are broken"
            )


def _outcome(folder: Path, made: Manifest) -> Outcome:
    counts = made.counts
    text = f"{folder}: {count(counts['samples'], 'sample')}, {', '.join(made.config['columns'])}"
    return Outcome(folder, {"folder": str(folder), "counts": counts, "columns": made.config["columns"], "digest": made.digest}, text)
