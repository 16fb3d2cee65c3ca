"""`score`: every number against a direct computation, joined by id, whatever the batch; and killed in the middle."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kdprune_pipelines import _columns, _models, _scoring
from safetensors.torch import load_file, save_file

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.formats.scores import SCORES, Scores
from kdprune_data.learn import models, views
from kdprune_data.learn.stream import Images
from kdprune_data.scores import FROM_OUTPUTS, Outputs

MADE = [name for name, score in SCORES.items() if not score.asked and name != "tdds"]
"""The scores of a teacher that has not recorded its logits, where nothing more is asked for."""
Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
TEACHER, SCORED = Path("teachers/resnet8-s0"), Path("scores/resnet8-s0")


def outputs(workspace: Path, data: Dataset, epoch: int | None) -> Outputs:
    """What the teacher says of all images at once."""
    saved = _models.open_model(workspace / TEACHER)
    net = saved.load(code=None, epoch=epoch).eval()
    images = views.evaluation(Images(data).get(np.arange(len(data))), 8)
    with torch.no_grad():
        embedding, logits = models.features(net, saved.normalisation.apply(images))
    return Outputs(logits, torch.from_numpy(data.labels.astype(np.int64)), embedding)


def parts(folder: Path) -> list[pa.Table]:
    return [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]


def column(folder: Path, name: str) -> np.ndarray:
    return np.concatenate([part[name].to_numpy(zero_copy_only=False) for part in parts(folder)])


def vectors(folder: Path, what: str) -> np.ndarray:
    pieces = []
    for path in sorted(folder.glob(f"{what}-*.arrow")):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        assert reader.num_record_batches == 1
        assert reader.schema.names == [what]
        batch = reader.get_batch(0)
        assert batch.schema.field(what).type.value_type == pa.float16()
        pieces.append(batch.column(what).flatten().to_numpy().reshape(len(batch), -1))
    return np.concatenate(pieces)


# --- what is written


def test_the_parts(chain: Path) -> None:
    data = Dataset.open(chain / "data/train")
    found = parts(chain / SCORED)
    assert [len(part) for part in found] == [len(data.rows_of(n)) for n in range(3)] == [40, 40, 28]
    for part in found:
        assert part.schema.names == ["id", "label", *MADE]
        assert [part.schema.field(n).type for n in part.schema.names] == [pa.string(), pa.int32(), *[pa.float32()] * len(MADE)]
    assert column(chain / SCORED, "id").tolist() == data.ids.tolist()
    assert column(chain / SCORED, "label").tolist() == data.labels.tolist()


def test_the_fields_say_which_end_is_hard_and_where_they_come_from(chain: Path) -> None:
    early, final, past = "epoch-001.safetensors", "model.safetensors", "dynamics of 3 epochs"
    expected = {name: {"early": early, "final": final, "dynamics": past}[SCORES[name].source] for name in MADE}
    for part in parts(chain / SCORED):
        for name in MADE:
            metadata = {k.decode(): v.decode() for k, v in part.schema.field(name).metadata.items() if not k.startswith(b"PARQUET")}
            assert metadata == {"hard": SCORES[name].hard, "source": expected[name]}


def test_the_manifest(chain: Path) -> None:
    manifest = Manifest.load(chain / SCORED)
    assert manifest.counts == {"samples": 108, "shards": 3}
    assert manifest.content == Manifest.load(chain / "data/train").content
    assert [i["role"] for i in manifest.inputs] == ["data", "teacher"]
    assert manifest.config["columns"] == MADE
    assert (manifest.config["early_epoch"], manifest.config["batch"], manifest.config["precision"]) == (1, 256, "float32")


# --- the numbers


@pytest.mark.parametrize("name", FROM_OUTPUTS)
def test_scores_of_outputs(chain: Path, name: str) -> None:
    data = Dataset.open(chain / "data/train")
    out = outputs(chain, data, epoch=1 if SCORES[name].source == "early" else None)
    assert column(chain / SCORED, name) == pytest.approx(FROM_OUTPUTS[name](out).numpy(), abs=1e-5, rel=1e-5)
    other = outputs(chain, data, epoch=None if SCORES[name].source == "early" else 1)
    assert not np.allclose(column(chain / SCORED, name), FROM_OUTPUTS[name](other).numpy(), atol=1e-2)


def test_embedding_and_logits(chain: Path) -> None:
    out = outputs(chain, Dataset.open(chain / "data/train"), epoch=None)
    for what in ("embedding", "logits"):
        expected = getattr(out, what).numpy()
        assert vectors(chain / SCORED, what) == pytest.approx(expected.astype(np.float16), rel=2e-3, abs=2e-3)


def test_without_asking_there_are_no_vectors(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("score", "--name", "plain", cwd=chain_copy).code == 0
    assert not list((chain_copy / "scores/plain").glob("*.arrow"))


@pytest.mark.parametrize("more", [["--batch", "7"], ["--batch", "1"], ["--batch", "39"], ["--jobs", "4"]])
def test_batch_and_jobs_change_nothing(chain_copy: Path, kdprune: Cli, digests: Digests, more: list[str]) -> None:
    assert kdprune("score", "--embedding", "--logits", "--name", "again", *more, cwd=chain_copy).code == 0
    again = chain_copy / "scores/again"
    if more[0] == "--jobs":
        assert digests(again) == digests(chain_copy / SCORED)
    for name in MADE:
        assert column(again, name) == pytest.approx(column(chain_copy / SCORED, name), rel=1e-5, abs=1e-5)
    for what in ("embedding", "logits"):
        assert vectors(again, what) == pytest.approx(vectors(chain_copy / SCORED, what), rel=2e-3, abs=2e-3)


# --- other data


def test_a_subset_gets_the_scores_of_its_samples(chain_copy: Path, kdprune: Cli) -> None:
    """By id, dynamics too: the subset's rows stand elsewhere."""
    assert kdprune("score", "--data", "subsets/random-0.5-s0", "--name", "half", cwd=chain_copy).code == 0
    half, whole = chain_copy / "scores/half", chain_copy / SCORED
    row_of = {one: n for n, one in enumerate(column(whole, "id").tolist())}
    rows = [row_of[one] for one in column(half, "id").tolist()]
    assert len(rows) == 54
    assert rows != list(range(54))
    for name in MADE:
        assert column(half, name) == pytest.approx(column(whole, name)[rows], rel=1e-5, abs=1e-5)


