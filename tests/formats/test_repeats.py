"""Numbers that come twice, and the hashes of ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdprune_data import order
from kdprune_data.formats import blake, repeats
from kdprune_data.selectors.parts import in_turn

LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 300]


def texts(*, mixed: bool) -> list[list[str]]:
    """Ids of one length, or of all lengths together, some of characters that take several bytes."""
    if mixed:
        return [[f"{'ä€' * n}{n:0{size}d}"[:size] for size in LENGTHS for n in range(50)]]
    return [[f"{n:0{size}d}"[-size:] if size else "" for n in range(50)] for size in LENGTHS]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_uids_are_those_of_single_ids(monkeypatch: pytest.MonkeyPatch, mixed: bool, kind: pa.DataType) -> None:
    monkeypatch.setattr(blake, "BLOCK", 64)
    for ids in texts(mixed=mixed):
        column = pa.array(ids).cast(kind)
        assert np.array_equal(blake.uids(column), order.uids_of(ids))
        assert np.array_equal(blake.uids(column.slice(3, 40)), order.uids_of(ids[3:43]))
    assert len(blake.uids(pa.array([], kind))) == 0


def test_uids_of_numbers_are_those_of_their_texts() -> None:
    assert np.array_equal(blake.uids(pa.array([7, -12, 10**15])), order.uids_of(["7", "-12", "1000000000000000"]))


@pytest.mark.parametrize("mixed", [False, True])
def test_hashes_tell_ids_apart(monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    """Equal ids have equal ones wherever they stand, different ids here different ones."""
    monkeypatch.setattr(repeats, "STEP", 32)
    for ids in texts(mixed=mixed):
        found = repeats.hashes(pa.array(ids)).tolist()
        assert len({*zip(ids, found, strict=True)}) == len({*found}) == len({*ids})
        assert repeats.hashes(pa.array([*ids[1:], *ids]).slice(5)).tolist() == [*found[6:], *found]


def test_what_comes_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several pieces, with few buckets and with many, and with more than two of a kind."""
    rng = np.random.default_rng(0)
    for case in range(60):
        monkeypatch.setattr(repeats, "BUCKET", int(rng.choice([1, 16, 1 << 17])))
        numbers = rng.integers(0, 2**64, int(rng.choice([0, 1, 50, 3000])), np.uint64, endpoint=False)
        if case % 2 and len(numbers) > 1:
            numbers[rng.integers(0, len(numbers), 9)] = numbers[rng.integers(0, len(numbers), 9)]
        if case % 5 == 0:
            numbers[: len(numbers) // 2] = 5
        with repeats.spool(tmp_path) as file:
            seen = repeats.Repeats(file, len(numbers))
            for piece in np.array_split(numbers, int(rng.integers(1, 5))):
                seen.add(*seen.sort(piece))
            found = seen.find(lambda work, n: in_turn(work, n, 2))
        values, counts = np.unique(numbers, return_counts=True)
        assert np.array_equal(found, values[counts > 1])
    assert list(tmp_path.iterdir()) == []
