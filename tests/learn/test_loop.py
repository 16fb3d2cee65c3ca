"""learn/loop.py and learn/dynamics.py: schedules, decay, continuing after an interruption, and what is noted before each update."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprune_data.errors import FormatError, KdpruneError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn import inference, loop, models
from kdprune_data.learn.dynamics import Recorder
from kdprune_data.learn.loop import Checkpoint, Hooks, Plan, Recipe, Training
from kdprune_data.learn.stream import Batch, DrawnViews, Feed, Images
from kdprune_data.learn.views import Normalisation, Policy

CPU = torch.device("cpu")
EVEN = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class WithDropout(nn.Module):
    """A network whose training draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def training(chain: Path, recipe: Recipe, model: str = "resnet8") -> Training:
    data = Dataset.open(chain / "data/train")
    feed = Feed(Images(data), DrawnViews(data, Policy("pad-crop", 8, False, 0, pad=1)), recipe.batch, recipe.seed)
    net = models.build(models.resolve(model, classes=10, size=8), seed=recipe.seed) if model != "dropout" else seeded_dropout()
    return Training(net, feed, recipe, normalisation=EVEN, device=CPU)


def seeded_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WithDropout()


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch.labels)


def weights_of(one: Training) -> dict[str, Tensor]:
    return loop.weights(one.model)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the plan


@pytest.mark.parametrize(
    ("recipe", "per_epoch", "expected"),
    [
        (Recipe(epochs=30), 352, (10560, 30)),
        (Recipe(epochs=30, steps=7), 3, (7, 3)),
        (Recipe(epochs=0, steps=1), 100, (1, 1)),
        (Recipe(epochs=1, steps=200), 100, (200, 2)),
    ],
)
def test_plan(recipe: Recipe, per_epoch: int, expected: tuple[int, int]) -> None:
    found = Plan.of(recipe, per_epoch)
    assert (found.steps, found.epochs) == expected


def test_a_plan_without_a_step_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one epoch or step is needed"):
        Plan.of(Recipe(epochs=0), 10)


def test_schedule_by_hand() -> None:
    """4 steps of warm-up, then the cosine over the 8 that are left."""
    recipe = Recipe(epochs=3, lr=0.8)
    plan = Plan.of(recipe, 4)
    cosine = [0.8 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert [plan.lr_at(n, recipe) for n in range(12)] == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine])
    assert plan.lr_at(4, recipe) == 0.8
    assert 0 < plan.lr_at(11, recipe) < 0.04


@pytest.mark.parametrize(
    ("steps", "per_epoch", "warm"),
    [(12, 4, 4), (6, 4, 3), (2, 100, 1), (1, 100, 0), (5, 1, 1)],
)
def test_warm_up_takes_at_most_half(steps: int, per_epoch: int, warm: int) -> None:
    recipe = Recipe(steps=steps, lr=1.0)
    plan = Plan.of(recipe, per_epoch)
    rates = [plan.lr_at(n, recipe) for n in range(steps)]
    assert rates[:warm] == pytest.approx([(n + 1) / warm for n in range(warm)])
    assert rates[warm] == 1.0
    assert rates[warm:] == sorted(rates[warm:], reverse=True)


def test_the_optimizer_follows_the_schedule(chain: Path) -> None:
    one = training(chain, Recipe(epochs=2, batch=16, lr=0.3))
    met: list[float] = []
    one.run(cross_entropy, Hooks(observe=lambda *_: met.append(one._optimizer.param_groups[0]["lr"])))
    assert met == pytest.approx([one.plan.lr_at(n, one.recipe) for n in range(14)])
    assert {g["lr"] for g in one._optimizer.param_groups} == {met[-1]}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_weight_decay_spares_norms_and_biases(norm: str) -> None:
    net = models.build(models.resolve("resnet8", classes=10, size=8, norm=norm), seed=0)
    decayed, spared = (set(map(id, group["params"])) for group in loop._groups(net, 0.25))
    assert [group["weight_decay"] for group in loop._groups(net, 0.25)] == [0.25, 0.0]
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            assert id(parameter) in (decayed if is_weight else spared)
    assert len(decayed) + len(spared) == len(list(net.parameters()))


