"""Pruned shards: the records of the samples that `select` keeps, planned from the index, copied, and indexed; and what that would take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from kdprune_pipelines._console import count, megabytes, say, track
from kdprune_pipelines._estimate import measure
from numpy.typing import NDArray

from kdprune_data.formats import copying, subset, tar, times
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.shards import Limits

LOOKED_AT = 10_000
"""Rows whose headers tell an estimate what `--normalize` leaves out."""


@dataclass(frozen=True)
class Copying:
    """How records are copied. `checked`: each image is compared with its digest; `normalize`: without headers that hold but times."""

    limits: Limits
    jobs: int
    checked: bool = True
    normalize: bool = False


@dataclass(frozen=True)
class Pruned:
    """Shards that were made: their index and names, and what was counted."""

    index: pa.Table
    names: list[str]
    counts: Mapping[str, int]


def prune(build: Build, parent: Dataset, rows: NDArray[np.int64], how: Copying) -> Pruned:
    """Make the shards of some rows, ascending. Raises SourceError when the parent's are not what was indexed."""
    left_out = _times(parent, rows, how.jobs) if how.normalize else None
    plan = subset.plan(parent, rows, how.limits, left_out)
    copied = copying.copy(parent, plan, build, how.jobs, checked=how.checked)
    names = list(track(copied, "copy", total=len(plan.names), unit="shard"))
    return Pruned(subset.index_of(parent, plan), names, {} if left_out is None else {"pax_dropped": len(left_out)})


def _times(parent: Dataset, rows: NDArray[np.int64], jobs: int) -> times.Spans:
    """What `--normalize` leaves out."""
    found = times.find(parent, rows, jobs)
    if len(found):
        say(f"{count(len(found), 'PAX header')} holding nothing but times left out: {megabytes(int(found.sizes.sum()))}")
    else:
        say("--normalize: no PAX header of these samples holds nothing but times, so there is nothing to leave out")
    return found


@dataclass(frozen=True)
class Cost:
    """What making shards takes."""

    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0


def cost(parent: Dataset, rows: NDArray[np.int64], how: Copying) -> Cost:
    """To the byte, from the plan; what `--normalize` leaves out, and the time, are told from the first records."""
    plan = subset.plan(parent, rows, how.limits)
    size = int(plan.lengths.sum()) + len(plan.names) * len(tar.END)
    seconds = measure(copying.trial(parent, plan, checked=how.checked), size) / min(how.jobs, os.cpu_count() or 1)
    if how.normalize:
        first = rows[:LOOKED_AT]
        size -= round(int(times.find(parent, first).sizes.sum()) * len(rows) / len(first))
    return Cost(len(plan.names), size, seconds)
