"""What real files of soft labels take, and how long their numbers take to be read: the coded cache beside float16 in a memory map."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from common import in_turns
from soft_label_parts import Part
from threadpoolctl import threadpool_limits

from kdprune_data.formats import logit_files as files
from kdprune_data.formats import lowrank, table
from kdprune_data.formats.build import Build
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.logit_files import Boxes, ViewRows
from kdprune_data.formats.rounding import Code

BATCH, BATCHES, ROUNDS = 256, 40, 9
ROWS = 10_000
"""In a shard."""


def write(folder: Path, part: Part, code: Code, size: int) -> dict[str, list[Path]]:
    """Files of a part as `cache` writes them, coded and as float16: by kind."""
    base = code.book.base_of(lowrank.centre(part.full).mean(0))
    side = np.full(part.full.shape[1], size, np.int32)
    boxes = [Boxes(*box[:, :2].T.astype(np.int32), side, side, box[:, 2] > 0) for box in part.boxes]
    last, build = len(boxes) - 1, Build.begin(folder, Identity("logits", folder.name, {}, []))
    with build:
        build.write(files.CODEBOOK, files.codebook_bytes(code.book, {"rounding": code.rounding.to_json()}), {})
        files.write_base(build, 0, base, {})
        residuals = [code.rounding.residual_of(code.book, full, base) for full in part.full]
        files.write_coded(build, files.view_path(0, last, 0), boxes, residuals, {})
        plain = [ViewRows(*box, files.stored(full, "float16")) for box, full in zip(boxes, part.full, strict=True)]
        files.write_views(build, files.view_path(0, last, 1), plain, {})
    return {
        "codebook": [folder / files.CODEBOOK],
        "coded": [folder / files.base_path(0), folder / files.view_path(0, last, 0)],
        "float16": [folder / files.view_path(0, last, 1)],
    }


def sizes(folder: Path, part: Part, code: Code, size: int) -> dict[str, Any]:
    """Bytes of real files, boxes and what Arrow adds included."""
    numbers = part.full.shape[0] * part.full.shape[1]
    found = {kind: sum(path.stat().st_size for path in paths) for kind, paths in write(folder, part, code, size).items()}
    return {
        "codebook, bytes": found["codebook"],
        "coded files, bytes per view": found["coded"] / numbers,
        "float16 files, bytes per view": found["float16"] / numbers,
    }


def times(folder: Path, part: Part, code: Code, size: int, *, cpu: bool) -> dict[str, Any]:
    """Microseconds of a sample on one core: random batches of 256 from a shard's view of 10,000 rows, which repeats the part's."""
    n = part.full.shape[1]
    at = np.arange(ROWS) % n
    shard = Part(part.full[:1, at], part.labels[at], part.boxes[:1, at])
    paths = write(folder, shard, code, size)
    base = files.read_base(table.ipc_open(paths["coded"][0]), code.book)
    _, plain = files.plain_view(table.ipc_batch(table.ipc_open(paths["float16"][0]), 0))

    def opened() -> Any:
        return files.coded_view(table.ipc_batch(table.ipc_open(paths["coded"][1]), 0), code.book, base)[1]

    coded, random = opened(), np.random.default_rng(0)
    batches = [random.integers(0, ROWS, BATCH) for _ in range(BATCHES)]
    full, own = part.full[0], base[:n]
    loops = {
        "decoding": (lambda: [coded.pick(some).decoded() for some in batches], BATCH * BATCHES),
        "reading float16": (lambda: [plain.pick(some).decoded().astype(np.float32) for some in batches], BATCH * BATCHES),
        "opening a coded view": (opened, ROWS),
        "coding a view": (lambda: code.rounding.residual_of(code.book, full, own), n),
    }
    with threadpool_limits(1):
        seconds = in_turns({name: loop for name, (loop, _) in loops.items()}, ROUNDS, cpu=cpu)
    return {f"{name}, us": 1e6 * statistics.median(seconds[name]) / count for name, (_, count) in loops.items()}
