"""scores/dynamics.py: histories worked out by hand, and every score against a slow loop written from its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdprune_data.errors import SourceError, UsageError
from kdprune_data.scores import FROM_DYNAMICS, History

Row = list[float]


def compute(name: str, past: History, **settings: Any) -> NDArray[np.float64]:
    score = FROM_DYNAMICS[name]
    return score.compute(past, score.settings(**settings))


def history(rows: list[str], margins: list[Row] | None = None) -> History:
    """One text per sample, a letter per epoch: `+` right, `-` wrong."""
    correct = np.array([[letter == "+" for letter in row] for row in rows], bool).T
    given = np.zeros(correct.shape) if margins is None else np.array(margins).T
    return History(correct, given.astype(np.float32), given.astype(np.float32))


def of_p(rows: list[Row]) -> History:
    """One list of the label's probability per sample."""
    p = np.array(rows, np.float32).T
    return History(p > 0.5, p, p)


def of_logits(epochs: Any) -> History:
    """Logits, (t, n, c)."""
    z = np.asarray(epochs)
    nothing = np.zeros(z.shape[:2], np.float32)
    return History(nothing > 1, nothing, nothing, lambda epoch: z[epoch])


# --- the definitions, in plain loops


def plain_forgetting(right: list[bool], *, never: str = "presentations") -> float:
    count = sum(right[t] and not right[t + 1] for t in range(len(right) - 1))
    return count if any(right) else len(right) if never == "presentations" else 0


def plain_std(values: Row) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def plain_windows(values: Row, window: int) -> list[Row]:
    window = min(window, len(values))
    return [values[k : k + window] for k in range(len(values) - window + 1)]


def plain_dyn_unc(p: Row, *, window: int = 10) -> float:
    parts = plain_windows(p, window)
    return sum(plain_std(part) for part in parts) / len(parts)


def plain_dual(p: Row, *, window: int = 10, epochs: int = 30) -> float:
    parts = plain_windows(p[:epochs], window)
    return sum(plain_std(part) * (1 - sum(part) / len(part)) for part in parts) / len(parts)


