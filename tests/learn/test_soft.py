"""learn/soft.py: each loss against its paper's formula, written out in loops over samples and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdprune_data.errors import UsageError
from kdprune_data.learn.losses import Mix, cross_entropy, distillation
from kdprune_data.learn.soft import LOSSES, Soft, Taught

Array = NDArray[np.float64]
NAMES = list(LOSSES)
SETTINGS = {"dkd": ["alpha=0.5", "beta=3"], "dist": ["beta=2", "gamma=0.5"]}
SHAPES = [(1, 2), (5, 10), (33, 3), (4, 2)]


def logits(n: int, c: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels(n: int, c: int) -> torch.Tensor:
    return torch.arange(n) * 7 % c


def some_weights(n: int) -> torch.Tensor:
    return torch.tensor([0.0, 3.0, 1.0, 0.5, 2.25] * n, dtype=torch.float64)[1 : n + 1]


def softmax(z: Array) -> Array:
    powers = np.exp(z - z.max())
    return powers / powers.sum()


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pearson(a: Array, b: Array, w: Array) -> float:
    mean_a, mean_b = (float((w * x).sum() / w.sum()) for x in (a, b))
    cov = var_a = var_b = 0.0
    for x, y, v in zip(a, b, w, strict=True):
        cov += v * (x - mean_a) * (y - mean_b)
        var_a += v * (x - mean_a) ** 2
        var_b += v * (y - mean_b) ** 2
    return 0.0 if var_a == 0 or var_b == 0 else float(cov / math.sqrt(var_a * var_b))


def plain_kl(s: Array, t: Array, y: Array, w: Array, tau: float) -> float:
    return sum(w[n] * divergence(softmax(t[n] / tau), softmax(s[n] / tau)) for n in range(len(s))) / w.sum()


def plain_dkd(s: Array, t: Array, y: Array, w: Array, tau: float, alpha: float = 1.0, beta: float = 8.0) -> float:
    total = 0.0
    for n in range(len(s)):
        q, p = softmax(s[n] / tau), softmax(t[n] / tau)
        own = int(y[n])
        tckd = divergence([p[own], 1 - p[own]], [q[own], 1 - q[own]])
        others = [k for k in range(len(p)) if k != own]
        nckd = divergence([p[k] / (1 - p[own]) for k in others], [q[k] / (1 - q[own]) for k in others])
        total += w[n] * (alpha * tckd + beta * nckd)
    return float(total / w.sum())


def plain_dist(s: Array, t: Array, y: Array, w: Array, tau: float, beta: float = 1.0, gamma: float = 1.0) -> float:
    q, p = (np.array([softmax(row / tau) for row in z]) for z in (s, t))
    inter = sum(w[n] * (1 - pearson(q[n], p[n], np.ones(len(q[n])))) for n in range(len(q))) / w.sum()
    intra = sum(1 - pearson(q[:, k], p[:, k], w) for k in range(q.shape[1])) / q.shape[1]
    return float(beta * inter + gamma * intra)


def plain_mse(s: Array, t: Array, y: Array, w: Array, tau: float) -> float:
    total = 0.0
    for n in range(len(s)):
        mine, theirs = s[n] - s[n].mean(), t[n] - t[n].mean()
        total += w[n] * sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)) / len(mine)
    return float(total / w.sum())


PLAIN: dict[str, Callable[..., float]] = {"kl": plain_kl, "dkd": plain_dkd, "dist": plain_dist, "mse": plain_mse}


def own(name: str) -> dict[str, float]:
    return {key: float(value) for key, value in (one.split("=") for one in SETTINGS.get(name, []))}


def of(name: str, taught: Taught, settings: Sequence[str] = ()) -> torch.Tensor:
    soft = Soft.choose(name, settings)
    return soft.kind.of(taught, soft.settings)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("n", "c"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_its_formula(name: str, n: int, c: int, tau: float, weighted: bool) -> None:
    s, t, y = logits(n, c, 1), logits(n, c, 2), labels(n, c)
    weights = some_weights(n) if weighted else None
    plain = (s.numpy(), t.numpy(), y.numpy(), np.ones(n) if weights is None else weights.numpy(), tau)
    for settings, named in ((SETTINGS.get(name, []), own(name)), ([], {})):
        expected = PLAIN[name](*plain, **named)
        found = of(name, Taught(s, t, y, tau, weights), settings)
        assert float(found) == pytest.approx(expected, rel=1e-8, abs=1e-9)
        single = of(name, Taught(s.float(), t.float(), y, tau, weights), settings)
        assert single.dtype == torch.float32
        assert float(single) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, weighted: bool) -> None:
    s, t, y = logits(6, 5, 1).requires_grad_(), logits(6, 5, 2), labels(6, 5)
    weights = some_weights(6) if weighted else None
    assert torch.autograd.gradcheck(lambda z: of(name, Taught(z, t, y, 2.0, weights), SETTINGS.get(name, [])), (s,))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_all_mix_alike(name: str, alpha: float) -> None:
    """(1 - alpha) CE + alpha tau^2 loss; the squared difference knows no temperature."""
    s, t, y, tau = logits(7, 4, 1), logits(7, 4, 2), labels(7, 4), 3.0
    scale = 1.0 if name == "mse" else tau**2
    expected = (1 - alpha) * cross_entropy(s, y, smoothing=0.1) + alpha * scale * of(name, Taught(s, t, y, tau))
    found = distillation(s, t, y, mix=Mix(alpha, tau, 0.1, Soft.choose(name)))
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_by_hand() -> None:
    """Two samples of three classes at temperature 1: p = (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4) of the teacher, 1/3 of the student and
    (1/2, 1/4, 1/4) again; the labels are 0 and 1."""
    t = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]], dtype=torch.float64).log()
    s = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]], dtype=torch.float64).log()
    taught = Taught(s, t, torch.tensor([0, 1]), 1.0)
    first, second = math.log(9 / 8) / 2, math.log(2) / 4  # KL((1/2, 1/2) || (1/3, 2/3)), KL((1/2, 1/4, 1/4) || (1/4, 1/2, 1/4))
    assert float(of("kl", taught)) == pytest.approx((first + second) / 2)
    binary = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # KL((1/2, 1/2) || (1/4, 3/4))
    rest = math.log(1 / 2 / (2 / 3)) / 2 + math.log(1 / 2 / (1 / 3)) / 2  # KL((1/2, 1/2) || (2/3, 1/3))
    assert float(of("dkd", taught)) == pytest.approx((first + binary + 8 * rest) / 2)
    # Over classes: nothing varies in the student's first row; (2 -1 -1) and (-1 2 -1) have r = -1/2. Over samples: the teacher's classes
    # fall, rise and stay; the student's rise, fall and fall.
    assert float(of("dist", taught)) == pytest.approx((1 + 1.5) / 2 + (2 + 2 + 1) / 3)
    # Centred differences: log 2 times (2, -1, -1) / 3, and (1, -1, 0).
    assert float(of("mse", taught)) == pytest.approx(math.log(2) ** 2 * (6 / 9 / 3 + 2 / 3) / 2)


# --- how they hang together


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_dkd_is_kl_where_beta_is_what_the_label_leaves(p: float, tau: float) -> None:
    """KL = TCKD + (1 - p) NCKD, where the teacher gives every label the same p."""
    s, y = logits(6, 5, 1), labels(6, 5)
    rest = logits(6, 5, 2).scatter(1, y[:, None], -torch.inf).softmax(1) * (1 - p)
    t = tau * rest.scatter(1, y[:, None], p).log()
    taught = Taught(s, t, y, tau)
    assert float(of("dkd", taught, ["alpha=1", f"beta={1 - p}"])) == pytest.approx(float(of("kl", taught)), rel=1e-12)
    assert float(of("dkd", taught)) != pytest.approx(float(of("kl", taught)))


def test_two_classes_leave_dkd_the_label_alone() -> None:
    taught = Taught(logits(6, 2, 1), logits(6, 2, 2), labels(6, 2), 2.0)
    assert float(of("dkd", taught)) == pytest.approx(float(of("kl", taught)), rel=1e-12)
    assert float(of("dkd", taught, ["alpha=0"])) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [5.0, -1000.0])
def test_only_differences_of_logits_count(name: str, shift: float) -> None:
    """So that a cache may store z - max(z)."""
    s, t, y = logits(5, 4, 1), logits(5, 4, 2), labels(5, 4)
    rows = shift * torch.arange(1, 6, dtype=torch.float64)[:, None]
    plain = of(name, Taught(s, t, y, 4.0))
    for moved in (Taught(s, t + rows, y, 4.0), Taught(s + rows, t, y, 4.0), Taught(s, t - t.amax(1, keepdim=True), y, 4.0)):
        assert float(of(name, moved)) == pytest.approx(float(plain), rel=1e-8)
    same = Taught(t + rows, t, y, 4.0)
    assert float(of(name, same)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_dist_is_blind_to_affine_changes(share: float) -> None:
    """A teacher whose probabilities are a p + b, here mixed with even ones, teaches the same, where KL is another."""
    p, y = logits(6, 5, 2).softmax(1), labels(6, 5)
    mixed = share * p + (1 - share) / 5
    for s in (logits(6, 5, 1), p.log()):
        found = [[float(of(name, Taught(s, t.log(), y, 1.0))) for t in (p, mixed)] for name in ("dist", "kl")]
        assert found[0][0] == pytest.approx(found[0][1], rel=1e-8, abs=1e-8)
        assert found[1][0] != pytest.approx(found[1][1], rel=1e-3, abs=1e-3)


def test_mse_is_what_kl_becomes_at_high_temperature() -> None:
    """2 tau^2 KL, and its gradient."""
    found = []
    for name, tau, scale in (("kl", 1e4, 2e8), ("mse", 1.0, 1.0)):
        s = logits(6, 5, 1).requires_grad_()
        loss = scale * of(name, Taught(s, logits(6, 5, 2), labels(6, 5), tau))
        loss.backward()
        assert s.grad is not None
        found.append((float(loss.detach()), s.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-4)


def test_a_temperature_is_nothing_to_mse() -> None:
    s, t, y = logits(5, 4, 1), logits(5, 4, 2), labels(5, 4)
    assert torch.equal(*(distillation(s, t, y, mix=Mix(1.0, tau, soft=Soft.choose("mse"))) for tau in (1.0, 7.0)))


# --- weights of samples


@pytest.mark.parametrize("times", [[1, 2, 1], [2, 2, 2, 2], [3, 1, 5, 0, 2]])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_two_is_the_sample_twice(name: str, times: list[int]) -> None:
    """Value and gradient: in a correlation over samples too."""
    n = len(times)
    copies = torch.tensor([row for row in range(n) for _ in range(times[row])])
    t, y = logits(n, 6, 4), labels(n, 6)
    one, two = logits(n, 6, 3).requires_grad_(), logits(n, 6, 3).requires_grad_()
    weighted = of(name, Taught(one, t, y, 2.0, torch.tensor(times, dtype=torch.float64)))
    repeated = of(name, Taught(two[copies], t[copies], y[copies], 2.0))
    assert float(weighted.detach()) == pytest.approx(float(repeated.detach()), rel=1e-12)
    weighted.backward()
    repeated.backward()
    assert one.grad is not None
    assert torch.allclose(one.grad, two.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_nothing_give_nothing(name: str, kind: torch.dtype) -> None:
    s = logits(3, 4, 1).to(kind).requires_grad_()
    loss = of(name, Taught(s, logits(3, 4, 2).to(kind), labels(3, 4), 4.0, torch.zeros(3)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert s.grad is not None
    assert not s.grad.any()


# --- extremes


@pytest.mark.parametrize("huge", [1e4, 65504.0, 1e30])
@pytest.mark.parametrize("name", ["kl", "dkd", "dist"])
def test_huge_logits_stay_finite(name: str, huge: float) -> None:
    s = torch.tensor([[0.0, -huge, 1.0], [-huge, 0.0, -huge]], requires_grad=True)
    t = torch.tensor([[0.0, -huge, -huge], [0.0, -huge, 0.0]])
    for y in ([0, 1], [1, 2]):
        loss = of(name, Taught(s, t, torch.tensor(y), 4.0))
        s.grad = None
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "c"), [(1, 5), (1, 2), (4, 3)])
def test_what_does_not_vary_has_finite_gradients(name: str, n: int, c: int) -> None:
    """A batch of one, which the end of an epoch may be; samples and classes that are all alike."""
    for s, t in ((logits(n, c, 1), logits(n, c, 2)), (logits(n, c, 1), torch.zeros(n, c)), (torch.zeros(n, c), logits(n, c, 2))):
        z = s.double().requires_grad_()
        of(name, Taught(z, t.double(), labels(n, c), 4.0)).backward()
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()


def test_a_batch_of_one_has_no_correlation_over_samples() -> None:
    s = logits(1, 5, 1).requires_grad_()
    loss = of("dist", Taught(s, logits(1, 5, 2), labels(1, 5), 4.0), ["beta=0"])
    loss.backward()
    assert float(loss.detach()) == 1
    assert s.grad is not None
    assert not s.grad.any()


# --- choosing


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("kdd", [], "unknown loss 'kdd'; did you mean 'dkd'? known: dist, dkd, kl, mse"),
        ("kl", ["beta=2"], "kl has no settings: leave out --set beta"),
        ("mse", ["alpha=2"], "mse has no settings: leave out --set alpha"),
        ("dkd", ["bta=2"], "unknown setting of dkd 'bta'; did you mean 'beta'?"),
        ("dkd", ["beta=much"], "--set beta=much: expected a number"),
        ("dkd", ["beta=-1"], "--set beta -1.0 is too small: at least 0"),
        ("dist", ["gamma=nan"], "--set gamma nan is not a finite number"),
        ("dist", ["gamma=1", "gamma=2"], "--set gamma was given twice (1 and 2): give it once"),
        ("dist", ["gamma"], "--set gamma is no setting: give name=value"),
    ],
)
def test_refusals(name: str, given: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Soft.choose(name, given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("kl", [], {}),
        ("mse", [], {"loss": "mse"}),
        ("dkd", [], {"loss": "dkd", "settings": {"alpha": 1.0, "beta": 8.0}}),
        ("dist", ["gamma=0.5"], {"loss": "dist", "settings": {"beta": 1.0, "gamma": 0.5}}),
    ],
)
def test_what_stands_in_the_manifest(name: str, given: list[str], expected: dict[str, object]) -> None:
    """Nothing for `kl`: students made before there were others are what they were."""
    assert Soft.choose(name, given).own() == expected


def test_one_class_leaves_dkd_nothing() -> None:
    with pytest.raises(UsageError, match="there is one class: use --loss kl"):
        of("dkd", Taught(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 1.0))
