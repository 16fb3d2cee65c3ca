"""`--dry-run`: what would be made, told without touching anything; and the progress of what is then done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kdprune_pipelines import _console, _estimate

from kdprune_data.errors import SourceError
from kdprune_data.formats.manifest import Manifest

Cli = Callable[..., Any]
SUBSET = "subsets/random-0.5-s0"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path: when it was last changed and how large it is."""
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


LINES: list[tuple[list[str], str, dict[str, int]]] = [
    (["select", "--frac", "0.7"], "new", {"sample": 76, "shard": 1}),
    (["select", "--frac", "0.7", "--shard-samples", "20", "--method", "el2n"], "new", {"sample": 76, "shard": 4}),
    (["select", "--frac", "0.7", "--ids-only", "--name", "ids"], "new", {"sample": 76}),
    (["select", "--frac", "0.5", "--shard-samples", "30"], "finished", {"sample": 54, "shard": 2}),
    (["select", "--frac", "0.5", "--overwrite"], "replaced", {"sample": 54, "shard": 1}),
    (["score", "--name", "other", "--embedding"], "new", {"sample": 108, "shard": 3}),
    (["score", "--embedding", "--logits"], "finished", {"sample": 108, "shard": 3}),
    (["cache", "data/train", "--views", "4"], "new", {"sample": 108, "view": 4}),
    (["cache", "--views", "5"], "grown", {"sample": 54, "view": 2}),
    (["cache", "--views", "2"], "finished", {"sample": 54, "view": 0}),
]


@pytest.mark.parametrize(("line", "state", "counts"), LINES, ids=[" ".join(line) for line, _, _ in LINES])
def test_a_dry_run_tells_and_touches_nothing(chain: Path, kdprune: Cli, line: list[str], state: str, counts: dict[str, int]) -> None:
    before = tree(chain)
    ran = kdprune(*line, "--dry-run", "--json", cwd=chain)
    assert ran.code == 0, ran.err
    assert tree(chain) == before
    found = json.loads(ran.out)
    assert (found["state"], found["counts"]) == (state, counts)
    assert (found["bytes"] > 0, found["seconds"] >= 0) == (state != "finished", True)
    text = kdprune(*line, "--dry-run", cwd=chain).out
    assert (_estimate.STATES[state] in text, "1 samples" in text) == (True, False)


def test_a_dry_run_refuses_what_the_run_would(chain: Path, kdprune: Cli) -> None:
    before = tree(chain)
    for line in (["select", "--frac", "0.5"], ["score"], ["cache", "--dtype", "float32"], ["cache", "--pad", "9"]):
        refused = kdprune(*line, "--dry-run", cwd=chain)
        assert refused.code == 2, line
        assert "settings" in refused.err or "--pad 9 is too large" in refused.err
    assert tree(chain) == before


def test_what_was_told_is_what_is_made(chain_copy: Path, kdprune: Cli) -> None:
    """The tars to the byte; logits and scores within the headers of their files."""
    told = {}
    lines = [["select", "--frac", "0.7"], ["score", "--name", "x", "--embedding"], ["cache", "data/train", "--views", "40"]]
    for line in lines:
        told[line[0]] = json.loads(kdprune(*line, "--dry-run", "--json", cwd=chain_copy).out)
        assert kdprune(*line, cwd=chain_copy).code == 0
    for found in told.values():
        made = Manifest.load(chain_copy / found["folder"])
        size = sum(f.bytes for f in made.files)
        assert 0.5 * size < found["bytes"] < 1.5 * size, found
    tars = sum(f.bytes for f in Manifest.load(chain_copy / told["select"]["folder"]).files if f.path.endswith(".tar"))
    tables = told["select"]["bytes"] - tars
    assert 0 < tables < 40_000


def worked(each: list[tuple[int, float]]) -> Iterator[int]:
    for units, seconds in each:
        time.sleep(seconds)
        yield units


