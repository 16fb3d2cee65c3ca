"""`select --method`: every method from one recorded run, its settings, what it needs and what is said where that is lacking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines._advice import score_command
from kdprune_pipelines._methods import NAMES, table_of_methods

from kdprune_data import order, selectors
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import SCORES, Scores
from kdprune_data.selectors.quota import subpool
from kdprune_data.selectors.ranked import RankedParams

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
METHODS = [name for name in NAMES if name not in SCORES]
TEACHER = "scores/resnet8-s0"


def pool_of(workspace: Path) -> selectors.Pool:
    """All that was scored, read in plain steps."""
    data, scores = Dataset.open(workspace / "data/train"), Scores.open(workspace / TEACHER)

    def joined(found: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        by_uid = dict(zip(found[0].tolist(), found[1], strict=True))
        return np.stack([by_uid[uid] for uid in data.uids.tolist()])

    values = {name: joined(scores.read(name)).astype(np.float64) for name in scores.columns}
    hard = {name: SCORES[name].hard for name in values}
    return selectors.Pool(data.uids, data.labels, values, hard, *(joined(scores.vectors(what)) for what in ("embedding", "logits")))


@pytest.fixture(scope="module")
def pool(scored: Path) -> selectors.Pool:
    return pool_of(scored)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_keeps_what_its_function_keeps(scored: Path, pool: selectors.Pool, kdprune: Cli, tmp_path: Path, name: str) -> None:
    ran = kdprune("select", "--frac", "0.3", "--method", name, "--seed", "2", "--out", tmp_path / "x", cwd=scored)
    assert ran.code == 0, ran.err
    kept, selection = Dataset.open(tmp_path / "x"), pq.read_table(tmp_path / "x" / "selection.parquet")
    method = selectors.SELECTORS.get(name, selectors.SELECTORS["score"])
    params = RankedParams(2, score=name) if name in SCORES else method.params(2)
    picked = method.select(pool, 36, params)
    assert kept.uids.tolist() == pool.uids[picked.indices].tolist()
    needs = [need for need in method.needs(params) if need in SCORES]
    scores = pool.scores[needs[0]][picked.indices].astype(np.float32).tolist() if needs else [None] * 36
    assert selection["score"].to_pylist() == scores
    assert selection["weight"].to_pylist() == ([1.0] * 36 if picked.weights is None else picked.weights.tolist())
    ranking = tmp_path / "x" / "ranking.parquet"
    assert ranking.is_file() == (picked.order is not None)
    if picked.order is not None:
        ranks = dict(zip(*(pq.read_table(ranking)[column].to_pylist() for column in ("id", "rank")), strict=True))
        assert [ranks[i] for i in Dataset.open(scored / "data/train").ids[picked.order]] == list(range(len(pool.uids)))
    config = Manifest.load(tmp_path / "x").config
    own = {key: value for key, value in params.own().items() if key not in ("seed", "balance", "memory")}
    assert config.get("settings", {}) == ({} if name in SCORES else own)
    assert (config["method"], config["seed"], config["balance"]) == (name, 2, "class")
    assert kdprune("verify", tmp_path / "x", cwd=scored).code == 0


@pytest.mark.parametrize("how", ["where", "subset"])
@pytest.mark.parametrize("name", ["herding", "moderate", "craig", "d2"])
def test_what_is_read_of_some_samples_is_theirs(
    scored: Path, pool: selectors.Pool, kdprune: Cli, tmp_path: Path, name: str, how: str
) -> None:
    """Scores and vectors are joined by id: of what `--where` leaves, and of a subset whose scores are its parent's."""
    words: list[Any] = [scored / "data/train", "--frac", "0.1", "--where", "label > 3 and id != ''"]
    rows = np.flatnonzero(pool.labels > 3)
    if how == "subset":
        half = ["select", "--frac", "0.5", "--seed", "9", "--out", tmp_path / "half"]
        assert kdprune(*half, cwd=scored).code == 0
        words = [tmp_path / "half", "--frac", "0.2", "--scores", scored / TEACHER]
        rows = order.locate(pool.uids, Dataset.open(tmp_path / "half").uids)
    ran = kdprune("select", *words, "--method", name, "--out", tmp_path / "x", cwd=scored)
    assert ran.code == 0, ran.err
    picked = selectors.select(name, subpool(pool, rows), 12)
    assert Dataset.open(tmp_path / "x").uids.tolist() == pool.uids[rows[picked.indices]].tolist()
    if picked.weights is not None:
        assert pq.read_table(tmp_path / "x" / "selection.parquet")["weight"].to_pylist() == picked.weights.tolist()


