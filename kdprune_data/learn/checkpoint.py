"""What an unfinished training goes on from: `last.ckpt/`, in which `state.json` names the newest file of tensors.

The file is written whole and has its name before `state.json` names it, and the old one goes only after that: whenever a run is killed,
one whole state is there. `docs/formats.md`, "Model", states both files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from kdprune_data.errors import FormatError

if TYPE_CHECKING:
    from kdprune_data.learn.hooks import Partial
    from kdprune_data.learn.loop import Training

NOTE = "state.json"
PARTIAL = "partial/"
KEYS = ("run", "epoch", "within", "seen", "file", "sha256", "metrics")


class Checkpoint:
    """The state of one training in a folder of its own. `run` names what is trained, with which settings: another's state is refused."""

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder = folder
        self.run = run

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.folder / NOTE).is_file()

    @property
    def epochs(self) -> int:
        """The epochs that the saved state has behind it; 0 where none can be told."""
        try:
            return int(json.loads((self.folder / NOTE).read_text(encoding="utf-8"))["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def forget(self) -> None:
        """Begin again: remove the saved state."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, training: Training, partial: Partial | None = None) -> None:
        """Save the state between two steps; in the middle of an epoch also what was gathered of it. Raises OSError that names the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = training.state()
        if training.within and partial is not None:
            tensors |= {PARTIAL + k: v.detach().cpu().contiguous() for k, v in partial.state().items()}
        name = f"state-{training.step:09d}.safetensors"
        data = to_bytes(tensors)
        _write(self.folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        facts = (self.run, training.epoch, training.within, training.seen, name, digest, training.metrics)
        _write(self.folder / NOTE, json.dumps(dict(zip(KEYS, facts, strict=True))).encode())
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, training: Training, partial: Partial | None = None) -> bool:
        """Continue from the saved state; False where there is none. Raises FormatError when it is not whole, or of another training."""
        if not self.exists:
            return False
        note, state = self._read()
        if note["run"] != self.run:
            raise self._refused("is of a training with other settings")
        try:
            training.restore(state)
            training.epoch, training.within, training.seen = (int(note[k]) for k in ("epoch", "within", "seen"))
            training.metrics = list(note["metrics"])
            if training.within and partial is not None:
                partial.restore({k.removeprefix(PARTIAL): v for k, v in state.items() if k.startswith(PARTIAL)})
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._refused(f"does not fit this training ({type(error).__name__})") from error
        plan, done = training.plan, training.epoch * training.plan.per_epoch + training.within
        whole = training.within == 0 and training.epoch == plan.epochs  # whose last epoch may be a short one
        if not (training.epoch >= 0 and 0 <= training.within < plan.per_epoch and (done < plan.steps or whole)):
            raise self._refused("is of a longer training")
        return True

    def _read(self) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
        """The note and the tensors it names, checked to be the very bytes that were written."""
        try:
            note = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
            file = self.folder / Path(note["file"]).name
            whole = set(note) == set(KEYS) and _sha256(file) == note["sha256"]
            state = load_file(file) if whole else {}
        except Exception as error:  # json, safetensors and the file system each have their own
            raise self._refused(f"cannot be read ({type(error).__name__})") from None
        if not whole:
            raise self._refused("is damaged: its bytes are not those that were written")
        return note, state

    def _refused(self, why: str) -> FormatError:
        return FormatError(f"the saved state {self.folder} {why}: delete that folder to train from the beginning")


def state_file(folder: Path) -> Path:
    """The newest file of tensors in a `last.ckpt/`. Raises FormatError when there is none, or it is not the one that was written."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        file = folder / Path(note["file"]).name
        whole = _sha256(file) == note["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder / NOTE} cannot be read ({type(error).__name__}): give a file of weights") from None
    if not whole:
        raise FormatError(f"{file} is damaged, its bytes are not those that were written: give other weights")
    return file


def _write(path: Path, data: bytes) -> None:
    """Write beside the final name, then rename. Raises OSError that names the file: where there is no room, the system's own does not."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_bytes(data)
    except OSError as error:
        beside.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    beside.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
