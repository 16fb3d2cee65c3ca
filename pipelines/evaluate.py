"""`evaluate`: how a teacher or student does on the test set: accuracy, each class, the worst class, cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdprune_pipelines import _workspace
from kdprune_pipelines._console import Outcome, bar, count
from kdprune_pipelines._models import open_model

from kdprune_data.config import Config, option
from kdprune_data.formats.dataset import Dataset

SHOWN_CLASSES = 20


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Settings of `evaluate`."""

    model: Path = option(help="The folder of a teacher or student.", argument=True)
    data: Path | None = option(None, help="The data set to evaluate on; default data/test.")
    batch: int = option(256, help="Samples in a batch.", least=1)
    code: str | None = option(None, help="package.module:function, when the model is your own function.")
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))


def run(config: EvaluateConfig) -> Outcome:
    """Evaluate a model. Raises UsageError and MismatchError."""
    from kdprune_data.learn.inference import Predictor, choose_device, evaluate
    from kdprune_data.learn.stream import Images

    saved = open_model(config.model)
    data = Dataset.open(_workspace.data(config.data, "test", option="--data"))
    data.same_classes(saved.manifest.classes, str(saved.folder))
    predictor = Predictor(saved.load(code=config.code), saved.normalisation, saved.architecture.size, choose_device(config.device))
    with bar("evaluate", total=len(data)) as progress:
        found = evaluate(predictor, Images(data), batch=config.batch, tick=progress.update)
    names = list(data.classes)
    per_class = dict(zip(names, found.per_class, strict=True))
    facts = {
        "model": str(config.model),
        "data": str(data.folder),
        "content": data.manifest.content,
        "samples": found.samples,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "worst_class": names[found.worst],
        "worst_class_accuracy": found.per_class[found.worst],
        "per_class": per_class,
    }
    shown = [(name, share) for name, share in per_class.items() if share is not None]
    there = len(shown)  # a class without samples has no share and no row
    if there > SHOWN_CLASSES:
        shown = sorted(shown, key=lambda one: one[1])[:SHOWN_CLASSES]
    width = max(len(name) for name, _ in shown)
    rows = "\n".join(f"  {name:<{width}}  {share:7.2%}" for name, share in shown)
    left = f"\n  (the {SHOWN_CLASSES} lowest of {there}; all with --json)" if there > len(shown) else ""
    text = (
        f"{config.model} on {data.folder} ({count(found.samples, 'sample')}): accuracy {found.accuracy:.2%}, "
        f"worst class {names[found.worst]} {found.per_class[found.worst]:.2%}, cross-entropy {found.loss:.4f}\n{rows}{left}"
    )
    return Outcome(None, facts, text)
