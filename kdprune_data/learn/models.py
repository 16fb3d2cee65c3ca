"""The networks: from a name to a module with weights, and from a module to its logits and its embedding.

`resolve` turns a name and a few settings into an `Architecture`, five plain values that a model folder's manifest keeps; `build` turns
those and a seed into a module on the CPU, always with fresh weights and never from the network; `features` runs it and returns what its
last layer read beside what that layer said. A name is a CIFAR ResNet (`resnet20`, learn/resnet.py), a torchvision classifier
(`resnet18`), `timm/NAME`, or the user's own `package.module:function`, which is called with the number of classes and runs only when the
user names it on that very command line: an architecture that came with a shared model can ask for code, but never start it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision import models as zoo

from kdprune_data.errors import FormatError, UsageError, first_line, some, unknown
from kdprune_data.learn.resnet import DEPTHS, NORMS, norm_layer, resnet

CIFAR = {f"resnet{depth}": depth for depth in DEPTHS}
STEMS = ("small", "standard")
SMALL_STEM = ("resnet", "resnext", "wide_resnet", "densenet")
"""torchvision families (how their names begin) whose stem can be made small."""
SMALL_SIZE = 64
"""The largest side in pixels at which `--stem auto` is the small one."""
LEAST_SIZE = {
    "alexnet": 63,
    "convnext": 32,
    "densenet": 29,
    "googlenet": 15,
    "inception_v3": 75,
    "squeezenet1_0": 21,
    "squeezenet1_1": 17,
    "vgg": 32,
}
"""The smallest side in pixels that still leaves a pixel at the end, by how the name begins, with the standard stem."""


@dataclass(frozen=True)
class Architecture:
    """What a network is, apart from its weights.

    `size` is the side in pixels of the square images it is for. Raises UsageError when a value is of the wrong type or out of range.
    """

    name: str
    classes: int
    size: int
    stem: str = "standard"
    norm: str = "batch"

    def __post_init__(self) -> None:
        for key, kind in typing.get_type_hints(type(self)).items():
            if type(getattr(self, key)) is not kind:
                raise UsageError(f"{key} is {getattr(self, key)!r}: expected {kind.__name__}")
        for key in ("classes", "size"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} is {getattr(self, key)}: at least 1")
        for key, known in (("stem", STEMS), ("norm", NORMS)):
            if getattr(self, key) not in known:
                raise unknown(key, getattr(self, key), known)

    def to_dict(self) -> dict[str, str | int]:
        """The five values, as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises FormatError for a key that is missing or unknown, or a value that cannot be."""
        known = [field.name for field in dataclasses.fields(cls)]
        if missing := [key for key in known if key not in values]:
            raise FormatError(f"this architecture has no {some(missing)}")
        try:
            for key in values:
                if key not in known:
                    raise unknown("architecture key", key, known)
            return cls(**values)
        except UsageError as error:
            raise FormatError(str(error)) from error


def names() -> list[str]:
    """Every plain name: the CIFAR ResNets by depth, then torchvision's classifiers by the alphabet."""
    return [*CIFAR, *sorted(zoo.list_models(module=zoo))]


def resolve(name: str, *, classes: int, size: int, stem: str = "auto", norm: str = "batch") -> Architecture:
    """The architecture that a name and its settings mean; `size` is the images' side in pixels.

    `stem="auto"` is the small stem (3x3 convolution of stride 1, no max-pool) for images up to 64 pixels where the torchvision family
    has one, else the standard one. The CIFAR ResNets' only stem is a small one, so either word means it.

    Raises UsageError for a name that nobody knows, a setting that it does not have, or a size that does not fit it. The user's own
    function is not looked for before `build`.
    """
    if stem not in ("auto", *STEMS):
        raise unknown("stem", stem, ("auto", *STEMS))
    if name in CIFAR:
        stem = "standard"
    elif stem == "auto":
        stem = "small" if size <= SMALL_SIZE and _has_small_stem(name) else "standard"
    arch = Architecture(name, classes, size, stem, norm)
    _check(arch)
    return arch


