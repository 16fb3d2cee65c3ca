"""`--dry-run`: what a command would make, how large it would be and how long it would take, without touching anything.

A stage does everything up to the moment when it would write, then hands over what it knows: where, how many of what, how many bytes, and a
sample of the very work it would do, which is timed for at most 3 seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kdprune_pipelines._console import Outcome, count, duration, megabytes
from numpy.typing import NDArray

from kdprune_data.formats.build import Build
from kdprune_data.formats.identity import Identity

MOST_SECONDS = 3.0
STATES = {
    "new": "would be made",
    "unfinished": "is unfinished and would be continued (the estimate is for all of it)",
    "finished": "is finished: nothing would be done",
    "replaced": "would be replaced",
    "grown": "is finished and would be added to (the estimate is for what is new)",
}


@dataclass(frozen=True)
class Estimate:
    """What a run would do. `state`: as `Build.look` says; `counts`: by their nouns (`sample`, `view`, ...); `bytes` written; `seconds`."""

    folder: Path
    state: str
    counts: Mapping[str, int]
    bytes: int
    seconds: float

    def outcome(self) -> Outcome:
        """As the stage hands it back."""
        facts = {
            "dry_run": True,
            "folder": str(self.folder),
            "state": self.state,
            "counts": dict(self.counts),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 1),
        }
        if self.state == "finished":
            return Outcome(None, facts | {"bytes": 0, "seconds": 0.0}, f"{self.folder} {STATES[self.state]}")
        things = ", ".join(count(n, noun) for noun, n in self.counts.items())
        text = (
            f"{self.folder} {STATES[self.state]}: {things}; about {megabytes(self.bytes)}, about {duration(self.seconds)} on this machine"
        )
        return Outcome(None, facts, text)


def look(folder: Path, identity: Identity, *, overwrite: bool) -> str:
    """The state of a folder that would be written. Raises as the run itself would."""
    return Build.look(folder, identity, overwrite=overwrite)


def growing(rows: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
    """Rows in parts of 1, 1, 2, 4, ... and then `batch`: whatever a batch costs, `measure_growing` can stop in time."""
    size, at = 1, 0
    while at < len(rows):
        yield rows[at : at + size]
        at, size = at + size, min(2 * size, batch) if at else 1


def measure(work: Iterator[int], total: int) -> float:
    """Seconds that `total` units of work would take: `work` does some and says after each step how many units it did.

    The first step, and the first of a second length (the short batch that ends an epoch), also warm up or compile: they count only where
    there are no others, and take nothing of the time to measure in.
    """
    last = time.monotonic()
    warming: dict[int, float] = {}
    counted, spent = 0, 0.0
    for units in work:
        now = time.monotonic()
        seconds, last = now - last, now
        if units in warming or len(warming) == 2:
            counted, spent = counted + units, spent + seconds
        else:
            warming[units] = seconds
        if spent > MOST_SECONDS or counted + sum(warming) >= total:
            break
    if not counted:
        later = dict(list(warming.items())[1:])
        those = later if sum(later) else warming
        counted, spent = sum(those), sum(those.values())
    return spent * total / counted if counted else 0.0


def measure_growing(work: Iterator[int], total: int, share: float = 1.0) -> float:
    """As `measure`, for work in `growing` parts: the largest tell what the rest costs, and none is begun that would take too long, or when
    this share of what the whole would take has been spent.

    The first step loads and warms up what the others use, which may take longer than all of them: its time does not count.
    """
    began = last = time.monotonic()
    spent: dict[int, list[float]] = {}
    done = 0
    for step, units in enumerate(work):
        now = time.monotonic()
        seconds, last, done = now - last, now, done + units
        spent.setdefault(units, []).append(seconds)
        if step == 0:
            began = now
        elif now - began + 2 * seconds > MOST_SECONDS or now - began > share * seconds * total / units:
            break
        if done >= total:
            break
    if not spent:
        return 0.0
    largest = max(spent)
    times = spent[largest][1:] or spent[largest]  # the first of a size may still choose its kernels
    return sum(times) / len(times) * total / largest
