"""Weights of a model, and from a file into one, all of them or none; where they do not fit, what to do is said.

Names are forgiven what wraps a network puts before them (DataParallel, torch.compile, Lightning), what older torchvision called the same
layers, and the auxiliary heads that it trains with; a shape never is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from kdprune_data.errors import MismatchError, SourceError, UsageError, some
from kdprune_data.learn import weight_files
from kdprune_data.learn.heads import head

FORMERLY = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
"""What layers were called when torchvision saved the files that it still gives away for its densenets and vision transformers."""
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Heads of inception_v3 and googlenet that take part in training alone; the networks here are made without."""
AVERAGED = "n_averaged"
"""A counter that torch's own average of weights saves beside them."""
OTHER_CLASSES = "use weights of the same classes, or train on from these, with a new last layer: --init in the place of --weights"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers on the CPU, as they are saved."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}


def load_weights(model: nn.Module, path: str | Path, *, key: str | None = None, new_head: bool = False) -> int | None:
    """Put a file's weights into the model, all of them or none.

    `.safetensors`, a state of an unfinished training of ours among them, or anything else that `torch.load(weights_only=True)` reads: a
    state dict, bare or inside a checkpoint (key: under which, where it holds several), with or without what wrappers put before its names.
    Values are cast to the model's own types. new_head: where only the number of classes differs, the last layer is left as it is.

    Returns the classes of the file where the last layer was left, else None. Raises SourceError when the file cannot be read without
    running code in it or holds numbers that are not finite, MismatchError when the weights are another model's.
    """
    path = Path(path)
    own = model.state_dict()
    found = _named_alike(weight_files.read(path, key), own, model)
    # Files from before torch 0.4.1 lack these counters, which matter only where momentum is None.
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    extra = [name for name in found if name not in own]
    wrong = [name for name, value in found.items() if name in own and value.shape != own[name].shape]
    classes = _other_classes(model, found, wrong)
    left = None
    if classes is not None and not missing and not extra and {name.rpartition(".")[0] for name in wrong} == {_head_name(model)}:
        if not new_head:
            raise MismatchError(f"{path} {_told(classes)}: {OTHER_CLASSES}")
        found, wrong, left = {name: value for name, value in found.items() if name not in wrong}, [], classes[0]
    if missing or extra or wrong:
        shapes = [f"{name} {tuple(found[name].shape)} for {tuple(own[name].shape)}" for name in wrong]
        faults = [f"{what} {some(names)}" for what, names in (("missing", missing), ("unexpected", extra), ("shape", shapes)) if names]
        hints = list(_hints(model, found, wrong))
        hints += [] if classes is None else [f"it {_told(classes)}"]
        raise MismatchError(f"{path} does not fit this model: {'; '.join(faults)}; {'; '.join(hints) or 'check --model and --norm'}")
    if broken := [name for name, value in found.items() if not bool(torch.isfinite(value).all())]:
        raise SourceError(f"{path} holds numbers that are not finite ({some(broken)}): these weights are broken; use others")
    # Into the model's own dict, for its versions: torchvision's mnasnet refuses a plain one.
    own.update(found)
    model.load_state_dict(own)
    return left


def _told(classes: tuple[int, int]) -> str:
    return f"tells {classes[0]:,} classes apart and this model {classes[1]:,}"


def _named_alike(found: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that the model has for them, as far as that can be told."""
    if AVERAGED not in own:
        found = {name: value for name, value in found.items() if name != AVERAGED}
    ways = [found]
    while found and len({name.partition(".")[0] for name in found}) == 1 and all("." in name for name in found):
        found = {name.partition(".")[2]: value for name, value in found.items()}
        ways.append(found)
    found = max((_as_now(one, own) for one in ways), key=lambda one: len(one.keys() & own.keys()))  # the first of equals
    if getattr(model, "aux_logits", None) is False:
        found = {name: value for name, value in found.items() if name in own or not name.startswith(AUXILIARY)}
    return found


def _as_now(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those that the model calls otherwise than torchvision did under the model's name."""

    def now(name: str) -> str:
        ways = (pattern.sub(new, name) for pattern, new in FORMERLY)
        return name if name in own else next((way for way in ways if way in own), name)

    return {now(name): value for name, value in found.items()}


def _head_name(model: nn.Module) -> str | None:
    """The name of the last layer; None where there is none."""
    try:
        last = head(model)
    except UsageError:
        return None
    names: list[str] = [name for name, module in model.named_modules() if module is last]
    return names[0]


def _other_classes(model: nn.Module, found: Mapping[str, Tensor], wrong: list[str]) -> tuple[int, int] | None:
    """How many classes the weights and the model have, where their last layers differ in that alone."""
    own, last = model.state_dict(), _head_name(model)
    names = [name for name in wrong if name.rpartition(".")[0] == last]
    if not names or any(found[name].shape[1:] != own[name].shape[1:] for name in names):
        return None
    return len(found[names[0]]), len(own[names[0]])


def _hints(model: nn.Module, found: Mapping[str, Tensor], wrong: list[str]) -> Iterator[str]:
    """What makes shapes fit, where that can be told."""
    own = model.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    for before in sorted({name.removesuffix(needed[0]) for name in found if needed and name.endswith(f".{needed[0]}")}):
        if all(before + name in found for name in needed):
            yield f"all of it stands behind {before!r}, beside other things: save that part's state_dict() alone"
    for name in wrong:
        theirs, ours = found[name].shape, own[name].shape
        if theirs[:2] == ours[:2] == (ours[0], 3) and {theirs[2:], ours[2:]} == {(3, 3), (7, 7)}:
            yield f"these weights have the other first layer: give --stem {'standard' if theirs[2] == 7 else 'small'}"
        if "pos_embed" in name and theirs[-1] == ours[-1]:
            size = _patch(model) * isqrt(theirs[-2])
            yield f"these weights are for images of another size: give --size{f' {size}' if size else ''}"


def _patch(model: nn.Module) -> int:
    """The side in pixels of the patches that a vision transformer sees; 0 where it is none."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return int(first.stride[0]) if first is not None and tuple(first.stride) == tuple(first.kernel_size) else 0
