"""README.md works as it stands: its blocks are run in order in one workspace of real digits.

Left out by rule: blocks that install something, and pictures (no language). A block of TOML says in its first line which file it is.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kdprune_cli.main import module_of

from kdprune_data.config import Config

Cli = Callable[..., Any]
README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
INSTALLS = re.compile(r"\bpip install\b|\bgit clone\b")


@pytest.fixture
def workspace(tmp_path: Path, few_digits: Path) -> Path:
    """What README.md takes for granted: images to train on and to test with."""
    shutil.copytree(few_digits / "train", tmp_path / "photos")
    shutil.copytree(few_digits / "test", tmp_path / "photos-test")
    return tmp_path


def bash(text: str, workspace: Path) -> None:
    """Lines that are more than a command of ours, in a shell whose home is the workspace."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"HOME": str(workspace), "PATH": path}
    ran = subprocess.run(["bash", "-euc", text], cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, ""), text


def shell(text: str, workspace: Path, kdprune: Cli) -> None:
    for line in text.splitlines():
        if not line.startswith("kdprune-data "):
            bash(line, workspace)
            continue
        ran = kdprune(*shlex.split(line, comments=True)[1:], cwd=workspace)
        assert ran.code == 0, f"{line}\n{ran.err}"
        assert ran.out.strip(), line


def python(text: str, workspace: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", text]
    ran = subprocess.run(command, cwd=workspace, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_readme(workspace: Path, kdprune: Cli) -> None:
    """Every block, in order. A `kdprune.toml` is only checked: it would change what follows."""
    run = 0
    for language, text in BLOCKS:
        if language == "sh" and not INSTALLS.search(text):
            shell(text, workspace, kdprune)
        elif language == "python":
            python(text, workspace)
        elif language == "toml":
            name = text.splitlines()[0].removeprefix("# ")
            (workspace / name).write_text(text)
            if name == "kdprune.toml":
                (workspace / name).unlink()
                check_settings(text)
        else:
            continue
        run += 1
    assert run >= 6
    assert (workspace / ".bashrc").read_text().count("completion bash") == 1
    bash(". ~/.bashrc; complete -p kdprune-data", workspace)


def check_settings(text: str) -> None:
    """Each section is a command's, with options that it has and values that they take."""
    for name, values in tomllib.loads(text).items():
        module = vars(importlib.import_module(module_of(name)))
        config = next(v for v in module.values() if inspect.isclass(v) and issubclass(v, Config) and v is not Config)
        config.from_dict(values)


def test_blocks_are_told_apart() -> None:
    """Every block has a language that is run, or none; and those that install are the first two."""
    assert {language for language, _ in BLOCKS} <= {"", "sh", "python", "toml"}
    assert [bool(INSTALLS.search(text)) for language, text in BLOCKS if language == "sh"][:3] == [True, True, False]
