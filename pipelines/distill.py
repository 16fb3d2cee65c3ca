"""`distill`: train a student from pruned shards, with the cached soft labels of its views.

1. Find the subset, and the logit cache that holds its samples; join them by id, refusing what does not belong together.
2. Each epoch replays one cached view of every sample, boxes and logits as stored; the loss mixes label and teacher by alpha, and weighs
   samples as the subset does.
3. Without a cache (or with `--logits none`): labels only, views drawn by the same rules.

Writes `students/SUBSET--MODEL-aALPHA-sSEED`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines import _fit, _preview, _recheck, _recipes, _training, _workspace
from kdprune_pipelines._console import Outcome, say
from kdprune_pipelines._fit import Validation
from kdprune_pipelines._models import plain
from kdprune_pipelines._tensorboard import Board
from kdprune_pipelines._training import TrainingConfig
from kdprune_pipelines._weighing import weighing

from kdprune_data import order
from kdprune_data.config import option
from kdprune_data.errors import MismatchError, UsageError
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.stream import Batch, Images, ViewSource


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    """Settings of `distill`."""

    subset: Path | None = option(None, help="The subset (or data set) to train on; default the only one in subsets/.", argument=True)
    logits: str | None = option(None, help="The logit cache's folder, or none for labels only; default the only one that fits in logits/.")
    teacher: Path | None = option(None, help="Use the cache of this teacher, and refuse any other.")
    model: str = option("resnet20", help="resnet8|14|20|32|44|56|110, a torchvision classifier, timm/NAME, or package.module:function.")
    alpha: str = option(
        "auto", help="Weight of the teacher, 0 to 1; auto: 0.9 up to a tenth kept, linear in log10 to 0.5 at all (provisional)."
    )
    temperature: float = option(4.0, help="Temperature of both softmaxes.", least=0.01, most=1000)
    views: int | None = option(None, help="Use the first N views in turn; default all cached, or a new one every epoch.", least=1)
    view_seed: int | None = option(None, help="Seed of the views; default the cache's, or --seed.", least=0)
    sample_weights: str = option("use", help="The subset's weights of its samples, where its method gives any.", choices=("use", "ignore"))
    check_labels: int = option(32, help="Ask the teacher, where it is in teachers/, for so many soft labels again first; 0: none.", least=0)


@dataclass(frozen=True)
class Lesson:
    """What the student learns from: views and soft labels, and how much they count; the weights of the data's rows (None: all alike),
    and what is done with them."""

    views: ViewSource
    cited: dict[str, Any]
    alpha: float
    weights: NDArray[np.float32] | None = None
    sample_weights: str = "use"

    @property
    def settings(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        weighed = {} if self.weights is None else {"sample_weights": self.sample_weights}
        return {"alpha": self.alpha, "views": self.cited} | weighed


def run(config: DistillConfig) -> Outcome:
    """Train a student. Raises UsageError, MismatchError, FormatError and ExistsError."""
    config = _recipes.applied("distill", config)
    if config.epochs == 0 and config.steps is None:
        raise UsageError("--epochs 0 trains nothing: give at least 1")
    data = Dataset.open(_workspace.one(config.subset, _workspace.SUBSETS, "SUBSET"))
    val = _workspace.optional_data(config.val, "val")
    found = _find_logits(config, data)
    cache = None if found is None else LogitCache.open(found)
    from kdprune_data.learn import models  # which imports torch: after what a mistyped folder is told
    from kdprune_data.learn.inference import Predictor, choose_device
    from kdprune_data.learn.stream import Images

    device = choose_device(config.device)
    lesson = _weighed(config, data, _labels_only(config, data) if cache is None else _lesson(config, data, cache))
    images = Images(data)
    policy = lesson.views.policy
    architecture = models.resolve(config.model, classes=len(data.classes), size=policy.size, stem=config.stem, norm=config.norm)
    derived = f"{data.manifest.name}--{plain(config.model)}-a{lesson.alpha:g}-s{config.seed}"
    folder, name = _workspace.place(config.out, config.name, _workspace.STUDENTS, derived)
    init = _training.init_file(config.init, folder)
    normalisation = _training.normalisation(images, config.jobs)
    settings = _training.setting(
        config.to_recipe(),
        init,
        architecture=architecture,
        normalisation=normalisation,
        policy=policy,
        precision=_training.precision(device),
    )
    settings |= lesson.settings | {"role": "student", "temperature": config.temperature, "keep_epochs": sorted(config.keep_epochs)}
    # Of the cache only what was read, in `views`, and its teacher: views that are added later make no other student.
    inputs = _training.inputs(data, *([] if cache is None else cache.teachers), val=val)
    place = _preview.Place(folder, Identity("model", name, settings, inputs), config.overwrite)
    # Before the folder is touched: it may be about to replace what these weights lie in.
    net = _training.begin_from(models.build(architecture, seed=order.derived(config.seed, "init/student"), code=config.model), init)
    student = Predictor(net, normalisation, policy.size, device)
    if config.dry_run:
        validation = _fit.validation(val, data)
        return _preview.estimate(place, _job(config, lesson, images, student, validation), validation)
    board = None if config.tensorboard is None else Board(config.tensorboard, name, folder)
    with Build.begin(folder, place.identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            say("already done")
            return _fit.outcome(folder, build.done)
        if cache is not None and lesson.alpha:
            _recheck.at_start(cache, lesson.views, images, sample=config.check_labels, device=device, given=config.teacher)
        job = replace(_job(config, lesson, images, student, _fit.validation(val, data)), board=board)
        _fit.announce(config.model, job.training)
        made = build.seal(counts=_fit.train(job, build), classes=data.classes, content=data.manifest.content)
    return _fit.outcome(folder, made)


def _labels_only(config: DistillConfig, data: Dataset) -> Lesson:
    """Views drawn from the policy, and no soft labels."""
    from kdprune_data.learn import views
    from kdprune_data.learn.stream import DrawnViews

    alpha = 0.0 if config.alpha == "auto" else _number(config.alpha)
    if alpha:
        raise UsageError(f"--alpha {config.alpha} weighs a teacher, and there is no logit cache: run `kdprune-data cache`, or --alpha 0")
    _check_labels(data, alpha)
    seed = config.seed if config.view_seed is None else config.view_seed
    policy = views.policy_for(data.sizes[data.usable()], data.classes, size=config.size, flip=config.flip, seed=seed, crops=config.crops())
    return Lesson(DrawnViews(data, policy, config.views), {"from": "drawn", "count": config.views}, alpha)


def _lesson(config: DistillConfig, data: Dataset, cache: LogitCache) -> Lesson:
    """Cached views with soft labels."""
    from kdprune_data.learn.losses import auto_alpha
    from kdprune_data.learn.stream import cached_views

    _check_asked(config, data, cache)
    source = cached_views(data, cache, config.views)
    kept = _workspace.root_fraction(data.manifest.as_input("data"))
    alpha = auto_alpha(kept) if config.alpha == "auto" else _number(config.alpha)
    _check_labels(data, alpha)
    provisional = " (auto, provisional)" if config.alpha == "auto" else ""
    say(f"alpha {alpha:g}{provisional}, temperature {config.temperature:g}, kept fraction {kept:g}, {source.count} cached views")
    files = [{"path": f.path, "sha256": f.sha256} for f in cache.manifest.files if _holds(f.path, source.count)]
    return Lesson(source, {"from": "cache", "count": source.count, "files": files}, alpha)


def _weighed(config: DistillConfig, data: Dataset, lesson: Lesson) -> Lesson:
    """The lesson with the weights of the samples, where they differ; says so."""
    return replace(lesson, weights=weighing(data, config.sample_weights), sample_weights=config.sample_weights)


def _holds(path: str, count: int) -> bool:
    """Whether a file of a cache is read for its first `count` views."""
    return not path.startswith("views-") or int(path[6:10]) < count


def _find_logits(config: DistillConfig, data: Dataset) -> Path | None:
    if config.logits == "none":
        if config.teacher is not None:
            raise UsageError("--teacher chooses a logit cache and --logits none takes none: give one of the two")
        return None
    if config.logits is not None:
        return Path(config.logits)
    contents = _workspace.contents(data.manifest.as_input("data"))
    asked = None if config.teacher is None else Manifest.load(config.teacher, kinds=("model",)).digest

    def fits(cache: Manifest) -> bool:
        return cache.content in contents and (asked is None or [asked] == [i["digest"] for i in cache.inputs if i["role"] == "teacher"])

    if not _workspace.candidates(_workspace.LOGITS, fits):
        if config.teacher is not None:
            raise MismatchError(
                f"no cache in {_workspace.LOGITS}/ holds what {config.teacher} says of {data.folder}: "
                f"run `kdprune-data cache {data.folder} --teacher {config.teacher}`"
            )
        say(f"no logit cache for {data.folder} in logits/: labels only (run `kdprune-data cache` to distil)")
        return None
    return _workspace.one(None, _workspace.LOGITS, "--logits", fits)


def _number(alpha: str) -> float:
    try:
        value = float(alpha)
    except ValueError:
        raise UsageError(f"--alpha {alpha!r} is not a number: give auto, or a weight from 0 to 1") from None
    if not 0 <= value <= 1:
        raise UsageError(f"--alpha {alpha} is out of range: from 0 (labels only) to 1 (teacher only)")
    return value


def _check_labels(data: Dataset, alpha: float) -> None:
    unlabelled = int((data.labels[data.usable()] < 0).sum())
    if unlabelled and alpha < 1:
        raise UsageError(f"{data.folder} has {unlabelled:,} samples without a label: train with a logit cache and --alpha 1")


def _check_asked(config: DistillConfig, data: Dataset, cache: LogitCache) -> None:
    """Raise MismatchError when the cache is not of the teacher or of the views that were asked for."""
    from kdprune_data.learn import views
    from kdprune_data.learn.stream import check_policy

    if config.teacher is not None:
        asked = Manifest.load(config.teacher, kinds=("model",))
        if [asked.digest] != [one["digest"] for one in cache.teachers]:
            named = " and ".join(f"teacher {one['name']} ({one['digest'][:12]})" for one in cache.teachers)
            whose = named or "somebody else's teacher"
            raise MismatchError(
                f"{cache.folder} holds the logits of {whose}, not of "
                f"{config.teacher} ({asked.digest[:12]}): use its own cache, or run cache with that teacher"
            )
    held = cache.temperatures
    if held is not None and not held[0] <= config.temperature <= held[1]:
        at = f"temperature {held[0]:g} alone" if held[0] == held[1] else f"temperatures from {held[0]:g} to {held[1]:g}"
        raise MismatchError(
            f"{cache.folder} holds at {at}, --temperature is {config.temperature:g}: train at one it holds at, or cache with "
            f"--temperature {config.temperature:g}"
        )
    there, crops = views.Policy.from_dict(cache.policy), config.crops()
    flip = there.flip if config.flip == "auto" else config.flip == "on"
    seed = there.seed if config.view_seed is None else config.view_seed
    asked_policy = replace(there, size=config.size or there.size, flip=flip, seed=seed)
    if crops.pad is not None:
        asked_policy = replace(asked_policy, kind="pad-crop", pad=crops.pad)
    if crops.resized:
        asked_policy = replace(asked_policy, kind="resized-crop", scale=crops.scale or there.scale, ratio=crops.ratio or there.ratio)
    check_policy(cache, asked_policy)


def _job(config: DistillConfig, lesson: Lesson, images: Images, student: Predictor, val: Validation | None) -> _fit.Job:
    """The training: what it learns from, and by which loss."""
    from kdprune_data.learn.loop import Hooks, Training
    from kdprune_data.learn.losses import Mix, distillation
    from kdprune_data.learn.stream import Feed

    weights = lesson.weights if lesson.sample_weights == "use" else None
    feed = Feed(images, lesson.views, config.batch, config.seed, config.jobs, weights)
    training = Training(student.net, feed, config.to_recipe(), normalisation=student.normalisation, device=student.device)
    epochs = training.plan.validated(len(images.data.usable()), None if val is None else val.samples)
    keep = _training.kept_epochs(config.keep_epochs, training.plan.epochs) if config.keep_epochs else []
    mix = Mix(lesson.alpha, config.temperature, config.label_smoothing)

    def loss_of(logits: Tensor, batch: Batch) -> Tensor:
        return distillation(logits, batch.logits, batch.labels, mix=mix, weights=batch.weights)

    return _fit.Job(training, keep, loss_of, _fit.validating(Hooks(validated=epochs, noted=epochs), training, val))
