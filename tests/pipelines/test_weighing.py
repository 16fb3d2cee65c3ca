"""`distill` and `teacher` on a subset whose samples have weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kdprune_pipelines._weighing import facts, spoken
from safetensors.torch import load_file

from kdprune_data import order
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.learn import models
from kdprune_data.learn.stream import Feed, Images, cached_views, normalisation_of

Cli = Callable[..., Any]
Weigh = Callable[..., None]
SUBSET, CACHE = Path("subsets/random-0.5-s0"), Path("logits/random-0.5-s0--resnet8-s0")
SHORT = ["--model", "resnet8", "--steps", 8, "--batch", 16]
UNEVEN = [float(n % 4) for n in range(54)]
SAID = "samples have weights from 0 to 3, median 1 (14 samples of weight 0)"


def learned(workspace: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(workspace / "students" / name / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_weights_change_what_is_learned(chain_copy: Path, kdprune: Cli, weigh: Weigh) -> None:
    plain = kdprune("distill", *SHORT, "--name", "plain", cwd=chain_copy)
    assert (plain.code, "weights" in plain.err) == (0, False)
    weigh(chain_copy / SUBSET, UNEVEN)
    used = kdprune("distill", *SHORT, "--name", "used", cwd=chain_copy)
    assert (used.code, f"{SAID}: the loss is their weighted mean in each batch\n" in used.err) == (0, True), used.err
    ignored = kdprune("distill", *SHORT, "--sample-weights", "ignore", "--name", "ignored", cwd=chain_copy)
    assert (ignored.code, f"{SAID}: they are ignored\n" in ignored.err) == (0, True), ignored.err
    assert not equal(learned(chain_copy, "plain"), learned(chain_copy, "used"))
    assert equal(learned(chain_copy, "plain"), learned(chain_copy, "ignored"))
    said = [Manifest.load(chain_copy / "students" / name).config.get("sample_weights") for name in ("plain", "used", "ignored")]
    assert said == [None, "use", "ignore"]


@pytest.mark.parametrize("how", ["use", "ignore"])
def test_the_other_way_is_another_student(chain_copy: Path, kdprune: Cli, weigh: Weigh, how: str) -> None:
    weigh(chain_copy / SUBSET, UNEVEN)
    line = ["distill", *SHORT, "--name", "one", "--sample-weights"]
    assert kdprune(*line, how, cwd=chain_copy).code == 0
    again = kdprune(*line, how, cwd=chain_copy)
    assert (again.code, "already done" in again.err) == (0, True)
    other = kdprune(*line, "ignore" if how == "use" else "use", cwd=chain_copy)
    assert (other.code, "sample_weights" in other.err) == (2, True), other.err


@pytest.mark.parametrize(("weight", "how"), [(2.5, "use"), (1e-30, "use"), (2.5, "ignore")])
def test_equal_weights_are_none(chain_copy: Path, kdprune: Cli, weigh: Weigh, weight: float, how: str) -> None:
    """To the bit."""
    assert kdprune("distill", *SHORT, "--name", "plain", cwd=chain_copy).code == 0
    weigh(chain_copy / SUBSET, [weight] * 54)
    ran = kdprune("distill", *SHORT, "--name", "even", "--sample-weights", how, cwd=chain_copy)
    assert (ran.code, "weights" in ran.err) == (0, False), ran.err
    assert equal(learned(chain_copy, "plain"), learned(chain_copy, "even"))
    assert "sample_weights" not in Manifest.load(chain_copy / "students/even").config


@pytest.mark.parametrize("given", [["--logits", "none"], ["--alpha", "0.7", "--label-smoothing", "0.1"]], ids=["labels", "teacher"])
def test_the_loss_is_the_weighted_mean(chain_copy: Path, kdprune: Cli, weigh: Weigh, given: list[str]) -> None:
    """One step of one batch: its loss, from the first weights, in plain Python."""
    if "none" in given:
        given = [*given, "--views", "1", "--view-seed", "0"]
    weigh(chain_copy / SUBSET, UNEVEN)
    line = ["distill", "--model", "resnet8", "--norm", "group", "--steps", 1, "--batch", 54, "--lr", 0, *given, "--name", "one"]
    ran = kdprune(*line, cwd=chain_copy)
    assert ran.code == 0, ran.err
    data = Dataset.open(chain_copy / SUBSET)
    (batch,) = Feed(Images(data), cached_views(data, LogitCache.open(chain_copy / CACHE)), 54, 0).epoch(0)
    net = models.build(models.resolve("resnet8", classes=10, size=8, norm="group"), seed=order.derived(0, "init/student"))
    with torch.no_grad():
        z = net(normalisation_of(Images(data)).apply(batch.images)).double()
    soft = (batch.logits.double() / 4).softmax(1)
    alpha, smoothing = (0.0, 0.0) if "none" in given else (0.7, 0.1)
    above = below = 0.0
    for n, row in enumerate(batch.rows.tolist()):
        said, quiet = z[n].log_softmax(0).tolist(), (z[n] / 4).log_softmax(0).tolist()
        hard = [(1 - smoothing) * (k == batch.labels[n]) + smoothing / 10 for k in range(10)]
        ce = -sum(float(a) * b for a, b in zip(hard, said, strict=True))
        kl = sum(p * (math.log(p) - q) for p, q in zip(soft[n].tolist(), quiet, strict=True))
        above += UNEVEN[row] * ((1 - alpha) * ce + alpha * 16 * kl)
        below += UNEVEN[row]
    (row,) = [json.loads(one) for one in (chain_copy / "students/one/metrics.jsonl").read_text().splitlines()]
    assert row["train_loss"] == pytest.approx(above / below, abs=5e-6)
    assert row["train_accuracy"] == pytest.approx(float((z.argmax(1) == batch.labels).double().mean()), abs=1e-6)


def test_batches_without_any_weight_teach_nothing(chain_copy: Path, kdprune: Cli, weigh: Weigh) -> None:
    """A single sample has a weight: most batches have none, and nothing becomes NaN."""
    weigh(chain_copy / SUBSET, [0.0] * 53 + [3.0])
    ran = kdprune("distill", "--model", "resnet8", "--steps", 8, "--batch", 2, "--name", "few", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert all(bool(torch.isfinite(v).all()) for v in learned(chain_copy, "few").values())


def test_no_weight_at_all_is_refused(chain_copy: Path, kdprune: Cli, weigh: Weigh) -> None:
    weigh(chain_copy / SUBSET, [0.0] * 54)
    ran = kdprune("distill", *SHORT, "--name", "none", cwd=chain_copy)
    assert ran.code == 1
    assert "every sample of subsets/random-0.5-s0 has weight 0: nothing to learn; select again, or --sample-weights ignore" in ran.err
    assert not (chain_copy / "students/none").exists()
    assert kdprune("distill", *SHORT, "--name", "all", "--sample-weights", "ignore", cwd=chain_copy).code == 0


def test_a_teacher_takes_all_alike(chain_copy: Path, kdprune: Cli, weigh: Weigh) -> None:
    line = ["teacher", "--data", SUBSET, "--model", "resnet8", "--steps", 3, "--batch", 16, "--name"]
    plain = kdprune(*line, "plain", cwd=chain_copy)
    weigh(chain_copy / SUBSET, UNEVEN)
    weighed = kdprune(*line, "weighed", cwd=chain_copy)
    assert (plain.code, "weights" in plain.err) == (0, False), plain.err
    assert (weighed.code, f"{SAID}: they are ignored\n" in weighed.err) == (0, True), weighed.err
    found = [load_file(chain_copy / "teachers" / name / "model.safetensors") for name in ("plain", "weighed")]
    assert equal(*found)


def test_a_dry_run_weighs_too(chain_copy: Path, kdprune: Cli, weigh: Weigh) -> None:
    weigh(chain_copy / SUBSET, UNEVEN)
    ran = kdprune("distill", *SHORT, "--name", "dry", "--dry-run", cwd=chain_copy)
    assert (ran.code, SAID in ran.err) == (0, True), ran.err
    assert not (chain_copy / "students/dry").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1, 1], "1 for every sample"),
        ([0, 0], "0 for every sample"),
        ([0.5, 2, 8], "0.5 to 8, median 2"),
        ([0, 4], "0 to 4, median 2 (1 sample of weight 0)"),
        ([3e38, 3.2e38], "3e+38 to 3.2e+38, median 3.1e+38"),
    ],
)
def test_weights_as_they_are_told(weights: list[float], said: str) -> None:
    assert spoken(facts(np.array(weights, np.float32))) == said
