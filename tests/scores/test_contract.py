"""What holds of every score of every table: its shape and type, that it is finite, that no sample's depends on the others' order or number,
and that what it was given is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.formats.scores import SCORES
from kdprune_data.scores import FROM_DYNAMICS, FROM_EMBEDDING, FROM_OUTPUTS, Embedded, History, Outputs

N, C, D, T = 40, 6, 5, 12
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(T, N, C)).astype(np.float32) * 4
LABELS = RANDOM.integers(C, size=N)
VECTORS = RANDOM.normal(size=(N, D)).astype(np.float32)
UIDS = order.uids_of(f"sample-{n}" for n in range(N))
P = np.exp(LOGITS) / np.exp(LOGITS).sum(2, keepdims=True)
GIVEN = (LOGITS, LABELS, VECTORS, UIDS, P)
NAMES = [*FROM_OUTPUTS, *FROM_DYNAMICS, *FROM_EMBEDDING]
ONE_BY_ONE = [*FROM_OUTPUTS, *FROM_DYNAMICS]
"""Scores of a sample that look at no other."""


def score(name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """A score with its default settings of some of the samples."""
    if name in FROM_OUTPUTS:
        z, y, h = (torch.from_numpy(a[rows]) for a in (LOGITS[-1], LABELS, VECTORS))
        return np.asarray(FROM_OUTPUTS[name](Outputs(z, y, h)).numpy())
    if name in FROM_DYNAMICS:
        p_true = P[:, rows, LABELS[rows]]
        past = History(p_true > 0.5, np.log(p_true), p_true, lambda epoch: LOGITS[epoch, rows])
        return FROM_DYNAMICS[name].compute(past, FROM_DYNAMICS[name].settings())
    data = Embedded(UIDS[rows], LABELS[rows].astype(np.int32), VECTORS[rows])
    return FROM_EMBEDDING[name].compute(data, FROM_EMBEDDING[name].settings())


def same(name: str) -> Callable[[NDArray[np.float64], NDArray[np.float64]], bool]:
    """Outputs are torch's, whose last bits may follow the shape of a batch; the others are equal to the last bit."""
    return np.array_equal if name not in FROM_OUTPUTS else lambda a, b: np.allclose(a, b, rtol=1e-14, atol=1e-15)


def test_every_score_of_the_code_has_a_meaning() -> None:
    assert set(NAMES) == set(SCORES) - {"grand_full"}


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_type(name: str) -> None:
    """float64 of shape (n,), finite, and not all the same; the inputs as they were."""
    before = [array.copy() for array in GIVEN]
    found = score(name, np.arange(N))
    assert (found.shape, found.dtype) == ((N,), np.float64)
    assert np.isfinite(found).all()
    assert len(set(found.tolist())) > 1
    assert all(np.array_equal(a, b) for a, b in zip(before, GIVEN, strict=True))
    assert score(name, np.arange(1)).shape == (1,)


@pytest.mark.parametrize("name", NAMES)
def test_order(name: str) -> None:
    places = np.random.default_rng(1).permutation(N)
    assert same(name)(score(name, places), score(name, np.arange(N))[places])


@pytest.mark.parametrize("name", ONE_BY_ONE)
@pytest.mark.parametrize("size", [1, 7, N])
def test_batches(name: str, size: int) -> None:
    """In batches of 7 the last one holds 5: its scores are no larger for it."""
    parts = [score(name, np.arange(at, min(at + size, N))) for at in range(0, N, size)]
    assert same(name)(np.concatenate(parts), score(name, np.arange(N)))