def build(arch: Architecture, *, seed: int, code: str | None = None) -> nn.Module:
    """The module, in train mode, on the CPU, its fresh weights a function of the seed alone; the caller's generator is untouched.

    Inside `torch.device("meta")` it has shapes and no memory, for counting (torchvision's regnets cannot be made so). `code` is the
    one `package.module:function` that the user named on this command line. With the group norm every BatchNorm2d is replaced.

    Raises UsageError as `resolve` does, and when the user's own function was not named or does not give a module.
    """
    _check(arch)
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        # torch.manual_seed would also seed every GPU, which fork_rng(devices=[]) does not give back.
        torch.default_generator.manual_seed(seed)
        if arch.name in CIFAR:
            return resnet(CIFAR[arch.name], arch.classes, arch.norm)
        model = _made(arch, code)
        if arch.stem == "small":
            _make_stem_small(model)
        if arch.norm == "group":
            _replace_batch_norm(model, arch.name)
    return model


def _made(arch: Architecture, code: str | None) -> nn.Module:
    """The module as its maker makes it."""
    if arch.name.startswith("timm/"):
        return _timm(arch)
    if ":" in arch.name:
        return _own(arch.name, arch.classes, code)
    model: nn.Module = zoo.get_model(arch.name, weights=None, num_classes=arch.classes, **_settings(arch))
    return model


def _settings(arch: Architecture) -> dict[str, Any]:
    """What some torchvision makers must be told."""
    if arch.name in ("googlenet", "inception_v3"):
        # The auxiliary heads would make the output a tuple in train mode; without init_weights torchvision warns.
        return {"aux_logits": False, "init_weights": True}
    if arch.name.startswith("vit_"):
        return {"image_size": arch.size}
    if arch.name == "maxvit_t":
        return {"input_size": (arch.size, arch.size)}
    return {}


def _check(arch: Architecture) -> None:
    """Refuse, before anything is made, what cannot be made."""
    if arch.name.startswith("timm/"):
        _check_timm(arch.name)
    elif ":" not in arch.name and arch.name not in names():
        raise unknown("model", arch.name, names())
    if arch.stem == "small" and not _has_small_stem(arch.name):
        families = ", ".join(SMALL_STEM)
        raise UsageError(f"{arch.name} has no small stem: only torchvision's {families} have; give --stem standard")
    if arch.name in names():  # a function of the user's may have a torchvision family's name
        _check_size(arch)


def _has_small_stem(name: str) -> bool:
    return name.startswith(SMALL_STEM) and name not in CIFAR and name in names()


