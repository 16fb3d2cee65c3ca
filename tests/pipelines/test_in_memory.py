"""`--in-memory` and `--decode`: what is kept where changes no result, and a scaled decoder is part of the views."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdprune_data.errors import UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.learn import decoded, views
from kdprune_data.learn.decoded import Images
from kdprune_data.learn.policy import DECODERS
from kdprune_data.learn.stream import DrawnViews, Feed

Cli = Callable[..., Any]
SUBSET, CACHE = Path("subsets/random-0.5-s0"), Path("logits/random-0.5-s0--resnet8-s0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """A workspace with a data set of JPEGs and PNGs of many sizes, in three classes."""
    workspace = tmp_path_factory.mktemp("photos")
    for n in range(36):
        high, wide = 90 + 11 * (n % 7), 80 + 17 * (n % 5)
        y, x = np.mgrid[:high, :wide]
        waves = [128 + 100 * np.sin(y / (5 + n % 3) + n), 128 + 100 * np.cos(x / (4 + n % 11)), 128 + 90 * np.sin((x + y) / 9)]
        path = workspace / f"source/{n % 3}/{n:02d}.{'png' if n % 9 == 8 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack(waves, 2).astype(np.uint8)).save(path)
    ran = kdprune("import", "source", "--holdout", "0.25", cwd=workspace)
    assert ran.code == 0, ran.err
    return workspace


def digest(folder: Path) -> str:
    return Manifest.load(folder).digest


@pytest.mark.parametrize("in_memory", ["on", "off"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_small_images(chain_copy: Path, kdprune: Cli, in_memory: str, jobs: int) -> None:
    """Teachers and students are those of the automatic choice, to the byte."""
    train = ["--model", "resnet8", "--epochs", 2, "--batch", 16]
    for line, made in (
        (["teacher", *train, "--seed", 3], "teachers/{}"),
        (["distill", SUBSET, "--logits", CACHE, *train, "--check-labels", 0], "students/{}"),
    ):
        for name, more in (("auto", []), ("other", ["--in-memory", in_memory, "--jobs", jobs])):
            ran = kdprune(*line, "--name", name, *more, cwd=chain_copy)
            assert ran.code == 0, ran.err
        assert len({digest(chain_copy / made.format(name)) for name in ("auto", "other")}) == 1


@pytest.mark.parametrize("decode", ["exact", "scaled"])
def test_images_of_many_sizes(photos: Path, kdprune: Cli, tmp_path: Path, decode: str) -> None:
    train = ["teacher", "--model", "resnet8", "--size", 24, "--epochs", 2, "--batch", 8, "--decode", decode]
    for in_memory in ("on" if decode == "exact" else "auto", "off"):
        ran = kdprune(*train, "--in-memory", in_memory, "--out", tmp_path / in_memory, cwd=photos)
        assert ran.code == 0, ran.err
    assert digest(tmp_path / ("on" if decode == "exact" else "auto")) == digest(tmp_path / "off")
    made = Manifest.load(tmp_path / "off").config["policy"]
    assert (made["decoder"], made["kernel"]) == (DECODERS[decode], "bilinear, antialiased, uint8")


@pytest.mark.parametrize("decode", ["exact", "scaled"])
def test_what_was_cached_is_what_is_shown(photos: Path, kdprune: Cli, tmp_path: Path, decode: str) -> None:
    """A teacher that is asked again, which renders each view by itself, and one that is asked live, say what the cache holds."""
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    for line in (
        ["teacher", "--model", "resnet8", "--size", 24, "--epochs", 2, "--out", teacher],
        ["cache", "data/train", "--teacher", teacher, "--views", 3, "--decode", decode, "--dtype", "float32", "--out", cache],
        ["verify", cache, "--teacher", teacher, "--data", "data/train"],
    ):
        ran = kdprune(*line, cwd=photos)
        assert ran.code == 0, ran.err
    assert LogitCache.open(cache).policy["decoder"] == DECODERS[decode]
    train = ["distill", "data/train", "--model", "resnet8", "--steps", 6, "--batch", 9, "--lr", 0.01, "--alpha", 1, "--view-seed", 0]
    for name, more in (("cached", []), ("live", ["--live", teacher])):
        ran = kdprune(*train, "--logits", cache, *more, "--out", tmp_path / name, cwd=photos)
        assert ran.code == 0, ran.err
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("cached", "live")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_another_decoder_than_the_caches_is_refused(photos: Path, kdprune: Cli, tmp_path: Path) -> None:
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    for line in (
        ["teacher", "--model", "resnet8", "--size", 24, "--steps", 1, "--out", teacher],
        ["cache", "data/train", "--teacher", teacher, "--views", 1, "--out", cache],
    ):
        assert kdprune(*line, cwd=photos).code == 0
    ran = kdprune("distill", "data/train", "--logits", cache, "--decode", "scaled", "--out", tmp_path / "x", cwd=photos)
    assert ran.code == 1
    assert "decoder is libjpeg-turbo, Pillow, asked libjpeg-turbo scaled, Pillow" in ran.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["teacher", "--decode", "scaled"], "--decode scaled is for crops that are resized, and these are cut as they are: leave it out"),
        (["cache", SUBSET, "--views", "identity", "--decode", "scaled"], "--views identity shows the image itself"),
        (
            ["teacher", "--in-memory", "on", "--decode", "scaled"],
            "keeps whole images, and --decode scaled decodes them anew for every view",
        ),
        (["teacher", "--in-memory", "maybe"], "'maybe' is not one of 'auto', 'on', 'off'"),
    ],
)
def test_refused(chain: Path, kdprune: Cli, line: list[Any], said: str) -> None:
    ran = kdprune(*line, "--name", "x", cwd=chain)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err.replace("\n", " ")


# --- Images


def test_too_little_memory(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for and does not fit is refused with both numbers; automatically, half of what is free is the limit."""
    data = Dataset.open(chain / "data/train")
    size = Images(data).bytes
    assert size == 108 * 8 * 8 * 3
    monkeypatch.setattr(decoded, "free_memory", lambda: size - 1)
    with pytest.raises(UsageError, match=r"--in-memory on keeps all images decoded, 0\.0 GB, and 0\.0 GB of memory are free: leave it out"):
        Images(data, keep="on")
    for free, kept in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(decoded, "free_memory", lambda free=free: free)
        assert (Images(data)._kept is not None) is kept


