"""`distill`: students of cached views, and every way in which soft labels could be somebody else's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from kdprune_data import order
from kdprune_data.formats import logit_files as cached
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.learn import models
from kdprune_data.learn.stream import Feed, Images, cached_views

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
TEACHER = Path("teachers/resnet8-s0")
SUBSET, CACHE = Path("subsets/random-0.5-s0"), Path("logits/random-0.5-s0--resnet8-s0")
STUDENT = Path("students/random-0.5-s0--resnet8-a0.6204-s0")
SHORT = ["--model", "resnet8", "--steps", 8, "--batch", 16]
PART = Path(cached.view_path(0, 2, 0))


def rewritten(folder: Path, path: Path, change: Callable[[dict[str, Any], int], None]) -> None:
    """Rewrite a view file: `change` gets the columns of each view, as arrays, and the view. The manifest is made to fit."""
    reader = pa.ipc.open_file(folder / path)
    schema, batches = reader.schema, []
    for view in range(reader.num_record_batches):
        batch = reader.get_batch(view)
        columns = {name: np.array(batch.column(name).to_numpy(zero_copy_only=False)) for name in schema.names if name != "logits"}
        columns["logits"] = np.array(batch.column("logits").flatten().to_numpy()).reshape(len(batch), -1)
        change(columns, view)
        soft = pa.FixedSizeListArray.from_arrays(pa.array(columns.pop("logits").reshape(-1)), schema.field("logits").type.list_size)
        arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
        batches.append(pa.record_batch([*arrays, soft], schema=schema))
    with pa.OSFile(str(folder / path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    resealed(folder)


def resealed(folder: Path) -> None:
    """Make a folder's manifest say what its files are: as whoever means to deceive would."""
    manifest = Manifest.load(folder) if not (folder / "manifest.json").exists() else Manifest._parse(folder / "manifest.json")
    files = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
    (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())