def plain_log_softmax(z: Row) -> Row:
    top = max(z)
    total = math.log(math.fsum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def plain_tdds(z: list[Row], *, epochs: int | None = None, window: int = 10, decay: float = 0.9) -> float:
    """z: a row of logits per epoch."""
    log_p = [plain_log_softmax(row) for row in z[:epochs]]
    window = min(window, len(log_p))
    score = 0.0
    for k in range(len(log_p) - window + 1):
        changes = []
        for t in range(k, k + window - 1):
            changes.append(sum(abs(math.exp(b) * (b - a)) for a, b in zip(log_p[t], log_p[t + 1], strict=True)))
        mean = sum(changes) / len(changes)
        norm = math.sqrt(sum((change - mean) ** 2 for change in changes))
        score += norm * decay * (1 - decay) ** (len(log_p) - window - k)
    return score


PLAIN: dict[str, Callable[..., float]] = {
    "forgetting": lambda s, **kw: plain_forgetting(s["correct"], **kw),
    "aum": lambda s: math.fsum(s["margin"]) / len(s["margin"]),
    "correct": lambda s: sum(s["correct"]) / len(s["correct"]),
    "p_true": lambda s, epochs=30: math.fsum(s["p"][:epochs]) / len(s["p"][:epochs]),
    "dyn_unc": lambda s, **kw: plain_dyn_unc(s["p"], **kw),
    "dual": lambda s, **kw: plain_dual(s["p"], **kw),
    "tdds": lambda s, **kw: plain_tdds(s["logits"], **kw),
}


def made(t: int, n: int, c: int = 4, scale: float = 2.0, dtype: type = np.float16) -> History:
    """A random history, p_true and correct not of the logits."""
    random = np.random.default_rng([t, n, c])
    p = random.random((t, n)).astype(np.float32)
    p[:, :: max(2, n // 3)] = 1.0
    p[:, 1 :: max(2, n // 3)] = 0.0
    z = (random.normal(size=(t, n, c)) * scale).astype(dtype)
    return History(random.random((t, n)) < 0.6, random.normal(size=(t, n)).astype(np.float32), p, lambda epoch: z[epoch])


def sample(past: History, i: int) -> dict[str, Any]:
    assert past.logits is not None
    return {
        "correct": past.correct[:, i].tolist(),
        "margin": past.logit_margin[:, i].astype(float).tolist(),
        "p": past.p_true[:, i].astype(float).tolist(),
        "logits": [past.logits(epoch)[i].astype(float).tolist() for epoch in range(len(past.correct))],
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in PLAIN),
        ("forgetting", {"never": "zero"}),
        ("p_true", {"epochs": 1}),
        ("p_true", {"epochs": 7}),
        ("dyn_unc", {"window": 2}),
        ("dyn_unc", {"window": 500}),
        ("dual", {"window": 3, "epochs": 5}),
        ("dual", {"window": 5, "epochs": 3}),
        ("tdds", {"window": 3}),
        ("tdds", {"window": 4, "epochs": 9, "decay": 0.3}),
        ("tdds", {"window": 4, "decay": 1.0}),
        ("tdds", {"epochs": 400, "window": 7, "decay": 0.01}),
    ],
)
@pytest.mark.parametrize(("t", "n", "c"), [(3, 1, 4), (3, 5, 1), (9, 12, 3), (35, 40, 10)])
def test_against_the_definition(name: str, settings: dict[str, Any], t: int, n: int, c: int) -> None:
    past = made(t, n, c)
    expected = [PLAIN[name](sample(past, i), **settings) for i in range(n)]
    assert compute(name, past, **settings).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_there_is_a_plain_version_of_each() -> None:
    assert set(PLAIN) == set(FROM_DYNAMICS)
    assert {name for name, score in FROM_DYNAMICS.items() if score.logits} == {"tdds"}


# --- by hand


@pytest.mark.parametrize(("never", "last"), [("presentations", 6), ("zero", 0)])
def test_forgetting_by_hand(never: str, last: int) -> None:
    """Learned and kept: 0. Learned, lost twice: 2. Never learned: the number of presentations, the hardest there is, or as many copies of
    the paper's code have it 0, the easiest."""
    assert compute("forgetting", history(["--++++", "+-+-++", "------"]), never=never).tolist() == [0, 2, last]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("+", 0),
        ("-", 1),
        ("+-", 1),
        ("-+", 0),
        ("--", 2),
        ("++++", 0),
        ("+---", 1),
        ("---+", 0),
        ("+-+-+-", 3),
        ("-+-+-+", 2),
    ],
)
def test_forgetting(row: str, expected: int) -> None:
    assert compute("forgetting", history([row])).tolist() == [expected]


def test_never_learned_is_harder_than_any_that_was() -> None:
    found = compute("forgetting", history(["+-" * 10, "-" * 20]))
    assert found[1] > found[0]


def test_aum_and_correct_by_hand() -> None:
    past = history(["++-", "---"], [[1.0, 2.0, -6.0], [-0.5, -0.25, 0.0]])
    assert compute("aum", past).tolist() == [-1.0, -0.25]
    assert compute("correct", past).tolist() == pytest.approx([2 / 3, 0])


def test_p_true_by_hand() -> None:
    past = of_p([[0.0, 0.5, 1.0, 1.0]])
    assert [compute("p_true", past, epochs=e)[0] for e in (1, 2, 3, 4, 99)] == [0, 0.25, 0.5, 0.625, 0.625]


def test_windows_by_hand() -> None:
    """Four epochs, windows of three: two of them, 0 1/2 1 with deviation 1/2 and mean 1/2, and 1/2 1 1 with sqrt(1/12) and 5/6."""
    past = of_p([[0.0, 0.5, 1.0, 1.0]])
    second = math.sqrt(1 / 12)
    assert compute("dyn_unc", past, window=3)[0] == pytest.approx((0.5 + second) / 2)
    assert compute("dual", past, window=3)[0] == pytest.approx((0.5 * 0.5 + second * (1 - 5 / 6)) / 2)
    assert compute("dual", past, window=3, epochs=3)[0] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("t", "window", "epochs", "seen"), [(30, 10, 30, 21), (200, 10, 30, 21), (12, 10, 30, 3), (10, 10, 30, 1), (6, 10, 30, 1)]
)
def test_windows_are_counted(t: int, window: int, epochs: int, seen: int) -> None:
    """One step in the last epoch that is looked at: the last window alone sees it, so the score is its share."""
    row = [0.0] * t
    row[min(t, epochs) - 1 :] = [1.0] * (t - min(t, epochs) + 1)
    width = min(window, t, epochs)
    step = math.sqrt(1 / width)
    assert compute("dual", of_p([row]), window=window, epochs=epochs)[0] == pytest.approx(step * (1 - 1 / width) / seen)


def test_tdds_by_hand() -> None:
    """From (1/2, 1/2) to (1/4, 3/4) and back, then nothing: changes K = a, b, 0; windows of three epochs hold two changes each."""
    half, quarter = [0.0, 0.0], [math.log(0.25), math.log(0.75)]
    a = 0.25 * math.log(2) + 0.75 * math.log(1.5)
    b = 0.5 * math.log(2) + 0.5 * math.log(1.5)
    past = of_logits([[half], [quarter], [half], [half]])
    first, second = abs(a - b) / math.sqrt(2), b / math.sqrt(2)
    assert compute("tdds", past, window=3)[0] == pytest.approx(0.9 * second + 0.09 * first)
    assert compute("tdds", past, window=3, epochs=3)[0] == pytest.approx(0.9 * first)
    mean = (a + b) / 3
    assert compute("tdds", past)[0] == pytest.approx(0.9 * math.sqrt((a - mean) ** 2 + (b - mean) ** 2 + mean**2))