def test_free_memory_is_what_the_system_says() -> None:
    assert 10**7 < decoded.free_memory() < 10**14


@pytest.mark.parametrize("kind", ["pad-crop", "resized-crop", "identity"])
def test_a_copy_on_the_device_shows_the_same(chain: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The way of a GPU, taken on the CPU: batches are gathered and cropped there."""
    data = Dataset.open(chain / "data/train")
    policy = views.Policy(kind, 8 if kind == "pad-crop" else 12, kind != "identity", 0, pad=2 if kind == "pad-crop" else 0)
    plain = Feed(Images(data, keep="off"), DrawnViews(data, policy, 1), 16, 0)
    monkeypatch.setattr(Images, "_copies", lambda self: True)
    there = Feed(Images(data), DrawnViews(data, policy, 1), 16, 0, threads=3)
    for epoch in range(2):
        for a, b in zip(plain.epoch(epoch), there.epoch(epoch), strict=True):
            assert torch.equal(a.images, b.images)
    assert there.images._copy is not None
    assert bool(there.images._copy._there.all()) is (kind == "pad-crop")


def test_an_image_of_another_size_than_was_indexed_is_named(chain_copy: Path, kdprune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set without digests, where nothing else tells."""
    (chain_copy / "theirs").mkdir()
    source = Dataset.open(chain_copy / "data/train")
    for path in source.shard_paths:
        (chain_copy / "theirs" / path.name).write_bytes(path.read_bytes())
    assert kdprune("index", "theirs", "--no-digests", "--out", "data/theirs", cwd=chain_copy).code == 0
    data = Dataset.open(chain_copy / "data/theirs")
    monkeypatch.setattr(decoded, "decode", lambda data: np.zeros((9, 8, 3), np.uint8))
    for keep in ("on", "off"):
        with pytest.raises(Exception, match="is not as large as the image that was indexed; make or fetch"):
            Images(data, keep=keep).get(np.array([3, 4]))
