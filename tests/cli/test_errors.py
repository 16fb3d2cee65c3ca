"""Wrong command lines: exit code 2, one line that says what to do, nothing made. Interruptions, settings from a file, and `--json`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from kdprune_cli.main import COMMANDS, call, group

from kdprune_data.formats.manifest import Manifest

Cli = Callable[..., Any]
SUBSET, CACHE = "subsets/random-0.5-s0", "logits/random-0.5-s0--resnet8-s0"
STUDENT = "students/random-0.5-s0--resnet8-a0.6204-s0"


def listing(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def refused(kdprune: Cli, folder: Path, line: list[Any], code: int = 2) -> str:
    """The message of a command that ends in `code`: one line, no traceback, nothing on stdout, nothing made."""
    before = listing(folder)
    ran = kdprune(*line, cwd=folder)
    lines = [one for one in ran.err.splitlines() if one.startswith("error: ")]
    assert ran.code == code, ran.err
    assert len(lines) == 1, ran.err
    assert ran.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in ran.err
    assert "report it" not in lines[0]  # what an error that nobody thought of says
    assert ran.out == ""
    assert listing(folder) == before
    check_advice(lines[0], [str(one) for one in line])
    return lines[0].removeprefix("error: ")


def check_advice(said: str, line: list[str]) -> None:
    """What a refusal tells to use is an option of the command (or of the one in backticks, or what was typed)."""
    if line[0] not in COMMANDS:
        return
    for other in re.findall(r"`kdprune-data (.*?)`", said):
        assert set(re.findall(r"(?<!\w)--[a-z][a-z-]*", other)) <= options(other.split()[0]), said
    own = set(re.findall(r"(?<!\w)--[a-z][a-z-]*", re.sub(r"`.*?`", "", said)))
    assert own <= options(line[0]) | {one for one in line if one.startswith("--")}, said


def options(name: str) -> set[str]:
    command = group.get_command(click.Context(group), name)  # type: ignore[attr-defined]  # click hides that this is a Group
    assert command is not None
    return {"--help", *(flag for parameter in command.params for flag in parameter.opts)}


# --- in an empty workspace

EMPTY: list[tuple[list[str], str]] = [
    (["nonsense"], "unknown command 'nonsense'; known: cache, completion, demo,"),
    (["selct"], "unknown command 'selct'; did you mean 'select'?"),
    (["completion"], "Missing argument"),
    (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    (["--nonsense"], "--nonsense"),
    (["teacher", "--epochz", "3"], "--epochz"),
    (["teacher", "extra"], "extra argument (extra) (see kdprune-data teacher --help)"),
    (["teacher", "--epochs"], "Option '--epochs' requires an argument"),
    (["teacher", "--epochs", "three"], "'three' is not a valid integer"),
    (["teacher", "--epochs", "-1"], "--epochs -1 is too small: at least 0"),
    (["teacher", "--steps", "0"], "--steps 0 is too small: at least 1"),
    (["teacher", "--batch", "0"], "--batch 0 is too small: at least 1"),
    (["teacher", "--lr", "-1"], "--lr -1.0 is too small: at least 0"),
    (["teacher", "--lr", "nan"], "--lr nan is not a finite number"),
    (["teacher", "--seed", "-1"], "--seed -1 is too small: at least 0"),
    (["teacher", "--seed", "2147483648"], "--seed 2147483648 is too large: at most 2,147,483,647"),
    (["teacher", "--jobs", "0"], "--jobs 0 is too small: at least 1"),
    (["teacher", "--flip", "maybe"], "'maybe' is not one of 'auto', 'on', 'off'"),
    (["teacher", "--device", "tpu"], "'tpu' is not one of"),
    (["teacher"], "no data/train here: run `kdprune-data import SOURCE --split train` first, or give a folder with --data"),
    (["teacher", "--data", "nowhere"], "nowhere does not exist: expected a finished dataset or subset"),
    (["teacher", "--weights", "nowhere.pth"], "--epochs 0 adopts a teacher: it goes with --weights FILE"),
    (["teacher", "--weights", "nowhere.pth", "--epochs", "0"], "--weights nowhere.pth does not exist"),
    (["score"], "no data/train here"),
    (["pick", "nowhere.parquet", "--frac", "0.5"], "nowhere.parquet does not exist: give a Parquet file, or a folder of them"),
    (["pick", "nowhere.parquet"], "say what to keep: --frac FRACTION (above 0, at most 1)"),
    (["select", "--frac", "0.5"], "no data/train here: run `kdprune-data import SOURCE --split train` first, or give a folder with DATA"),
    (["select"], "say what to keep: either --frac FRACTION (above 0, at most 1) or --keys FILE"),
    (["cache"], "no fitting subset in subsets/: run `kdprune-data select` first, or give a folder with SUBSET"),
    (["cache", "nowhere"], "nowhere does not exist"),
    (["export"], "no fitting subset in subsets/: run `kdprune-data select` first, or give a folder with SUBSET"),
    (["export", "nowhere"], "nowhere does not exist"),
    (["distill"], "no fitting subset in subsets/"),
    (["distill", "nowhere"], "nowhere does not exist"),
    (["evaluate"], "Missing argument 'MODEL'"),
    (["evaluate", "nowhere"], "nowhere does not exist: expected a finished model"),
    (["info"], "Missing argument 'ARTEFACT'"),
    (["info", "."], "holds no manifest.json"),
    (["verify"], "Missing argument 'ARTEFACT'"),
    (["verify", "nowhere"], "nowhere does not exist"),
    (["import"], "Missing argument 'SOURCE"),
    (["import", "nowhere"], "nowhere"),
    (["import", "digits", "--split", "dev"], "'dev' is not one of 'train', 'val', 'test'"),
    (["import", "digits", "--split", "val"], "digits has no split 'val'"),
    (["import", "digits", "--holdout", "0"], "--holdout 0 is no fraction to set apart as val"),
    (["import", "digits", "--holdout", "1"], "--holdout 1 sets 1,438 of 1,438 samples apart: train and val need at least one each"),
    (["import", "digits", "--holdout", "0.1", "--split", "test"], "--holdout goes with --split train"),
    (["index"], "Missing argument 'SHARDS...'"),
    (["index", "nowhere.tar"], "no such file: 'nowhere.tar'"),
    (["run"], "recipe"),
    (["run", "nowhere.toml"], "nowhere.toml"),
    (["demo", "--seeds", "1"], "--seeds 1 is too small: at least 2"),
]


@pytest.mark.parametrize(("line", "said"), EMPTY, ids=[" ".join(line) for line, _ in EMPTY])
def test_in_an_empty_workspace(tmp_path: Path, kdprune: Cli, line: list[str], said: str) -> None:
    assert said in refused(kdprune, tmp_path, line)


def test_every_command_is_in_the_table() -> None:
    assert {line[0] for line, _ in EMPTY} >= set(COMMANDS)


# --- in a full one

FULL: list[tuple[list[str], str]] = [
    (["select", "--frac", "0"], "fraction 0 is out of range: give the fraction to keep, above 0 and at most 1"),
    (["select", "--frac", "1.5"], "fraction 1.5 is out of range"),
    (["select", "--frac", "-0.1"], "fraction -0.1 is out of range"),
    (["select", "--frac", "abc"], "fraction 'abc' is not a number"),
    (["select", "--frac", "nan"], "fraction nan is out of range"),
    (["select", "--frac", "0.001"], "keeps none"),
    (["select", "--frac", "0.5", "--method", "randm"], "unknown method 'randm'; did you mean 'random'?"),
    (["select", "--frac", "0.5", "--method", "forgeting"], "did you mean 'forgetting'?"),
    (["select", "--frac", "0.5", "--out", "a", "--name", "b"], "--out and --name were both given"),
    (["select", "--frac", "0.5", "--name", "a/b"], "--name 'a/b' is not a plain name"),
    (["select", "--frac", "0.5", "--name", ".a"], "--name '.a' is not a plain name"),
    (["select", "--frac", "0.5", "--name", ""], "--name is empty: give a value, or leave it out"),
    (["select", "--frac", "0.5", "--balance", "odd"], "'odd' is not one of"),
    (["select", "--frac", "0.5", "--keys", "ids.txt"], "--frac and --keys were both given: --keys keeps exactly the ids listed; give one"),
    (["teacher", "--model", "resnet-20"], "unknown model 'resnet-20'; did you mean 'resnet20'?"),
    (["teacher", "--model", "resnet8", "--size", "0"], "--size 0 is too small"),
    (["teacher", "--model", "vit_b_16"], "cannot read images of 8 pixels"),
    (["teacher", "--model", "nowhere_at_all:tiny", "--steps", "1"], "your own function 'nowhere_at_all:tiny' failed: ModuleNotFoundError"),
    (["teacher", "--model", "resnet8", "--mean", "0.5", "0.5", "0.5"], "--mean and --std go together"),
    (["teacher", "--model", "resnet8", "--epochs", "2", "--keep-epochs", "3"], "--keep-epochs 3 is after the end: training has 2 epochs"),
    (["teacher", "--model", "resnet8", "--epochs", "2", "--out", "a", "--name", "b"], "--out and --name were both given"),
    (["teacher", "--data", "teachers/resnet8-s0"], "is of kind model: expected dataset or subset"),
    (["score", "--teacher", STUDENT, "--out", "a", "--name", "b"], "--out and --name were both given"),
    (["score", "--teacher", "data/train"], "is of kind dataset: expected model"),
    (["cache", "--views", "0"], "--views 0 is too small: at least 1"),
    (["cache", "--views", "10001"], "--views 10001 is too large: at most 10,000"),
    (["cache", "--dtype", "int8"], "'int8' is not one of"),
    (["cache", "--seed", "18446744073709551616", "--name", "other"], "seed 18446744073709551616 is"),
    (["cache", "data/train", "--teacher", SUBSET], "is of kind subset: expected model"),
    (["cache", "--out", "a", "--name", "b"], "--out and --name were both given"),
    (["export", "--out", "a", "--name", "b"], "--out and --name were both given"),
    (["export", "--views", "9"], "has 3 views, 9 are asked for: make more with cache --views 9"),
    (["export", "data/train"], "no fitting logit cache in logits/: run `kdprune-data cache` first, or give a folder with --logits"),
    (["distill", "--alpha", "2"], "--alpha 2 is out of range"),
    (["distill", "--model", "resnet"], "unknown model 'resnet'"),
    (["distill", "--logits", "data/train"], "is of kind dataset: expected logits"),
    (["distill", "--steps", "1", "--out", "a", "--name", "b"], "--out and --name were both given"),
    (["evaluate", CACHE], "is of kind logits: expected model"),
    (["import", "digits", "--split", "train"], "was made with other settings"),
]


@pytest.mark.parametrize(("line", "said"), FULL, ids=[" ".join(line) for line, _ in FULL])
def test_in_a_full_workspace(chain: Path, kdprune: Cli, line: list[str], said: str) -> None:
    assert said in refused(kdprune, chain, line)


@pytest.mark.parametrize(
    ("folder", "line", "option"),
    [
        ("subsets", ["cache"], "SUBSET"),
        ("subsets", ["distill"], "SUBSET"),
        ("teachers", ["score"], "--teacher"),
        ("teachers", ["cache"], "--teacher"),
        ("scores", ["select", "--frac", "0.1", "--method", "el2n"], "--scores"),
        ("logits", ["distill"], "--logits"),
        ("logits", ["export"], "--logits"),
    ],
)
def test_several_candidates_are_listed_and_the_option_asked_for(
    chain_copy: Path, kdprune: Cli, folder: str, line: list[str], option: str
) -> None:
    (there,) = (chain_copy / folder).iterdir()
    shutil.copytree(there, chain_copy / folder / "zweit")
    said = refused(kdprune, chain_copy, line)
    assert said == f"several in {folder}/ fit: {there.name}, zweit; say which with {option} {folder}/NAME"


@pytest.mark.parametrize(
    "line", [["teacher", "--steps", 1], ["score"], ["cache"], ["distill", "--steps", 1], ["evaluate", STUDENT]], ids=str
)
def test_a_device_that_is_not_there(chain: Path, kdprune: Cli, line: list[Any]) -> None:
    import torch

    device = "cuda" if torch.backends.mps.is_available() else "mps"
    named = [] if line[0] == "evaluate" else ["--name", "other"]
    said = refused(kdprune, chain, [*line, *named, "--device", device])
    assert said == f"--device {device}: there is none on this machine; use --device cpu"


def test_a_folder_of_other_files_is_left_alone(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "mine").mkdir()
    (chain_copy / "mine/thesis.txt").write_text("years of work")
    for line in (
        ["teacher", "--model", "resnet8", "--steps", "1"],
        ["score"],
        ["select", "--frac", "0.5"],
        ["cache"],
        ["distill", "--model", "resnet8", "--steps", "1"],
        ["import", "digits"],
    ):
        for more in ([], ["--overwrite"]):
            said = refused(kdprune, chain_copy, [*line, "--out", "mine", *more])
            assert "mine holds files that are not an artefact" in said
    assert (chain_copy / "mine/thesis.txt").read_text() == "years of work"


def test_another_kind_of_artefact_is_left_alone(chain_copy: Path, kdprune: Cli) -> None:
    said = refused(kdprune, chain_copy, ["score", "--out", SUBSET])
    assert f"{SUBSET} holds a subset, not a scores" in said


@pytest.mark.skipif("__import__('os').geteuid() == 0", reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "locked").mkdir(mode=0o500)
    refused(kdprune, chain_copy, ["score", "--out", "locked/scores"], code=1)


def test_where_a_file_stands_in_the_way(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "file").write_text("x")
    for where in ("file", "file/deeper"):
        said = refused(kdprune, chain_copy, ["score", "--out", where])
        assert "file is a file, not a folder: choose another --out" in said


def test_a_traceback_only_with_debug(tmp_path: Path, kdprune: Cli) -> None:
    assert "Traceback" not in kdprune("teacher", cwd=tmp_path).err
    for line in (["--debug", "teacher"], ["teacher", "--debug"]):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 2
        assert "Traceback" in ran.err
        assert ran.err.splitlines()[-1].startswith("error: no data/train here")


@pytest.mark.parametrize("line", [["-v", "select"], ["select", "-v"], ["--verbose", "select", "-v"]], ids=" ".join)
def test_details_with_verbose(chain_copy: Path, kdprune: Cli, line: list[str]) -> None:
    """Each file written, once, with the time; and no more of it after that command."""
    ran = kdprune(*line, "--frac", "0.1", cwd=chain_copy)
    assert ran.code == 0, ran.err
    wrote = re.findall(r"^\d\d:\d\d:\d\d wrote subsets/random-0.1-s0/(\S+): [\d,]+ bytes, sha256 [0-9a-f]{64}$", ran.err, re.MULTILINE)
    assert {"shard-000000.tar", "index.parquet", "selection.parquet"} <= set(wrote)
    assert len(wrote) == len(set(wrote))
    assert ran.err.count("train: data/train") == 1
    assert re.search(r" select: frac = 0\.1$", ran.err, re.MULTILINE)
    assert re.search(r" read data/train: dataset, digest [0-9a-f]{64}, content [0-9a-f]{64}$", ran.err, re.MULTILINE)
    assert "wrote" not in kdprune("select", "--frac", "0.2", cwd=chain_copy).err


# --- kdprune.toml

BAD_SETTINGS = [
    ("[teacherr]\nepochs = 3\n", "unknown section of kdprune.toml 'teacherr'; did you mean 'teacher'?"),
    ("[select]\nfraction = 0.5\n", "unknown option in [select] of kdprune.toml 'fraction'; did you mean 'frac'?"),
    ("[select]\nfrac = \n", "kdprune.toml cannot be read"),
    ("frac = 0.5\n", "kdprune.toml: frac = 0.5 stands outside a section: write it under its command's"),
    ("select = 0.5\n", "kdprune.toml: select = 0.5 stands outside a section"),
    ('[select]\nseed = "three"\n', "option 'seed' is 'three': expected a whole number"),
    ("[select]\nseed = 1.5\n", "option 'seed' is 1.5: expected a whole number"),
    ("[select]\nseed = true\n", "option 'seed' is True: expected a whole number"),
    ("[select]\nseed = -1\n", "--seed -1 is too small"),
    ("[select]\nids_only = 1\n", "option 'ids_only' is 1: expected true or false"),
    ('[select]\nbalance = "odd"\n', "unknown balance 'odd'"),
    ("[select]\nfrac = 1.5\n", "fraction 1.5 is out of range"),
    ("[select]\nfrac = 1.5\n[distill]\n[teacher\n", "kdprune.toml cannot be read"),
]


@pytest.mark.parametrize(("text", "said"), BAD_SETTINGS, ids=[text for text, _ in BAD_SETTINGS])
def test_bad_settings(chain_copy: Path, kdprune: Cli, text: str, said: str) -> None:
    (chain_copy / "kdprune.toml").write_text(text)
    assert said in refused(kdprune, chain_copy, ["select"])


def test_settings_that_are_no_text(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "kdprune.toml").write_bytes(b"[select]\nname = '\xff'\n")
    assert "kdprune.toml cannot be read" in refused(kdprune, chain_copy, ["select"])


def test_a_number_as_text_would_be_taken_for_one(chain_copy: Path, kdprune: Cli) -> None:
    """A fraction is text to us, so that it is read as a decimal: a TOML number must not pass through a binary one."""
    (chain_copy / "kdprune.toml").write_text("[select]\nfrac = 0.1\n")
    assert kdprune("select", cwd=chain_copy).code == 0
    assert Manifest.load(chain_copy / "subsets/random-0.1-s0").config["frac"] == "0.1"


def test_settings_are_used_and_overridden(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "kdprune.toml").write_text(
        "[select]\nfrac = 0.25\nids-only = true\n\n"
        '[distill]\nmodel = "resnet14"\nsteps = 2\nalpha = 0.5\nkeep_epochs = [1]\nlogits = "none"\n'
    )
    assert kdprune("select", cwd=chain_copy).code == 0
    made = Manifest.load(chain_copy / "subsets/random-0.25-s0")
    assert (made.config["frac"], made.config["ids_only"]) == ("0.25", True)
    assert kdprune("select", "--frac", "0.75", cwd=chain_copy).code == 0
    assert Manifest.load(chain_copy / "subsets/random-0.75-s0").config["ids_only"] is True
    ran = kdprune("distill", SUBSET, "--model", "resnet8", "--alpha", "0", "--batch", "54", "--name", "mixed", cwd=chain_copy)
    assert ran.code == 0, ran.err
    config = Manifest.load(chain_copy / "students/mixed").config
    assert (config["architecture"]["name"], config["recipe"]["steps"], config["alpha"]) == ("resnet8", 2, 0.0)
    assert (chain_copy / "students/mixed/epoch-001.safetensors").exists()
    assert kdprune("info", SUBSET, cwd=chain_copy).code == 0  # a command without a section


# --- interruption


def test_ctrl_c_says_how_to_continue(chain_copy: Path, started: Cli, kdprune: Cli) -> None:
    line = ["teacher", "--model", "resnet8", "--epochs", 500, "--batch", 16, "--name", "long"]
    running = started(*line, cwd=chain_copy)
    while not (chain_copy / "teachers/long/dynamics/epoch-002.parquet").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err.splitlines()[-1] == "interrupted: run the same command again to continue"
    assert "Traceback" not in err
    assert out == ""
    assert not (chain_copy / "teachers/long/manifest.json").exists()
    said = refused(kdprune, chain_copy, ["score", "--teacher", "teachers/long"])
    assert "teachers/long is unfinished: run the command that makes it again, it continues" in said


# --- --json

ONE_OBJECT = [
    ["import", "digits", "--out", "elsewhere/train"],
    ["index", "data/train/shard-000000.tar", "--out", "adopted"],
    ["teacher", "--model", "resnet8", "--steps", "1", "--batch", "54", "--name", "quick"],
    ["score", "--name", "more"],
    ["select", "--frac", "0.1"],
    ["cache", "--views", "1", "--name", "one"],
    ["distill", "--model", "resnet8", "--steps", "1", "--batch", "54", "--name", "quick"],
    ["evaluate", STUDENT],
    ["info", STUDENT],
    ["verify", CACHE],
    ["run", "--list"],
    ["completion", "bash"],
]


@pytest.mark.parametrize("line", ONE_OBJECT, ids=[line[0] for line in ONE_OBJECT])
def test_json_is_one_object_and_nothing_else(chain_copy: Path, kdprune: Cli, line: list[str]) -> None:
    for _ in range(2):  # done, and already done
        ran = kdprune(*line, "--json", cwd=chain_copy)
        assert ran.code == 0, ran.err
        assert ran.out.count("\n") == 1
        assert isinstance(json.loads(ran.out), dict)
        json.loads(ran.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


FAILURES = [
    (["info", "nowhere", "--json"], "UsageError", 2),
    (["--debug", "info", "nowhere", "--json"], "UsageError", 2),
    (["select", "--frak", "1", "--json"], "UsageError", 2),
    (["select", "--frac", "--json", "--json"], "UsageError", 2),
    (["selct", "--json"], "UsageError", 2),
    (["import", "nowhere.parquet", "--json"], "UsageError", 2),
    (["import", "digits", "--split", "train", "--json"], "ExistsError", 2),
    (["score", "--out", "score.parquet", "--device", "nonsense", "--json"], "UsageError", 2),
    (["import", "empty", "--out", "elsewhere/train", "--json"], "SourceError", 1),
]


@pytest.mark.parametrize(("line", "kind", "code"), FAILURES, ids=[" ".join(line) for line, _, _ in FAILURES])
def test_failures_are_one_object_too(chain_copy: Path, kdprune: Cli, line: list[str], kind: str, code: int) -> None:
    (chain_copy / "empty").mkdir()
    ran = kdprune(*line, cwd=chain_copy)
    assert ran.code == code
    said = ran.err.splitlines()[-1].removeprefix("error: ")
    assert json.loads(ran.out) == {"error": {"message": said, "exit_code": code, "type": kind}}
    assert ran.out.count("\n") == 1


def test_a_message_is_one_line_whatever_files_are_called(tmp_path: Path, kdprune: Cli) -> None:
    ran = kdprune("info", "two\nlines", "--json", cwd=tmp_path)
    assert ran.err.count("\n") == 1
    assert "two\\nlines" in json.loads(ran.out)["error"]["message"]


def test_text_goes_to_stdout_and_progress_to_stderr(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune("select", "--frac", "0.1", cwd=chain_copy)
    assert ran.out.splitlines() == [line for line in ran.out.splitlines() if line.startswith("subsets/random-0.1-s0: kept 11 of 108")]
    assert "train: data/train" in ran.err


def test_a_pipe_that_is_closed_is_no_error(chain: Path, started: Cli) -> None:
    running = started("info", STUDENT, cwd=chain)
    running.stdout.close()
    assert "Traceback" not in running.stderr.read()
    running.stderr.close()
    running.wait()


def test_call_returns_and_does_not_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["info", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_lists_and_flags_may_be_given_again(chain: Path, kdprune: Cli) -> None:
    line = "select --frac 0.5 --method ccs --set bins=9 --set cut=0 --set score=el2n --dry-run --dry-run -v -v --json --json"
    assert kdprune(*line.split(), cwd=chain).code == 0
