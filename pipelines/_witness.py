"""A teacher as a witness: what a logit cache holds of some (row, view) pairs, what the teacher says of them, how far these may differ.

A pair's stored box is rendered from the data set's image as students are shown it; the teacher sees it in eval mode, in float32, normalised
as its folder says. Of several teachers it is what they say together, at the cache's temperature. Compared are z - max(z), and for caches
that are coded or were asked in bf16 what softmax makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from kdprune_pipelines._models import Saved
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, some
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import Joined, LogitCache
from kdprune_data.formats.lowrank import kl, log_softmax

if TYPE_CHECKING:
    from torch import Tensor

    from kdprune_data.learn.inference import Predictor
    from kdprune_data.learn.stream import Images
    from kdprune_data.learn.views import Geometry, Normalisation, Policy

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
TEMPERATURES = (1.0, 2.0, 4.0)
NOISE = 1e-3
RELATIVE = 1e-4
"""In batches of other sizes, on other devices and with other kernels a float32 network says slightly different things: NOISE is allowed,
and this share of a row's range, for rounding grows with the logits."""
SLACK = 4.0
"""A cache that is coded or was asked in bf16 states its mean KL; that of a few pairs may be this many times as large."""
SLACK_OF_ONE = 20.0
"""That of a single pair."""
KL_NOISE = 1e-5
FITS = 0.8
"""An explanation holds when it holds for this share of the pairs: a shift by a row explains nothing at the ends of a shard."""
AT_ONCE = 64


def together_named(folders: Sequence[object]) -> str:
    """Folders as a sentence has them.

    >>> together_named(["a", "b", "c"]), together_named(["a"])
    ('a, b and c', 'a')
    """
    *first, last = map(str, folders)
    return f"{', '.join(first)} and {last}" if first else last


def shifted(logits: NDArray[np.floating]) -> F64:
    """z - max(z), shape (n, c) in and out: what is compared, for softmax takes no notice of the rest."""
    wide = np.asarray(logits, np.float64)
    return np.asarray(wide - wide.max(1, keepdims=True))


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> F64:
    """Probabilities at a temperature, shape (n, c) in and out."""
    return np.asarray(np.exp(log_softmax(logits, temperature)))


@dataclass(frozen=True)
class Limits:
    """How far what is stored may be from what the teacher says again. `rounding`: of a stored value, as a share of it; `least`: the
    smallest value that can be stored; `kl`: of a coded cache, or one asked in bf16, the mean KL that it states, by temperature, which then
    alone decides."""

    rounding: float = 0.0
    least: float = -np.inf
    kl: Mapping[float, float] | None = None

    @classmethod
    def of(cls, cache: LogitCache) -> Limits:
        """Those of a cache: its type's rounding, or of a coded one the KL that it states, or if it measured none was made for; where its
        teacher was asked in bf16, what that cost besides."""
        asked = {float(tau): float(kl) for tau, kl in cache.manifest.counts.get("bf16", {}).get("kl", {}).items()}
        if cache.coded:
            stated = {float(tau): measured or float(cache.manifest.config["fidelity"]) for tau, measured in cache.kl.items()}
            return cls(kl={tau: kl + asked.get(tau, 0.0) for tau, kl in stated.items()})
        if asked:
            return cls(kl=asked)
        return cls(2.0**-11, float(np.finfo(np.float16).min)) if cache.manifest.config.get("dtype") == "float16" else cls()

    def far(self, said: F64, stored: F64) -> NDArray[np.bool_]:
        """Which rows differ by more than is allowed: (n, c) twice to bool of shape (n,)."""
        if self.kl is not None:
            over = [kl(said, stored, tau) > SLACK_OF_ONE * bound + KL_NOISE for tau, bound in self.kl.items()]
            return np.asarray(np.any(over, axis=0))
        said, stored = np.maximum(shifted(said), self.least), shifted(stored)
        allowed = NOISE + RELATIVE * np.abs(said).max(1, keepdims=True) + self.rounding * np.abs(said)
        return np.asarray((np.abs(said - stored) > allowed).any(1))

    def disagree(self, said: F64, stored: F64) -> bool:
        """Whether these rows, taken together, are not those of this teacher."""
        if self.kl is None:
            return bool(self.far(said, stored).any())
        return any(float(kl(said, stored, tau).mean()) > SLACK * bound + KL_NOISE for tau, bound in self.kl.items())

    def fit(self, said: F64, stored: F64) -> bool:
        """Whether a supposition gives most of these rows."""
        return bool(len(said)) and float(self.far(said, stored).mean()) <= 1 - FITS

    @property
    def text(self) -> str:
        """What is allowed, for messages."""
        if self.kl is not None:
            bounds = " / ".join(f"{SLACK * bound:.2g}" for bound in self.kl.values())
            return f"a mean KL of {bounds} at temperature {' / '.join(f'{tau:g}' for tau in self.kl)} is allowed"
        return f"{NOISE:g}{' and the rounding of float16' if self.rounding else ''} is allowed"


