"""What many views, the temperature, alpha and the code buy: students of one random subset, by arm and seed, at equal steps.

Run in a workspace with `data/train` and `data/test`, and validation data elsewhere (`--val`: in `data/val` they would be looked at after
every epoch, which takes as long as a good part of such a training). Makes the subset, its caches and the students there, by the commands
themselves, and reads their accuracies after the last epoch: the mean over seeds, on val and on test. What is there already is not made
again, so that the work may be shared out (`--share 0/2` and `--share 1/2` at the same time), interrupted, and summed up at the end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, show
from kdprune_pipelines import cache, distill, evaluate, select
from kdprune_pipelines._console import quiet


@dataclass(frozen=True)
class Arm:
    """One way to train. `cached`: the cache in `logits/`, None for labels only on fresh views; `views`: of it, used in turn; `live`: its
    boxes, of which the teacher is asked while it runs."""

    name: str
    cached: str | None
    views: int | None
    alpha: float = 0.9
    temperature: float = 4.0
    live: bool = False


def arms(epochs: int, seeds: Sequence[int]) -> list[tuple[Arm, Sequence[int]]]:
    """Every arm with its seeds: those of alpha and temperature have the first two."""
    few = seeds[:2]
    return [
        (Arm("labels, fresh views", None, None, 0.0), seeds),
        (Arm("labels, the same 16 views", "study", 16, 0.0), seeds),
        (Arm("identity", "identity", 1), seeds),
        (Arm("1 view", "study", 1), seeds),
        (Arm("4 views", "study", 4), seeds),
        (Arm("16 views", "study", 16), seeds),
        (Arm(f"{epochs} views, a new one every epoch", "study", epochs), seeds),
        (Arm("16 views, coded at 1e-2", "coded", 16), seeds),
        (Arm("16 views, alpha 0.5", "study", 16, alpha=0.5), few),
        (Arm("16 views, alpha 1", "study", 16, alpha=1.0), few),
        (Arm("16 views, temperature 1", "study", 16, temperature=1.0), few),
        (Arm("16 views, temperature 2", "study", 16, temperature=2.0), few),
        (Arm("16 views, the teacher live", "study", 16, live=True), few),
    ]


def prepare(asked: argparse.Namespace) -> Path:
    """The subset and its caches."""
    subset = Path(f"subsets/random-{asked.frac}-s0")
    select.run(select.SelectConfig(frac=asked.frac, method="random"))
    common: dict[str, Any] = {"subset": subset, "teacher": asked.teacher, "jobs": 1}
    cache.run(cache.CacheConfig(views="identity", name="identity", **common))
    cache.run(cache.CacheConfig(views="16", name="coded", fidelity=1e-2, **common))
    cache.run(cache.CacheConfig(views=str(max(asked.epochs, 16)), name="study", **common))
    return subset


def trained(asked: argparse.Namespace, subset: Path, arm: Arm, seed: int) -> dict[str, float]:
    """A student's accuracies, made where it is not there."""
    words = "".join(c if c.isalnum() else "-" for c in arm.name)
    config = distill.DistillConfig(
        subset=subset,
        logits="none" if arm.cached is None else f"logits/{arm.cached}",
        model=asked.model,
        alpha=str(arm.alpha),
        temperature=arm.temperature,
        views=arm.views,
        live=asked.teacher if arm.live else None,
        epochs=asked.epochs,
        seed=seed,
        jobs=1,
        check_labels=0,
        name=f"study-{words}-s{seed}",
    )
    folder = Path(distill.run(config).facts["folder"])
    return {"val": accuracy(folder, asked.val), "test": accuracy(folder, Path("data/test"))}


def accuracy(model: Path, data: Path) -> float:
    """Of a model on a data set."""
    return float(evaluate.run(evaluate.EvaluateConfig(model=model, data=data)).facts["accuracy"])


def row(name: str, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds in per cent, and the spread of test: its standard deviation."""
    of = {split: [100 * one[split] for one in found] for split in ("val", "test")}
    spread = statistics.stdev(of["test"]) if len(found) > 1 else None
    means = {split: f"{statistics.mean(values):.2f}" for split, values in of.items()}
    return {"arm": name, "seeds": len(found), **means, "spread of test": None if spread is None else f"{spread:.2f}"}


def main() -> None:
    made = parser(__doc__.partition("\n")[0] if __doc__ else "")
    made.add_argument("--teacher", type=Path, required=True, help="The teacher's folder.")
    made.add_argument("--val", type=Path, required=True, help="The validation data.")
    made.add_argument("--frac", default="0.1", help="Fraction kept.")
    made.add_argument("--model", default="resnet8", help="The student.")
    made.add_argument("--epochs", type=int, default=40)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--arms", type=int, default=None, help="Only so many arms, from the first on.")
    made.add_argument("--share", default="0/1", help="Which of how many parts of the students to train now; 0/1: all, and the table.")
    asked = made.parse_args()
    about = machine(asked.threads)
    part, parts = map(int, asked.share.split("/"))
    with quiet():
        subset = prepare(asked)
        # Seed after seed, so that what was interrupted has whole seeds.
        todo = [(arm, seed) for seed in asked.seeds for arm, seeds in arms(asked.epochs, asked.seeds)[: asked.arms] if seed in seeds]
        found: dict[str, list[dict[str, float]]] = {}
        for arm, seed in todo[part::parts]:
            torch.set_num_threads(asked.threads)
            found.setdefault(arm.name, []).append(trained(asked, subset, arm, seed))
            print(f"{arm.name}, seed {seed}: {found[arm.name][-1]}", flush=True) if parts > 1 else None
        taught = accuracy(asked.teacher, Path("data/test"))
    about |= {"student": asked.model, "epochs": asked.epochs, "kept": asked.frac, "teacher": f"{asked.teacher.name}, {taught:.2%} on test"}
    if parts == 1:
        show([row(name, each) for name, each in found.items()], about, as_json=asked.json)


if __name__ == "__main__":
    main()
