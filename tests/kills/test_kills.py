"""SIGKILL at any moment of any command, and the same command again: the bytes of an undisturbed run, and no leftover is ever trusted.

The moments are changes of the file system, counted in an undisturbed run; the child sends itself a real signal at the chosen one. Inside a
file the kernel kills it, in the write that would take the file past a limit.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

FIRST = ("import", "parquet", "index", "teacher", "score", "also", "proxies", "select", "cache", "grow", "export", "distill")
REPLACING = tuple(f"{name}-overwrite" for name in ("import", "index", "teacher", "score", "select", "cache", "export", "distill"))
MOMENTS = [
    *((name, place) for name in FIRST for place in ("0.4", "0.65", "manifest", "clearing")),
    *((name, place) for name in REPLACING for place in ("0.1", "0.6", "last")),
    *((name, "0.1") for name in ("import", "teacher")),
]

Whole = Callable[[str], Any]


def kill(forked: Any, whole: Any, workspace: Path, line: Sequence[str] | None = None, **when: Any) -> None:
    killed = forked.run(line or whole.scene.line, workspace, **when)
    assert killed.status == -when.get("signal", signal.SIGKILL), killed


def finish(forked: Any, whole: Any, checks: Any, workspace: Path) -> None:
    again = forked.run(whole.scene.line, workspace)
    assert again.status == 0, again.err
    checks.ended(whole, workspace)


@pytest.mark.parametrize(("name", "place"), MOMENTS)
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str, place: str
) -> None:
    whole = undisturbed(name)
    workspace = whole.copy(tmp_path / "workspace")
    kill(forked, whole, workspace, moment=whole.near(place))
    checks.stopped(whole, workspace)
    finish(forked, whole, checks, workspace)


def test_many_kills_come_after_the_first_part_has_its_name(undisturbed: Whole) -> None:
    """Otherwise most of the above would only show that nothing can be begun twice."""
    late = [(name, place) for name, place in MOMENTS if undisturbed(name).place(place) > undisturbed(name).committed]
    assert len(late) >= 40
    assert {name for name, _ in late} == {*FIRST, *REPLACING}


@pytest.mark.parametrize("name", ["import", "teacher", "distill"])
def test_the_work_that_is_continued_is_there_to_be_lost(undisturbed: Whole, name: str) -> None:
    """Spools and checkpoints are among what the kills fall upon."""
    wanted = "spool/bucket-" if name == "import" else "last.ckpt/state.json"
    assert any(wanted in event for event, _ in undisturbed(name).events)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        *((name, "0.4", "manifest") for name in FIRST),
        *((f"{name}-overwrite", "aside", "0.6") for name in ("import", "select")),  # what was set aside is still the old artefact
        *((f"{name}-overwrite", "last", "0.6") for name in ("index", "cache")),  # it is done, but told to begin again
    ],
)
def test_killed_twice(undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str, first: str, second: str) -> None:
    """And killed again when it goes on."""
    whole = undisturbed(name)
    workspace = whole.copy(tmp_path / "workspace")
    kill(forked, whole, workspace, moment=whole.near(first))
    kill(forked, whole, workspace, moment=whole.near(second))
    checks.stopped(whole, workspace)
    finish(forked, whole, checks, workspace)


@pytest.mark.parametrize("name", FIRST)
def test_killed_in_the_midst_of_a_write(undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str) -> None:
    """Half of the largest file is written. SIGXFSZ, whose default is death, is sent by the kernel inside write(2)."""
    whole = undisturbed(name)
    workspace = whole.copy(tmp_path / "workspace")
    kill(forked, whole, workspace, most_bytes=whole.largest // 2, signal=signal.SIGXFSZ)
    checks.stopped(whole, workspace)
    finish(forked, whole, checks, workspace)


@pytest.mark.parametrize("name", [name for name in REPLACING if name != "index-overwrite"])
def test_killed_while_replacing_and_continued_without_saying_so(
    undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str
) -> None:
    """Once the old artefact is set aside the same command without --overwrite goes on, and takes the old one away at its end."""
    whole = undisturbed(name)
    plain = [word for word in whole.scene.line if word != "--overwrite"]
    for n, place in enumerate(("0.6", "clearing")):
        workspace = whole.copy(tmp_path / str(n))
        kill(forked, whole, workspace, moment=whole.near(place))
        again = forked.run(plain, workspace)
        assert again.status == 0, again.err
        checks.ended(whole, workspace)


def test_a_stale_replacement_is_not_put_back(undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path) -> None:
    """The new cache is whole and the old one not yet gone; then the new one is to grow, and its data turn out to be damaged."""
    whole = undisturbed("cache-overwrite")
    workspace = whole.copy(tmp_path / "workspace")
    kill(forked, whole, workspace, moment=whole.near("last"))
    shard = workspace / "subsets/random-0.5-s0/shard-000000.tar"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data.replace(b"IDAT", b"iDAT"))
    refused = forked.run(["cache", "--seed", "5", "--views", "4"], workspace)
    assert (refused.status, "was changed" in refused.err) == (1, True), refused
    checks.stopped(whole, workspace)
    assert (workspace / whole.scene.makes[0] / "manifest.json").exists()
    assert not list((workspace / "logits").glob(".*"))


@pytest.mark.parametrize("place", ["0.4", "0.65", "manifest"])
def test_a_cache_that_was_to_grow_can_stay_as_it_was(undisturbed: Whole, forked: Any, kdprune: Any, tmp_path: Path, place: str) -> None:
    whole = undisturbed("grow")
    workspace = whole.copy(tmp_path / "workspace")
    kill(forked, whole, workspace, moment=whole.near(place))
    fewer = forked.run(whole.scene.before, workspace)
    assert fewer.status == 0, fewer.err
    assert "already done" in fewer.err
    there = {p.relative_to(workspace).as_posix() for p in workspace.rglob("*") if p.is_file()}
    assert there == {p.relative_to(whole.start).as_posix() for p in whole.start.rglob("*") if p.is_file()}
    assert kdprune("verify", whole.scene.makes[0], cwd=workspace).code == 0


# --- minutes, not seconds


@pytest.mark.long
@pytest.mark.parametrize("name", [*FIRST, *REPLACING])
def test_killed_at_every_moment(undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str) -> None:
    whole = undisturbed(name)
    for n, moment in enumerate(whole.events):
        workspace = whole.copy(tmp_path / str(n))
        kill(forked, whole, workspace, moment=moment)
        checks.stopped(whole, workspace)
        finish(forked, whole, checks, workspace)


@pytest.mark.long
@pytest.mark.parametrize("name", [*FIRST, *REPLACING])
def test_killed_at_any_time(undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str) -> None:
    """From outside, at times that fall upon library code too; again and again until it is done."""
    whole, times = undisturbed(name), random.Random(name)
    for n in range(10):
        workspace = whole.copy(tmp_path / str(n))
        for _ in range(3):
            ended = forked.run(whole.scene.line, workspace, seconds=times.uniform(0.01, 1.2 * whole.cpu))
            assert ended.status in (-signal.SIGKILL, 0), ended
            checks.stopped(whole, workspace)
        finish(forked, whole, checks, workspace)
