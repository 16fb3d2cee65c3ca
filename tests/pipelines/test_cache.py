"""`cache`: geometry as drawn, logits as the teacher says them of those very pixels, views that are only ever added."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from kdprune_pipelines import _asking, _models
from PIL import Image

from kdprune_data.formats import logit_files as cached
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logit_files import ViewRows
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest, canonical
from kdprune_data.learn import views
from kdprune_data.learn.stream import Images
from kdprune_data.learn.views import Policy

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
SUBSET, TEACHER, CACHE = Path("subsets/random-0.5-s0"), Path("teachers/resnet8-s0"), Path("logits/random-0.5-s0--resnet8-s0")


def whole_views(data: Dataset, folder: Path) -> list[ViewRows]:
    """Every view of every sample, in the data's order."""
    cache = LogitCache.open(folder)
    joined = cache.join(data)
    return [joined.read(np.arange(len(data)), view) for view in range(cache.views)]


def said(workspace: Path, data: Dataset, view: int) -> np.ndarray:
    """What the teacher says of one view, rendered anew: float32 of shape (n, c)."""
    saved = _models.open_model(workspace / TEACHER)
    policy = views.policy_for(data.sizes, data.classes, size=8, flip="auto", seed=0)
    boxes = views.geometry(policy, data.uids, data.sizes, view)
    pixels = views.render(Images(data).get(np.arange(len(data))), boxes, 8)
    with torch.no_grad():
        return saved.load(code=None).eval()(saved.normalisation.apply(pixels)).numpy()


def equal(a: ViewRows, b: ViewRows) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- what is written


def test_the_folder(chain: Path) -> None:
    manifest = Manifest.load(chain / CACHE)
    assert [f.path for f in manifest.files] == [
        *(f"rows/shard-{n:06d}.parquet" for n in (0, 1)),
        *(f"views-0000-0002/shard-{n:06d}.arrow" for n in (0, 1)),
    ]
    assert manifest.counts == {"samples": 54, "views": 3, "classes": 10}
    assert set(manifest.config) == {"dtype", "policy", "precision", "batch"}
    assert [i["role"] for i in manifest.inputs] == ["data", "teacher"]
    assert manifest.content == Manifest.load(chain / SUBSET).content


def test_rows(chain: Path) -> None:
    data = Dataset.open(chain / SUBSET)
    correct = sum((said(chain, data, view).argmax(1) == data.labels).astype(int) for view in range(3))
    for shard in (0, 1):
        table = pq.read_table(chain / CACHE / cached.rows_path(shard))
        rows = data.rows_of(shard)
        assert table.schema.equals(cached.ROWS_SCHEMA)
        assert table["id"].to_pylist() == data.ids[rows].tolist()
        assert table["label"].to_pylist() == data.labels[rows].tolist()
        assert np.stack([table["height"], table["width"]], 1).tolist() == data.sizes[rows].tolist()
        assert table["sha256"].to_pylist() == [digest.tobytes() for digest in data.sha256[rows]]
        assert table["top1_correct"].to_pylist() == correct[rows].tolist()


def test_metadata(chain: Path) -> None:
    """All of it text, as the page says."""
    data = Dataset.open(chain / SUBSET)
    teacher = Manifest.load(chain / TEACHER)
    for shard in (0, 1):
        reader = pa.ipc.open_file(chain / CACHE / cached.view_path(0, 2, shard))
        found = {k.decode(): v.decode() for k, v in reader.schema.metadata.items()}
        rows = data.rows_of(shard)
        correct = [int((said(chain, data, view)[rows].argmax(1) == data.labels[rows]).sum()) for view in range(3)]
        assert found.pop("rows") == cached.rows_digest(data.ids[rows], data.sha256[rows])
        lost = json.loads(found.pop("kl"))
        assert found == {
            "format": "1",
            "teacher": teacher.digest,
            "classes": cached.classes_digest(data.classes),
            "policy": canonical(views.policy_for(data.sizes, data.classes, size=8, flip="auto", seed=0).to_dict()).decode(),
            "normalisation": canonical(teacher.config["normalisation"]).decode(),
            "views": "0,2",
            "top1_correct": json.dumps(correct, separators=(",", ":")),
        }
        full = torch.cat([torch.from_numpy(said(chain, data, view)[rows]) for view in range(3)])
        kept = torch.from_numpy(cached.stored(full.numpy(), "float16").astype(np.float32))
        for tau in (1, 2, 4):
            p, q = ((z.double() / tau).log_softmax(1) for z in (full, kept))
            assert lost[str(tau)] == pytest.approx(float(F.kl_div(q, p, reduction="batchmean", log_target=True)), abs=1e-7)


