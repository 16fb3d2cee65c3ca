"""`evaluate` against a direct computation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kdprune_pipelines import _models

from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import Manifest
from kdprune_data.learn import views
from kdprune_data.learn.inference import Evaluation
from kdprune_data.learn.stream import Images

Cli = Callable[..., Any]
TEACHER, STUDENT = "teachers/resnet8-s0", "students/random-0.5-s0--resnet8-a0.6204-s0"


def logits_of(workspace: Path, model: str, data: Dataset) -> torch.Tensor:
    """Of all images at once, by hand."""
    saved = _models.open_model(workspace / model)
    rows = np.flatnonzero(data.ok)
    with torch.no_grad():
        return saved.load(code=None).eval()(saved.normalisation.apply(views.evaluation(Images(data).get(rows), 8)))


@pytest.mark.parametrize("model", [TEACHER, STUDENT])
@pytest.mark.parametrize(
    ("split", "more"), [("test", []), ("val", ["--data", "data/val"]), ("train", ["--data", "data/train", "--batch", "7"])]
)
def test_against_a_direct_computation(chain: Path, kdprune: Cli, model: str, split: str, more: list[str]) -> None:
    ran = kdprune("evaluate", model, *more, "--json", cwd=chain)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    data = Dataset.open(chain / "data" / split)
    z, labels = logits_of(chain, model, data), torch.from_numpy(data.labels.astype(np.int64))
    right = (z.argmax(1) == labels).numpy()
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["samples"] == len(data)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(z, labels)), rel=1e-5)
    per_class = {name: right[data.labels == n].mean() for n, name in enumerate(data.classes) if (data.labels == n).any()}
    assert {k: v for k, v in found["per_class"].items() if v is not None} == pytest.approx(per_class)
    assert set(found["per_class"]) == set(data.classes)
    assert found["worst_class_accuracy"] == pytest.approx(min(per_class.values()))
    assert found["worst_class"] == min(per_class, key=lambda name: per_class[name])
    among = (z.topk(5).indices == labels[:, None]).any(1).double().mean()
    assert found["top5_accuracy"] == pytest.approx(float(among))
    assert (found["weights"], found["epoch"], found["ema"]) == ("model.safetensors", 3 if model == TEACHER else 4, None)
    assert found["digest"] == Manifest.load(chain / model).digest
    assert (found["model"], found["content"]) == (model, Manifest.load(chain / "data" / split).content)


def test_the_text_says_the_same(chain: Path, kdprune: Cli) -> None:
    found = json.loads(kdprune("evaluate", TEACHER, "--json", cwd=chain).out)
    text = kdprune("evaluate", TEACHER, cwd=chain).out
    assert f"{TEACHER} on data/test (50 samples): accuracy {found['accuracy']:.2%}, top-5 {found['top5_accuracy']:.2%}, worst" in text
    assert "weights: model.safetensors (after epoch 3)" in text
    assert f"worst class {found['worst_class']} {found['worst_class_accuracy']:.2%}" in text
    for name, share in found["per_class"].items():
        assert f"  {name}  {share:7.2%}" in text


@pytest.mark.parametrize(("classes", "cut"), [(18, False), (23, True)])
def test_rows_are_said_to_be_cut_only_when_they_are(tmp_path: Path, kdprune: Cli, small: Path, classes: int, cut: bool) -> None:
    """25 classes, of which `classes` have samples."""
    for split, n in (("train", 25), ("test", classes)):
        for label in range(n):
            folder = tmp_path / split / f"class-{label:02d}"
            folder.mkdir(parents=True)
            shutil.copy(small, folder / f"{label}.png")
        assert kdprune("import", split, "--split", split, cwd=tmp_path).code == 0
    assert kdprune("teacher", "--model", "resnet8", "--steps", "1", "--name", "t", cwd=tmp_path).code == 0
    ran = kdprune("evaluate", "teachers/t", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "top-5" in ran.out
    assert sum(line.startswith("  class-") for line in ran.out.splitlines()) == min(classes, 20)
    assert (f"(the 20 lowest of {classes}; all with --json)" in ran.out) is cut
    assert ("lowest of" in ran.out) is cut


@pytest.fixture(scope="module")
def small(few_digits: Path) -> Path:
    """One real digit."""
    return next((few_digits / "train" / "0").glob("*.png"))


def test_the_weights_of_an_epoch(chain: Path, kdprune: Cli) -> None:
    """Those kept: the first here is another network than the last."""
    found = {n: json.loads(kdprune("evaluate", TEACHER, *(["--epoch", n] if n else []), "--json", cwd=chain).out) for n in (None, 1, 3)}
    assert [found[n]["weights"] for n in found] == ["model.safetensors", "epoch-001.safetensors", "epoch-003.safetensors"]
    assert found[None]["loss"] == found[3]["loss"] != found[1]["loss"]
    assert "weights: epoch-001.safetensors (after epoch 1)" in kdprune("evaluate", TEACHER, "--epoch", 1, cwd=chain).out


def test_a_subset_is_data(chain: Path, kdprune: Cli) -> None:
    ran = kdprune("evaluate", STUDENT, "--data", "subsets/random-0.5-s0", "--json", cwd=chain)
    assert (ran.code, json.loads(ran.out)["samples"]) == (0, 54)


def test_it_writes_nothing(chain_copy: Path, kdprune: Cli, digests: Callable[[Path], dict[str, str]]) -> None:
    before = digests(chain_copy)
    assert kdprune("evaluate", TEACHER, cwd=chain_copy).code == 0
    assert digests(chain_copy) == before


@pytest.mark.parametrize(
    ("per_class", "worst"), [([0.5, 0.25, 0.75], 1), ([None, 0.5, None], 1), ([0.5, 0.25, 0.25], 1), ([None, 1.0, 0.0], 2)]
)
def test_the_worst_class_is_among_those_that_are_there(per_class: list[float | None], worst: int) -> None:
    assert Evaluation(3, 0.5, 1.0, per_class).worst == worst


def test_samples_without_label_or_image_do_not_count(tmp_path: Path, chain: Path, kdprune: Cli, unlabelled: Path) -> None:
    """A labelled and an unlabelled shard together."""
    (tmp_path / "names.txt").write_text("\n".join("0123456789"))
    adopted = [chain / "data/train/shard-000001.tar", unlabelled]
    assert kdprune("index", *adopted, "--split", "test", "--classes", "names.txt", cwd=tmp_path).code == 0
    ran = kdprune("evaluate", chain / TEACHER, "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    data = Dataset.open(tmp_path / "data/test")
    z = logits_of(chain, TEACHER, data)
    labelled = data.labels >= 0
    assert json.loads(ran.out)["samples"] == labelled.sum() == 40
    assert json.loads(ran.out)["accuracy"] == pytest.approx((z.argmax(1).numpy() == data.labels)[labelled].mean())


def test_nothing_labelled_is_refused(chain: Path, tmp_path: Path, kdprune: Cli, unlabelled: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join("0123456789"))
    assert kdprune("index", unlabelled, "--split", "test", "--classes", "names.txt", cwd=tmp_path).code == 0
    ran = kdprune("evaluate", chain / TEACHER, cwd=tmp_path)
    assert (ran.code, "has no labelled samples: nothing to evaluate on" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["nowhere"], 2, "nowhere does not exist: expected a finished model"),
        (["data/test"], 2, "is of kind dataset: expected model"),
        ([TEACHER, "--data", "nowhere"], 2, "nowhere does not exist: expected a finished dataset or subset"),
        ([TEACHER, "--data", TEACHER], 2, "is of kind model: expected dataset or subset"),
        ([TEACHER, "--epoch", "2"], 2, "--epoch 2 was not kept in teachers/resnet8-s0 (kept: 1, 3): give one of these"),
        ([STUDENT, "--epoch", "1"], 2, "(kept: none)"),
        ([TEACHER, "--batch", "0"], 2, "--batch 0 is too small: at least 1"),
    ],
)
def test_refusals(chain: Path, kdprune: Cli, line: list[str], code: int, said: str) -> None:
    ran = kdprune("evaluate", *line, cwd=chain)
    assert (ran.code, said in ran.err, ran.out) == (code, True, ""), ran.err
