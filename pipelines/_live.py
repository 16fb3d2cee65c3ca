"""`distill --live`: a teacher that is asked while its student trains, of the very pixels that the student is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdprune_pipelines._models import Saved, open_model

from kdprune_data.errors import MismatchError
from kdprune_data.formats.dataset import Dataset

if TYPE_CHECKING:
    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.live import Teacher


def opened(folder: Path, data: Dataset) -> Saved:
    """A finished model. Raises MismatchError when it knows other classes than the data, UsageError and FormatError as `open_model` does."""
    saved = open_model(folder)
    data.same_classes(saved.manifest.classes, str(folder))
    return saved


def check_size(live: Saved, size: int, cache: Path | None) -> None:
    """Raise MismatchError when views of a side of so many pixels, those of a cache where there is one, are not what the teacher reads."""
    reads = live.architecture.size
    if size == reads:
        return
    whose, instead = (f"the views of {cache}", "--logits none") if cache else (f"--size {size}", "leave out --size")
    raise MismatchError(f"{live.folder} reads {reads} pixels, and {whose} would show it {size}: use a teacher of that size, or {instead}")


def at_work(live: Saved, student: Predictor, *, code: Sequence[str]) -> Teacher:
    """The teacher beside its student, on the same device, with a normalisation of its own. Raises as `Saved.load` does."""
    from kdprune_data.learn import inference
    from kdprune_data.learn.live import Teacher

    return Teacher(inference.Predictor(live.load(code=code), live.normalisation, student.size, student.device))
