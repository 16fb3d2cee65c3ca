"""Odd surroundings: no HOME, an ASCII locale, a reader that has gone, a full terminal, folders of odd names."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
BARE = {"HOME": None, "USER": None, "LOGNAME": None, "LANG": None, "TMPDIR": None}
SELECT = ["select", "--frac", "0.5", "--overwrite"]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, real: Any, works: Any) -> Path:
    """A workspace with classes that are not ASCII."""
    workspace = tmp_path_factory.mktemp("named")
    for n in range(12):
        real.put(workspace / "source" / f"größe-{real.labels[n]}" / f"ü{n}.png", real.image(n))
    works(workspace, "import", "source")
    return workspace


def command(*line: str) -> list[str]:
    return [sys.executable, "-c", f"from kdprune_cli.main import main; main({list(line)!r})"]


def surroundings(change: dict[str, str | None]) -> dict[str, str]:
    changed = {key: value for key, value in (os.environ | change).items() if value is not None}
    return changed | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("change", [ASCII, BARE, ASCII | BARE], ids=["ASCII", "no HOME", "neither"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["info", "data/train"], r"größe-0"),
        (["info", "data/train", "--json"], r"größe-0"),
        (SELECT, r"kept 6 of 12"),
        (["verify", "data/train"], r"whole"),
    ],
    ids=["info", "json", "select", "verify"],
)
def test_words_that_the_terminal_cannot_show(named: Path, change: dict[str, str | None], line: list[str], said: str) -> None:
    """Shown as far as it can: never a traceback, never another exit code."""
    ran = subprocess.run(command(*line), cwd=named, env=surroundings(change), capture_output=True, check=False)
    out, err = (text.decode("utf-8", "backslashreplace") for text in (ran.stdout, ran.stderr))
    assert ran.returncode == 0, err
    assert "Traceback" not in err
    assert any(one in out for one in (said, ascii(said)[1:-1], json.dumps(said)[1:-1]))


@pytest.mark.parametrize("line", [["info", "data/train"], ["--help"], ["select", "--help"]], ids=" ".join)
def test_a_reader_that_has_gone(named: Path, line: list[str]) -> None:
    """As in `| head -0`."""
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(command(*line), cwd=named, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert ran.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_terminal_that_is_full(named: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command("info", "data/train"), cwd=named, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("closed", [False, True])
def test_words_that_cannot_be_said_do_not_stop_the_work(named: Path, closed: bool) -> None:
    """stderr is full or closed; the result still comes on stdout."""
    program = shlex.join(command(*SELECT)) + (" 2>&-" if closed else " 2>/dev/full")
    ran = subprocess.run(["sh", "-c", program], cwd=named, env=surroundings({}), stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 0
    assert "kept 6 of 12" in ran.stdout


def test_class_folders_are_utf8_in_any_locale(named: Path) -> None:
    """The same data set, not another one and no refusal."""
    ran = subprocess.run(command("import", "source"), cwd=named, env=surroundings(ASCII), capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "already done\n")


def test_a_tar_whose_name_is_not_utf8(named: Path, refuses: Any) -> None:
    (named / "tars").mkdir(exist_ok=True)
    shutil.copy(named / "data/train/shard-000000.tar", named / "tars" / "gr\udcfcn.tar")
    refuses(named, ["index", "tars", "--out", "data/odd"], 2, r"'tars/gr.udcfcn.tar': the name is not UTF-8, .*: rename it")


@pytest.mark.parametrize("name", ["with space", "größe", "日本", "a\nb", "gr\udcfcn", "'; $HOME `x` \"", "-rf", "%41", "n" * 200])
def test_a_workspace_of_an_odd_name(tmp_path: Path, real: Any, works: Any, refuses: Any, name: str) -> None:
    workspace = tmp_path / name
    workspace.mkdir()
    works(workspace, "import", real.folders(workspace / "source"))
    works(workspace, "select", "--frac", "0.5")
    works(workspace, "select", "--frac", "0.5", "--ids-only", "--name", "ids")
    for artefact in ("data/train", "subsets/random-0.5-s0", "subsets/ids"):
        works(workspace, "verify", artefact)
        works(workspace, "info", artefact)
    refuses(workspace, ["select", "--frac", "2"], 2, "fraction 2 is out of range")


@pytest.mark.parametrize("name", ["with space", "größe", "日本", "'; $HOME `x` \"", "-rf", "%41", "a:b", "n" * 200])
def test_an_artefact_of_an_odd_name(named: Path, works: Any, name: str) -> None:
    works(named, "select", "--frac", "0.5", f"--name={name}")
    works(named, "verify", f"subsets/{name}")
    shutil.rmtree(named / "subsets" / name)
