"""How many bytes soft labels take in one code and another, and what they still say then: bytes per view against KL(full || stored).

1. A teacher is asked for many views of some samples, as `cache` asks it. Directions are learned from some of the samples and steps chosen
   on others, as `cache` does (up to 512 each); all is measured on the rest, at temperatures 1, 2 and 4.
2. Bytes are those of the numbers: of a view of all measured samples at once, compressed as a buffer of an Arrow file is where the code
   compresses (zstd, level 15). What is kept once a sample is shared out over the views. A view's box is coded alike for all codes and
   counted in. Directions, which all samples share, are not: `files` has them.
3. Beside it: what was tried around the kept code, real files, and times.

The logits are a teacher's; the same beside those of its weights after an earlier epoch, as if one network knew two sets of classes; and
synthetic ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import commit, machine, parser, table
from kdprune_pipelines._models import Saved, open_model
from kdprune_pipelines._storing import Fidelity, choose
from soft_label_logits import Asked, beside, facts, halves, synthetic, taught
from soft_label_others import FIXED, STEPPED
from soft_label_parts import TEMPERATURES, Array, Coded, Part, Said, coarsest, entropy, geometry, measure, packed, same_kl
from soft_label_times import sizes, times
from soft_label_tried import variants

from kdprune_data.formats import lowrank
from kdprune_data.formats.rounding import Code

FIDELITIES = (3e-2, 1e-2, 3e-3, 1e-3)
USUAL = 1e-2
KEPT = "coded (kept)"
PACKINGS = (("zstd", 3), ("zstd", 9), ("zstd", 19), ("zstd", 22), ("brotli", 11))
Rows = list[dict[str, Any]]


def chosen(said: Said, views: int, bound: float) -> Code:
    """The code that `cache --fidelity` would choose. said: with as many views."""
    probe = np.concatenate([said.fit.full, said.chosen.full], 1)
    return choose(probe, Fidelity(bound, TEMPERATURES), views).code


def coded(code: Code, part: Part) -> Coded:
    """What `cache` stores."""
    base = code.book.base_of(lowrank.centre(part.full).mean(0))

    def views() -> Iterator[tuple[list[Array], Callable[[float], Array]]]:
        for full in part.full:
            residual = code.rounding.residual_of(code.book, full, base)
            again = code.book.decode(base, residual)
            yield [residual.T], lambda tau, again=again: again

    return Coded([base.T], views())


def compared(said: Said, views: int) -> Rows:
    """All codes at so many views of a sample."""
    some = said.views(views)
    part, box = some.other, geometry(some)
    none = dict.fromkeys(("fidelity", "step", "directions"))
    rows = [{"code": name} | none | measure(code(part), part, box) for name, code in FIXED.items()]
    for name, stepped in STEPPED.items():
        for bound in FIDELITIES:
            step = coarsest(stepped, some.chosen, bound)
            rows.append({"code": name, "fidelity": bound, "step": step} | measure(stepped(step, part), part, box))
    for bound in FIDELITIES:
        rows.append(kept(some, views, bound, box))
    return rows


def kept(some: Said, views: int, bound: float, box: float) -> dict[str, Any]:
    """The coded cache."""
    code = chosen(some, views, bound)
    row = {"code": KEPT, "fidelity": bound, "step": code.book.step * code.book.multiple, "directions": code.book.directions}
    return row | measure(coded(code, some.other), some.other, box)


def by_views(said: Said) -> Rows:
    """The coded cache at different numbers of views."""
    counts = [v for v in (1, 2, 4, 8, 16, 32, 64, 128) if v <= len(said.other.full)]
    return [{"views": v} | kept(some, v, USUAL, geometry(some)) for v in counts for some in [said.views(v)]]


def tried(said: Said, views: int) -> Rows:
    """Variants of the coded cache, the step of each set so that the largest mean KL of the measured samples is USUAL."""
    some = said.views(views)
    part, box = some.other, geometry(some)
    rows: Rows = []
    start = 1.0
    for name, stepped in variants(said, views, USUAL).items():
        step = same_kl(stepped, part, USUAL, start=start)
        if step is None:
            rows.append({"variant": name, "note": "no step has this KL"})
            continue
        made = stepped(step, part)
        made = replace(made, views=list(made.views))
        rows.append({"variant": name} | measure(made, part, box))
        if len(rows) == 1:
            start = step
            rows += packings(made, rows[0], part, box)
    first = rows[0]["bytes per view"] - box
    return [row | {"of what is kept": (row["bytes per view"] - box) / first} if "note" not in row else row for row in rows]


def packings(made: Coded, first: dict[str, Any], part: Part, box: float) -> Rows:
    """The numbers of what is kept, packed otherwise. first: its row."""
    v, n = part.full.shape[:2]
    arrays = [kept for (kept,), _ in made.views]

    def row(name: str, base: float, view: float) -> dict[str, Any]:
        return first | {"variant": name, "base, bytes a sample": base, "view, bytes": view, "bytes per view": base / v + view + box}

    found = [row("entropy of each direction's numbers", entropy(made.base) / n, entropy(arrays) / n / v)]
    pairs = [np.ascontiguousarray(one).view(np.uint8).reshape(*one.shape, 2) for one in made.base if one.dtype == np.int16]
    planes = packed([one[..., 0] for one in pairs]) + packed([one[..., 1] for one in pairs])
    found.append(row("base as low bytes, then high bytes", planes / n, first["view, bytes"]))
    for codec, level in PACKINGS:
        total = sum(packed([one], level, codec) for one in arrays)
        found.append(row(f"{codec}, level {level}", packed(made.base, level, codec) / n, total / n / v))
    return found


def real(said: Said, views: int, *, cpu: bool) -> dict[str, Any]:
    """Files and times of the coded cache."""
    some, code = said.views(views), chosen(said.views(views), views, USUAL)
    row = {"n": some.other.full.shape[1], "views": views, "directions": code.book.directions}
    with tempfile.TemporaryDirectory() as folder:
        row |= sizes(Path(folder) / "sizes", some.other, code, said.size)
        return row | times(Path(folder) / "times", some.other, code, said.size, cpu=cpu)


def logits(asked: argparse.Namespace, saved: Saved) -> list[Said]:
    """Of all kinds, the teacher's own first."""
    earlier = next((epoch for epoch in reversed(saved.kept_epochs) if epoch < saved.manifest.counts["epochs"]), None)
    said = {}
    for epoch in (None,) if earlier is None else (None, earlier):
        kept = None if asked.logits is None else asked.logits / f"epoch-{epoch}.npz"
        said[epoch] = taught(Asked(asked.data, asked.samples, asked.views, asked.threads), saved, epoch, kept)
    one, size = said[None], saved.architecture.size
    classes = one.full.shape[2]
    sets = [halves(f"{classes} classes, {saved.manifest.name}", one, size)]
    if earlier is not None:
        sets.append(halves(f"{2 * classes} classes, the teacher beside epoch {earlier}", beside(one, said[earlier]), size))
    few = synthetic(one, asked.synthetic, asked.samples // 2)
    return [*sets, halves(f"{asked.synthetic} classes, synthetic", few, size)]


def tables(sets: Sequence[Said], counts: Sequence[int], *, cpu: bool) -> Iterator[tuple[str, Rows]]:
    """All tables, by name, as they are done. sets: the teacher's own logits first; counts: of views."""
    yield "logits", [{"logits": said.name, "measured": said.other.full.shape[1]} | facts(said.other) for said in sets]
    for views in counts:
        yield f"codes, {sets[0].name}, {views} views", compared(sets[0], views)
    yield "number of views", by_views(sets[0])
    yield "files and times", [{"logits": said.name} | real(said, counts[0], cpu=cpu) for said in sets]
    for views in counts:
        yield f"tried, {sets[0].name}, {views} views", tried(sets[0], views)
    for said in sets[1:]:
        for views in counts:
            yield f"codes, {said.name}, {views} views", compared(said, views)


def main() -> None:
    made = parser(__doc__.partition("\n")[0] if __doc__ else "")
    made.add_argument("--data", type=Path, required=True, help="A data set's folder.")
    made.add_argument("--teacher", type=Path, required=True, help="The folder of a teacher for its classes.")
    made.add_argument("--samples", type=int, default=2000)
    made.add_argument("--views", type=int, default=64)
    made.add_argument("--synthetic", type=int, default=1000, help="Classes of the synthetic logits.")
    made.add_argument("--logits", type=Path, help="A folder to keep what the teacher says in, for another run.")
    asked = made.parse_args()
    saved = open_model(asked.teacher)
    about = machine(asked.threads) | {"commit": commit(), "teacher": saved.manifest.name, "samples": asked.samples, "views": asked.views}
    about |= {"time": "processor" if asked.cpu else "clock"}
    sets = logits(asked, saved)
    if not asked.json:
        print(", ".join(f"{name} {value}" for name, value in about.items()))
    found: dict[str, Rows] = {}
    for name, rows in tables(sets, sorted({min(8, asked.views), asked.views}), cpu=asked.cpu):
        found[name] = rows
        if not asked.json:
            print(f"\n**{name}**\n")
            table(rows)
            sys.stdout.flush()
    if asked.json:
        print(json.dumps({"machine": about, "tables": found}))
    if asked.out:
        asked.out.write_text(json.dumps({"machine": about, "tables": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
