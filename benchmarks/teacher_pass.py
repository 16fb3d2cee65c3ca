"""What one pass of a teacher over the data costs: `score` and `cache`, in float32 and in bf16, beside a bare loop over tensors in memory
and beside WebDataset, Pillow and a plain loop.

The commands are run whole, each time into a new folder: the data set is opened, every image read, held against its digest and decoded,
files and manifest written; in bf16 with the probe. What bf16 costs is that of the probe; of random weights it says little: give a trained
teacher with `--teacher`, and with `--data` the folder of a data set that it knows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shards
import torch
import webdataset as wds
from common import in_turns, measured, parser, ratios, report
from kdprune_pipelines import cache, score, select
from kdprune_pipelines._console import quiet
from kdprune_pipelines._models import Saved, open_model
from torch import Tensor, nn
from torchvision.transforms import v2
from untrained import adopted

from kdprune_data import order
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import Scores
from kdprune_data.learn import views
from kdprune_data.learn.inference import choose_device, evaluating
from kdprune_data.learn.precision import in_bf16
from kdprune_data.learn.stream import Images

BATCH, PEER_BATCH = 256, 64
BARE, PEER = "limit: a bare loop over tensors", "WebDataset + Pillow + a plain loop"
GOALS = {
    ("score", "float32"): "0.95 of the bare loop, 1.3 times the peer",
    ("cache", "float32"): "0.95 of the bare loop, 1.3 times the peer",
    ("score", "bf16"): "2.5 times the peer",
    ("cache", "bf16"): "2.5 times the peer",
}


def peer(net: nn.Module, paths: list[str], saved: Saved) -> Tensor:
    """WebDataset, Pillow and torchvision's transforms, and float32 in the memory layout that networks have."""
    norm = saved.normalisation
    transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(norm.mean, norm.std)])
    batches = wds.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg;png").map_tuple(transform).batched(PEER_BATCH)
    with torch.inference_mode():
        return torch.cat([net(images) for (images,) in batches])


@dataclass(frozen=True)
class Pass:
    """A teacher, and the data that it looks at: as a data set, and as batches of tensors, normalised. `epoch`: the one whose weights these
    are, None where the teacher keeps none."""

    data: Dataset
    saved: Saved
    net: nn.Module
    batches: list[Tensor]
    epoch: int | None
    folders: Iterator[Path]
    jobs: int

    def bare(self, net: nn.Module) -> Tensor:
        """The limit."""
        with evaluating(net, torch.device("cpu")) as one:
            return torch.cat([one(images).float() for images in self.batches])

    def score(self, precision: str, **more: Any) -> Path:
        """The command, into a new folder."""
        settings = {"data": self.data.folder, "teacher": self.saved.folder, "epoch": self.epoch, "precision": precision}
        return self._run(score.run, score.ScoreConfig, settings | more)

    def cache(self, precision: str, **more: Any) -> Path:
        """The command, into a new folder."""
        settings = {"subset": self.data.folder, "teacher": self.saved.folder, "views": "1", "precision": precision}
        return self._run(cache.run, cache.CacheConfig, settings | more)

    def _run(self, run: Callable[[Any], object], config: Any, settings: dict[str, Any]) -> Path:
        out = next(self.folders)
        with quiet():
            run(config.from_dict(settings | {"out": out, "batch": BATCH, "device": "cpu", "jobs": self.jobs}))
        return out

    def check(self, plain: nn.Module, paths: list[str]) -> None:
        """What is compared is the same: all loops give the logits of the same samples, in the same order."""
        said = self.bare(self.net)
        least = said - said.amax(1, keepdim=True)
        scored = Scores.open(self.score("float32", logits=True)).vectors("logits")[1]
        assert np.array_equal(scored, said.numpy().astype(np.float16))
        cached = LogitCache.open(self.cache("float32", views="identity", dtype="float32"))
        assert np.array_equal(cached.join(self.data).read(self.data.usable(), 0).logits, least.numpy())
        scale = float(said.abs().max())
        assert torch.allclose(peer(plain, paths, self.saved), said, rtol=0, atol=1e-4 * scale)


