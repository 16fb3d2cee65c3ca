"""A file of weights as people have it, read without running anything in it: safetensors, or what torch.save made of tensors.

1. What the file is, is told by its first bytes; the suffix only decides how a broken one is called.
2. A checkpoint is unwrapped: the weights are the one dict of tensors in it, under whatever key; of several one must be chosen.
3. Nothing is unpickled freely: `torch.load(weights_only=True)`, which beside tensors may make an `argparse.Namespace`, a bag of settings.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdprune_data.errors import SourceError, UsageError, first_line, some

NESTED = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts put a dict that holds the weights beside other things."""
OURS = "model/"
"""What stands before the names of the weights in our own checkpoints, beside momentum and the like."""
POINTER = b"version https://git-lfs"
HEADER = 8
"""Bytes of the length that a safetensors file begins with."""


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, by name. key: under which they stand in a checkpoint that holds several such dicts.

    Raises SourceError when the file cannot be read without running code in it, or holds none or several sets of weights; UsageError for a
    key that it does not have.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        length = path.stat().st_size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {_reason(error)}") from error
    if start == POINTER:
        raise SourceError(f"{path} cannot be read: it is a pointer of Git LFS, not the file that it stands for; run git lfs pull")
    safe = start[HEADER : HEADER + 1] == b"{" and int.from_bytes(start[:HEADER], "little") <= length - HEADER
    if safe or (path.suffix == ".safetensors" and start[:2] not in (b"PK", b"\x80\x02")):
        if key is not None:
            raise UsageError(f"--weights-key {key} is for checkpoints, and {path} is safetensors, which holds one set: leave it out")
        return _read_safetensors(path)
    return _unwrapped(_read_pickle(path), path, key)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read as safetensors: {_reason(error)}") from error
    ours = {key.removeprefix(OURS): value for key, value in found.items() if key.startswith(OURS)}
    return ours or found


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without the path, which an OSError's own text repeats."""
    return getattr(error, "strerror", None) or first_line(error)


def _read_pickle(path: Path) -> Any:
    """What a file of torch.save holds; code that it asks for is refused and not run."""
    if _is_script(path):
        raise SourceError(f"{path} cannot be read: it is a TorchScript program; save the state_dict() of the model that it was made of")
    try:
        # timm's and torchvision's scripts put their options in. A file, not a path: by a path's suffix torch would tell what it is.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            # torch's own message tells people to switch the safety off.
            why = f"it asks for {asked[1]}, and loading that could run any code; save model.state_dict() alone"
        elif isinstance(error, OSError):
            why = _reason(error)
        else:
            why = "it is damaged, or not a file of weights that torch.save made"
        raise SourceError(f"{path} cannot be read: {why}") from error


def _is_script(path: Path) -> bool:
    """Whether it is a program of torch.jit, of which torch.load would warn."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # what it is, torch.load finds out
        return False


def _unwrapped(found: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """The dict of tensors in a checkpoint."""
    if key is not None:
        if not isinstance(found, dict) or key not in found:
            there = some([k for k in found if isinstance(k, str)]) if isinstance(found, dict) else "no keys"
            raise UsageError(f"--weights-key {key} is not in {path}, which has {there}: give one of these")
        found = found[key]
    for _ in range(4):  # not forever: a pickled dict can contain itself
        if not isinstance(found, dict) or _is_weights(found):
            break
        sets = [name for name, value in found.items() if _is_weights(value)]
        if len(sets) > 1:
            raise SourceError(f"{path} holds {len(sets)} sets of weights ({some(sets)}): choose with --weights-key, or save one alone")
        inner = found[sets[0]] if sets else next((found[name] for name in NESTED if isinstance(found.get(name), dict)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{path} holds no weights but {type(found).__name__}: save model.state_dict()")
    if other := [str(name) for name, value in found.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise SourceError(f"{path} holds more than weights: {some(other)}; save model.state_dict() alone, or under 'state_dict'")
    return found


def _is_weights(found: Any) -> bool:
    """Whether it is a dict of named tensors, numbers such as a best accuracy not being enough."""
    named = isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    return named and any(value.ndim for value in found.values())
