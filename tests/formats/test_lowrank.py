"""The coded form of logits: what is decoded is near, the same on any machine, and as near as was asked."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from kdprune_data.errors import KdpruneError
from kdprune_data.formats import lowrank, rounding
from kdprune_data.formats.lowrank import Codebook
from kdprune_data.formats.rounding import Rounding

Logits = np.ndarray


@pytest.fixture(scope="module")
def logits() -> Logits:
    """Four views of 300 samples, 40 classes: near a space of six dimensions, the views of a sample near one another."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(6, 40))
    own, apart = random.normal(size=(300, 6)) * 2, random.normal(size=(4, 300, 6)) * 0.4
    return ((own + apart) @ directions + random.normal(size=40) + 0.02 * random.normal(size=(4, 300, 40))).astype(np.float32)


def again(book: Codebook, logits: Logits, by: Codebook | Rounding | None = None) -> Logits:
    """Coded and decoded, each number rounded by itself, or by a rounding."""
    base = book.base_of(lowrank.centre(logits).mean(0))
    round_ = book.residual_of if by is None else partial(by.residual_of, book)
    return np.stack([book.decode(base, round_(view, base)) for view in logits])


@pytest.mark.parametrize("bound", [0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("temperatures", [(4.0,), (1.0, 2.0, 4.0)])
def test_others_are_as_near_as_was_asked(logits: Logits, bound: float, temperatures: tuple[float, ...]) -> None:
    space = lowrank.fit(logits[:, :100])
    code = rounding.coarsest(space, logits[:, 100:200], multiple=2, bound=bound, temperatures=temperatures)
    assert max(code.kl.values()) <= bound
    others = logits[:, 200:]
    found = again(code.book, others, code.rounding)
    assert max(lowrank.mean_kl(others, found, tau) for tau in temperatures) < 1.5 * bound


def test_a_coarser_bound_takes_fewer_directions_or_bits(logits: Logits) -> None:
    space = lowrank.fit(logits[:, :100])

    def numbers(bound: float) -> int:
        code = rounding.coarsest(space, logits[:, 100:], multiple=2, bound=bound, temperatures=[1.0])
        base = code.book.base_of(lowrank.centre(logits).mean(0))
        return sum(int(np.count_nonzero(code.rounding.residual_of(code.book, view, base))) for view in logits)

    assert numbers(0.1) < numbers(1e-2) < numbers(1e-4)


def test_decoding_is_the_sum_of_whole_numbers() -> None:
    """Against the definition, with Python's integers."""
    random = np.random.default_rng(1)
    vectors = random.integers(-1024, 1025, (4, 5)).astype(np.int32)
    book = Codebook(vectors, 0.37, 4)
    base, residual = random.integers(-300, 300, (7, 3)).astype(np.int16), random.integers(-127, 128, (7, 3)).astype(np.int8)
    found = book.decode(base, residual)
    for n in range(7):
        t = [int(base[n, k]) + 4 * int(residual[n, k]) for k in range(3)]
        whole = [int(vectors[0, c]) + sum(t[k] * int(vectors[k + 1, c]) for k in range(3)) for c in range(5)]
        assert found[n].tolist() == [float(np.float32(w - max(whole)) * np.float32(0.37 / 1024)) for w in whole]
    assert found.dtype == np.float32
    assert (found.max(1) == 0).all()


@pytest.mark.parametrize("scale", [1, 30_000])
def test_order_of_rows_and_width_of_numbers_change_no_bit(logits: Logits, scale: int) -> None:
    """Large numbers are summed in float64, others in float32: both exactly, so a batch decodes as the whole does."""
    book = lowrank.fit(logits).codebook(0.5, 2)
    base = np.clip(book.base_of(lowrank.centre(logits).mean(0)).astype(np.int64) * scale, -32767, 32767).astype(np.int16)
    residual = book.residual_of(logits[0], book.base_of(lowrank.centre(logits).mean(0)))
    whole = book.decode(base, residual)
    at = np.random.default_rng(2).permutation(len(base))
    assert np.array_equal(whole[at], book.decode(base[at], residual[at]))
    assert np.array_equal(whole[5:6], book.decode(base[5:6], residual[5:6]))
    wide = base.astype(np.int64) + 2 * residual.astype(np.int64)
    exact = wide @ book.vectors[1:].astype(np.int64) + book.vectors[0]
    exact -= exact.max(1, keepdims=True)
    assert np.array_equal(whole, exact.astype(np.float32) * np.float32(book.step / 1024))


def test_shifting_all_logits_of_a_row_changes_nothing(logits: Logits) -> None:
    book = lowrank.fit(logits).codebook(0.5, 2)
    base = book.base_of(lowrank.centre(logits).mean(0))
    assert np.array_equal(book.residual_of(logits[0], base), book.residual_of(logits[0] + 64, base))


@pytest.mark.parametrize(("n", "classes"), [(3, 50), (1, 7), (40, 2), (16, 3)])
def test_few_samples_or_many_classes(n: int, classes: int) -> None:
    """Fewer vectors than classes, and the smallest problems there are."""
    z = np.random.default_rng(3).normal(size=(2, n, classes)).astype(np.float32)
    space = lowrank.fit(z)
    assert np.allclose(space.directions @ space.directions.T, np.eye(len(space.directions)), atol=1e-6)
    found = again(space.codebook(0.05, 2), z)
    assert found == pytest.approx(z - z.max(2, keepdims=True), abs=0.2)


def test_what_nothing_keeps_within_is_refused(logits: Logits) -> None:
    with pytest.raises(KdpruneError, match=r"no code keeps KL within 1e-12 at temperature 1 \(the best has .*\): leave out --fidelity"):
        rounding.coarsest(lowrank.fit(logits[:, :5]), logits[:, 5:], multiple=2, bound=1e-12, temperatures=[1.0])


def test_kl_is_that_of_its_definition() -> None:
    full, stored = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.25, 0.5]]))
    assert lowrank.mean_kl(full, stored, 1) == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    flat = np.sqrt([0.5, 0.25, 0.25]) / np.sqrt([0.5, 0.25, 0.25]).sum()
    other = np.sqrt([0.25, 0.25, 0.5]) / np.sqrt([0.25, 0.25, 0.5]).sum()
    assert lowrank.mean_kl(full, stored, 2) == pytest.approx((flat * np.log(flat / other)).sum())