def test_a_record_batch_per_view(chain: Path) -> None:
    reader = pa.ipc.open_file(chain / CACHE / cached.view_path(0, 2, 0))
    assert reader.num_record_batches == 3
    assert reader.schema.names == ["top", "left", "height", "width", "flip", "logits"]
    assert [str(kind) for kind in reader.schema.types] == ["int8"] * 4 + ["bool", "fixed_size_list<item: halffloat>[10]"]


# --- what the views hold


def test_geometry_is_what_the_policy_draws(chain: Path) -> None:
    data = Dataset.open(chain / SUBSET)
    policy = Policy.from_dict(LogitCache.open(chain / CACHE).policy)
    for view, found in enumerate(whole_views(data, chain / CACHE)):
        drawn = views.geometry(policy, data.uids, data.sizes, view)
        for side in ("top", "left", "height", "width", "flip"):
            assert np.array_equal(getattr(found, side), getattr(drawn, side))


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("float32", np.float32)])
def test_logits_are_what_the_teacher_says_of_the_rendered_views(chain_copy: Path, kdprune: Cli, dtype: str, kind: type) -> None:
    ran = kdprune("cache", "--views", 2, "--dtype", dtype, "--name", "again", cwd=chain_copy)
    assert ran.code == 0, ran.err
    data = Dataset.open(chain_copy / SUBSET)
    for view, found in enumerate(whole_views(data, chain_copy / "logits/again")):
        z = said(chain_copy, data, view)
        shifted = z - z.max(1, keepdims=True)
        assert found.logits.dtype == kind
        assert (found.logits.max(1) == 0).all()
        assert found.logits.astype(np.float32) == pytest.approx(shifted, rel=1e-3 if kind is np.float16 else 1e-5, abs=1e-4)


def test_float16_clips_what_it_cannot_hold() -> None:
    z = np.array([[0.0, -70000.0, 1e30, -1e30], [1.0, 2.0, 3.0, 4.0]], np.float32)
    assert cached.stored(z, "float16").tolist() == [[-65504, -65504, 0, -65504], [-3, -2, -1, 0]]
    assert cached.stored(z, "float32").tolist()[1] == [-3, -2, -1, 0]
    assert np.isfinite(cached.stored(z, "float32")).all()


