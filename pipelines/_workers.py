"""Processes that work for a stage: they leave Ctrl-C to the stage, end at once when it is interrupted, and do not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def workers(jobs: int, prepare: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` fresh processes, each of which calls `prepare` first. When the block raises, they are ended, not waited for."""
    _start_tracker()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(prepare,)) as pool:
        try:
            with _held_back():
                pool.submit(int)  # starts them all
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def results(pool: ProcessPoolExecutor, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`work` of every item, in order. (Not `pool.map`: it cancels what is waiting, over which a pool that is ended stumbles aloud.)"""
    return (future.result() for future in [pool.submit(work, item) for item in items])


@contextmanager
def _held_back() -> Iterator[None]:
    """Keep Ctrl-C waiting: a process that is started meanwhile never gets it (its traceback would be the first thing people see)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Python's process that tidies up after a pool which was left at once; without the warning it would give of that."""
    if not hasattr(signal, "pthread_sigmask"):  # there is none either
        return
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _begin(prepare: Callable[[], None]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()


def _end_with_parent() -> None:
    """However the parent ends, kill -9 included: nobody is left to take the work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