def prepared(work: Path, asked: argparse.Namespace) -> Pass:
    """The data and the teacher: those given, or images of a Parquet file and random weights."""
    if asked.data.is_dir():
        whole = Dataset.open(asked.data)
        part = {"data": asked.data, "frac": f"{min(1.0, asked.samples / len(whole)):.6f}", "out": work / "part"}
        with quiet():
            select.run(select.SelectConfig.from_dict(part))
        data = Dataset.open(work / "part")
    else:
        data = shards.imported(work / "data", shards.written(work / "theirs", *shards.read(asked.data, asked.samples)))
    saved = open_model(asked.teacher or adopted(work / "teachers", data, asked.model))
    net = saved.load(code=None)
    images, rows = Images(data), order.batches(data.usable(), BATCH)
    seen = [saved.normalisation.apply(views.evaluation(images.get(some), saved.architecture.size)) for some in rows]
    epoch = saved.kept_epochs[-1] if saved.kept_epochs else None
    return Pass(data, saved, net, seen, epoch, (work / "runs" / f"{n}" for n in itertools.count()), asked.threads)


def costs(folder: Path) -> dict[str, Any]:
    """What bf16 costs, as the manifest has it."""
    found = Manifest.load(folder).counts["bf16"]
    ranks = [value for value in found.get("ranks", {}).values() if value is not None]
    cells: dict[str, Any] = {f"KL at {tau}": kl for tau, kl in found["kl"].items()}
    if ranks:
        cells["least rank correlation"] = f"{min(ranks):.4f}"
    return cells | ({"same top 1, %": 100 * found["top1"]} if "top1" in found else {})


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=10_000)
    made.set_defaults(rounds=3)
    made.add_argument("--model", default="resnet20", help="Of the teacher with random weights.")
    made.add_argument("--teacher", type=Path, help="A trained teacher; --data is then the folder of a data set that it knows.")
    asked = made.parse_args()
    torch.set_num_threads(asked.threads)
    choose_device("cpu")  # with what it sets for a process, for all loops
    with tempfile.TemporaryDirectory() as temporary:
        one = prepared(asked.work or Path(temporary), asked)
        paths = [str(path) for path in one.data.shard_paths]
        plain = copy.deepcopy(one.net).eval()
        one.check(plain, paths)
        low = in_bf16(one.net, size=one.saved.architecture.size, device=torch.device("cpu"), tell=print)
        asks = {"score": one.score, "cache": one.cache}
        loops: dict[tuple[str, str], Callable[[], object]] = {
            (PEER, "float32"): lambda: peer(plain, paths, one.saved),
            (BARE, "float32"): lambda: one.bare(one.net),
            (BARE, "bf16"): lambda: one.bare(low),
        }
        loops |= {(name, numbers): lambda ask=ask, p=numbers: ask(p) for numbers in ("float32", "bf16") for name, ask in asks.items()}
        about = measured(asked, ["webdataset", "torchvision", "pillow", "simplejpeg", "numpy"], n=len(one.data), batch=BATCH)
        about |= {"teacher": one.saved.manifest.name if asked.teacher else "random weights", "rounds": asked.rounds}
        seconds = in_turns({" ".join(key): loop for key, loop in loops.items()}, asked.rounds, cpu=asked.cpu)
        lost = {(name, "bf16"): costs(ask("bf16")) for name, ask in asks.items()}
    report(asked, [row(key, seconds, len(one.data), lost.get(key, {})) for key in loops], about)


def row(key: tuple[str, str], seconds: dict[str, list[float]], n: int, lost: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    own = " ".join(key)
    cells: dict[str, Any] = {"pass": key[0], "numbers": key[1], "images/s": round(n / statistics.median(seconds[own]))}
    cells["of the bare loop"] = 1 / ratios(seconds, f"{BARE} {key[1]}")[own]
    cells["times the peer"] = 1 / ratios(seconds, f"{PEER} float32")[own]
    columns = ("KL at 1", "KL at 2", "KL at 4", "least rank correlation", "same top 1, %")
    return cells | {name: lost.get(name) for name in columns} | {"goal": GOALS.get(key)}


if __name__ == "__main__":
    main()
