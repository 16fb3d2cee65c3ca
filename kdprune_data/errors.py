"""Every error this project raises on purpose.

    KdpruneError            the work failed                                           exit 1
    |-- UsageError          an option, a name or an input folder is wrong             exit 2
    |   `-- ExistsError     the folder already holds something else                   exit 2
    |-- SourceError         the data that somebody gave us cannot be used             exit 1
    |-- FormatError         a file of ours is not what its format's page says         exit 1
    `-- MismatchError       two artefacts do not belong together                      exit 1

A message is one line: what is wrong, the value met, the limit it broke, and what to do. The library raises; the command line turns
an error into that line and its exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class KdpruneError(Exception):
    """The work failed; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class UsageError(KdpruneError):
    """An option, a name or an input folder is wrong; nothing was done."""

    exit_code: ClassVar[int] = 2


class ExistsError(UsageError):
    """The folder to write already holds something else."""


class SourceError(KdpruneError):
    """The data that somebody gave us cannot be used."""


class FormatError(KdpruneError):
    """A file of ours is not what its format's page says."""


class MismatchError(KdpruneError):
    """Two artefacts do not belong together."""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """An error for a name that is not among the `known`, suggesting the nearest.

    >>> str(unknown("method", "randm", ["random", "el2n"]))
    "unknown method 'randm'; did you mean 'random'? known: el2n, random"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1) or [n for n in names if n.lower() == name.lower()]
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UsageError(f"unknown {what} {name!r}{hint} known: {', '.join(names)}")


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip()


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, quoted, and how many more there are.

    >>> some(["a", "b", "c", "d"])
    "'a', 'b', 'c' and 1 more"
    """
    listed = list(names)
    shown = ", ".join(repr(name) for name in listed[:limit])
    return shown + (f" and {len(listed) - limit:,} more" if len(listed) > limit else "")
