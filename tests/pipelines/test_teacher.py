"""`teacher`: what it writes, when it refuses, and that a killed run ends with the bytes of one that was not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from kdprune_pipelines import _training
from safetensors.torch import load_file, save_file

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.formats import dynamics
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest, sha256_file
from kdprune_data.learn import models, views
from kdprune_data.learn.stream import DrawnViews, Feed, Images, normalisation_of
from kdprune_data.learn.views import Policy

Cli = Callable[..., Any]
TEACHER = Path("teachers/resnet8-s0")
LINE = ["teacher", "--model", "resnet8", "--epochs", "3", "--batch", "16"]


def instead(line: list[Any], change: list[Any]) -> list[Any]:
    """A command with other values: options of the line that are given again are left out of it, as each may be given once."""
    pairs = [line[n : n + 2] for n in range(1, len(line), 2)]
    return [line[0], *(word for pair in pairs if pair[0] not in change for word in pair), *change]


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Path:
    """The data of `chain`, and nothing made from it."""
    shutil.copytree(chain / "data", tmp_path / "data")
    return tmp_path


# --- what it writes


def test_the_folder(chain: Path) -> None:
    folder = chain / TEACHER
    manifest = Manifest.load(folder)
    assert (manifest.kind, manifest.name) == ("model", "resnet8-s0")
    assert [f.path for f in manifest.files] == [
        *(f"dynamics/epoch-{n:03d}.parquet" for n in (1, 2, 3)),
        "epoch-001.safetensors",
        "epoch-003.safetensors",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        *(f.path for f in manifest.files),
        "log.txt",
        "manifest.json",
    }
    assert manifest.counts == {"samples": 108, "steps": 21, "epochs": 3, "parameters": 75290}
    assert manifest.content == Manifest.load(chain / "data/train").content
    config = manifest.config
    assert config["architecture"] == {"name": "resnet8", "classes": 10, "size": 8, "stem": "standard", "norm": "batch"}
    assert (config["policy"]["kind"], config["policy"]["pad"], config["policy"]["flip"]) == ("pad-crop", 1, False)
    assert config["recipe"] | {"epochs": 3, "batch": 16, "lr": 0.1, "seed": 0, "weight_decay": 5e-4} == config["recipe"]
    assert not {"jobs", "device", "out", "name", "overwrite"} & {*config, *config["recipe"]}
    assert [(i["role"], i["digest"]) for i in manifest.inputs] == [
        ("data", Manifest.load(chain / "data/train").digest),
        ("val", Manifest.load(chain / "data/val").digest),
    ]
    assert (config["precision"], config["weights"]) == ("float32", None)


def test_metrics(chain: Path) -> None:
    rows = [json.loads(line) for line in (chain / TEACHER / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["steps"], row["samples"]) for row in rows] == [(1, 7, 108), (2, 14, 108), (3, 21, 108)]
    assert set(rows[0]) == {"epoch", "steps", "samples", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert all(0 <= row["val_accuracy"] <= 1 and row["val_loss"] > 0 for row in rows)


def test_the_last_epoch_is_the_model(chain: Path) -> None:
    last, kept, early = (load_file(chain / TEACHER / f"{name}.safetensors") for name in ("model", "epoch-003", "epoch-001"))
    assert all(torch.equal(last[k], kept[k]) for k in last)
    assert not all(torch.equal(last[k], early[k]) for k in last)


def test_the_normalisation_is_the_data_s(chain: Path) -> None:
    data = Dataset.open(chain / "data/train")
    assert Manifest.load(chain / TEACHER).config["normalisation"] == normalisation_of(Images(data)).to_dict()


@pytest.mark.parametrize(
    ("asked", "epochs", "expected"),
    [
        ((), 1, [1]),
        ((), 2, [1, 2]),
        ((), 3, [1, 3]),
        ((), 14, [1, 14]),
        ((), 15, [2, 15]),
        ((), 30, [3, 30]),
        ((), 200, [20, 200]),
        ((5, 2), 10, [2, 5, 10]),
        ((10,), 10, [10]),
    ],
)
def test_the_epochs_kept(asked: tuple[int, ...], epochs: int, expected: list[int]) -> None:
    assert _training.kept_epochs(asked, epochs) == expected


def test_an_epoch_after_the_end_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="--keep-epochs 11 is after the end: training has 10 epochs"):
        _training.kept_epochs((2, 11), 10)


# --- dynamics


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_each_sample_once_per_epoch(chain: Path, epoch: int) -> None:
    data = Dataset.open(chain / "data/train")
    table = pq.read_table(chain / TEACHER / dynamics.path_of(epoch))
    assert table.schema.equals(dynamics.SCHEMA)
    assert np.array_equal(table["uid"].to_numpy(), data.uids)
    columns = {name: table[name].to_numpy() for name in ("p_true", "logit_margin", "loss", "correct")}
    assert all(np.isfinite(columns[name]).all() for name in ("p_true", "logit_margin", "loss"))
    assert np.allclose(-np.log(columns["p_true"]), columns["loss"], atol=1e-4)
    assert (columns["correct"] >= (columns["logit_margin"] > 0)).all()


def test_the_first_batch_is_what_a_fresh_network_says_of_it(chain: Path) -> None:
    """In train mode, of the augmented views of epoch 0, before any update."""
    data = Dataset.open(chain / "data/train")
    images = Images(data)
    policy = Policy.from_dict(Manifest.load(chain / TEACHER).config["policy"])
    batch = next(Feed(images, DrawnViews(data, policy), 16, 0).epoch(0))
    net = models.build(models.resolve("resnet8", classes=10, size=8), seed=order.derived(0, "init/teacher"))
    with torch.no_grad():
        z = net(normalisation_of(images).apply(batch.images))
    said = dynamics.read(chain / TEACHER, 1, ["p_true", "logit_margin", "loss", "correct"])
    every = torch.arange(len(z))
    own = z[every, batch.labels]
    others = z.scatter(1, batch.labels[:, None], -torch.inf).max(1).values
    assert said["logit_margin"][batch.rows] == pytest.approx((own - others).numpy(), abs=1e-4)
    assert said["loss"][batch.rows] == pytest.approx(F.cross_entropy(z, batch.labels, reduction="none").numpy(), abs=1e-4)
    assert said["p_true"][batch.rows] == pytest.approx(z.softmax(1)[every, batch.labels].numpy(), abs=1e-4)
    assert said["correct"][batch.rows].tolist() == (z.argmax(1) == batch.labels).tolist()


def test_recorded_logits_are_what_the_dynamics_were_made_of(workspace: Path, kdprune: Cli) -> None:
    """In every whole epoch, with the largest at 0; a teacher that records is the same teacher."""
    line = ("teacher", "--model", "resnet8", "--steps", 15, "--batch", 16, "--name")
    assert kdprune(*line, "plain", cwd=workspace).code == 0
    ran = kdprune(*line, "recorded", "--record", "logits", cwd=workspace)
    assert ran.code == 0, ran.err
    folder, labels = workspace / "teachers/recorded", Dataset.open(workspace / "data/train").labels.copy()
    every = np.arange(len(labels))
    for epoch in (1, 2):
        logits = dynamics.read_logits(folder, epoch)
        said = dynamics.read(folder, epoch, ["p_true", "correct"])
        assert logits.dtype == np.float16
        assert not logits.max(1).any()
        assert torch.from_numpy(logits.astype(np.float64)).softmax(1)[every, labels].numpy() == pytest.approx(said["p_true"], abs=2e-3)
        assert (logits[every, labels] == 0)[said["correct"]].all()
        assert np.array_equal(said["p_true"], dynamics.read(workspace / "teachers/plain", epoch, ["p_true"])["p_true"])
    manifest = Manifest.load(folder)
    files = [f.path for f in manifest.files if f.path.startswith("dynamics")]
    assert files == [*map(dynamics.path_of, (1, 2)), *map(dynamics.logits_path, (1, 2))]
    assert manifest.config["record"] == "logits"
    assert "record" not in Manifest.load(workspace / "teachers/plain").config
    assert kdprune("verify", "teachers/recorded", cwd=workspace).code == 0


def test_nothing_is_recorded_of_an_adopted_teacher(workspace: Path, kdprune: Cli) -> None:
    ran = kdprune("teacher", "--weights", workspace / TEACHER / "model.safetensors", "--epochs", 0, "--record", "logits", cwd=workspace)
    assert ran.code == 2
    assert "--weights trains none: leave out --record" in ran.err


def test_train_accuracy_is_that_of_the_dynamics(chain: Path) -> None:
    rows = [json.loads(line) for line in (chain / TEACHER / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        said = dynamics.read(chain / TEACHER, row["epoch"], ["correct", "loss"])
        assert said["correct"].mean() == pytest.approx(row["train_accuracy"], abs=1e-6)
        assert said["loss"].mean() == pytest.approx(row["train_loss"], abs=1e-4)


@pytest.mark.parametrize(("steps", "recorded"), [(6, []), (7, [1]), (13, [1]), (15, [1, 2])])
def test_steps_are_exact_and_half_an_epoch_is_not_recorded(workspace: Path, kdprune: Cli, steps: int, recorded: list[int]) -> None:
    ran = kdprune("teacher", "--model", "resnet8", "--steps", steps, "--batch", 16, cwd=workspace)
    assert ran.code == 0, ran.err
    manifest = Manifest.load(workspace / TEACHER)
    assert manifest.counts["steps"] == steps
    assert [f.path for f in manifest.files if f.path.startswith("dynamics")] == [dynamics.path_of(n) for n in recorded]


# --- again, and otherwise


def test_again_is_already_done(chain_copy: Path, kdprune: Cli, digests: Callable[[Path], dict[str, str]]) -> None:
    manifest = (chain_copy / TEACHER / "manifest.json").read_bytes()
    before = digests(chain_copy)
    for more in ([], ["--jobs", "1"], ["--device", "cpu"]):  # these change no result
        ran = kdprune(*instead(LINE, more), cwd=chain_copy)
        assert ran.code == 0
        assert "already done" in ran.err
    assert (chain_copy / TEACHER / "manifest.json").read_bytes() == manifest
    assert digests(chain_copy) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--epochs", "4"], "recipe.epochs is 3, now 4"),
        (["--steps", "21"], "recipe.steps is null, now 21"),
        (["--batch", "32"], "recipe.batch is 16, now 32"),
        (["--lr", "0.2"], "recipe.lr is 0.1, now 0.2"),
        (["--weight-decay", "0"], "recipe.weight_decay is 0.0005, now 0.0"),
        (["--flip", "on"], "policy.flip is false, now true"),
        (["--norm", "group"], "architecture.norm is batch, now group"),
        (["--size", "16"], "architecture.size is 8, now 16"),
        (["--keep-epochs", "2"], "keep_epochs is [1, 3], now [2, 3]"),
        (["--data", "data/test"], "data is"),
        (["--val", "data/test"], "input val is"),
    ],
)
def test_other_settings_are_refused(
    chain_copy: Path, kdprune: Cli, digests: Callable[[Path], dict[str, str]], change: list[str], said: str
) -> None:
    before = digests(chain_copy)
    ran = kdprune(*instead(LINE, change), cwd=chain_copy)
    assert ran.code == 2
    assert "was made with other settings" in ran.err
    assert said in ran.err
    assert digests(chain_copy) == before


def test_overwrite_replaces(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune(*instead(LINE, ["--epochs", "1"]), "--overwrite", cwd=chain_copy)
    assert ran.code == 0, ran.err
    manifest = Manifest.load(chain_copy / TEACHER)
    assert manifest.counts["epochs"] == 1
    assert not (chain_copy / TEACHER / "epoch-003.safetensors").exists()
    assert kdprune("verify", TEACHER, cwd=chain_copy).code == 0


def test_another_seed_is_another_teacher(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune(*LINE, "--seed", "1", cwd=chain_copy).code == 0
    a, b = (load_file(chain_copy / f"teachers/resnet8-s{n}/model.safetensors") for n in (0, 1))
    assert not torch.equal(a["linear.weight"], b["linear.weight"])


def test_unlabelled_data_teaches_nothing(workspace: Path, chain: Path, kdprune: Cli, unlabelled: Path) -> None:
    assert kdprune("index", unlabelled, "--out", "data/bare", cwd=workspace).code == 0
    ran = kdprune(*LINE, "--data", "data/bare", cwd=workspace)
    assert (ran.code, "without a label: a teacher learns from labels" in ran.err) == (2, True)


def test_validation_data_of_other_classes_is_refused(workspace: Path, kdprune: Cli, class_folders: Path) -> None:
    assert kdprune("import", class_folders, "--out", "other", cwd=workspace).code == 0
    ran = kdprune(*LINE, "--val", "other", cwd=workspace)
    assert ran.code == 1
    assert "use data with the same classes" in ran.err


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--lr", "1e6"], 1, "training has diverged: after step"),
        (["--lr", "1e30", "--steps", "1"], 1, "training has diverged: after step 1"),  # finite weights, and no finite word on val
        (["--lr", "nan"], 2, "--lr"),
        (["--lr", "inf"], 2, "--lr"),
        (["--weight-decay", "nan"], 2, "--weight-decay"),
        (["--mean", "0.5", "0.5", "0.5", "--std", "nan", "1", "1"], 2, "--std"),
        (["--mean", "0.5", "0.5", "0.5"], 2, "--mean and --std go together"),
        (["--mean", "0.5", "0.5", "0.5", "--std", "0", "1", "1"], 2, "--std above 0"),
        (["--mean", "0.5"], 2, "requires 3 arguments"),
        (["--weights-key", "ema"], 2, "--weights-key ema chooses in the file of --weights, and none is given: leave it out"),
        (["--epochs", "0"], 2, "--epochs 0 adopts a teacher"),
        (["--keep-epochs", "9"], 2, "--keep-epochs 9 is after the end"),
        (["--data", "nowhere"], 2, "nowhere does not exist"),
    ],
)
def test_refusals(workspace: Path, kdprune: Cli, change: list[str], code: int, said: str) -> None:
    ran = kdprune(*instead(LINE, change), cwd=workspace)
    assert ran.code == code
    assert said in ran.err
    assert not (workspace / TEACHER / "manifest.json").exists()
    assert code == 1 or not (workspace / "teachers").exists()


# --- killed


OFTEN = "import os, signal\nfrom kdprune_data.learn import checkpoint, loop\nloop.SAVE_EVERY, loop.SAVE_SHARE = 0.0, 0.0\n"
"""Python that makes a process save its state after every step."""
AFTER = """
from kdprune_data.learn.checkpoint import Checkpoint
saves, save = 0, Checkpoint.save
def counted(*arguments):
    global saves
    save(*arguments)
    saves += 1
    if saves == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = counted
