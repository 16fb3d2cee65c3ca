"""Which network: an `Architecture`, five plain values that a manifest keeps, from a name and a few settings, checked before it is made."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torchvision import models as zoo

from kdprune_data.errors import FormatError, UsageError, some, unknown
from kdprune_data.learn.resnet import DEPTHS, NORMS

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
    check(arch)
    return arch


def check(arch: Architecture) -> None:
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
