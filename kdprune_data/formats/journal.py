"""`log.txt`: what was said while an artefact was made, each line with its time; kept among its side files, outside every digest.

Everybody who has something to tell logs it to `kdprune_data`, Python's own way; while a folder is being written, a `Journal` collects the
lines in `.partial/`, over as many runs as it takes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from kdprune_data._version import __version__

NAME = "log.txt"
LOGGER = logging.getLogger("kdprune_data")
LOGGER.addHandler(logging.NullHandler())  # a library says nothing unless asked: without this, warnings would go to stderr


class _Handler(logging.FileHandler):
    """Writes what it can: a line that the disk has no room for is no reason to stop, or to show a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Nothing: see the class."""


class Journal:
    """The log of one folder in the making. `close` may be called twice."""

    def __init__(self, path: Path) -> None:
        self._handler = _Handler(path, encoding="utf-8", delay=True, errors="backslashreplace")
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self._handler.setFormatter(formatter)
        self._handler.setLevel(logging.DEBUG)
        LOGGER.addHandler(self._handler)
        # Info is what people are told anyway; details are logged where somebody (`-v`, a test) has asked for them.
        LOGGER.setLevel(min(LOGGER.level or logging.INFO, logging.INFO))

    def begin(self, folder: Path, *, continued: bool) -> None:
        """Note that a run starts, or takes up what another left."""
        LOGGER.info("%s %s (version %s)", folder, "is continued" if continued else "is begun", __version__)

    def close(self) -> None:
        """Write no more."""
        LOGGER.removeHandler(self._handler)
        with contextlib.suppress(OSError):  # of lines that are still to be written
            self._handler.close()
