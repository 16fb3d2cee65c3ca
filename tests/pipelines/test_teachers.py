"""Any network as the teacher: adopted with its own input size and normalisation, alone or with others, and the user's own when named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kdprune_pipelines import _recheck, _suspects
from kdprune_pipelines._models import Saved, open_model
from kdprune_pipelines._witness import Limits, Witness, chosen, shifted
from numpy.typing import NDArray

from kdprune_data.formats import table
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.learn import models, views
from kdprune_data.learn.inference import Predictor, together
from kdprune_data.learn.stream import Images
from kdprune_data.learn.views import Geometry

Cli = Callable[..., Any]
SUBSET, TEACHER = Path("subsets/random-0.5-s0"), Path("teachers/resnet8-s0")
STUDENT = ["distill", SUBSET, "--model", "resnet8", "--steps", 2, "--batch", 16]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OWN_INPUTS = ["--mean", *MEAN, "--std", *STD]
OWN = """
from pathlib import Path
from torch import nn


def net(classes):
    Path("it-ran").touch()
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))


def other(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
"""


def do(kdprune: Cli, *line: object, cwd: Path) -> Any:
    ran = kdprune(*line, cwd=cwd)
    assert ran.code == 0, ran.err
    return ran


def view(workspace: Path, name: str, number: int = 0) -> Any:
    data = Dataset.open(workspace / SUBSET)
    return LogitCache.open(workspace / "logits" / name).join(data).read(np.arange(len(data)), number)


def said(workspace: Path, teacher: Path, boxes: Geometry, code: str | None = None) -> NDArray[np.float64]:
    """What a teacher says of some boxes of the subset, shown to it by hand: z of shape (n, c)."""
    saved, data = open_model(workspace / teacher), Dataset.open(workspace / SUBSET)
    pixels = views.render(Images(data).get(np.arange(len(data))), boxes, saved.architecture.size)
    own = saved.manifest.config["normalisation"]
    mean, std = (torch.tensor(own[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        found: NDArray[np.float64] = saved.load(code=code).eval()((pixels.float() / 255 - mean) / std).double().numpy()
    return found


@pytest.fixture
def mine(chain_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace with functions of the user's own, none of them imported yet."""
    monkeypatch.setattr("sys.modules", dict(__import__("sys").modules))
    monkeypatch.chdir(chain_copy)
    (chain_copy / "teachers_mine.py").write_text(OWN)
    return chain_copy


# --- one


@pytest.mark.parametrize(
    ("model", "size"), [("squeezenet1_1", 32), ("mobilenet_v3_small", 32), ("resnet14", 8), ("timm/vit_tiny_patch16_224", 32)]
)
def test_an_adopted_network_does_all_that_a_teacher_does(chain_copy: Path, kdprune: Cli, model: str, size: int) -> None:
    if model.startswith("timm/"):
        pytest.importorskip("timm", reason="needs timm: pip install 'kdprune-data[timm]'")
    net = models.build(models.resolve(model, classes=10, size=size), seed=1)
    # Fresh, some say the same of everything and would agree with anybody: norms that fit their inputs, and a last layer that is not 0.
    torch.manual_seed(0)
    torch.nn.init.normal_(models.head(net).weight)
    for _ in range(30):
        net(torch.rand(8, 3, size, size))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, chain_copy / "given.pth.tar")
    adopt = ["teacher", "--model", model, "--weights", "given.pth.tar", "--epochs", 0, "--size", size, "--name", "it"]
    do(kdprune, *adopt, *OWN_INPUTS, cwd=chain_copy)
    for name, how in (("plain", ["--dtype", "float32"]), ("coded", ["--fidelity", "1e-2"])):
        do(kdprune, "cache", SUBSET, "--teacher", "teachers/it", "--views", 2, "--name", name, *how, cwd=chain_copy)
        do(kdprune, "verify", f"logits/{name}", "--teacher", "teachers/it", "--sample", 20, cwd=chain_copy)
        ran = do(kdprune, *STUDENT, "--logits", f"logits/{name}", "--check-labels", 4, "--name", name, cwd=chain_copy)
        assert "4 soft labels asked of teachers/it again" in ran.err
    do(kdprune, *STUDENT, "--live", "teachers/it", "--logits", "none", "--name", "live", cwd=chain_copy)
    do(kdprune, "evaluate", "teachers/it", cwd=chain_copy)
    found = view(chain_copy, "plain")
    assert found.logits.std() > 0.01
    assert found.logits == pytest.approx(shifted(said(chain_copy, Path("teachers/it"), Geometry(*found[:5]))), abs=1e-4)


