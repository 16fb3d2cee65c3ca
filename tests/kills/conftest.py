"""For runs that are killed: the fork servers, the scenes (each command: first run, growing, replacing), and what an undisturbed run makes.

A `Scene` is a command line in a workspace that holds what it needs. Its undisturbed run says which events there are, and which bytes there
must be in the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Moment = tuple[str, int]
"""An event and which occurrence of it: the run is stopped just before."""
LOG = "log.txt"
PLAIN = ("import", "index", "select", "export")
"""Commands that need no torch."""


@dataclass(frozen=True)
class Scene:
    """`line` makes the folders `makes` from the folders `needs`; `then` would read the first of them. `before`: what stood there first."""

    line: Sequence[str]
    makes: Sequence[str]
    needs: Sequence[str]
    then: Sequence[str]
    before: Sequence[str] = ()

    @property
    def replaces(self) -> bool:
        return "--overwrite" in self.line


@dataclass(frozen=True)
class Ended:
    """How a run in the fork server ended: its exit code, or minus the signal that killed it; `cpu` seconds."""

    status: int
    out: str
    err: str
    cpu: float


@dataclass(frozen=True)
class Undisturbed:
    """What a scene is when nothing happens: `start` is the workspace before it (to copy), `events` its moments, `paths` all that is there
    in the end, `bytes` and `before` what its folders hold in the end and held at the start."""

    scene: Scene
    start: Path
    events: list[Moment]
    paths: set[str]
    bytes: dict[str, Any]
    before: dict[str, Any]
    largest: int
    cpu: float

    def copy(self, to: Path) -> Path:
        """A workspace to write in: no file is ever changed in place, so links will do."""
        return Path(shutil.copytree(self.start, to, copy_function=os.link))

    @property
    def committed(self) -> int:
        """The place in `events` after which a file of the artefact has its name."""
        parts = tuple(f"rename {folder}/" for folder in self.scene.makes)
        return next(n for n, (event, _) in enumerate(self.events) if event.startswith(parts) and "/.partial/" not in event)

    def place(self, name: str) -> int:
        """A place in `events` by name: a share of the way through as text, `aside` (the old artefact is, the new one has no identity),
        `manifest` (written beside its name), `clearing` (it has its name), or `last`."""
        if name == "last":
            return len(self.events) - 1
        if name not in ("aside", "manifest", "clearing"):
            return int(float(name) * len(self.events))
        made = Path(self.scene.makes[0])
        if name == "aside":
            return self.events.index((f"open {made}/.partial/.identity.json.tmp", 1))
        renamed = f"rename {made}/manifest.json"
        return [event for event, _ in self.events].index(renamed) + (name == "clearing")

    def near(self, name: str) -> Moment:
        """The moment at a place."""
        return self.events[self.place(name)]


class Forked:
    """Fork servers, one with torch and a small one without, each started when needed. `run` starts a command line in one and waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events = folder / "events"
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def _server(self, command: str) -> subprocess.Popen[str]:
        kind = "plain" if command in PLAIN else "learning"
        if kind not in self._servers:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            program = [sys.executable, str(Path(__file__).with_name("server.py")), str(self._folder), kind]
            self._servers[kind] = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self._servers[kind]

    def run(self, line: Sequence[str], cwd: Path, *, events: bool = False, **how: Any) -> Ended:
        """`how`: as the server's page says."""
        self._events.write_bytes(b"")
        request = {"arguments": [str(a) for a in line], "cwd": str(cwd), "events": str(self._events) if events else os.devnull}
        server = self._server(line[0])
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request | how) + "\n")
        server.stdin.flush()
        return Ended(**json.loads(server.stdout.readline()))

    def events(self) -> list[Moment]:
        """Those of the last run that was asked for them."""
        return [(event, n) for event, n in map(json.loads, self._events.read_text(encoding="utf-8").splitlines())]

    def close(self) -> None:
        for server in self._servers.values():
            server.communicate()


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """The fork servers of the session."""
    servers = Forked(tmp_path_factory.mktemp("forked"))
    yield servers
    servers.close()


