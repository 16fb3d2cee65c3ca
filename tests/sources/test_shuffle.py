"""sources/shuffle.py: the order of the hash, whatever the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdprune_data import order
from kdprune_data.errors import SourceError
from kdprune_data.sources.base import Item
from kdprune_data.sources.shuffle import Shuffle, chunks


def some(n: int) -> list[Item]:
    rng = np.random.default_rng(n)
    labels = [None, *range(9)]
    return [Item(f"cats/{i}", rng.bytes(int(rng.integers(0, 400))), labels[i % 10], f"ünder/{i}.jpg") for i in range(n)]


def shuffled(items: list[Item], scratch: Path, *, memory: int, seed: int = 0) -> tuple[list[Item], Shuffle]:
    shuffle = Shuffle(scratch, seed=seed, memory=memory, expected_bytes=sum(len(i.data) for i in items))
    shuffle.collect(iter(items))
    return list(shuffle), shuffle


@pytest.mark.parametrize("memory", [10**9, 500_000, 20_000, 3_000])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("n", [0, 1, 999, 1001, 2500])
def test_the_order_is_the_hashs_whatever_the_memory(tmp_path: Path, n: int, seed: int, memory: int) -> None:
    items = some(n)
    found, shuffle = shuffled(items, tmp_path / "spool", memory=memory, seed=seed)
    hashes = order.order_hash(order.uids_of(i.key for i in items), seed, "import").tolist()
    assert found == [item for _, item in sorted(zip(hashes, items, strict=True), key=lambda one: one[0])]
    assert shuffle.uids.tolist() == order.uids_of(i.key for i in items).tolist()
    assert (tmp_path / "spool").exists() == (n > 0 and 3 * sum(len(i.data) for i in items) >= memory)
    assert not list(tmp_path.glob("spool/*"))  # read once, gone


def test_a_bucket_that_does_not_fit_is_spooled_again(tmp_path: Path) -> None:
    """Two levels and, for a few, three, of at most 128 files each; the deeper are seen while they are read."""
    items = some(2500)
    hashes = order.order_hash(order.uids_of(i.key for i in items), 0, "import").tolist()
    shuffle = Shuffle(tmp_path / "spool", seed=0, memory=3_000, expected_bytes=sum(len(i.data) for i in items))
    shuffle.collect(items)
    assert len(list(tmp_path.glob("spool/*"))) == 128
    names: set[str] = set()
    found = []
    for item in shuffle:
        found.append(item)
        names |= {p.name for p in tmp_path.glob("spool/*")}
    assert found == [item for _, item in sorted(zip(hashes, items, strict=True), key=lambda one: one[0])]
    assert {name.count("-") for name in names} >= {1, 2}
    assert not list(tmp_path.glob("spool/*"))


@pytest.mark.parametrize("memory", [10**9, 1000])
def test_two_with_one_key_are_refused_naming_both(tmp_path: Path, memory: int) -> None:
    items = [*some(500), Item("cats/7", b"other", 3, "elsewhere/7.png")]
    with pytest.raises(SourceError) as caught:
        shuffled(items, tmp_path, memory=memory)
    assert str(caught.value) == "ünder/7.jpg and elsewhere/7.png have the same key 'cats/7': rename one"


@pytest.mark.parametrize(("n", "lengths"), [(0, []), (1, [1]), (1000, [1000]), (2001, [1000, 1000, 1])])
def test_chunks(n: int, lengths: list[int]) -> None:
    found = list(chunks(Item(str(i), b"", None, "") for i in range(n)))
    assert [len(chunk) for chunk in found] == lengths
    assert [item.key for chunk in found for item in chunk] == [str(i) for i in range(n)]
