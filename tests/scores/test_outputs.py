"""scores/outputs.py: every score against its definition in plain Python, on ordinary and on adversarial logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdprune_data.formats.scores import SCORES
from kdprune_data.learn import models
from kdprune_data.scores import FROM_DYNAMICS, FROM_EMBEDDING, FROM_OUTPUTS, Outputs

Row = list[float]


def log_softmax(z: Row) -> Row:
    top = max(z)
    total = math.log(math.fsum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def softmax(z: Row) -> Row:
    return [math.exp(v) for v in log_softmax(z)]


def plain_el2n(z: Row, y: int, h: Row) -> float:
    return math.sqrt(sum((p - (k == y)) ** 2 for k, p in enumerate(softmax(z))))


def plain_grand(z: Row, y: int, h: Row) -> float:
    """The norm of every entry of the gradient, (p - y) h for weights and p - y for biases."""
    error = [p - (k == y) for k, p in enumerate(softmax(z))]
    return math.sqrt(sum((e * v) ** 2 for e in error for v in [*h, 1.0]))


def plain_entropy(z: Row, y: int, h: Row) -> float:
    return -sum(p * math.log(p) for p in softmax(z) if p > 0)


def plain_margin(z: Row, y: int, h: Row) -> float:
    first, second = sorted([*softmax(z), 0.0], reverse=True)[:2]
    return first - second


def plain_confidence(z: Row, y: int, h: Row) -> float:
    return max(softmax(z))


def plain_loss(z: Row, y: int, h: Row) -> float:
    return -log_softmax(z)[y]


PLAIN: dict[str, Callable[[Row, int, Row], float]] = {
    "el2n": plain_el2n,
    "grand": plain_grand,
    "entropy": plain_entropy,
    "margin": plain_margin,
    "confidence": plain_confidence,
    "loss": plain_loss,
}


def outputs(z: torch.Tensor, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(z.shape[1], (len(z),), generator=generator)
    return Outputs(z, labels, torch.randn(len(z), 6, generator=generator))


def normal(n: int, c: int, scale: float) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(c)) * scale


LOGITS = {
    "ordinary": normal(40, 10, 2.0),
    "two classes": normal(20, 2, 2.0),
    "a thousand classes": normal(3, 1000, 5.0),
    "one class": normal(5, 1, 3.0),
    "one sample": normal(1, 4, 1.0),
    "all equal": torch.zeros(8, 5),
    "ties at the top": torch.tensor([[2.0, 2.0, 0.0], [1.0, 2.0, 2.0], [2.0, -1.0, 2.0]]),
    "huge": normal(12, 7, 1e4),
    "largest of float32": torch.tensor([[3e38, -3e38, 0.0], [-3e38, 3e38, 3e38], [0.0, 0.0, -3e38]]),
    "tiny differences": 1.0 + normal(6, 4, 1e-6),
    "far from zero": normal(6, 4, 1.0) + 1e4,
    "float16": normal(10, 4, 3.0).half(),
}


def test_there_is_a_plain_version_of_each() -> None:
    assert set(PLAIN) == set(FROM_OUTPUTS)


def test_the_table_of_meanings_covers_all_scores() -> None:
    by_source = {"early": {"el2n", "grand", "grand_full"}, "dynamics": set(FROM_DYNAMICS), "embedding": set(FROM_EMBEDDING)}
    for source, names in by_source.items():
        assert {name for name, score in SCORES.items() if score.source == source} == names
    assert set(SCORES) == {*FROM_OUTPUTS}.union(*by_source.values())
    assert {name for name, score in SCORES.items() if score.hard == "low"} == {
        "margin",
        "confidence",
        "aum",
        "correct",
        "p_true",
        "density",
    }


def test_el2n_and_grand_by_hand() -> None:
    """p = (1/2, 1/2) of label 0 is sqrt(1/2) off; with h = (2, 0), grand is sqrt(1 + 4) times that."""
    out = Outputs(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[2.0, 0.0]]))
    assert float(FROM_OUTPUTS["el2n"](out)) == pytest.approx(math.sqrt(0.5))
    assert float(FROM_OUTPUTS["grand"](out)) == pytest.approx(math.sqrt(2.5))


@pytest.mark.parametrize("name", FROM_OUTPUTS)
@pytest.mark.parametrize("kind", LOGITS)
def test_each_score_is_its_definition(name: str, kind: str) -> None:
    out = outputs(LOGITS[kind])
    found = FROM_OUTPUTS[name](out)
    assert found.shape == (len(out.labels),)
    assert found.dtype == torch.float64
    expected = [
        PLAIN[name](z, y, h) for z, y, h in zip(out.logits.double().tolist(), out.labels.tolist(), out.embedding.tolist(), strict=True)
    ]
    assert torch.isfinite(found).all()
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", FROM_OUTPUTS)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_and_order_change_nothing(name: str, size: int) -> None:
    out = outputs(LOGITS["ordinary"])
    whole = FROM_OUTPUTS[name](out)
    shuffled = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    for places in shuffled.split(size):
        part = Outputs(out.logits[places], out.labels[places], out.embedding[places])
        assert FROM_OUTPUTS[name](part).tolist() == pytest.approx(whole[places].tolist(), rel=1e-14, abs=1e-15)


@pytest.mark.parametrize(("name", "low", "high"), [("el2n", 0, math.sqrt(2)), ("entropy", 0, math.log(7)), ("margin", 0, 1)])
def test_ranges_are_kept_at_the_ends(name: str, low: float, high: float) -> None:
    z = torch.cat([LOGITS["huge"], torch.zeros(3, 7)])
    found = FROM_OUTPUTS[name](outputs(z))
    assert (found >= low).all()
    assert (found <= high + 1e-12).all()
    assert float(found.max()) > 0.99 * high


def test_which_end_is_hard() -> None:
    """A sample that is known well against one that is taken for another and one that is not known."""
    z = torch.tensor([[8.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 1.5, 0.0]])
    out = Outputs(z, torch.tensor([0, 0, 0]), torch.ones(3, 2))
    for name, score in FROM_OUTPUTS.items():
        easy, *hard = score(out).tolist()
        assert all((h > easy) == (SCORES[name].hard == "high") for h in hard), name


@pytest.mark.parametrize("model", ["resnet8", "resnet18"])
def test_grand_is_the_gradient_of_the_last_layer(model: str) -> None:
    """Against autograd, sample by sample, in eval mode."""
    net = models.build(models.resolve(model, classes=6, size=32), seed=0).eval()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 5])
    with torch.no_grad():
        embedding, logits = models.features(net, images)
    found = FROM_OUTPUTS["grand"](Outputs(logits, labels, embedding))
    head = models.head(net)
    assert isinstance(head, nn.Linear)
    for n in range(5):
        net.zero_grad()
        F.cross_entropy(net(images[n : n + 1]), labels[n : n + 1], reduction="sum").backward()
        norm = math.sqrt(float(head.weight.grad.double().square().sum() + head.bias.grad.double().square().sum()))
        assert float(found[n]) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_grand_of_a_head_without_a_bias(bias: bool) -> None:
    """Its gradient has no part of a bias that is not there."""
    head = torch.nn.Linear(3, 4, bias=bias)
    h, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) / 3, torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        found = FROM_OUTPUTS["grand"](Outputs(head(h), labels, h, bias))
    for n in range(5):
        own = torch.autograd.grad(F.cross_entropy(head(h[n : n + 1]), labels[n : n + 1]), list(head.parameters()))
        assert float(found[n]) == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in own)), rel=1e-5)


def test_grand_does_not_depend_on_the_size_of_the_batch() -> None:
    """As it does where it is the gradient of a mean over the batch, and the last batch is a short one."""
    out = outputs(LOGITS["ordinary"])
    alone = Outputs(out.logits[:1], out.labels[:1], out.embedding[:1])
    assert float(FROM_OUTPUTS["grand"](alone)[0]) == pytest.approx(float(FROM_OUTPUTS["grand"](out)[0]), rel=1e-14)


@pytest.mark.parametrize("name", FROM_OUTPUTS)
def test_the_inputs_are_left_as_they_are(name: str) -> None:
    out = outputs(LOGITS["ordinary"].clone())
    FROM_OUTPUTS[name](out)
    assert torch.equal(out.logits, LOGITS["ordinary"])


def test_no_temperature_and_no_gradient_are_left_behind() -> None:
    z = torch.tensor([[2.0, 0.0]])
    assert np.isclose(float(FROM_OUTPUTS["confidence"](Outputs(z, torch.tensor([0]), z))[0]), 1 / (1 + math.exp(-2)))
