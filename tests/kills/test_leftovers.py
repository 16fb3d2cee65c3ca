"""What a power failure leaves of files that were not yet on the disk: empty, half, or full of zeros. It is made again, or refused with one
line that says what to do; nothing of it is trusted.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Whole = Callable[[str], Any]

SCENES = ("import", "teacher", "score", "select", "cache", "grow", "export", "distill")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.fixture
def killed(undisturbed: Whole, forked: Any, tmp_path: Path) -> Callable[[str], Path]:
    """The workspace of a scene that was killed just before its manifest was renamed: all that there ever is beside it is there."""

    def of(name: str) -> Path:
        whole = undisturbed(name)
        workspace = whole.copy(tmp_path / "killed")
        assert forked.run(whole.scene.line, workspace, moment=whole.near("manifest")).status == -signal.SIGKILL
        return workspace

    return of


def leftovers(workspace: Path, scene: Any) -> list[Path]:
    """One file of each kind in `.partial/`, relative to the workspace: numbers make no kinds."""
    found = sorted(p.relative_to(workspace) for made in scene.makes for p in (workspace / made / ".partial").rglob("*") if p.is_file())
    return list({re.sub(r"\d+", "0", str(path)): path for path in found}.values())


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()  # the copy is of links
    path.write_bytes(DAMAGES[how](data))


def made_or_refused(forked: Any, checks: Any, whole: Any, workspace: Path) -> None:
    """Run again: the right bytes, or one line of refusal that says what to do, after which the right bytes."""
    again = forked.run(whole.scene.line, workspace)
    if again.status:
        (line,) = [line for line in again.err.splitlines() if line.startswith("error: ")]
        assert (again.status, again.out) == (1, ""), again
        torn = re.search(r"the saved state (\S+) .*: delete that folder to train from the beginning$", line)
        assert torn, line
        shutil.rmtree(workspace / torn[1])
        again = forked.run(whole.scene.line, workspace)
    assert again.status == 0, again.err
    checks.ended(whole, workspace)


@pytest.mark.parametrize("how", ["empty", *(pytest.param(how, marks=pytest.mark.long) for how in ("half", "zeros"))])
@pytest.mark.parametrize(
    "name", ["score", "distill", *(pytest.param(n, marks=pytest.mark.long) for n in SCENES if n not in ("score", "distill"))]
)
def test_a_torn_leftover_is_not_trusted(
    undisturbed: Whole, killed: Callable[[str], Path], forked: Any, checks: Any, tmp_path: Path, name: str, how: str
) -> None:
    whole, start = undisturbed(name), killed(name)
    for n, path in enumerate(leftovers(start, whole.scene)):
        workspace = shutil.copytree(start, tmp_path / str(n))
        damage(workspace / path, how)
        made_or_refused(forked, checks, whole, workspace)


@pytest.mark.parametrize("how", ["zeros", *(pytest.param(how, marks=pytest.mark.long) for how in ("half", "empty"))])
@pytest.mark.parametrize("where", ["beside", "partial", "but identity"])
@pytest.mark.parametrize("name", SCENES)
def test_all_of_it_torn_at_once(
    undisturbed: Whole, killed: Callable[[str], Path], forked: Any, checks: Any, name: str, where: str, how: str
) -> None:
    """`partial`: what is in `.partial/`; `beside`: the files that have their names, but for what a cache that grows had before."""
    whole, workspace = undisturbed(name), killed(name)
    for made in whole.scene.makes:
        folder = workspace / made
        stands = set(whole.before.get(made, ())) | {"manifest.json", "log.txt"}
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            inside = ".partial" in path.parts and not (where == "but identity" and path.name == "identity.json")
            if inside if where != "beside" else ".partial" not in path.parts and path.relative_to(folder).as_posix() not in stands:
                damage(path, how)
    made_or_refused(forked, checks, whole, workspace)
