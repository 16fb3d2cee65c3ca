"""learn/losses.py against the formulas, written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdprune_data.learn.losses import auto_alpha, distillation, kl

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
    assert float(distillation(student, teacher, y, alpha=alpha, temperature=tau)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    single = distillation(student.float(), teacher.float(), y, alpha=alpha, temperature=tau)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_alpha_0_is_the_label_alone() -> None:
    student, y = logits(6, 4, 1), labels(6, 4)
    assert torch.equal(distillation(student, None, y, alpha=0.0, temperature=4.0), F.cross_entropy(student, y))
    broken = torch.full_like(student, float("nan"))
    assert torch.equal(distillation(student, broken, y, alpha=0.0, temperature=4.0), F.cross_entropy(student, y))


def test_alpha_1_is_the_teacher_alone_and_needs_no_label() -> None:
    student, teacher = logits(6, 4, 1), logits(6, 4, 2)
    none = torch.full((6,), -1)
    assert float(distillation(student, teacher, none, alpha=1.0, temperature=2.0)) == pytest.approx(
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
    plain = distillation(student, teacher, y, alpha=0.7, temperature=4.0)
    assert float(distillation(student, teacher + shift, y, alpha=0.7, temperature=4.0)) == pytest.approx(float(plain), rel=1e-9)
    assert float(kl(teacher + shift, teacher, 4.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("huge", [1e4, 65504.0, 1e30])
def test_huge_logits_stay_finite(huge: float) -> None:
    student = torch.tensor([[0.0, -huge], [-huge, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -huge], [0.0, -huge]])
    loss = distillation(student, teacher, torch.tensor([0, 1]), alpha=0.5, temperature=4.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_is_that_of_the_paper() -> None:
    """(1 - alpha) (p - y) / n + alpha tau (q_student - q_teacher) / n: of the same size at any temperature."""
    student, teacher, y = logits(5, 4, 1).requires_grad_(), logits(5, 4, 2), labels(5, 4)
    distillation(student, teacher, y, alpha=0.3, temperature=4.0).backward()
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
    assert torch.allclose(distillation(z, t, labels, alpha=alpha, temperature=3.0, smoothing=0.2), expected, atol=1e-6)
