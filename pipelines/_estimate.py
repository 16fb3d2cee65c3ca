"""`--dry-run`: what a command would make, how large it would be and how long it would take, without touching anything.

A stage does everything up to the moment when it would write, then hands over what it knows: where, how many of what, how many bytes, and a
sample of the very work it would do, which is timed for at most 3 seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdprune_pipelines._console import Outcome, count, megabytes

from kdprune_data.formats.build import Build
from kdprune_data.formats.identity import Identity

MOST_SECONDS = 3.0
STATES = {
    "new": "would be made",
    "unfinished": "is unfinished and would be continued (the estimate is for all of it)",
    "finished": "is finished: nothing would be done",
    "replaced": "would be replaced",
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


def look(folder: Path, identity: Identity, *, overwrite: bool, append: bool = False) -> str:
    """The state of a folder that would be written. Raises as the run itself would. `append`: a finished one may still grow."""
    found = Build.look(folder, identity, overwrite=overwrite)
    return "unfinished" if append and found == "finished" else found


def measure(work: Iterator[int], total: int) -> float:
    """Seconds that `total` units of work would take: `work` does some and says after each step how many units it did.

    The first step, which also warms up, counts only when there is no other.
    """
    began = time.monotonic()
    done, started, seconds, before = 0, began, 0.0, 0
    for step, units in enumerate(work):
        now = time.monotonic()
        done, seconds = done + units, now - started
        if step == 0:
            before, started = units, now
        if now - began > MOST_SECONDS or done >= total:
            break
    if done > before:
        return seconds * total / (done - before)
    return seconds * total / done if done else 0.0


def duration(seconds: float) -> str:
    """For people: `2 s`, `14 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
