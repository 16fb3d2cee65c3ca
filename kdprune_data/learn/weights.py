"""Weights of a model, and from a file into one: safetensors, or what `torch.load(weights_only=True)` reads. Nothing is ever unpickled
freely."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdprune_data.errors import MismatchError, SourceError, UsageError, first_line, some
from kdprune_data.learn.heads import head

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts put the weights in a checkpoint."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
OURS = "model/"
"""What stands before the names of the weights in our own checkpoints, beside momentum and the like."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers on the CPU, as they are saved."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a file's weights into the model, all of them or none.

    `.safetensors`, a state of an unfinished training of ours among them, or anything else that `torch.load(weights_only=True)` reads: a
    state dict, bare or inside a checkpoint, with or without the prefix of DataParallel or torch.compile. Values are cast to the model's
    own types.

    Raises SourceError when the file cannot be read without running code in it or holds numbers that are not finite, MismatchError when
    the weights are another model's.
    """
    path = Path(path)
    found = _without_prefix(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path), model)
    own = model.state_dict()
    # Files from before torch 0.4.1 lack these counters, which matter only where momentum is None.
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    extra = [key for key in found if key not in own]
    wrong = [
        f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in found.items()
        if key in own and value.shape != own[key].shape
    ]
    if not missing and not extra and (classes := _other_classes(model, found)) is not None:
        raise MismatchError(f"{path} tells {classes[0]:,} classes apart and this model {classes[1]:,}: use weights of the same classes")
    if faults := [f"{what} {some(keys)}" for what, keys in (("missing", missing), ("unexpected", extra), ("shape", wrong)) if keys]:
        raise MismatchError(f"{path} does not fit this model: {'; '.join(faults)}; check --model and --norm")
    if broken := [key for key, value in found.items() if not bool(torch.isfinite(value).all())]:
        raise SourceError(f"{path} holds numbers that are not finite ({some(broken)}): these weights are broken; use others")
    # Into the model's own dict, for its versions: torchvision's mnasnet refuses a plain one.
    own.update(found)
    model.load_state_dict(own)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read as safetensors: {_reason(error)}") from error
    ours = {key.removeprefix(OURS): value for key, value in found.items() if key.startswith(OURS)}
    return ours or found


def _other_classes(model: nn.Module, found: dict[str, Tensor]) -> tuple[int, int] | None:
    """How many classes the weights and the model have, where the last layer is all that does not fit."""
    own = model.state_dict()
    wrong = [key for key, value in found.items() if value.shape != own[key].shape]
    layers = {key.rpartition(".")[0] for key in wrong}
    if len(layers) != 1 or any(found[key].shape[1:] != own[key].shape[1:] for key in wrong):
        return None
    try:
        last = head(model)
    except UsageError:
        return None
    if model.get_submodule(layers.pop()) is not last:
        return None
    return len(found[wrong[0]]), len(own[wrong[0]])


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without the path, which an OSError's own text repeats."""
    return getattr(error, "strerror", None) or first_line(error)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save; code that the file asks for is refused and not run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            # torch's own message tells people to switch the safety off.
            why = f"it asks for {asked[1]}, and loading that could run any code; save model.state_dict() alone"
        elif isinstance(error, OSError):
            why = _reason(error)
        else:
            why = "it is damaged, or not a file of weights that torch.save made"
        raise SourceError(f"{path} cannot be read: {why}") from error
    return _unwrapped(found, path)


def _unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    """The dict of tensors in a checkpoint."""
    for _ in range(4):  # not forever: a pickled dict can contain itself
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), None) if isinstance(found, dict) else None
        if inner is None:
            break
        found = inner
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{path} holds no weights but {type(found).__name__}: save model.state_dict()")
    if other := [str(key) for key, value in found.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        raise SourceError(f"{path} holds more than weights: {some(other)}; save model.state_dict() alone, or under 'state_dict'")
    return found


def _without_prefix(found: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same tensors without the prefixes that all their names have and the model's do not."""
    own = model.state_dict()
    while found:
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in found) and not all(k.startswith(p) for k in own)), None)
        if prefix is None:
            break
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found