def shown(workspace: Path, cache: Path = CACHE, epoch: int = 0) -> torch.Tensor:
    """What a student of the subset sees in an epoch, in the subset's order: uint8 of shape (n, 3, 8, 8)."""
    data = Dataset.open(workspace / SUBSET)
    batches = list(Feed(Images(data), cached_views(data, LogitCache.open(workspace / cache)), 16, 0).epoch(epoch))
    by_row = np.argsort(np.concatenate([b.rows for b in batches]))
    return torch.cat([b.images for b in batches])[by_row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


# --- students


def test_the_folder(chain: Path) -> None:
    manifest = Manifest.load(chain / STUDENT)
    assert [f.path for f in manifest.files] == ["metrics.jsonl", "model.safetensors"]
    assert manifest.counts == {"samples": 54, "steps": 16, "epochs": 4, "parameters": 75290}
    config = manifest.config
    assert (config["role"], config["alpha"], config["temperature"]) == ("student", 0.6204, 4.0)
    cache = Manifest.load(chain / CACHE)
    assert config["views"] == {"from": "cache", "count": 3, "files": [{"path": f.path, "sha256": f.sha256} for f in cache.files]}
    assert config["policy"] == cache.config["policy"]
    assert [(i["role"], i["digest"]) for i in manifest.inputs] == [
        ("data", Manifest.load(chain / SUBSET).digest),
        ("teacher", Manifest.load(chain / TEACHER).digest),
        ("val", Manifest.load(chain / "data/val").digest),
    ]
    assert config["precision"] == "float32"
    rows = [json.loads(line) for line in (chain / STUDENT / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["steps"], row["samples"]) for row in rows] == [(1, 4, 54), (2, 8, 54), (3, 12, 54), (4, 16, 54)]


def test_a_student_cites_the_files_it_reads(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("cache", "--views", 5, cwd=chain_copy).code == 0
    for count, files in ((2, 4), (3, 4), (4, 6), (5, 6)):
        ran = kdprune("distill", *SHORT, "--views", count, "--name", f"of-{count}", cwd=chain_copy)
        assert ran.code == 0, ran.err
        views = Manifest.load(chain_copy / f"students/of-{count}").config["views"]
        assert (views["count"], len(views["files"])) == (count, files)


def test_views_added_later_make_no_other_student(chain_copy: Path, kdprune: Cli) -> None:
    line = ["distill", *SHORT, "--views", 2]
    assert kdprune(*line, cwd=chain_copy).code == 2  # `chain` holds its student of three views under this name
    assert kdprune(*line, "--name", "two", cwd=chain_copy).code == 0
    assert kdprune("cache", "--views", 4, cwd=chain_copy).code == 0
    ran = kdprune(*line, "--name", "two", cwd=chain_copy)
    assert (ran.code, "already done" in ran.err) == (0, True), ran.err
    ran = kdprune("distill", *SHORT, "--views", 4, "--name", "two", cwd=chain_copy)
    assert (ran.code, "views.count is 2, now 4" in ran.err) == (2, True)


def test_a_student_starts_from_weights_of_its_own(chain_copy: Path, kdprune: Cli) -> None:
    """As good as untrained: with a learning rate of nothing they are the first weights, and not those of the teacher of that seed."""
    still = ["--model", "resnet8", "--steps", 1, "--lr", 0, "--seed", 3]
    assert kdprune("distill", *still, "--name", "still", cwd=chain_copy).code == 0
    assert kdprune("teacher", *still, "--name", "still", cwd=chain_copy).code == 0
    student, teacher = (weights(chain_copy / kind / "still") for kind in ("students", "teachers"))
    fresh = models.build(models.resolve("resnet8", classes=10, size=8), seed=order.derived(3, "init/student"))
    assert all(torch.equal(student[k], v) for k, v in fresh.named_parameters())
    assert not torch.equal(student["linear.weight"], teacher["linear.weight"])


@pytest.mark.parametrize("alpha", ["0", "0.5", "1"])
def test_alpha_changes_what_is_learned(chain_copy: Path, kdprune: Cli, alpha: str) -> None:
    for name, given in (("a", alpha), ("b", "0.25")):
        ran = kdprune("distill", *SHORT, "--alpha", given, "--name", name, cwd=chain_copy)
        assert ran.code == 0, ran.err
    a, b = (weights(chain_copy / "students" / name) for name in "ab")
    assert not equal(a, b)


def test_equal_commands_give_equal_students(chain_copy: Path, kdprune: Cli, digests: Digests) -> None:
    for name in "ab":
        assert kdprune("distill", *SHORT, "--name", name, cwd=chain_copy).code == 0
    assert digests(chain_copy / "students/a") == digests(chain_copy / "students/b")


@pytest.mark.parametrize("name", [None, "mine"])
def test_labels_only(chain_copy: Path, kdprune: Cli, name: str | None) -> None:
    ran = kdprune("distill", *SHORT, "--logits", "none", *(["--name", name] if name else []), cwd=chain_copy)
    assert ran.code == 0, ran.err
    manifest = Manifest.load(chain_copy / f"students/{name or 'random-0.5-s0--resnet8-a0-s0'}")
    assert (manifest.config["alpha"], manifest.config["views"]) == (0.0, {"from": "drawn", "count": None})
    assert [i["role"] for i in manifest.inputs] == ["data", "val"]


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_labels_only_on_the_cached_views_is_alpha_0(chain_copy: Path, kdprune: Cli, smoothing: float) -> None:
    """The baselines, hard labels and smoothed ones: views drawn in turn by the same rules are the cached ones, so with alpha 0 the cache
    changes nothing."""
    for name, more in (("cached", ["--alpha", 0]), ("drawn", ["--logits", "none", "--views", 3])):
        ran = kdprune("distill", *SHORT, "--label-smoothing", smoothing, "--name", name, *more, cwd=chain_copy)
        assert ran.code == 0, ran.err
        recipe = Manifest.load(chain_copy / "students" / name).config["recipe"]
        assert recipe["label_smoothing"] == smoothing
    assert equal(weights(chain_copy / "students/cached"), weights(chain_copy / "students/drawn"))


LOSSES = {
    "kl": [],
    "dkd": ["--loss", "dkd"],
    "weaker": ["--loss", "dkd", "--set", "beta=2"],
    "dist": ["--loss", "dist", "--set", "beta=2", "--set", "gamma=0.5"],
    "mse": ["--loss", "mse"],
}


def test_losses(chain_copy: Path, kdprune: Cli, weigh: Cli) -> None:
    """Each makes another student, weighted samples too; its name and settings stand in the manifest, of KL nothing does."""
    weigh(chain_copy / SUBSET, [n % 3 for n in range(54)])
    for name, more in LOSSES.items():
        ran = kdprune("distill", *SHORT, *more, "--name", name, cwd=chain_copy)
        assert ran.code == 0, ran.err
    told = {name: Manifest.load(chain_copy / "students" / name).config for name in LOSSES}
    assert {name: (one.get("loss"), one.get("settings"), one["temperature"]) for name, one in told.items()} == {
        "kl": (None, None, 4.0),
        "dkd": ("dkd", {"alpha": 1.0, "beta": 8.0}, 4.0),
        "weaker": ("dkd", {"alpha": 1.0, "beta": 2.0}, 4.0),
        "dist": ("dist", {"beta": 2.0, "gamma": 0.5}, 4.0),
        "mse": ("mse", None, None),
    }
    made = {name: weights(chain_copy / "students" / name) for name in LOSSES}
    assert not any(equal(made[a], made[b]) for a in LOSSES for b in LOSSES if a < b)
    ran = kdprune("distill", *SHORT, *LOSSES["dkd"], "--name", "weaker", cwd=chain_copy)
    assert (ran.code, "settings.beta is 2.0, now 8.0" in ran.err) == (2, True), ran.err
    shown = kdprune("info", "students/dist", cwd=chain_copy)
    assert "settings.gamma = 0.5" in shown.out


def test_the_help_knows_every_loss() -> None:
    """Their names and settings, which it cannot ask the losses for: they import torch."""
    from kdprune_cli import distill as command
    from kdprune_pipelines import _soft

    from kdprune_data.learn import soft

    assert tuple(soft.LOSSES) == _soft.NAMES
    found: dict[str, str] = {}
    for line in command.NOTES.splitlines()[1:]:
        if "--set" in line:
            found[list(found)[-1]] = line.split("--set ")[1]
        else:
            found[line.split()[0]] = ""
    assert found == {name: " ".join(f"{key}={value}" for key, value in loss.settings().own().items()) for name, loss in soft.LOSSES.items()}


def test_another_loss_ends_the_settings_of_the_file(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "kdprune.toml").write_text('[distill]\nloss = "dkd"\nset = { beta = 4 }\n')
    for name, more, settings in (("a", [], {"alpha": 1.0, "beta": 4.0}), ("b", ["--loss", "dist"], {"beta": 1.0, "gamma": 1.0})):
        ran = kdprune("distill", *SHORT, *more, "--name", name, cwd=chain_copy)
        assert ran.code == 0, ran.err
        assert Manifest.load(chain_copy / "students" / name).config["settings"] == settings


def test_without_a_cache_it_says_so(chain_copy: Path, kdprune: Cli) -> None:
    shutil.rmtree(chain_copy / "logits")
    ran = kdprune("distill", *SHORT, cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert "no logit cache for subsets/random-0.5-s0 in logits/: labels only" in ran.err
    ran = kdprune("distill", *SHORT, "--alpha", "0.5", cwd=chain_copy)
    assert (ran.code, "weighs a teacher, and there is no logit cache" in ran.err) == (2, True)


def test_a_cache_of_everything_serves_a_subset(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("cache", "data/train", "--views", 3, "--dtype", "float32", "--name", "all", cwd=chain_copy).code == 0
    images = shown(chain_copy)
    assert torch.equal(shown(chain_copy, Path("logits/all")), images)
    shutil.rmtree(chain_copy / CACHE)
    ran = kdprune("distill", *SHORT, "--name", "of-all", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert "logit cache: logits/all" in ran.err
    cited = Manifest.load(chain_copy / "students/of-all").config["views"]["files"]
    assert cited == [{"path": f.path, "sha256": f.sha256} for f in Manifest.load(chain_copy / "logits/all").files]


@pytest.mark.parametrize("frac", ["0.5", "1"])
def test_alpha_is_automatic_by_what_is_kept_of_the_first_data_set(chain_copy: Path, kdprune: Cli, frac: str) -> None:
    """A half of a half is a quarter."""
    assert kdprune("select", SUBSET, "--frac", frac, "--out", "subsets/again", cwd=chain_copy).code == 0
    ran = kdprune("distill", "subsets/again", *SHORT, "--name", "again", cwd=chain_copy)
    assert ran.code == 0, ran.err
    expected = {"0.5": 0.7408, "1": 0.6204}[frac]
    assert Manifest.load(chain_copy / "students/again").config["alpha"] == expected


def test_an_ids_only_subset_learns_the_same(chain_copy: Path, kdprune: Cli) -> None:
    """The samples, their views and soft labels are those of the packed one; only the order of its shards may differ: here it has one."""
    for name, more in (("packed", []), ("ids", ["--ids-only"])):
        assert kdprune("select", "--frac", "0.2", "--out", f"subsets/{name}", *more, cwd=chain_copy).code == 0
        logits = ["--logits", "none"]
        ran = kdprune(
            "distill", f"subsets/{name}", "--model", "resnet8", "--steps", 3, "--batch", 100, *logits, "--name", name, cwd=chain_copy
        )
        assert ran.code == 0, ran.err
    a, b = (weights(chain_copy / "students" / name) for name in ("packed", "ids"))
    assert all(torch.allclose(a[k].double(), b[k].double(), atol=1e-3) for k in a)


def test_epochs_are_kept_where_asked(chain_copy: Path, kdprune: Cli) -> None:
    line = ["distill", "--model", "resnet8", "--epochs", 4, "--batch", 16]
    ran = kdprune(*line, "--keep-epochs", 2, cwd=chain_copy)
    assert (ran.code, "keep_epochs is [], now [2]" in ran.err) == (2, True)  # the student of `chain` kept none
    assert kdprune(*line, "--keep-epochs", 2, "--name", "kept", cwd=chain_copy).code == 0
    kept = sorted(p.name for p in (chain_copy / "students/kept").glob("epoch-*"))
    assert kept == ["epoch-002.safetensors", "epoch-004.safetensors"]
    assert equal(weights(chain_copy / "students/kept"), weights(chain_copy / STUDENT))


def test_again_is_already_done(chain_copy: Path, kdprune: Cli, digests: Digests) -> None:
    before = digests(chain_copy)
    ran = kdprune("distill", "--model", "resnet8", "--epochs", 4, "--batch", 16, cwd=chain_copy)
    assert (ran.code, "already done" in ran.err) == (0, True)
    assert digests(chain_copy) == before


@pytest.mark.parametrize(
    ("more", "recipe"),
    [([], {}), (["--ema", "0.8", "--momentum", "0"], {"ema": 0.8, "momentum": 0.0}), (["--sample-weights", "use"], {})],
)
def test_a_killed_student_ends_with_the_same_bytes(
    chain_copy: Path, started: Cli, kdprune: Cli, digests: Digests, weigh: Cli, more: list[str], recipe: dict[str, float]
) -> None:
    """SIGKILL after the sixth of 16 steps, in the middle of an epoch of four."""
    if "--sample-weights" in more:
        weigh(chain_copy / SUBSET, [n % 3 for n in range(54)])
    line = ["distill", "--model", "resnet8", "--epochs", "4", "--batch", "16", *more, "--name"]
    kill = (
        "import os, signal\nfrom kdprune_data.learn import loop\nfrom kdprune_data.learn.checkpoint import Checkpoint\n"
        "loop.SAVE_EVERY, loop.SAVE_SHARE, save = 0.0, 0.0, Checkpoint.save\n"
        "Checkpoint.save = lambda *a: (save(*a), a[1].step == 6 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    running = started(*line, "killed", cwd=chain_copy, first=kill)
    _, err = running.communicate()
    assert running.returncode == -9, err
    ran = kdprune(*line, "killed", cwd=chain_copy)
    assert (ran.code, "continuing after step 6 of 16" in ran.err) == (0, True), ran.err
    assert kdprune(*line, "undisturbed", cwd=chain_copy).code == 0
    assert digests(chain_copy / "students/killed") == digests(chain_copy / "students/undisturbed")
    manifest = Manifest.load(chain_copy / "students/killed")
    assert {key: manifest.config["recipe"][key] for key in recipe} == recipe


@pytest.mark.parametrize(("steps", "rows"), [(2, 1), (9, 3), (124, 30)])
def test_a_student_is_not_validated_more_than_trained(chain_copy: Path, kdprune: Cli, steps: int, rows: int) -> None:
    """2 steps of 16 (of 54 samples in 4) are 27 samples trained on, and val has 12; never more than 30 times."""
    ran = kdprune("distill", "--model", "resnet8", "--steps", steps, "--batch", 16, "--name", "few", cwd=chain_copy)
    assert ran.code == 0, ran.err
    found = [json.loads(line) for line in (chain_copy / "students/few/metrics.jsonl").read_text().splitlines()]
    assert len(found) == min(rows, -(-steps // 4))
    assert found[-1]["steps"] == steps
    assert all(row["val_loss"] is not None for row in found)


def test_a_student_of_other_weights_and_labels(chain_copy: Path, kdprune: Cli) -> None:
    """`--init` and `--label-smoothing` each make another student; so does a crop that is asked for."""
    made = {}
    for name, more in {
        "plain": ["--alpha", "0.5"],
        "smooth": ["--alpha", "0.5", "--label-smoothing", "0.2"],
        "started": ["--alpha", "0.5", "--init", TEACHER],
        "cropped": ["--logits", "none", "--pad", "3"],
        "resized": ["--logits", "none", "--scale", "0.3", "0.9"],
    }.items():
        ran = kdprune("distill", *SHORT, *more, "--name", name, cwd=chain_copy)
        assert ran.code == 0, ran.err
        made[name] = weights(chain_copy / "students" / name)
        config = Manifest.load(chain_copy / "students" / name).config
        assert (config["init"] is not None, config["recipe"]["label_smoothing"] > 0) == (name == "started", name == "smooth")
        pad = {"plain": 1, "smooth": 1, "started": 1, "cropped": 3}.get(name)
        assert config["policy"].get("pad") == pad
    names = list(made)
    assert not any(equal(made[a], made[b]) for n, a in enumerate(names) for b in names[:n])


@pytest.mark.parametrize("more", [[], ["--logits", "none"], ["--keep-epochs", 1]])
def test_a_dry_run_touches_nothing(chain_copy: Path, kdprune: Cli, more: list[Any]) -> None:
    def tree() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in [chain_copy, *chain_copy.rglob("*")]}

    before = tree()
    line = ["distill", *SHORT, *more, "--name", "dry"]
    ran = kdprune(*line, "--dry-run", "--json", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert tree() == before
    found = json.loads(ran.out)
    assert kdprune(*line, cwd=chain_copy).code == 0
    manifest = Manifest.load(chain_copy / "students/dry")
    counts = manifest.counts
    assert found["counts"] == {"sample": 54, "epoch": counts["epochs"], "step": 8, "parameter": counts["parameters"]}
    assert found["bytes"] == pytest.approx(sum(f.bytes for f in manifest.files), rel=0.1)
    text = kdprune("distill", *SHORT, *more, "--name", "again", "--dry-run", cwd=chain_copy).out
    assert "students/again would be made: 54 samples, 2 epochs, 8 steps, 75,290 parameters; about" in text


# --- refusals


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--alpha", "-0.1"], 2, "--alpha -0.1 is out of range: from 0"),
        (["--alpha", "1.5"], 2, "--alpha 1.5 is out of range"),
        (["--alpha", "nan"], 2, "--alpha nan is out of range"),
        (["--alpha", "much"], 2, "--alpha 'much' is not a number"),
        (["--views", "4"], 2, "has 3 views, 4 are asked for: make more with cache"),
        (["--views", "0"], 2, "--views 0 is too small: at least 1"),
        (["--temperature", "0"], 2, "--temperature 0.0 is too small"),
        (["--temperature", "nan"], 2, "--temperature nan is not a finite number"),
        (["--epochs", "0"], 2, "--epochs 0 trains nothing"),
        (["--flip", "on"], 1, "another policy (flip is False, asked True)"),
        (["--size", "16"], 1, "another policy"),
        (["--view-seed", "1"], 1, "another policy (seed is 0, asked 1)"),
        (["--teacher", "teachers/other"], 1, "no cache in logits/ holds what teachers/other says of subsets/random-0.5-s0: run"),
        (["--teacher", "teachers/other", "--logits", CACHE], 1, "holds the logits of teacher resnet8-s0"),
        (["--teacher", "data/train"], 2, "expected model"),
        (["--logits", "scores/resnet8-s0"], 2, "expected logits"),
        (["--logits", "nowhere"], 2, "nowhere does not exist"),
        (["--keep-epochs", "99"], 2, "--keep-epochs 99 is after the end"),
        (["--lr", "1e30"], 1, "training has diverged: after step"),
        (["--pad", "2"], 1, "another policy (pad is 1, asked 2)"),
        (["--scale", "0.5", "1"], 1, "another policy (kernel is none, asked bilinear"),
        (["--init", "nowhere"], 2, "--init nowhere does not exist"),
        (["--loss", "kld"], 2, "'kld'"),
        (["--set", "beta=2"], 2, "kl has no settings: leave out --set beta"),
        (["--loss", "dkd", "--set", "gamma=2"], 2, "unknown setting of dkd 'gamma'"),
        (["--loss", "dkd", "--set", "beta=-1"], 2, "--set beta -1.0 is too small: at least 0"),
        (["--loss", "dkd", "--alpha", "0"], 2, "--loss dkd is of a teacher's logits, and at alpha 0 there are none that count"),
        (["--loss", "dist", "--logits", "none"], 2, "--loss dist is of a teacher's logits, and at alpha 0 there are none that count"),
        (["--loss", "mse", "--temperature", "2"], 2, "--temperature 2 changes nothing with --loss mse"),
    ],
)
def test_refusals(chain_copy: Path, kdprune: Cli, change: list[str], code: int, said: str) -> None:
    if "teachers/other" in change:
        other = ["teacher", "--model", "resnet8", "--steps", 2, "--batch", 16, "--seed", 1, "--name", "other"]
        assert kdprune(*other, cwd=chain_copy).code == 0
    steps = [] if "--epochs" in change else ["--steps", 8]
    ran = kdprune("distill", "--model", "resnet8", *steps, "--batch", 16, "--name", "refused", *change, cwd=chain_copy)
    assert ran.code == code, ran.err
    assert said in ran.err
    assert not (chain_copy / "students/refused/manifest.json").exists()
    assert code == 1 or not (chain_copy / "students/refused").exists()


@pytest.mark.parametrize(
    "asked", [["--flip", "off"], ["--size", "8"], ["--pad", "1"], ["--view-seed", "0"], ["--teacher", "teachers/resnet8-s0"]]
)
def test_asking_for_what_there_is(chain_copy: Path, kdprune: Cli, asked: list[str]) -> None:
    ran = kdprune("distill", *SHORT, "--name", "asked", *asked, cwd=chain_copy)
    assert ran.code == 0, ran.err


def test_a_cache_of_another_subset_is_refused(chain_copy: Path, kdprune: Cli) -> None:
    """Nor is it found by itself."""
    assert kdprune("select", "--frac", "0.5", "--seed", 1, cwd=chain_copy).code == 0
    other = "subsets/random-0.5-s1"
    ids = [set(Dataset.open(chain_copy / s).ids.tolist()) for s in (SUBSET, other)]
    missing = len(ids[1] - ids[0])
    ran = kdprune("distill", other, *SHORT, "--logits", CACHE, cwd=chain_copy)
    assert ran.code == 1
    assert f"has no logits for {missing} of 54 samples of {other}" in ran.err
    ran = kdprune("distill", other, *SHORT, cwd=chain_copy)
    assert "labels only" in ran.err


def test_several_caches_are_listed(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("cache", "--views", 1, "--seed", 1, "--name", "second", cwd=chain_copy).code == 0
    ran = kdprune("distill", *SHORT, cwd=chain_copy)
    assert ran.code == 2
    assert f"several in logits/ fit: {CACHE.name}, second; say which with --logits" in ran.err


def test_the_cache_is_that_of_the_teacher_asked_for(chain_copy: Path, kdprune: Cli) -> None:
    other = "teachers/resnet8-s1"
    assert kdprune("teacher", "--model", "resnet8", "--steps", 2, "--batch", 16, "--seed", 1, cwd=chain_copy).code == 0
    assert kdprune("cache", "--views", 1, "--teacher", other, cwd=chain_copy).code == 0
    assert kdprune("distill", *SHORT, cwd=chain_copy).code == 2  # two fit
    for teacher in (TEACHER, Path(other)):
        ran = kdprune("distill", *SHORT, "--teacher", teacher, "--name", f"of-{teacher.name}", cwd=chain_copy)
        assert ran.code == 0, ran.err
        found = Manifest.load(chain_copy / f"students/of-{teacher.name}").ancestor("teacher")
        assert found["digest"] == Manifest.load(chain_copy / teacher).digest


def test_images_wider_than_a_byte_can_say(tmp_path: Path, kdprune: Cli) -> None:
    """Eight photographs' worth of digits at 160 pixels, all of one size: boxes stored in bytes and shorts, sums of them beyond either."""
    from PIL import Image
    from sklearn.datasets import load_digits

    for n, one in enumerate(load_digits().images[:8]):
        path = tmp_path / "large" / str(n % 2) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((one * 15).astype(np.uint8)).resize((160, 160)).save(path)
    for line in (
        ["import", "large"],
        ["teacher", "--model", "resnet8", "--epochs", 1, "--batch", 8, "--size", 160],
        ["select", "--frac", 1],
        ["cache", "--views", 1],
        ["distill", "--model", "resnet8", "--steps", 1],
        ["verify", "logits/random-1-s0--resnet8-s0"],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    data, cache = Dataset.open(tmp_path / "data/train"), LogitCache.open(tmp_path / "logits/random-1-s0--resnet8-s0")
    found = cache.join(Dataset.open(tmp_path / "subsets/random-1-s0")).read(np.arange(8), 0)
    assert {getattr(found, side).dtype for side in cached.GEOMETRY} == {np.dtype(np.int32)}
    assert pa.types.is_int8(pa.ipc.open_file(cache.folder / cached.view_path(0, 0, 0)).schema.field("top").type)
    assert (found.top.min() < 0, (found.top + found.height).max() > 160, len(data)) == (True, True, 8)


@pytest.mark.parametrize(
    "line", [["distill", "nowhere"], ["distill", "--logits", "nowhere"], ["cache", "nowhere"], ["cache", "--teacher", "no"]]
)
def test_missing_inputs_are_told_before_torch_is_imported(chain: Path, started: Cli, line: list[str]) -> None:
    running = started(*line, cwd=chain, first="import sys; sys.modules['torch'] = None")  # importing it would fail
    _, err = running.communicate()
    assert (running.returncode, "does not exist" in err) == (2, True), err


def relabelled(source: Path, folder: Path) -> None:
    """Class folders in which two samples have changed classes, under their old names: ids do not tell."""
    shutil.copytree(source, folder)
    a, b = sorted(folder.rglob("*.jpg"))[:2]
    kept = a.read_bytes(), b.read_bytes()
    a.write_bytes(kept[1])
    b.write_bytes(kept[0])


def test_other_images_under_the_same_ids_are_refused(tmp_path: Path, kdprune: Cli, class_folders: Path) -> None:
    relabelled(class_folders, tmp_path / "changed")
    for line in (
        ["import", class_folders],
        ["import", tmp_path / "changed", "--out", "data/changed"],
        ["teacher", "--model", "resnet8", "--steps", 2, "--batch", 10],
        ["cache", "data/train", "--views", 1],
    ):
        assert kdprune(*line, cwd=tmp_path).code == 0
    ran = kdprune("distill", "data/changed", *SHORT, "--logits", "logits/train--resnet8-s0", cwd=tmp_path)
    assert ran.code == 1
    assert "was made of other data: the image of 2 samples of data/changed differs" in ran.err


@pytest.mark.parametrize("labelled", [0, 40])
def test_accuracy_counts_what_has_a_label(chain_copy: Path, kdprune: Cli, unlabelled: Path, labelled: int) -> None:
    """A shard without labels, alone and after one with."""
    (chain_copy / "names.txt").write_text("\n".join("0123456789"))
    shards = [chain_copy / "data/train/shard-000001.tar", unlabelled] if labelled else [unlabelled]
    for line in (
        ["index", *shards, "--out", "data/bare", "--classes", "names.txt"],
        ["cache", "data/bare", "--views", 1, "--name", "bare"],
        ["distill", "data/bare", "--logits", "logits/bare", "--model", "resnet8", "--epochs", 2, "--alpha", 1, "--name", "s"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    assert ("train (loss" in ran.err) == (labelled == 0)
    rows = [json.loads(line) for line in (chain_copy / "students/s/metrics.jsonl").read_text().splitlines()]
    assert all((row["train_accuracy"] is None) == (labelled == 0) for row in rows)
    right = [row["train_accuracy"] * labelled for row in rows if row["train_accuracy"] is not None]
    assert right == pytest.approx([round(n) for n in right], abs=1e-3)
    assert kdprune("verify", "students/s", cwd=chain_copy).code == 0


def test_other_labels_under_the_same_ids_are_refused(chain_copy: Path, kdprune: Cli) -> None:
    """The same tars, in which one `.cls` says another class."""
    adopted = []
    for n, path in enumerate(sorted((chain_copy / SUBSET).glob("*.tar"))):
        data = bytearray(path.read_bytes())
        if n == 0:
            at = data.index(b".cls") // 512 * 512 + 512
            data[at] = ord("0") + (data[at] - ord("0") + 1) % 10
        (chain_copy / path.name).write_bytes(data)
        adopted.append(path.name)
    (chain_copy / "names.txt").write_text("\n".join("0123456789"))
    assert kdprune("index", *adopted, "--out", "data/changed", "--classes", "names.txt", cwd=chain_copy).code == 0
    ran = kdprune("distill", "data/changed", *SHORT, "--logits", CACHE, cwd=chain_copy)
    assert ran.code == 1
    assert "was made of other data: the label of 1 samples of data/changed differs" in ran.err


# --- what is in the files is what the student gets


def test_a_geometry_edited_by_hand_changes_the_pixels(chain_copy: Path, kdprune: Cli) -> None:
    """So the boxes are data, and are not drawn anew: what the teacher judged is what the student is shown."""
    before = [shown(chain_copy, epoch=epoch) for epoch in range(3)]
    data = Dataset.open(chain_copy / SUBSET)
    row = int(data.rows_of(0)[4])

    def edit(columns: dict[str, Any], view: int) -> None:
        if view == 1:
            columns["top"][4] += 3

    rewritten(chain_copy / CACHE, PART, edit)
    after = [shown(chain_copy, epoch=epoch) for epoch in range(3)]
    changed = [(epoch, n) for epoch in range(3) for n in range(54) if not torch.equal(before[epoch][n], after[epoch][n])]
    assert changed == [(1, row)]
    moved = before[1][row][:, 3:]
    inside = 8 - 3 - 1  # rows that both boxes hold, whatever the padding
    assert torch.equal(after[1][row][:, :inside], moved[:, :inside])
    # A student learns something else from it, and `verify` says that this is not the policy's box.
    ran = kdprune("distill", *SHORT, "--name", "edited", "--check-labels", 0, cwd=chain_copy)
    assert ran.code == 0, ran.err
    verified = kdprune("verify", CACHE, cwd=chain_copy)
    assert verified.code == 1
    assert f"the box of {data.ids[row]!r} is not the one its policy draws" in verified.out


@pytest.mark.parametrize(("side", "by", "whole"), [("left", 1, True), ("width", 2, False), ("top", -2, False), ("flip", 1, False)])
def test_resized_crops_are_held_to_their_policy(tmp_path: Path, kdprune: Cli, class_folders: Path, side: str, by: int, whole: bool) -> None:
    """Within the pixel by which machines may differ."""
    for line in (
        ["import", class_folders],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 8, "--size", 8],
        ["cache", "data/train", "--views", 3],
    ):
        assert kdprune(*line, cwd=tmp_path).code == 0
    folder = tmp_path / "logits/train--resnet8-s0"
    assert LogitCache.open(folder).policy["kind"] == "resized-crop"

    def edit(columns: dict[str, Any], view: int) -> None:
        if view == 2:
            columns[side][7] = not columns[side][7] if side == "flip" else columns[side][7] + by

    rewritten(folder, PART, edit)
    named = Dataset.open(tmp_path / "data/train").ids[7]
    ran = kdprune("verify", folder, cwd=tmp_path)
    assert ran.code == (0 if whole else 1), ran.out
    assert (f"view 2 of shard 0: the box of {named!r} is not the one its policy draws" in ran.out) != whole


@pytest.mark.parametrize("side", ["left", "flip"])
def test_every_side_of_the_box_counts(chain_copy: Path, side: str) -> None:
    before = shown(chain_copy)

    def edit(columns: dict[str, Any], view: int) -> None:
        columns[side][:] = ~columns[side] if side == "flip" else columns[side] + 1

    rewritten(chain_copy / CACHE, PART, edit)
    n = len(Dataset.open(chain_copy / SUBSET).rows_of(0))
    after = shown(chain_copy)
    assert (after[:n] != before[:n]).flatten(1).any(1).all()
    assert torch.equal(after[n:], before[n:])
    if side == "flip":
        assert torch.equal(after[:n], before[:n].flip(3))


def test_soft_labels_edited_by_hand_change_the_student(chain_copy: Path, kdprune: Cli) -> None:
    def edit(columns: dict[str, Any], view: int) -> None:
        columns["logits"] *= np.float16(0.5)  # flatter, with the same largest

    assert kdprune("distill", *SHORT, "--name", "before", cwd=chain_copy).code == 0
    rewritten(chain_copy / CACHE, PART, edit)
    assert kdprune("distill", *SHORT, "--name", "after", "--check-labels", 0, cwd=chain_copy).code == 0
    assert not equal(weights(chain_copy / "students/before"), weights(chain_copy / "students/after"))


@pytest.mark.parametrize(
    ("by", "cause"),
    [
        (1, "the logits stand 1 row after their samples"),
        (-1, "the logits stand 1 row before their samples"),
        (2, "the logits stand 2 rows after their samples"),
        (-2, "the logits stand 2 rows before their samples"),
        (7, "rows and logits do not belong together"),
    ],
)
def test_rows_that_are_shifted_are_refused(chain_copy: Path, kdprune: Cli, by: int, cause: str) -> None:
    """Every digest fits: only that the largest logit is the label's in another number of rows gives it away."""

    def shift(columns: dict[str, Any], view: int) -> None:
        for name in columns:
            columns[name] = np.roll(columns[name], by, axis=0)

    rewritten(chain_copy / CACHE, PART, shift)
    ran = kdprune("distill", *SHORT, "--name", "shifted", cwd=chain_copy)
    assert ran.code == 1
    assert str(PART) in ran.err
    assert f"{cause}; run cache again" in ran.err
    assert not (chain_copy / "students/shifted/manifest.json").exists()
    assert kdprune("verify", CACHE, cwd=chain_copy).code == 1


def test_rows_of_another_order_are_refused(chain_copy: Path, kdprune: Cli) -> None:
    import pyarrow.parquet as pq

    path = chain_copy / CACHE / cached.rows_path(0)
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(len(table)))[::-1]).cast(table.schema), path)
    resealed(chain_copy / CACHE)
    ran = kdprune("distill", *SHORT, "--name", "turned", cwd=chain_copy)
    assert ran.code == 1
    assert "was made for other samples than the rows beside it" in ran.err


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"teacher", b"0" * 64), (b"policy", b"{}"), (b"format", b"2"), (b"rows", b""), (b"top1_correct", None), (b"top1_correct", b"[1]")],
)
def test_metadata_that_does_not_fit_is_refused(chain_copy: Path, kdprune: Cli, key: bytes, value: bytes | None) -> None:
    path = chain_copy / CACHE / PART
    reader = pa.ipc.open_file(path)
    batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
    metadata = {k: v for k, v in (reader.schema.metadata | {key: value}).items() if v is not None}
    schema = reader.schema.with_metadata(metadata)
    with pa.OSFile(str(path) + ".new", "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    Path(str(path) + ".new").replace(path)
    resealed(chain_copy / CACHE)
    ran = kdprune("distill", *SHORT, "--name", "other", cwd=chain_copy)
    assert ran.code == 1
    assert str(PART) in ran.err
    assert "unexpected" not in ran.err


def files(folder: Path) -> Sequence[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_missing_or_shorter_file_is_refused(chain_copy: Path, kdprune: Cli) -> None:
    for path in files(chain_copy / CACHE):
        if path.name in ("manifest.json", "log.txt"):
            continue
        kept = path.read_bytes()
        path.write_bytes(kept[:-1])
        ran = kdprune("distill", *SHORT, "--name", "short", cwd=chain_copy)
        assert (ran.code, path.name in ran.err) == (1, True)
        path.unlink()
        ran = kdprune("distill", *SHORT, "--name", "short", cwd=chain_copy)
        assert (ran.code, f"{path.name} is missing" in ran.err) == (1, True)
        path.write_bytes(kept)


def test_a_teacher_without_a_cache_is_refused(chain: Path, kdprune: Cli) -> None:
    ran = kdprune("distill", "--logits", "none", "--teacher", "teachers/resnet8-s0", cwd=chain)
    assert (ran.code, ran.err.count("error:")) == (2, 1)
    assert "give one of the two" in ran.err
