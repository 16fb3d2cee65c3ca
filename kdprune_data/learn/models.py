"""The networks: from a name to a module with weights, and from a module to its logits and its embedding.

`resolve` turns a name and a few settings into an `Architecture`, five plain values that a model folder's manifest keeps; `build` turns
those and a seed into a module on the CPU, always with fresh weights and never from the network; `features` runs it and returns what its
last layer read beside what that layer said. A name is a CIFAR ResNet (`resnet20`, learn/resnet.py), a torchvision classifier
(`resnet18`), `timm/NAME`, or the user's own `package.module:function`, which is called with the number of classes and runs only when the
user names it on that very command line: an architecture that came with a shared model can ask for code, but never start it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models as zoo

from kdprune_data.errors import UsageError, first_line
from kdprune_data.learn.architecture import CIFAR, LEAST_SIZE, Architecture, check, names, resolve
from kdprune_data.learn.heads import features, head
from kdprune_data.learn.resnet import norm_layer, resnet

__all__ = ["CIFAR", "LEAST_SIZE", "Architecture", "build", "features", "head", "names", "resolve"]


def build(arch: Architecture, *, seed: int, code: str | None = None) -> nn.Module:
    """The module, in train mode, on the CPU, its fresh weights a function of the seed alone; the caller's generator is untouched.

    Inside `torch.device("meta")` it has shapes and no memory, for counting (torchvision's regnets cannot be made so). `code` is the
    one `package.module:function` that the user named on this command line. With the group norm every BatchNorm2d is replaced.

    Raises UsageError as `resolve` does, and when the user's own function was not named or does not give a module.
    """
    check(arch)
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