# --- rounding


def test_numbers_that_are_moved_cost_less(logits: Logits) -> None:
    """By the very cost that is aimed at, of KL and bits; and fewer bits at no more KL than with a step that makes KL alike."""
    temperatures, price = (1.0, 2.0, 4.0), 1e-3
    book = lowrank.fit(logits).codebook(0.6, 2)
    base = book.base_of(lowrank.centre(logits).mean(0))
    plain = [book.residual_of(view, base) for view in logits]
    by = Rounding.learn(plain, temperatures, price)
    moved = [by.residual_of(book, view, base) for view in logits]

    def cost(residuals: list[np.ndarray]) -> tuple[float, float]:
        stored = np.stack([book.decode(base, r) for r in residuals])
        kl = sum(lowrank.mean_kl(logits, stored, tau) for tau in temperatures)
        table = by.bits()
        return kl, float(np.mean([table[np.arange(book.directions), np.abs(r.astype(int))].sum(1).mean() for r in residuals]))

    (kl_plain, bits_plain), (kl_moved, bits_moved) = cost(plain), cost(moved)
    assert kl_moved + price * bits_moved < kl_plain + price * bits_plain
    assert bits_moved < bits_plain


def test_no_single_move_would_be_better(logits: Logits) -> None:
    """Against KL itself, not its second order: after the sweeps hardly a number is left that one step would improve."""
    temperatures, price = (1.0, 4.0), 1e-3
    few = logits[:, :12]
    book = lowrank.fit(logits).codebook(0.5, 2)
    base = book.base_of(lowrank.centre(few).mean(0))
    by = Rounding.learn([book.residual_of(view, base) for view in few], temperatures, price)
    moved = by.residual_of(book, few[0], base)
    table = by.bits()

    def cost(residual: np.ndarray) -> np.ndarray:
        stored = book.decode(base, residual)
        kl = np.sum([lowrank.kl(few[0], stored, tau) for tau in temperatures], 0)
        return kl + price * table[np.arange(book.directions), np.abs(residual.astype(int))].sum(1)

    now, better = cost(moved), 0
    for k in range(book.directions):
        for step in (-1, 1):
            other = moved.copy()
            other[:, k] += step
            better += int((cost(other) < now - 1e-3).sum())
    assert better <= 0.02 * moved.size


def test_rows_are_rounded_alone(logits: Logits) -> None:
    book = lowrank.fit(logits).codebook(0.5, 2)
    base = book.base_of(lowrank.centre(logits).mean(0))
    by = Rounding.learn([book.residual_of(view, base) for view in logits], [1.0, 2.0], 1e-3)
    whole = by.residual_of(book, logits[0], base)
    assert np.mean(whole[50:100] != by.residual_of(book, logits[0][50:100], base[50:100])) < 1e-3


def test_a_rounding_is_kept_as_json(logits: Logits) -> None:
    book = lowrank.fit(logits).codebook(0.5, 2)
    base = book.base_of(lowrank.centre(logits).mean(0))
    by = Rounding.learn([book.residual_of(logits[0], base)], [1.0, 2.0], 1e-3)
    again_ = Rounding.of_json(json.loads(json.dumps(by.to_json())), [1.0, 2.0])
    assert np.array_equal(by.residual_of(book, logits[1], base), again_.residual_of(book, logits[1], base))
