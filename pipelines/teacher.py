"""`teacher`: train a network on all the data and record how it learned; or adopt one that exists.

1. Open the training data, draw a new view of every sample each epoch, train.
2. Before each update, note what the network says of each sample: a Parquet file an epoch in `dynamics/`; with `--record logits` all of it.
3. Keep the weights of an early epoch (el2n, grand and grand_full are read from it) and of the end.

Writes `teachers/MODEL-sSEED`. With `--weights FILE --epochs 0`, no training: the file's weights are checked and rewritten as safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdprune_pipelines import _estimate, _fit, _preview, _recipes, _teaching, _training, _workspace
from kdprune_pipelines._console import Outcome, say
from kdprune_pipelines._models import WEIGHTS, plain
from kdprune_pipelines._teaching import Setup
from kdprune_pipelines._tensorboard import Board
from kdprune_pipelines._training import TrainingConfig
from kdprune_pipelines._weighing import weighing

from kdprune_data.config import option
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.formats import dynamics
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import Manifest, sha256_file

if TYPE_CHECKING:
    from torch import nn

    from kdprune_data.learn.stream import Images
    from kdprune_data.learn.views import Normalisation


@dataclass(frozen=True)
class TeacherConfig(TrainingConfig):
    """Settings of `teacher`."""

    data: Path | None = option(None, help="The data set to train on; default data/train.")
    model: str = option("resnet20", help="resnet8|14|20|32|44|56|110, a torchvision classifier, timm/NAME, or package.module:function.")
    record: str | None = option(None, help="Also record every sample's logits in every epoch, 2 bytes each: for tdds.", choices=("logits",))
    weights: Path | None = option(None, help="Adopt these weights (.safetensors, or .pth with weights only); with --epochs 0.")
    weights_key: str | None = option(None, help="Under which key the weights stand in a checkpoint that holds several sets of them.")
    mean: tuple[float, ...] = option(
        (), help="Mean of the inputs, in [0, 1], as the weights were trained; default the data's.", least=0, most=1, values="RED GREEN BLUE"
    )
    std: tuple[float, ...] = option((), help="Their standard deviation, likewise; default the data's.", least=0, values="RED GREEN BLUE")


def run(config: TeacherConfig) -> Outcome:
    """Train or adopt a teacher. Raises UsageError, MismatchError, SourceError and ExistsError."""
    config = _recipes.applied("teacher", config)
    if (config.weights is None) != (config.epochs > 0 or config.steps is not None):
        raise UsageError("--epochs 0 adopts a teacher: it goes with --weights FILE, and --weights with it")
    if config.weights is not None and config.record is not None:
        raise UsageError("--record notes what a network says while it trains, and --weights trains none: leave out --record")
    if config.weights is not None and config.init is not None:
        raise UsageError("--init starts a training and --weights adopts its end: give one of the two")
    if config.weights is not None and not config.weights.is_file():
        raise UsageError(f"--weights {config.weights} does not exist: give a .safetensors or .pth file")
    if config.weights is None and config.weights_key is not None:
        raise UsageError(f"--weights-key {config.weights_key} chooses in the file of --weights, and none is given: leave it out")
    data = Dataset.open(_workspace.data(config.data, "train", option="--data"))
    val = _workspace.optional_data(config.val, "val")
    setup = _setup(config, data)
    if not config.weights:
        weighing(data, "ignore")  # which says so: students alone are weighed
    folder, name = _workspace.place(config.out, config.name, _workspace.TEACHERS, f"{plain(config.model)}-s{config.seed}")
    init = _training.init_file(config.init, folder)
    settings = _training.setting(
        None if config.weights else setup.recipe,
        init,
        architecture=setup.architecture,
        normalisation=setup.normalisation,
        policy=setup.policy,
        precision=None if config.weights else _training.precision(setup.device),
    )
    keep = _keep(config, setup)
    settings |= {"role": "teacher", "keep_epochs": keep, "weights": sha256_file(config.weights) if config.weights else None}
    settings |= {"record": config.record} if config.record else {}
    settings |= {"weights_key": config.weights_key} if config.weights_key else {}
    place = _preview.Place(folder, Identity("model", name, settings, _training.inputs(data, val=val)), config.overwrite)
    # Before the folder is touched: it may be about to replace what these weights lie in.
    net = _begun(config, _teaching.network(setup, config.model), init)
    if config.dry_run:
        return _estimate_only(config, setup, net, place, val)
    board = None if config.tensorboard is None else Board(config.tensorboard, name, folder)
    with Build.begin(folder, place.identity, overwrite=config.overwrite) as build:
        if build.done is not None:
            say("already done")
            return _fit.outcome(folder, build.done)
        made = _adopt(build, setup, net, val) if config.weights else _train(config, build, setup, net, val=val, board=board)
    return _fit.outcome(folder, made)


def _setup(config: TeacherConfig, data: Dataset) -> Setup:
    from kdprune_data.learn import models, views
    from kdprune_data.learn.inference import choose_device
    from kdprune_data.learn.stream import Images

    rows = data.usable()
    if (data.labels[rows] < 0).any():
        raise UsageError(f"{data.folder} has {int((data.labels[rows] < 0).sum()):,} samples without a label: a teacher learns from labels")
    device = choose_device(config.device)
    images = Images(data, keep=config.in_memory, device=device)
    # A seed of its own: the views cached for a student of the same --seed would be the very crops that the teacher has learned from.
    seed = _teaching.view_seed(config.seed)
    policy = views.policy_for(data.sizes[rows], data.classes, size=config.size, flip=config.flip, seed=seed, crops=config.crops())
    architecture = models.resolve(config.model, classes=len(data.classes), size=policy.size, stem=config.stem, norm=config.norm)
    return Setup(data, images, architecture, _normalisation(config, images), policy, config.to_recipe(), device, config.jobs)


def _begun(config: TeacherConfig, net: nn.Module, init: Path | None) -> nn.Module:
    """The network with the weights that it begins, or ends, with."""
    if config.weights is None:
        return _training.begin_from(net, init)
    from kdprune_data.learn.weights import load_weights

    load_weights(net, config.weights, key=config.weights_key)
    return net


def _normalisation(config: TeacherConfig, images: Images) -> Normalisation:
    from kdprune_data.learn.views import Normalisation

    if not config.mean and not config.std:
        found = _training.normalisation(images, config.jobs)
        if config.weights is not None:
            mean, std = (" ".join(f"{value:.4f}" for value in each) for each in (found.mean, found.std))
            say(f"inputs are normalised as the data are: give the weights' own, if others (now --mean {mean} --std {std})")
        return found
    if not config.mean or not config.std or min(config.std) <= 0:
        raise UsageError("--mean and --std go together, each as red, green and blue, --std above 0")
    (mr, mg, mb), (sr, sg, sb) = config.mean, config.std
    return Normalisation((mr, mg, mb), (sr, sg, sb))


def _keep(config: TeacherConfig, setup: Setup) -> list[int]:
    return [] if config.weights else _training.kept_epochs(config.keep_epochs, setup.plan().epochs)


def _train(config: TeacherConfig, build: Build, setup: Setup, net: nn.Module, *, val: Path | None, board: Board | None) -> Manifest:
    from kdprune_data.learn.dynamics import Recorder

    validation = _fit.validation(val, setup.data, setup.images.keep)
    recorder = Recorder(len(setup.data), setup.device, len(setup.data.classes) if config.record else None)
    job = _teaching.job(setup, net, keep=_keep(config, setup), val=validation, recorder=recorder)
    recorded = _teaching.recording(job, setup, build, recorder, logits=config.record is not None)
    return _teaching.train(replace(recorded, board=board), setup, build)


def _adopt(build: Build, setup: Setup, net: nn.Module, val: Path | None) -> Manifest:
    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.weights import weights

    validation = _fit.validation(val, setup.data, setup.images.keep)
    network = Predictor(net, setup.normalisation, setup.policy.size, setup.device)
    loss, accuracy = validation.measure(network) if validation else (None, None)
    if loss is not None and not math.isfinite(loss):
        raise SourceError(
            "what the adopted weights say of val are no finite numbers: they are broken, or made for other inputs (--mean --std)"
        )
    row = {"epoch": 0, "steps": 0, "samples": 0, "lr": None, "train_loss": None, "train_accuracy": None}
    _fit.save(build, WEIGHTS, weights(net))
    _fit.write_metrics(build, [row | {"val_loss": loss, "val_accuracy": accuracy}])
    parameters = sum(p.numel() for p in net.parameters())
    counts = {"samples": len(setup.data.usable()), "steps": 0, "epochs": 0, "parameters": parameters}
    return build.seal(counts=counts, classes=setup.data.classes, content=setup.data.manifest.content)


def _estimate_only(config: TeacherConfig, setup: Setup, net: nn.Module, place: _preview.Place, val: Path | None) -> Outcome:
    """What `run` would make."""
    validation = _fit.validation(val, setup.data, setup.images.keep)
    samples = len(setup.data.usable())
    if not config.weights:
        from kdprune_data.learn.dynamics import Recorder

        each = dynamics.ROW_BYTES + (2 * len(setup.data.classes) if config.record else 0)
        recorder = Recorder(len(setup.data), setup.device, len(setup.data.classes) if config.record else None)
        job = _teaching.job(setup, net, keep=_keep(config, setup), val=validation, recorder=recorder)
        return _preview.estimate(place, job, validation, per_epoch_bytes=samples * each)
    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.weights import weights

    state = _estimate.look(place.folder, place.identity, overwrite=place.overwrite)
    network = Predictor(net, setup.normalisation, setup.policy.size, setup.device)
    seconds = 0.0 if validation is None or state == "finished" else _preview.validation_seconds(network, validation)
    counts = {"sample": samples, "parameter": sum(p.numel() for p in net.parameters())}
    return _estimate.Estimate(place.folder, state, counts, sum(v.nbytes for v in weights(net).values()), seconds).outcome()
