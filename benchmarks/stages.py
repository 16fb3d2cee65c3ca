"""Where the time of each stage goes: the whole job on small images, looked at many times a second, all threads.

Whatever a thread is doing when it is looked at is put down to the innermost line of the table below that its stack has; threads that wait
are left out, so shares are of working time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq
import shards
from common import measured, parser, report
from kdprune_pipelines import cache, distill, import_, score, select, teacher

EVERY = 0.005
WHERE = (
    ("images.py", "decoding images"),
    ("formats/dataset.py", "reading and hashing"),
    ("formats/plain.py", "reading and hashing"),
    ("formats/tar.py", "reading and hashing"),
    ("formats/copying.py", "copying and hashing"),
    ("formats/subset.py", "copying and hashing"),
    ("formats/logits.py", "soft labels"),
    ("formats/logit_files.py", "soft labels"),
    ("learn/crops.py", "views"),
    ("learn/render.py", "views"),
    ("learn/resize.py", "views"),
    ("learn/geometry.py", "views"),
    ("learn/views.py", "normalising"),
    ("learn/losses.py", "losses and scores"),
    ("kdprune_data/scores/", "losses and scores"),
    ("learn/dynamics.py", "losses and scores"),
    ("torch/nn/modules/", "the network"),
    ("torch/autograd/", "the network"),
    ("torch/optim/", "the network"),
    ("learn/resnet.py", "the network"),
    ("formats/build.py", "writing"),
    ("formats/shard.py", "writing"),
    ("formats/shards.py", "writing"),
    ("formats/table.py", "writing"),
    ("formats/atomic.py", "writing"),
    ("formats/", "tables, manifests and checks"),
    ("sources/", "the source"),
    ("order.py", "order"),
)
WAITING = ("threading.py", "queue.py", "selectors.py", "concurrent/futures/", "multiprocessing/", "tqdm/")


def place(frame: FrameType | None) -> str | None:
    """What a stack is doing; None for waiting."""
    innermost = True
    while frame is not None:
        file = frame.f_code.co_filename
        if innermost and any(part in file for part in WAITING):
            return None
        innermost = False
        for part, what in WHERE:
            if part in file:
                return what
        frame = frame.f_back
    return "other"


@contextlib.contextmanager
def looked_at(found: Counter[str]) -> Iterator[None]:
    """Count what all threads do while the block runs."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            for ident, frame in sys._current_frames().items():
                if ident != me.ident and (what := place(frame)) is not None:
                    found[what] += 1

    me = threading.Thread(target=look, daemon=True)
    me.start()
    try:
        yield
    finally:
        done.set()
        me.join()


def stages(asked: argparse.Namespace) -> dict[str, Any]:
    """Each stage, to be run in the folder of the job. Training is short: what takes the time in it stays the same."""
    one = {"jobs": asked.threads}
    short = {"model": asked.model, "epochs": 1, "batch": 128}
    return {
        "import": lambda: import_.run(import_.ImportConfig(source=("source.parquet",), **one)),
        "teacher, an epoch": lambda: teacher.run(teacher.TeacherConfig(**short, **one)),
        "score": lambda: score.run(score.ScoreConfig(**one)),
        "select, a half": lambda: select.run(select.SelectConfig(frac="0.5", **one)),
        "cache, a view": lambda: cache.run(cache.CacheConfig(subset=Path("subsets/random-0.5-s0"), views="1", **one)),
        "distill, an epoch": lambda: distill.run(
            distill.DistillConfig(subset=Path("subsets/random-0.5-s0"), check_labels=0, **short, **one)
        ),
    }


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=10_000)
    made.add_argument("--model", default="resnet20")
    asked = made.parse_args()
    here = Path.cwd()
    rows, first = [], pq.read_table(asked.data).slice(0, asked.samples)
    about = measured(asked, ["simplejpeg", "numpy", "pyarrow"], n=len(first), model=asked.model)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        os.chdir(work)
        pq.write_table(first, "source.parquet")
        for name, run in stages(asked).items():
            found: Counter[str] = Counter()
            start = time.perf_counter()
            with looked_at(found):
                run()
            row: dict[str, Any] = {"stage": name, "seconds": time.perf_counter() - start}
            whole = max(sum(found.values()), 1)
            shares = [f"{what} {100 * n / whole:.0f} %" for what, n in found.most_common() if n * 50 >= whole]
            rows.append(row | {"working time": ", ".join(shares)})
        os.chdir(here)
    report(asked, rows, about)


if __name__ == "__main__":
    main()
