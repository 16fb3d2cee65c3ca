"""Options and settings that are wrong, in a workspace in which every command has run: nothing is begun, nothing is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SELECT = ["select", "--frac", "0.5"]
TEACHER = ["teacher", "--model", "resnet8", "--steps", "1", "--name", "other"]
OTHER, LONG = ["teacher", "--steps", "1", "--name", "other"], ["teacher", "--model", "resnet8", "--name", "other"]
SUBSET, TEACHERS, CACHE = "subsets/random-0.5-s0", "teachers/resnet8-s0", "logits/random-0.5-s0--resnet8-s0"
STUDENT = "students/random-0.5-s0--resnet8-a0.6204-s0"
FRACTION = r"give the fraction to keep, above 0 and at most 1"
PLAIN = r"is not a plain name: no slash, no leading dot; use --out for a folder elsewhere"
EVERY = ["import", "index", "teacher", "score", "select", "pick", "cache", "distill", "evaluate", "info", "verify", "demo"]

REFUSED: list[tuple[list[str], int, str]] = [
    *((["select", "--frac", f], 2, rf"fraction {f} is out of range: {FRACTION}") for f in ("0", "-1", "1.5", "nan", "inf", "1.0000001")),
    *((["select", "--frac", f], 2, rf"fraction '{f}' is not a number: {FRACTION}") for f in ("half", "50%", "1/2", "0,5", "0x1")),
    (["select", "--frac", "1e-9"], 2, r"--frac 1E-9 of 108 samples keeps none: at least 0.0047 is needed"),
    (["select"], 2, r"say what to keep: either --frac FRACTION \(above 0, at most 1\) or --keys FILE"),
    (["selct"], 2, r"'selct'.*(did you mean 'select'|see kdprune-data --help)"),
    ([*SELECT, "--method", "randm"], 2, r"unknown method 'randm'; did you mean 'random'\? known: .*el2n"),
    ([*SELECT, "--method", "EL2N"], 2, r"unknown method 'EL2N'.*known: .*el2n"),
    ([*SELECT, "--methd", "random"], 2, r"No such option '--methd'. .*--method.* \(see kdprune-data select --help\)"),
    (["pick", "x.parquet"], 2, r"say what to keep: --frac FRACTION \(above 0, at most 1\)"),
    (["pick", "x.parquet", "--frac", "0.5"], 2, r"x.parquet does not exist: give a Parquet file, or a folder of them"),
    (["pick", "data/train", "--frac", "0.5"], 2, r"data/train is of kind dataset, and no table of scores: .*select. chooses from it"),
    ([*SELECT, "--balance", "klass"], 2, r"'klass' is not one of 'class', 'uniform', 'none'"),
    ([*SELECT, "--keep", "easy"], 2, r"--keep easy chooses an end of a score, and none ranks here: name one with --method or --column"),
    ([*SELECT, "--keys", "ids.txt"], 2, r"--frac and --keys were both given: .*; give one"),
    *(
        ([*line, ""], 2, rf"{line[-1]} is empty: give a value, or leave it out")
        for line in ([*SELECT, "--name"], [*SELECT, "--method"], ["select", "--frac"], [*OTHER, "--model"])
    ),
    ([*SELECT, "--name", "a/b"], 2, rf"--name 'a/b' {PLAIN}"),
    ([*SELECT, "--name", ".."], 2, rf"--name '..' {PLAIN}"),
    ([*SELECT, "--name", "n" * 300], 2, r"the folder name 'n+'... is 300 bytes long: at most 240 fit; choose a shorter one"),
    ([*SELECT, "--name", "ü" * 125], 2, r"the folder name 'ü+'... is 250 bytes long: at most 240 fit; choose a shorter one"),
    ([*SELECT, "--name", "b\udce4d"], 2, r"the name 'b\\udce4d' is not UTF-8: choose another --name or --out"),
    ([*SELECT, "--name", "a\nb"], 2, r"the folder name 'a\\nb' holds a control character: choose another --name or --out"),
    ([*SELECT, "--name", "a\x1b[31mb"], 2, r"the folder name 'a\\x1b\[31mb' holds a control character: choose another --name or --out"),
    ([*SELECT, "--out", "a", "--name", "b"], 2, r"--out and --name were both given: .*; give one"),
    ([*SELECT, "--seed", "-1"], 2, r"--seed -1 is too small: at least 0"),
    ([*SELECT, "--seed", str(2**64)], 2, r"seed 18446744073709551616 is (out of range|too large).*(from 0|at most)"),
    ([*SELECT, "--seed", "x"], 2, r"'x' is not a valid integer. \(see kdprune-data select --help\)"),
    ([*SELECT, "--shard-samples", "0"], 2, r"--shard-samples 0 is too small: at least 1"),
    ([*OTHER, "--model", "resnt8"], 2, r"unknown model 'resnt8'; did you mean 'resnet8'\? known: "),
    ([*OTHER, "--model", "nowhere_at_all:net"], 2, r"'nowhere_at_all:net' failed: ModuleNotFoundError"),
    ([*TEACHER, "--lr", "nan"], 2, r"--lr nan is not a finite number: give one"),
    ([*TEACHER, "--lr", "inf"], 2, r"--lr inf is not a finite number: give one"),
    ([*TEACHER, "--lr", "-1"], 2, r"--lr -1.0 is too small: at least 0"),
    ([*TEACHER, "--batch", "0"], 2, r"--batch 0 is too small: at least 1"),
    ([*LONG, "--steps", "0"], 2, r"--steps 0 is too small: at least 1"),
    ([*TEACHER, "--seed", str(2**31)], 2, r"--seed 2147483648 is too large: at most 2,147,483,647"),
    ([*TEACHER, "--size", "-8"], 2, r"--size -8 is too small: at least 1"),
    (["teacher", "--epochs", "0"], 2, r"--epochs 0 adopts a teacher: it goes with --weights FILE"),
    (["teacher", "--epochs", "0", "--weights", "nowhere.pth"], 2, r"--weights nowhere.pth does not exist: give"),
    ([*TEACHER, "--momentum", "1.5"], 2, r"--momentum 1.5 is too large: at most 0.9999"),
    ([*TEACHER, "--label-smoothing", "2"], 2, r"--label-smoothing 2.0 is too large: at most 0.999"),
    ([*TEACHER, "--ema", "1"], 2, r"--ema 1.0 is too large: at most 0.999999"),
    ([*TEACHER, "--clip", "0"], 2, r"--clip 0.0 is too small: at least 1e-06"),
    ([*TEACHER, "--clip", "nan"], 2, r"--clip nan is not a finite number: give one"),
    ([*TEACHER, "--pad", "99999"], 2, r"--pad 99999 is too large for views of 8 pixels: at most 7"),
    ([*TEACHER, "--init", "nowhere"], 2, r"--init nowhere does not exist: give the folder of a model, or a file of weights"),
    ([*TEACHER, "--init", SUBSET], 2, rf"{SUBSET} is of kind subset: expected model; give another folder"),
    ([*OTHER, "--init", TEACHERS, "--model", "resnet14"], 1, r"does not fit this model: missing .*; check --model and --norm"),
    ([*TEACHER, "--recipe", "smal"], 2, r"unknown recipe 'smal'; did you mean 'small'\? known: .*; a file of your own ends in .toml"),
    (["cache", "--views", "0"], 2, r"--views 0 is too small: at least 1"),
    (["cache", "--views", "99999"], 2, r"--views 99999 is too large: at most 10,000"),
    (["cache", "--dtype", "int8"], 2, r"'int8' is not one of 'float16', 'float32'"),
    (["distill", "--temperature", "0"], 2, r"--temperature 0.0 is too small: at least 0.01"),
    (["distill", "--temperature", "nan"], 2, r"--temperature nan is not a finite number: give one"),
    *((["distill", "--alpha", a], 2, rf"--alpha {a} is out of range: from 0 \(labels only\) to 1") for a in ("-0.1", "1.1", "nan", "inf")),
    *((["distill", "--alpha", a], 2, rf"--alpha '{a}' is not a number: give auto, or a weight from 0 to 1") for a in ("half", "50%")),
    (["distill", "--views", "99"], 2, rf"{CACHE} has 3 views, 99 are asked for: make more with cache --views 99"),
    (["distill", "--logits", "data/train"], 2, r"data/train is of kind dataset: expected logits; give another folder"),
    (["distill", "--epochs", "0"], 2, r"--epochs 0 trains nothing: give at least 1"),
    (["evaluate", "nowhere"], 2, r"nowhere does not exist: expected a finished model; give another folder, or make it first"),
    (["evaluate", SUBSET], 2, rf"{SUBSET} is of kind subset: expected model; give another folder"),
    (["score", "--teacher", "data/train"], 2, r"data/train is of kind dataset: expected model; give another folder"),
    (["info", "."], 2, r"holds no manifest.json: expected a finished .*; give another folder"),
    (["info", "a\nb"], 2, r"a\\nb does not exist: expected a finished .*; give another folder"),
    (["verify", "nowhere"], 2, r"nowhere does not exist: expected a finished .*; give another folder"),
    *(([command, "--nonsense"], 2, rf"'--nonsense'.*\(see kdprune-data {command} --help\)") for command in EVERY),
    *(
        ([*line, "-j", jobs], 2, rf"--jobs {jobs} is too small: at least 1")
        for line in (
            [*SELECT],
            TEACHER,
            ["score"],
            ["cache"],
            ["distill"],
            ["import", "digits"],
            ["index", "x.tar"],
            ["pick", "x", "--frac", "1"],
        )
        for jobs in ("0", "-1")
    ),
    *(
        ([*line, "--device", "tpu"], 2, r"'tpu' is not one of 'auto', 'cpu', 'cuda', 'mps'")
        for line in (TEACHER, ["score"], ["cache"], ["distill"], ["evaluate", TEACHERS])
    ),
    *(
        ([*line, "--out", out], 2, rf"the folder name '{out[0]}+'... is 300 bytes long: at most (240|255) fit; choose a shorter one")
        for line in ([*SELECT], ["score"], ["cache"], ["distill"])
        for out in ("o" * 300, "p" * 300 + "/x")
    ),
]


@pytest.mark.parametrize(("line", "code", "said"), REFUSED, ids=[" ".join(case[0])[:60] for case in REFUSED])
def test_an_option_that_is_refused(chain: Path, refuses: Any, line: list[str], code: int, said: str) -> None:
    refuses(chain, line, code, said)


def test_a_training_that_diverges(chain: Path, refuses: Any) -> None:
    line = ["teacher", "--model", "resnet8", "--epochs", "9", "--batch", "8", "--name", "other", "--lr", "1e30"]
    refuses(chain, line, 1, r"training has diverged: .*; lower --lr \(it is 1e\+30\), or give --clip 1")


# --- where things are to go

PLACES: list[tuple[list[str], int, str]] = [
    ([*SELECT, "--out", "data/train"], 2, r"data/train holds a dataset, not a subset: choose another --out"),
    ([*SELECT, "--out", "data/train", "--overwrite"], 2, r"data/train is of kind dataset, which --overwrite does not replace by subset: "),
    (
        ["select", SUBSET, "--frac", "0.5", "--out", SUBSET, "--overwrite"],
        2,
        rf"{SUBSET} is what this subset is made from: choose another --out",
    ),
    ([*SELECT, "--out", "data/train/sub"], 2, r"data/train/sub lies inside an artefact \(.*/data/train\).*: choose another --out"),
    ([*SELECT, "--out", f"{SUBSET}/a/b"], 2, rf"{SUBSET}/a/b lies inside an artefact .*: choose another --out"),
    ([*SELECT, "--out", "data"], 2, r"data holds files that are not an artefact: choose another --out, or empty it yourself"),
    ([*SELECT, "--out", ".", "--overwrite"], 2, r"holds files that are not an artefact: choose another --out, or empty it yourself"),
    ([*SELECT, "--out", "data/train/index.parquet"], 2, r"data/train/index.parquet is a file, not a folder: choose another --out"),
    (["score", "--out", TEACHERS, "--overwrite"], 2, rf"{TEACHERS} is of kind model, which --overwrite does not replace by scores: "),
    (["score", "--out", f"{TEACHERS}/scores"], 2, rf"{TEACHERS}/scores lies inside an artefact .*: choose another --out"),
    (["cache", "--out", SUBSET, "--overwrite"], 2, rf"{SUBSET} is of kind subset, which --overwrite does not replace by logits: choose"),
    (
        ["teacher", "--steps", "1", "--out", "data/train", "--overwrite"],
        2,
        r"data/train is of kind dataset, which --overwrite does not replace",
    ),
    (
        ["distill", "--steps", "1", "--out", CACHE, "--overwrite"],
        2,
        rf"{CACHE} is of kind logits, which --overwrite does not replace by model",
    ),
    (["import", "digits", "--out", SUBSET], 2, rf"{SUBSET} holds a subset, not a dataset: choose another --out"),
    (
        ["distill", "--model", "resnet8", "--steps", "1", "--out", STUDENT],
        2,
        rf"{STUDENT} was made with other settings \(.*\): use --name .* or --o",
    ),
]


@pytest.mark.parametrize(("line", "code", "said"), PLACES, ids=[" ".join(case[0])[:60] for case in PLACES])
def test_a_place_that_is_refused(chain: Path, refuses: Any, line: list[str], code: int, said: str) -> None:
    refuses(chain, line, code, said)


# --- kdprune.toml

SETTINGS: list[tuple[str | bytes, list[str], int, str]] = [
    ("[select\n", ["select"], 2, r"kdprune.toml cannot be read \(.*line 1.*\): mend it, or move it away"),
    (b"\xff\xfe", ["select"], 2, r"kdprune.toml cannot be read \(.*utf-8.*\): mend it, or move it away"),
    ("[select]\nfrac = 0.5\nfrac = 0.6\n", ["select"], 2, r"kdprune.toml cannot be read \(.*\): mend it, or move it away"),
    ("[selct]\nfrac = 0.5\n", ["select"], 2, r"unknown section of kdprune.toml 'selct'; did you mean 'select'\? known: cache, "),
    (
        "[select]\nmethd = 'random'\n",
        ["select"],
        2,
        r"unknown option in \[select\] of kdprune.toml 'methd'; did you mean 'method'\? known: ",
    ),
    ("[select]\nfrac = 0.5\nmethod = 'randm'\n", ["select"], 2, r"unknown method 'randm'; did you mean 'random'\? known: aum, "),
    ("[select]\nfrac = 1.5\n", ["select"], 2, rf"fraction 1.5 is out of range: {FRACTION}"),
    ("[select]\nfrac = nan\n", ["select"], 2, rf"fraction nan is out of range: {FRACTION}"),
    ("[select]\nfrac = 'half'\n", ["select"], 2, rf"fraction 'half' is not a number: {FRACTION}"),
    ("[select]\nfrac = 0.5\nname = ''\n", ["select"], 2, r"--name is empty: give a value, or leave it out"),
    ("[select]\nfrac = 0.5\njobs = 0\n", ["select"], 2, r"--jobs 0 is too small: at least 1"),
    ("[select]\nfrac = 0.5\nseed = -1\n", ["select"], 2, r"--seed -1 is too small: at least 0"),
    ("[select]\nfrac = 0.5\nseed = 'one'\n", ["select"], 2, r"'seed'.* is 'one': expected"),
    ("[select]\nfrac = 0.5\nkeys = [1]\n", ["select"], 2, r"'keys'.* is .*1.*: expected"),
    ("[teacher]\nmodel = 'resnt8'\nsteps = 1\n", ["teacher"], 2, r"unknown model 'resnt8'; did you mean 'resnet8'\? known: "),
    ("[teacher]\nlr = nan\n", ["teacher"], 2, r"--lr nan is not a finite number: give one"),
    ("[teacher]\ndevice = 'tpu'\n", ["teacher"], 2, r"unknown device 'tpu'.* known: auto, cpu, cuda, mps"),
    ("[teacher]\nmodel = 'os:system'\n", ["teacher"], 2, r"'os:system' to run: functions are run only when named with --model"),
    ("[distill]\nalpha = 2\n", ["distill"], 2, r"--alpha 2 is out of range: from 0 \(labels only\) to 1"),
]


@pytest.mark.parametrize(("text", "line", "code", "said"), SETTINGS, ids=[str(case[0])[:50] for case in SETTINGS])
def test_settings_that_are_refused(chain_copy: Path, refuses: Any, works: Any, text: Any, line: list[str], code: int, said: str) -> None:
    (chain_copy / "kdprune.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(chain_copy, line, code, said)
    (chain_copy / "kdprune.toml").unlink()
    works(chain_copy, "select", "--frac", "0.25")


@pytest.mark.parametrize(
    "line",
    [["score", "--data"], ["score", "--teacher"], ["score", "--out"], ["evaluate"], ["info"], ["index"], ["cache"], [*TEACHER, "--init"]],
    ids=" ".join,
)
def test_a_path_of_no_text(chain: Path, refuses: Callable[..., str], line: list[str]) -> None:
    refuses(chain, [*line, ""], 2, r"option '\w+' is '': expected a path")


# --- recipes

RECIPES: list[tuple[str | bytes, str]] = [
    ("", r"r.toml has no section: write at least one, such as \[select\]"),
    (b"\xff", r"r.toml cannot be read \(.*\): mend it"),
    ("[teacher\n", r"r.toml cannot be read \(.*line 1.*\): mend it"),
    ("[teachr]\nepochs = 1\n", r"unknown section of r.toml 'teachr'; did you mean 'teacher'\? known: "),
    ("[teacher]\nepoch = 1\n", r"unknown option in \[teacher\] of r.toml 'epoch'; did you mean 'epochs'\? known: "),
    ("[teacher]\nepochs = -1\n", r"r.toml \[teacher\]: --epochs -1 is too small: at least 0"),
    ("[teacher]\nmodel = 'resnt8'\n", r"r.toml \[teacher\]: unknown model 'resnt8'; did you mean 'resnet8'\? known: "),
    (
        "[teacher]\nmodel = 'os:system'\n",
        r"'os:system' to run: functions are run only when named on the command line: add --code os:system",
    ),
    ("[[select]]\nfrac = 0.5\n[[select]]\nfrac = 1.5\n", rf"r.toml \[\[select\]\] 2: fraction 1.5 is out of range: {FRACTION}"),
    ("[select]\nfrac = 0.5\nmethod = 'el2nn'\n", r"r.toml \[select\]: unknown method 'el2nn'; did you mean 'el2n'\? known: "),
]


@pytest.mark.parametrize(("text", "said"), RECIPES, ids=[str(case[0])[:50] for case in RECIPES])
def test_a_recipe_that_is_refused(chain_copy: Path, refuses: Any, text: Any, said: str) -> None:
    """Before any of its stages runs."""
    (chain_copy / "r.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(chain_copy, ["run", "r.toml"], 2, said)


# --- dry runs

DRY = [
    ["import", "digits", "--out", "more"],
    ["index", "data/train/shard-000000.tar", "--out", "more"],
    TEACHER,
    ["score", "--name", "other"],
    ["select", "--frac", "0.25"],
    ["cache", "--name", "other"],
    ["distill", "--model", "resnet8", "--steps", "1", "--name", "other"],
]


@pytest.mark.parametrize("line", DRY, ids=[line[0] for line in DRY])
def test_a_dry_run_touches_nothing_and_refuses_as_the_run_does(chain: Path, refuses: Any, works: Any, stands: Any, line: list[str]) -> None:
    before = stands(chain)
    assert "would be made" in works(chain, *line, "--dry-run").out
    assert stands(chain) == before
    taken = [one for one in line if one not in ("--name", "other", "--out", "more")]
    refuses(chain, [*taken, "--out", "data", "--dry-run"], 2, r"data holds files that are not an artefact: choose another --out")
