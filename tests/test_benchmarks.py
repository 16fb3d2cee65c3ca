"""benchmarks/: every script runs, on next to nothing. What they measure is for people to read."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ("--models", "resnet8", "--size", "8", "--n", "3", "--rounds", "1", "--threads", "1")

pytestmark = pytest.mark.skipif(not ROOT.exists(), reason="not a checkout")


def ran(script: str, *options: object) -> str:
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "column"),
    [("grand_full.py", "grand_full / forward"), ("score_outputs.py", "scored / plain")],
)
def test_ratios(script: str, column: str) -> None:
    made = json.loads(ran(script, *SMALL, "--json"))
    assert made["machine"]["threads"] == 1
    assert [row[column] > 0 for row in made["rows"]] == [True]


def test_methods(chain: Path) -> None:
    """As a table: the command for what lacks its input, the cost of what has it."""
    scores = next((chain / "scores").iterdir())
    text = ran("methods.py", "--data", chain / "data" / "train", "--scores", scores, "--fractions", "0.1", "--methods", "random", "herding")
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["method", "fraction", "kept"]
    assert [row.split("|")[1].strip() for row in rows] == ["random", "herding"]


def test_soft_label_codes(chain: Path, tmp_path: Path) -> None:
    """As tables and as JSON, which agree: every kind of logits, every number of views, what was tried, files and times."""
    teacher = next((chain / "teachers").iterdir())
    options = ("--samples", 60, "--views", 3, "--synthetic", 20, "--threads", 1, "--out", tmp_path / "results.json")
    text = ran("soft_label_codes.py", "--data", chain / "data" / "train", "--teacher", teacher, *options)
    made = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert made["machine"]["samples"] == 60
    titles = [line.strip("*") for line in text.splitlines() if line.startswith("**")]
    assert titles == list(made["tables"])
    assert len(made["tables"]["logits"]) == 3
    assert text.count("| coded (kept) |") == 4 * 3 + 2
    assert {row["fidelity"] for row in made["tables"]["number of views"]} == {1e-2}
    float32 = next(row for rows in made["tables"].values() for row in rows if row.get("code") == "float32")
    assert float32["view, bytes"] == 40
    assert float32["KL at 1"] == pytest.approx(0, abs=1e-9)


def test_no_script_hides_a_module() -> None:
    """A script's folder is the first that Python looks in: one called `selectors.py` would stand in the place of the library's."""
    assert {path.stem for path in ROOT.glob("*.py")} & sys.stdlib_module_names == set()


def test_soft_label_views(chain: Path, tmp_path: Path) -> None:
    """Three arms of the study, one epoch each; what is there already is not made again."""
    shutil.copytree(chain / "data/train", tmp_path / "data/train")
    shutil.copytree(chain / "data/test", tmp_path / "data/test")
    shutil.copytree(chain / "teachers", tmp_path / "teachers")
    teacher = next((tmp_path / "teachers").iterdir())
    options = [
        "--teacher",
        teacher,
        "--val",
        chain / "data/val",
        "--frac",
        "0.5",
        "--epochs",
        1,
        "--seeds",
        0,
        "--threads",
        1,
        "--arms",
        3,
        "--json",
    ]
    command = [sys.executable, str(ROOT / "soft_label_views.py"), *map(str, options)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert [row["seeds"] for row in rows] == [1] * 3
        assert all(0 <= float(row["test"]) <= 100 for row in rows)
    assert len(list((tmp_path / "students").iterdir())) == 3


@pytest.fixture(scope="module")
def small_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty JPEGs of 16 pixels and of about 300, in Hugging Face's layout, in a file each."""
    folder = tmp_path_factory.mktemp("parquet")
    for name, sides in (("small", (16, 16)), ("photos", (310, 280))):
        rows = []
        for n in range(40):
            file, side = io.BytesIO(), (sides[0], sides[1] + (n % 3 if name == "photos" else 0))
            noise = np.random.default_rng(n).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(noise).resize(side, Image.Resampling.BICUBIC).save(file, "jpeg")
            rows.append({"image": {"bytes": file.getvalue(), "path": f"{n:04d}.jpg"}, "label": n % 4})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("script", "data", "options", "rows"),
    [
        ("small_batches.py", "small", ("--samples", 600, "--batches", 2), 5),
        ("soft_label_join.py", "small", ("--samples", 600, "--batches", 2, "--classes", 20), 5),
        ("decode_crop.py", "photos", ("--samples", 9, "--side", 600), 12),
    ],
)
def test_reading(small_parquet: Path, tmp_path: Path, script: str, data: str, options: tuple[object, ...], rows: int) -> None:
    """Rows with their goals, also in a file with what they were measured on."""
    file = tmp_path / "results.json"
    ran(script, "--data", small_parquet / f"{data}.parquet", "--rounds", 1, "--out", file, *options)
    made = json.loads(file.read_text(encoding="utf-8"))
    assert len(made["rows"]) == rows
    assert any(row["goal"] for row in made["rows"])
    assert {"processor", "torch", "commit", "n"} <= set(made["machine"])


