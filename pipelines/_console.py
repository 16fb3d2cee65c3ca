"""What stages say while they work: plain lines and progress bars, always on stderr; and what they hand back, an `Outcome`.

stdout belongs to results: the command line prints an outcome there, as text or as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from kdprune_data.formats.journal import LOGGER

T = TypeVar("T")
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@dataclass(frozen=True)
class Outcome:
    """What a stage did: the artefact's folder (None where it makes none), the facts for machines, the text for people."""

    folder: Path | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    ok: bool = True
    """False: the work was done and found a fault (`verify`), which ends in exit code 1."""


@contextmanager
def quiet() -> Iterator[None]:
    """Say nothing inside: for stages that run others by the dozen."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def say(line: str) -> None:
    """One line of progress, for people and for the log of what is being made."""
    LOGGER.info(line)
    if not _quiet.get():
        tqdm.write(line, file=sys.stderr)


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "sample") -> Iterator[T]:
    """The items, with a progress bar on a terminal (rate and time left) and silence elsewhere."""
    with bar(what, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update(1)


def bar(what: str, *, total: int | None, unit: str = "sample") -> Any:
    """A progress bar to be moved by `update(n)`, removed when it is closed."""
    off = _quiet.get() or not sys.stderr.isatty()
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, disable=off, file=sys.stderr, dynamic_ncols=True)


def count(n: int, noun: str) -> str:
    """`1 sample`, `45,000 samples`, `2 classes`."""
    plural = noun if n == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{n:,} {plural}"


def megabytes(n: int) -> str:
    """Bytes for people, in powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"