"""
"""Python that kills its process after the n-th of them."""
WHILE = """
from pathlib import Path
write = Path.write_bytes
def torn(path, data):
    if path.name == ".state-{n:09d}.safetensors.tmp":
        write(path, data[:5000])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, data)
Path.write_bytes = torn
"""
"""Python that kills its process in the middle of writing the state after step n."""
DROPPING = """\
from torch import nn
def net(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, classes))
"""


@pytest.mark.parametrize(
    ("kill", "step", "more"),
    [
        (AFTER.format(n=10), 10, ["--model", "dropping:net"]),
        (WHILE.format(n=12), 11, ["--model", "dropping:net", "--ema", "0.8", "--keep-epochs", "1"]),
        (AFTER.format(n=10), 10, ["--model", "resnet8", "--record", "logits"]),
    ],
    ids=["dropout", "torn", "recorded"],
)
def test_a_killed_training_ends_with_the_same_bytes(
    workspace: Path, started: Cli, kdprune: Cli, digests: Callable[[Path], dict[str, str]], kill: str, step: int, more: list[str]
) -> None:
    """SIGKILL in the middle of the second of three epochs of seven steps, or of a checkpoint; the same command goes on from there."""
    (workspace / "dropping.py").write_text(DROPPING)
    line = ["teacher", "--epochs", "3", "--batch", "16", "--lr", "0.01", *more, "--name"]
    running = started(*line, "t", cwd=workspace, first=OFTEN + kill)
    _, err = running.communicate()
    assert running.returncode == -signal.SIGKILL, err
    folder = workspace / "teachers/t"
    assert (folder / f".partial/last.ckpt/state-{step:09d}.safetensors").exists()
    assert not (folder / "manifest.json").exists()
    first = (folder / dynamics.path_of(1)).stat().st_mtime_ns
    ran = kdprune(*line, "t", cwd=workspace)
    assert (ran.code, f"continuing after step {step} of 21" in ran.err) == (0, True), ran.err
    assert kdprune(*line, "undisturbed", cwd=workspace).code == 0
    assert (folder / dynamics.path_of(1)).stat().st_mtime_ns == first  # it went on, and did not begin again
    assert digests(folder) == digests(workspace / "teachers/undisturbed")
    assert {"model.safetensors", "metrics.jsonl", dynamics.path_of(2)} < digests(folder).keys()
    assert Manifest.load(folder).digest == Manifest.load(workspace / "teachers/undisturbed").digest
    assert not (folder / ".partial").exists()


@pytest.mark.parametrize("spoil", ["torn", "foreign"])
def test_a_state_that_is_not_its_own_is_refused(workspace: Path, started: Cli, kdprune: Cli, spoil: str) -> None:
    """And nothing is made of it; without it the training begins again."""
    running = started(*LINE, cwd=workspace, first=OFTEN + AFTER.format(n=9))
    running.communicate()
    last = workspace / TEACHER / ".partial/last.ckpt"
    state = next(last.glob("state-*"))
    if spoil == "torn":
        state.write_bytes(state.read_bytes()[:-1])
    else:
        note = json.loads((last / "state.json").read_text())
        (last / "state.json").write_text(json.dumps({**note, "run": "0" * 64}))
    before = sorted(p.name for p in last.iterdir())
    ran = kdprune(*LINE, cwd=workspace)
    said = {"torn": "is damaged: its bytes are not those that were written", "foreign": "is of a training with other settings"}[spoil]
    assert (ran.code, said in ran.err, "delete that folder to train from the beginning" in ran.err) == (1, True, True), ran.err
    assert (sorted(p.name for p in last.iterdir()), (workspace / TEACHER / "manifest.json").exists()) == (before, False)
    shutil.rmtree(last)
    assert kdprune(*LINE, cwd=workspace).code == 0
    assert kdprune("verify", TEACHER, cwd=workspace).code == 0


@pytest.mark.parametrize("moment", ["sealing", "clearing"])
def test_killed_at_the_very_end(
    workspace: Path, kdprune: Cli, started: Cli, digests: Callable[[Path], dict[str, str]], moment: str
) -> None:
    """SIGKILL just before the manifest, or while the checkpoint is removed after it: nothing is trained again, nothing is unusable."""
    kill = {
        "sealing": "Build.seal = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)",
        "clearing": "shutil.rmtree = lambda p, **k: [(f.unlink(), os.kill(os.getpid(), signal.SIGKILL)) for f in p.rglob('state.json')]",
    }[moment]
    first = f"{OFTEN}import shutil\nfrom kdprune_data.formats.build import Build\n{kill}"
    running = started(*LINE, cwd=workspace, first=first)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert (workspace / TEACHER / "manifest.json").exists() == (moment == "clearing")
    ran = kdprune(*LINE, cwd=workspace)
    assert ran.code == 0, ran.err
    assert ("epoch 1/3" in ran.err, "already done" in ran.err) == (False, moment == "clearing")
    assert kdprune("verify", TEACHER, cwd=workspace).out.startswith(f"{TEACHER}: whole")
    assert kdprune(*LINE, "--name", "undisturbed", cwd=workspace).code == 0
    assert digests(workspace / TEACHER) == digests(workspace / "teachers/undisturbed")


def test_a_run_goes_on_in_the_precision_that_it_began_in(workspace: Path, kdprune: Cli) -> None:
    """What a GPU has begun in bfloat16, no CPU finishes in float32."""
    noted = workspace / TEACHER / ".partial/identity.json"
    assert kdprune(*LINE, cwd=workspace).code == 0
    manifest = Manifest.load(workspace / TEACHER)
    begun = {
        "kind": "model",
        "config": {**manifest.config, "precision": "bf16"},
        "inputs": {i["role"]: i["digest"] for i in manifest.inputs},
    }
    (workspace / TEACHER / "manifest.json").unlink()
    noted.parent.mkdir()
    noted.write_text(json.dumps(begun))
    ran = kdprune(*LINE, cwd=workspace)
    assert (ran.code, "precision is bf16, now float32" in ran.err) == (2, True)


# --- divergence


def test_a_training_that_diverges(workspace: Path, kdprune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where, keeps the last good state, is no result to anybody, and leaves the way open."""
    from kdprune_data.learn import loop

    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)  # one state, after the first step
    wild = ["teacher", "--model", "resnet8", "--epochs", 4, "--batch", 16, "--warmup-epochs", 2, "--lr", "1e6"]
    last = TEACHER / ".partial/last.ckpt"
    said = set()
    for _ in range(2):
        ran = kdprune(*wild, cwd=workspace)
        monkeypatch.undo()
        assert ran.code == 1
        error = ran.err.splitlines()[-1]
        assert "error: training has diverged: after step" in error
        assert "lower --lr (it is 1e+06), or give --clip 1; the last finite state is kept: --init" in error
        assert f"{last} with another --name starts from it" in error
        said.add(error)
        assert not (workspace / TEACHER / "manifest.json").exists()
        state = load_file(next((workspace / last).glob("state-*")))
        assert all(bool(torch.isfinite(v).all()) for k, v in state.items() if not k.startswith("partial/"))
    assert len(said) == 1
    assert "no fitting teacher" in kdprune("score", cwd=workspace).err
    ran = kdprune("evaluate", TEACHER, cwd=workspace)
    assert (ran.code, "is unfinished" in ran.err) == (2, True)
    ran = kdprune(*LINE, "--init", last, cwd=workspace)  # into the very folder
    assert (ran.code, "which is to be written: give another --name" in ran.err) == (2, True)
    ran = kdprune(*LINE, "--init", TEACHER, "--name", "tame", cwd=workspace)
    assert (ran.code, f"give {last} to start from its last state" in ran.err) == (2, True)
    for start in (last, next((workspace / last).glob("state-*"))):
        ran = kdprune(*LINE, "--init", start, "--lr", 0, "--name", "tame", cwd=workspace)
        assert ran.code == 0, ran.err
    ran = kdprune(*LINE, "--overwrite", cwd=workspace)
    assert (ran.code, (workspace / TEACHER / "manifest.json").exists()) == (0, True), ran.err
    # A finished model that a wild one was to replace comes back.
    ran = kdprune(*wild, "--overwrite", cwd=workspace)
    assert (ran.code, f"{TEACHER} is left as it was" in ran.err) == (1, True), ran.err
    assert kdprune("verify", TEACHER, cwd=workspace).code == 0


