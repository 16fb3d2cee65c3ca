"""Exact class-balanced selection from a table of ids, labels and scores: `kdprune-data pick` beside DuckDB's window and Polars' rank.

Two tables are made, of `--rows` rows in 1,000 classes with ids of 15 characters in no order: one with scores uniform in [0, 1), one with
scores of few values (Poisson with mean 2), where each class is cut among thousands of equal ones. Of both the upper half of each class is
kept, and written with id, label and score. Each method runs in a process of its own, with two threads: seconds of the whole process,
imports in, and its peak of resident memory. The limit reads the same columns and writes as many rows, without choosing. What is kept of
each class, and the sum of the scores kept, are compared. Of equal scores `pick` and DuckDB keep those with the lowest hashes of their ids,
Polars' rank the first in the file, unless it is told otherwise (where few are equal that changes nothing, so it is left out there).
`pick` alone also looks whether an id comes twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import drop, measured, parser, report

CLASSES = 1000
CHUNK = 1_000_000
GOAL = "at most 1 x the faster peer, at most 3,000 MB"


def ours(table: Path, out: Path) -> None:
    from kdprune_cli.main import main

    main(["pick", str(table), "--frac", "0.5", "--column", "score", "--hard", "high", "--out", str(out), "--jobs", "2"])


def duckdb(table: Path, out: Path) -> None:
    import duckdb

    base = duckdb.connect()
    base.execute("SET threads = 2")
    base.execute(f"""
        COPY (
            SELECT id, label, score FROM '{table}'
            QUALIFY row_number() OVER (PARTITION BY label ORDER BY score DESC, hash(id))
                <= floor(0.5 * count(*) OVER (PARTITION BY label) + 0.5)
        ) TO '{out}' (FORMAT parquet)""")


def polars(table: Path, out: Path) -> None:
    os.environ["POLARS_MAX_THREADS"] = "2"
    import polars as pl

    place = pl.col("score").rank("ordinal", descending=True).over("label")
    rows = pl.scan_parquet(table)
    rows.filter(place <= (0.5 * pl.len().over("label") + 0.5).floor()).sink_parquet(out)


def polars_hash(table: Path, out: Path) -> None:
    os.environ["POLARS_MAX_THREADS"] = "2"
    import polars as pl

    place = pl.struct("score", pl.col("id").hash()).rank("ordinal", descending=True).over("label")
    rows = pl.scan_parquet(table)
    rows.filter(place <= (0.5 * pl.len().over("label") + 0.5).floor()).sink_parquet(out)


def limit(table: Path, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(2)
    rows = pq.ParquetFile(table)
    with pq.ParquetWriter(out, rows.schema_arrow) as writer:
        for batch in rows.iter_batches(1 << 20):
            writer.write_batch(batch.slice(0, batch.num_rows // 2))


METHODS = {
    "pick": ours,
    "DuckDB window": duckdb,
    "Polars rank": polars,
    "Polars rank, ties by hash": polars_hash,
    "limit: read, write": limit,
}
PEERS = ("DuckDB window", "Polars rank")
"""Of which the faster is the one to compare with."""


def make(path: Path, rows: int, scores: str) -> None:
    """Write a table. Of every 1,000 rows one is of each class, so half of a class is the same number however it is rounded."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("label", pa.int32()), ("score", pa.float32())])
    shifts = np.arange(56, -4, -4, dtype=np.uint64)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, CHUNK):
            n, rng = min(CHUNK, rows - first), np.random.default_rng(first)
            number = np.arange(first, first + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) & np.uint64((1 << 60) - 1)
            digits = np.frombuffer(b"0123456789abcdef", np.uint8)[(number[:, None] >> shifts & np.uint64(15)).astype(np.int64)]
            offsets = np.arange(0, 15 * n + 1, 15, dtype=np.int32)
            ids = pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(offsets), pa.py_buffer(digits)])
            label = rng.permutation(np.arange(n, dtype=np.int32) % CLASSES)
            values = rng.random(n, np.float32) if scores == "uniform" else rng.poisson(2, n).astype(np.float32)
            writer.write_table(pa.table([ids, pa.array(label), pa.array(values)], schema=schema), row_group_size=1 << 20)


