"""How what is said of views is stored: plain, or coded within a bound of KL that a probe of the data's samples decides. Used by `cache`.

A store keeps a batch's logits until all views of a range are said of a shard, then writes them, with what storing cost in KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from kdprune_pipelines._asking import Source
from kdprune_pipelines._console import bar, count, say
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.formats import logit_files as files
from kdprune_data.formats import lowrank, table
from kdprune_data.formats.build import Build
from kdprune_data.formats.logit_files import CODEBOOK, CODED, ViewRows, top1
from kdprune_data.formats.lowrank import Codebook
from kdprune_data.formats.rounding import TRIED, Code, Rounding, coarsest

if TYPE_CHECKING:
    from kdprune_data.learn.views import Geometry

TEMPERATURES = (1.0, 2.0, 4.0)
PROBE_SAMPLES, LEAST_SAMPLES, PROBE_VIEWS = 1024, 16, 8
PROBE_BYTES = 128_000_000
MARGIN = 0.93
"""The step is chosen for this much of the bound: what other samples lose is not exactly what the probe's do."""


@dataclass(frozen=True)
class Part:
    """What is to be written of a range of views of a shard. rows: of the data; kept: what the store kept, an array a view; lost: the mean
    KL by temperature, where it is known already."""

    shard: int
    span: tuple[int, int]
    rows: NDArray[np.int64]
    boxes: Sequence[Geometry]
    kept: Sequence[NDArray[np.floating]]
    lost: dict[float, float]

    @property
    def path(self) -> str:
        """The view file."""
        return files.view_path(*self.span, self.shard)


class Store(Protocol):
    """A way to store."""

    def keep(self, full: NDArray[np.float32]) -> tuple[NDArray[np.floating], dict[float, float]]:
        """What waits of a batch's logits, of shape (n, c), and their mean KL by temperature, where it is known already."""
        ...

    def write(self, build: Build, part: Part, labels: NDArray[np.int32], metadata: dict[str, Any]) -> NDArray[np.int32]:
        """Write a part; returns in how many of its views the largest logit is each row's label: int32 of shape (n,)."""
        ...


@dataclass(frozen=True)
class PlainStore:
    """float16 or float32."""

    dtype: str

    def keep(self, full: NDArray[np.float32]) -> tuple[NDArray[np.floating], dict[float, float]]:
        """See `Store`."""
        kept = files.stored(full, self.dtype)
        return kept, {tau: lowrank.mean_kl(full, kept, tau) for tau in TEMPERATURES}

    def write(self, build: Build, part: Part, labels: NDArray[np.int32], metadata: dict[str, Any]) -> NDArray[np.int32]:
        """See `Store`."""
        right = [top1(kept, labels) for kept in part.kept]
        views = [ViewRows(b.top, b.left, b.height, b.width, b.flip, z) for b, z in zip(part.boxes, part.kept, strict=True)]
        files.write_views(build, part.path, views, metadata | _measured(right, part.lost))
        return np.asarray(np.sum(right, 0), np.int32)


@dataclass(frozen=True)
class CodedStore:
    """Within a bound of KL. `digest`: of the codebook's file; `probe`: bool for each row of the data, the samples it was learned from."""

    book: Codebook
    rounding: Rounding
    digest: str
    probe: NDArray[np.bool_]

    def keep(self, full: NDArray[np.float32]) -> tuple[NDArray[np.floating], dict[float, float]]:
        """See `Store`."""
        return full, {}

    def write(self, build: Build, part: Part, labels: NDArray[np.int32], metadata: dict[str, Any]) -> NDArray[np.int32]:
        """See `Store`."""
        base = self._base(build, part, metadata)
        residuals, right = [], []
        lost, others = dict.fromkeys(self.rounding.temperatures, 0.0), ~self.probe[part.rows]
        for full in part.kept:
            residuals.append(self.rounding.residual_of(self.book, full, base))
            again = self.book.decode(base, residuals[-1])
            right.append(top1(again, labels))
            for tau in lost if others.any() else ():
                lost[tau] += lowrank.mean_kl(full[others], again[others], tau) / len(part.kept)
        boxes = [files.Boxes(b.top, b.left, b.height, b.width, b.flip) for b in part.boxes]
        measured = {"codebook": self.digest, "measured": str(int(others.sum()))} | _measured(right, lost)
        files.write_coded(build, part.path, boxes, residuals, metadata | measured)
        return np.asarray(np.sum(right, 0), np.int32)

    def _base(self, build: Build, part: Part, metadata: dict[str, Any]) -> NDArray[np.int16]:
        """The base of a shard: of its first range's views, or as it stands in its file."""
        if part.span[0]:
            return files.read_base(table.ipc_open(build.folder / files.base_path(part.shard)), self.book)
        total = np.zeros(part.kept[0].shape)
        for full in part.kept:
            total += lowrank.centre(full)
        base = self.book.base_of(total / len(part.kept))
        files.write_base(build, part.shard, base, {"format": "1", "rows": metadata["rows"], "codebook": self.digest})
        return base