def test_the_smallest_number_of_parts_that_fits_is_named(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    line = ["select", "--frac", "0.9", "--method", "craig", "--balance", "none", "--out", tmp_path / "x", "--dry-run"]
    for memory in (1_200_000, 1_300_000, 1_450_000):
        ran = kdprune(*line, "--memory", memory, cwd=scored)
        assert "give --set parts=" in ran.err, ran.err
        parts = int(ran.err.split("--set parts=")[1].split(",")[0])
        assert kdprune(*line, "--memory", memory, "--set", f"parts={parts}", cwd=scored).code == 0
        assert kdprune(*line, "--memory", memory, "--set", f"parts={parts - 1}", cwd=scored).code == 2


def test_tdds_without_any_scores_names_the_teacher_that_it_needs(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    shutil.copytree(scored / "data", tmp_path / "data")
    ran = kdprune("select", "--frac", "0.3", "--method", "tdds", cwd=tmp_path)
    assert ran.code == 2
    assert "train a teacher with `kdprune-data teacher --record logits`, then run `kdprune-data score`, or give a folder with" in ran.err


@pytest.mark.parametrize("name", [name for name, method in selectors.SELECTORS.items() if method.nested and name != "score"])
def test_nested_methods_are_nested_on_disk(scored: Path, kdprune: Cli, tmp_path: Path, name: str) -> None:
    before: set[str] = set()
    for frac in ("0.1", "0.3", "0.8"):
        assert kdprune("select", "--frac", frac, "--method", name, "--ids-only", "--out", tmp_path / frac, cwd=scored).code == 0
        now = set(Dataset.open(tmp_path / frac).ids)
        assert before < now
        before = now


def test_settings_are_typed_recorded_and_used(scored: Path, kdprune: Cli, tmp_path: Path, digests: Digests) -> None:
    line = ["select", "--frac", "0.3", "--method", "ccs", "--set", "bins=7", "--set", "cut=0.2", "--set", "score=el2n"]
    for name in ("a", "b"):
        assert kdprune(*line, "--out", tmp_path / name / "x", cwd=scored).code == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    made = Manifest.load(tmp_path / "a" / "x")
    assert made.config["settings"] == {"bins": 7, "cut": 0.2, "score": "el2n"}
    assert [one["role"] for one in made.inputs] == ["data", "scores"]
    assert "by ccs (bins 7, cut 0.2, score el2n), fraction 0.3, seed 0." in (tmp_path / "a" / "x" / "README.md").read_text()
    shown = kdprune("info", tmp_path / "a" / "x", cwd=scored).out
    assert all(text in shown for text in ("settings.bins = 7", "settings.cut = 0.2", "settings.score = el2n"))
    again = kdprune(*line[:-1], "score=aum", "--out", tmp_path / "a" / "x", cwd=scored)
    assert (again.code, "settings.score is el2n, now aum" in again.err) == (2, True)


def test_settings_from_a_file(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    (tmp_path / "kdprune.toml").write_text('[select]\nmethod = "ccs"\nset = ["bins=9"]\n')
    line = ["select", scored / "data/train", "--scores", scored / TEACHER, "--frac", "0.2", "--out", "x"]
    assert kdprune(*line, cwd=tmp_path).code == 0
    assert Manifest.load(tmp_path / "x").config["settings"]["bins"] == 9
    (tmp_path / "kdprune.toml").write_text('[select]\nmethod = "ccs"\nset = ["bins=no"]\n')
    assert kdprune(*line, cwd=tmp_path).err.endswith("--set bins=no: expected a whole number (--set stands in kdprune.toml [select])\n")


def test_the_hardest_are_left_out(scored: Path, pool: selectors.Pool, kdprune: Cli, tmp_path: Path) -> None:
    line = ["select", "--frac", "0.2", "--method", "aum", "--balance", "none", "--skip-hardest", "0.1", "--out", tmp_path / "x"]
    assert kdprune(*line, cwd=scored).code == 0
    by_aum = np.lexsort((order.order_hash(pool.uids, 0, "select"), pool.scores["aum"]))
    assert set(Dataset.open(tmp_path / "x").uids.tolist()) == set(pool.uids[by_aum[12:36]].tolist())
    assert Manifest.load(tmp_path / "x").config["skip_hardest"] == 0.1
    assert "by aum (skip hardest 0.1), fraction 0.2" in (tmp_path / "x" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--method ccs --set bin=3", "unknown setting of ccs 'bin'; did you mean 'bins'? known: bins, cut, score"),
        ("--method ccs --set bins=x", "--set bins=x: expected a whole number"),
        ("--method ccs --set bins=0", "--set bins 0 is too small: at least 1"),
        ("--method ccs --set cut=x", "--set cut=x: expected a number, or auto"),
        ("--method ccs --set bins", "--set bins is no setting: give name=value"),
        ("--method ccs --set bins=3 --set bins=4", "--set bins was given twice (3 and 4): give it once"),
        ("--method ccs --set seed=3", "unknown setting of ccs 'seed'"),
        ("--method ccs --set score=el2m", "--set score=el2m: unknown score 'el2m'; did you mean 'el2n'?"),
        ("--method ccs --set score=embedding", "--set score=embedding: unknown score 'embedding'; known: "),
        ("--method d2 --set score=logits --set cut=0", "--set score=logits: unknown score 'logits'; "),
        ("--method el2n --set end=easy", "--set end=easy: el2n is a score, which has no settings here"),
        ("--set bins=3", "random has no settings: leave out --set bins"),
        ("--method ccs --keep easy", "--keep easy chooses an end of a score, and none ranks here"),
        ("--method herding --skip-hardest 0.1", "--skip-hardest 0.1 leaves out the hard end of a score, and none ranks here"),
        ("--method el2n --skip-hardest 1", "--skip-hardest 1.0 is too large: at most 0.999"),
        ("--method el2n --skip-hardest 0.9", "cannot keep 36: 108 of 120 candidates are left out first, so 12 are left"),
        ("--method ccs --memory 5", "--memory 5 bounds methods that compare samples and --dedup near, and ccs is neither: leave it out"),
        ("--method score", "unknown method 'score'"),
        ("--method craig --memory 1000", "samples, and --memory is 1,000: give --memory "),
        ("--method herding --scores data", "data holds no manifest.json"),
        ("--method herding --scores kdprune.parquet", "kdprune.parquet does not exist"),
    ],
)
def test_what_is_refused(scored: Path, kdprune: Cli, tmp_path: Path, words: str, says: str) -> None:
    ran = kdprune("select", "--frac", "0.3", *words.split(), "--out", tmp_path / "x", cwd=scored)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        (
            "--method herding",
            "embedding, which herding needs: run `kdprune-data score --teacher FOLDER --embedding --name resnet8-s0-full`",
        ),
        (
            "--method craig",
            "embedding and logits, which craig needs: run `kdprune-data score --teacher FOLDER --embedding --logits --name ",
        ),
        ("--method density", "density, which density needs: run `kdprune-data score --teacher FOLDER --also density --name "),
        (
            "--method tdds",
            "tdds, which tdds needs: train a teacher with `kdprune-data teacher --model resnet8 --epochs 3 --batch 16 --record logits "
            "--name resnet8-s0-logits`, then run `kdprune-data score --teacher teachers/resnet8-s0-logits`",
        ),
        ("--dedup near", "embedding, which --dedup near needs: run `kdprune-data score --teacher FOLDER --embedding --name "),
        ("--where prototype<1", "prototype, which --where needs: run `kdprune-data score --teacher FOLDER --also prototype --name "),
        (
            "--method density --dedup near",
            "embedding and density, which --dedup near and density need: run `kdprune-data score --teacher FOLDER --embedding --also "
            "density --name ",
        ),
    ],
)
def test_what_is_lacking_is_named_with_the_command_that_provides_it(
    scored: Path, kdprune: Cli, tmp_path: Path, words: str, lacks: str
) -> None:
    shutil.copytree(scored / "data", tmp_path / "data")
    none = kdprune("select", "--frac", "0.3", *words.split(), cwd=tmp_path)
    assert none.code == 2
    assert "no fitting score in scores/" in none.err
    assert score_command([name for name in (*SCORES, "embedding", "logits") if name in lacks.split(", which")[0].split()]) in none.err
    shutil.copytree(scored / TEACHER, tmp_path / TEACHER)
    bare(tmp_path / TEACHER, Manifest.load(tmp_path / TEACHER).config)
    ran = kdprune("select", "--frac", "0.3", *words.split(), cwd=tmp_path)
    assert ran.code == 2
    assert f"error: {TEACHER} has no {lacks}" in ran.err