# --- first weights


def test_init_starts_from_given_weights(chain: Path, workspace: Path, kdprune: Cli) -> None:
    """As good as untrained: with a learning rate of nothing the weights are the given ones."""
    given = some_weights(chain, workspace / "given.pth")
    still = ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 16, "--lr", 0]
    for n, start in enumerate(("given.pth", chain / TEACHER, chain / TEACHER / "model.safetensors")):
        ran = kdprune(*still, "--init", start, "--name", f"t{n}", cwd=workspace)
        assert ran.code == 0, ran.err
        made = load_file(workspace / f"teachers/t{n}/model.safetensors")
        assert all(torch.equal(made[k], v) for k, v in given.items() if "running" not in k and "tracked" not in k)
        file = start if Path(start).suffix else chain / TEACHER / "model.safetensors"
        assert Manifest.load(workspace / f"teachers/t{n}").config["init"] == sha256_file(workspace / file)
    ran = kdprune(*still, "--name", "t0", cwd=workspace)
    assert (ran.code, "init is" in ran.err) == (2, True)
    ran = kdprune(*still, "--init", "given.pth", "--name", "t0", cwd=workspace)
    assert (ran.code, "already done" in ran.err) == (0, True)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--init", "nowhere"], 2, "--init nowhere does not exist: give the folder of a model, or a file of weights"),
        (["--init", "data/train"], 2, "is of kind dataset: expected model"),
        (["--init", "data"], 2, "expected a finished model"),
        (["--init", "seven.safetensors", "--model", "resnet14"], 1, "does not fit this model"),
        (["--init", "seven.safetensors", "--weights", "seven.safetensors", "--epochs", "0"], 2, "give one of the two"),
        (["--init", "data/train/manifest.json"], 1, "cannot be read"),
    ],
)
def test_weights_that_cannot_be_started_from(workspace: Path, kdprune: Cli, change: list[str], code: int, said: str) -> None:
    save_file(models.build(models.resolve("resnet8", classes=7, size=8), seed=0).state_dict(), workspace / "seven.safetensors")
    ran = kdprune(*instead(LINE, change), cwd=workspace)
    assert (ran.code, said in ran.err) == (code, True), ran.err
    assert not (workspace / "teachers").exists()


