"""How a command line ends: errors become one line on stderr, one object on stdout with `--json`, and an exit code.

0 done, 1 the work failed or a check found a fault, 2 wrong usage, 130 interrupted (Ctrl-C), 143 terminated. Tracebacks with `--debug` only.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import click

from kdprune_data.errors import KdpruneError, UsageError, first_line

GRACE = 1.5
"""Seconds that an interrupted command has to put things away. Files are safe at any moment, so it may then be left where it stands."""
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, then run the same command again"),
    errno.ENAMETOOLONG: "give a shorter name",
}
OTHERWISE = "check the disk and its permissions, then run the same command again"
"""What to do about what the system refused."""
CONTINUE = "interrupted: run the same command again to continue"


class Interrupted(Exception):  # noqa: N818 - no error
    """Ctrl-C or SIGTERM reached a command. (click would print an empty line for a KeyboardInterrupt.)"""


class Signals:
    """What SIGINT and SIGTERM do: the first one unwinds the work, within GRACE seconds; a second one ends it at once."""

    def __init__(self) -> None:
        self.number = signal.SIGINT
        self.met = False
        self.told = False
        self.as_json = False

    def watch(self) -> None:
        """From now on; a signal that whoever started us had ignored stays so."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._handle)

    def done(self) -> None:
        """The work is put away: no alarm any more, and nothing to interrupt while the interpreter ends."""
        if not self.met:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
            self._leave()  # the interpreter would wait for it
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def code(self) -> int:
        """The exit code of an interrupted command."""
        return 128 + self.number

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.met:
            self._leave()
        self.met, self.number = True, signal.Signals(number)
        sys.unraisablehook = lambda _: None  # where it cannot be raised it is shown, as a traceback; the alarm ends the work all the same
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda *_: self._leave())
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        raise KeyboardInterrupt

    def _leave(self) -> None:
        """End now, whatever threads and processes of ours are doing."""
        if "multiprocessing" in sys.modules:
            import multiprocessing

            for child in multiprocessing.active_children():
                child.terminate()
        if not self.told:
            os.write(2, f"{CONTINUE}\n".encode())
            if self.as_json:
                os.write(1, f"{_as_json(CONTINUE, self.code, 'Interrupted')}\n".encode())
        os._exit(self.code)


SIGNALS = Signals()


def report(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Say what stopped a command line, and return its exit code. A fault of ours is raised again with `debug`."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains once more while it ends
        return 1
    kind, message, code = _describe(error)
    interrupted = kind == "Interrupted"
    if debug and not interrupted and not isinstance(error, click.ClickException):
        import traceback

        traceback.print_exception(error)
    message = "\\n".join(message.splitlines())  # a file's name may hold anything
    SIGNALS.told = True
    with suppress(OSError):  # stderr may be full or closed; the exit code tells all the same
        print(message if interrupted else f"error: {message}", file=sys.stderr)
    if as_json:
        click.echo(_as_json(message, code, kind))
    return code


def _as_json(message: str, code: int, kind: str) -> str:
    return json.dumps({"error": {"message": message, "exit_code": code, "type": kind}})


def _describe(error: BaseException) -> tuple[str, str, int]:
    """An error's type for machines, its message, its exit code."""
    # While it is being interrupted a library may fail in its own ways: an import that was cut short, a pool without its processes.
    if SIGNALS.met or isinstance(error, Interrupted | KeyboardInterrupt | click.Abort):
        return "Interrupted", CONTINUE, SIGNALS.code
    if isinstance(error, click.ClickException):
        return UsageError.__name__, _usage(error), error.exit_code
    name = type(error).__name__
    if isinstance(error, KdpruneError):
        return name, str(error), error.exit_code
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return name, f"{error.strerror or error}{where}: {ADVICE.get(error.errno or 0, OTHERWISE)}", 1
    return name, f"unexpected {name}: {first_line(error)}; run again with --debug and report it", 1


def _usage(error: click.ClickException) -> str:
    context: Any = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    return " ".join(error.format_message().split()) + hint