# --- what could go wrong


def test_aum_of_many_epochs_does_not_lose_small_margins() -> None:
    """A sum in float32 would."""
    margins = np.full((4001, 1), 1e-4, np.float32)
    margins[0] = 4e4
    found = compute("aum", History(np.ones((4001, 1), bool), margins, margins))
    assert found[0] == pytest.approx((4e4 + 4000 * float(np.float32(1e-4))) / 4001, rel=1e-12)


@pytest.mark.parametrize(("dtype", "scale"), [(np.float16, 1e4), (np.float32, 1e4), (np.float32, 1e30), (np.float16, 0.0)])
def test_tdds_of_huge_and_equal_logits(dtype: type, scale: float) -> None:
    """Probabilities of 0 are no NaN: 0 log(0 / p) is 0, and p log(p / 0) as far as the logits tell."""
    past = made(5, 30, 6, scale, dtype)
    found = compute("tdds", past)
    assert np.isfinite(found).all()
    assert found.tolist() == pytest.approx([plain_tdds(sample(past, i)["logits"]) for i in range(30)], rel=1e-9)
    assert (found > 0).all() == (scale > 0)


def test_tdds_does_not_see_what_is_added_to_all_logits() -> None:
    """Recorded logits are less the largest of their row."""
    z = np.random.default_rng(0).normal(size=(6, 9, 5))
    moved = z - z.max(2, keepdims=True)
    assert compute("tdds", of_logits(moved)).tolist() == pytest.approx(compute("tdds", of_logits(z)).tolist(), rel=1e-12)


def test_tdds_reads_each_epoch_once_and_two_at_a_time() -> None:
    z = np.random.default_rng(0).normal(size=(8, 5, 3))
    read: list[int] = []

    def logits(epoch: int) -> NDArray[np.floating]:
        read.append(epoch)
        return z[epoch]

    compute("tdds", replace(of_logits(z), logits=logits), epochs=6)
    assert read == [0, 1, 2, 3, 4, 5]


def test_tdds_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    past = made(5, 23, 4)
    whole = compute("tdds", past)
    monkeypatch.setattr("kdprune_data.scores.dynamics.BLOCK", 12)
    assert np.array_equal(compute("tdds", past), whole)


def test_tdds_without_logits_says_where_they_come_from() -> None:
    with pytest.raises(UsageError, match="tdds needs whole logits: make the teacher with --record logits"):
        compute("tdds", replace(made(3, 2), logits=None))


@pytest.mark.parametrize("name", FROM_DYNAMICS)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_too_few_epochs_are_refused(name: str, t: int) -> None:
    """One number has no deviation; a score of zeros would be a random one that does not say so."""
    score = FROM_DYNAMICS[name]
    if t >= score.least:
        assert np.isfinite(compute(name, made(t, 4))).all()
    else:
        with pytest.raises(SourceError, match=f"{name} needs {score.least} recorded epochs or more, not {t}"):
            compute(name, made(t, 4))


@pytest.mark.parametrize("name", FROM_DYNAMICS)
def test_samples_do_not_see_one_another(name: str) -> None:
    """To the last bit: in another order, in parts, alone."""
    past = made(35, 20)
    assert past.logits is not None
    whole, logits = compute(name, past), past.logits
    for places in (np.random.default_rng(0).permutation(20), np.arange(7), np.array([3])):
        part = History(
            past.correct[:, places],
            past.logit_margin[:, places],
            past.p_true[:, places],
            lambda epoch, places=places: logits(epoch)[places],  # type: ignore[misc]
        )
        assert np.array_equal(compute(name, part), whole[places])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("forgetting", {"never": "sometimes"}),
        ("p_true", {"epochs": 0}),
        ("dyn_unc", {"window": 1}),
        ("dual", {"epochs": 1}),
        ("tdds", {"window": 2}),
        ("tdds", {"epochs": 2}),
        ("tdds", {"decay": 0.0}),
        ("tdds", {"decay": 1.5}),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FROM_DYNAMICS[name].settings(**settings)


def test_settings_from_texts() -> None:
    found = FROM_DYNAMICS["tdds"].settings.parse("tdds", {"window": "5", "decay": "0.5", "epochs": "auto"})
    assert found.own() == {"epochs": None, "window": 5, "decay": 0.5}
