"""Ctrl-C and SIGTERM at any moment of any command: one line that says how to go on, and going on gives the bytes of an undisturbed run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCENES = ("import", "index", "teacher", "score", "select", "cache", "grow", "export", "distill", "import-overwrite", "cache-overwrite")
MOMENTS = [
    *((name, "0.4", signal.SIGINT) for name in SCENES),
    *((name, "manifest", signal.SIGINT) for name in ("import", "teacher", "grow", "cache-overwrite")),
    *((name, "0.6", signal.SIGTERM) for name in ("import", "teacher", "cache-overwrite")),
]

Whole = Callable[[str], Any]


def interrupt(undisturbed: Whole, forked: Any, checks: Any, workspace: Path, *, moment: Any) -> None:
    name, place, number = moment
    whole = undisturbed(name)
    whole.copy(workspace)
    stopped = forked.run(whole.scene.line, workspace, moment=whole.near(place) if isinstance(place, str) else place, signal=number)
    assert (stopped.status, stopped.out) == (128 + number, ""), stopped
    assert stopped.err.splitlines()[-1] == "interrupted: run the same command again to continue"
    assert "Traceback" not in stopped.err
    checks.stopped(whole, workspace)
    again = forked.run(whole.scene.line, workspace)
    assert again.status == 0, again.err
    checks.ended(whole, workspace)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]}-{moment[1]}-{moment[2].name}")
def test_a_run_that_was_interrupted_ends_in_the_same_bytes(
    undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, moment: tuple[str, str, int]
) -> None:
    interrupt(undisturbed, forked, checks, tmp_path / "workspace", moment=moment)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENES)
def test_interrupted_at_every_moment(undisturbed: Whole, forked: Any, checks: Any, tmp_path: Path, name: str) -> None:
    for n, moment in enumerate(undisturbed(name).events):
        interrupt(undisturbed, forked, checks, tmp_path / str(n), moment=(name, moment, signal.SIGINT))
