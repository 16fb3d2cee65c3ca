"""What `teacher` and `distill` share before a step is taken: their options, what of them stands in manifests, and first weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines import _workspace
from kdprune_pipelines._console import bar, say
from kdprune_pipelines._models import WEIGHTS

from kdprune_data.config import Config, option
from kdprune_data.errors import UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import PARTIAL, Manifest, sha256_file

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.models import Architecture
    from kdprune_data.learn.policy import Crops, Policy
    from kdprune_data.learn.recipe import Recipe
    from kdprune_data.learn.stream import Images
    from kdprune_data.learn.views import Normalisation

LAST = "last.ckpt"


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Settings of everything that trains."""

    recipe: str | None = option(None, help="Take the options not given here from this recipe: a packaged one's name, or a TOML file.")
    val: Path | None = option(None, help="The data set to validate on; default data/val, where there is one.")
    epochs: int = option(30, help="Passes over the data.", least=0)
    steps: int | None = option(None, help="Train for exactly this many steps instead of --epochs.", least=1)
    batch: int = option(128, help="Samples in a batch.", least=1)
    lr: float = option(0.1, help="Peak learning rate of SGD with Nesterov momentum.", least=0)
    momentum: float = option(0.9, help="Momentum of SGD; 0: none.", least=0, most=0.9999)
    weight_decay: float = option(5e-4, help="Weight decay; not on norms and biases.", least=0)
    schedule: str = option(
        "cosine",
        help="The learning rate after the warm-up: a cosine to 0, a line to 0, or no change.",
        choices=("cosine", "linear", "constant"),
    )
    warmup_epochs: int = option(1, help="Epochs of linear warm-up; at most half of training is.", least=0)
    label_smoothing: float = option(0.0, help="Share of the label that is spread over all classes.", least=0, most=0.999)
    clip: float | None = option(None, help="Scale gradients down to this norm, of all of them together; default never.", least=1e-6)
    ema: float | None = option(
        None,
        help="Learn the moving average of the weights, with this decay a step (0.999); default the last weights.",
        least=0,
        most=0.999999,
    )
    init: Path | None = option(None, help="Start from the weights of this model folder or file; default fresh ones.")
    compile: bool = option(False, help="Run the network through torch.compile: slower to start, faster after, other rounding.")
    size: int | None = option(None, help="Side of the input in pixels; default the images' own up to 64, else 224.", least=1)
    flip: str = option("auto", help="Mirror views left to right; auto: not for digits.", choices=("auto", "on", "off"))
    pad: int | None = option(None, help="Pixels by which crops that are not resized may reach outside; default size/8.", least=0)
    scale: tuple[float, ...] = option((), help="Share of the area that a resized crop takes; default 0.25 1.", values="LOW HIGH")
    ratio: tuple[float, ...] = option((), help="Width over height of a resized crop; default 0.75 1.3333.", values="LOW HIGH")
    decode: str = option(
        "exact", help="scaled: decode JPEGs no larger than resized crops need, quicker for large photographs.", choices=("exact", "scaled")
    )
    stem: str = option(
        "auto", help="small: 3x3 convolution and no max-pool; auto: small up to 64 pixels.", choices=("auto", "small", "standard")
    )
    norm: str = option("batch", help="Normalisation layers.", choices=("batch", "group"))
    seed: int = option(0, help="Seed of weights, order and views.", least=0, most=2**31 - 1)
    keep_epochs: tuple[int, ...] = option((), help="Epochs whose weights are kept; default 10 % of training, and the end.", least=1)
    device: str = option("auto", help="Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = option(2, help="Threads that decode images.", least=1, short="j")
    in_memory: str = option(
        "auto",
        help="Keep decoded images in memory (a GPU's too); auto: where they take half of what is free.",
        choices=("auto", "on", "off"),
    )
    tensorboard: Path | None = option(None, help="Also write the metrics for TensorBoard, in a folder of the run's name in here.")
    name: str | None = option(None, help="Name in its usual place.", check=_workspace.plain_name)
    out: Path | None = option(None, help="Exact folder to write.")
    overwrite: bool = option(False, help="Replace what stands in the folder.")
    dry_run: bool = option(False, help="Touch nothing: say what would be made, how large, and how long it would take.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_memory == "on" and self.decode != "exact":
            raise UsageError(f"--in-memory on keeps whole images, and --decode {self.decode} decodes them anew for every view: give one")

    def to_recipe(self) -> Recipe:
        """As the training loop takes it."""
        from kdprune_data.learn.recipe import Recipe

        return Recipe(
            self.epochs,
            self.steps,
            self.batch,
            self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            seed=self.seed,
            schedule=self.schedule,
            label_smoothing=self.label_smoothing,
            clip=self.clip,
            ema=self.ema,
            compile=self.compile,
        )

    def crops(self) -> Crops:
        """What is asked of the views' crops. Raises UsageError for ranges that are none."""
        from kdprune_data.learn.policy import Crops

        return Crops.of(self.pad, self.scale, self.ratio, self.decode)


def kept_epochs(asked: Sequence[int], epochs: int) -> list[int]:
    """The epochs to keep: those asked for, or a tenth of training (at least the first); always the last."""
    chosen = set(asked) or {max(1, (epochs + 5) // 10)}
    late = sorted(e for e in chosen if e > epochs)
    if late:
        raise UsageError(f"--keep-epochs {late[0]} is after the end: training has {epochs} epochs")
    return sorted(chosen | {epochs})


def precision(device: torch.device) -> str:
    """In which numbers a network is trained there. It stands in the config: a run does not start in one and go on in another."""
    return "bf16" if device.type == "cuda" else "float32"


def inputs(data: Dataset, *others: Mapping[str, Any], val: Path | None) -> list[Mapping[str, Any]]:
    """What a model is made from. The validation data too: they change no weight, but metrics.jsonl, which is part of the digest."""
    validated = [] if val is None else [Manifest.load(val, kinds=("dataset", "subset")).as_input("val")]
    return [data.manifest.as_input("data"), *others, *validated]


def normalisation(images: Images, jobs: int) -> Normalisation:
    """That of the data: with progress, for large images take a while."""
    from kdprune_data.learn.stream import NORMALISATION_SAMPLES, normalisation_of

    with bar("normalisation", total=min(len(images.data.usable()), NORMALISATION_SAMPLES)) as progress:
        return normalisation_of(images, threads=jobs, tick=progress.update)


def setting(
    recipe: Recipe | None,
    init: Path | None,
    *,
    architecture: Architecture,
    normalisation: Normalisation,
    policy: Policy,
    precision: str | None,
) -> dict[str, Any]:
    """The part of a model's config that every model has. init: the file of first weights; recipe, precision: None where nothing is
    trained."""
    return {
        "precision": precision,
        "architecture": architecture.to_dict(),
        "normalisation": normalisation.to_dict(),
        "policy": policy.to_dict(),
        "recipe": None if recipe is None else recipe.to_dict(),
        "init": None if init is None else sha256_file(init),
    }


def init_file(given: Path | None, folder: Path) -> Path | None:
    """The file of weights to start from: the one given, or that of a model's folder or of a checkpoint's.

    Raises UsageError when there is none, or it lies in the folder that is to be written.
    """
    if given is None:
        return None
    if (given / PARTIAL / LAST).is_dir():
        raise UsageError(f"--init {given} is not finished: give {given / PARTIAL / LAST} to start from its last state")
    if (given / "state.json").is_file():
        from kdprune_data.learn.checkpoint import state_file

        file = state_file(given)
    elif given.is_dir():
        Manifest.load(given, kinds=("model",))
        file = given / WEIGHTS
    else:
        file = given
    if not file.is_file():
        raise UsageError(f"--init {given} does not exist: give the folder of a model, or a file of weights")
    if file.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--init {given} lies in {folder}, which is to be written: give another --name, or move the weights")
    return file


def begin_from(net: nn.Module, file: Path | None) -> nn.Module:
    """The network with the first weights of a file, where there is one; of other classes all but its last layer's, which is said.

    Raises SourceError and MismatchError.
    """
    if file is not None:
        from kdprune_data.learn.weights import load_weights

        if (classes := load_weights(net, file, new_head=True)) is not None:
            say(f"{file} tells {classes:,} classes apart: its last layer is left out, and a fresh one is trained")
    return net
