"""`--precision bf16` of `score` and `cache`: what it costs is measured, said and kept; and nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import _bf16
from kdprune_pipelines._witness import Limits

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.lowrank import mean_kl
from kdprune_data.formats.manifest import Manifest
from kdprune_data.report.summary import rank_correlations

Cli = Callable[..., Any]
SUBSET, TEACHER, CACHE = Path("subsets/random-0.5-s0"), Path("teachers/resnet8-s0"), Path("logits/random-0.5-s0--resnet8-s0")
SCORED, LOW_SCORES, LOW = Path("scores/resnet8-s0"), Path("scores/low"), Path("logits/low")
FROM_OUTPUTS = ["el2n", "grand", "entropy", "margin", "confidence", "loss"]


@pytest.fixture(scope="module")
def low(chain: Path, tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """The workspace with scores and a cache that were asked in bf16."""
    workspace = tmp_path_factory.mktemp("low")
    for name in ("data", "subsets", "teachers", "logits", "scores"):
        (workspace / name).mkdir()
        for one in (chain / name).iterdir():
            (workspace / name / one.name).symlink_to(one)
    for line in (
        ["score", "--precision", "bf16", "--also", "grand_full", "--logits", "--name", "low"],
        ["cache", "--precision", "bf16", "--views", "3", "--dtype", "float32", "--name", "low"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


def column(folder: Path, name: str) -> np.ndarray:
    parts = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    return np.concatenate([part[name].to_numpy(zero_copy_only=False) for part in parts])


def view(workspace: Path, folder: Path) -> np.ndarray:
    data = Dataset.open(workspace / SUBSET)
    return LogitCache.open(workspace / folder).join(data).read(data.usable(), 0).logits.astype(np.float32)


# --- the numbers


def test_what_it_costs_scores(low: Path) -> None:
    """The probe is all of so few samples: its correlations are those of the columns."""
    cost = Manifest.load(low / LOW_SCORES).counts["bf16"]
    assert (cost["samples"], list(cost)) == (108, ["kl", "ranks", "samples"])
    assert sorted(cost["ranks"]) == sorted(FROM_OUTPUTS)
    for name in FROM_OUTPUTS:
        exact, coarse = column(low / SCORED, name), column(low / LOW_SCORES, name)
        assert not np.array_equal(exact, coarse)
        assert cost["ranks"][name] == pytest.approx(rank_correlations([exact, coarse])[0, 1], abs=2e-4)
        assert cost["ranks"][name] > 0.99
    assert 0 < cost["kl"]["4"] < cost["kl"]["1"] < 1e-3


@pytest.mark.parametrize("name", ["forgetting", "aum", "correct"])
def test_scores_of_no_network_that_is_asked_are_the_same(low: Path, name: str) -> None:
    assert np.array_equal(column(low / SCORED, name), column(low / LOW_SCORES, name))


def test_exact_gradients_stay_exact(low: Path, kdprune: Cli) -> None:
    ran = kdprune("score", "--also", "grand_full", "--name", "full", cwd=low)
    assert ran.code == 0, ran.err
    assert np.array_equal(column(low / "scores/full", "grand_full"), column(low / LOW_SCORES, "grand_full"))


def test_what_it_costs_a_cache(low: Path, kdprune: Cli) -> None:
    """As two caches of the same views show it."""
    ran = kdprune("cache", "--views", "1", "--dtype", "float32", "--name", "exact", cwd=low)
    assert ran.code == 0, ran.err
    cost = Manifest.load(low / LOW).counts["bf16"]
    exact, coarse = view(low, Path("logits/exact")), view(low, LOW)
    assert (cost["samples"], sorted(cost["kl"])) == (54, ["1", "2", "4"])
    for tau, kl in cost["kl"].items():
        assert kl == pytest.approx(mean_kl(exact, coarse, float(tau)), rel=0.05)
    assert cost["top1"] == pytest.approx((exact.argmax(1) == coarse.argmax(1)).mean(), abs=1e-6)


# --- what is said and kept


def test_it_stands_in_the_config_and_is_said(low: Path, kdprune: Cli) -> None:
    assert [Manifest.load(low / folder).config["precision"] for folder in (LOW, LOW_SCORES, CACHE, SCORED)] == ["bf16"] * 2 + [
        "float32"
    ] * 2
    assert all("bf16" not in Manifest.load(low / folder).counts for folder in (CACHE, SCORED))
    for folder, what in ((LOW, "top 1 the same in"), (LOW_SCORES, "rank correlation of")):
        said = [line for line in (low / folder / "log.txt").read_text().splitlines() if " bf16: " in line]
        assert len(said) == 1
        assert re.search(r"mean KL\(float32 \|\| bf16\) \S+ at temperature 1, \S+ at temperature 2, \S+ at temperature 4; " + what, said[0])
        shown = kdprune("info", folder, cwd=low)
        assert "  bf16      mean KL(float32 || bf16) " in shown.out
        assert kdprune("verify", folder, cwd=low).code == 0


def test_the_teacher_is_asked_again_within_what_it_costs(low: Path, kdprune: Cli) -> None:
    """In float32; another teacher is still another one."""
    ran = kdprune("verify", LOW, "--teacher", TEACHER, "--json", cwd=low)
    asked = json.loads(ran.out)["asked"]
    assert (ran.code, asked["differing"], asked["largest"] > 1e-3) == (0, 0, True)
    made = replace(LogitCache.open(low / LOW), manifest=replace(Manifest.load(low / LOW), counts={"views": 3, "bf16": {"kl": {"1": 1e-9}}}))
    exact, coarse = view(low, CACHE).astype(np.float64), view(low, CACHE).astype(np.float64)
    coarse[:, 0] -= 0.5
    assert not Limits.of(made).disagree(exact, exact)
    assert Limits.of(made).disagree(exact, coarse)


def test_a_cache_grows_in_the_numbers_that_it_began_in(low: Path, kdprune: Cli) -> None:
    cost = Manifest.load(low / LOW).counts["bf16"]
    ran = kdprune("cache", "--views", "4", "--dtype", "float32", "--name", "low", cwd=low)
    assert (ran.code, "precision is bf16, now float32" in ran.err) == (2, True)
    ran = kdprune("cache", "--precision", "bf16", "--views", "4", "--dtype", "float32", "--name", "low", cwd=low)
    assert ran.code == 0, ran.err
    manifest = Manifest.load(low / LOW)
    assert (manifest.counts["views"], manifest.counts["bf16"]) == (4, cost)


def test_of_a_coded_cache_at_its_temperature_too(low: Path, kdprune: Cli) -> None:
    ran = kdprune("cache", "--precision", "bf16", "--views", "2", "--fidelity", "1e-2", "--temperature", "3", "--name", "coded", cwd=low)
    assert ran.code == 0, ran.err
    assert sorted(Manifest.load(low / "logits/coded").counts["bf16"]["kl"]) == ["1", "2", "3", "4"]
    assert kdprune("verify", "logits/coded", "--teacher", TEACHER, cwd=low).code == 0


@pytest.mark.parametrize("folder", [LOW, LOW_SCORES])
@pytest.mark.parametrize(
    ("key", "fault"), [("config", "says precision float32 and counts what"), ("counts", "does not count what that cost")]
)
def test_a_manifest_that_says_otherwise_is_at_fault(tmp_path: Path, low: Path, kdprune: Cli, folder: Path, key: str, fault: str) -> None:
    there = shutil.copytree(low / folder, tmp_path / "there")
    manifest = Manifest.load(there)
    other = {**manifest.config, "precision": "float32"} if key == "config" else {k: v for k, v in manifest.counts.items() if k != "bf16"}
    (there / "manifest.json").write_bytes(replace(manifest, **{key: other}).to_json())
    ran = kdprune("verify", there, cwd=low)
    assert (ran.code, fault in ran.out + ran.err) == (1, True)


def test_it_is_of_a_teacher(low: Path, kdprune: Cli, tmp_path: Path) -> None:
    ran = kdprune("cache", "--from", tmp_path / "any.parquet", "--precision", "bf16", cwd=low)
    assert (ran.code, "--precision bf16 is of a teacher that is asked" in ran.err) == (2, True)


def test_proxies_are_asked_in_it_too(low: Path, kdprune: Cli) -> None:
    ran = kdprune("score", "--proxies", 2, "--epochs", 1, "--precision", "bf16", "--name", "proxied", cwd=low)
    assert ran.code == 0, ran.err
    assert Manifest.load(low / "scores/proxied").counts["bf16"]["ranks"]["el2n"] > 0.98


def test_a_dry_run_touches_nothing(low: Path, kdprune: Cli) -> None:
    for line in (["score"], ["cache"]):
        ran = kdprune(*line, "--precision", "bf16", "--name", "dry", "--dry-run", cwd=low)
        assert (ran.code, "would be made" in ran.out) == (0, True), ran.err
        assert not list(low.glob("*/dry"))


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        ({"samples": 1, "kl": {"1": 0.00123}, "top1": 1.0}, "0.0012 at temperature 1; top 1 the same in all (1 sample, chosen by hash)"),
        ({"samples": 9, "kl": {"2": 0.0}, "top1": 0.98765}, "0 at temperature 2; top 1 the same in 98.77% (9 samples, chosen by hash)"),
        (
            {"samples": 9, "kl": {"1": 0.1}, "ranks": {"loss": 0.99999, "el2n": None}},
            "0.1 at temperature 1; rank correlation of loss 1.0000, el2n - (9 samples, chosen by hash)",
        ),
    ],
)
def test_spoken(cost: dict[str, Any], text: str) -> None:
    assert _bf16.spoken(cost) == f"mean KL(float32 || bf16) {text}"