def test_init_of_other_classes_gives_all_but_the_last_layer(workspace: Path, kdprune: Cli) -> None:
    """As good as untrained, as above; the last layer is the one that the teacher would have begun with."""
    given = models.build(models.resolve("resnet8", classes=7, size=8), seed=5).state_dict()
    save_file(given, workspace / "seven.safetensors")
    still = ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 16, "--lr", 0]
    ran = kdprune(*still, "--init", "seven.safetensors", "--name", "on", cwd=workspace)
    assert ran.code == 0, ran.err
    assert "seven.safetensors tells 7 classes apart: its last layer is left out, and a fresh one is trained" in ran.err
    assert kdprune(*still, "--name", "fresh", cwd=workspace).code == 0
    on, fresh = (load_file(workspace / f"teachers/{name}/model.safetensors") for name in ("on", "fresh"))
    kept = [k for k in on if "running" not in k and "tracked" not in k]
    assert all(torch.equal(on[k], (fresh if k.startswith("linear") else given)[k]) for k in kept)


# --- the rest of the recipe


def test_every_setting_is_recorded(workspace: Path, kdprune: Cli) -> None:
    asked = {
        "momentum": 0.8,
        "warmup_epochs": 0,
        "schedule": "linear",
        "label_smoothing": 0.1,
        "clip": 2.0,
        "ema": 0.9,
        "weight_decay": 0.001,
    }
    line = [part for key, value in asked.items() for part in (f"--{key.replace('_', '-')}", value)]
    ran = kdprune(*LINE, *line, "--scale", 0.5, 1, "--ratio", 1, 1, cwd=workspace)
    assert ran.code == 0, ran.err
    config = Manifest.load(workspace / TEACHER).config
    assert {key: config["recipe"][key] for key in asked} == asked
    assert (config["policy"]["kind"], config["policy"]["scale"], config["policy"]["ratio"]) == ("resized-crop", [0.5, 1.0], [1.0, 1.0])
    text = kdprune("evaluate", TEACHER, cwd=workspace).out
    assert "weights: model.safetensors (after epoch 3, a moving average)" in text
    rows = [json.loads(row) for row in (workspace / TEACHER / "metrics.jsonl").read_text().splitlines()]
    said = dynamics.read(workspace / TEACHER, 1, ["loss"])["loss"].mean()
    assert rows[0]["train_loss"] > said  # the loss that is learned from is smoothed, the one that is noted is not
    assert rows[-1]["lr"] == pytest.approx(0.1 / 21, abs=1e-6)


