"""What training steps cost a student with cached soft labels, beside the same steps with labels alone, and beside teachers that are asked
live.

All loops are the product's own: the same feed of images in memory and the same boxes of the cache's views, the same loss but for alpha, and
networks that begin with the same weights. The cache holds what the live teacher of the student's size says, so those two learn the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shards
import torch
from common import in_turns, measured, parser, ratios, report
from kdprune_pipelines import cache
from kdprune_pipelines._console import quiet
from kdprune_pipelines._models import open_model
from torch import Tensor
from untrained import NORMALISATION, adopted

from kdprune_data.formats.logits import LogitCache
from kdprune_data.learn.hooks import Hooks
from kdprune_data.learn.inference import Predictor, choose_device
from kdprune_data.learn.live import Teacher
from kdprune_data.learn.loop import Recipe, Training
from kdprune_data.learn.losses import Mix, distillation
from kdprune_data.learn.models import build, resolve
from kdprune_data.learn.stream import Batch, BoxesOnly, CachedViews, Feed, Images, cached_views

BATCH = 128
LABELS, CACHED, LIVE = "labels only", "cached soft labels", "live teacher, {}"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lesson:
    """What all students have in common. `views`: the cache's, with its soft labels."""

    images: Images
    views: CachedViews
    model: str
    steps: int
    jobs: int

    def student(self, alpha: float, live: Teacher | None) -> tuple[Training, Callable[[Tensor, Batch], Tensor]]:
        """A fresh student, and its loss."""
        size, classes = self.views.policy.size, len(self.images.data.classes)
        net = build(resolve(self.model, classes=classes, size=size), seed=0)
        views = self.views if alpha and live is None else BoxesOnly(self.views)
        feed = Feed(self.images, views, BATCH, 0, self.jobs)
        training = Training(net, feed, Recipe(epochs=1, steps=self.steps), normalisation=NORMALISATION, device=CPU, teacher=live)
        mix = Mix(alpha, 4.0)
        return training, lambda logits, batch: distillation(logits, batch.logits, batch.labels, mix=mix, weights=batch.weights)

    def learn(self, alpha: float, live: Teacher | None = None) -> Training:
        """All steps."""
        training, loss_of = self.student(alpha, live)
        training.run(loss_of, Hooks())
        return training


def check(lesson: Lesson, live: Teacher) -> None:
    """What is compared is the same: cached soft labels are, to the rounding of float16, what the live teacher says of the same pixels; and
    the labels and the pixels of all loops are equal."""
    feeds = [lesson.student(alpha, one)[0].feed for alpha, one in ((0.0, None), (0.9, None), (0.9, live))]
    plain, cached, shown = (next(feed.epoch(0)) for feed in feeds)
    assert torch.equal(plain.images, cached.images)
    assert torch.equal(plain.images, shown.images)
    assert torch.equal(plain.labels, cached.labels)
    said = live(shown.images)
    assert cached.logits is not None
    assert torch.allclose(cached.logits, said - said.amax(1, keepdim=True), rtol=2e-3, atol=2e-3 * float(said.abs().max()))


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=4_096)
    made.set_defaults(rounds=3)
    made.add_argument("--steps", type=int, default=24, help=f"Training steps of a timed loop, of {BATCH} samples each.")
    made.add_argument("--model", default="resnet20", help="Of the student, and of the teacher of its size.")
    made.add_argument("--large", default="resnet56", help="Of the larger teacher.")
    asked = made.parse_args()
    torch.set_num_threads(asked.threads)
    choose_device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        lesson, live = prepared(asked.work or Path(temporary), asked)
        check(lesson, live[asked.model])
        loops: dict[str, Callable[[], object]] = {LABELS: lambda: lesson.learn(0.0), CACHED: lambda: lesson.learn(0.9)}
        loops |= {LIVE.format(name): lambda one=one: lesson.learn(0.9, one) for name, one in live.items()}
        about = measured(asked, ["numpy", "pyarrow"], n=len(lesson.images.data), batch=BATCH, steps=asked.steps, rounds=asked.rounds)
        seconds = in_turns(loops, asked.rounds, cpu=asked.cpu)
    by_labels, by_cached = ratios(seconds, LABELS), ratios(seconds, CACHED)
    goals = {
        CACHED: "at most 1.05 times labels only",
        LIVE.format(asked.model): "at least 1.2 times cached",
        LIVE.format(asked.large): "at least 1.6 times cached",
    }
    rows: list[dict[str, Any]] = []
    for name, found in seconds.items():
        took, images = statistics.median(found), asked.steps * BATCH
        times = {"seconds": took, "images/s": round(images / took), "times labels only": by_labels[name], "times cached": by_cached[name]}
        rows.append({"student": name} | times | {"goal": goals.get(name)})
    report(asked, rows, about)


def prepared(work: Path, asked: argparse.Namespace) -> tuple[Lesson, dict[str, Teacher]]:
    """The data, a cache of two views, and the live teachers; every image is decoded once."""
    data = shards.imported(work / "data", shards.written(work / "theirs", *shards.read(asked.data, asked.samples)))
    folders = {model: adopted(work / "teachers", data, model) for model in (asked.model, asked.large)}
    with quiet():
        settings = {"subset": data.folder, "teacher": folders[asked.model], "views": "2", "out": work / "logits", "device": "cpu"}
        cache.run(cache.CacheConfig.from_dict(settings))
    views, images = cached_views(data, LogitCache.open(work / "logits")), Images(data)
    images.get(data.usable())
    size = views.policy.size
    live = {name: Teacher(Predictor(open_model(folder).load(code=None), NORMALISATION, size, CPU)) for name, folder in folders.items()}
    return Lesson(images, views, asked.model, asked.steps, asked.threads), live


if __name__ == "__main__":
    main()
