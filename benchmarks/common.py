"""What the benchmarks share: loops timed in turns, what they ran on, and tables of the results.

torch is loaded where it is used: the memory of a selection method is measured without it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_data import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn


def parser(about: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    made.add_argument(
        "--out", type=Path, help="Write the JSON to this file too (those in benchmarks/results/ are shown in docs/benchmarks.md)."
    )
    made.add_argument("--threads", type=int, default=2, help="Threads of torch.")
    made.add_argument("--cpu", action="store_true", help="Count the processor's time, not the clock's: for a machine that does other work.")
    return made


def timing_parser(about: str) -> argparse.ArgumentParser:
    """The options of a benchmark that runs networks on random images."""
    made = parser(about)
    made.add_argument("--models", nargs="+", default=["resnet20", "resnet18"])
    made.add_argument("--classes", type=int, nargs="+", default=[10])
    made.add_argument("--size", type=int, default=32, help="Side of an image in pixels.")
    made.add_argument("--n", type=int, default=256, help="Samples in the batch.")
    made.add_argument("--rounds", type=int, default=9, help="Rounds; each runs every loop once, one after the other.")
    return made


def network(name: str, classes: int, size: int) -> nn.Module:
    """A network in eval mode, laid out as `score` lays it out; a 3x3 stem at sizes up to 64."""
    import torch

    from kdprune_data.learn.models import build, resolve

    made = build(resolve(name, classes=classes, size=size), seed=0)
    return made.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stub lacks it


def batch(n: int, classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images, float32 of shape (n, 3, size, size), and labels, int64 of shape (n,)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(classes, (n,), generator=generator)


def in_turns(loops: Mapping[str, Callable[[], object]], rounds: int, *, cpu: bool = False) -> dict[str, list[float]]:
    """Seconds of each loop in each round. Rounds, so that what else the machine does falls on all loops alike; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    clock = time.process_time if cpu else time.perf_counter
    for n in range(rounds + 1):
        for name, loop in loops.items():
            start = clock()
            loop()
            if n:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """The median over the rounds of each loop's time by that of `base` in the same round."""
    return {name: statistics.median(a / b for a, b in zip(own, seconds[base], strict=True)) for name, own in seconds.items()}


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on; from here on torch computes in so many threads."""
    import torch

    torch.set_num_threads(threads)
    return {
        "kdprune_data": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def one_core(asked: argparse.Namespace) -> None:
    """From here on this process runs on one core and torch in one thread: for rows that say so."""
    asked.threads = 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def drop(path: Path) -> None:
    """Remove a file or a folder that a timed loop writes, and let the system finish writing what is waiting."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()


def measured(asked: argparse.Namespace, packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """What the numbers of a comparison with others were measured on: hardware, versions (of the packages named too), commit, and more."""
    about = machine(asked.threads) | {name: version(name) for name in packages}
    return about | {"time": "processor" if asked.cpu else "clock", "commit": commit()} | more


def report(asked: argparse.Namespace, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Show the rows as they were asked for, and write them to a file where one was named.

    Where a row has a goal, its cell `goal` says what its ratio is to be, in words that need no other.
    """
    show(rows, about, as_json=asked.json)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps({"machine": dict(about), "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The commit of the checkout that these scripts stand in, with `+` where files differ from it; None where there is none."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the rows as a markdown table, under a line that says where they were measured; or all as one JSON object."""
    if as_json:
        print(json.dumps({"machine": about, "rows": list(rows)}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    table(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a markdown table."""
    print("\n".join(lines(rows)))


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as the lines of a markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [_line(names), _line("---" for _ in names), *(_line(_text(row.get(name)) for name in names) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