def test_frozen_parameters_are_left_alone(chain: Path) -> None:
    one = training(chain, Recipe(steps=2, batch=16))
    first = next(one.model.parameters())
    first.requires_grad_(False)
    fresh = Training(one.model, one.feed, one.recipe, normalisation=EVEN, device=CPU)
    before = first.clone()
    fresh.run(cross_entropy, Hooks())
    assert torch.equal(first, before)


# --- one step, by hand


def test_steps_are_those_of_sgd_with_nesterov_momentum(chain: Path) -> None:
    """Three steps of a linear network, with the update rule written out."""
    one = training(chain, Recipe(steps=3, batch=54, lr=0.1, weight_decay=0.01))
    torch.manual_seed(0)
    one.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    net, plan, recipe = one.model, one.plan, one.recipe
    one._optimizer = torch.optim.SGD(loop._groups(net, 0.01), lr=9.0, momentum=0.9, nesterov=True)
    values = {k: v.detach().clone().double() for k, v in net.named_parameters()}
    buffers: dict[str, Tensor] = {}
    batches = [*one.feed.epoch(0), *one.feed.epoch(1)][:3]
    for n, batch in enumerate(batches):
        x = EVEN.apply(batch.images).flatten(1).double()
        p = (x @ values["1.weight"].T + values["1.bias"]).softmax(1) - F.one_hot(batch.labels, 10)
        gradients = {"1.weight": p.T @ x / len(x) + 0.01 * values["1.weight"], "1.bias": p.mean(0)}
        for k, g in gradients.items():
            buffers[k] = 0.9 * buffers[k] + g if k in buffers else g
            values[k] = values[k] - plan.lr_at(n, recipe) * (g + 0.9 * buffers[k])
    one.run(cross_entropy, Hooks())
    for k, v in net.named_parameters():
        assert torch.allclose(v.double(), values[k], atol=1e-5)


# --- exact numbers of steps, and metrics


@pytest.mark.parametrize("steps", [1, 6, 7, 8, 14, 15])
def test_steps_are_exact(chain: Path, steps: int) -> None:
    one = training(chain, Recipe(steps=steps, batch=16), "dropout")
    seen: list[np.ndarray] = []
    ticks: list[int] = []
    one.run(cross_entropy, Hooks(observe=lambda batch, _: seen.append(batch.rows), tick=ticks.append))
    assert len(seen) == steps
    assert one.step == steps
    whole = [rows for epoch in range(3) for rows in one.feed.plan(epoch)][:steps]
    assert all(np.array_equal(a, b) for a, b in zip(seen, whole, strict=True))
    assert sum(ticks) == sum(len(rows) for rows in seen)
    assert one.metrics[-1]["steps"] == steps
    assert one.metrics[-1]["epoch"] == math.ceil(steps / 7)


def test_metrics_are_of_the_epoch(chain: Path) -> None:
    """Mean loss and accuracy over the epoch's samples, each as it was just before its update."""
    one = training(chain, Recipe(epochs=2, batch=40), "dropout")
    noted: list[tuple[float, int, int]] = []

    def observe(batch: Batch, z: Tensor) -> None:
        assert not z.requires_grad
        noted.append((float(F.cross_entropy(z, batch.labels, reduction="sum")), int((z.argmax(1) == batch.labels).sum()), len(z)))

    one.run(cross_entropy, Hooks(observe=observe, validate=lambda: (1.25, 0.5)))
    for n, row in enumerate(one.metrics):
        loss, right, samples = (sum(column) for column in zip(*noted[3 * n : 3 * n + 3], strict=True))
        assert samples == row["samples"] == 108
        assert row["train_loss"] == pytest.approx(loss / samples, abs=2e-6)
        assert row["train_accuracy"] == pytest.approx(right / samples, abs=1e-6)
        assert row["lr"] == pytest.approx(one.plan.lr_at(3 * n + 2, one.recipe), abs=1e-6)
        assert (row["val_loss"], row["val_accuracy"], row["epoch"], row["steps"]) == (1.25, 0.5, n + 1, 3 * n + 3)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_validation_comes_every_so_often_and_at_the_end(chain: Path, every: int, expected: list[int]) -> None:
    one = training(chain, Recipe(epochs=5, batch=54), "dropout")
    epochs: list[int] = []
    one.run(cross_entropy, Hooks(validate=lambda: (0.0, 1.0), validate_every=every, after_epoch=lambda epoch, _: epochs.append(epoch)))
    assert [row["epoch"] for row in one.metrics] == expected
    assert epochs == [1, 2, 3, 4, 5]


