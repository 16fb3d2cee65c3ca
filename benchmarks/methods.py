"""What every selection method costs: seconds, and the memory that it takes above the loaded pool; each in a process of its own.

Reads a data set and its scores as `select` does, and runs whatever `SELECTORS` holds, and one ranked score, at the given fractions with
their default settings. A method that needs what the scores lack says so in its row.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, parser, show

from kdprune_data import order
from kdprune_data.errors import KdpruneError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.scores import SCORES, Scores
from kdprune_data.selectors import SELECTORS, Pool, method
from kdprune_data.selectors.base import EMBEDDING, LOGITS

RANKED = "score"
"""The method that ranks by any score, which needs to be told by which."""


def peak(*, anew: bool = False) -> int:
    """The most bytes that this process has held; `anew`: from now on, where the system can be told so (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def pool_of(data: Dataset, scores: Scores, needs: tuple[str, ...]) -> Pool:
    """The candidates, with what a method needs of them; what is lacking is left out, for the method to ask for."""
    rows = data.usable()
    columns, vectors = {}, {}
    for name in needs:
        if name in (EMBEDDING, LOGITS) and scores.has(name):
            uids, values = scores.vectors(name)
            vectors[name] = values[order.locate(uids, data.uids[rows])]
        elif name in scores.columns:
            uids, column = scores.read(name)
            columns[name] = column[order.locate(uids, data.uids[rows])]
    ends = {name: SCORES[name].hard for name in columns}
    return Pool(data.uids[rows], data.labels[rows].astype(np.int32), columns, ends, **vectors)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """One method at one fraction, in this process."""
    found = method(asked.one)
    params = replace(found.params(), memory=asked.memory)
    if asked.one == RANKED:
        params = replace(params, score=asked.by)
    row: dict[str, Any] = {"method": asked.by if asked.one == RANKED else asked.one, "fraction": asked.fractions[0]}
    pool = pool_of(Dataset.open(asked.data), Scores.open(asked.scores), found.needs(params))
    keep = order.keep_count(order.fraction(asked.fractions[0]), len(pool.uids))
    clock = time.process_time if asked.cpu else time.perf_counter
    before, start = peak(anew=True), clock()
    try:
        picked = found.select(pool, keep, params)
    except KdpruneError as error:
        return row | {"note": str(error)}
    seconds, used = clock() - start, peak() - before
    weighs = "no" if picked.weights is None else "yes"
    return row | {"kept": len(picked.indices), "seconds": seconds, "MB above the pool": used / 1e6, "weights": weighs}


def started(asked: argparse.Namespace, name: str, fraction: float) -> dict[str, Any]:
    """The same in a fresh process, whose peak is its own."""
    command = [sys.executable, __file__, "--data", asked.data, "--scores", asked.scores, "--one", name, "--fractions", fraction]
    command += ["--memory", asked.memory, "--by", asked.by, *(["--cpu"] if asked.cpu else [])]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(asked.threads))
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"method": name, "fraction": fraction, "note": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> None:
    made = parser(__doc__.partition("\n")[0] if __doc__ else "")
    made.add_argument("--data", type=Path, required=True, help="A data set's folder.")
    made.add_argument("--scores", type=Path, required=True, help="The folder of its scores.")
    made.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.5])
    made.add_argument("--methods", nargs="+", default=list(SELECTORS), help="Which methods; default all.")
    made.add_argument("--by", default="el2n", help="The score of the method that ranks by one.")
    made.add_argument("--memory", type=int, default=1_000_000_000)
    made.add_argument("--one", help=argparse.SUPPRESS)
    asked = made.parse_args()
    if asked.one:
        print(json.dumps(measure(asked)))
        return
    about = machine(asked.threads) | {"time": "processor" if asked.cpu else "clock"}
    rows = [started(asked, name, fraction) for name in asked.methods for fraction in asked.fractions]
    show(rows, about | {"n": len(Dataset.open(asked.data).usable())}, as_json=asked.json)


if __name__ == "__main__":
    main()