def _check_size(arch: Architecture) -> None:
    """Refuse a size that the network cannot read; without this it would fail deep inside torch, after the data is read."""
    multiple = 1
    if arch.name.startswith("vit_"):
        multiple = int(arch.name.rpartition("_")[2])
    elif arch.name == "maxvit_t":
        multiple = 224  # 32 (five halvings) times 7, the side of its windows
    if arch.size % multiple:
        nearest = -(-arch.size // multiple) * multiple
        raise UsageError(
            f"{arch.name} cannot read images of {arch.size} pixels: the size must be a multiple of {multiple}; give --size {nearest}"
        )
    least = 1 if arch.stem == "small" else max((n for k, n in LEAST_SIZE.items() if arch.name.startswith(k)), default=1)
    if arch.size < least:
        raise UsageError(f"{arch.name} cannot read images of {arch.size} pixels: at least {least}; give --size or another --model")


def _make_stem_small(model: nn.Module) -> None:
    """A first convolution of 3x3 with stride 1, and no max-pool: a 32x32 image reaches the first stage as 32x32, not as 8x8."""
    parent, conv, pool = (model.features, "conv0", "pool0") if hasattr(model, "features") else (model, "conv1", "maxpool")
    assert isinstance(parent, nn.Module)  # what torch's stubs cannot know of an attribute
    old = parent.get_submodule(conv)
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(parent, conv, new)
    setattr(parent, pool, nn.Identity())


def _replace_batch_norm(model: nn.Module, name: str) -> None:
    """GroupNorm in the place of every BatchNorm2d. Raises UsageError where there is none, or one that does more than normalise."""
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    if not places:
        raise UsageError(f"{name} has no batch norm to replace: leave out --norm group")
    for parent, key, child in places:
        if type(child) is not nn.BatchNorm2d:  # timm's own kinds hold the activation as well
            raise UsageError(f"{name} has a {type(child).__name__}, which --norm group cannot replace: leave it out")
        setattr(parent, key, norm_layer("group", child.num_features, child.eps))


def _check_timm(name: str) -> None:
    """Refuse a name that timm's own list does not have: `timm/hf-hub:...` would fetch, and this never does."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UsageError(f"model {name!r} needs timm: pip install 'kdprune-data[timm]'") from error
    wanted = name.removeprefix("timm/")
    if not timm.is_model(wanted):
        near = difflib.get_close_matches(wanted, timm.list_models(), n=3)
        raise UsageError(f"timm has no model {wanted!r}; " + (f"did you mean {some(near)}?" if near else "see timm.list_models()"))


def _timm(arch: Architecture) -> nn.Module:
    timm = importlib.import_module("timm")
    name = arch.name.removeprefix("timm/")
    config = timm.get_pretrained_cfg(name)
    # Its transformers read one size only, which they must be told; its other networks do not know the argument.
    told = {"img_size": arch.size} if config and config.fixed_input_size else {}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=arch.classes, **told)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{arch.name} cannot be made for images of {arch.size} pixels: {first_line(error)}") from error
    return model


def _own(name: str, classes: int, code: str | None) -> nn.Module:
    """What the user's own function returns; only the very name given on the command line is ever imported."""
    if code != name:
        raise UsageError(f"this model is your own function {name!r}: name it with --code {name} to let it run")
    module, _, function = name.partition(":")
    with _here_on_path():
        try:
            model = getattr(importlib.import_module(module), function)(classes)
        except Exception as error:  # it is anybody's code and may raise anything
            raise UsageError(f"your own function {name!r} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"your own function {name!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextlib.contextmanager
def _here_on_path() -> Iterator[None]:
    """The current directory first on sys.path, which an installed command does not have."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported code may have taken it out itself
            sys.path.remove(here)


def head(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer that makes the logits: the last Linear, or where there is none the last convolution, if it is 1x1 (squeezenet).

    Raises UsageError where there is neither.
    """
    modules = list(model.modules())
    if linear := [module for module in modules if isinstance(module, nn.Linear)]:
        return linear[-1]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    if convolutions and convolutions[-1].kernel_size == (1, 1):
        return convolutions[-1]
    raise UsageError(f"{type(model).__name__} has no embedding: it ends in neither a Linear layer nor a 1x1 convolution")


def features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding, float32 of shape (n, d), and the logits, float32 of shape (n, c), of images of shape (n, 3, h, w).

    The embedding is the input of `head(model)`, averaged over the image where that is a convolution. For a Linear head
    `embedding @ head.weight.T + head.bias` are the logits, in eval mode and in train mode (there the embedding is after the dropout).

    Raises UsageError when the model has no such head, or its output is not what a Linear head makes (an average of two heads).
    """
    last = head(model)
    met: list[tuple[Tensor, Tensor]] = []
    hook = last.register_forward_hook(lambda _, inputs, output: met.extend([(inputs[0], output)] if inputs else []))
    try:
        logits = model(images)
    finally:
        hook.remove()
    if not met or not isinstance(logits, Tensor) or not _made_by(last, met[-1][1], logits):
        kind = type(last).__name__
        raise UsageError(f"{type(model).__name__} has no embedding: its output is not what its last {kind} layer makes")
    embedding = met[-1][0].mean(dim=(2, 3)) if isinstance(last, nn.Conv2d) else met[-1][0]
    return embedding.float(), logits.float()


def _made_by(last: nn.Linear | nn.Conv2d, output: Tensor, logits: Tensor) -> bool:
    """Whether the head's output is the logits: itself or its values; of a convolution, which is averaged later, only the channels."""
    if logits.ndim != 2:
        return False
    if isinstance(last, nn.Conv2d):
        return logits.shape == output.shape[:2]
    return output is logits or torch.equal(output.float(), logits.float())
