"""`evaluate`: how a teacher or student does on the test set: accuracy, top-5, each class, the worst class, cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines import _workspace
from kdprune_pipelines._console import Outcome, bar, count
from kdprune_pipelines._models import WEIGHTS, Saved, epoch_weights, open_model

from kdprune_data.config import Config, option
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.formats.dataset import Dataset

if TYPE_CHECKING:
    from kdprune_data.learn.inference import Evaluation

SHOWN_CLASSES = 20


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Settings of `evaluate`."""

    model: Path = option(help="The folder of a teacher or student.", argument=True)
    data: Path | None = option(None, help="The data set to evaluate on; default data/test.")
    epoch: int | None = option(None, help="The weights kept after this epoch; default those at the end of training.", least=1)
    batch: int = option(256, help="Samples in a batch.", least=1)
    code: str | None = option(None, help="package.module:function, when the model is your own function.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))


def run(config: EvaluateConfig) -> Outcome:
    """Evaluate a model. Raises UsageError, MismatchError, and SourceError for a model whose numbers are not finite."""
    saved = open_model(config.model)
    data = Dataset.open(_workspace.data(config.data, "test", option="--data"))
    from kdprune_data.learn.inference import Predictor, choose_device, evaluate  # torch: after what a mistyped folder is told
    from kdprune_data.learn.stream import Images

    data.same_classes(saved.manifest.classes, str(saved.folder))
    _check_epoch(saved, config.epoch)
    net = saved.load(code=config.code, epoch=config.epoch)
    predictor = Predictor(net, saved.normalisation, saved.architecture.size, choose_device(config.device))
    with bar("evaluate", total=int((data.labels[data.usable()] >= 0).sum())) as progress:
        found = evaluate(predictor, Images(data, keep="off"), batch=config.batch, tick=progress.update)
    if not math.isfinite(found.loss):
        raise SourceError(f"what {saved.folder} says of {data.folder} are no finite numbers: its weights are broken; use another model")
    return Outcome(None, _facts(config, saved, data, found), _text(config, saved, data, found))


def _check_epoch(saved: Saved, epoch: int | None) -> None:
    if epoch is not None and epoch not in saved.kept_epochs:
        kept = ", ".join(map(str, saved.kept_epochs)) or "none"
        raise UsageError(f"--epoch {epoch} was not kept in {saved.folder} (kept: {kept}): give one of these, or leave it out for the end")


def _weights(config: EvaluateConfig, saved: Saved) -> tuple[str, int]:
    """The file of weights that is evaluated, and after which epoch they were saved."""
    if config.epoch is not None:
        return epoch_weights(config.epoch), config.epoch
    return WEIGHTS, int(saved.manifest.counts["epochs"])


def _ema(saved: Saved) -> float | None:
    """The decay of the average that the weights are; None where they are none, or were adopted, of whose training nothing is known."""
    found: float | None = (saved.manifest.config.get("recipe") or {}).get("ema")
    return found


def _facts(config: EvaluateConfig, saved: Saved, data: Dataset, found: Evaluation) -> dict[str, Any]:
    names = list(data.classes)
    file, epoch = _weights(config, saved)
    return {
        "model": str(config.model),
        "digest": saved.manifest.digest,
        "weights": file,
        "epoch": epoch,
        "ema": _ema(saved),
        "data": str(data.folder),
        "content": data.manifest.content,
        "samples": found.samples,
        "accuracy": found.accuracy,
        "top5_accuracy": found.top5,
        "loss": found.loss,
        "worst_class": names[found.worst],
        "worst_class_accuracy": found.per_class[found.worst],
        "per_class": dict(zip(names, found.per_class, strict=True)),
    }


def _text(config: EvaluateConfig, saved: Saved, data: Dataset, found: Evaluation) -> str:
    names = list(data.classes)
    shown = [(name, share) for name, share in zip(names, found.per_class, strict=True) if share is not None]
    there = len(shown)  # a class without samples has no share and no row
    if there > SHOWN_CLASSES:
        shown = sorted(shown, key=lambda one: one[1])[:SHOWN_CLASSES]
    width = max(len(name) for name, _ in shown)
    rows = "\n".join(f"  {name:<{width}}  {share:7.2%}" for name, share in shown)
    left = f"\n  (the {SHOWN_CLASSES} lowest of {there}; all with --json)" if there > len(shown) else ""
    top5 = "" if found.top5 is None else f"top-5 {found.top5:.2%}, "
    file, epoch = _weights(config, saved)
    average = ", a moving average" if _ema(saved) is not None else ""
    when = f"after epoch {epoch}{average}" if epoch else "adopted"
    return (
        f"{config.model} on {data.folder} ({count(found.samples, 'sample')}): accuracy {found.accuracy:.2%}, {top5}"
        f"worst class {names[found.worst]} {found.per_class[found.worst]:.2%}, cross-entropy {found.loss:.4f}\n"
        f"weights: {file} ({when})\n{rows}{left}"
    )
