"""Who says what of which views: a teacher at work on a data set, or an ensemble of several. `cache` writes down what they say.

Each sample is decoded once for all views that are asked for; views are rendered in batches that do not cross a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from kdprune_pipelines._bf16 import lowered
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


Decoded = tuple[NDArray[np.int64], "Pixels | list[Picture]"]
"""Places in the rows that are asked about, and the images of these."""


class Shown(NamedTuple):
    """A view as teachers see it, of places in the rows that are asked about: its place among the views asked for, and uint8 of shape
    (n, 3, s, s)."""

    at: NDArray[np.int64]
    view: int
    pixels: torch.Tensor


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
    """One teacher, or several of which the mean of the probabilities at `temperature` is taken. `jobs`: threads that decode and render;
    `exact`: where `nets` are asked in bf16, those in float32."""

    images: Images
    policy: Policy
    saved: Sequence[Saved]
    nets: Sequence[nn.Module]
    device: torch.device
    temperature: float | None
    batch: int
    jobs: int
    exact: Sequence[nn.Module] = ()

    def in_bf16(self) -> Teachers:
        """These, asked in bf16. Raises UsageError for a network that cannot be."""
        return replace(self, nets=lowered(self.nets, size=self.policy.size, device=self.device), exact=self.nets)

    def in_float32(self) -> Teachers:
        """These, asked in float32."""
        return replace(self, nets=self.exact, exact=()) if self.exact else self

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
        from kdprune_data.learn.inference import evaluating, overlapped

        boxes = [self.boxes(rows, view) for view in views]
        with ExitStack() as stack:
            nets = [stack.enter_context(evaluating(net, self.device)) for net in self.nets]

            def begin(shown: Shown) -> tuple[Shown, torch.Tensor]:
                return shown, self._logits(nets, shown.pixels)

            def end(begun: tuple[Shown, torch.Tensor]) -> tuple[int, NDArray[np.float32]]:
                shown, logits = begun
                return shown.view, self._finite(logits.cpu(), rows[shown.at])

            yield from overlapped(begin, end, self._shown(rows, boxes, batches), self.device)

    def metadata(self) -> dict[str, Any]:
        """See `Source`."""
        from kdprune_data.formats.logits import normalisation_of

        each = normalisation_of([one.normalisation.to_dict() for one in self.saved])
        return {"teacher": " ".join(one.manifest.digest for one in self.saved), "normalisation": each}

    def _logits(self, nets: Sequence[nn.Module], pixels: torch.Tensor) -> torch.Tensor:
        from kdprune_data.learn.inference import together
        from kdprune_data.learn.memory import sent

        on_device = sent(pixels, self.device)
        each: list[torch.Tensor] = [net(one.normalisation.apply(on_device)).float() for net, one in zip(nets, self.saved, strict=True)]
        return together(each, self.temperature)

    def _finite(self, logits: torch.Tensor, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        bad = self.data.ids[rows[~torch.isfinite(logits).all(1).numpy()]]
        if len(bad):
            raise SourceError(f"the teacher's logits of {some(bad)} are not finite numbers: its weights are broken; use another")
        return np.asarray(logits.numpy())

    def _shown(self, rows: NDArray[np.int64], boxes: Sequence[Geometry], batches: Iterable[NDArray[np.int64]]) -> Iterator[Shown]:
        """Every view of each batch of places in `rows`, rendered a little ahead. Small images are decoded for the next batch meanwhile;
        of photographs one batch is held at a time."""
        decoded = self._decoded(rows, batches)
        if self._renders_there():
            yield from self._rendered_there(decoded, boxes)
        elif self._small():
            yield from self._rendered(decoded, boxes)
        else:
            for one in decoded:
                yield from self._rendered([one], boxes)

    def _small(self) -> bool:
        """Whether batches of decoded images, as many as may wait, take no more memory than views that wait."""
        largest = int(self.data.sizes.astype(np.int64).prod(1).max(initial=1))
        return self.images.equal and not self.policy.scaled and 3 * largest * self.batch * self._ahead <= RENDERED_BYTES

    @property
    def _ahead(self) -> int:
        """Parts that `prefetch` holds, and the one that is used."""
        return 2 * self.jobs + 2

    def _decoded(self, rows: NDArray[np.int64], batches: Iterable[NDArray[np.int64]]) -> Iterator[Decoded]:
        """Batches of places in `rows`, each with its images. A few samples are decoded ahead, not a few batches: photographs are large."""
        from kdprune_data.learn.stream import prefetch

        places = list(batches)
        parts = [list(order.batches(at, DECODED_AT_ONCE)) for at in places]
        get = self.images.scalable if self.policy.scaled else self.images.get
        ready = prefetch(lambda at: get(rows[at]), chain.from_iterable(parts), self.jobs)
        for at, some_parts in zip(places, parts, strict=True):
            found = [next(ready) for _ in some_parts]
            whole = [one for one in found if isinstance(one, np.ndarray)]
            yield at, np.concatenate(whole) if whole else list(chain.from_iterable(found))

    def _rendered(self, decoded: Iterable[Decoded], boxes: Sequence[Geometry]) -> Iterator[Shown]:
        """The views of batches, one after the other, in parts of so many samples that memory stays bounded."""
        from kdprune_data.learn import views
        from kdprune_data.learn.inference import joined
        from kdprune_data.learn.stream import prefetch

        most = max(1, RENDERED_BYTES // (self._ahead * 3 * self.policy.size**2))

        def parts() -> Iterator[tuple[Decoded, int, NDArray[np.int64]]]:
            for one in decoded:
                yield from ((one, n, part) for n, part in product(range(len(boxes)), order.batches(np.arange(len(one[0])), most)))

        def make(item: tuple[Decoded, int, NDArray[np.int64]]) -> Shown:
            (at, images), n, part = item
            return Shown(at, n, views.shown(self.policy, images[part[0] : part[-1] + 1], boxes[n].take(at[part])))

        pieces: list[torch.Tensor] = []
        for piece in prefetch(make, parts(), self.jobs):
            pieces.append(piece.pixels)
            if sum(map(len, pieces)) == len(piece.at):
                yield piece._replace(pixels=joined(pieces))
                pieces.clear()

    def _rendered_there(self, decoded: Iterable[Decoded], boxes: Sequence[Geometry]) -> Iterator[Shown]:
        """The same on the device: images travel once for all views, and after that only boxes."""
        import torch

        from kdprune_data.learn import views
        from kdprune_data.learn.memory import sent

        for at, images in decoded:
            held = sent(torch.from_numpy(images), self.device)
            for n, box in enumerate(boxes):
                yield Shown(at, n, views.shown(self.policy, held, box.take(at), self.device))

    def _renders_there(self) -> bool:
        """Whether views are rendered on the device: padded crops, which are exact everywhere, where that is not the CPU."""
        return self.device.type != "cpu" and self.images.equal and "pad" in self.policy.to_dict()


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