def _measured(right: Sequence[NDArray[np.bool_]], lost: dict[float, float]) -> dict[str, Any]:
    return {"top1_correct": [int(r.sum()) for r in right], "kl": {f"{tau:g}": round(kl, 9) for tau, kl in lost.items()}}


@dataclass(frozen=True)
class Fidelity:
    """What is asked of a coded cache: mean KL(full || stored) of at most `bound` at every one of `temperatures`."""

    bound: float
    temperatures: Sequence[float]


@dataclass(frozen=True)
class Choice:
    """A code that was chosen, and about how many bytes base and residual take."""

    code: Code
    base_bytes: float
    view_bytes: float


def choose(logits: NDArray[np.float32], fidelity: Fidelity, views: int) -> Choice:
    """The coarsest code within the fidelity. logits: float32 of shape (v, n, c), some views of the probe's samples: the first half is
    learned from, the step is chosen on the second; views: in the first range."""
    half = logits.shape[1] // 2
    space = lowrank.fit(logits[:, :half])
    some = logits[:, half:]
    multiple = lowrank.multiple_for(views)
    code = coarsest(space, some, multiple=multiple, bound=MARGIN * fidelity.bound, temperatures=fidelity.temperatures)
    base = code.book.base_of(lowrank.centre(some).mean(0))
    n, tried = some.shape[1], some[:TRIED]
    residual = sum(_packed(code.rounding.residual_of(code.book, view, base)) for view in tried) / len(tried)
    return Choice(code, _packed(base) / n, residual / n)


def _packed(numbers: NDArray[Any]) -> int:
    """About what numbers of shape (n, k) take in a file."""
    return len(pa.Codec("zstd", compression_level=files.ZSTD_LEVEL).compress(np.ascontiguousarray(numbers.T)))


def probe_rows(source: Source) -> NDArray[np.int64]:
    """The samples that a code is learned from, by hash. Raises UsageError where there are too few."""
    usable, classes = source.data.usable(), len(source.data.classes)
    if len(usable) < LEAST_SAMPLES:
        raise UsageError(f"--fidelity learns a code from samples, and there are {len(usable)}: at least {LEAST_SAMPLES}, or leave it out")
    most = max(8, PROBE_BYTES // (4 * classes * PROBE_VIEWS))
    by_hash = np.argsort(order.order_hash(source.data.uids[usable], 0, "probe"), kind="stable")
    return np.asarray(usable[by_hash[: min(PROBE_SAMPLES, most, max(8, len(usable) // 4))]])


def coded_store(source: Source, build: Build, fidelity: Fidelity, views: int) -> tuple[CodedStore, Choice | None]:
    """The store of a coded cache: its codebook as it stands in the folder, or learned and written; then also what was chosen.

    views: in the first range.
    """
    rows, choice = probe_rows(source), None
    noted = build.finished(CODEBOOK)
    if noted is None or noted.get("views", views) != views:  # that of a run for other views is none of this one's
        build.keep_only(())  # what was coded with another codebook
        choice = choose(_ask(source, rows, min(views, PROBE_VIEWS)), fidelity, views)
        code = choice.code
        facts = {
            "temperatures": list(fidelity.temperatures),
            "fidelity": fidelity.bound,
            "kl": {f"{tau:g}": round(kl, 9) for tau, kl in code.kl.items()},
            "rounding": code.rounding.to_json(),
        }
        build.write(CODEBOOK, files.codebook_bytes(code.book, facts), {"views": views})
        say(
            f"{CODED}: {count(code.book.directions, 'direction')}, step {code.book.step * code.book.multiple:.3g}; KL of the probe "
            + ", ".join(f"{kl:.2g} at temperature {tau:g}" for tau, kl in code.kl.items())
        )
    book, stated = files.read_codebook(build.folder / CODEBOOK)
    digest = next(str(file.sha256) for file in build.files() if file.path == CODEBOOK)
    among = np.zeros(len(source.data), bool)
    among[rows] = True
    return CodedStore(book, Rounding.of_json(stated["rounding"], fidelity.temperatures), digest, among), choice


def _ask(source: Source, rows: NDArray[np.int64], views: int) -> NDArray[np.float32]:
    """What is said of the first views of the probe's samples: float32 of shape (v, n, c)."""
    said: list[list[NDArray[np.float32]]] = [[] for _ in range(views)]
    with bar("probe", total=len(rows) * views, unit="view") as progress:
        for n, full in source.said(rows, range(views), order.batches(np.arange(len(rows)), source.batch)):
            said[n].append(full)
            progress.update(len(full))
    return np.stack([np.concatenate(one) for one in said])
