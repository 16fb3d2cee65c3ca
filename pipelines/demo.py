"""`demo`: the whole job on scikit-learn's digits, in a minute or two: no network, no GPU.

1. Import the digits (train, val, test), train a teacher, score every sample, cache its logits for the views of all of them.
2. At each kept fraction and seed: select a random subset, and train three students with the same steps: labels only on the cached views,
   labels only with a fresh view every epoch, and distilled.
3. Test each after its last step, and print the table: mean and spread over the seeds.

Everything is a plain workspace that the other commands work in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdprune_pipelines import cache, distill, evaluate, import_, score, select, teacher
from kdprune_pipelines._console import Outcome, quiet, say, track
from kdprune_pipelines._workers import results, workers

from kdprune_data.config import Config, option

FRACTIONS = ("0.02", "0.05", "0.1", "0.2", "0.5", "1")
ARMS = ("labels only", "fresh views", "distilled")
TEACHER_EPOCHS = 40
VIEWS = 16
STEPS = 150
BATCH = 64
STUDENT = "resnet8"


@dataclass(frozen=True)
class DemoConfig(Config):
    """Settings of `demo`."""

    out: Path = option(Path("kdprune-demo"), help="The workspace to make.")
    seeds: int = option(3, help="Seeds per fraction: each its own subset and its own students.", least=2, most=20)
    jobs: int = option(2, help="Processes that train students.", least=1, short="j")
    overwrite: bool = option(False, help="Replace what stands in the folder.")


@dataclass(frozen=True)
class Lesson:
    """One student to train: plain values, so that another process can."""

    folder: Path
    frac: str
    seed: int
    arm: str
    overwrite: bool


def run(config: DemoConfig) -> Outcome:
    """Run the demo, or continue it. Raises what the stages raise."""
    started = time.monotonic()
    say("1/3 digits: importing, training a teacher on all of them, scoring")
    with quiet():
        taught = _teach(config)
    say(f"2/3 caching the teacher's logits for {VIEWS} views, selecting subsets")
    with quiet():
        _prune(config)
    lessons = [Lesson(config.out, frac, seed, arm, config.overwrite) for frac, seed, arm in product(FRACTIONS, range(config.seeds), ARMS)]
    say(f"3/3 {len(lessons)} students ({STUDENT}, {STEPS} steps each) at {len(FRACTIONS)} kept fractions, {config.seeds} seeds")
    with workers(config.jobs, _one_thread) as pool:
        found = list(track(results(pool, _train_student, lessons), "students", total=len(lessons), unit="student"))
    accuracy = {(one.frac, one.seed, one.arm): value for one, value in zip(lessons, found, strict=True)}
    table = [_row(frac, accuracy, config.seeds) for frac in FRACTIONS]
    facts = {
        "folder": str(config.out),
        "teacher_accuracy": taught,
        "steps": STEPS,
        "seeds": config.seeds,
        "table": table,
        "seconds": round(time.monotonic() - started, 1),
    }
    return Outcome(config.out, facts, _text(config, taught, table, time.monotonic() - started))


def _teach(config: DemoConfig) -> float:
    """Data, teacher and scores; returns the teacher's accuracy on test."""
    out, again = config.out, config.overwrite
    train, val, where = out / "data/train", out / "data/val", _teacher(out)
    import_.run(import_.ImportConfig(source=("digits",), holdout="0.1", out=train, overwrite=again))
    import_.run(import_.ImportConfig(source=("digits",), split="test", out=out / "data/test", overwrite=again))
    teacher.run(teacher.TeacherConfig(data=train, val=val, epochs=TEACHER_EPOCHS, batch=BATCH, out=where, overwrite=again))
    score.run(score.ScoreConfig(data=train, teacher=where, out=out / "scores/resnet20-s0", overwrite=again))
    return float(evaluate.run(evaluate.EvaluateConfig(model=where, data=out / "data/test")).facts["accuracy"])


def _prune(config: DemoConfig) -> None:
    """Soft labels of everything, and a subset for each fraction and seed: one cache serves them all."""
    out, again = config.out, config.overwrite
    train = out / "data/train"
    cache.run(cache.CacheConfig(subset=train, teacher=_teacher(out), views=str(VIEWS), out=_cache(out), overwrite=again))
    for frac, seed in product(FRACTIONS, range(config.seeds)):
        select.run(select.SelectConfig(data=train, frac=frac, seed=seed, out=_subset(out, frac, seed), overwrite=again))


def _teacher(out: Path) -> Path:
    return out / "teachers/resnet20-s0"


def _cache(out: Path) -> Path:
    return out / "logits/train--resnet20-s0"


def _subset(out: Path, frac: str, seed: int) -> Path:
    return out / f"subsets/random-{frac}-s{seed}"


def _one_thread() -> None:
    """Small networks gain nothing from a second thread; a second process does."""
    import torch

    torch.set_num_threads(1)


def _train_student(lesson: Lesson) -> float:
    """Train one student and return its accuracy on test after the last step."""
    out = lesson.folder
    subset = _subset(out, lesson.frac, lesson.seed)
    plain = lesson.arm.replace(" ", "-")
    where = out / f"students/{subset.name}--{STUDENT}-{plain}"
    settings: dict[str, Any] = {"logits": "none"} if lesson.arm == "fresh views" else {"logits": str(_cache(out))}
    if lesson.arm == "labels only":
        settings["alpha"] = "0"
    with quiet():
        given = distill.DistillConfig(
            subset=subset,
            val=out / "data/val",
            model=STUDENT,
            steps=STEPS,
            batch=BATCH,
            seed=lesson.seed,
            out=where,
            overwrite=lesson.overwrite,
            jobs=1,
            **settings,
        )
        distill.run(given)
        return float(evaluate.run(evaluate.EvaluateConfig(model=where, data=out / "data/test")).facts["accuracy"])


def _row(frac: str, accuracy: dict[tuple[str, int, str], float], seeds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"kept": frac}
    for arm in ARMS:
        values = [accuracy[frac, seed, arm] for seed in range(seeds)]
        row[arm] = {"mean": mean(values), "std": stdev(values), "values": values}
    return row


def _text(config: DemoConfig, taught: float, table: Sequence[dict[str, Any]], seconds: float) -> str:
    head = f"{'kept':>6}  " + "  ".join(f"{arm:>14}" for arm in ARMS) + f"  {'gain':>6}"
    lines = []
    for row in table:
        cells = "  ".join(f"{row[arm]['mean']:8.1%} ± {row[arm]['std'] * 100:3.1f}" for arm in ARMS)
        gain = (row["distilled"]["mean"] - row["labels only"]["mean"]) * 100
        lines.append(f"{float(row['kept']):>6.0%}  {cells}  {gain:+6.1f}")
    return "\n".join(
        [
            f"Test accuracy on digits after the last of {STEPS} steps, mean ± standard deviation of {config.seeds} seeds;",
            f"teacher resnet20 on everything: {taught:.1%}; students {STUDENT} on random subsets, alpha auto, temperature 4.",
            "",
            head,
            *lines,
            "",
            "labels only: the cached views, without the teacher; fresh views: labels, a new view every epoch; gain: distilled",
            f"over labels only, in points. Made in {seconds:.0f} s: the workspace {config.out}/. Next, in there:",
            "",
            "  kdprune-data info students/random-0.1-s0--resnet8-distilled",
            "  kdprune-data select --frac 0.1 --method el2n",
            "  kdprune-data distill subsets/el2n-0.1-s0 --model resnet8 --steps 150",
            "  kdprune-data verify subsets/random-0.1-s0",
        ]
    )