def look(path: Path) -> dict[str, Any]:
    """What a method kept: of each class how many, and the sum of the scores, exact: they are whole multiples of 2^-24."""
    import numpy as np
    import pyarrow.parquet as pq

    sizes, total = np.zeros(CLASSES, np.int64), 0
    for batch in pq.ParquetFile(path).iter_batches(1 << 20, columns=["label", "score"]):
        sizes += np.bincount(batch["label"].to_numpy(), minlength=CLASSES)
        total += int((batch["score"].to_numpy().astype(np.float64) * 2**24).astype(np.int64).sum())
    return {"kept": int(sizes.sum()), "sizes": sizes.tolist(), "sum": total / 2**24}


def alone(*words: object) -> tuple[float, float, str]:
    """This script in a fresh process: its seconds, its peak of resident memory in MB, and what it printed last."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{words[0]} failed with exit code {child.returncode}")
    return seconds, used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3), said


def compare(work: Path, asked: argparse.Namespace, scores: str) -> list[dict[str, Any]]:
    """All methods on one table, round by round."""
    table, out = work / f"{scores}.parquet", work / "kept.parquet"
    alone("--make", scores, "--rows", asked.rows, "--one", table)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS if scores == "poisson" or "ties" not in name}
    peaks: dict[str, list[float]] = {name: [] for name in seconds}
    kept: dict[str, dict[str, Any]] = {}
    for _ in range(asked.rounds):
        for name in seconds:
            took, peak, _ = alone("--method", name, "--one", table, "--to", out)
            seconds[name].append(took)
            peaks[name].append(peak)
            kept[name] = kept.get(name) or json.loads(alone("--look", "--one", out)[2])
            drop(out)
    drop(table)
    for name in seconds:
        if kept[name] != kept["pick"] and not name.startswith("limit"):
            raise SystemExit(f"{scores}: {name} kept others than pick")
    best = [min(pair) for pair in zip(*(seconds[name] for name in PEERS), strict=True)]
    rows = []
    for name in seconds:
        ratio = statistics.median(own / peer for own, peer in zip(seconds[name], best, strict=True))
        row = {"scores": scores, "method": name, "seconds": statistics.median(seconds[name])}
        row |= {"/ faster peer": ratio, "peak RSS, MB": round(max(peaks[name])), "kept": kept[name]["kept"]}
        rows.append(row | {"goal": GOAL if name == "pick" else ""})
    return rows


def main() -> None:
    made = parser(__doc__.partition("\n")[0] if __doc__ else "")
    made.add_argument("--rows", type=int, default=10_000_000)
    made.add_argument("--scores", nargs="+", default=["uniform", "poisson"], choices=["uniform", "poisson"])
    made.add_argument("--rounds", type=int, default=3, help="Rounds; each runs every method once, one after the other.")
    made.add_argument("--work", type=Path, help="Folder for the tables (25 bytes a row, twice); default a temporary one.")
    for name in ("--make", "--method", "--one", "--to"):
        made.add_argument(name, help=argparse.SUPPRESS)
    made.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    asked = made.parse_args()
    if asked.make:
        make(Path(asked.one), asked.rows, asked.make)
    elif asked.method:
        METHODS[asked.method](Path(asked.one), Path(asked.to))
    elif asked.look:
        print(json.dumps(look(Path(asked.one))))
    else:
        work = Path(tempfile.mkdtemp(dir=asked.work))
        try:
            rows = [row for scores in asked.scores for row in compare(work, asked, scores)]
        finally:
            shutil.rmtree(work)
        about = measured(asked, ["duckdb", "polars", "pyarrow", "numpy"], rows=asked.rows, rounds=asked.rounds)
        report(asked, rows, about)


if __name__ == "__main__":
    main()
