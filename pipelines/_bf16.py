"""`--precision bf16` of `score` and `cache`: networks that are asked in bf16, and a probe that says what this costs before the pass begins.

Some hundreds of samples, chosen by hash, are shown to the networks both ways. What comes of it is printed and stands in the manifest's
`counts`, as `bf16`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from kdprune_pipelines._console import count, say
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.lowrank import mean_kl
from kdprune_data.report.summary import rank_correlations

if TYPE_CHECKING:
    import torch
    from kdprune_pipelines._asking import Teachers
    from kdprune_pipelines._scoring import Scorer
    from torch import nn

T = TypeVar("T")
R = TypeVar("R")
PRECISIONS = ("float32", "bf16")
HELP = "Numbers that networks are asked in; bf16 is faster and costs digits: a probe prints how many."
SAMPLES = 256
WARMING = 8
LEAST_SECONDS = 0.1
TEMPERATURES = (1.0, 2.0, 4.0)


def lowered(nets: Sequence[nn.Module], *, size: int, device: torch.device) -> list[nn.Module]:
    """The networks, asked in bf16; what is not done the fast way is said once. Raises UsageError for one that cannot be."""
    from kdprune_data.learn.precision import in_bf16

    told: list[str] = []

    def tell(text: str) -> None:
        if text not in told:
            say(text)
        told.append(text)

    return [in_bf16(net, size=size, device=device, tell=tell) for net in nets]


def of_scores(scorer: Scorer) -> dict[str, Any]:
    """What bf16 costs scores, from the probe's images as they are evaluated: `samples`; `kl`, mean KL(float32 || bf16) of all networks'
    logits by temperature; `ranks`, Spearman's correlation of each score that is computed from outputs, null where it does not vary."""
    from kdprune_pipelines._columns import Columns
    from kdprune_pipelines._scoring import heard, of_batch

    from kdprune_data.scores import FROM_OUTPUTS

    names = [name for name in scorer.columns.of("early", "final") if name in FROM_OUTPUTS]
    asked = replace(scorer, columns=Columns(names, {}))
    rows = _probe(scorer.images.data)

    def passed(one: Scorer, some: NDArray[np.int64]) -> tuple[dict[str, NDArray[np.float32]], list[NDArray[np.float32]]]:
        columns, logits = [], []
        for found in heard(one, order.batches(some, one.batch)):
            columns.append(of_batch(one, found))
            logits.append(np.stack([out.logits.numpy() for out in found.outputs.values()]))
        whole = {name: np.concatenate([part[name] for part in columns]) for name in names}
        return whole, list(np.concatenate(logits, 1))

    exact = replace(asked, networks=scorer.networks.in_float32())
    (columns, logits), (coarse, others), faster = _both(passed, exact, asked, rows)
    by_score = {name: _rounded(rank_correlations([columns[name], coarse[name]])[0, 1]) for name in names}
    return _told({"samples": len(rows), "kl": _kl(logits, others, TEMPERATURES), "ranks": by_score}, faster)


def of_views(teachers: Teachers, temperatures: Iterable[float]) -> dict[str, Any]:
    """What bf16 costs a logit cache, from the first view of the probe's samples: `samples`; `kl`, mean KL(float32 || bf16) by temperature;
    `top1`, the share of samples with the same largest logit. temperatures: those to measure at besides 1, 2 and 4."""
    rows = _probe(teachers.data)

    def passed(one: Teachers, some: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.concatenate([said for _, said in one.said(some, range(1), order.batches(np.arange(len(some)), one.batch))])

    exact, coarse, faster = _both(passed, teachers.in_float32(), teachers, rows)
    taus = sorted({*TEMPERATURES, *temperatures})
    same = round(float((exact.argmax(1) == coarse.argmax(1)).mean()), 6)
    return _told({"samples": len(rows), "kl": _kl([exact], [coarse], taus), "top1": same}, faster)


def spoken(cost: Mapping[str, Any]) -> str:
    """For people: what stands in a manifest."""
    text = "mean KL(float32 || bf16) " + ", ".join(f"{kl:.2g} at temperature {tau}" for tau, kl in cost["kl"].items())
    if "top1" in cost:
        text += f"; top 1 the same in {'all' if cost['top1'] == 1 else format(cost['top1'], '.2%')}"
    if "ranks" in cost:
        each = [f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in cost["ranks"].items()]
        text += f"; rank correlation of {', '.join(each)}"
    return f"{text} ({count(cost['samples'], 'sample')}, chosen by hash)"


def _probe(data: Dataset) -> NDArray[np.int64]:
    """The samples that are looked at, as rows of the data."""
    rows = data.usable()
    by_hash = np.argsort(order.order_hash(data.uids[rows], 0, "probe"), kind="stable")
    return np.sort(rows[by_hash[:SAMPLES]])


def _both(passed: Callable[[T, NDArray[np.int64]], R], exact: T, coarse: T, rows: NDArray[np.int64]) -> tuple[R, R, float | None]:
    """What a pass over the rows gives both ways, and how many times as fast the second is: None where they are too short to tell."""
    for one in (exact, coarse):
        passed(one, rows[:WARMING])  # the first batches choose kernels and start threads
    began = time.monotonic()
    first = passed(exact, rows)
    between = time.monotonic()
    second = passed(coarse, rows)
    took = between - began, time.monotonic() - between
    return first, second, took[0] / took[1] if min(took) >= LEAST_SECONDS else None


def _kl(exact: Sequence[NDArray[np.float32]], coarse: Sequence[NDArray[np.float32]], temperatures: Iterable[float]) -> dict[str, float]:
    pairs = list(zip(exact, coarse, strict=True))
    return {f"{tau:g}": round(max(0.0, sum(mean_kl(a, b, tau) for a, b in pairs) / len(pairs)), 9) for tau in temperatures}


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _told(cost: dict[str, Any], faster: float | None) -> dict[str, Any]:
    say(f"bf16: {spoken(cost)}" + ("" if faster is None else f"; about {faster:.1f} times as fast as float32 here"))
    return cost
