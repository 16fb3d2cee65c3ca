"""Who says what of which views: a teacher at work on a data set, or an ensemble of several. `cache` writes down what they say.

Each sample is decoded once for all views that are asked for; views are rendered in batches that do not cross a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, product
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from kdprune_pipelines._models import Saved
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import MismatchError, SourceError, some
from kdprune_data.formats.dataset import Dataset

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.stream import Images
    from kdprune_data.learn.views import Geometry, Picture, Pixels, Policy

DECODED_AT_ONCE = 32
RENDERED_BYTES = 64_000_000
"""Views that wait to be shown to the teacher take about this much memory, however many there are."""


class Source(Protocol):
    """Whoever says the logits."""

    @property
    def data(self) -> Dataset:
        """The samples."""
        ...

    @property
    def policy(self) -> Policy:
        """What the views look like."""
        ...

    @property
    def batch(self) -> int:
        """Samples at once."""
        ...

    def boxes(self, rows: NDArray[np.int64], view: int) -> Geometry:
        """The boxes of one view of some rows of the data."""
        ...

    def said(
        self, rows: NDArray[np.int64], views: Sequence[int], batches: Iterable[NDArray[np.int64]]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """What is said of every view of each batch of places in `rows`, view after view: (the view's place in `views`, float32 of shape
        (n, c)).

        Raises SourceError for a logit that is no finite number.
        """
        ...

    def metadata(self) -> dict[str, Any]:
        """What every view file says of its source: `teacher`, `normalisation`."""
        ...


@dataclass(frozen=True)
class Teachers:
    """One teacher, or several of which the mean of the probabilities at `temperature` is taken. `jobs`: threads that decode and render."""

    images: Images
    policy: Policy
    saved: Sequence[Saved]
    nets: Sequence[nn.Module]
    device: torch.device
    temperature: float | None
    batch: int
    jobs: int

    @property
    def data(self) -> Dataset:
        """See `Source`."""
        return self.images.data

    def boxes(self, rows: NDArray[np.int64], view: int) -> Geometry:
        """See `Source`."""
        from kdprune_data.learn import views

        return views.geometry(self.policy, self.data.uids[rows], self.data.sizes[rows], view)

    def said(
        self, rows: NDArray[np.int64], views: Sequence[int], batches: Iterable[NDArray[np.int64]]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See `Source`."""
        from kdprune_data.learn.inference import evaluating

        boxes = [self.boxes(rows, view) for view in views]
        with ExitStack() as stack:
            nets = [stack.enter_context(evaluating(net, self.device)) for net in self.nets]
            for at, images in self._decoded(rows, batches):
                for n, pixels in enumerate(self._rendered(images, [box.take(at) for box in boxes])):
                    yield n, self._finite(self._logits(nets, pixels), rows[at])

    def metadata(self) -> dict[str, Any]:
        """See `Source`."""
        from kdprune_data.formats.logits import normalisation_of

        each = normalisation_of([one.normalisation.to_dict() for one in self.saved])
        return {"teacher": " ".join(one.manifest.digest for one in self.saved), "normalisation": each}

    def _logits(self, nets: Sequence[nn.Module], pixels: torch.Tensor) -> torch.Tensor:
        from kdprune_data.learn.inference import together

        on_device = pixels.to(self.device)
        each: list[torch.Tensor] = [net(one.normalisation.apply(on_device)).float() for net, one in zip(nets, self.saved, strict=True)]
        return together(each, self.temperature).cpu()

    def _finite(self, logits: torch.Tensor, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        bad = self.data.ids[rows[~torch.isfinite(logits).all(1).numpy()]]
        if len(bad):
            raise SourceError(f"the teacher's logits of {some(bad)} are not finite numbers: its weights are broken; use another")
        return np.asarray(logits.numpy())

    def _decoded(
        self, rows: NDArray[np.int64], batches: Iterable[NDArray[np.int64]]
    ) -> Iterator[tuple[NDArray[np.int64], Pixels | list[Picture]]]:
        """Batches of places in `rows`, each with its images. A few samples are decoded ahead, not a few batches: photographs are large."""
        from kdprune_data.learn.stream import prefetch

        places = list(batches)
        parts = [list(order.batches(at, DECODED_AT_ONCE)) for at in places]
        get = self.images.scalable if self.policy.scaled else self.images.get
        ready = prefetch(lambda at: get(rows[at]), chain.from_iterable(parts), self.jobs)
        for at, some_parts in zip(places, parts, strict=True):
            found = [next(ready) for _ in some_parts]
            yield at, np.concatenate(found) if isinstance(found[0], np.ndarray) else list(chain.from_iterable(found))

    def _rendered(self, images: Pixels | list[Picture], boxes: Sequence[Geometry]) -> Iterator[torch.Tensor]:
        """The views of a batch, one after the other, rendered a little ahead in parts of so many samples that memory stays bounded."""
        import torch

        from kdprune_data.learn import views
        from kdprune_data.learn.stream import prefetch

        if isinstance(images, np.ndarray) and self._renders_there():
            held = torch.from_numpy(images).to(self.device)  # once for all views: only boxes travel after that
            for box in boxes:
                yield views.shown(self.policy, held, box, self.device)
            return
        n, size = len(images), self.policy.size
        ahead = 2 * self.jobs + 2  # parts that `prefetch` holds, and the one that is used
        parts = list(order.batches(np.arange(n), max(1, RENDERED_BYTES // (ahead * 3 * size * size))))

        def make(part: tuple[Geometry, NDArray[np.int64]]) -> torch.Tensor:
            box, at = part
            return views.shown(self.policy, images[at[0] : at[-1] + 1], box.take(at))

        ready = prefetch(make, product(boxes, parts), self.jobs)
        for _ in boxes:
            yield torch.cat([next(ready) for _ in parts])

    def _renders_there(self) -> bool:
        """Whether views are rendered on the device: padded crops, which are exact everywhere, where that is not the CPU."""
        return self.device.type != "cpu" and "pad" in self.policy.to_dict()


def check_alike(saved: Sequence[Saved], data: Dataset) -> None:
    """Raise MismatchError unless all teachers know the data's classes, in their order, take inputs of one size, and are different ones."""
    for n, one in enumerate(saved):
        data.same_classes(one.manifest.classes, str(one.folder))
        if one.architecture.size != saved[0].architecture.size:
            raise MismatchError(
                f"{one.folder} takes inputs of {one.architecture.size} pixels and {saved[0].folder} of {saved[0].architecture.size}: "
                "an ensemble sees one view; train them at one --size"
            )
        if (same := next((other for other in saved[:n] if other.manifest.digest == one.manifest.digest), None)) is not None:
            raise MismatchError(
                f"{one.folder} and {same.folder} are one teacher ({one.manifest.digest[:12]}), which would count twice: leave one out"
            )
