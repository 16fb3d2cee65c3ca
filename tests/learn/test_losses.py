"""learn/losses.py against the formulas, written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdprune_data.learn.losses import Mix, auto_alpha, cross_entropy, distillation, kl, weighted_mean

Rows = list[list[float]]


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    powers = [math.exp(v - top) for v in z]
    return [p / sum(powers) for p in powers]


def plain_kl(student: Rows, teacher: Rows, tau: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax([v / tau for v in t]), softmax([v / tau for v in s])
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return total / len(student)


def plain_loss(student: Rows, teacher: Rows, labels: list[int], alpha: float, tau: float) -> float:
    ce = sum(-math.log(softmax(s)[y]) for s, y in zip(student, labels, strict=True)) / len(labels)
    return (1 - alpha) * ce + alpha * tau**2 * plain_kl(student, teacher, tau)


def logits(n: int, c: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels(n: int, c: int) -> torch.Tensor:
    return torch.arange(n) * 7 % c


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("n", "c"), [(1, 2), (5, 10), (64, 3), (3, 1)])
def test_distillation_is_the_formula(n: int, c: int, tau: float, alpha: float) -> None:
    student, teacher, y = logits(n, c, 1), logits(n, c, 2), labels(n, c)
    expected = plain_loss(student.tolist(), teacher.tolist(), y.tolist(), alpha, tau)
    assert float(distillation(student, teacher, y, mix=Mix(alpha, tau))) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    single = distillation(student.float(), teacher.float(), y, mix=Mix(alpha, tau))
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_alpha_0_is_the_label_alone() -> None:
    student, y = logits(6, 4, 1), labels(6, 4)
    assert torch.equal(distillation(student, None, y, mix=Mix(0.0, 4.0)), F.cross_entropy(student, y))
    broken = torch.full_like(student, float("nan"))
    assert torch.equal(distillation(student, broken, y, mix=Mix(0.0, 4.0)), F.cross_entropy(student, y))


def test_alpha_1_is_the_teacher_alone_and_needs_no_label() -> None:
    student, teacher = logits(6, 4, 1), logits(6, 4, 2)
    none = torch.full((6,), -1)
    assert float(distillation(student, teacher, none, mix=Mix(1.0, 2.0))) == pytest.approx(
        4 * plain_kl(student.tolist(), teacher.tolist(), 2.0), rel=1e-12
    )


def test_the_teacher_is_the_first_of_the_divergence() -> None:
    student, teacher = logits(4, 5, 1), logits(4, 5, 2)
    assert float(kl(student, teacher, 1.0)) == pytest.approx(plain_kl(student.tolist(), teacher.tolist(), 1.0))
    assert float(kl(student, teacher, 1.0)) != pytest.approx(float(kl(teacher, student, 1.0)))


@pytest.mark.parametrize("shift", [0.0, 5.0, -1000.0])
def test_only_differences_of_logits_count(shift: float) -> None:
    """So that a cache may store z - max(z)."""
    student, teacher, y = logits(5, 4, 1), logits(5, 4, 2), labels(5, 4)
    plain = distillation(student, teacher, y, mix=Mix(0.7, 4.0))
    assert float(distillation(student, teacher + shift, y, mix=Mix(0.7, 4.0))) == pytest.approx(float(plain), rel=1e-9)
    assert float(kl(teacher + shift, teacher, 4.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("huge", [1e4, 65504.0, 1e30])
def test_huge_logits_stay_finite(huge: float) -> None:
    student = torch.tensor([[0.0, -huge], [-huge, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -huge], [0.0, -huge]])
    loss = distillation(student, teacher, torch.tensor([0, 1]), mix=Mix(0.5, 4.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_is_that_of_the_paper() -> None:
    """(1 - alpha) (p - y) / n + alpha tau (q_student - q_teacher) / n: of the same size at any temperature."""
    student, teacher, y = logits(5, 4, 1).requires_grad_(), logits(5, 4, 2), labels(5, 4)
    distillation(student, teacher, y, mix=Mix(0.3, 4.0)).backward()
    plain = student.detach()
    soft = (plain / 4).softmax(1) - (teacher / 4).softmax(1)
    expected = (0.7 * (plain.softmax(1) - F.one_hot(y, 4)) + 0.3 * 4 * soft) / 5
    assert torch.allclose(student.grad, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kept", "expected"), [(0.001, 0.9), (0.02, 0.9), (0.1, 0.9), (0.2, 0.7796), (0.5, 0.6204), (0.10001, 0.9), (1.0, 0.5)]
)
def test_auto_alpha(kept: float, expected: float) -> None:
    assert auto_alpha(kept) == expected


def test_auto_alpha_never_falls_as_less_is_kept() -> None:
    alphas = [auto_alpha(n / 1000) for n in range(1, 1001)]
    assert alphas == sorted(alphas, reverse=True)
    assert set(alphas) <= {a for a in alphas if 0.5 <= a <= 0.9}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_smoothing_is_of_the_label_alone(alpha: float) -> None:
    """Against the definition: a share of the label spread evenly over all classes."""
    torch.manual_seed(0)
    z, t, labels = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    soft = 0.8 * F.one_hot(labels, 4) + 0.2 / 4
    hard = -(soft * z.log_softmax(1)).sum(1).mean()
    expected = (1 - alpha) * hard + alpha * 9 * kl(z, t, 3.0)
    assert torch.allclose(distillation(z, t, labels, mix=Mix(alpha, 3.0, 0.2)), expected, atol=1e-6)


# --- weights of samples


def plain_weighted(student: Rows, teacher: Rows, labels: list[int], weights: list[float], mix: Mix) -> float:
    """The definition: sum(w * l) / sum(w), l being (1 - alpha) CE + alpha tau^2 KL of one sample, CE against the smoothed label."""
    total = 0.0
    for s, t, y, w in zip(student, teacher, labels, weights, strict=True):
        said, n = softmax(s), len(s)
        soft = [(1 - mix.smoothing) * (k == y) + mix.smoothing / n for k in range(n)]
        ce = sum(-a * math.log(b) for a, b in zip(soft, said, strict=True))
        total += w * ((1 - mix.alpha) * ce + mix.alpha * mix.temperature**2 * plain_kl([s], [t], mix.temperature))
    return total / sum(weights)


WEIGHTS = [[1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 2.5, 0.0, 1e-3], [7.0, 7.0, 7.0, 7.0, 7.0], [0.1, 1e6, 0.0, 3.0, 1e-6]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mix", [Mix(0.0, 4.0), Mix(0.3, 2.0, 0.1), Mix(0.9, 0.5), Mix(1.0, 4.0)])
def test_weights_are_the_formula(weights: list[float], mix: Mix) -> None:
    student, teacher, y = logits(5, 4, 1), logits(5, 4, 2), labels(5, 4)
    expected = plain_weighted(student.tolist(), teacher.tolist(), y.tolist(), weights, mix)
    for kind, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = torch.tensor(weights, dtype=torch.float32)
        found = distillation(student.to(kind), teacher.to(kind), y, mix=mix, weights=given)
        assert found.dtype == kind
        assert float(found) == pytest.approx(expected, rel=max(close, 1e-7))


def gradient(student: torch.Tensor, *given: torch.Tensor, mix: Mix, weights: torch.Tensor | None) -> torch.Tensor:
    z = student.clone().requires_grad_()
    distillation(z, *given, mix=mix, weights=weights).backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("mix", [Mix(0.0, 4.0), Mix(0.6, 4.0, 0.1), Mix(1.0, 2.0)])
@pytest.mark.parametrize("times", [[1, 2, 1], [2, 2, 2, 2], [1, 0, 2, 1], [3, 1, 5, 0, 2], [2]])
def test_a_weight_of_two_is_the_sample_twice(times: list[int], mix: Mix) -> None:
    """The gradient of each sample's logits is the sum of its copies' gradients, to the bit where no weight makes numbers round."""
    n = len(times)
    student, teacher, y = logits(n, 6, 3), logits(n, 6, 4), labels(n, 6)
    copies = torch.tensor([row for row in range(n) for _ in range(times[row])])
    weighted = gradient(student, teacher, y, mix=mix, weights=torch.tensor(times, dtype=torch.float64))
    repeated = gradient(student[copies], teacher[copies], y[copies], mix=mix, weights=None)
    summed = torch.zeros_like(weighted).index_add(0, copies, repeated)
    assert torch.allclose(weighted, summed, rtol=1e-14, atol=1e-17)
    if mix.alpha == 0 and max(times) <= 2 and mix.smoothing == 0:
        alike = gradient(student[copies], teacher[copies], y[copies], mix=mix, weights=torch.ones(len(copies), dtype=torch.float64))
        assert torch.equal(weighted, torch.zeros_like(weighted).index_add(0, copies, alike))


def test_a_network_learns_a_weight_of_two_as_the_sample_twice() -> None:
    """All gradients of a network whose samples do not see one another."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 12), torch.nn.GroupNorm(3, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4)).double()
    x, teacher, y = torch.randn(5, 7, dtype=torch.float64), logits(5, 4, 2), labels(5, 4)
    copies = torch.tensor([0, 1, 1, 3, 4, 4])
    found = []
    for inputs, soft, hard, weights in (
        (x, teacher, y, torch.tensor([1.0, 2.0, 0.0, 1.0, 2.0])),
        (x[copies], teacher[copies], y[copies], None),
    ):
        net.zero_grad()
        distillation(net(inputs), soft, hard, mix=Mix(0.7, 4.0), weights=weights).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*found, strict=True))
    assert all(bool(a.any()) for a in found[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_weights_of_nothing_give_nothing(alpha: float, kind: torch.dtype) -> None:
    student = logits(3, 4, 1).to(kind).requires_grad_()
    loss = distillation(student, logits(3, 4, 2).to(kind), labels(3, 4), mix=Mix(alpha, 4.0), weights=torch.zeros(3))
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-10, 3.0, 1e30, 1e38])
def test_only_the_proportions_of_weights_count(scale: float) -> None:
    """Their sum may be more than float32 holds."""
    losses, weights = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([3.0, 1.0, 0.0, 2.0])
    assert float(weighted_mean(losses, weights * scale)) == pytest.approx(11 / 6, rel=0.2 if scale < 1e-38 else 1e-6)


def test_without_weights_nothing_changes() -> None:
    """To the bit, what torch's own means give."""
    student, teacher, y = logits(7, 5, 1).float(), logits(7, 5, 2).float(), labels(7, 5)
    assert torch.equal(cross_entropy(student, y, smoothing=0.1), F.cross_entropy(student, y, label_smoothing=0.1))
    expected = F.kl_div((student / 4).log_softmax(1), (teacher / 4).log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.equal(kl(student, teacher, 4.0), expected)
    both = 0.4 * F.cross_entropy(student, y, label_smoothing=0.1) + 0.6 * 16 * expected
    assert torch.equal(distillation(student, teacher, y, mix=Mix(0.6, 4.0, 0.1)), both)