# --- sources large enough to be spooled


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folders/` and `rows.parquet`: 40 real digits, enlarged to 64 x 64: more than the smallest `--memory` holds, so they are spooled."""
    from sklearn.datasets import load_digits

    from kdprune_data.images import encode_png

    root = tmp_path_factory.mktemp("large")
    data = load_digits()
    pixels = np.floor(data.images[:40] * (255 / 16) + 0.5).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    images = [encode_png(np.stack([one] * 3, -1)) for one in pixels]
    for n, (image, label) in enumerate(zip(images, data.target, strict=False)):
        path = root / "folders" / str(label) / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    rows = [{"bytes": image, "path": f"{n:03d}.png"} for n, image in enumerate(images)]
    pq.write_table(pa.table({"image": rows, "label": data.target[:40].tolist()}), root / "rows.parquet", row_group_size=16)
    return root


# --- the scenes


@pytest.fixture(scope="session")
def scenes(chain: Path, large: Path) -> dict[str, Scene]:
    """Every command that makes something: its first run; `-overwrite`, which replaces what other settings made; and a cache that grows."""
    shards = sorted(str(p) for p in (chain / "data/train").glob("*.tar"))
    spooled = ["--holdout", "0.2", "--shard-samples", "8", "--memory", "1000000"]
    data, taught = ("data",), ("data", "teachers", "scores", "subsets")
    teacher, student = (
        ["--model", "resnet8", "--epochs", "3", "--batch", "32", "--keep-epochs", "2"],
        ["--model", "resnet8", "--batch", "16"],
    )
    cache, cached = ["cache", "--seed", "5"], ("data", "teachers", "subsets", "logits")
    subset = "random-0.5-s0"
    scored, drawn = "scores/resnet8-s0", f"logits/{subset}--resnet8-s0"
    found = {
        "import": Scene(["import", f"{large}/folders", *spooled], ("data/train", "data/val"), (), ["teacher", "--data"]),
        "parquet": Scene(["import", f"{large}/rows.parquet", *spooled], ("data/train", "data/val"), (), ["teacher", "--data"]),
        "index": Scene(["index", *shards], ("data/train",), (), ["teacher", "--data"]),
        "teacher": Scene(["teacher", *teacher], ("teachers/resnet8-s0",), data, ["score", "--teacher"]),
        "score": Scene(
            ["score", "--embedding", "--logits"], (scored,), ("data", "teachers"), ["select", "--frac", "1", "--method", "aum", "--scores"]
        ),
        "also": Scene(
            ["score", "--also", "density", "--logits"],
            (scored,),
            ("data", "teachers"),
            ["select", "--frac", "1", "--method", "aum", "--scores"],
        ),
        "proxies": Scene(
            ["score", "--proxies", "2", "--epochs", "1"],
            (f"{scored}-p2-e1", "proxies/resnet8-s0-e1-p0", "proxies/resnet8-s0-e1-p1"),
            ("data", "teachers"),
            ["select", "--frac", "1", "--method", "aum", "--scores"],
        ),
        "select": Scene(
            ["select", "--frac", "0.5", "--method", "el2n", "--shard-samples", "20"],
            ("subsets/el2n-0.5-s0",),
            ("data", "scores"),
            ["distill", "--logits", "none"],
        ),
        "cache": Scene([*cache, "--views", "2"], (drawn,), taught, ["distill", "--logits"]),
        "export": Scene(["export", "-j", "1"], (f"exports/{subset}--resnet8-s0",), cached, ["distill", "--logits"]),
        "distill": Scene(["distill", *student, "--epochs", "2", "--name", "x"], ("students/x",), cached, ["evaluate"]),
    }
    other = {
        "import": ["--seed", "1"],
        "index": ["--on-bad", "keep"],
        "teacher": ["--lr", "0.05"],
        "score": ["--batch", "7"],
        "select": ["--shard-samples", "10"],
        "cache": ["--dtype", "float32"],
        "export": ["--views", "1"],
        "distill": ["--temperature", "2"],
    }
    for name, changed in other.items():
        first = found[name]
        line, before = [*first.line, "--overwrite"], [*first.line, *changed]
        found[f"{name}-overwrite"] = Scene(line, first.makes, first.needs, first.then, before)
    first = found["cache"]
    found["grow"] = Scene([*cache, "--views", "4"], first.makes, first.needs, first.then, first.line)
    return found


@pytest.fixture(scope="session")
def undisturbed(
    forked: Forked, scenes: dict[str, Scene], chain: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Undisturbed]:
    """A scene's undisturbed run, made once."""
    found: dict[str, Undisturbed] = {}

    def of(name: str) -> Undisturbed:
        if name not in found:
            found[name] = _undisturbed(forked, scenes[name], chain, tmp_path_factory.mktemp(name))
        return found[name]

    return of


def _undisturbed(forked: Forked, scene: Scene, chain: Path, root: Path) -> Undisturbed:
    start, end = root / "start", root / "end"
    start.mkdir()
    for needed in scene.needs:
        shutil.copytree(chain / needed, start / needed, ignore=shutil.ignore_patterns(*(Path(m).name for m in scene.makes if m in needed)))
    for made in scene.makes:
        shutil.rmtree(start / made, ignore_errors=True)
    if scene.before:
        ran = forked.run(scene.before, start)
        assert ran.status == 0, ran.err
    before = held(start, scene)
    shutil.copytree(start, end)
    ran = forked.run(scene.line, end, events=True)
    assert ran.status == 0, ran.err
    largest = max(p.stat().st_size for made in scene.makes for p in (end / made).rglob("*") if p.is_file())
    return Undisturbed(scene, start, forked.events(), paths_in(end), held(end, scene), before, largest, ran.cpu)


def paths_in(workspace: Path) -> set[str]:
    """All that is there, folders too."""
    return {p.relative_to(workspace).as_posix() for p in workspace.rglob("*")}


def held(workspace: Path, scene: Scene) -> dict[str, Any]:
    """What the folders of a scene hold, but for when it was made: the sha256 of each file, and what the manifest says."""
    return {made: _bytes_of(workspace / made) for made in scene.makes if (workspace / made / "manifest.json").exists()}


def _bytes_of(folder: Path) -> dict[str, Any]:
    files = [p for p in folder.rglob("*") if p.is_file() and ".partial" not in p.parts and p.name not in ("manifest.json", LOG)]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["side"] = [f for f in manifest["side"] if f["path"] != LOG]
    said = {key: value for key, value in manifest.items() if key not in ("made", "sha256")}
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} | {"manifest": said}


# --- what must hold after a kill, and in the end


class Checks:
    """What is asserted of a workspace in which a run was stopped."""

    def __init__(self, kdprune: Callable[..., Any]) -> None:
        self._kdprune = kdprune

    def stopped(self, whole: Undisturbed, workspace: Path) -> None:
        """No lock is held; what is finished is whole, the old or the new; what is not is read by no command; what is replaced is kept."""
        for lock in workspace.rglob("lock"):
            assert _is_free(lock)
        for made in whole.scene.makes:
            if (workspace / made / "manifest.json").exists():
                assert held(workspace, whole.scene)[made] in (whole.before.get(made), whole.bytes[made]) or whole.scene.line[0] == "cache"
                self._verified(workspace, made)
            else:
                self._refused(whole, workspace, made)

    def _refused(self, whole: Undisturbed, workspace: Path, made: str) -> None:
        begun = (workspace / made / ".partial").is_dir()
        says = "is unfinished: run the command that makes it again, it continues" if begun else "does not exist|holds no manifest.json"
        lines = [["info", made], ["verify", made]] + ([[*whole.scene.then, made]] if made == whole.scene.makes[0] else [])
        for line in lines:
            ran = self._kdprune(*line, cwd=workspace)
            assert (ran.code, ran.out) == (2, ""), ran
            assert re.search(rf"^error: .*{Path(made).name}.* ({says})", ran.err, re.MULTILINE), ran.err
        aside = Path(made).with_name(f".{Path(made).name}.replaced")
        if whole.scene.replaces:
            self._verified(workspace, str(aside))
            assert _bytes_of(workspace / aside) in (whole.before[made], whole.bytes[made])

    def ended(self, whole: Undisturbed, workspace: Path) -> None:
        """The bytes of an undisturbed run, nothing left over, and `verify` is content."""
        assert held(workspace, whole.scene) == whole.bytes
        assert paths_in(workspace) == whole.paths
        for made in whole.scene.makes:
            self._verified(workspace, made)

    def _verified(self, workspace: Path, folder: str) -> None:
        ran = self._kdprune("verify", folder, cwd=workspace)
        assert ran.code == 0, ran.out + ran.err


def _is_free(lock: Path) -> bool:
    """Nobody holds it, or will in a moment: a child that was just being forked holds it until it is another program."""
    for _ in range(100):
        with lock.open("rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="session")
def checks(kdprune: Callable[..., Any]) -> Checks:
    """What is asserted of a workspace in which a run was stopped."""
    return Checks(kdprune)
