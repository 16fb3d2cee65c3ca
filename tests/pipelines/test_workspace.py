"""pipelines/_workspace.py: inputs by convention, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from kdprune_pipelines import _workspace

from kdprune_data.errors import UsageError
from kdprune_data.formats.build import Build
from kdprune_data.formats.identity import Identity


def made(folder: Path) -> Path:
    with Build.begin(folder, Identity("model", folder.name, {}, [])) as build:
        build.write("model.safetensors", b"weights")
        build.seal(counts={}, classes=[], content="")
    return folder


def test_the_only_candidate_is_used_and_several_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    usual = _workspace.TEACHERS
    with pytest.raises(
        UsageError, match=r"no fitting teacher in teachers/: run `kdprune-data teacher` first, or give a folder with --teacher"
    ):
        _workspace.one(None, usual, "--teacher")
    one = made(usual / "a")
    assert _workspace.one(None, usual, "--teacher") == one
    made(usual / "b")
    with pytest.raises(UsageError, match=r"several in .* fit: a, b; say which with --teacher"):
        _workspace.one(None, usual, "--teacher")
    assert _workspace.one(usual / "b", usual, "--teacher") == usual / "b"


def test_what_a_killed_replacement_left_is_not_a_candidate(tmp_path: Path) -> None:
    made(tmp_path / "teachers/.a.replaced")
    one = made(tmp_path / "teachers/a")
    assert _workspace.candidates(tmp_path / "teachers") == [one]


def test_a_damaged_sibling_does_not_stand_in_the_way(tmp_path: Path) -> None:
    one, other = made(tmp_path / "teachers/a"), made(tmp_path / "teachers/b")
    (other / "model.safetensors").unlink()
    assert _workspace.one(None, tmp_path / "teachers", "--teacher", lambda m: m.name == "a") == one


@pytest.mark.parametrize("name", ["a/b", ".hidden"])
def test_a_name_is_a_plain_one(name: str) -> None:
    with pytest.raises(UsageError, match="is not a plain name"):
        _workspace.plain_name(name)


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _workspace.place(Path(), None, Path("teachers"), "x") == (Path(), tmp_path.name)


def test_an_unfinished_split_is_not_called_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/train/.partial").mkdir(parents=True)
    with pytest.raises(UsageError, match="data/train is unfinished: run the command that makes it again, it continues"):
        _workspace.data(None, "train")
