"""What stages say while they work: plain lines and progress, always on stderr; and what they hand back, an `Outcome`.

stdout belongs to results: the command line prints an outcome there, as text or as JSON. How far some work is shows on a terminal as a bar,
and elsewhere as a plain line every ten seconds. Whatever is said also goes to the log of what is being made.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from tqdm import tqdm

from kdprune_data.errors import some
from kdprune_data.formats.journal import LOGGER

T = TypeVar("T")
EVERY = 10.0
"""Seconds between two plain lines of progress, and before the first."""
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
    """Say nothing inside: for stages that run others by the dozen. Logs are kept all the same."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def verbose() -> Iterator[None]:
    """Show on stderr, with the time, whatever is logged inside and not said anyway: files written, folders begun."""
    handler = _Details(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not getattr(record, "said", False))
    before = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


class _Details(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _tell(self.format(record))


def _tell(line: str) -> None:
    """One line on stderr. Where that is full or closed the work goes on without words."""
    with suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr)


def say(line: str) -> None:
    """One line of progress, for people and for the log of what is being made."""
    shown = not _quiet.get()
    LOGGER.info(line, extra={"said": shown})
    if shown:
        _tell(line)


def say_unusable(ids: Sequence[str]) -> None:
    """Which samples do not decode; with `-v` all of them."""
    if ids:
        say(f"{count(len(ids), 'sample')} that do not decode, carried along but never used: {some(ids, 10)}")
        for one in ids:
            detail(f"does not decode: {one}")


def detail(line: str) -> None:
    """One line for those who asked for details with `-v`."""
    LOGGER.debug(line)


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "sample") -> Iterator[T]:
    """The items, with progress: see `bar`."""
    with bar(what, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update(1)


def bar(what: str, *, total: int | None, unit: str = "sample", initial: int = 0) -> Progress:
    """Progress to be moved by `update(n)`, in a `with` block. `initial`: done by an earlier run, and no part of the rate."""
    return Progress(what, total=total, unit=unit, initial=initial)


class Progress:
    """How far some work is: a bar on a terminal (rate and time left), a plain line every ten seconds elsewhere and in the log."""

    def __init__(self, what: str, *, total: int | None, unit: str, initial: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._initial = self._done = initial
        self._began = self._told = time.monotonic()
        terminal = not _quiet.get() and sys.stderr.isatty()
        self._lines = not _quiet.get() and not terminal
        self._terminal = terminal
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=unit,
            initial=initial,
            unit_scale=True,
            leave=False,
            disable=not terminal,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self._done += n
        self._bar.update(n)
        now = time.monotonic()
        if now - self._told >= EVERY and self._done > self._initial:
            self._told = now
            line = self.line(now - self._began)
            LOGGER.info(line, extra={"said": self._lines or self._terminal})
            if self._lines:
                _tell(line)

    def line(self, seconds: float) -> str:
        """Where the work stands after so many seconds: `train: 12% (5,400 of 45,000 samples), 620 samples/s, 64 s left`."""
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        done = _amount(self._done, self._unit)
        if not self._total:
            return f"{self._what}: {done}, {_speed(rate, self._unit)}"
        share = min(self._done * 100 // self._total, 100)
        part = done if self._unit == "B" else f"{self._done:,}"
        left = max(self._total - self._done, 0) / rate if rate else 0.0
        of = f"{part} of {_amount(self._total, self._unit)}"
        return f"{self._what}: {share}% ({of}), {_speed(rate, self._unit)}, {duration(left)} left"


def _amount(n: int, unit: str) -> str:
    return megabytes(n) if unit == "B" else count(n, unit)


def _speed(rate: float, unit: str) -> str:
    """Units in a second: `620 samples/s`, `0.52 students/s`, `3.2 MB/s`."""
    if unit == "B":
        return f"{megabytes(int(rate))}/s"
    return f"{rate:,.0f} {unit}s/s" if rate >= 10 else f"{rate:.2g} {unit}s/s"


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


def duration(seconds: float) -> str:
    """For people: `2 s`, `14 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