def test_the_average_is_saved_and_validated(workspace: Path, kdprune: Cli) -> None:
    """What metrics.jsonl says of the last epoch is what `evaluate` says of the model."""
    assert kdprune(*LINE, "--ema", 0.7, cwd=workspace).code == 0
    last = json.loads((workspace / TEACHER / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(kdprune("evaluate", TEACHER, "--data", "data/val", "--json", cwd=workspace).out)
    assert (found["accuracy"], found["loss"]) == (pytest.approx(last["val_accuracy"], abs=1e-6), pytest.approx(last["val_loss"], abs=1e-5))
    assert found["ema"] == 0.7
    a, b = (load_file(workspace / TEACHER / f"{name}.safetensors") for name in ("model", "epoch-003"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--clip", "0"], "--clip 0.0 is too small"),
        (["--ema", "1"], "--ema 1.0 is too large"),
        (["--momentum", "1"], "--momentum 1.0 is too large"),
        (["--label-smoothing", "1"], "--label-smoothing 1.0 is too large"),
        (["--schedule", "step"], "step"),
        (["--pad", "8"], "--pad 8 is too large for views of 8 pixels: at most 7"),
        (["--pad", "1", "--size", "16"], "not all images are squares of 16 pixels: leave it out"),
        (["--pad", "1", "--scale", "0.5", "1"], "--scale and --ratio ask for resized crops: leave it out"),
        (["--scale", "0.5", "1.5"], "--scale 0.5 1.5 is no range: give LOW HIGH, both above 0 and at most 1, LOW first"),
        (["--scale", "0", "1"], "is no range"),
        (["--ratio", "2", "1"], "--ratio 2 1 is no range"),
        (["--ratio", "nan", "1"], "--ratio nan is not a finite number"),
    ],
)
def test_settings_out_of_range(workspace: Path, kdprune: Cli, change: list[str], said: str) -> None:
    ran = kdprune(*instead(LINE, change), cwd=workspace)
    assert (ran.code, said in ran.err) == (2, True), ran.err
    assert not (workspace / "teachers").exists()


# --- beside the folder


def test_tensorboard(workspace: Path, kdprune: Cli) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert kdprune(*LINE, "--tensorboard", "boards", cwd=workspace).code == 0
    found = EventAccumulator(str(workspace / "boards/resnet8-s0")).Reload()
    rows = [json.loads(line) for line in (workspace / TEACHER / "metrics.jsonl").read_text().splitlines()]
    for key in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert [(e.step, pytest.approx(e.value, abs=1e-6)) for e in found.Scalars(key.replace("_", "/"))] == [
            (r["steps"], r[key]) for r in rows
        ]
    assert "tensorboard" not in json.dumps(Manifest.load(workspace / TEACHER).config)
    ran = kdprune(*LINE, "--name", "other", "--tensorboard", "data/train/manifest.json", cwd=workspace)
    assert (ran.code, "is a file, not a folder; give another one" in ran.err) == (2, True)
    assert not (workspace / "teachers/other").exists()


@pytest.mark.parametrize("board", ["teachers", "./data/../teachers", "teachers/resnet8-s0", "teachers/resnet8-s0/boards"])
def test_tensorboard_does_not_write_into_the_model(workspace: Path, kdprune: Cli, board: str) -> None:
    ran = kdprune(*LINE, "--tensorboard", board, cwd=workspace)
    assert (ran.code, "resnet8-s0 is where teachers/resnet8-s0 is to be written; give another folder" in ran.err) == (2, True), ran.err
    assert not (workspace / "teachers").exists()


def test_tensorboard_is_an_extra(workspace: Path, started: Cli) -> None:
    """Without the package (importing it fails) it says what to install, before anything is made."""
    running = started(*LINE, "--tensorboard", "boards", cwd=workspace, first="import sys; sys.modules['tensorboard'] = None")
    _, err = running.communicate()
    assert (running.returncode, "--tensorboard needs tensorboard: pip install 'kdprune-data[tensorboard]'" in err) == (2, True), err
    assert not (workspace / "teachers").exists()


@pytest.mark.long
def test_a_compiler_that_is_missing_is_one_line(workspace: Path, started: Cli) -> None:
    first = f"import os; os.environ.update(CXX='/nonexistent', TORCHINDUCTOR_CACHE_DIR={str(workspace / 'cache')!r})"
    running = started(*LINE, "--compile", cwd=workspace, first=first)
    _, err = running.communicate()
    assert (running.returncode, "error: --compile failed (" in err.splitlines()[-1]) == (1, True), err
    assert err.splitlines()[-1].endswith("leave it out")
    assert not (workspace / "teachers").exists()


def tree(folder: Path) -> dict[str, int]:
    """Everything in a folder, with its time of change."""
    return {str(p): p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ([], "new"),
        (["--weights", "given.pth", "--epochs", "0"], "new"),
        (["--name", "made"], "finished"),
        (["--name", "made", "--lr", 1], "other"),
    ],
)
def test_a_dry_run_touches_nothing(chain: Path, workspace: Path, kdprune: Cli, more: list[Any], state: str) -> None:
    some_weights(chain, workspace / "given.pth")
    if state != "new":
        assert kdprune(*LINE, "--name", "made", cwd=workspace).code == 0
    before = tree(workspace)
    ran = kdprune(*instead(LINE, more), "--dry-run", "--json", cwd=workspace)
    assert tree(workspace) == before
    if state == "other":
        assert (ran.code, "was made with other settings" in ran.err) == (2, True)
        ran = kdprune(*instead(LINE, more), "--dry-run", "--overwrite", "--json", cwd=workspace)
        state = "replaced"
        assert tree(workspace) == before
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["dry_run"], found["state"], found["counts"]["parameter"]) == (True, state, 75290)
    if state == "finished":
        assert (found["seconds"], found["bytes"]) == (0, 0)
        return
    made = kdprune(*instead(LINE, more), "--overwrite", cwd=workspace)
    assert made.code == 0
    folder = workspace / json.loads(ran.out)["folder"]
    size = sum(f.bytes for f in Manifest.load(folder).files)
    assert found["bytes"] == pytest.approx(size, rel=0.1)
    assert ("step" in found["counts"]) == ("--weights" not in more)


