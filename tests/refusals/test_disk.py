"""A full disk, a file larger than is allowed, a folder that may not be written, two who write the same: all of them real."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SUBSET, TEACHER = "subsets/random-0.5-s0", "teachers/resnet8-s0"
LINES: dict[str, list[str]] = {
    "import": ["import", "digits", "--shard-samples", "300"],
    "index": ["index", "data/train/shard-000000.tar", "data/train/shard-000001.tar"],
    "teacher": ["teacher", "--model", "resnet8", "--epochs", "2", "--batch", "54"],
    "score": ["score", "--embedding"],
    "select": ["select", "--frac", "0.9", "--shard-samples", "30"],
    "cache": ["cache", "--views", "4"],
    "export": ["export"],
    "distill": ["distill", "--model", "resnet8", "--epochs", "2", "--batch", "54"],
}
ROOMS = [(command, share) for command in LINES for share in ((0.4,) if command in ("teacher", "distill") else (0.02, 0.4, 0.9))]


def namespace() -> list[str] | None:
    """How to get a mount namespace here, if at all."""
    for way in (["unshare", "-m"], ["unshare", "-rm"]):
        trial = [*way, "sh", "-c", "mkdir -p /tmp && mount -t tmpfs -o size=4k tmpfs /tmp"]
        if shutil.which("unshare") and subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            return way
    return None


@pytest.fixture(scope="module")
def in_rooms(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float | None], dict[str, Any]]:
    """What `rooms.py` saw, by command and share of the room needed. Skips where nothing may be mounted."""
    way = namespace()
    if way is None:
        pytest.skip("no mount namespace may be made here (unshare -m)")
    workspace = shutil.copytree(chain, tmp_path_factory.mktemp("rooms") / "workspace")
    cases: list[tuple[str, float | None]] = [*ROOMS, *((command, None) for command in LINES)]
    plan = json.dumps([{"line": LINES[command], "share": share} for command, share in cases])
    line = [*way, sys.executable, str(Path(__file__).with_name("rooms.py")), str(workspace)]
    ran = subprocess.run(line, input=plan, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(cases, json.loads(ran.stdout), strict=True))


def ran(found: list[Any]) -> SimpleNamespace:
    code, out, err = found
    return SimpleNamespace(code=code, out=out, err=err)


@pytest.mark.parametrize(("command", "share"), ROOMS)
def test_a_full_disk(in_rooms: Any, said_once: Any, command: str, share: float) -> None:
    """It says which file there is no room for; with room, the same command ends with the bytes of an undisturbed run."""
    found = in_rooms[command, share]
    said_once(ran(found["full"]), 1, r"[Nn]o space left on device.*room/made.*(check the disk|make room).*run the same command again")
    assert not [path for path in found["left"] if re.search(r"\.tmp$|\.replaced|manifest.json", path)]
    assert found["left"] == [] or "made/.partial/identity.json" in found["left"]
    assert (found["plain"][0], found["again"][0]) == (0, 0), found["again"]
    assert found["made"] == found["wanted"]


@pytest.mark.parametrize("command", LINES)
def test_a_disk_that_may_not_be_written(in_rooms: Any, said_once: Any, command: str) -> None:
    found = in_rooms[command, None]
    said_once(ran(found["full"]), 1, r"cannot write in room/made: Read-only file system; choose another --out")
    assert (found["left"], found["again"][0], found["made"]) == ([], 0, found["wanted"])
    assert found["verified"][0] == 0, found["verified"]
    if command != "cache":  # which takes a finished one up, to add to it, before it looks how much is there
        assert found["done"][0] == 0, found["done"]
        assert "already done" in found["done"][2]


# --- a limit on the size of a file


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", [0.1, 0.9])
@pytest.mark.parametrize("command", LINES)
def test_a_file_that_may_not_grow(
    chain_copy: Path, kdprune: Any, works: Any, said_once: Any, digests: Any, command: str, part: float
) -> None:
    line = LINES[command]
    works(chain_copy, *line, "--out", "plain/made")
    largest = max(p.stat().st_size for p in (chain_copy / "plain/made").rglob("*"))
    with files_of_at_most(int(largest * part)):
        ran = kdprune(*line, "--out", "made", cwd=chain_copy)
    said_once(ran, 1, r"File too large.*made/.*(check the disk|make room).*run the same command again")
    assert not list(chain_copy.rglob("*.tmp"))
    assert not (chain_copy / "made/manifest.json").exists()
    works(chain_copy, *line, "--out", "made")
    assert digests(chain_copy / "made") == digests(chain_copy / "plain/made")


# --- two processes


@pytest.fixture
def halted(started: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command line and stop it, as Ctrl-Z would, as soon as it has begun to write a folder. Let go, or killed, at the end."""
    running: list[subprocess.Popen[str]] = []

    def start(workspace: Path, line: list[str], folder: Path) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = started(*line, cwd=workspace)
        running.append(process)
        while not (folder / ".partial/identity.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.0005)
        process.send_signal(signal.SIGSTOP)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("command", ["import", "teacher", "cache"])
def test_two_who_write_the_same(chain_copy: Path, kdprune: Any, works: Any, refuses: Any, halted: Any, digests: Any, command: str) -> None:
    """The second is told so and touches nothing, whatever it asks for; the first ends as if it had been alone."""
    line = LINES[command]
    works(chain_copy, *line, "--out", "plain")
    first = halted(chain_copy, [*line, "--out", "made"], chain_copy / "made")
    for more in ([], ["--overwrite"]):
        refuses(chain_copy, [*line, "--out", "made", *more], 2, r"another process is writing made: wait for it, or choose another --out")
    refuses(chain_copy, ["verify", "made"], 2, r"made is unfinished: run the command that makes it again, it continues")
    assert kdprune(*LINES["select"], "--out", "another", cwd=chain_copy).code == 0
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert "Traceback" not in err
    assert digests(chain_copy / "made") == digests(chain_copy / "plain")
    works(chain_copy, *line, "--out", "made")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", LINES)
def test_a_folder_that_is_not_ours_to_write(chain_copy: Path, refuses: Any, command: str) -> None:
    (chain_copy / "locked").mkdir(mode=0o500)
    refuses(
        chain_copy, [*LINES[command], "--out", "locked/made"], 1, r"cannot write in locked/made: Permission denied; choose another --out"
    )
