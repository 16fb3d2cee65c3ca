"""formats/blocks.py: runs of bytes, whatever lies between them, are in a block what they are in their shards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kdprune_data.errors import SourceError
from kdprune_data.formats.blocks import BYTES, NEAR, Reader, Runs

SHARDS = (4 * BYTES // 512, 1024, 300)
"""Tar blocks of each."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    paths = [folder / f"{n}.tar" for n in range(len(SHARDS))]
    for path, blocks in zip(paths, SHARDS, strict=True):
        path.write_bytes(rng.bytes(512 * blocks))
    return paths


def runs_of(*places: tuple[int, int, int]) -> Runs:
    """From (shard, start, end), in tar blocks."""
    shards, starts, ends = np.array(places, np.int64).reshape(-1, 3).T
    return Runs.of(shards.astype(np.int32), starts * 512, ends * 512)


def drawn(seed: int, mean: int, apart: int) -> Runs:
    """Runs of about so many blocks, about so many apart, over all shards."""
    rng, found = np.random.default_rng(seed), []
    for shard, blocks in enumerate(SHARDS):
        at = 0
        while (start := at + int(rng.integers(0, 2 * apart + 1))) < blocks:
            at = min(start + 1 + int(rng.integers(0, 2 * mean)), blocks)
            found.append((shard, start, at))
    return runs_of(*found)


near, block = NEAR // 512, BYTES // 512
CASES = [
    *(drawn(seed, mean, apart) for seed, (mean, apart) in enumerate([(2, 2), (5, 0), (1, 40), (200, 3), (3, 200), (300, 300), (4000, 9)])),
    runs_of((0, 0, 1)),
    runs_of((0, 0, SHARDS[0]), (1, 1023, 1024), (2, 0, 300)),  # larger than any buffer
    runs_of((0, 0, 1), (0, 1 + near, 2 + near), (0, 3 + 2 * near, 9 + 2 * near)),  # one call for two of them, another for the third
    runs_of((0, 0, 1), (0, 2, 3 + 2 * block), (0, 3 + 2 * block, 5 + 3 * block)),
    runs_of((0, 5, 5), (0, 5, 6), (1, 0, 0), (1, 7, 9)),  # empty ones
]


@pytest.mark.parametrize("n", range(len(CASES)))
def test_a_block_holds_the_runs_one_behind_another(shards: list[Path], n: int) -> None:
    runs, whole = CASES[n], [path.read_bytes() for path in shards]
    wanted = b"".join(whole[s][a:b] for s, a, b in zip(runs.shards.tolist(), runs.starts.tolist(), runs.ends.tolist(), strict=True))
    assert Reader(shards).read(runs).tobytes() == wanted


def test_buffers_are_used_again_but_never_for_two_blocks(shards: list[Path]) -> None:
    reader = Reader(shards)
    first, second = (reader.read(case) for case in (CASES[2], CASES[4]))
    wanted = second.tobytes()
    reader.release(first)
    third = reader.read(CASES[7])
    assert np.shares_memory(first, third)
    assert second.tobytes() == wanted
    with ThreadPoolExecutor(4) as threads:
        found = [one.tobytes() for one in threads.map(reader.read, CASES * 5)]
    assert found == [Reader(shards).read(case).tobytes() for case in CASES] * 5


def test_shards_that_are_not_as_long_or_not_there(shards: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "short.tar"
    short.write_bytes(shards[2].read_bytes()[: 512 * 299 + 100])
    assert Reader([short]).read(runs_of((0, 0, 299))).tobytes() == short.read_bytes()[: 512 * 299]
    for runs in (runs_of((0, 0, 300)), runs_of((0, 0, 2), (0, 298, 300)), runs_of((0, 400, 401))):
        with pytest.raises(EOFError):
            Reader([short]).read(runs)
    with pytest.raises(SourceError, match=r"gone.tar does not exist: it may have been moved; fetch it"):
        Reader([tmp_path / "gone.tar"]).read(runs_of((0, 0, 1)))
