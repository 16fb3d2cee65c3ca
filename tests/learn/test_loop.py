"""learn/loop.py, learn/recipe.py and learn/dynamics.py: schedules, decay, averages, divergence, and what is noted before each update."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprune_data.errors import KdpruneError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn import inference, loop, models
from kdprune_data.learn.average import Average
from kdprune_data.learn.dynamics import Recorder
from kdprune_data.learn.live import Teacher
from kdprune_data.learn.loop import Hooks, Plan, Recipe, Training
from kdprune_data.learn.memory import arriving
from kdprune_data.learn.stream import Batch, DrawnViews, Feed, Images
from kdprune_data.learn.views import Normalisation, Policy
from kdprune_data.learn.weights import weights

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
    return weights(one.model)


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


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("unlabelled", [0, 50, 108])
def test_accuracy_is_among_the_samples_with_a_label(chain: Path, steps: int, unlabelled: int) -> None:
    """In whole epochs and in one that --steps cuts short; null where no sample shown has one."""
    one = training(chain, Recipe(steps=steps, batch=40), "dropout")
    data = one.feed.images.data
    vars(data)["labels"] = np.where(np.arange(108) < unlabelled, -1, data.labels)
    shares: list[float] = []
    right = labelled = 0

    def observe(batch: Batch, z: Tensor) -> None:
        nonlocal right, labelled
        right, labelled = right + int((z.argmax(1) == batch.labels).sum()), labelled + int((batch.labels >= 0).sum())

    def after_epoch(*_: object) -> None:
        nonlocal right, labelled
        shares.append(right / labelled if labelled else -1.0)
        right = labelled = 0

    one.run(lambda z, _: z.square().mean(), Hooks(observe=observe, after_epoch=after_epoch))
    found = [-1.0 if row["train_accuracy"] is None else row["train_accuracy"] for row in one.metrics]
    assert found == pytest.approx(shares, abs=1e-6)
    assert (found == [-1.0] * len(found)) == (unlabelled == 108)


@pytest.mark.parametrize(
    ("validated", "noted", "rows", "values"),
    [
        ({2, 4}, {2, 4}, [2, 4, 5], [2, 4, 5]),
        ({3}, None, [1, 2, 3, 4, 5], [3, 5]),
        (None, set(), [5], [5]),
        (set(), None, [1, 2, 3, 4, 5], [5]),
        (None, None, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_validation_comes_when_asked_and_at_the_end(
    chain: Path, validated: set[int] | None, noted: set[int] | None, rows: list[int], values: list[int]
) -> None:
    one = training(chain, Recipe(epochs=5, batch=54), "dropout")
    epochs: list[int] = []
    hooks = Hooks(validate=lambda: (0.0, 1.0), validated=validated, noted=noted, after_epoch=lambda epoch, _: epochs.append(epoch))
    one.run(cross_entropy, hooks)
    assert [row["epoch"] for row in one.metrics] == rows
    assert [row["epoch"] for row in one.metrics if row["val_loss"] is not None] == values
    assert epochs == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("epochs", "steps", "samples", "val", "most", "expected"),
    [
        (4, None, 100, 10, 30, [1, 2, 3, 4]),  # 400 samples trained on allow 40 validations of 10
        (4, None, 100, 200, 30, [2, 4]),
        (4, None, 100, 150, 30, [2, 4]),
        (5, None, 100, 150, 30, [2, 4, 5]),
        (4, None, 100, 401, 30, [4]),
        (90, None, 100, 1, 30, [*range(3, 91, 3)]),
        (31, None, 100, 1, 30, [math.ceil(n * 31 / 30) for n in range(1, 31)]),
        (31, None, 100, 1, None, [*range(1, 32)]),
        (31, None, 100, None, 30, [math.ceil(n * 31 / 30) for n in range(1, 31)]),
        (31, None, 100, 1550, None, [16, 31]),
        (0, 15, 100, 75, None, [1, 2]),  # a step and a half of ten: 150 samples
    ],
)
def test_no_more_is_validated_than_trained(
    epochs: int, steps: int | None, samples: int, val: int | None, most: int | None, expected: list[int]
) -> None:
    plan = Plan.of(Recipe(epochs=epochs, steps=steps), 10)
    found = plan.validated(samples, val, most=most)
    assert sorted(found) == expected
    assert max(found) == plan.epochs


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


# --- the parts of a recipe


@pytest.mark.parametrize(("schedule", "expected"), [("linear", [1, 0.75, 0.5, 0.25]), ("constant", [1, 1, 1, 1])])
def test_other_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    recipe = Recipe(epochs=2, lr=0.4, schedule=schedule)
    plan = Plan.of(recipe, 4)
    assert [plan.lr_at(n, recipe) / 0.4 for n in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, *expected])


@pytest.mark.parametrize("warmup", [0, 2])
def test_warm_up_is_as_long_as_asked(warmup: int) -> None:
    recipe = Recipe(epochs=10, lr=1.0, warmup_epochs=warmup)
    plan = Plan.of(recipe, 5)
    assert next(n for n in range(50) if plan.lr_at(n, recipe) == 1.0) == max(0, 5 * warmup - 1)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        Plan.of(Recipe(schedule="cosin"), 5)


def test_gradients_are_clipped_by_their_common_norm(chain: Path) -> None:
    """One step of plain SGD from the same weights: the update is that of the clipped gradient."""
    moved = {}
    for clip in (None, 0.01, 1e6):
        one = training(chain, Recipe(steps=1, batch=54, lr=1.0, momentum=0.0, weight_decay=0.0, clip=clip))
        before = {k: v.detach().clone() for k, v in one.model.named_parameters()}
        one.run(cross_entropy, Hooks())
        moved[clip] = {k: before[k] - v.detach() for k, v in one.model.named_parameters()}
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in moved[None].values()))
    clipped = math.sqrt(sum(float(v.double().square().sum()) for v in moved[0.01].values()))
    assert norm > 0.01
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert all(torch.allclose(moved[0.01][k], v * (0.01 / norm), atol=1e-6) for k, v in moved[None].items())
    assert all(torch.equal(moved[1e6][k], v) for k, v in moved[None].items())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_momentum_is_what_was_asked(chain: Path, momentum: float) -> None:
    one = training(chain, Recipe(steps=2, batch=54, momentum=momentum))
    one.run(cross_entropy, Hooks())
    assert {g["momentum"] for g in one._optimizer.param_groups} == {momentum}
    assert any(k.startswith("momentum/") for k in one.state()) == (momentum > 0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_of_weights_and_buffers(chain: Path, decay: float) -> None:
    """Against the recursion, which begins with the weights after the first step."""
    one = training(chain, Recipe(steps=6, batch=54, lr=0.05, ema=decay))
    expected: dict[str, Tensor] = {}
    for _ in one.steps(cross_entropy, Hooks()):
        now = {k: v.detach().double().clone() for k, v in one.model.state_dict().items() if v.is_floating_point()}
        expected = {k: decay * expected[k] + (1 - decay) * v if expected else v for k, v in now.items()}
    found = weights(one.learned)
    assert any("running_var" in k for k in expected)
    assert all(torch.allclose(found[k].double(), v, atol=1e-5) for k, v in expected.items())
    assert equal(found, weights(one.model)) == (decay == 0)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_an_average_follows_as_torch_updates_it(decay: float) -> None:
    """Bit for bit, over steps: weights, norm statistics, and what counts batches."""
    net = models.build(models.resolve("resnet8", classes=10, size=8), seed=0).train()
    ours, theirs = Average(net, decay), Average(net, decay)
    for step in range(3):
        net(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)))
        with torch.no_grad():
            net.linear.weight += 0.1
        ours.follow(net)
        theirs.update_parameters(net)
        assert equal(ours.state_dict(), theirs.state_dict())
    assert int(ours.n_averaged) == 3


def test_without_an_average_the_network_itself_is_learned(chain: Path) -> None:
    one = training(chain, Recipe(steps=1, batch=54))
    assert one.learned is one.model


@pytest.mark.long
def test_a_compiled_network_learns_the_same(chain: Path) -> None:
    """Within rounding, and under the same names."""
    plain, compiled = (training(chain, Recipe(epochs=2, batch=50, lr=0.01, compile=asked)) for asked in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler has things to say about itself
        for one in (plain, compiled):
            one.run(cross_entropy, Hooks())
    a, b = weights(plain.learned), weights(compiled.learned)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k].double(), b[k].double(), atol=1e-3) for k in a)


# --- divergence


@pytest.mark.parametrize("lr", [1e6, 1e30, math.inf])
def test_a_loss_that_is_no_number_is_refused(chain: Path, lr: float) -> None:
    one = training(chain, Recipe(epochs=3, batch=16, lr=lr))
    epochs: list[int] = []
    with pytest.raises(
        KdpruneError, match=r"training has diverged: after step \d+ \(epoch [123], learning rate .*lower --lr \(it is (1e\+06|1e\+30|inf)"
    ):
        one.run(cross_entropy, Hooks(after_epoch=lambda epoch, _: epochs.append(epoch)))
    assert one.diverged
    assert len(epochs) < 3


def test_weights_that_the_last_update_broke_are_refused(chain: Path) -> None:
    """The loss, taken before each update, does not know of it."""
    one = training(chain, Recipe(steps=1, batch=16, lr=1e38), "dropout")
    with pytest.raises(KdpruneError, match="training has diverged: after step 1 "):
        one.run(lambda z, batch: cross_entropy(z, batch) * 1e3, Hooks())


@pytest.mark.parametrize("broken", [1, 30, 50, 51, 99])
def test_it_is_seen_within_fifty_steps(chain: Path, broken: int) -> None:
    """And not only when the epoch is over, which has 108 here."""
    one = training(chain, Recipe(epochs=1, batch=1), "dropout")
    done = 0

    def loss_of(z: Tensor, batch: Batch) -> Tensor:
        nonlocal done
        done += 1
        return cross_entropy(z, batch) * (math.nan if done == broken else 1.0)

    with pytest.raises(KdpruneError, match=f"after step {math.ceil(broken / 50) * 50} "):
        one.run(loss_of, Hooks())


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


def test_the_recorder_goes_on_from_a_state() -> None:
    whole, first, second = (Recorder(4) for _ in range(3))
    halves = [
        (batch_of([2, 0], [1, 0]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])),
        (batch_of([1, 3], [0, 1]), torch.tensor([[0.5, 1.0], [3.0, 1.0]])),
    ]
    for half in halves:
        whole.observe(*half)
    first.observe(*halves[0])
    second.restore({k: v.clone() for k, v in first.state().items()})
    second.observe(*halves[1])
    a, b = (one.take(np.arange(4)) for one in (whole, second))
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_the_recorder_keeps_whole_logits() -> None:
    """Less the largest of each row, clipped at what float16 holds; the rows asked for, in that order; gone on from a state too."""
    z = [[1.5, 0.0, 3.0], [-2.0, -2.0, -2.0], [7e4, 0.0, -7e4], [0.0, 1e-3, -65504.0]]
    expected = [[-1.5, -3.0, 0.0], [0.0, 0.0, 0.0], [0.0, -65504.0, -65504.0], [-1e-3, 0.0, -65504.0]]
    first, second = Recorder(6, classes=3), Recorder(6, classes=3)
    first.observe(batch_of([4, 0], [2, 0]), torch.tensor(z[:2]))
    second.restore({k: v.clone() for k, v in first.state().items()})
    second.observe(batch_of([5, 2], [0, 1]), torch.tensor(z[2:]))
    found = second.logits(np.array([2, 4, 5, 0]))
    assert (found.dtype, found.shape) == (np.float16, (4, 3))
    assert found.tolist() == np.array([expected[n] for n in (3, 0, 2, 1)], np.float16).tolist()
    assert np.isfinite(found).all()
    assert "logits" not in Recorder(6).state()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_step_on_cuda_waits_for_nothing(chain: Path) -> None:
    """Of torch's operations none that waits for the device, recorder, average, clipping and a live teacher included."""
    device = torch.device("cuda")
    data = Dataset.open(chain / "data/train")
    feed = Feed(Images(data), DrawnViews(data, Policy("pad-crop", 8, False, 0, pad=1)), 20, 0)
    nets = [models.build(models.resolve("resnet8", classes=10, size=8), seed=seed) for seed in (0, 1)]
    teacher = Teacher(inference.Predictor(nets[1], EVEN, 8, device))
    one = Training(nets[0], feed, Recipe(epochs=1, ema=0.9, clip=1.0), normalisation=EVEN, device=device, teacher=teacher)
    steps = one.steps(cross_entropy, Hooks(observe=Recorder(len(data), device).observe))
    next(steps)  # the first looks whether the teacher is whole, and loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_batches_arrive_as_they_are(chain: Path, device: str) -> None:
    """All of them, in order, on the device, laid out as they were."""
    data = Dataset.open(chain / "data/train")
    feed = Feed(Images(data), DrawnViews(data, Policy("pad-crop", 8, False, 0, pad=1)), 20, 0, weights=np.ones(len(data), np.float32))
    made, found = list(feed.epoch(0)), list(arriving(feed.epoch(0), torch.device(device)))
    assert len(found) == len(made) == 6
    for one, other in zip(made, found, strict=True):
        assert np.array_equal(one.rows, other.rows)
        assert (other.images.device.type, other.images.stride()) == (device, one.images.stride())
        pairs = ((one.images, other.images), (one.labels, other.labels), (one.weights, other.weights))
        assert all(a is not None and b is not None and torch.equal(a, b.cpu()) for a, b in pairs)
