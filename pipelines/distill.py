"""`distill`: train a student from pruned shards, with the cached soft labels of its views.

1. Find the subset, and the logit cache that holds its samples; join them by id, refusing what does not belong together.
2. Each epoch replays one cached view of every sample, boxes and logits as stored; the loss mixes label and teacher by alpha, and weighs
   samples as the subset does.
3. With `--live`, the teacher itself is asked, of the very views: those of the cache, or where there is none views drawn by the same rules.
4. Without either (or with `--logits none`): labels only, views drawn likewise.

Writes `students/SUBSET--MODEL-aALPHA-sSEED`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines import _fit, _live, _preview, _recheck, _recipes, _soft, _training, _workspace
from kdprune_pipelines._console import Outcome, count, say
from kdprune_pipelines._fit import Validation
from kdprune_pipelines._models import Saved, plain
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
    from kdprune_data.learn.live import Teacher
    from kdprune_data.learn.soft import Soft
    from kdprune_data.learn.stream import Batch, Images, ViewSource


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    """Settings of `distill`."""

    subset: Path | None = option(None, help="The subset (or data set) to train on; default the only one in subsets/.", argument=True)
    logits: str | None = option(None, help="The logit cache's folder, or none; default the only one that fits in logits/.")
    teacher: Path | None = option(None, help="Use the cache of this teacher, and refuse any other.")
    live: Path | None = option(None, help="Ask this teacher while training, of the cache's views or of drawn ones; default cached logits.")
    code: tuple[str, ...] = option(
        (),
        help="package.module:function, when a teacher that is asked, by --live or --check-labels, is your own; may be given several times.",
    )
    model: str = option("resnet20", help="resnet8|14|20|32|44|56|110, a torchvision classifier, timm/NAME, or package.module:function.")
    alpha: str = option(
        "auto", help="Weight of the teacher, 0 to 1; auto: 0.9 up to a tenth kept, linear in log10 to 0.5 at all (provisional)."
    )
    loss: str = option("kl", help="The loss against the teacher's logits, one of those below.", choices=_soft.NAMES)
    set: tuple[str, ...] = option((), help="A setting of the loss; may be given several times.")
    temperature: float = option(_soft.TEMPERATURE, help="Temperature of both softmaxes.", least=0.01, most=1000)
    views: int | None = option(None, help="Use the first N views in turn; default all cached, or a new one every epoch.", least=1)
    view_seed: int | None = option(None, help="Seed of the views; default the cache's, or --seed.", least=0)
    sample_weights: str = option("use", help="The subset's weights of its samples, where its method gives any.", choices=("use", "ignore"))
    check_labels: int = option(32, help="Ask the teacher, where it is in teachers/, for so many soft labels again first; 0: none.", least=0)


@dataclass(frozen=True)
class Lesson:
    """What the student learns from: views and soft labels, by which loss, and how much they count; where soft labels come from: teachers as
    inputs' descriptions, and the one that is asked live; the weights of the data's rows (None: all alike), and what is done with them."""

    views: ViewSource
    cited: dict[str, Any]
    alpha: float
    soft: Soft
    temperature: float
    teachers: Sequence[Mapping[str, Any]] = ()
    live: Saved | None = None
    weights: NDArray[np.float32] | None = None
    sample_weights: str = "use"

    @property
    def settings(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        weighed = {} if self.weights is None else {"sample_weights": self.sample_weights}
        temperature = self.temperature if self.soft.kind.tempered else None
        return {"alpha": self.alpha, "temperature": temperature, "views": self.cited} | self.soft.own() | weighed


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
    lesson = _weighed(config, data, _lesson(config, data, cache))
    images = Images(data, keep=config.in_memory, device=device)
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
    settings |= lesson.settings | {"role": "student", "keep_epochs": sorted(config.keep_epochs)}
    # Of the cache only what was read, in `views`, and its teacher: views that are added later make no other student.
    inputs = _training.inputs(data, *lesson.teachers, val=val)
    place = _preview.Place(folder, Identity("model", name, settings, inputs), config.overwrite)
    # Before the folder is touched: it may be about to replace what these weights lie in.
    net = _training.begin_from(models.build(architecture, seed=order.derived(config.seed, "init/student"), code=config.model), init)
    student = Predictor(net, normalisation, policy.size, device)
    teacher = None if lesson.live is None else _live.at_work(lesson.live, student, code=config.code)
    if config.dry_run:
        validation = _fit.validation(val, data, config.in_memory)
        return _preview.estimate(place, _job(config, lesson, images, student, validation, teacher), validation)
    board = None if config.tensorboard is None else Board(config.tensorboard, name, folder)
    with Build.begin(folder, place.identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            say("already done")
            return _fit.outcome(folder, build.done)
        if cache is not None and lesson.alpha:
            at_hand = _recheck.AtHand(config.teacher, config.code)
            _recheck.at_start(cache, lesson.views, images, sample=config.check_labels, device=device, at_hand=at_hand)
        job = replace(_job(config, lesson, images, student, _fit.validation(val, data, config.in_memory), teacher), board=board)
        _fit.announce(config.model, job.training)
        made = build.seal(counts=_fit.train(job, build), classes=data.classes, content=data.manifest.content)
    return _fit.outcome(folder, made)


def _lesson(config: DistillConfig, data: Dataset, cache: LogitCache | None) -> Lesson:
    """Views with soft labels from a cache, from a live teacher, or without any."""
    from kdprune_data.learn.stream import BoxesOnly

    live = None if config.live is None else _live.opened(config.live, data)
    views, cited = _drawn(config, data, live) if cache is None else _replayed(config, data, cache)
    alpha = _alpha(config, data, taught=cache is not None or live is not None)
    soft = _soft.chosen(config.loss, config.set, data=data, alpha=alpha, temperature=config.temperature)
    lesson = Lesson(views, cited, alpha, soft, config.temperature)
    kept = f"kept fraction {_workspace.root_fraction(data.manifest.as_input('data')):g}"
    how = f"alpha {alpha:g}{' (auto, provisional)' if config.alpha == 'auto' else ''}, {_soft.told(soft, config.temperature)}, {kept}"
    shown = "drawn views" if cache is None else count(cited["count"], "cached view")
    if live is not None:
        _live.check_size(live, views.policy.size, None if cache is None else cache.folder)
        say(f"{how}, {config.live} is asked of {shown}")
        boxes = views if cache is None else BoxesOnly(views)
        return replace(lesson, views=boxes, cited=cited | {"from": "live"}, teachers=[live.manifest.as_input("teacher")], live=live)
    if cache is not None:
        if alpha:
            _soft.check_held(soft, config.temperature, cache)
        say(f"{how}, {shown}")
        return replace(lesson, teachers=cache.teachers)
    return lesson


def _alpha(config: DistillConfig, data: Dataset, *, taught: bool) -> float:
    """The weight of the teacher. Raises UsageError for one that weighs none, or where labels that count are missing."""
    from kdprune_data.learn.losses import auto_alpha

    if config.alpha == "auto":
        alpha = auto_alpha(_workspace.root_fraction(data.manifest.as_input("data"))) if taught else 0.0
    else:
        alpha = _soft.number(config.alpha)
    if alpha and not taught:
        raise UsageError(f"--alpha {config.alpha} weighs a teacher, and there is no logit cache: run `kdprune-data cache`, or --alpha 0")
    if config.live is not None and alpha == 0:
        raise UsageError(f"--live {config.live} asks a teacher, and alpha 0 weighs none: leave it out")
    _soft.check_labels(data, alpha)
    return alpha


def _drawn(config: DistillConfig, data: Dataset, live: Saved | None) -> tuple[ViewSource, dict[str, Any]]:
    """Views drawn from the policy: at the size of a live teacher, where there is one."""
    from kdprune_data.learn import views
    from kdprune_data.learn.stream import DrawnViews

    seed = config.seed if config.view_seed is None else config.view_seed
    size = config.size if config.size is not None or live is None else live.architecture.size
    policy = views.policy_for(data.sizes[data.usable()], data.classes, size=size, flip=config.flip, seed=seed, crops=config.crops())
    return DrawnViews(data, policy, config.views), {"from": "drawn", "count": config.views}


def _replayed(config: DistillConfig, data: Dataset, cache: LogitCache) -> tuple[ViewSource, dict[str, Any]]:
    """The views of a cache, with its soft labels."""
    from kdprune_data.learn.stream import cached_views

    _check_asked(config, data, cache)
    source = cached_views(data, cache, config.views)
    files = [{"path": f.path, "sha256": f.sha256} for f in cache.manifest.files if _holds(f.path, source.count)]
    return source, {"from": "cache", "count": source.count, "files": files}


def _weighed(config: DistillConfig, data: Dataset, lesson: Lesson) -> Lesson:
    """The lesson with the weights of the samples, where they differ; says so."""
    return replace(lesson, weights=weighing(data, config.sample_weights), sample_weights=config.sample_weights)


def _holds(path: str, count: int) -> bool:
    """Whether a file of a cache is read for its first `count` views."""
    return not path.startswith("views-") or int(path[6:10]) < count


def _find_logits(config: DistillConfig, data: Dataset) -> Path | None:
    """The cache: the one given, or the only one that fits; None for none. Raises UsageError and MismatchError."""
    asked = _asked_teacher(config)
    if config.logits == "none":
        if config.teacher is not None:
            raise UsageError("--teacher chooses a logit cache and --logits none takes none: give one of the two")
        return None
    if config.logits is not None:
        return Path(config.logits)
    contents = _workspace.contents(data.manifest.as_input("data"))

    def fits(cache: Manifest) -> bool:
        return cache.content in contents and (asked is None or [asked] == [i["digest"] for i in cache.inputs if i["role"] == "teacher"])

    if _workspace.candidates(_workspace.LOGITS, fits):
        return _workspace.one(None, _workspace.LOGITS, "--logits", fits)
    if config.teacher is not None:
        raise MismatchError(
            f"no cache in {_workspace.LOGITS}/ holds what {config.teacher} says of {data.folder}: "
            f"run `kdprune-data cache {data.folder} --teacher {config.teacher}`"
        )
    if config.live is not None:
        say(f"no logit cache of {config.live} for {data.folder} in logits/: its views are drawn")
    else:
        say(f"no logit cache for {data.folder} in logits/: labels only (run `kdprune-data cache` to distil)")
    return None


def _asked_teacher(config: DistillConfig) -> str | None:
    """The digest of the teacher whose cache is asked for, by --teacher or --live. Raises UsageError when they name two."""
    named = [Manifest.load(folder, kinds=("model",)).digest for folder in (config.teacher, config.live) if folder is not None]
    if len(set(named)) > 1:
        raise UsageError(f"--teacher {config.teacher} and --live {config.live} are two teachers: leave out --teacher, or name the same one")
    return named[0] if named else None


def _check_asked(config: DistillConfig, data: Dataset, cache: LogitCache) -> None:
    """Raise MismatchError when the cache is not of the teacher or of the views that were asked for."""
    from kdprune_data.learn import views
    from kdprune_data.learn.stream import check_policy

    if config.teacher is not None:  # a live teacher is asked itself: whose logits lie beside the boxes is nothing to it
        asked = Manifest.load(config.teacher, kinds=("model",))
        if [asked.digest] != [one["digest"] for one in cache.teachers]:
            named = " and ".join(f"teacher {one['name']} ({one['digest'][:12]})" for one in cache.teachers)
            whose = named or "somebody else's teacher"
            raise MismatchError(
                f"{cache.folder} holds the logits of {whose}, not of "
                f"{config.teacher} ({asked.digest[:12]}): use its own cache, or run cache with that teacher"
            )
    there, crops = views.Policy.from_dict(cache.policy), config.crops()
    flip = there.flip if config.flip == "auto" else config.flip == "on"
    seed = there.seed if config.view_seed is None else config.view_seed
    asked_policy = replace(there, size=config.size or there.size, flip=flip, seed=seed)
    if crops.pad is not None:
        asked_policy = replace(asked_policy, kind="pad-crop", pad=crops.pad)
    if crops.resized:
        asked_policy = replace(asked_policy, kind="resized-crop", scale=crops.scale or there.scale, ratio=crops.ratio or there.ratio)
    if crops.decode != "exact":
        asked_policy = replace(asked_policy, decoder=views.DECODERS[crops.decode])
    check_policy(cache, asked_policy)


def _job(
    config: DistillConfig, lesson: Lesson, images: Images, student: Predictor, val: Validation | None, teacher: Teacher | None
) -> _fit.Job:
    """The training: what it learns from, by which loss, and which teacher is asked."""
    from kdprune_data.learn.loop import Hooks, Training
    from kdprune_data.learn.losses import Mix, distillation
    from kdprune_data.learn.stream import Feed

    weights = lesson.weights if lesson.sample_weights == "use" else None
    feed = Feed(images, lesson.views, config.batch, config.seed, config.jobs, weights)
    training = Training(student.net, feed, config.to_recipe(), normalisation=student.normalisation, device=student.device, teacher=teacher)
    epochs = training.plan.validated(len(images.data.usable()), None if val is None else val.samples)
    keep = _training.kept_epochs(config.keep_epochs, training.plan.epochs) if config.keep_epochs else []
    mix = Mix(lesson.alpha, config.temperature, config.label_smoothing, lesson.soft)

    def loss_of(logits: Tensor, batch: Batch) -> Tensor:
        return distillation(logits, batch.logits, batch.labels, mix=mix, weights=batch.weights)

    return _fit.Job(training, keep, loss_of, _fit.validating(Hooks(validated=epochs, noted=epochs), training, val))