@pytest.mark.parametrize(
    ("script", "data", "options", "rows"),
    [
        ("index_scan.py", "small", ("--samples", 200, "--photo-samples", 9, "--rounds", 1), 18),
        ("raw_read.py", "small", ("--samples", 300, "--photo-samples", 9, "--rounds", 1), 12),
        ("import_bytes.py", "small", ("--samples", 300), 4),
        ("max_side.py", "photos", ("--samples", 40, "--side", 600, "--sides", 290, 64, "--rounds", 1), 6),
    ],
)
def test_shards(small_parquet: Path, tmp_path: Path, script: str, data: str, options: tuple[object, ...], rows: int) -> None:
    """Shards that are found, read, made and made smaller: the scripts check themselves that what they compare is the same."""
    photos = ("--photos", small_parquet / "photos.parquet") if "--photo-samples" in options else ()
    ran(script, "--data", small_parquet / f"{data}.parquet", "--out", tmp_path / "results.json", *photos, *options)
    made = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(made["rows"]) == rows
    assert {"processor", "commit", "n"} <= set(made["machine"])


def test_select_copy(small_parquet: Path, tmp_path: Path) -> None:
    """Both sizes, each from both kinds of shards; that all have written the same samples the script sees to."""
    data = ("--photos", small_parquet / "photos.parquet", "--bytes", 1000, "--data", small_parquet / "small.parquet", "--samples", 30)
    ran("select_copy.py", *data, "--rounds", 1, "--peer-rounds", 1, "--work", tmp_path / "work", "--out", tmp_path / "results.json")
    made = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for images in ("photographs", "32x32"):
        rows = {(row["packed by"], row["what"]): row for row in made["rows"] if row["images"] == images}
        assert {what for _, what in rows} >= {"cp", "select", "select --unchecked", "select --normalize", "WebDataset, ShardWriter"}
        assert rows["WebDataset", "select"]["goal"]
        assert all(row["by cp"] > 0 and row["peer by this"] > 0 for (_, what), row in rows.items() if what.startswith("select"))
    assert {"processor", "webdataset", "commit", "n"} <= set(made["machine"])


def test_stages(small_parquet: Path) -> None:
    """Every stage of the job is run, and working time is told apart."""
    made = json.loads(ran("stages.py", "--data", small_parquet / "small.parquet", "--model", "resnet8", "--threads", 1, "--json"))
    assert [row["stage"].partition(",")[0] for row in made["rows"]] == ["import", "teacher", "score", "select", "cache", "distill"]
    assert "the network" in made["rows"][1]["working time"]


def test_select_100m(tmp_path: Path) -> None:
    """The peers keep what `pick` keeps, or the script says so and stops; nothing is left."""
    pytest.importorskip("duckdb")
    pytest.importorskip("polars")
    options = ("--rows", 20_000, "--scores", "poisson", "--rounds", 1, "--work", tmp_path, "--json")
    made = json.loads(ran("select_100m.py", *options))
    assert [row["kept"] for row in made["rows"]] == [10_000] * 5
    assert all(row["/ faster peer"] > 0 and row["peak RSS, MB"] > 0 for row in made["rows"])
    assert [row["method"] for row in made["rows"] if row["goal"]] == ["pick"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("teacher_pass.py", ("--samples", 60, "--model", "resnet8"), 7),
        ("epoch.py", ("--samples", 140, "--model", "resnet8", "--large", "resnet14", "--steps", 1), 4),
    ],
)
def test_networks_at_work(small_parquet: Path, tmp_path: Path, script: str, options: tuple[object, ...], rows: int) -> None:
    """Passes and training steps, which the scripts check to be of the same numbers; what bf16 costs stands beside its rows."""
    file = tmp_path / "results.json"
    ran(script, "--data", small_parquet / "small.parquet", "--rounds", 1, "--threads", 1, "--out", file, *options)
    made = json.loads(file.read_text(encoding="utf-8"))
    assert len(made["rows"]) == rows
    assert any(row["goal"] for row in made["rows"])
    low = [row for row in made["rows"] if row.get("KL at 1") is not None]
    assert [row["pass"] for row in low] == (["score", "cache"] if script == "teacher_pass.py" else [])


def test_a_trained_teacher_passes(chain: Path, tmp_path: Path) -> None:
    """Over a part of the data that it knows."""
    teacher, file = next((chain / "teachers").iterdir()), tmp_path / "results.json"
    options = ("--samples", 54, "--rounds", 1, "--threads", 1, "--out", file)
    ran("teacher_pass.py", "--data", chain / "data/train", "--teacher", teacher, *options)
    made = json.loads(file.read_text(encoding="utf-8"))
    assert (made["machine"]["n"], made["machine"]["teacher"]) == (54, teacher.name)
