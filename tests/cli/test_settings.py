"""`kdprune.toml`: whatever is wrong with it is one line that names the file, and the section where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import _recipes
from kdprune_pipelines.teacher import TeacherConfig

from kdprune_data.formats.manifest import Manifest

Cli = Callable[..., Any]

REFUSED: list[tuple[bytes, str]] = [
    (b"[selekt]\n", "unknown section of kdprune.toml 'selekt'; did you mean 'select'?"),
    (b"model = 'resnet8'\n", "kdprune.toml: model = 'resnet8' stands outside a section: write it under its command's"),
    (b"[select]\nfrak = 1\n", "unknown option in [select] of kdprune.toml 'frak'; did you mean 'frac'?"),
    (b"[select]\nfrac = [0.1, 0.2]\n", "kdprune.toml [select]: option 'frac' is [0.1, 0.2]: expected a text"),
    (b"[select]\nfrac = 1979-05-27T07:32:00Z\n", "kdprune.toml [select]: option 'frac' is datetime.datetime(1979, 5, 27"),
    (b"[select.frac]\nx = 1\n", "kdprune.toml [select]: option 'frac' is {'x': 1}: expected a text"),
    (b"[select]\nfrac = 0\n", "kdprune.toml [select]: fraction 0 is out of range"),
    (b"[select]\nfrac = 'half'\n", "kdprune.toml [select]: fraction 'half' is not a number"),
    (b"[select]\nfrac = true\n", "kdprune.toml [select]: option 'frac' is True: expected a text"),
    (b"[select]\nmethod = 'randm'\n", "kdprune.toml [select]: unknown method 'randm'; did you mean 'random'?"),
    (b"[select]\nbalance = 'clas'\n", "kdprune.toml [select]: unknown balance 'clas'; did you mean 'class'?"),
    (b"[select]\njobs = 0\n", "kdprune.toml [select]: --jobs 0 is too small: at least 1"),
    (b"[select]\nseed = 99999999999999999999\n", "kdprune.toml [select]: --seed 99999999999999999999 is too large"),
    (b"[select]\ndata = ''\n", "kdprune.toml [select]: option 'data' is '': expected a path"),
    (b"[select]\nkeep = 'easy'\n", "none ranks here: name one with --method or --column (--keep stands in kdprune.toml [select])"),
    (
        b"[select]\nname = 'a/b'\n",
        "kdprune.toml [select]: --name 'a/b' is not a plain name: no slash, no leading dot; use --out for a folder elsewhere",
    ),
    (b"[select]\nids-only = true\nids_only = true\n", "kdprune.toml [select] gives 'ids_only' twice"),
    (b"[[select]]\n[[select]]\n", "kdprune.toml has 2 sections [[select]], and options are taken from one: leave one"),
    (b"[select]\nrecipe = 'small'\n", "unknown option in [select] of kdprune.toml 'recipe'"),
    (b"[select]\nfrac = 0.5\n[select]\n", "kdprune.toml cannot be read (Cannot declare ('select',) twice (at line 3"),
    (b"[select]\nfrac = \n", "kdprune.toml cannot be read (Invalid value (at line 2, column 8)"),
    (b"x = " + b"[" * 5000, "kdprune.toml cannot be read"),
    (b"x = 1" + b"0" * 5000, "kdprune.toml cannot be read"),
    ("[select]\nfrac = 1\n".encode("utf-16"), "kdprune.toml cannot be read ('utf-8' codec"),
]


def refusal(kdprune: Cli, folder: Path, *line: str) -> str:
    ran = kdprune("select", *(line or ("--frac", "0.5", "--name", "x", "--dry-run")), cwd=folder)
    assert ran.code == 2, ran.err
    assert "Traceback" not in ran.err
    said = [one for one in ran.err.splitlines() if one.startswith("error: ")]
    assert len(said) == 1
    return str(said[0])


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[repr(text[:40]) for text, _ in REFUSED])
def test_what_is_wrong_names_the_file(chain: Path, kdprune: Cli, tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "data").symlink_to(chain / "data")
    (tmp_path / "kdprune.toml").write_bytes(text)
    line = ("--frac", "0.5", "--dry-run") if b"name" in text else ()
    assert said in refusal(kdprune, tmp_path, *line)


def test_what_is_no_file(kdprune: Cli, tmp_path: Path) -> None:
    settings = tmp_path / "kdprune.toml"
    settings.mkdir()
    assert "kdprune.toml is a folder, where a TOML file is expected: move it away" in refusal(kdprune, tmp_path)
    settings.rmdir()
    settings.symlink_to("kdprune.toml")
    assert "kdprune.toml cannot be read (Too many levels of symbolic links)" in refusal(kdprune, tmp_path)
    settings.unlink()
    settings.symlink_to("nowhere")
    assert "kdprune.toml cannot be read (No such file or directory)" in refusal(kdprune, tmp_path)


@pytest.mark.parametrize(
    ("text", "frac"),
    [
        (b"[select]\nfrac = 0.25\n", "0.25"),
        (b"[select]\nfrac = '0.25'\n", "0.25"),
        (b"[select]\nfrac = 1\n", "1"),
        (b"[select]\nfrac = 1e-1\n", "0.1"),
        (b"\xef\xbb\xbf[select]\r\nfrac = 0.25\r\n", "0.25"),  # as editors on Windows save it
        (b"[[select]]\nfrac = 0.25\n", "0.25"),
    ],
)
def test_a_fraction_may_be_a_number_or_a_text(chain: Path, kdprune: Cli, tmp_path: Path, text: bytes, frac: str) -> None:
    (tmp_path / "data").symlink_to(chain / "data")
    (tmp_path / "kdprune.toml").write_bytes(text)
    ran = kdprune("select", "--dry-run", cwd=tmp_path)
    assert (ran.code, f"subsets/random-{frac}-s0 would be made" in ran.out) == (0, True), ran.err


@pytest.mark.parametrize(
    ("text", "line", "epochs", "steps"),
    [
        ("steps = 9", {}, None, 9),
        ("steps = 9\nepochs = 2", {}, 2, 9),  # in one place: as the command takes both
        ("steps = 9", {"epochs": 3}, 3, None),
        ("steps = 9", {"epochs": 3, "steps": 4}, 3, 4),
        ("epochs = 2", {"steps": 4}, 2, 4),
        ("steps = 9", {"recipe": "epochs.toml"}, 5, None),
        ("recipe = 'steps.toml'\nepochs = 2", {}, 2, None),
        ("recipe = 'epochs.toml'", {"recipe": "steps.toml"}, 5, 7),
    ],
)
def test_epochs_put_an_end_to_steps_of_a_lower_layer(
    tmp_path: Path, text: str, line: dict[str, Any], epochs: int | None, steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("epochs.toml").write_text("[teacher]\nepochs = 5\n")
    Path("steps.toml").write_text("[teacher]\nsteps = 7\n")
    Path("kdprune.toml").write_text(f"[teacher]\n{text}\n")
    settled = _recipes.settle("teacher", TeacherConfig, line, _recipes.read(Path("kdprune.toml")))
    assert (settled.values.get("epochs"), settled.values.get("steps")) == (epochs, steps)
    assert ("steps" in settled.origins) == (steps is not None and "steps" not in line)


def test_a_teacher_is_adopted_where_the_file_gives_steps(chain: Path, kdprune: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(chain / "data")
    (tmp_path / "kdprune.toml").write_text("[teacher]\nsteps = 9\nmodel = 'resnet8'\n")
    weights = chain / "teachers/resnet8-s0/model.safetensors"
    ran = kdprune("teacher", "--weights", weights, "--epochs", "0", cwd=tmp_path)
    assert ran.code == 0, ran.err


def test_an_option_on_the_line_is_not_said_to_stand_in_the_file(chain: Path, kdprune: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(chain / "data")
    (tmp_path / "kdprune.toml").write_text("[select]\nkeep = 'hard'\n")
    said = refusal(kdprune, tmp_path, "--frac", "0.5", "--keep", "easy")
    assert "kdprune.toml" not in said


@pytest.mark.parametrize(("command", "key"), [("import", "source"), ("index", "shards"), ("info", "artefact"), ("evaluate", "model")])
def test_what_is_always_on_the_line_is_not_taken_from_a_file(kdprune: Cli, tmp_path: Path, command: str, key: str) -> None:
    (tmp_path / "kdprune.toml").write_text(f"[{command}]\n{key} = 'x'\n")
    ran = kdprune(command, "y", cwd=tmp_path)
    assert (ran.code, f"kdprune.toml [{command}] gives '{key}', which is given on the command line: take it out" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "line", "method", "settings"),
    [
        ("method = 'ccs'\nset = ['bins=9']", "--method random", "random", None),
        ("method = 'ccs'\nset = ['bins=9']\nscores = 'scores/resnet8-s0'", "--method random", "random", None),
        ("method = 'ccs'\nset = ['bins=9']", "--method ccs", "ccs", {"bins": 9, "cut": None, "score": "aum"}),
        ("method = 'ccs'\nset = ['bins=9']", "--set bins=8", "ccs", {"bins": 8, "cut": None, "score": "aum"}),
        ("method = 'el2n'\nkeep = 'easy'\nskip_hardest = 0.1", "--method d2 --set neighbours=3", "d2", {"neighbours": 3}),
        ("keep = 'easy'", "--method el2n", "el2n", None),
        ("scores = 'f.parquet'\ncolumn = 'c'\nhard = 'high'", "--method herding", "herding", None),
        ("scores = 'f.parquet'\ncolumn = 'c'\nhard = 'high'\nkeep = 'easy'", "", "c", None),
        ("method = 'd2'\nset = { neighbours = 3 }", "--column c --scores f.parquet --hard low", "c", None),
        ("scores = 'scores/resnet8-s0'", "", "random", None),
    ],
)
def test_what_goes_with_a_method_ends_with_it(
    chain_copy: Path, kdprune: Cli, text: str, line: str, method: str, settings: dict[str, Any] | None
) -> None:
    ids = pq.read_table(chain_copy / "data/train/index.parquet")["id"]
    pq.write_table(pa.table({"id": ids, "c": list(range(len(ids)))}), chain_copy / "f.parquet")
    (chain_copy / "kdprune.toml").write_text(f"[select]\nfrac = 0.3\n{text}\n")
    ran = kdprune("select", "--name", "x", "-v", *line.split(), cwd=chain_copy)
    assert ran.code == 0, ran.err
    made = Manifest.load(chain_copy / "subsets/x").config
    assert made["method"] == method
    assert settings is None or settings.items() <= made["settings"].items()
    if method not in ("c", "el2n", "ccs", "d2") and "method" in text:
        assert "of kdprune.toml [select] goes with another method: left out" in ran.err
    assert made.get("keep", "hard") == ("easy" if "keep" in text and method in ("el2n", "c") else "hard")


def test_scores_that_are_typed_and_not_read_are_refused(chain: Path, kdprune: Cli) -> None:
    assert "--scores was given but --method is random" in refusal(
        kdprune, chain, "--frac", "0.5", "--scores", "scores/resnet8-s0", "--dry-run"
    )