def test_samples_that_the_teacher_never_saw_have_no_dynamics(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune("score", "--data", "data/test", "--name", "test", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert "aum, correct, p_true, dyn_unc, dual and tdds are left out" in ran.err
    assert Scores.open(chain_copy / "scores/test").columns == list(FROM_OUTPUTS)


@pytest.mark.parametrize("change", ["two swapped", "one more"])
def test_dynamics_of_other_samples_are_refused(chain_copy: Path, kdprune: Cli, change: str) -> None:
    """Every epoch's must be of the same samples in the same order: they are joined by place."""
    path = chain_copy / TEACHER / "dynamics/epoch-002.parquet"
    table = pq.read_table(path)
    order = [1, 0, *range(2, 108)] if change == "two swapped" else [*range(108), 5]
    pq.write_table(table.take(order), path)
    manifest = Manifest._parse(chain_copy / TEACHER / "manifest.json")
    whole = [
        File(f.path, (chain_copy / TEACHER / f.path).stat().st_size, sha256_file(chain_copy / TEACHER / f.path)) for f in manifest.files
    ]
    (chain_copy / TEACHER / "manifest.json").write_bytes(replace(manifest, files=whole).to_json())
    ran = kdprune("score", "--name", "other", cwd=chain_copy)
    said = "epoch-002.parquet is not of the same samples, in the same order, as that of epoch 1: make or fetch the teacher again"
    assert (ran.code, said in ran.err) == (1, True), ran.err
    assert not (chain_copy / "scores/other").exists()


@pytest.mark.skipif(torch.accelerator.current_accelerator(check_available=True) is None, reason="no accelerator here")
def test_scores_are_computed_on_the_cpu(chain: Path) -> None:
    """In float64, which not every accelerator has; the networks run on it."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    saved, data = _models.open_model(chain / TEACHER), Dataset.open(chain / "data/train")
    net = saved.load(code=None).to(device).eval()
    networks = _scoring.Networks([net], [net], net, saved.normalisation, 8, device)
    columns = _columns.Columns(list(FROM_OUTPUTS), {})
    scorer = _scoring.Scorer(columns, Images(data), networks, {}, ["embedding", "logits"], batch=20, jobs=1, memory=10**9, seed=0)
    [(found, vectors)] = _scoring.scored(scorer, [np.arange(20)])
    assert all(np.isfinite(values).all() for values in (*found.values(), *vectors.values()))


def test_what_does_not_decode_has_no_row(tmp_path: Path, kdprune: Cli, class_folders: Path) -> None:
    broken = sorted(class_folders.rglob("*.jpg"))[:3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    for line in (
        ["import", class_folders, "--on-bad", "keep", "--shard-samples", 10],
        ["teacher", "--model", "resnet8", "--epochs", 2, "--batch", 9],
        ["score"],
        ["cache", "data/train", "--views", 1],
        ["verify", SCORED],
        ["verify", "logits/train--resnet8-s0"],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    data = Dataset.open(tmp_path / "data/train")
    assert column(tmp_path / SCORED, "id").tolist() == data.ids[data.ok].tolist()
    cached = [pq.read_table(path)["id"].to_pylist() for path in sorted((tmp_path / "logits/train--resnet8-s0/rows").iterdir())]
    assert [one for part in cached for one in part] == data.ids[data.ok].tolist()
    assert len(data) - data.ok.sum() == 3


def test_a_teacher_of_one_epoch_has_no_early_one(chain_copy: Path, kdprune: Cli) -> None:
    short = "teachers/short"
    assert kdprune("teacher", "--model", "resnet8", "--epochs", 1, "--batch", 16, "--out", short, cwd=chain_copy).code == 0
    ran = kdprune("score", "--teacher", short, cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert "keeps no early epoch" in ran.err
    (part, *_) = parts(chain_copy / "scores/short")
    assert part.schema.field("el2n").metadata[b"source"] == b"model.safetensors"
    for name in ("dyn_unc", "dual"):
        assert f"{name} needs 2 recorded epochs or more, not 1: train the teacher for longer" in ran.err
        assert name not in part.schema.names
    ran = kdprune("score", "--teacher", short, "--set", "dual.window=3", "--name", "other", cwd=chain_copy)
    assert (ran.code, "--set dual.window is for a score that is not computed: train the teacher for longer" in ran.err) == (2, True)


# --- refusals


def test_unlabelled_samples_have_no_scores(chain_copy: Path, kdprune: Cli, unlabelled: Path) -> None:
    assert kdprune("index", unlabelled, "--out", "data/bare", "--classes", "names.txt", cwd=chain_copy).code == 2
    (chain_copy / "names.txt").write_text("\n".join("0123456789"))
    assert kdprune("index", unlabelled, "--out", "data/bare", "--classes", "names.txt", cwd=chain_copy).code == 0
    ran = kdprune("score", "--data", "data/bare", "--name", "bare", cwd=chain_copy)
    assert ran.code == 2
    assert "40 samples without a label" in ran.err
    assert not (chain_copy / "scores/bare").exists()


def test_other_classes_are_refused(chain_copy: Path, kdprune: Cli, class_folders: Path) -> None:
    assert kdprune("import", class_folders, "--out", "other", cwd=chain_copy).code == 0
    ran = kdprune("score", "--data", "other", cwd=chain_copy)
    assert (ran.code, "use data with the same classes" in ran.err) == (1, True)


def test_other_settings_and_other_teachers_are_refused(chain_copy: Path, kdprune: Cli, digests: Digests) -> None:
    before = digests(chain_copy / SCORED)
    ran = kdprune("score", cwd=chain_copy)
    assert ran.code == 2
    assert "embedding is true, now false" in ran.err
    assert "already done" in kdprune("score", "--embedding", "--logits", cwd=chain_copy).err
    second = ["teacher", "--model", "resnet8", "--epochs", 3, "--batch", 16, "--seed", 1]
    assert kdprune(*second, cwd=chain_copy).code == 0
    ran = kdprune("score", "--embedding", "--logits", "--teacher", "teachers/resnet8-s1", "--name", "resnet8-s0", cwd=chain_copy)
    assert (ran.code, "teacher is" in ran.err) == (2, True)
    ran = kdprune("score", cwd=chain_copy)
    assert "several in teachers/ fit: resnet8-s0, resnet8-s1; say which with --teacher" in ran.err
    assert digests(chain_copy / SCORED) == before


def adopt(workspace: Path, kdprune: Cli, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Make `teachers/changed`: the teacher with other weights."""
    found = load_file(workspace / TEACHER / "model.safetensors")
    change(found)
    save_file(found, workspace / "changed.safetensors")
    line = ["teacher", "--model", "resnet8", "--weights", "changed.safetensors", "--epochs", 0, "--out", "teachers/changed"]
    ran = kdprune(*line, cwd=workspace)
    assert ran.code == 0, ran.err


def test_a_broken_teacher_is_refused(chain_copy: Path, kdprune: Cli) -> None:
    """NaN weights: neither a teacher nor scores nor soft labels come of them."""
    weights = load_file(chain_copy / TEACHER / "model.safetensors")
    weights["linear.weight"][3] = torch.nan
    save_file(weights, chain_copy / "changed.safetensors")
    save_file(weights, chain_copy / TEACHER / "model.safetensors")
    ran = kdprune("score", "--out", "out", cwd=chain_copy)
    assert (ran.code, "model.safetensors was changed: its sha256 is not the manifest's" in ran.err) == (1, True), ran.err
    manifest = Manifest.read(chain_copy / TEACHER)
    places = [(f.path, chain_copy / TEACHER / f.path) for f in manifest.files]
    whole = replace(manifest, files=[File(name, path.stat().st_size, sha256_file(path)) for name, path in places])
    (chain_copy / TEACHER / "manifest.json").write_bytes(whole.to_json())
    shutil.rmtree(chain_copy / "out", ignore_errors=True)
    adopted = ["teacher", "--model", "resnet8", "--weights", "changed.safetensors", "--epochs", 0]
    for command in (adopted, ["score"], ["cache", "data/train"], ["evaluate", TEACHER], ["verify", TEACHER]):
        ran = kdprune(*command, *(["--out", "out"] if command[0] not in ("evaluate", "verify") else []), cwd=chain_copy)
        assert ran.code == 1
        assert "holds numbers that are not finite ('linear.weight')" in ran.err + ran.out
        assert not (chain_copy / "out/manifest.json").exists()
        shutil.rmtree(chain_copy / "out", ignore_errors=True)


def test_outputs_that_overflow_are_refused(chain_copy: Path, kdprune: Cli) -> None:
    """Finite weights whose logits are not."""

    def enlarge(found: dict[str, torch.Tensor]) -> None:
        found["linear.weight"][:] = 3e38

    shutil.rmtree(chain_copy / "data/val")
    adopt(chain_copy, kdprune, enlarge)
    for command in (["score"], ["cache", "data/train"]):
        ran = kdprune(*command, "--teacher", "teachers/changed", "--out", "out", cwd=chain_copy)
        assert ran.code == 1
        assert "finite number" in ran.err
        assert "unexpected" not in ran.err
        shutil.rmtree(chain_copy / "out", ignore_errors=True)  # a refusal before anything was made leaves nothing


def test_logits_that_float16_cannot_hold_are_clipped(chain_copy: Path, kdprune: Cli) -> None:
    def enlarge(found: dict[str, torch.Tensor]) -> None:
        found["linear.weight"] *= 1e7

    adopt(chain_copy, kdprune, enlarge)
    ran = kdprune("score", "--teacher", "teachers/changed", "--embedding", "--logits", cwd=chain_copy)
    assert ran.code == 0, ran.err
    found = vectors(chain_copy / "scores/changed", "logits")
    assert np.isfinite(found).all()
    assert np.abs(found).max() == np.finfo(np.float16).max
    assert all(np.isfinite(column(chain_copy / "scores/changed", name)).all() for name in FROM_OUTPUTS)


# --- killed


def test_a_killed_run_goes_on_with_the_same_bytes(chain_copy: Path, kdprune: Cli, started: Cli, digests: Digests) -> None:
    """54 shards of a sample each: killed after the first few are written."""
    many = "subsets/many"
    assert kdprune("select", "--frac", "0.5", "--shard-samples", "1", "--out", many, cwd=chain_copy).code == 0
    line = ["score", "--data", many, "--embedding", "--jobs", 1, "--out"]
    folder = chain_copy / "scores/killed"
    running = started(*line, folder, cwd=chain_copy)
    while not (folder / "part-000002.parquet").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (folder / "manifest.json").exists()
    first = (folder / "part-000000.parquet").stat().st_mtime_ns
    for out in (folder, "scores/undisturbed"):
        ran = kdprune(*line, out, cwd=chain_copy)
        assert ran.code == 0, ran.err
    assert (folder / "part-000000.parquet").stat().st_mtime_ns == first
    assert digests(folder) == digests(chain_copy / "scores/undisturbed")
    assert kdprune("verify", folder, cwd=chain_copy).code == 0
