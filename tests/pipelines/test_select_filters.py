"""`select --where` and `--dedup`: what is left to choose from, how it is counted and recorded; the number kept never changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import import_, index

from kdprune_data import order
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import Scores
from kdprune_data.selectors import dedup

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
SCORED = "scores/resnet8-s0"


def score_of(workspace: Path, name: str) -> dict[int, float]:
    uids, values = Scores.open(workspace / SCORED).read(name)
    return dict(zip(uids.tolist(), values.astype(float).tolist(), strict=True))


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("label != 7 and el2n < MEDIAN", lambda row, median: row["label"] != 7 and row["el2n"] < median),
        ("class in ('1', '2') or el2n >= MEDIAN", lambda row, median: row["label"] in (1, 2) or row["el2n"] >= median),
        ("not (width == 8 and height == 8) or id != 'x'", lambda row, median: True),
        ("2 <= label <= 8", lambda row, median: 2 <= row["label"] <= 8),
    ],
)
@pytest.mark.parametrize("method", ["random", "aum"])
def test_only_those_for_which_it_holds_are_chosen_from(
    scored: Path, kdprune: Cli, tmp_path: Path, where: str, holds: Any, method: str
) -> None:
    data, el2n = Dataset.open(scored / "data/train"), score_of(scored, "el2n")
    median = round(float(np.median(list(el2n.values()))), 3)
    text = where.replace("MEDIAN", str(median))
    rows = [{"label": label, "el2n": el2n[uid]} for uid, label in zip(data.uids.tolist(), data.labels.tolist(), strict=True)]
    left = {uid for uid, row in zip(data.uids.tolist(), rows, strict=True) if holds(row, median)}
    line = ["select", "--frac", "0.25", "--method", method, "--where", text, "--balance", "none", "--out", tmp_path / "x"]
    ran = kdprune(*line, cwd=scored)
    assert ran.code == 0, ran.err
    assert f"where: {len(left)} of 120 candidates\n" in ran.err
    kept = Dataset.open(tmp_path / "x")
    values = dict.fromkeys(left, 0.0) if method == "random" else score_of(scored, "aum")
    by_hash = dict(zip(data.uids.tolist(), order.order_hash(data.uids, 0, "select").tolist(), strict=True))
    assert set(kept.uids.tolist()) == set(sorted(left, key=lambda uid: (values[uid], by_hash[uid]))[:30])
    made = Manifest.load(tmp_path / "x")
    assert (made.counts["candidates"], made.counts["after_where"], made.counts["kept"]) == (120, len(left), 30)
    assert made.config["where"] == text
    assert f"fraction 0.25, seed 0; only where `{text}`." in (tmp_path / "x" / "README.md").read_text()
    assert len(pq.read_table(tmp_path / "x" / "ranking.parquet")) == len(left)
    reads = method == "aum" or "el2n" in text
    assert [one["role"] for one in made.inputs] == (["data", "scores"] if reads else ["data"])
    assert kdprune("verify", tmp_path / "x", cwd=scored).code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--where", "label == 3"],
            "error: 30 of 120 samples are to be kept, and --where leaves 12: keep fewer (--frac 0.1 at most), or leave more",
        ),
        (["--where", "el2n <"], "error: --where, character 7: found the end, expected a column, a number, or a text in quotes"),
        (["--where", "elm < 3"], "error: --where, character 1: unknown column 'elm'"),
        (["--where", "class == 'cat'"], "error: --where, character 10: unknown class 'cat'; known: 0, 1, 2"),
        (["--where", ""], "error: --where is empty: give a value, or leave it out"),
        (["--dedup", "near", "--dedup-eps", "1"], "samples are to be kept, and --dedup leaves "),
        (
            ["--dedup", "near", "--memory", "100"],
            "error: --dedup near of 120 embeddings of 64 numbers takes 368,640 bytes, --memory is 100: ",
        ),
        (
            ["--dedup", "near", "--dedup-clusters", "61"],
            "error: --dedup-clusters 61 of 120 candidates would compare next to none: at most 60",
        ),
        (["--where", "label < 4", "--dedup", "near", "--dedup-clusters", "25"], "error: --dedup-clusters 25 of 48 candidates would"),
        (["--dedup-eps", "0.1"], "error: --dedup-eps 0.1 is for --dedup near: leave it out, or give that"),
        (["--dedup", "exact", "--dedup-clusters", "3"], "error: --dedup-clusters 3 is for --dedup near"),
        (["--dedup", "near", "--dedup-eps", "0"], "error: --dedup-eps 0.0 is too small: at least 1e-06"),
        (["--dedup", "all"], "error: Invalid value for '--dedup': 'all' is not one of 'exact', 'near'."),
    ],
)
def test_what_is_refused(scored: Path, kdprune: Cli, tmp_path: Path, words: list[str], says: str) -> None:
    ran = kdprune("select", "--frac", "0.25", *words, "--out", tmp_path / "x", cwd=scored)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [["--where", "label == 1"], ["--dedup", "exact"], ["--set", "a=1"]])
def test_a_list_is_not_filtered(scored: Path, kdprune: Cli, words: list[str]) -> None:
    ran = kdprune("select", "--keys", "ids.txt", *words, cwd=scored)
    assert (ran.code, ran.err) == (2, "error: --keys is a list by itself: it goes without --where, --dedup and --set\n")


@pytest.mark.parametrize("clusters", [None, 3])
def test_near_duplicates(scored: Path, kdprune: Cli, tmp_path: Path, digests: Digests, clusters: int | None) -> None:
    data, (uids, embedding) = Dataset.open(scored / "data/train"), Scores.open(scored / SCORED).vectors("embedding")
    assert data.uids.tolist() == uids.tolist()
    unit = embedding.astype(float) / np.linalg.norm(embedding.astype(float), axis=1, keepdims=True)
    eps = round(float(1 - np.quantile((unit @ unit.T)[np.triu_indices(120, 1)], 0.95)), 6)
    found = dedup.near(uids, embedding, dedup.Near(eps, clusters or 1, 5, 10**9))
    assert 10 < len(found.rows) < 120
    words = [] if clusters is None else ["--dedup-clusters", clusters]
    line = ["select", "--frac", "0.05", "--dedup", "near", "--dedup-eps", eps, *words, "--seed", "5"]
    for name in ("a", "b"):
        ran = kdprune(*line, "--out", tmp_path / name / "x", cwd=scored)
        assert ran.code == 0, ran.err
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    made = Manifest.load(tmp_path / "a" / "x")
    config = made.config
    assert (config["dedup"], config["dedup_eps"], config["dedup_clusters"]) == ("near", eps, clusters or 1)
    assert (made.counts["candidates"], made.counts["after_dedup"], made.counts["kept"]) == (120, len(found.rows), 6)
    assert set(pq.read_table(tmp_path / "a" / "x" / "ranking.parquet")["id"].to_pylist()) == set(data.ids[found.rows])
    assert f"dedup near: {len(found.rows)} of 120 candidates; " in ran.err
    dry = kdprune(*line, "--out", tmp_path / "c", "--dry-run", "--json", cwd=scored)
    assert json.loads(dry.out)["counts"] == {"sample": 6, "shard": 1}
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("how", ["where", "subset"])
def test_embeddings_of_near_duplicates_are_joined_by_id(scored: Path, kdprune: Cli, tmp_path: Path, how: str) -> None:
    """Of what `--where` leaves, and of a subset whose scores are its parent's."""
    data, (_, embedding) = Dataset.open(scored / "data/train"), Scores.open(scored / SCORED).vectors("embedding")
    words: list[Any] = [scored / "data/train", "--frac", "0.05", "--where", "label > 3"]
    rows = np.flatnonzero(data.labels > 3)
    if how == "subset":
        assert kdprune("select", "--frac", "0.5", "--seed", "9", "--out", tmp_path / "half", cwd=scored).code == 0
        words = [tmp_path / "half", "--frac", "0.1", "--scores", scored / SCORED]
        rows = order.locate(data.uids, Dataset.open(tmp_path / "half").uids)
    unit = embedding[rows].astype(float) / np.linalg.norm(embedding[rows].astype(float), axis=1, keepdims=True)
    eps = round(float(1 - np.quantile((unit @ unit.T)[np.triu_indices(len(rows), 1)], 0.95)), 6)
    found = dedup.near(data.uids[rows], embedding[rows], dedup.Near(eps, 1, 0, 10**9))
    assert 6 < len(found.rows) < len(rows)
    ran = kdprune("select", *words, "--dedup", "near", "--dedup-eps", eps, "--out", tmp_path / "x", cwd=scored)
    assert ran.code == 0, ran.err
    assert pq.read_table(tmp_path / "x" / "ranking.parquet")["id"].to_pylist() == data.ids[rows[found.rows]].tolist()


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_many_near_duplicates_are_told(scored: Path, kdprune: Cli, tmp_path: Path, share: float) -> None:
    """Above a fifth of the candidates, with the eps that they are for."""
    embedding = Scores.open(scored / SCORED).vectors("embedding")[1]
    uids = Scores.open(scored / SCORED).vectors("embedding")[0]
    left = {
        eps: len(dedup.near(uids, embedding, dedup.Near(eps, 1, 0, 10**9)).rows) for eps in np.geomspace(1e-5, 0.9, 60).round(6).tolist()
    }
    eps = min(left, key=lambda eps: abs(left[eps] - 120 * (1 - share)))
    ran = kdprune("select", "--frac", "0.05", "--dedup", "near", "--dedup-eps", eps, "--out", tmp_path / "x", cwd=scored)
    assert ran.code == 0, ran.err
    gone = 120 - left[eps]
    said = f"{gone / 120:.0%} of the candidates count as near duplicates at eps {eps:g}: if that is too many, give a smaller --dedup-eps\n"
    assert (said in ran.err) is (gone > 24) is (share > 0.2)


