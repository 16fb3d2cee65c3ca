"""`distill --live`: a student of cached logits is the student of the teacher itself, asked of the same views; and what that asks for."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kdprune_pipelines._models import open_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.learn import models
from kdprune_data.learn.inference import Predictor
from kdprune_data.learn.live import Teacher
from kdprune_data.learn.loop import Hooks, Recipe, Training
from kdprune_data.learn.losses import Mix, Soft, distillation
from kdprune_data.learn.stream import Batch, BoxesOnly, Feed, Images, ViewSource, cached_views, normalisation_of
from kdprune_data.learn.views import Normalisation

Cli = Callable[..., Any]
CPU = torch.device("cpu")
EPOCHS = 4
SUBSET, TEACHER = Path("subsets/random-0.3-s0"), Path("teachers/resnet8-s0")
CACHE, HALF = Path("logits/random-0.3-s0--resnet8-s0"), Path("logits/half")
SHORT = ["--model", "resnet8", "--steps", 8, "--batch", 16]
CHAIN_TEACHER, CHAIN_CACHE = TEACHER, Path("logits/random-0.5-s0--resnet8-s0")


class Double(Normalisation):
    """Inputs in float64."""

    def apply(self, batch: Tensor) -> Tensor:
        return super().apply(batch).double()


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """A workspace, to read only: a teacher of all digits, and caches of four views of 431 of them, in float32 and in float16."""
    workspace = tmp_path_factory.mktemp("school")
    for line in (
        ["import", "digits"],
        ["import", "digits", "--split", "test"],
        ["teacher", "--model", "resnet8", "--epochs", 4],
        ["select", "--frac", 0.3],
        ["cache", "--views", EPOCHS, "--dtype", "float32"],
        ["cache", "--views", EPOCHS, "--name", "half"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


def live_teacher(workspace: Path) -> Teacher:
    saved = open_model(workspace / TEACHER)
    return Teacher(Predictor(saved.load(code=None), saved.normalisation, 8, CPU))


def losses(workspace: Path, views: ViewSource, mix: Mix, *, teacher: Teacher | None = None, double: bool = False) -> Any:
    """The loss of every step of a student of digits. The learning rate is small: at 0.1 what is a millionth apart is soon a tenth apart,
    once a rectifier is open in one student and shut in the other."""
    images = Images(Dataset.open(workspace / SUBSET))
    net = models.build(models.resolve("resnet8", classes=10, size=8), seed=1)
    norm = normalisation_of(images)
    if double:
        net, norm = net.double(), Double(norm.mean, norm.std)
    recipe = Recipe(epochs=EPOCHS, batch=16, lr=0.02)
    training = Training(net, Feed(images, views, 16, 0), recipe, normalisation=norm, device=CPU, teacher=teacher)
    found: list[float] = []

    def loss_of(logits: Tensor, batch: Batch) -> Tensor:
        assert logits.dtype == (torch.float64 if double else torch.float32)
        loss = distillation(logits, batch.logits, batch.labels, mix=mix)
        found.append(float(loss.detach()))
        return loss

    training.run(loss_of, Hooks())
    return np.array(found)


# --- cached equals live


@pytest.mark.parametrize(
    ("mix", "within"),
    [
        (Mix(0.9, 4.0), 1e-6),
        (Mix(0.7, 3.0), 1e-6),
        (Mix(0.7, 3.0, soft=Soft.choose("mse")), 1e-6),
        (Mix(0.7, 3.0, soft=Soft.choose("dkd")), 1e-5),  # these two are ten times as large
        (Mix(0.7, 3.0, soft=Soft.choose("dist")), 1e-5),
    ],
)
def test_every_step_of_a_cached_student_is_that_of_a_live_one(school: Path, mix: Mix, within: float) -> None:
    """A student in float64, V = number of epochs, ordinary views: what is left is that a float32 cache rounds z - max(z)."""
    views = cached_views(Dataset.open(school / SUBSET), LogitCache.open(school / CACHE))
    assert (views.count, views.policy.kind, views.policy.pad) == (EPOCHS, "pad-crop", 1)
    cached = losses(school, views, mix, double=True)
    live = losses(school, BoxesOnly(views), mix, teacher=live_teacher(school), double=True)
    assert len(cached) == EPOCHS * 27
    assert np.abs(cached - live).max() < within


@pytest.mark.parametrize("mix", [Mix(0.9, 4.0), Mix(0.7, 3.0), Mix(1.0, 3.0)])
def test_the_first_steps_in_float32(school: Path, mix: Mix) -> None:
    views = cached_views(Dataset.open(school / SUBSET), LogitCache.open(school / CACHE))
    cached, live = losses(school, views, mix), losses(school, BoxesOnly(views), mix, teacher=live_teacher(school))
    assert np.abs(cached - live)[:50].max() < 1e-4


class Late:
    """The views of the epoch after."""

    def __init__(self, views: ViewSource) -> None:
        self.views, self.policy = views, views.policy

    def show(self, rows: Any, epoch: int) -> Any:
        (boxes, _), (_, logits) = self.views.show(rows, epoch), self.views.show(rows, epoch + 1)
        return boxes, logits


def test_logits_of_other_views_would_show(school: Path) -> None:
    """What these bounds are worth: logits of the next view of the same sample break both at once."""
    views = cached_views(Dataset.open(school / SUBSET), LogitCache.open(school / CACHE))
    mix, teacher = Mix(0.9, 4.0), live_teacher(school)
    apart = np.abs(losses(school, Late(views), mix, double=True) - losses(school, BoxesOnly(views), mix, teacher=teacher, double=True))
    assert apart[0] > 1e-2


def test_a_live_teacher_says_what_is_cached(school: Path) -> None:
    """Of every view: with its own normalisation, in eval mode, whatever the batches; and it is left as it was."""
    data, cache = Dataset.open(school / SUBSET), LogitCache.open(school / CACHE)
    views, images, saved = cached_views(data, cache), Images(data), open_model(school / TEACHER)
    assert normalisation_of(images) != saved.normalisation
    net = saved.load(code=None)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    teacher = Teacher(Predictor(net, saved.normalisation, 8, CPU))
    for epoch in range(EPOCHS):
        for batch in Feed(images, views, 50, 0).epoch(epoch):
            said = teacher(batch.images)
            assert batch.logits is not None
            assert not said.requires_grad
            assert torch.allclose(said - said.amax(1, keepdim=True), batch.logits, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_command_makes_the_same_student(school: Path, kdprune: Cli, tmp_path: Path) -> None:
    """Metrics and weights of a cached student, of a live one on the cache's boxes, and of a live one on the same views drawn anew."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/val").symlink_to(school / "data/test")
    line = ["distill", school / SUBSET, "--model", "resnet8", "--epochs", EPOCHS, "--batch", 16, "--lr", 0.02]
    made, rows = {}, {}
    for name, more in {
        "cached": ["--logits", school / CACHE],
        "live": ["--logits", school / CACHE, "--live", school / TEACHER],
        "drawn": ["--logits", "none", "--live", school / TEACHER, "--views", EPOCHS],
    }.items():
        ran = kdprune(*line, *more, "--name", name, cwd=tmp_path)
        assert ran.code == 0, ran.err
        made[name] = load_file(tmp_path / "students" / name / "model.safetensors")
        rows[name] = [json.loads(one) for one in (tmp_path / "students" / name / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(rows["cached"], rows["live"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
        assert one["val_accuracy"] == pytest.approx(other["val_accuracy"], abs=0.005)
    assert all(torch.allclose(made["cached"][k].double(), v.double(), atol=1e-3) for k, v in made["live"].items())
    assert all(torch.equal(made["live"][k], v) for k, v in made["drawn"].items())


@pytest.mark.long
def test_float16_costs_less_than_another_seed(school: Path, kdprune: Cli, tmp_path: Path) -> None:
    """Accuracy on test after 12 epochs, three seeds: the mean of float16 students is within the spread of live ones, or a sample of it."""
    found: dict[str, list[float]] = {"cached": [], "live": []}
    for seed in range(3):
        line = ["distill", school / SUBSET, "--model", "resnet8", "--epochs", 12, "--batch", 32, "--seed", seed]
        for arm, more in (("cached", []), ("live", ["--live", school / TEACHER])):
            ran = kdprune(*line, "--logits", school / HALF, *more, "--name", f"{arm}-{seed}", cwd=tmp_path)
            assert ran.code == 0, ran.err
            ran = kdprune("evaluate", f"students/{arm}-{seed}", "--data", school / "data/test", "--json", cwd=tmp_path)
            found[arm].append(json.loads(ran.out)["accuracy"])
    spread = max(found["live"]) - min(found["live"])
    samples = len(Dataset.open(school / "data/test"))
    assert min(found["live"]) > 0.8
    assert abs(np.mean(found["cached"]) - np.mean(found["live"])) <= spread + 1 / samples


# --- the command


def test_the_folder(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune("distill", *SHORT, "--live", CHAIN_TEACHER, "--name", "live", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert f"{CHAIN_TEACHER} is asked of 3 cached views" in ran.err
    manifest = Manifest.load(chain_copy / "students/live")
    cache = Manifest.load(chain_copy / CHAIN_CACHE)
    assert manifest.config["views"] == {
        "from": "live",
        "count": 3,
        "files": [{"path": f.path, "sha256": f.sha256} for f in cache.files],
    }
    assert (manifest.config["alpha"], manifest.config["policy"]) == (0.6204, cache.config["policy"])
    assert manifest.ancestor("teacher")["digest"] == Manifest.load(chain_copy / CHAIN_TEACHER).digest
    assert [i["role"] for i in manifest.inputs] == ["data", "teacher", "val"]
    assert kdprune("verify", "students/live", cwd=chain_copy).code == 0
    again = kdprune("distill", *SHORT, "--live", CHAIN_TEACHER, "--name", "live", cwd=chain_copy)
    assert (again.code, "already done" in again.err) == (0, True)


def test_a_live_student_is_no_cached_one(chain_copy: Path, kdprune: Cli) -> None:
    """Both would have the name of `chain`'s student: the message says what differs, and what to do."""
    line = ["distill", "--model", "resnet8", "--epochs", 4, "--batch", 16, "--live", CHAIN_TEACHER]
    ran = kdprune(*line, cwd=chain_copy)
    assert ran.code == 2
    assert "views.from is cache, now live" in ran.err
    assert "use --name" in ran.err


@pytest.mark.parametrize("cached", [False, True])
def test_without_a_cache_of_this_teacher_views_are_drawn(chain_copy: Path, kdprune: Cli, cached: bool) -> None:
    """A cache of another teacher is not taken by itself; where it is named, its boxes are."""
    other = ["teacher", "--model", "resnet8", "--steps", 2, "--batch", 16, "--seed", 1]
    assert kdprune(*other, cwd=chain_copy).code == 0
    more = ["--logits", CHAIN_CACHE] if cached else []
    ran = kdprune("distill", *SHORT, "--live", "teachers/resnet8-s1", *more, "--name", "live", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert ("no logit cache of teachers/resnet8-s1 for subsets/random-0.5-s0 in logits/: its views are drawn" in ran.err) == (not cached)
    manifest = Manifest.load(chain_copy / "students/live")
    assert manifest.ancestor("teacher")["name"] == "resnet8-s1"
    views = manifest.config["views"]
    assert (views["from"], views["count"], "files" in views) == ("live", 3 if cached else None, cached)


def test_drawn_views_are_of_the_teachers_size(chain_copy: Path, kdprune: Cli) -> None:
    wide = ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 16, "--size", 16, "--name", "wide"]
    assert kdprune(*wide, cwd=chain_copy).code == 0
    ran = kdprune("distill", *SHORT, "--live", "teachers/wide", "--name", "live", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert Manifest.load(chain_copy / "students/live").config["policy"]["size"] == 16


def test_cached_logits_are_nothing_to_it(chain_copy: Path, kdprune: Cli) -> None:
    """Of another teacher's cache with the same boxes, it learns the same."""
    for line in (
        ["teacher", "--model", "resnet8", "--steps", 2, "--batch", 16, "--seed", 1],
        ["cache", "--views", 3, "--teacher", "teachers/resnet8-s1", "--name", "other"],
        ["distill", *SHORT, "--live", CHAIN_TEACHER, "--logits", CHAIN_CACHE, "--name", "a"],
        ["distill", *SHORT, "--live", CHAIN_TEACHER, "--logits", "logits/other", "--name", "b"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    a, b = (load_file(chain_copy / f"students/{name}/model.safetensors") for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_unlabelled_samples_need_the_teacher_alone(chain_copy: Path, kdprune: Cli, unlabelled: Path) -> None:
    (chain_copy / "names.txt").write_text("\n".join("0123456789"))
    assert kdprune("index", unlabelled, "--out", "data/bare", "--classes", "names.txt", cwd=chain_copy).code == 0
    line = ["distill", "data/bare", *SHORT, "--live", CHAIN_TEACHER, "--name", "bare"]
    ran = kdprune(*line, cwd=chain_copy)
    assert (ran.code, "has 40 samples without a label" in ran.err) == (2, True)
    ran = kdprune(*line, "--alpha", 1, "--loss", "dkd", cwd=chain_copy)
    assert (ran.code, "--loss dkd needs the label of every sample, and data/bare has 40 without" in ran.err) == (2, True)
    ran = kdprune(*line, "--alpha", 1, "--loss", "dist", cwd=chain_copy)
    assert ran.code == 0, ran.err


def test_a_dry_run_touches_nothing(chain_copy: Path, kdprune: Cli) -> None:
    def tree() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in [chain_copy, *chain_copy.rglob("*")]}

    before = tree()
    ran = kdprune("distill", *SHORT, "--live", CHAIN_TEACHER, "--name", "dry", "--dry-run", "--json", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert tree() == before
    found = json.loads(ran.out)
    assert (found["state"], found["counts"]["step"], found["seconds"] > 0) == ("new", 8, True)


def test_a_killed_student_ends_with_the_same_bytes(chain_copy: Path, started: Cli, kdprune: Cli, digests: Cli) -> None:
    """SIGKILL after the sixth of 16 steps, in the middle of an epoch of four."""
    line = ["distill", "--model", "resnet8", "--epochs", "4", "--batch", "16", "--live", CHAIN_TEACHER, "--loss", "dkd", "--name"]
    kill = (
        "import os, signal\nfrom kdprune_data.learn import loop\nfrom kdprune_data.learn.checkpoint import Checkpoint\n"
        "loop.SAVE_EVERY, loop.SAVE_SHARE, save = 0.0, 0.0, Checkpoint.save\n"
        "Checkpoint.save = lambda *a: (save(*a), a[1].step == 6 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    running = started(*line, "killed", cwd=chain_copy, first=kill)
    _, err = running.communicate()
    assert running.returncode == -signal.SIGKILL, err
    ran = kdprune(*line, "killed", cwd=chain_copy)
    assert (ran.code, "continuing after step 6 of 16" in ran.err) == (0, True), ran.err
    assert kdprune(*line, "undisturbed", cwd=chain_copy).code == 0
    assert digests(chain_copy / "students/killed") == digests(chain_copy / "students/undisturbed")


# --- the user's own function

OWN = """
from pathlib import Path
from torch import nn


def tiny(classes):
    Path("it-ran").touch()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
"""


def test_a_teacher_of_the_users_own_runs_when_named(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "mine_live.py").write_text(OWN)
    ran = kdprune("teacher", "--model", "mine_live:tiny", "--steps", 2, "--name", "own", cwd=chain_copy)
    assert ran.code == 0, ran.err
    (chain_copy / "it-ran").unlink()
    line = ["distill", *SHORT, "--live", "teachers/own", "--name", "of-own"]
    recipe = '[distill]\nmodel = "resnet8"\nsteps = 2\nlive = "teachers/own"\nname = "by-recipe"\n'
    (chain_copy / "r.toml").write_text(recipe)
    for refused in (line, ["run", "r.toml"]):
        ran = kdprune(*refused, cwd=chain_copy)
        assert (ran.code, "name it with --code mine_live:tiny to let it run" in ran.err) == (2, True), ran.err
    (chain_copy / "kdprune.toml").write_text('[distill]\ncode = "mine_live:tiny"\n')
    ran = kdprune(*line, cwd=chain_copy)
    assert (ran.code, "functions are run only when named with --code" in ran.err) == (2, True)
    (chain_copy / "kdprune.toml").unlink()
    assert not (chain_copy / "it-ran").exists()
    assert not (chain_copy / "students/of-own").exists()
    for named in (line, ["run", "r.toml"]):
        ran = kdprune(*named, "--code", "mine_live:tiny", cwd=chain_copy)
        assert ran.code == 0, ran.err
    assert (chain_copy / "it-ran").exists()


# --- refusals


def broken(chain: Path, teacher: Path) -> None:
    """A teacher whose weights are numbers, and what they make of images is none, in a folder that is whole."""
    weights = load_file(chain / teacher / "model.safetensors")
    weights["linear.weight"].fill_(3e38)
    save_file(weights, chain / teacher / "model.safetensors")
    manifest = Manifest._parse(chain / teacher / "manifest.json")
    files = [File(f.path, (chain / teacher / f.path).stat().st_size, sha256_file(chain / teacher / f.path)) for f in manifest.files]
    (chain / teacher / "manifest.json").write_bytes(Manifest(**{**vars(manifest), "files": files}).to_json())


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--live", "nowhere"], 2, "nowhere does not exist"),
        (["--live", "data/train"], 2, "data/train is of kind dataset: expected model"),
        (["--live", "teachers/wide", "--logits", CHAIN_CACHE], 1, "teachers/wide reads 16 pixels, and the views of logits/"),
        (
            ["--live", CHAIN_TEACHER, "--logits", "none", "--size", 16],
            1,
            "teachers/resnet8-s0 reads 8 pixels, and --size 16 would show it 16",
        ),
        (["--live", "teachers/few"], 1, "classes"),
        (["--live", CHAIN_TEACHER, "--teacher", "teachers/wide"], 2, "--teacher teachers/wide and --live teachers/resnet8-s0 are two"),
        (["--live", CHAIN_TEACHER, "--alpha", 0], 2, "--live teachers/resnet8-s0 asks a teacher, and alpha 0 weighs none: leave it out"),
        (["--live", CHAIN_TEACHER, "--views", 4], 2, "has 3 views, 4 are asked for"),
        (["--live", CHAIN_TEACHER, "--view-seed", 1], 1, "another policy (seed is 0, asked 1)"),
        (["--live", "teachers/broken", "--logits", "none"], 1, "the live teacher's logits are not finite numbers: its weights are broken"),
    ],
)
def test_refusals(chain_copy: Path, kdprune: Cli, change: Sequence[Any], code: int, said: str) -> None:
    if "teachers/wide" in change:
        wide = ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 16, "--size", 16, "--name", "wide"]
        assert kdprune(*wide, cwd=chain_copy).code == 0
    if "teachers/few" in change:
        shutil.copytree(chain_copy / CHAIN_TEACHER, chain_copy / "teachers/few")
        manifest = Manifest.load(chain_copy / "teachers/few")
        fewer = Manifest(**{**vars(manifest), "classes": list(manifest.classes)[:9]})
        (chain_copy / "teachers/few/manifest.json").write_bytes(fewer.to_json())
    if "teachers/broken" in change:
        shutil.copytree(chain_copy / CHAIN_TEACHER, chain_copy / "teachers/broken")
        broken(chain_copy, Path("teachers/broken"))
    ran = kdprune("distill", *SHORT, "--name", "refused", *change, cwd=chain_copy)
    assert ran.code == code, ran.err
    assert said in ran.err
    assert not (chain_copy / "students/refused/manifest.json").exists()
    assert code == 1 or not (chain_copy / "students/refused").exists()
