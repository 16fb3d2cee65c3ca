"""sources/shuffle.py: the order of the hash, whatever the memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from kdprune_data import order
from kdprune_data.sources.base import Item
from kdprune_data.sources.shuffle import ITEM_BYTES, Numbered, Shuffle, item_bytes, spool, unspool

MEMORIES = [10**9, 500_000, 20_000, 3_000]


def some(n: int) -> list[Item]:
    rng = np.random.default_rng(n)
    labels = [None, *range(9)]
    others = [(), (("json", b"{}"), ("seg.png", rng.bytes(50)))]
    return [Item(f"cats/{i}", rng.bytes(int(rng.integers(0, 400))), labels[i % 10], f"ünder/{i}.jpg", others[i % 2]) for i in range(n)]


def begin(items: list[Item], scratch: Path, *, memory: int, seed: int = 0) -> tuple[Shuffle, list[Numbered]]:
    """A shuffle of the items, and the order that it should give them."""
    hashes = order.order_hash(order.uids_of(i.key for i in items), seed, "import")
    shuffle = Shuffle(scratch, hashes=hashes, memory=memory, expected_bytes=sum(len(i.data) for i in items))
    return shuffle, [(row, items[row]) for row in np.argsort(hashes).tolist()]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("n", [0, 1, 999, 2500])
def test_the_order_is_the_hashs_whatever_the_memory(tmp_path: Path, n: int, seed: int, memory: int) -> None:
    items = some(n)
    shuffle, expected = begin(items, tmp_path / "spool", memory=memory, seed=seed)
    shuffle.collect(enumerate(items))
    assert list(shuffle) == expected
    assert shuffle.spools == (tmp_path / "spool").exists() == (sum(len(i.data) + ITEM_BYTES for i in items) > memory)
    assert not list(tmp_path.glob("spool/*"))  # read once, gone


def test_a_bucket_that_does_not_fit_is_spooled_again(tmp_path: Path) -> None:
    """Two levels and, for a few, three, of at most 128 files each; the deeper are seen while they are read."""
    items = some(2500)
    shuffle, expected = begin(items, tmp_path / "spool", memory=3_000)
    shuffle.collect(enumerate(items))
    assert len(list(tmp_path.glob("spool/*"))) == 128
    names: set[str] = set()
    found = []
    for one in shuffle:
        found.append(one)
        names |= {p.name for p in tmp_path.glob("spool/*")}
    assert found == expected
    assert {name.count("-") for name in names} >= {1, 2}
    assert not list(tmp_path.glob("spool/*"))


def test_what_is_spooled_comes_back() -> None:
    file = io.BytesIO()
    items = some(20)
    for row, item in enumerate(items):
        spool(file, row, item)
    file.seek(0)
    assert list(unspool(file)) == list(enumerate(items))


@pytest.mark.parametrize("n", [1, 2, 2500])
@pytest.mark.parametrize("said", [0, 1000])
def test_a_source_larger_than_it_says_is_spooled_all_the_same(tmp_path: Path, n: int, said: int) -> None:
    """From the item on that does not fit; what was held until then is let go."""
    items = [item._replace(data=item.data * 50) for item in some(n)]
    hashes = order.order_hash(order.uids_of(i.key for i in items), 0, "import")
    shuffle = Shuffle(tmp_path / "spool", hashes=hashes, memory=2_000_000, expected_bytes=said)
    assert not shuffle.spools
    held = shuffle._held
    shuffle.collect(enumerate(items))
    assert shuffle.spools == (sum(map(item_bytes, items)) > 2_000_000)
    assert not shuffle.spools or not held
    assert list(shuffle) == [(row, items[row]) for row in np.argsort(hashes).tolist()]
    assert not list(tmp_path.glob("spool/*"))