@pytest.mark.parametrize(
    ("each", "total", "least", "most"),
    [
        ([(10, 0.2), (10, 0.02), (10, 0.02), (10, 0.02)], 1000, 1.9, 3.2),  # the first warms up
        ([(10, 0.02), (10, 0.02), (4, 0.5), (10, 0.02), (10, 0.02), (4, 0.01)], 1000, 1.9, 3.2),  # so does the first of another length
        ([(10, 0.3), (10, 0.02), (10, 0.02)], 1000, 1.9, 3.2),
        ([(10, 0.3), (4, 0.04)], 100, 0.9, 1.4),
        ([(1, 0.01), (2, 0.02), (3, 0.03), (4, 0.04), (5, 0.05)], 100, 1.0, 1.3),  # lengths that all differ
        ([(10, 0.05)], 100, 0.5, 0.8),
        ([(10, 0.05), (0, 0.0)], 100, 0.5, 0.8),
        ([], 100, 0.0, 0.0),
    ],
)
def test_measure(each: list[tuple[int, float]], total: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_estimate, "MOST_SECONDS", 0.25)  # what warms up may take longer
    assert least <= _estimate.measure(worked(each), total) <= most


def test_measure_growing_goes_by_the_largest() -> None:
    found = _estimate.measure_growing(worked([(1, 0.1), (2, 0.1), (4, 0.04), (4, 0.04)]), 100)
    assert 1.0 <= found <= 1.5
    assert _estimate.measure_growing(worked([(1, 3.1), (1, 0.01), (2, 0.02), (4, 0.04)]), 100) < 2.5  # a slow start is no slow machine
    assert _estimate.measure_growing(worked([]), 100) == 0.0


@pytest.mark.parametrize("measure", [_estimate.measure, _estimate.measure_growing])
def test_measuring_ends_in_time(measure: Callable[[Iterator[int], int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_estimate, "MOST_SECONDS", 0.2)
    began = time.monotonic()
    assert measure(worked([(1, 0.05)] * 1000), 10_000) > 100
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(("rows", "batch", "sizes"), [(20, 8, [1, 1, 2, 4, 8, 4]), (3, 8, [1, 1, 1]), (5, 1, [1] * 5), (0, 4, [])])
def test_growing_parts(rows: int, batch: int, sizes: list[int]) -> None:
    parts = list(_estimate.growing(np.arange(rows), batch))
    assert [len(p) for p in parts] == sizes
    assert [int(n) for p in parts for n in p] == list(range(rows))


@pytest.mark.parametrize(
    ("line", "total", "steps"),
    [(["score", "--name", "x", "--batch", "10"], 108, 11), (["cache", SUBSET, "--batch", "10", "--views", "4", "--name", "x"], 216, 24)],
)
def test_progress_moves_with_every_batch(
    chain_copy: Path, kdprune: Cli, line: list[str], total: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_console, "EVERY", 0.0)
    ran = kdprune(*line, cwd=chain_copy)
    assert ran.code == 0, ran.err
    moves = [one for one in ran.err.splitlines() if f" of {total} " in one]
    assert len(moves) >= steps, ran.err
    assert "100%" in moves[-1]


def test_a_resumed_run_shows_what_is_there(chain_copy: Path, kdprune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the last shard are made to give no finite score: the first two shards stay finished."""
    from kdprune_pipelines import _scoring

    monkeypatch.setattr(_console, "EVERY", 0.0)
    whole = _scoring._check_finite

    def refuse(scorer: Any, columns: Any, rows: Any) -> None:
        if scorer.images.data.shards[rows[0]] == 2:
            raise SourceError("interrupted")
        whole(scorer, columns, rows)

    monkeypatch.setattr(_scoring, "_check_finite", refuse)
    assert kdprune("score", "--name", "x", cwd=chain_copy).code == 1
    monkeypatch.setattr(_scoring, "_check_finite", whole)
    ran = kdprune("score", "--name", "x", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert [one.split(",")[0] for one in ran.err.splitlines() if " of 108 " in one] == ["score: 100% (108 of 108 samples)"]