# --- no stream of random numbers twice


def test_the_teacher_s_views_are_not_the_student_s(chain: Path) -> None:
    """Of one --seed: neither the crops nor the weights that they start from."""
    teacher = Manifest.load(chain / TEACHER).config
    assert teacher["policy"]["seed"] == order.derived(0, "views/teacher")
    cache = Manifest.load(chain / "logits/random-0.5-s0--resnet8-s0").config["policy"]
    assert cache == {**teacher["policy"], "seed": 0}
    data = Dataset.open(chain / "data/train")
    boxes = [views.geometry(Policy.from_dict(p), data.uids, data.sizes, 0) for p in (teacher["policy"], cache)]
    assert not np.array_equal(boxes[0].top, boxes[1].top)


def test_batch_norm_and_batches_of_one(workspace: Path, kdprune: Cli) -> None:
    """resnet18 with the small stem takes 8 pixels down to one."""
    ran = kdprune("teacher", "--model", "resnet18", "--steps", 1, "--batch", 1, cwd=workspace)
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2,
        "error: batch norm cannot learn from a batch of 1: at least 2 samples and --batch 2, or --norm group",
    )
    assert not (workspace / "teachers/resnet18-s0").exists()
    assert kdprune("teacher", "--model", "resnet18", "--steps", 1, "--batch", 1, "--norm", "group", cwd=workspace).code == 0