@pytest.fixture
def doubled(tmp_path: Path, small_images: list[tuple[bytes, int]]) -> Path:
    """60 images: of 20 others each twice, five of these pairs with labels that disagree; the rest once."""
    rows = [{"bytes": data, "path": None} for data, _ in small_images[:40]] + [
        {"bytes": data, "path": None} for data, _ in small_images[:20]
    ]
    labels = [label for _, label in small_images[:40]] + [(label + (n < 5)) % 10 for n, (_, label) in enumerate(small_images[:20])]
    pq.write_table(pa.table({"image": rows, "label": pa.array(labels, pa.int64())}), tmp_path / "x.parquet")
    import_.run(import_.ImportConfig(str(tmp_path / "x.parquet"), out=tmp_path / "data/train", shard_samples=25))
    return tmp_path


def test_exact_duplicates(doubled: Path, kdprune: Cli) -> None:
    ran = kdprune("select", "--frac", "0.5", "--dedup", "exact", "--balance", "none", "--name", "x", cwd=doubled)
    assert ran.code == 0, ran.err
    assert "dedup exact: 40 of 60 candidates; 20 left out, duplicates of 20 samples that stay\n" in ran.err
    assert re.search(
        r"5 groups of the same image with labels that disagree, kept under ('0{6}\d\d'(, | and )){3}2 more: look at these labels\n", ran.err
    )
    made = Manifest.load(doubled / "subsets/x")
    assert {key: made.counts[key] for key in ("candidates", "after_dedup", "label_conflicts", "kept")} == {
        "candidates": 60,
        "after_dedup": 40,
        "label_conflicts": 5,
        "kept": 30,
    }
    assert made.config["dedup"] == "exact"
    assert not made.config.keys() & {"dedup_eps", "dedup_clusters", "where"}
    kept = Dataset.open(doubled / "subsets/x")
    assert len({digest.tobytes() for digest in kept.sha256}) == 30
    assert "; without exact duplicates." in (doubled / "subsets/x/README.md").read_text()
    ran = kdprune("select", "--frac", "0.9", "--dedup", "exact", cwd=doubled)
    assert ran.err.endswith(
        "error: 54 of 60 samples are to be kept, and --dedup leaves 40: keep fewer (--frac 0.666666 at most), or leave more\n"
    )
    assert kdprune("select", "--frac", "0.666666", "--dedup", "exact", cwd=doubled).code == 0
    assert not (doubled / "subsets/random-0.9-s0").exists()


