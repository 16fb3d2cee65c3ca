"""`completion`, and what the shells then ask: with the environment variables that their scripts set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kdprune_cli.completion import SHELLS, VARIABLE
from kdprune_cli.main import COMMANDS, call
from kdprune_pipelines.select import SelectConfig

QUESTIONS = [
    ("kdprune-data ", set(COMMANDS)),
    ("kdprune-data ca", {"cache"}),
    ("kdprune-data nonsense", set()),
    ("kdprune-data --de", {"--debug"}),
    ("kdprune-data select --f", {"--frac"}),
    ("kdprune-data select --balance ", {"class", "uniform", "none"}),
    ("kdprune-data select --frac 0.5 --balance u", {"uniform"}),
    ("kdprune-data select --method her", {"herding"}),
    ("kdprune-data select --method den", {"density"}),
    ("kdprune-data -v import --split t", {"train", "test"}),
    ("kdprune-data completion ", set(SHELLS)),
]
FOLDERS = ["info ", "verify sub", "evaluate ", "cache ", "distill ", "select ", "teacher --data ", "score --teacher ", "distill --logits "]
EITHER = ["import ", "index ", "select --scores ", "select --keys ", "teacher --weights "]


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> list[list[str]]:
    """What the bash script is told for a line that is being typed: (kind, text) each."""
    monkeypatch.setenv(VARIABLE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
    assert call([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [answer.split(",", 1) for answer in out.splitlines() if answer]


@pytest.mark.parametrize(("line", "answers"), QUESTIONS, ids=[line for line, _ in QUESTIONS])
def test_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, answers: set[str]) -> None:
    told = ask(monkeypatch, capsys, line)
    assert {text for _, text in told} == answers
    assert {kind for kind, _ in told} <= {"plain"}


def test_all_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = {text for _, text in ask(monkeypatch, capsys, "kdprune-data select --")}
    fields = {"--" + name.replace("_", "-") for name in SelectConfig.__dataclass_fields__} - {"--data"}  # DATA has no dashes
    assert told == fields | {"--json", "--verbose", "--debug", "--help"}


@pytest.mark.parametrize(("line", "kind"), [(line, "dir") for line in FOLDERS] + [(line, "file") for line in EITHER])
def test_paths_are_left_to_the_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, kind: str) -> None:
    typed = line.rpartition(" ")[2]
    assert ask(monkeypatch, capsys, f"kdprune-data {line}") == [[kind, typed]]


def test_nothing_heavy_is_loaded() -> None:
    """An answer that takes seconds is worse than none."""
    code = "import sys\nfrom kdprune_cli.main import call\ncall([])\nassert not {'torch', 'sklearn'} & set(sys.modules)\n"
    typed = {VARIABLE: "bash_complete", "COMP_WORDS": "kdprune-data distill --", "COMP_CWORD": "2"}
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | typed, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "plain,--alpha" in ran.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts(capsys: pytest.CaptureFixture[str], tmp_path: Path, shell: str) -> None:
    """Each names the variable and the program; a shell that is there takes it."""
    assert call(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{VARIABLE}={shell}_complete" in script
    assert "kdprune-data" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        ran = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