def bare(folder: Path, config: Any) -> None:
    """Turn scores into those of a plain `score`, as far as the manifest tells."""
    from dataclasses import replace

    found = Manifest.load(folder)
    columns = [name for name in config["columns"] if not SCORES[name].asked and name != "tdds"]
    files = [file for file in found.files if file.path.startswith("part-")]
    changed = replace(found, config=config | {"columns": columns, "embedding": False, "logits": False}, files=tuple(files))
    (folder / "manifest.json").write_bytes(changed.to_json())


def test_the_scores_folder_that_has_what_is_needed_is_found(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    shutil.copytree(scored / "data", tmp_path / "data")
    for name in ("whole", "bare", "other"):
        shutil.copytree(scored / TEACHER, tmp_path / "scores" / name)
    for name in ("bare", "other"):
        bare(tmp_path / "scores" / name, Manifest.load(tmp_path / "scores" / name).config)
    ran = kdprune("select", "--frac", "0.3", "--method", "herding", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "score: scores/whole\n" in ran.err
    ran = kdprune("select", "--frac", "0.3", "--method", "el2n", cwd=tmp_path)
    assert "several in scores/ fit: bare, other, whole; say which with --scores scores/NAME" in ran.err
    shutil.rmtree(tmp_path / "scores" / "whole")
    ran = kdprune("select", "--frac", "0.3", "--method", "kcenter", cwd=tmp_path)
    assert "none of those in scores/ (bare, other) has embedding, which kcenter needs: run `kdprune-data score --teacher FOLDER " in ran.err
    assert "--embedding --name bare-full`; where both fit" in ran.err


@pytest.mark.parametrize("name", [name for name in METHODS if selectors.SELECTORS[name].cost is not None])
def test_the_cost_is_told_before_and_a_dry_run_touches_nothing(scored: Path, kdprune: Cli, tmp_path: Path, name: str) -> None:
    line = ["select", "--frac", "0.3", "--method", name, "--out", tmp_path / "x", "--json"]
    dry = kdprune(*line, "--dry-run", cwd=scored)
    assert dry.code == 0, dry.err
    assert list(tmp_path.iterdir()) == []
    told = json.loads(dry.out)
    assert told["counts"] == {"sample": 36, "shard": 1}
    ran = kdprune(*line, cwd=scored)
    for err in (dry.err, ran.err):
        assert f"{name}: 10 classes of up to 12 samples, " in err
        assert " multiplications, " in err
    assert "keep 36 of 120 samples by" not in dry.err
    size = sum(file.bytes for file in Manifest.load(tmp_path / "x").files)
    assert 0.5 * size < told["bytes"] < 2 * size
    whole = kdprune(*line[:-3], "--balance", "none", "--dry-run", "--out", tmp_path / "y", cwd=scored)
    assert f"{name}: 120 samples, " in whole.err


def test_every_method_is_listed_with_what_it_needs(kdprune: Cli, tmp_path: Path) -> None:
    shown = kdprune("select", "--help", cwd=tmp_path).out
    assert all(line.strip() in shown for line in table_of_methods().splitlines())
    for name in NAMES:
        assert f"\n    {name} " in shown
    assert "needs embedding: score --embedding" in shown
    assert "--set score=aum cut=auto bins=50" in shown


def test_an_exact_count_whatever_the_method(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    for frac in ("0.05", "0.99", "1"):
        for name in METHODS:
            ran = kdprune("select", "--frac", frac, "--method", name, "--ids-only", "--out", tmp_path / f"{name}-{frac}", cwd=scored)
            if "are left out first" in ran.err:  # a cut-off may leave too few, and says so
                continue
            assert ran.code == 0, ran.err
            assert len(Dataset.open(tmp_path / f"{name}-{frac}")) == int(Fraction(frac) * 120 + Fraction(1, 2))


@pytest.mark.parametrize(
    ("words", "left_out"), [("ccs", 36), ("d2 --set cut=0.2", 24), ("el2n --skip-hardest 0.1", 12), ("ccs --set cut=0", 0)]
)
def test_a_cut_off_is_told(scored: Path, kdprune: Cli, tmp_path: Path, words: str, left_out: int) -> None:
    """In the output and in the counts: 120 candidates."""
    ran = kdprune("select", "--frac", "0.1", "--method", *words.split(), "--out", tmp_path / "x", cwd=scored)
    assert ran.code == 0, ran.err
    counts = Manifest.load(tmp_path / "x").counts
    which = "hardest" if "skip" in words else "of lowest aum"
    assert (f": {left_out} of 120 candidates, those {which}, are left out first\n" in ran.err) == (left_out > 0)
    assert counts.get("after_cut") == (120 - left_out if left_out else None)
