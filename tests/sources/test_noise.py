"""sources/noise.py: exactly so many labels, each to another class, each as likely; the formula of docs/formats.md."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from kdprune_data import order
from kdprune_data.errors import UsageError
from kdprune_data.sources.noise import noise_rate, with_noise

MASK = (1 << 64) - 1


def some(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n + classes)
    return rng.integers(0, 1 << 64, n, dtype=np.uint64), rng.integers(0, classes, n).astype(np.int32)


def mix(x: int) -> int:
    """Plain Python, from the page."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("rate", ["0", "0.1", "0.333", "0.5", "1"])
def test_exactly_so_many_change_and_all_to_another_class(rate: str, classes: int) -> None:
    uids, labels = some(1005, classes)
    labels[::10] = -1
    noisy = with_noise(uids, labels, classes=classes, rate=Decimal(rate), seed=3)
    assert (noisy != labels).sum() == order.keep_count(Decimal(rate), 904)
    assert (noisy[::10] == -1).all()
    assert noisy.max() < classes
    assert noisy.dtype == np.int32


def test_the_formula_of_the_page() -> None:
    uids, labels = some(50, 7)
    noisy = with_noise(uids, labels, classes=7, rate=Decimal("0.4"), seed=5)
    hashes = order.order_hash(uids, 5, "label-noise").tolist()
    for n in sorted(range(50), key=lambda n: hashes[n])[:20]:
        unit = (mix(hashes[n]) >> 11) / 2**53
        assert noisy[n] == (labels[n] + 1 + int(unit * 6)) % 7


def test_every_other_class_is_as_likely() -> None:
    uids, _ = some(60_000, 7)
    noisy = with_noise(uids, np.full(60_000, 2, np.int32), classes=7, rate=Decimal(1), seed=0)
    counts = np.bincount(noisy, minlength=7)
    assert counts[2] == 0
    assert abs(np.delete(counts, 2) - 10_000).max() < 400  # 4.4 standard deviations


@pytest.mark.parametrize("seed", [0, 1])
def test_rates_are_nested_and_seeds_differ(seed: int) -> None:
    uids, labels = some(1000, 10)
    few, many = (with_noise(uids, labels, classes=10, rate=Decimal(rate), seed=seed) for rate in ("0.1", "0.3"))
    changed = few != labels
    assert (few[changed] == many[changed]).all()
    assert (with_noise(uids, labels, classes=10, rate=Decimal("0.1"), seed=seed + 1) != few).any()


@pytest.mark.parametrize(
    ("text", "classes", "says"),
    [
        ("1.01", 10, "--label-noise 1.01 is out of range: give the share of labels to change, from 0 to 1"),
        ("-0.1", 10, "is out of range"),
        ("nan", 10, "is out of range"),
        ("half", 10, "--label-noise 'half' is not a number"),
        ("0.1", 1, "--label-noise needs at least 2 classes, the source has 1"),
    ],
)
def test_rates_that_are_none(text: str, classes: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        noise_rate(text, classes)
    assert says in str(caught.value)
