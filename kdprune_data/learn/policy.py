"""What the views of a data set look like: a `Policy`, whose values stand in manifests, and the choice of one for given images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import FormatError, UsageError
from kdprune_data.images import DECODER, SCALED_DECODER

VERSION = 1
KINDS = ("pad-crop", "every-crop", "resized-crop", "identity", "given")
PADDED = ("pad-crop", "every-crop")
UINT8, FLOAT32 = KERNELS = ("bilinear, antialiased, uint8", "bilinear, antialiased, float32")
"""How boxes are resized: as new policies are, and as those of before."""
DECODERS = {"exact": DECODER, "scaled": SCALED_DECODER}
"""How images are decoded, by what it is called on the command line."""
SMALL = 64
LARGE_SIZE = 224
SCALE = (0.25, 1.0)
RATIO = (0.75, 4 / 3)


@dataclass(frozen=True)
class Policy:
    """What views look like. `size`: the side of a rendered view, in pixels; `pad`: how far a padded crop may reach outside, in pixels;
    `scale` and `ratio`: bounds of a resized-crop's share of the area and of its width over height. `every-crop` shows each distinct padded
    crop once, `identity` the whole image (its largest centred square), `given` what a cache of somebody else's logits says. `resize`: one
    of KERNELS; `decoder`: one of those in DECODERS."""

    kind: str
    size: int
    flip: bool
    seed: int
    pad: int = 0
    scale: tuple[float, float] = SCALE
    ratio: tuple[float, float] = RATIO
    resize: str = UINT8
    decoder: str = DECODER

    @property
    def kernel(self) -> str:
        """How boxes of another size than `size` are resized; none where there are no such boxes."""
        return "none" if self.kind in PADDED else self.resize

    @property
    def scaled(self) -> bool:
        """Whether images are decoded no larger than their boxes need."""
        return self.decoder == SCALED_DECODER

    def to_dict(self) -> dict[str, Any]:
        """As it stands in manifests, decoder and resize kernel included."""
        always = {"version": VERSION, "kind": self.kind, "size": self.size, "flip": self.flip, "seed": self.seed}
        always |= {"decoder": self.decoder}
        if self.kind in PADDED:
            return always | {"pad": self.pad, "kernel": self.kernel}
        if self.kind == "resized-crop":
            always |= {"scale": list(self.scale), "ratio": list(self.ratio)}
        return always | {"kernel": self.kernel}

    @property
    def views(self) -> int | None:
        """How many views there are; None where there is no end of them."""
        if self.kind == "every-crop":
            return (2 * self.pad + 1) ** 2 * (2 if self.flip else 1)
        return 1 if self.kind == "identity" else None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Policy:
        """From a manifest. Raises FormatError for a policy that this version would render otherwise."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k not in ("version", "kernel")}
        if stored.get("kernel") in KERNELS:
            plain["resize"] = stored["kernel"]
        try:
            policy = cls(**plain)
        except TypeError:
            policy = None
        known = policy is not None and policy.kind in KINDS and policy.decoder in DECODERS.values()
        if policy is None or not known or policy.to_dict() != dict(stored):
            raise FormatError(f"view policy {dict(stored)} is not one that this version renders: use the version that made it")
        return policy


@dataclass(frozen=True)
class Crops:
    """What somebody asked of the crops; None leaves the choice to the data. `pad` in pixels; `scale` and `ratio`: (low, high); `decode`:
    one of DECODERS."""

    pad: int | None = None
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    decode: str = "exact"

    @classmethod
    def of(cls, pad: int | None, scale: Sequence[float], ratio: Sequence[float], decode: str = "exact") -> Crops:
        """From options, where an empty sequence is none given. Raises UsageError for bounds that are none."""
        return cls(pad, _bounds("--scale", scale, most=1.0), _bounds("--ratio", ratio), decode)

    @property
    def resized(self) -> bool:
        """Whether resized crops are asked for."""
        return self.scale is not None or self.ratio is not None


def _bounds(option: str, given: Sequence[float], most: float = float("inf")) -> tuple[float, float] | None:
    if not given:
        return None
    if len(given) != 2 or not 0 < given[0] <= given[1] <= most:
        limit = f" and at most {most:g}" if most < float("inf") else ""
        raise UsageError(f"{option} {' '.join(f'{v:g}' for v in given)} is no range: give LOW HIGH, both above 0{limit}, LOW first")
    return given[0], given[1]


def own_size(sizes: NDArray[np.int32]) -> int | None:
    """The side of the images when all are squares of one size of at most 64 pixels, else None. sizes: shape (n, 2)."""
    first = int(sizes[0, 0])
    return first if first <= SMALL and bool((sizes == first).all()) else None


def flips(classes: Sequence[str]) -> bool:
    """Whether mirroring keeps the class: never for digits (so neither for SVHN)."""
    return not (classes and all(name.strip().isdigit() and len(name.strip()) == 1 for name in classes))


def policy_for(
    sizes: NDArray[np.int32], classes: Sequence[str], *, size: int | None, flip: str, seed: int, crops: Crops | None = None
) -> Policy:
    """The policy of a data set: padded crops where all images are squares of the asked size, else random resized crops.

    sizes: int32 of shape (n, 2); size: side in pixels, None for the images' own or 224; flip: `auto`, `on` or `off`; crops: what was
    asked for, a scale or ratio meaning resized crops whatever the images are.

    Raises UsageError for a `pad` where crops are resized, or one that is not smaller than the side.
    """
    crops = crops or Crops()
    side = size or own_size(sizes) or LARGE_SIZE
    mirror = flips(classes) if flip == "auto" else flip == "on"
    if bool((sizes == side).all()) and not crops.resized:
        pad = side // 8 if crops.pad is None else crops.pad
        if pad >= side:
            raise UsageError(f"--pad {pad} is too large for views of {side} pixels: at most {side - 1}")
        if crops.decode != "exact":
            raise UsageError(f"--decode {crops.decode} is for crops that are resized, and these are cut as they are: leave it out")
        return Policy("pad-crop", side, mirror, seed, pad=pad)
    if crops.pad is not None:
        why = "--scale and --ratio ask for resized crops" if crops.resized else f"not all images are squares of {side} pixels"
        raise UsageError(f"--pad {crops.pad} is for crops that are not resized, and {why}: leave it out")
    decoder = DECODERS[crops.decode]
    return Policy("resized-crop", side, mirror, seed, scale=crops.scale or SCALE, ratio=crops.ratio or RATIO, decoder=decoder)


def every_crop(policy: Policy) -> Policy:
    """The policy of all distinct crops of a pad-crop policy. Raises UsageError for another kind."""
    if policy.kind != "pad-crop":
        raise UsageError("--views all is for padded crops of small images of one size: resized crops have no end, give a number")
    return replace(policy, kind="every-crop")


def identity(policy: Policy) -> Policy:
    """The policy of the one view that is the image itself, at the size of another policy."""
    return Policy("identity", policy.size, flip=False, seed=0, decoder=policy.decoder)
