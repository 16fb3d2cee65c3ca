"""A run that is refused takes away what it made and puts back what it replaced. Killed while it does so, it leaves nothing that the next
run, of a source that was mended meanwhile, would trust.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

LINE = ("import", "source", "--shard-samples", "8", "-j", "1")


@pytest.fixture
def start(large: Path, forked: Any, tmp_path: Path) -> Path:
    """A workspace with a `source` of 40 images, one of which is cut off; `data/train` holds what another seed made of the whole ones."""
    root = tmp_path / "start"
    shutil.copytree(large / "folders", root / "source")
    assert forked.run([*LINE, "--seed", "1"], root).status == 0
    cut = sorted((root / "source").rglob("*.png"))[20]
    cut.write_bytes(cut.read_bytes()[:5000])
    return root


@pytest.fixture
def mended(large: Path, forked: Any, tmp_path: Path) -> Path:
    """What the whole source makes."""
    root = tmp_path / "mended"
    shutil.copytree(large / "folders", root / "source")
    assert forked.run(LINE, root).status == 0
    return root / "data/train"


def there(workspace: Path) -> list[str]:
    """All paths but that of the folder `data`, which an interrupted run may leave empty."""
    return sorted(p.relative_to(workspace).as_posix() for p in workspace.rglob("*") if p != workspace / "data")


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.long)])
def test_killed_while_it_is_refused(start: Path, mended: Path, forked: Any, kdprune: Any, digests: Any, replacing: bool, step: int) -> None:
    line = [*LINE, "--overwrite"] if replacing else LINE
    if not replacing:
        shutil.rmtree(start / "data")
    whole = shutil.copytree(start, start.with_name("undisturbed"))
    refused = forked.run(line, whole, events=True)
    assert (refused.status, there(whole)) == (1, there(start)), refused
    events = forked.events()
    first = [event for event, _ in events].index("remove data/train/.partial/identity.json")
    for n, moment in enumerate(events[first::step]):
        workspace = shutil.copytree(start, start.with_name(str(n)))
        assert forked.run(line, workspace, moment=moment).status == -signal.SIGKILL
        again = shutil.copytree(workspace, start.with_name(f"{n}-again"))
        assert forked.run(line, again).status == 1
        assert there(again) == there(start)
        shutil.rmtree(workspace / "source")
        shutil.copytree(mended.parents[1] / "source", workspace / "source")
        other = forked.run(line, workspace)
        if "holds an unfinished run with other settings" in other.err:  # nothing had been taken away yet
            other = forked.run([*LINE, "--overwrite"], workspace)
        assert other.status == 0, other.err
        assert digests(workspace / "data/train") == digests(mended)
        assert [p.name for p in (workspace / "data").iterdir()] == ["train"]
        assert kdprune("verify", "data/train", cwd=workspace).code == 0
