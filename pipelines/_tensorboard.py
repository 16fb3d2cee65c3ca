"""`--tensorboard DIR`: the metrics of a run for TensorBoard, beside metrics.jsonl, which has them all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdprune_data.errors import UsageError

SCALARS = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


class Board:
    """Scalars of one run over its steps, in a folder of the run's name; `made`: the folder of the model that is trained.

    Raises UsageError when that cannot be, or would be a part of the model.
    """

    def __init__(self, folder: Path, name: str, made: Path) -> None:
        if (folder / name).resolve().is_relative_to(made.resolve()):
            raise UsageError(f"--tensorboard {folder}: {folder / name} is where {made} is to be written; give another folder")
        try:
            from torch.utils import tensorboard
        except ImportError:
            raise UsageError("--tensorboard needs tensorboard: pip install 'kdprune-data[tensorboard]'") from None
        if file := next((p for p in (folder / name, *(folder / name).parents) if p.exists() and not p.is_dir()), None):
            raise UsageError(f"--tensorboard {folder}: {file} is a file, not a folder; give another one")
        self._tensorboard = tensorboard
        self._folder = folder / name
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """One row of metrics, shown in place of what a run that was killed had written from here on."""
        if self._writer is None:
            self._writer = self._tensorboard.SummaryWriter(str(self._folder), purge_step=row["steps"])
        for key in SCALARS:
            if row[key] is not None:
                self._writer.add_scalar(key.replace("_", "/"), row[key], row["steps"])
        self._writer.flush()

    def close(self) -> None:
        """Write no more."""
        if self._writer is not None:
            self._writer.close()