def test_filters_one_after_the_other(doubled: Path, kdprune: Cli) -> None:
    """`--where` first: a sample is no duplicate of one that is not there."""
    words = ["--where", " label in  (0, 1, 2)\n", "--dedup", "exact", "--balance", "none", "--frac", "0.1", "--name", "x"]
    assert kdprune("select", *words, cwd=doubled).code == 0
    data, made = Dataset.open(doubled / "data/train"), Manifest.load(doubled / "subsets/x")
    there = [digest.tobytes() for digest, label in zip(data.sha256, data.labels, strict=True) if label < 3]
    assert (made.counts["after_where"], made.counts["after_dedup"], made.counts["kept"]) == (len(there), len(set(there)), 6)
    assert made.config["where"] == "label in  (0, 1, 2)"
    assert "already done" in kdprune("select", *words, cwd=doubled).err
    ran = kdprune("select", *words[2:], cwd=doubled)
    assert "was made with other settings (where is label in  (0, 1, 2), now null)" in ran.err


def test_a_set_without_digests_has_no_exact_duplicates_to_tell(doubled: Path, kdprune: Cli) -> None:
    shards = tuple(str(path) for path in sorted((doubled / "data/train").glob("*.tar")))
    index.run(index.IndexConfig(shards=shards, out=doubled / "adopted", no_digests=True))
    ran = kdprune("select", "adopted", "--frac", "0.5", "--dedup", "exact", cwd=doubled)
    assert ran.code == 2
    assert (
        "error: --dedup exact compares the digests of images, and adopted has none: adopt it with `kdprune-data index` without" in ran.err
    )