def test_validation_does_not_disturb_training(chain: Path) -> None:
    """Neither its eval mode nor its use of torch's generator changes what is learned."""
    plain, disturbed = (training(chain, Recipe(epochs=2, batch=54), "dropout") for _ in range(2))

    def validate() -> tuple[float, float]:
        disturbed.model.eval()
        torch.rand(100)
        return 0.0, 0.0

    plain.run(cross_entropy, Hooks())
    disturbed.run(cross_entropy, Hooks(validate=validate))
    assert equal(weights_of(plain), weights_of(disturbed))


@pytest.mark.parametrize("lr", [1e30, math.inf])
def test_a_loss_that_is_no_number_is_refused(chain: Path, lr: float) -> None:
    one = training(chain, Recipe(epochs=3, batch=16, lr=lr))
    epochs: list[int] = []
    with pytest.raises(KdpruneError, match=r"the loss is not a number any more in epoch 1: lower --lr \(it is (1e\+30|inf)\)"):
        one.run(cross_entropy, Hooks(after_epoch=lambda epoch, _: epochs.append(epoch)))
    assert epochs == []


def test_weights_that_the_last_update_broke_are_refused(chain: Path) -> None:
    """The loss, taken before each update, does not know of it."""
    one = training(chain, Recipe(steps=1, batch=16, lr=1e38), "dropout")
    with pytest.raises(KdpruneError, match="the loss is not a number any more in epoch 1"):
        one.run(lambda z, batch: cross_entropy(z, batch) * 1e3, Hooks())


# --- interruption


@pytest.mark.parametrize("model", ["resnet8", "dropout"])
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("steps", [None, 17])
def test_an_interrupted_training_ends_with_the_same_weights(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, stop: int, steps: int | None
) -> None:
    """Stopped in the hook after an epoch, or in the middle of one; continued by another object, in another place of torch's generator."""
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)  # after every epoch, however short
    recipe = Recipe(epochs=4, steps=steps, batch=27 if steps is None else 16, lr=0.05)
    whole = training(chain, recipe, model)
    whole.run(cross_entropy, Hooks(validate=lambda: (0.0, 0.0)))

    def stop_here(epoch: int, _: Mapping[str, Any]) -> None:
        if epoch == stop:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    first = training(chain, recipe, model)
    with pytest.raises(KeyboardInterrupt):
        first.run(cross_entropy, Hooks(validate=lambda: (0.0, 0.0), after_epoch=stop_here), checkpoint)
    assert len(list(checkpoint.folder.glob("*"))) == (2 if stop > 1 else 0)
    torch.rand(17)
    second = training(chain, recipe, model)
    epochs: list[int] = []
    hooks = Hooks(validate=lambda: (0.0, 0.0), after_epoch=lambda epoch, _: epochs.append(epoch))
    second.run(cross_entropy, hooks, checkpoint)
    assert epochs == list(range(stop, whole.plan.epochs + 1))
    assert second.metrics == whole.metrics
    assert equal(second.state(), whole.state())