@pytest.mark.parametrize("more", [["--batch", "7"], ["--batch", "1"], ["--jobs", "4"]])
def test_batch_and_jobs_change_nothing(chain_copy: Path, kdprune: Cli, digests: Digests, more: list[str]) -> None:
    ran = kdprune("cache", "--views", 3, "--name", "again", *more, cwd=chain_copy)
    assert ran.code == 0, ran.err
    data = Dataset.open(chain_copy / SUBSET)
    if more[0] == "--jobs":
        assert digests(chain_copy / "logits/again") == digests(chain_copy / CACHE)
    for a, b in zip(whole_views(data, chain_copy / CACHE), whole_views(data, chain_copy / "logits/again"), strict=True):
        assert equal(ViewRows(*a[:5], b.logits), b)
        assert a.logits.astype(np.float32) == pytest.approx(b.logits.astype(np.float32), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(("decoded", "rendered"), [(1, 1), (5, 2000), (1000, 10**9)])
def test_memory_changes_nothing(
    chain_copy: Path, kdprune: Cli, digests: Digests, monkeypatch: pytest.MonkeyPatch, decoded: int, rendered: int
) -> None:
    """However few samples are decoded or rendered at once, the bytes are the same."""
    monkeypatch.setattr(_asking, "DECODED_AT_ONCE", decoded)
    monkeypatch.setattr(_asking, "RENDERED_BYTES", rendered)
    ran = kdprune("cache", "--views", 3, "--name", "again", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert digests(chain_copy / "logits/again") == digests(chain_copy / CACHE)


def test_a_cache_of_everything_holds_what_a_subset_s_does(chain_copy: Path, kdprune: Cli) -> None:
    """A view is a function of (seed, id, view): the other samples of a set, and its shards, do not matter."""
    assert kdprune("cache", "data/train", "--views", 3, cwd=chain_copy).code == 0
    data = Dataset.open(chain_copy / SUBSET)
    for a, b in zip(whole_views(data, chain_copy / CACHE), whole_views(data, chain_copy / "logits/train--resnet8-s0"), strict=True):
        assert equal(ViewRows(*a[:5], b.logits), b)
        assert a.logits.astype(np.float32) == pytest.approx(b.logits.astype(np.float32), rel=2e-3, abs=1e-4)


def test_another_seed_is_another_view(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("cache", "--views", 1, "--seed", 1, "--name", "other", cwd=chain_copy).code == 0
    data = Dataset.open(chain_copy / SUBSET)
    (first, *_), (other,) = whole_views(data, chain_copy / CACHE), whole_views(data, chain_copy / "logits/other")
    assert not np.array_equal(first.top, other.top)


def test_each_column_takes_the_narrowest_integer(tmp_path: Path, kdprune: Cli, class_folders: Path) -> None:
    """Images of 16 pixels and one of 16 x 400: only `left` and `width` need more than a byte."""
    one = next(class_folders.rglob("*.png"))
    with Image.open(one) as image:
        image.resize((400, 16)).save(one)
    for line in (
        ["import", class_folders],
        ["teacher", "--model", "resnet8", "--epochs", 1, "--batch", 8, "--size", 8],
        ["cache", "data/train", "--views", 30],
        ["verify", "logits/train--resnet8-s0"],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    folder = tmp_path / "logits/train--resnet8-s0"
    reader = pa.ipc.open_file(folder / cached.view_path(0, 29, 0))
    data = Dataset.open(tmp_path / "data/train")
    policy = Policy.from_dict(LogitCache.open(folder).policy)
    assert policy.kind == "resized-crop"
    assert LogitCache.open(folder).rows(0)["width"].to_pylist() == data.sizes[:, 1].tolist()
    drawn = [views.geometry(policy, data.uids, data.sizes, view) for view in range(30)]
    for side in ("top", "left", "height", "width"):
        values = np.stack([getattr(boxes, side) for boxes in drawn])
        expected = "int8" if values.max() < 128 else "int16"
        assert str(reader.schema.field(side).type) == expected, side
        stored = np.stack([reader.get_batch(view).column(side).to_numpy() for view in range(30)])
        assert np.array_equal(stored, values)
    assert str(reader.schema.field("left").type) == "int16"
    assert str(reader.schema.field("height").type) == "int8"


def test_unlabelled_samples_are_cached(chain_copy: Path, kdprune: Cli, unlabelled: Path) -> None:
    (chain_copy / "names.txt").write_text("\n".join("0123456789"))
    for line in (
        ["index", unlabelled, "--out", "data/bare", "--classes", "names.txt"],
        ["cache", "data/bare", "--views", 2, "--name", "bare"],
        ["verify", "logits/bare"],
        ["distill", "data/bare", "--logits", "logits/bare", "--alpha", 1, "--model", "resnet8", "--steps", 2, "--name", "bare"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    rows = LogitCache.open(chain_copy / "logits/bare").rows(0)
    assert rows["label"].null_count == 40
    assert set(rows["top1_correct"].to_pylist()) == {0}
    ran = kdprune("distill", "data/bare", "--logits", "logits/bare", "--alpha", 0.9, "--model", "resnet8", "--steps", 2, cwd=chain_copy)
    assert (ran.code, "40 samples without a label" in ran.err) == (2, True)


# --- append-only


@pytest.mark.parametrize("more", [4, 5, 11])
def test_more_views_add_files_and_leave_those_that_stand(chain_copy: Path, kdprune: Cli, digests: Digests, more: int) -> None:
    folder = chain_copy / CACHE
    before = digests(folder)
    times = {path: (folder / path).stat().st_mtime_ns for path in before}
    first = whole_views(Dataset.open(chain_copy / SUBSET), folder)
    ran = kdprune("cache", "--views", more, cwd=chain_copy)
    assert ran.code == 0, ran.err
    after = digests(folder)
    assert {path: after[path] for path in before} == before
    assert {path: (folder / path).stat().st_mtime_ns for path in before} == times
    assert set(after) - set(before) == {cached.view_path(3, more - 1, shard) for shard in (0, 1)}
    assert Manifest.load(folder).counts["views"] == more
    assert all(equal(a, b) for a, b in zip(first, whole_views(Dataset.open(chain_copy / SUBSET), folder), strict=False))
    assert kdprune("verify", folder, cwd=chain_copy).code == 0


def test_views_in_ranges_are_those_made_at_once(chain_copy: Path, kdprune: Cli) -> None:
    for views_ in (2, 4, 5):
        assert kdprune("cache", "--views", views_, "--name", "ranges", cwd=chain_copy).code == 0
    assert kdprune("cache", "--views", 5, "--name", "once", cwd=chain_copy).code == 0
    data = Dataset.open(chain_copy / SUBSET)
    ranges, once = (whole_views(data, chain_copy / "logits" / name) for name in ("ranges", "once"))
    assert len(ranges) == len(once) == 5
    assert all(equal(a, b) for a, b in zip(ranges, once, strict=True))


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_fewer_views_are_already_done(chain_copy: Path, kdprune: Cli, digests: Digests, asked: int) -> None:
    before, manifest = digests(chain_copy), (chain_copy / CACHE / "manifest.json").read_bytes()
    ran = kdprune("cache", "--views", asked, cwd=chain_copy)
    assert ran.code == 0
    assert "already done: 3 views there" in ran.err
    assert digests(chain_copy) == before
    assert (chain_copy / CACHE / "manifest.json").read_bytes() == manifest


def test_ranges_are_cut_at_256_megabytes() -> None:
    assert cached.ranges(0, 7, 1000) == [(0, 7)]
    assert cached.ranges(0, 7, 100_000_000) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert cached.ranges(3, 7, 60_000_000) == [(3, 6), (7, 7)]
    assert cached.ranges(0, 2, 10**12) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("change", "said_of_it"),
    [
        (["--dtype", "float32"], "dtype is float16, now float32"),
        (["--seed", "1"], "policy.seed is 0, now 1"),
        (["--flip", "on"], "policy.flip is false, now true"),
        (["--batch", "32"], "batch is 256, now 32"),
        (["--teacher", "teachers/resnet8-s1"], "teacher is"),
        (["data/train"], "data is"),
    ],
)
def test_another_configuration_is_refused(chain_copy: Path, kdprune: Cli, digests: Digests, change: list[str], said_of_it: str) -> None:
    other = ["teacher", "--model", "resnet8", "--steps", 2, "--batch", 16, "--seed", 1]
    assert kdprune(*other, cwd=chain_copy).code == 0
    before = digests(chain_copy)
    given = [*change, *([SUBSET] if change[0].startswith("--") else [])]
    chosen = [] if "--teacher" in change else ["--teacher", TEACHER]
    ran = kdprune("cache", "--views", 4, "--name", CACHE.name, *given, *chosen, cwd=chain_copy)
    assert ran.code == 2
    assert said_of_it in ran.err
    assert digests(chain_copy) == before


# --- killed


@pytest.fixture
def killed(chain_copy: Path, kdprune: Cli, started: Cli) -> tuple[Path, list[object]]:
    """A cache of four views of 27 shards of a sample each, killed when it had written a few; and the command, without its views."""
    many = "subsets/many"
    assert kdprune("select", "--frac", "0.25", "--shard-samples", "1", "--out", many, cwd=chain_copy).code == 0
    line = ["cache", many, "--jobs", 1, "--out"]
    folder = chain_copy / "logits/killed"
    running = started(*line, folder, "--views", 4, cwd=chain_copy)
    while not (folder / cached.rows_path(12)).exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (folder / "manifest.json").exists()
    return folder, line


def test_a_killed_run_goes_on(chain_copy: Path, kdprune: Cli, killed: tuple[Path, list[object]], digests: Digests) -> None:
    """With the same bytes; or, asked for more views, as if the first had never been."""
    folder, line = killed
    copy = shutil.copytree(folder, chain_copy / "logits/copy")
    first = (folder / cached.view_path(0, 3, 0)).stat().st_mtime_ns
    for views_, out in ((4, folder), (6, copy)):
        undisturbed = chain_copy / f"logits/undisturbed-{views_}"
        for where in (out, undisturbed):
            ran = kdprune(*line, where, "--views", views_, cwd=chain_copy)
            assert ran.code == 0, ran.err
        assert digests(out) == digests(undisturbed)
        assert kdprune("verify", out, cwd=chain_copy).code == 0
    assert (folder / cached.view_path(0, 3, 0)).stat().st_mtime_ns == first


def test_a_killed_addition_can_be_given_up(chain_copy: Path, kdprune: Cli, started: Cli, digests: Digests) -> None:
    """Three views stand, the run that was to make them nine is killed; then three are asked for again, and it is as it was."""
    many = "subsets/many"
    assert kdprune("select", "--frac", "0.25", "--shard-samples", "1", "--out", many, cwd=chain_copy).code == 0
    folder = chain_copy / "logits/killed"
    line = ["cache", many, "--jobs", 1, "--out", folder, "--views"]
    assert kdprune(*line, 3, cwd=chain_copy).code == 0
    before = digests(folder)
    running = started(*line, 9, cwd=chain_copy)
    while not (folder / cached.view_path(3, 8, 2)).exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert LogitCache.open(folder).views == 3  # what stood can be read meanwhile
    assert kdprune(*line, 3, cwd=chain_copy).code == 0
    assert digests(folder) == before
    assert kdprune("verify", folder, cwd=chain_copy).code == 0


# --- real photographs, of many sizes


def test_photographs(tmp_path: Path, real_data: Path, kdprune: Cli) -> None:
    """Random resized crops of 100 real photographs: what is stored is what is drawn, and what the teacher says of it."""
    for line in (
        ["import", real_data / "photos/train.parquet", "--shard-samples", 60],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 32, "--size", 32],
        ["select", "--frac", "0.2", "--balance", "none"],
        ["cache", "--views", 2, "--dtype", "float32"],
        ["distill", "--model", "resnet8", "--steps", 2, "--batch", 16],
        *(["verify", folder] for folder in ("subsets/random-0.2-s0", "logits/random-0.2-s0--resnet8-s0")),
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    data = Dataset.open(tmp_path / "subsets/random-0.2-s0")
    saved = _models.open_model(tmp_path / TEACHER)
    policy = Policy.from_dict(LogitCache.open(tmp_path / "logits/random-0.2-s0--resnet8-s0").policy)
    assert (policy.kind, policy.size, policy.flip) == ("resized-crop", 32, True)
    for view, found in enumerate(whole_views(data, tmp_path / "logits/random-0.2-s0--resnet8-s0")):
        boxes = views.geometry(policy, data.uids, data.sizes, view)
        assert all(np.array_equal(getattr(found, side), getattr(boxes, side)) for side in ("top", "left", "height", "width", "flip"))
        assert (found.top + found.height <= data.sizes[:, 0]).all()
        assert (found.left + found.width <= data.sizes[:, 1]).all()
        pixels = views.render(Images(data).get(np.arange(len(data))), boxes, 32)
        with torch.no_grad():
            z = saved.load(code=None).eval()(saved.normalisation.apply(pixels)).numpy()
        assert found.logits == pytest.approx(z - z.max(1, keepdims=True), rel=1e-4, abs=1e-4)