# --- adopted


def some_weights(chain: Path, path: Path) -> dict[str, torch.Tensor]:
    found = load_file(chain / TEACHER / "model.safetensors")
    if path.suffix == ".safetensors":
        save_file(found, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in found.items()}}, path)
    return found


@pytest.mark.parametrize("name", ["given.safetensors", "given.pth"])
def test_weights_are_adopted(chain: Path, workspace: Path, kdprune: Cli, name: str) -> None:
    given = some_weights(chain, workspace / name)
    ran = kdprune("teacher", "--model", "resnet8", "--weights", name, "--epochs", 0, cwd=workspace)
    assert ran.code == 0, ran.err
    made = load_file(workspace / TEACHER / "model.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[k], given[k]) for k in made)
    manifest = Manifest.load(workspace / TEACHER)
    assert manifest.counts | {"steps": 0, "epochs": 0} == manifest.counts
    assert manifest.config["policy"]["seed"] == order.derived(0, "views/teacher")
    assert (manifest.config["precision"], manifest.config["recipe"]) == (None, None)
    assert [f.path for f in manifest.files] == ["metrics.jsonl", "model.safetensors"]
    (row,) = [json.loads(line) for line in (workspace / TEACHER / "metrics.jsonl").read_text().splitlines()]
    trained = json.loads((chain / TEACHER / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["val_accuracy"] == pytest.approx(trained["val_accuracy"], abs=1e-6)
    assert row["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-5)


def test_what_an_adopted_teacher_was_trained_with_is_not_known(chain: Path, workspace: Path, kdprune: Cli) -> None:
    """Settings of training are none of its own: they make no other teacher, and nothing tells them of it."""
    some_weights(chain, workspace / "given.pth")
    line = ["teacher", "--model", "resnet8", "--weights", "given.pth", "--epochs", 0]
    assert kdprune(*line, "--ema", "0.9", cwd=workspace).code == 0
    again = kdprune(*line, "--lr", "0.5", cwd=workspace)
    assert (again.code, "already done" in again.err) == (0, True), again.err
    told = kdprune("evaluate", TEACHER, cwd=workspace)
    assert (told.code, "model.safetensors (adopted)" in told.out) == (0, True), told.err
    assert json.loads(kdprune("evaluate", TEACHER, "--json", cwd=workspace).out)["ema"] is None
    assert kdprune("info", TEACHER, cwd=workspace).code == 0
    assert kdprune("verify", TEACHER, cwd=workspace).code == 0


def test_an_adopted_teacher_has_no_dynamics_and_no_early_epoch(chain: Path, workspace: Path, kdprune: Cli) -> None:
    some_weights(chain, workspace / "given.safetensors")
    assert kdprune("teacher", "--model", "resnet8", "--weights", "given.safetensors", "--epochs", 0, cwd=workspace).code == 0
    ran = kdprune("score", cwd=workspace)
    assert ran.code == 0, ran.err
    assert Manifest.load(workspace / "scores/resnet8-s0").config["columns"] == ["el2n", "grand", "entropy", "margin", "confidence", "loss"]
    assert "keeps no early epoch: el2n and grand are read from its final weights" in ran.err
    assert "no training dynamics" in ran.err


@pytest.mark.parametrize(
    ("weights", "more", "code", "said"),
    [
        ("nowhere.pth", ["--epochs", "0"], 2, "does not exist"),
        ("given.pth", [], 2, "--epochs 0 adopts a teacher"),
        ("given.pth", ["--epochs", "0", "--model", "resnet14"], 1, "does not fit this model"),
        ("text.pth", ["--epochs", "0"], 1, "cannot be read"),
        ("text.safetensors", ["--epochs", "0"], 1, "cannot be read as safetensors"),
    ],
)
def test_weights_that_cannot_be_adopted(
    chain: Path, workspace: Path, kdprune: Cli, weights: str, more: list[str], code: int, said: str
) -> None:
    some_weights(chain, workspace / "given.pth")
    for name in ("text.pth", "text.safetensors"):
        (workspace / name).write_text("these are no weights")
    ran = kdprune(*instead(["teacher", "--model", "resnet8", "--weights", weights], more), cwd=workspace)
    assert ran.code == code
    assert said in ran.err
    assert not list(workspace.glob("teachers/*/manifest.json"))


# --- functions of the user's own

OWN = """\
from pathlib import Path
from torch import nn
Path("{marker}").touch()
def tiny(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


@pytest.fixture
def own(workspace: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A module in the workspace, of a name of its own, and the file that stands once it was imported."""
    name = f"own_{abs(hash(request.node.name))}"
    (workspace / f"{name}.py").write_text(OWN.format(marker="it-ran"))
    return f"{name}:tiny", workspace / "it-ran"


def test_a_function_named_on_the_line_is_run(workspace: Path, kdprune: Cli, own: tuple[str, Path]) -> None:
    function, marker = own
    name = f"{function.replace(':', '-')}-s0"
    ran = kdprune("teacher", "--model", function, "--epochs", 1, "--batch", 32, cwd=workspace)
    assert ran.code == 0, ran.err
    assert marker.exists()
    assert Manifest.load(workspace / "teachers" / name).config["architecture"]["name"] == function
    # Whoever gets this folder runs nothing by reading it, unless they name the function too.
    marker.unlink()
    for line in (["score"], ["cache", "data/train", "--views", "1"], ["evaluate", f"teachers/{name}"]):
        ran = kdprune(*line, cwd=workspace)
        assert (ran.code, "let it run" in ran.err) == (2, True), ran.err
    assert kdprune("verify", f"teachers/{name}", cwd=workspace).code == 0
    assert not marker.exists()
    for line in (["score"], ["cache", "data/train", "--views", "1"], ["evaluate", f"teachers/{name}"]):
        ran = kdprune(*line, "--code", function, cwd=workspace)
        assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("command", "key"), [("teacher", "model"), ("distill", "model"), ("score", "code"), ("cache", "code"), ("distill", "code")]
)
def test_a_function_named_in_a_file_is_not_run(chain_copy: Path, kdprune: Cli, command: str, key: str) -> None:
    (chain_copy / "quietly_there.py").write_text(OWN.format(marker="it-ran"))
    (chain_copy / "kdprune.toml").write_text(f'[{command}]\n{key} = "quietly_there:tiny"\n')
    ran = kdprune(command, cwd=chain_copy)
    assert ran.code == 2
    assert f"functions are run only when named with --{key}" in ran.err
    assert not (chain_copy / "it-ran").exists()
