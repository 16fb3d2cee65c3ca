"""What a selection says where something is lacking: the commands that it prints are run as they stand, and then it works."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdprune_data.formats.manifest import Manifest

Cli = Callable[..., Any]


def pasted(kdprune: Cli, workspace: Path, *line: str) -> list[str]:
    """Ask for a selection that cannot be, and run what it says; the commands."""
    ran = kdprune("select", "--frac", "0.3", *line, cwd=workspace)
    assert ran.code == 2, ran.err
    commands: list[str] = re.findall(r"`(kdprune-data [^`]*)`", ran.err.splitlines()[-1])
    for command in commands:
        made = kdprune(*shlex.split(command)[1:], cwd=workspace)
        assert made.code == 0, f"{command}\n{made.err}"
    return commands


CASES: list[tuple[list[str], str, list[str]]] = [
    ([], "--method density", ["kdprune-data score --embedding --logits --also density --name resnet8-s0-full"]),
    (
        ["score --epoch 1 --set forgetting.never=zero --set dual.window=2 --batch 32 --name e1"],
        "--method craig --where density>0",
        [
            "kdprune-data score --embedding --logits --also density --epoch 1 --batch 32 --set dual.window=2 --set forgetting.never=zero "
            "--name e1-full"
        ],
    ),
    (
        ["score --proxies 2 --epochs 1 --also density --seed 3 --set density.clusters=4 --name p2"],
        "--method craig",
        ["kdprune-data score --embedding --logits --also density --proxies 2 --epochs 1 --seed 3 --set density.clusters=4 --name p2-full"],
    ),
    (
        ["score --name plain", "score --epoch 1 --name e1"],
        "--dedup near",
        ["kdprune-data score --embedding --name plain-full"],
    ),
    (
        ["score --also grand_full --memory 5000000 --name g"],
        "--method tdds",
        [
            "kdprune-data teacher --model resnet8 --epochs 3 --batch 16 --record logits --name resnet8-s0-logits",
            "kdprune-data score --teacher teachers/resnet8-s0-logits --also grand_full --memory 5000000",
        ],
    ),
    (
        ["teacher --model resnet8 --epochs 1 --batch 32 --lr 0.05 --seed 4 --name short", "score --teacher teachers/short"],
        "--method dual",
        ["kdprune-data score --teacher teachers/resnet8-s0"],
    ),
]


@pytest.mark.parametrize(("before", "selection", "said"), CASES, ids=[case[1] for case in CASES])
def test_what_is_said_can_be_pasted(chain_copy: Path, kdprune: Cli, before: list[str], selection: str, said: list[str]) -> None:
    if before:
        shutil.rmtree(chain_copy / "scores")
    for line in before:
        ran = kdprune(*line.split(), cwd=chain_copy)
        assert ran.code == 0, ran.err
    there = {path: path.read_bytes() for path in chain_copy.glob("scores/*/manifest.json")}
    assert pasted(kdprune, chain_copy, *selection.split()) == said
    assert {path: path.read_bytes() for path in there} == there
    ran = kdprune("select", "--frac", "0.3", *selection.split(), cwd=chain_copy)
    assert ran.code == 0, ran.err
    made = [path for path in chain_copy.glob("scores/*/manifest.json") if path not in there]
    assert len(made) == 1
    old, new = (Manifest.read(path.parent).config for path in (next(iter(there)), made[0]))
    assert set(old["columns"]) <= set(new["columns"]) or "--epoch 1" in str(before)


def test_a_longer_training_is_asked_for_where_too_few_epochs_are_recorded(chain_copy: Path, kdprune: Cli) -> None:
    for folder in ("teachers", "scores"):
        shutil.rmtree(chain_copy / folder)
    for line in ("teacher --model resnet8 --epochs 1 --batch 32 --lr 0.05 --norm group --seed 4", "score"):
        assert kdprune(*line.split(), cwd=chain_copy).code == 0
    ran = kdprune("select", "--frac", "0.3", "--method", "dual", cwd=chain_copy)
    assert " (2 recorded epochs or more are needed, not 1), then run " in ran.err
    assert pasted(kdprune, chain_copy, "--method", "dual", "--scores", "scores/resnet8-s4") == [
        "kdprune-data teacher --model resnet8 --epochs 2 --batch 32 --lr 0.05 --seed 4 --norm group --name resnet8-s4-longer",
        "kdprune-data score --teacher teachers/resnet8-s4-longer",
    ]
    ran = kdprune("select", "--frac", "0.3", "--method", "dual", cwd=chain_copy)
    assert ran.code == 0, ran.err


def test_nothing_scored(chain_copy: Path, kdprune: Cli) -> None:
    """By what the teachers there have recorded."""
    shutil.rmtree(chain_copy / "scores")
    assert [line.split()[1] for line in pasted(kdprune, chain_copy, "--method", "tdds")] == ["teacher", "score"]
    shutil.rmtree(chain_copy / "scores")
    assert pasted(kdprune, chain_copy, "--method", "tdds") == ["kdprune-data score --teacher teachers/resnet8-s0-logits"]


def test_columns_of_the_file_that_ranks_come_first(chain_copy: Path, kdprune: Cli) -> None:
    """Then those of the one scores folder that has them; of several none is chosen."""
    ids = pq.read_table(chain_copy / "data/train/index.parquet")["id"]
    columns = {
        "theirs": list(range(len(ids))),
        "el2n": [0.0] * 40 + [9.0] * (len(ids) - 40),
        "odd one": [1] * len(ids),
        "label": [3] * len(ids),
    }
    pq.write_table(pa.table({"id": ids, **columns}), chain_copy / "f.parquet")
    line = [
        "select",
        "--frac",
        "0.3",
        "--scores",
        "f.parquet",
        "--column",
        "theirs",
        "--hard",
        "high",
        "--name",
        "x",
        "--overwrite",
        "--where",
    ]
    for where, left, inputs in (
        ("el2n < 1", 40, ["data"]),
        ("el2n < 1 and theirs >= 2 and label >= 0", 38, ["data"]),
        ("el2n < 1 and aum > -1000", 40, ["data", "scores"]),
    ):
        ran = kdprune(*line, where, cwd=chain_copy)
        assert (ran.code, f"where: {left} of 108 candidates" in ran.err) == (0, True), ran.err
        assert [one["role"] for one in Manifest.load(chain_copy / "subsets/x").inputs] == inputs
    ran = kdprune(*line, "density < 1", cwd=chain_copy)
    assert (
        "scores/resnet8-s0 has no density, which --where needs: run `kdprune-data score --embedding --logits --also density --name"
        in ran.err
    )
    assert "--scores" not in ran.err
    shutil.copytree(chain_copy / "scores/resnet8-s0", chain_copy / "scores/other")
    ran = kdprune(*line, "aum < 1", cwd=chain_copy)
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2,
        "error: f.parquet has no aum, which --where needs, and several in scores/ have it: other, resnet8-s0; copy the column into the "
        "file, or keep one of them there",
    )
    (chain_copy / "r.toml").write_text(
        "[[select]]\nfrac = 0.3\nname = 'y'\nscores = 'f.parquet'\ncolumn = 'theirs'\nhard = 'low'\nwhere = 'el2n < 1'\n"
    )
    ran = kdprune("run", "r.toml", cwd=chain_copy)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("epoch", "epochs"),
    [(2, 3), (4, 4)],  # within its training, and after the end of it
)
def test_a_teacher_that_keeps_an_epoch(chain_copy: Path, kdprune: Cli, epoch: int, epochs: int) -> None:
    ran = kdprune("score", "--epoch", epoch, cwd=chain_copy)
    wanted = f"kdprune-data teacher --model resnet8 --epochs {epochs} --batch 16 --keep-epochs {epoch} --name resnet8-s0-e{epoch}"
    assert (ran.code, f"choose one of these, or make a teacher with `{wanted}`" in ran.err) == (2, True), ran.err
    assert kdprune(*wanted.split()[1:], cwd=chain_copy).code == 0
    ran = kdprune("score", "--epoch", epoch, "--teacher", f"teachers/resnet8-s0-e{epoch}", cwd=chain_copy)
    assert ran.code == 0, ran.err