def test_the_normalisation_travels_with_the_teacher(chain_copy: Path, kdprune: Cli) -> None:
    """Into its cache's files, what is cached, and what is told of it; where none was given, that of the data, and it is said."""
    given = chain_copy / TEACHER / "model.safetensors"
    adopt = ["teacher", "--model", "resnet8", "--weights", given, "--epochs", 0]
    ran = do(kdprune, *adopt, "--name", "asdata", cwd=chain_copy)
    assert "inputs are normalised as the data are: give the weights' own, if others (now --mean 0." in ran.err
    ran = do(kdprune, *adopt, "--name", "own", *OWN_INPUTS, cwd=chain_copy)
    assert "inputs are normalised" not in ran.err
    logits = {}
    for name in ("asdata", "own"):
        do(kdprune, "cache", SUBSET, "--teacher", f"teachers/{name}", "--views", 1, "--name", name, "--dtype", "float32", cwd=chain_copy)
        logits[name] = view(chain_copy, name)
        z = said(chain_copy, Path("teachers") / name, Geometry(*logits[name][:5]))
        assert logits[name].logits == pytest.approx(shifted(z), abs=1e-4)
    assert np.abs(logits["own"].logits - logits["asdata"].logits).max() > 0.1
    (part,) = (chain_copy / "logits/own").glob("views-*/shard-000000.arrow")
    metadata = table.ipc_open(part).schema.metadata
    assert json.loads(metadata[b"normalisation"]) == {"mean": list(MEAN), "std": list(STD)}
    told = do(kdprune, "info", "logits/own", cwd=chain_copy).out
    assert "inputs    of own: 8 pixels, less mean 0.4 0.5 0.6, by deviation 0.2 0.25 0.3" in told


def test_one_set_of_a_checkpoint_is_another_teacher(chain_copy: Path, kdprune: Cli) -> None:
    nets = [models.build(models.resolve("resnet8", classes=10, size=8), seed=seed) for seed in (1, 2)]
    torch.save({"model": nets[0].state_dict(), "model_ema": nets[1].state_dict()}, chain_copy / "two.pth")
    adopt = ["teacher", "--model", "resnet8", "--weights", "two.pth", "--epochs", 0, "--name", "it", *OWN_INPUTS]
    ran = kdprune(*adopt, cwd=chain_copy)
    assert (ran.code, "holds 2 sets of weights ('model', 'model_ema'): choose with --weights-key" in ran.err) == (1, True)
    do(kdprune, *adopt, "--weights-key", "model_ema", cwd=chain_copy)
    saved = open_model(chain_copy / "teachers/it")
    assert saved.manifest.config["weights_key"] == "model_ema"
    assert torch.equal(saved.load(code=None).state_dict()["conv1.weight"], nets[1].state_dict()["conv1.weight"])
    ran = kdprune(*adopt, "--weights-key", "model", cwd=chain_copy)
    assert (ran.code, "weights_key is model_ema, now model" in ran.err) == (2, True), ran.err


# --- several


@pytest.fixture
def several(mine: Path, kdprune: Cli) -> Path:
    """The workspace with teachers `own` and `other` of the user's, and `half`, trained on other data: each of another normalisation."""
    train = ["teacher", "--steps", 3, "--batch", 16, "--lr", 0.02]
    do(kdprune, *train, "--model", "teachers_mine:net", "--name", "own", *OWN_INPUTS, cwd=mine)
    do(kdprune, *train, "--model", "teachers_mine:other", "--name", "other", "--mean", *[0.5] * 3, "--std", *[0.5] * 3, cwd=mine)
    do(kdprune, *train, "--model", "resnet8", "--data", SUBSET, "--name", "half", cwd=mine)
    (mine / "it-ran").unlink()
    return mine


MEMBERS = ["--teacher", TEACHER, "--ensemble", "teachers/own", "--ensemble", "teachers/other", "--ensemble", "teachers/half"]
CODE = ["--code", "teachers_mine:net", "--code", "teachers_mine:other"]
CACHE = ["cache", SUBSET, *MEMBERS, "--temperature", 3, "--views", 2, "--dtype", "float32", "--name", "all"]


def softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def test_teachers_of_every_kind_together(several: Path, kdprune: Cli) -> None:
    """The mean of the probabilities, each network shown the view in its own normalisation; asked again by verify and by distill."""
    for code in ([], CODE[:2]):
        ran = kdprune(*CACHE, *code, cwd=several)
        assert (ran.code, "to let it run" in ran.err, (several / "logits/all").exists()) == (2, True, False), ran.err
    do(kdprune, *CACHE, *CODE, cwd=several)
    found = view(several, "all", 1)
    names = {"resnet8-s0": None, "own": "teachers_mine:net", "other": "teachers_mine:other", "half": None}
    each = [softmax(said(several, Path("teachers") / name, Geometry(*found[:5]), code) / 3) for name, code in names.items()]
    assert softmax(found.logits.astype(np.float64) / 3) == pytest.approx(np.mean(each, 0), abs=1e-6)

    turned = ["--teacher", "teachers/half", *MEMBERS[2:-1], TEACHER]
    for members in (MEMBERS, turned):
        ran = do(kdprune, "verify", "logits/all", *members, *CODE, cwd=several)
        assert "108 soft labels asked of teachers/" in ran.out
    student = [*STUDENT, "--logits", "logits/all", "--temperature", 3, "--name"]
    ran = do(kdprune, *student, "asked", *CODE, cwd=several)
    assert "asked of teachers/resnet8-s0, teachers/own, teachers/other and teachers/half again" in ran.err
    told = do(kdprune, "info", "logits/all", cwd=several).out
    assert "holds     at temperature 3 alone" in told
    assert "            of own: 8 pixels, less mean 0.4 0.5 0.6" in told


def test_functions_of_an_ensemble_run_only_when_named(several: Path, kdprune: Cli) -> None:
    """By verify; at the start of distill nothing is said where one is not named, or a teacher is not there; by a recipe."""
    do(kdprune, *CACHE, *CODE, cwd=several)
    (several / "it-ran").unlink()
    ran = kdprune("verify", "logits/all", *MEMBERS, *CODE[2:], cwd=several)
    assert (ran.code, "name it with --code teachers_mine:net to let it run" in ran.err) == (2, True)
    student = [*STUDENT, "--logits", "logits/all", "--temperature", 3, "--name"]
    assert "asked of" not in do(kdprune, *student, "unnamed", *CODE[2:], cwd=several).err
    ensemble = [str(one) for one in MEMBERS if one != "--ensemble"][2:]
    text = f"ensemble = {json.dumps(ensemble)}\ntemperature = 3\nviews = 1\n"
    (several / "r.toml").write_text(f'[cache]\nsubset = "{SUBSET}"\nteacher = "{TEACHER}"\nname = "r"\n{text}')
    ran = kdprune("run", "r.toml", *CODE[2:], cwd=several)
    assert (ran.code, "name it with --code teachers_mine:net to let it run" in ran.err) == (2, True), ran.err
    (several / "kdprune.toml").write_text(f"[cache]\ncode = {json.dumps(CODE[1::2])}\n")
    ran = kdprune(*CACHE, "--name", "more", cwd=several)
    assert (ran.code, "functions are run only when named with --code" in ran.err) == (2, True), ran.err
    (several / "kdprune.toml").unlink()
    assert not (several / "it-ran").exists()
    do(kdprune, "run", "r.toml", *CODE, cwd=several)
    assert (several / "it-ran").exists()
    (several / "teachers/half").rename(several / "half")
    assert "asked of" not in do(kdprune, *student, "without", *CODE, cwd=several).err


@pytest.fixture
def pair(chain_copy: Path, kdprune: Cli) -> Path:
    """The workspace with a second teacher, of another normalisation, and a cache of the two at temperature 4."""
    do(kdprune, "teacher", "--model", "resnet8", "--epochs", 3, "--batch", 16, "--seed", 1, *OWN_INPUTS, "--name", "b", cwd=chain_copy)
    line = ["cache", SUBSET, "--teacher", TEACHER, "--ensemble", "teachers/b", "--temperature", 4, "--views", 2, "--name", "ab"]
    do(kdprune, *line, cwd=chain_copy)
    return chain_copy


@pytest.mark.parametrize(
    ("members", "code", "said"),
    [
        ([TEACHER], 1, "logits/ab holds what teachers resnet8-s0 ("),
        ([TEACHER], 1, ") too, with --ensemble DIR"),
        ([TEACHER, "teachers/c"], 1, "), not of teachers/c ("),
        ([TEACHER, "teachers/b", "teachers/c"], 1, "), not of teachers/c ("),
        ([TEACHER, SUBSET], 2, "is of kind subset: expected model"),
        ([], 2, "--ensemble is for asking a teacher, and none is given"),
    ],
)
def test_who_is_not_asked(pair: Path, kdprune: Cli, members: list[Path], code: int, said: str) -> None:
    do(kdprune, "teacher", "--model", "resnet8", "--steps", 1, "--batch", 16, "--name", "c", cwd=pair)
    given = [flag for n, one in enumerate(members) for flag in ("--ensemble" if n else "--teacher", one)]
    ran = kdprune("verify", "logits/ab", *(given or ["--ensemble", "teachers/b"]), cwd=pair)
    assert (ran.code, said in ran.err) == (code, True), ran.err