def test_stopping_again_and_again(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    recipe = Recipe(epochs=4, batch=27, lr=0.05)
    whole = training(chain, recipe, "dropout")
    whole.run(cross_entropy, Hooks())
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    seen = 0
    for _ in range(20):
        one = training(chain, recipe, "dropout")
        left = 6  # batches until the next stop: an epoch has 4

        def observe(*_: object) -> None:
            nonlocal left, seen
            seen += 1
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        try:
            one.run(cross_entropy, Hooks(observe=observe), checkpoint)
            break
        except KeyboardInterrupt:
            continue
    assert seen > 16
    assert equal(one.state(), whole.state())


def test_a_finished_checkpoint_has_nothing_left_to_do(chain: Path, tmp_path: Path) -> None:
    one = training(chain, Recipe(epochs=1, batch=54), "dropout")
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    one.run(cross_entropy, Hooks(), checkpoint)
    checkpoint.save(one)
    again = training(chain, Recipe(epochs=1, batch=54), "dropout")
    again.run(lambda *_: pytest.fail("it trained"), Hooks(), checkpoint)
    assert equal(again.state(), one.state())


def test_a_checkpoint_names_its_newest_file_and_keeps_no_other(chain: Path, tmp_path: Path) -> None:
    one = training(chain, Recipe(epochs=3, batch=54), "dropout")
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    for epoch in (1, 2):
        one.epoch = epoch
        checkpoint.save(one)
    assert sorted(p.name for p in checkpoint.folder.iterdir()) == ["state-000002.safetensors", "state.json"]
    assert json.loads((checkpoint.folder / "state.json").read_text())["file"] == "state-000002.safetensors"


@pytest.mark.parametrize("spoil", ["no file", "truncated", "not json", "other keys"])
def test_a_broken_checkpoint_says_how_to_go_on(chain: Path, tmp_path: Path, spoil: str) -> None:
    one = training(chain, Recipe(epochs=2, batch=54), "dropout")
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    one.epoch = 1
    checkpoint.save(one)
    state, note = checkpoint.folder / "state-000001.safetensors", checkpoint.folder / "state.json"
    if spoil == "no file":
        state.unlink()
    elif spoil == "truncated":
        state.write_bytes(state.read_bytes()[:100])
    else:
        note.write_text("{" if spoil == "not json" else "{}")
    with pytest.raises(FormatError, match=r"state\.json cannot be read \(\w+\): start again with --overwrite"):
        checkpoint.load(training(chain, Recipe(epochs=2, batch=54), "dropout"))


# --- dynamics


def batch_of(rows: list[int], labels: list[int]) -> Batch:
    return Batch(np.array(rows), torch.zeros(len(rows), 3, 1, 1, dtype=torch.uint8), torch.tensor(labels), None)


def test_the_recorder_notes_what_the_network_said() -> None:
    """Against plain Python, rows in any order."""
    rows, labels = [4, 0, 3, 1], [2, 0, 1, 1]
    z = [[1.0, 2.0, 3.0], [0.5, -1.0, 0.5], [9.0, -40.0, 2.0], [0.0, 0.0, 0.0]]
    recorder = Recorder(5)
    recorder.observe(batch_of(rows[:2], labels[:2]), torch.tensor(z[:2]))
    recorder.observe(batch_of(rows[2:], labels[2:]), torch.tensor(z[2:]))
    found = recorder.take(np.array(rows))
    for n, (row, y) in enumerate(zip(z, labels, strict=True)):
        p = math.exp(row[y]) / sum(math.exp(v) for v in row)
        assert found["p_true"][n] == pytest.approx(p, rel=1e-5)
        assert found["loss"][n] == pytest.approx(-math.log(p), rel=1e-5)
        assert found["logit_margin"][n] == pytest.approx(row[y] - max(v for k, v in enumerate(row) if k != y))
        assert found["correct"][n] == (row.index(max(row)) == y)  # of equal logits the first counts
    assert found["correct"].dtype == bool
    assert {found[k].dtype for k in ("p_true", "loss", "logit_margin")} == {np.dtype(np.float32)}


def test_the_recorder_shows_what_was_not_seen() -> None:
    recorder = Recorder(3)
    recorder.observe(batch_of([0, 1, 2], [0, 0, 0]), torch.zeros(3, 2))
    recorder.take(np.arange(3))
    recorder.observe(batch_of([1], [1]), torch.zeros(1, 2))
    found = recorder.take(np.arange(3))
    assert np.isnan(found["loss"]).tolist() == [True, False, True]


def test_the_recorder_takes_one_class() -> None:
    recorder = Recorder(1)
    recorder.observe(batch_of([0], [0]), torch.tensor([[3.0]]))
    found = recorder.take(np.arange(1))
    assert [found[k].item() for k in ("p_true", "loss", "logit_margin", "correct")] == [1, 0, 3, True]


# --- devices


def test_cuda_is_made_exact() -> None:
    """Full float32, and the same kernels every time; the flags can be set where there is no GPU."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = True, True, True, False
    inference._make_exact()
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, False, False, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_choosing_cuda_makes_it_exact(name: str) -> None:
    assert inference.choose_device(name).type == "cuda"
    assert not torch.backends.cudnn.allow_tf32
