"""scores/dynamics.py: histories worked out by hand, and every score against a slow count."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kdprune_data.scores import FROM_DYNAMICS, History


def history(rows: list[str], margins: list[list[float]] | None = None) -> History:
    """One text per sample, a letter per epoch: `+` right, `-` wrong."""
    correct = np.array([[letter == "+" for letter in row] for row in rows], bool).T
    given = np.zeros(correct.shape) if margins is None else np.array(margins).T
    return History(correct, given.astype(np.float32))


def test_forgetting_by_hand() -> None:
    """Learned and kept: 0. Learned, lost twice: 2. Never learned: the number of presentations, the hardest there is."""
    found = FROM_DYNAMICS["forgetting"](history(["--++++", "+-+-++", "------"]))
    assert found.tolist() == [0, 2, 6]


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
    assert FROM_DYNAMICS["forgetting"](history([row])).tolist() == [expected]


def test_never_learned_is_harder_than_any_that_was() -> None:
    """Many copies of the paper's code give such samples 0, the easiest, and so throw the mislabelled away unnoticed."""
    worst = "+-" * 10
    found = FROM_DYNAMICS["forgetting"](history([worst, "-" * 20]))
    assert found[1] > found[0]


def test_aum_and_correct_by_hand() -> None:
    past = history(["++-", "---"], [[1.0, 2.0, -6.0], [-0.5, -0.25, 0.0]])
    assert FROM_DYNAMICS["aum"](past).tolist() == [-1.0, -0.25]
    assert FROM_DYNAMICS["correct"](past).tolist() == pytest.approx([2 / 3, 0])


@pytest.mark.parametrize(("t", "n"), [(1, 1), (1, 5), (2, 30), (25, 200)])
def test_against_a_slow_count(t: int, n: int) -> None:
    random = np.random.default_rng([t, n])
    past = History(random.random((t, n)) < 0.6, random.normal(size=(t, n)).astype(np.float32))
    found = {name: score(past) for name, score in FROM_DYNAMICS.items()}
    for i in range(n):
        right = past.correct[:, i].tolist()
        events = sum(a and not b for a, b in itertools.pairwise(right))
        assert found["forgetting"][i] == (events if any(right) else t)
        assert found["correct"][i] == sum(right) / t
        assert found["aum"][i] == pytest.approx(sum(past.logit_margin[:, i].astype(float)) / t, abs=1e-12)
    assert all(values.shape == (n,) and values.dtype == np.float64 for values in found.values())


def test_aum_of_many_epochs_does_not_lose_small_margins() -> None:
    """A sum in float32 would."""
    margins = np.full((4001, 1), 1e-4, np.float32)
    margins[0] = 4e4
    found = FROM_DYNAMICS["aum"](History(np.ones((4001, 1), bool), margins))
    assert found[0] == pytest.approx((4e4 + 4000 * float(np.float32(1e-4))) / 4001, rel=1e-12)


@pytest.mark.parametrize("name", FROM_DYNAMICS)
def test_samples_do_not_see_one_another(name: str) -> None:
    random = np.random.default_rng(0)
    past = History(random.random((8, 20)) < 0.5, random.normal(size=(8, 20)).astype(np.float32))
    places = random.permutation(20)[:7]
    part = History(past.correct[:, places], past.logit_margin[:, places])
    assert np.array_equal(FROM_DYNAMICS[name](part), FROM_DYNAMICS[name](past)[places])