def test_the_teachers_of_a_cache_are_found(pair: Path, kdprune: Cli) -> None:
    ran = do(kdprune, "verify", "logits/ab", cwd=pair)
    assert "its teachers were not asked: --teacher DIR and --ensemble DIR ask them again" in ran.out
    ran = do(kdprune, *STUDENT, "--logits", "logits/ab", "--name", "asked", cwd=pair)
    assert f"32 soft labels asked of {TEACHER} and teachers/b again: largest difference 0.0" in ran.err
    (pair / "teachers/b").rename(pair / "b")
    assert "asked of" not in do(kdprune, *STUDENT, "--logits", "logits/ab", "--name", "unasked", cwd=pair).err


MISTAKES: dict[str, tuple[str, Callable[[Witness, Any, list[torch.Tensor]], NDArray[np.float64]]]] = {
    "alone": ("they are those of teachers/b alone", lambda _, __, each: shifted(each[1].numpy())),
    "logits": ("the mean of the teachers' logits, not of their probabilities", lambda _, __, each: shifted(sum(each).numpy() / 2)),
    "temperature": ("probabilities at temperature 1, not 4", lambda _, __, each: shifted(together(each, 1.0).numpy())),
    "scale": ("they are divided by 4, as by a temperature", lambda _, __, each: shifted(together(each, 4.0).numpy() / 4)),
    "one normalisation": (
        f"another normalisation of the teacher's inputs: that of {TEACHER} for all",
        lambda witness, pairs, _: witness.says(
            pairs.rows, pairs.boxes, normalise=lambda __, pixels: witness.saved[0].normalisation.apply(pixels)
        ),
    ),
    "an epoch": (
        "those that teachers/b had after epoch 1",
        lambda witness, pairs, _: replace(
            witness, predictors=[witness.predictors[0], replace(witness.predictors[1], net=witness.saved[1].load(code=None, epoch=1))]
        ).says(pairs.rows, pairs.boxes),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_cause_is_named(pair: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair)
    data, cache = Dataset.open(SUBSET), LogitCache.open("logits/ab")
    saved: list[Saved] = [open_model(folder) for folder in (TEACHER, Path("teachers/b"))]
    predictors = [Predictor(one.load(code=None), one.normalisation, 8, torch.device("cpu")) for one in saved]
    witness = Witness(cache.join(data), Images(data), saved, predictors, 4.0)
    assert _recheck.recheck(witness, views=2, sample=108, seed=0).fault is None
    pairs = witness.read(*chosen(data, 2, 32, 0))
    text, made = MISTAKES[name]
    wrong = replace(pairs, stored=made(witness, pairs, witness.each(pairs.rows, pairs.boxes)))
    assert _suspects.cause(witness, wrong, witness.says(pairs.rows, pairs.boxes), Limits()).endswith(text)


@pytest.mark.parametrize("other", [TEACHER, "teachers/renamed"])
def test_one_teacher_does_not_count_twice(chain_copy: Path, kdprune: Cli, other: Path) -> None:
    if other != TEACHER:
        (chain_copy / other).symlink_to(chain_copy / TEACHER)
    ran = kdprune("cache", SUBSET, "--teacher", TEACHER, "--ensemble", other, "--temperature", 4, "--name", "x", cwd=chain_copy)
    assert (ran.code, f"{other} and {TEACHER} are one teacher (" in ran.err, "leave one out" in ran.err) == (1, True, True)


def test_classes_in_another_order_are_refused(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "names.txt").write_text("\n".join("0123465789"))
    for split in ("train", "val"):
        do(kdprune, "index", f"data/{split}", "--out", f"turned/{split}", "--classes", "names.txt", cwd=chain_copy)
    data = ["--data", "turned/train", "--val", "turned/val"]
    do(kdprune, "teacher", *data, "--model", "resnet8", "--steps", 1, "--batch", 16, "--name", "turned", cwd=chain_copy)
    line = ["--ensemble", "teachers/turned", "--temperature", 4, "--name", "x"]
    ran = kdprune("cache", SUBSET, "--teacher", TEACHER, *line, cwd=chain_copy)
    said = f"{SUBSET} has the classes of teachers/turned in another order (class 5 is '5', there '6')"
    assert (ran.code, said in ran.err) == (1, True), ran.err
