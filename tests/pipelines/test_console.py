"""pipelines/_console.py: what is said, where, and how often; and the processes that work for a stage."""

from __future__ import annotations

import fcntl
import io
import logging
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdprune_pipelines import _console
from kdprune_pipelines._workers import results, workers

from kdprune_data.formats.journal import LOGGER


class Terminal(io.StringIO):
    """A text file that is a terminal, as far as anybody asks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What reaches the log, as text."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, before = Keep(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield lines
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(before)


@pytest.mark.parametrize(
    ("total", "unit", "initial", "done", "seconds", "line"),
    [
        (45_000, "sample", 0, 5_400, 8.71, "train: 12% (5,400 of 45,000 samples), 620 samples/s, 64 s left"),
        (45_000, "sample", 0, 450, 10, "train: 1% (450 of 45,000 samples), 45 samples/s, 16 min left"),
        (54, "student", 0, 1, 2, "train: 1% (1 of 54 students), 0.5 students/s, 2 min left"),
        (300, "sample", 200, 50, 10, "train: 83% (250 of 300 samples), 5 samples/s, 10 s left"),
        (3 * 10**9, "B", 0, 12 * 10**8, 10, "train: 40% (1.2 GB of 3.0 GB), 120.0 MB/s, 15 s left"),
        (None, "B", 0, 12 * 10**8, 10, "train: 1.2 GB, 120.0 MB/s"),
        (None, "sample", 0, 1, 10, "train: 1 sample, 0.1 samples/s"),
        (10, "sample", 0, 12, 1, "train: 100% (12 of 10 samples), 12 samples/s, 1 s left"),
    ],
)
def test_a_line(total: int | None, unit: str, initial: int, done: int, seconds: float, line: str) -> None:
    with _console.bar("train", total=total, unit=unit, initial=initial) as progress:
        progress.update(done)
        assert progress.line(seconds) == line


@pytest.mark.parametrize(("every", "silent"), [(0.0, False), (10.0, True)])
def test_lines_come_where_there_is_no_terminal_and_not_for_short_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logged: list[str], every: float, silent: bool
) -> None:
    monkeypatch.setattr(_console, "EVERY", every)
    assert list(_console.track(range(3), "count", total=3)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == logged
    assert [line.split(",")[0] for line in logged] == (
        [] if silent else ["count: 33% (1 of 3 samples)", "count: 66% (2 of 3 samples)", "count: 100% (3 of 3 samples)"]
    )


def test_at_most_one_line_in_a_while(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.setattr(_console, "EVERY", 0.05)
    started = time.monotonic()
    for _ in _console.track(range(200), "count", total=200):
        time.sleep(0.001)
    assert 1 <= len(logged) <= (time.monotonic() - started) / 0.05


def test_a_terminal_has_a_bar_and_the_log_the_lines(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.setattr(_console, "EVERY", 0.0)
    monkeypatch.setattr("sys.stderr", Terminal())
    with _console.bar("count", total=2) as progress:
        progress.update(2)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]  # it is the one above
    assert "count:   0%|" in shown
    assert "samples)" not in shown
    assert len(logged) == 1


def test_quiet_silences_all_but_the_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logged: list[str]) -> None:
    monkeypatch.setattr(_console, "EVERY", 0.0)
    with _console.quiet():
        _console.say("hush")
        list(_console.track([1], "count", total=1))
    assert capsys.readouterr() == ("", "")
    assert [line.split()[0] for line in logged] == ["hush", "count:"]


def test_verbose_shows_what_is_not_said_anyway(capsys: pytest.CaptureFixture[str]) -> None:
    before = LOGGER.level
    with _console.verbose():
        LOGGER.debug("a detail")
        _console.say("a line")
        with _console.quiet():
            _console.say("a hushed one")
    LOGGER.debug("later")
    assert LOGGER.level == before
    lines = [line.split(" ", 1)[-1] if line[0].isdigit() else line for line in capsys.readouterr().err.splitlines()]
    assert lines == ["a detail", "a line", "a hushed one"]


def test_workers_are_ended_when_their_stage_is_interrupted() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), workers(2, int) as pool:
        assert list(results(pool, str, [1, 2])) == ["1", "2"]
        results(pool, time.sleep, [60.0] * 5)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """However it ends: a process that nobody waits for would work on, and hold its files, as this one does."""
    program = tmp_path / "program.py"
    program.write_text(
        "import fcntl, time\nfrom kdprune_pipelines._workers import workers\n"
        "def ready() -> None:\n    global file\n    file = open('held', 'w')\n    fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    open('ready', 'w').close()\n"
        "if __name__ == '__main__':\n    with workers(1, ready) as pool:\n        pool.submit(time.sleep, 60).result()\n"
    )
    with subprocess.Popen([sys.executable, program], cwd=tmp_path) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    with (tmp_path / "held").open() as file:
        started = time.monotonic()
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - started < 30


def test_samples_that_do_not_decode_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    _console.say_unusable([])
    _console.say_unusable(["a", "b"])
    assert capsys.readouterr().err == "2 samples that do not decode, carried along but never used: 'a', 'b'\n"
