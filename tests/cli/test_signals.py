"""Ctrl-C and SIGTERM: one line that says how to go on, the exit code, soon; and no traceback, whatever is at work."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONTINUE = "interrupted: run the same command again to continue"
SOON = 10.0
"""Seconds: two are promised, on a machine with nothing else to do."""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process group of its own, as a shell starts one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, text=True, start_new_session=True, **pipes)


def wait_for(running: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    while not there():
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)


def ended(running: subprocess.Popen[str], numbers: list[int], *, group: bool) -> tuple[int, str, list[str]]:
    """Send signals and wait: exit code, stdout, the last lines of stderr from the one that says how to continue."""
    began = time.monotonic()
    for number in numbers:
        (os.killpg if group else os.kill)(running.pid, number)
        time.sleep(0.02)
    out, err = running.communicate(timeout=60)
    assert time.monotonic() - began < SOON
    assert "Traceback" not in err
    lines = err.splitlines()
    return running.returncode, out, lines[lines.index(CONTINUE) :]


def command(*line: str) -> str:
    return f"from kdprune_cli.main import main\nmain({list(line)!r})"


@pytest.mark.parametrize(
    ("numbers", "code", "group"),
    [([signal.SIGINT, signal.SIGINT], 130, True), ([signal.SIGTERM], 143, False)],
    ids=["twice Ctrl-C", "SIGTERM"],
)
def test_training(chain_copy: Path, numbers: list[int], code: int, group: bool) -> None:
    running = start(command("teacher", "--model", "resnet8", "--epochs", "900", "--name", "long", "--json"), chain_copy)
    wait_for(running, lambda: (chain_copy / "teachers/long/dynamics/epoch-002.parquet").exists())
    returned, out, said = ended(running, numbers, group=group)
    assert (returned, said) == (code, [CONTINUE])
    assert json.loads(out) == {"error": {"message": CONTINUE, "exit_code": code, "type": "Interrupted"}}


def test_threads_that_are_busy_are_not_waited_for(tmp_path: Path) -> None:
    """As when shards of large images are being checked: a thread that cannot be stopped, and work that waits for it."""
    code = """
import time
from concurrent.futures import ThreadPoolExecutor
from kdprune_cli import info, main
def run():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 120)
        open('busy', 'w').close()
        time.sleep(120)
info.command.callback = run
info.command.params = []
main.main(['info'])
"""
    running = start(code, tmp_path)
    wait_for(running, (tmp_path / "busy").exists)
    assert ended(running, [signal.SIGINT], group=True) == (130, "", [CONTINUE])


@pytest.mark.parametrize("stubborn", [False, True])
def test_processes_of_the_demo(tmp_path: Path, stubborn: bool) -> None:
    """A pool like the demo's, with a stage at work in it: no process of it says anything, and none stays; nor of work that will not end."""
    work = ["list(results(pool, work, range(4)))"]
    if stubborn:
        work = ["try:", *(f"    {line}" for line in work), "finally:", "    time.sleep(120)"]
    (tmp_path / "program.py").write_text(
        "import fcntl, time\nfrom kdprune_cli import info, main\nfrom kdprune_pipelines._workers import results, workers\n"
        "def nothing(): pass\n"
        "def work(n):\n    with open(f'busy-{n}', 'w') as file:\n        fcntl.flock(file, fcntl.LOCK_EX)\n"
        "        open(f'ready-{n}', 'w').close()\n        time.sleep(120)\n"
        "def run():\n    with workers(2, nothing) as pool:\n" + "".join(f"        {line}\n" for line in work) + ""
        "if __name__ == '__main__':\n    info.command.callback, info.command.params = run, []\n    main.main(['info'])\n"
    )
    running = start("import runpy; runpy.run_path('program.py', run_name='__main__')", tmp_path)
    wait_for(running, lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    began = time.monotonic()
    assert ended(running, [signal.SIGINT], group=True) == (130, "", [CONTINUE])
    for path in tmp_path.glob("busy-*"):
        with path.open() as file:  # locked as long as the process lives
            fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - began < SOON