@dataclass(frozen=True)
class Pairs:
    """n (row, view) pairs as a cache holds them. rows: int64 of shape (n,), of the data set (or, read by place, of the cache's rows);
    views: int64 of shape (n,); stored: z - max(z), float64 of shape (n, c)."""

    rows: I64
    views: I64
    boxes: Geometry
    stored: F64

    def take(self, at: I64) -> Pairs:
        """Some of them, by place."""
        return Pairs(self.rows[at], self.views[at], self.boxes.take(at), self.stored[at])


def chosen(data: Dataset, views: int, n: int, seed: int) -> tuple[I64, I64]:
    """Up to n distinct (row, view) pairs, as (rows, views), int64 each: the samples in the order of their hashes, each with a view that a
    hash chooses; when all have had their turn, each with the view after that, and so on."""
    rows = data.usable()
    by_hash = rows[np.argsort(order.order_hash(data.uids[rows], seed, "recheck"), kind="stable")]
    turn, place = np.divmod(np.arange(min(n, len(rows) * views)), len(rows))
    first = order.order_hash(data.uids[by_hash[place]], seed, "recheck-view") % np.uint64(views)
    return by_hash[place], (first.astype(np.int64) + turn) % views


@dataclass(frozen=True)
class Witness:
    """A cache, the data set that it is aligned with, and its teacher; or several, whose probabilities have their mean at `temperature`."""

    joined: Joined
    images: Images
    saved: Sequence[Saved]
    predictors: Sequence[Predictor]
    temperature: float | None = None

    @property
    def data(self) -> Dataset:
        """The data set."""
        return self.images.data

    @property
    def name(self) -> str:
        """The teachers' folders, for messages."""
        return together_named([one.folder for one in self.saved])

    @cached_property
    def policy(self) -> Policy:
        """The views' policy."""
        from kdprune_data.learn.views import Policy

        return Policy.from_dict(self.joined.cache.policy)

    @cached_property
    def _by_place(self) -> Joined:
        """The same cache, read by the place of a row in it."""
        return replace(self.joined, place=np.arange(int(self.joined.starts[-1]), dtype=np.int64))

    def read(self, rows: I64, views: I64) -> Pairs:
        """What is stored of some pairs, in their order. Raises FormatError as the cache's reader does."""
        return _read(self.joined, rows, views)

    def read_places(self, places: I64, views: I64) -> Pairs:
        """The same for places in the cache's rows, all shards one after the other."""
        return _read(self._by_place, places, views)

    def says(
        self,
        rows: I64,
        boxes: Geometry | None,
        *,
        normalise: Callable[[Normalisation, Tensor], Tensor] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> F64:
        """z - max(z), float64 of shape (n, c), for some boxes of some rows; without boxes, for the images as they are evaluated.

        normalise: what goes before a network of some normalisation (uint8 of shape (n, 3, s, s) to float32), default just that; tick: gets
        the number of each batch done. Raises SourceError for an image that does not decode, or a logit that is no finite number.
        """
        from kdprune_data.learn.inference import together

        return shifted(together(self.each(rows, boxes, normalise=normalise, tick=tick), self.temperature).numpy())

    def each(
        self,
        rows: I64,
        boxes: Geometry | None,
        *,
        normalise: Callable[[Normalisation, Tensor], Tensor] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """The same by teacher: their logits, float32 of shape (n, c) each."""
        import torch

        from kdprune_data.learn.inference import evaluating

        found: list[list[Tensor]] = [[] for _ in self.saved]
        with ExitStack() as stack:
            nets = [stack.enter_context(evaluating(one.net, one.device)) for one in self.predictors]
            for at in order.batches(np.arange(len(rows)), AT_ONCE):
                pixels = self._rendered(rows[at], None if boxes is None else boxes.take(at))
                for n, (net, one) in enumerate(zip(nets, self.predictors, strict=True)):
                    shown = pixels.to(one.device)
                    inputs = one.normalisation.apply(shown) if normalise is None else normalise(one.normalisation, shown)
                    said = net(inputs).float().cpu()
                    bad = self.data.ids[rows[at[~torch.isfinite(said).all(1).numpy()]]]
                    if len(bad):
                        whose = self.saved[n].folder
                        raise SourceError(f"what {whose} says of {some(bad)} are no finite numbers: its weights are broken")
                    found[n].append(said)
                if tick is not None:
                    tick(len(at))
        return [torch.cat(one) for one in found]

    def _rendered(self, rows: I64, boxes: Geometry | None) -> Tensor:
        """uint8 of shape (n, 3, s, s), decoded a few at a time: photographs are large."""
        import torch

        from kdprune_data.learn import views

        if boxes is not None:
            return self.images.rendered(rows, boxes, self.policy)
        return torch.cat([views.evaluation(self.images.get(rows[at]), self.policy.size) for at in self.images.few(rows)])


def _read(joined: Joined, rows: I64, views: I64) -> Pairs:
    from kdprune_data.learn.views import Geometry

    at, pieces = [], []
    for view in np.unique(views).tolist():
        at.append(np.flatnonzero(views == view))
        pieces.append(joined.read(rows[at[-1]], view))
    back = np.argsort(np.concatenate(at), kind="stable")
    *boxes, logits = (np.concatenate(columns)[back] for columns in zip(*pieces, strict=True))
    return Pairs(rows, views, Geometry(*boxes), shifted(logits))