def test_samples_without_a_label(tmp_path: Path, kdprune: Cli, small_images: list[tuple[bytes, int]]) -> None:
    rows = [{"bytes": data, "path": None} for data, _ in small_images[:20]]
    pq.write_table(pa.table({"image": rows, "label": pa.array([None, 3] * 10, pa.int64())}), tmp_path / "x.parquet")
    import_.run(import_.ImportConfig(str(tmp_path / "x.parquet"), out=tmp_path / "data/train"))
    for where, left in (("label != 7", 10), ("not label == 7", 20), ("class != 'class 3'", 0), ("not class == 'class 3'", 10)):
        ran = kdprune("select", "--frac", "0.05", "--balance", "none", "--where", where, "--name", f"x{left}-{len(where)}", cwd=tmp_path)
        assert f"where: {left} of 20 candidates" in ran.err
        assert ran.code == (0 if left else 2)


def test_a_column_of_anothers_file_ranks_and_filters(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    ids = Dataset.open(scored / "data/train").ids.tolist()
    pq.write_table(pa.table({"id": ids, "mine": [float(n) for n in range(120)]}), tmp_path / "s.parquet")
    line = ["select", "--frac", "0.1", "--scores", tmp_path / "s.parquet", "--column", "mine", "--hard", "high", "--balance", "none"]
    words = ["--where", "mine < 100 and el2n < 2", "--skip-hardest", "0.1", "--out", tmp_path / "x"]
    ran = kdprune(*line, *words, cwd=scored)
    assert ran.code == 0, ran.err
    assert set(Dataset.open(tmp_path / "x").ids) == set(ids[78:90])  # of 100 left the hardest tenth goes first
    made = Manifest.load(tmp_path / "x")
    assert [one["role"] for one in made.inputs] == ["data", "scores"]
    assert (made.config["skip_hardest"], made.config["column"]) == (0.1, "mine")


def test_gaps_in_a_column_of_anothers_file_compare_false(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    """A null, a NaN, or no row at all: `--where` may leave such samples out; what is left to rank has no gaps, or is refused."""
    ids = Dataset.open(scored / "data/train").ids.tolist()
    values = [None, float("nan"), *(float(n) for n in range(2, 117))]
    pq.write_table(pa.table({"id": ids[:117], "mine": pa.array(values, pa.float64())}), tmp_path / "s.parquet")
    line = ["select", "--frac", "0.1", "--scores", tmp_path / "s.parquet", "--column", "mine", "--hard", "high", "--balance", "none"]
    for n, (where, left) in enumerate((("mine < 100", 98), ("mine != 5", 114), ("not mine < 100", 22), ("mine < 100 or label >= 0", 120))):
        ran = kdprune(*line, "--where", where, "--out", tmp_path / f"x{n}", cwd=scored)
        assert f"where: {left} of 120 candidates\n" in ran.err
        assert ran.code == (0 if left in (98, 114) else 1), ran.err
        assert left in (98, 114) or "has no score for 3 samples" in ran.err
    assert set(Dataset.open(tmp_path / "x0").ids) == set(ids[88:100])
    pq.write_table(pa.table({"id": ["a", "b"], "mine": [1.0, 2.0]}), tmp_path / "s.parquet")
    ran = kdprune(*line, "--where", "mine < 100", "--out", tmp_path / "y", cwd=scored)
    assert "has no score for any sample of" in ran.err


def test_a_text_in_quotes_is_recorded_as_it_is(doubled: Path, kdprune: Cli) -> None:
    for name, where in (("a", "id != 'a  b'"), ("b", "id != 'a b'")):
        assert kdprune("select", "--frac", "0.1", "--where", where, "--name", name, cwd=doubled).code == 0
        assert Manifest.load(doubled / "subsets" / name).config["where"] == where
    ran = kdprune("select", "--frac", "0.1", "--where", "id != 'a b'", "--name", "a", cwd=doubled)
    assert "was made with other settings (where is id != 'a  b', now id != 'a b')" in ran.err


def test_a_recipe_that_filters_by_scores_needs_them(scored: Path, kdprune: Cli, tmp_path: Path) -> None:
    shutil.copytree(scored / "data", tmp_path / "data")
    (tmp_path / "r.toml").write_text('[select]\nfrac = 0.2\nwhere = "el2n < 1.2"\n')
    ran = kdprune("run", "r.toml", cwd=tmp_path)
    assert ran.code == 2
    assert "--where or --dedup near reads scores, and there are none in scores/: add a section [score]" in ran.err
    shutil.copytree(scored / SCORED, tmp_path / SCORED)
    assert kdprune("run", "r.toml", cwd=tmp_path).code == 0
    assert Manifest.load(tmp_path / "subsets/random-0.2-s0").counts["after_where"] <= 120
