"""`info` of scores and of weights: numbers against plain Python over the Parquet files, and the tables as people see them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import _distribution, info
from kdprune_pipelines._tables import aligned, number, short
from scipy import stats

from kdprune_data import order
from kdprune_data.errors import FormatError
from kdprune_data.formats import table
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import SCORES

Cli = Callable[..., Any]
SCORED, SUBSET = Path("scores/resnet8-s0"), Path("subsets/random-0.5-s0")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def facts(chain: Path) -> dict[str, Any]:
    return dict(info.run(info.InfoConfig(chain / SCORED)).facts["scores"])


def test_quantiles_and_means(chain: Path, facts: dict[str, Any]) -> None:
    rows = rows_of(chain / SCORED)
    assert list(facts["columns"]) == Manifest.load(chain / SCORED).config["columns"]
    for name, found in facts["columns"].items():
        values = sorted(row[name] for row in rows)
        assert (found["hard"], found["source"] is not None) == (SCORES[name].hard, True)
        assert list(found["quantiles"]) == ["min", "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99", "max"]
        assert (found["quantiles"]["min"], found["quantiles"]["max"]) == (values[0], values[-1])
        assert found["quantiles"]["0.5"] == pytest.approx(statistics.median(values), rel=1e-9, abs=1e-12)
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        assert [found["quantiles"][q] for q in ("0.01", "0.25", "0.99")] == pytest.approx(
            [cuts[0], cuts[24], cuts[98]], rel=1e-9, abs=1e-12
        )
        assert found["mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-12)
        assert found["std"] == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-9)


def test_classes(chain: Path, facts: dict[str, Any]) -> None:
    rows = rows_of(chain / SCORED)
    assert [c["class"] for c in facts["per_class"]] == list(Manifest.load(chain / SCORED).classes)
    for label, found in enumerate(facts["per_class"]):
        mine = [row for row in rows if row["label"] == label]
        assert found["samples"] == len(mine)
        for name, mean in found["means"].items():
            assert mean == pytest.approx(statistics.fmean(row[name] for row in mine), rel=1e-9, abs=1e-12)


def test_rank_correlations(chain: Path, facts: dict[str, Any]) -> None:
    rows = rows_of(chain / SCORED)
    found = facts["correlations"]
    assert found["samples"] == 108
    for a in facts["columns"]:
        for b in facts["columns"]:
            expected = stats.spearmanr([row[a] for row in rows], [row[b] for row in rows]).statistic
            assert found["spearman"][a][b] == pytest.approx(expected, abs=1e-12)


def test_the_tables(chain: Path, kdprune: Cli, facts: dict[str, Any]) -> None:
    ran = kdprune("info", SCORED, cwd=chain)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"{SCORED}: scores 'resnet8-s0'"
    heads = [n for n, line in enumerate(lines) if line.startswith(("  scores  ", "  classes   means", "  ranks  "))]
    assert len(heads) == 3
    assert "hard: the end where the hard samples are" in lines[heads[0]]
    assert " ".join(lines[heads[0] + 1].split()) == "hard min 1 % 5 % 25 % 50 % 75 % 95 % 99 % max mean"
    columns = list(facts["columns"])
    for n, name in enumerate(columns):
        about = facts["columns"][name]
        assert lines[heads[0] + 2 + n].split() == [name, about["hard"], *(number(v) for v in (*about["quantiles"].values(), about["mean"]))]
    by_hardness = sorted(facts["per_class"], key=lambda c: -c["hardness"])
    assert lines[heads[1] + 1].split() == [c["class"] for c in by_hardness]
    assert lines[heads[1] + 2].split() == ["samples", *(str(c["samples"]) for c in by_hardness)]
    assert lines[heads[2] + 1].split() == columns[:-1]
    last = lines[heads[2] + 1 + len(columns)].split()
    assert last[0] == columns[-1]
    assert [float(v) for v in last[1:]] == [round(facts["correlations"]["spearman"][columns[-1]][b], 2) for b in columns[:-1]]
    assert ("-.00" in ran.out, "does not vary" in ran.out) == (False, False)
    assert f"  settings  batch = 256\n            columns = {', '.join(columns)[:60]}" in ran.out
    assert len(lines) == heads[2] + 2 + len(columns)
    told = kdprune("info", SCORED, "--json", cwd=chain)
    assert json.loads(told.out)["scores"] == facts


def rescored(folder: Path, columns: dict[str, list[float]], labels: list[int | None], classes: list[str]) -> dict[str, Any]:
    """The facts of other numbers in one part."""
    fields = [pa.field(name, pa.float32(), metadata={"hard": SCORES[name].hard, "source": "x"}) for name in columns]
    schema = pa.schema([pa.field("id", pa.string()), pa.field("label", pa.int32()), *fields])
    ids = [f"{n:05d}" for n in range(len(labels))]
    folder.mkdir()
    (folder / "part-000000.parquet").write_bytes(table.to_bytes(pa.table([ids, labels, *columns.values()], schema=schema)))
    # Of the manifest only these are read.
    manifest: Any = type("", (), {})()
    manifest.files, manifest.classes = [type("", (), {"path": "part-000000.parquet"})()], classes
    manifest.config, manifest.counts = {"columns": list(columns)}, {"samples": len(labels)}
    return _distribution.facts(folder, manifest)


def test_many_classes_are_told_by_the_hardest_and_the_easiest(tmp_path: Path) -> None:
    labels = [n % 20 for n in range(200)]
    found = rescored(
        tmp_path / "s", {"el2n": [float(n) for n in labels], "aum": [-float(n) for n in labels]}, labels, [f"c{n}" for n in range(21)]
    )
    lines = list(_distribution.lines(found))
    assert "  classes   means of the 5 hardest and 5 easiest of 20 classes (over all scores; others with --json)" in lines
    head = next(line.split() for line in lines if "c19" in line)
    assert head == [f"c{n}" for n in (19, 18, 17, 16, 15, 4, 3, 2, 1, 0)]
    assert found["per_class"][20] == {"class": "c20", "samples": 0, "hardness": None, "means": {"el2n": None, "aum": None}}
    assert found["correlations"]["spearman"]["el2n"]["aum"] == -1


def test_extremes(tmp_path: Path) -> None:
    """One sample; a score of one value; no labels."""
    one = rescored(tmp_path / "one", {"el2n": [0.5], "loss": [2.0]}, [0], ["a"])
    assert set(one["columns"]["el2n"]["quantiles"].values()) == {0.5}
    assert one["correlations"]["spearman"] == {"el2n": {"el2n": None, "loss": None}, "loss": {"el2n": None, "loss": None}}
    flat = rescored(tmp_path / "flat", {"el2n": [1.0] * 4, "loss": [1.0, 2, 3, 4]}, [None] * 4, ["a", "b"])
    assert [c["samples"] for c in flat["per_class"]] == [0, 0]
    lines = list(_distribution.lines(flat))
    assert not any(line.startswith("  classes") for line in lines)
    assert lines[-4].endswith("; -: a score that does not vary")
    assert [line.split() for line in lines[-3:]] == [["el2n"], ["el2n"], ["loss", "-"]]
    assert all(json.loads(json.dumps(found, allow_nan=False)) == found for found in (one, flat))


def test_large_sets_are_correlated_over_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come first in the order of their hash, which the output says."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500)).astype(np.float32)
    monkeypatch.setattr(_distribution, "RANKED_MOST", 60)
    found = rescored(tmp_path / "s", {"el2n": a.tolist(), "aum": b.tolist()}, [0] * 500, ["a"])
    hashes = order.order_hash(order.uids_of([f"{n:05d}" for n in range(500)]), 0, "rank-correlations")
    first = np.argsort(hashes)[:60]
    assert found["correlations"]["samples"] == 60
    assert found["correlations"]["spearman"]["el2n"]["aum"] == pytest.approx(stats.spearmanr(a[first], b[first]).statistic, abs=1e-12)
    assert found["columns"]["el2n"]["mean"] == pytest.approx(float(a.astype(float).mean()))
    assert any("over 60 samples of 500, chosen by hash" in line for line in _distribution.lines(found))


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has values of loss that are no finite numbers: make or fetch it again"):
        rescored(tmp_path / "s", {"el2n": [1.0, 2.0], "loss": [1.0, float("nan")]}, [0, 0], ["a"])


def test_weights_of_a_subset(chain_copy: Path, kdprune: Cli, weigh: Callable[..., None]) -> None:
    plain = kdprune("info", SUBSET, cwd=chain_copy)
    assert "  weights   1 for every sample" in plain.out.splitlines()
    weigh(chain_copy / SUBSET, [0.0, 0.5, *[2.0] * 52])
    lines = kdprune("info", SUBSET, cwd=chain_copy).out.splitlines()
    assert "  weights   0 to 2, median 2 (1 sample of weight 0)" in lines
    told = json.loads(kdprune("info", SUBSET, "--json", cwd=chain_copy).out)
    assert told["weights"] == {"min": 0.0, "median": 2.0, "max": 2.0, "zero": 1}
    assert "weights" not in json.loads(kdprune("info", "data/train", "--json", cwd=chain_copy).out)


def test_tables_line_up() -> None:
    found = list(aligned(["name", "a", "a very long heading"], [["x", "1"], ["longer", "-10", "3"]], "  "))
    assert found == ["  name      a  a very lo…", "  x         1", "  longer  -10           3"]
    assert [short("ten letter"), short("eleven char")] == ["ten letter", "eleven ch…"]
    assert [number(v) for v in (None, 0.0, -1.5, 12345.6, 1234567.0, 1.2e-9, -0.00123)] == [
        "-",
        "0",
        "-1.5",
        "12346",
        "1.23e6",
        "1.2e-9",
        "-0.001",
    ]
    rng = np.random.default_rng(0)
    values = [*(rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200)), 999.95, 9999.5, 99999.7, 0.00099999, -99999.9]
    for value in values:
        assert len(number(value)) <= 6
        assert float(number(value)) == pytest.approx(value, rel=0.5)


def test_a_page_is_wide_enough(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    """For all scores and ten classes; what a score finds out by itself is `auto`."""
    ran = kdprune("info", "scores/resnet8-s0", cwd=scored)
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(f" {name} " in f" {ran.out.split('ranks ')[1]} ".replace("\n", " ") for name in SCORES)
    assert "            settings.density.clusters = auto" in lines
    assert "            proxies = null" in lines
    columns = ran.out.split("columns = ")[1].split("early_epoch")[0]
    assert [name.strip() for name in columns.split(",")] == list(SCORES)
    names = [f"a class of a long name {n}" for n in range(12)]
    rng = np.random.default_rng(0)
    values = {name: (rng.normal(size=120) * -1e-3).tolist() for name in SCORES}
    found = rescored(tmp_path / "s", values, [n % 12 for n in range(120)], names)
    assert [line for line in _distribution.lines(found) if len(line) > 100] == []
