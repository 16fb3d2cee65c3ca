"""learn/stream.py: what a training epoch shows, to our own loop and to anybody's DataLoader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdprune_data import order
from kdprune_data.errors import MismatchError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.images import decode
from kdprune_data.learn import decoded, inference, stream, views
from kdprune_data.learn.decoded import Images
from kdprune_data.learn.stream import Batch, CachedViews, DrawnViews, Feed, cached_views, normalisation_of
from kdprune_data.learn.views import Policy

SUBSET, CACHE = Path("subsets/random-0.5-s0"), Path("logits/random-0.5-s0--resnet8-s0")
DRAWN = Policy("pad-crop", 8, False, 0, pad=1)


def feed(folder: Path, *, batch: int = 16, seed: int = 0, threads: int = 1, count: int | None = None) -> Feed:
    data = Dataset.open(folder)
    return Feed(Images(data), DrawnViews(data, DRAWN, count), batch, seed, threads)


def same(a: Batch, b: Batch) -> bool:
    soft = (a.logits is None and b.logits is None) or (a.logits is not None and b.logits is not None and torch.equal(a.logits, b.logits))
    return soft and np.array_equal(a.rows, b.rows) and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# --- Images


def test_images_are_those_of_the_shards(chain: Path) -> None:
    data = Dataset.open(chain / "data/train")
    images = Images(data)
    rows = np.array([5, 0, 107, 5])
    expected = np.stack([decode(data.image_bytes(row)) for row in rows.tolist()])
    for _ in range(2):  # decoded, then remembered
        found = images.get(rows)
        assert np.array_equal(found, expected)
        found[:] = 0  # what is handed out is the caller's


def test_images_of_several_sizes_come_as_a_list(tmp_path: Path, class_folders: Path, kdprune: Callable[..., Any]) -> None:
    from PIL import Image

    one = next(class_folders.rglob("*.png"))
    with Image.open(one) as image:
        image.resize((20, 11)).save(one)
    assert kdprune("import", class_folders, cwd=tmp_path).code == 0
    data = Dataset.open(tmp_path / "data/train")
    found = Images(data).get(np.arange(len(data)))
    assert isinstance(found, list)
    assert [image.shape[:2] for image in found] == [tuple(size) for size in data.sizes.tolist()]
    policy = views.policy_for(data.sizes, data.classes, size=12, flip="auto", seed=0)
    batch = next(Feed(Images(data), DrawnViews(data, policy), 30, 0).epoch(0))
    assert batch.images.shape == (30, 3, 12, 12)
    boxes = views.geometry(policy, data.uids[batch.rows], data.sizes[batch.rows], 0)
    assert torch.equal(batch.images, views.render([found[row] for row in batch.rows], boxes, 12))


class Counting(Images):
    """Images that note how many were asked for at a time."""

    def __init__(self, data: Dataset, keep: str = "auto") -> None:
        super().__init__(data, keep=keep)
        self.most = 0

    def get(self, rows: np.ndarray) -> Any:
        self.most = max(self.most, len(rows))
        return super().get(rows)


@pytest.mark.parametrize("keep", ["auto", "on", "off"])
@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (3 * 64, 1), (5 * 3 * 64, 5), (32_000_000, 60)])
def test_few_images_are_decoded_at_a_time(chain: Path, monkeypatch: pytest.MonkeyPatch, keep: str, at_once: int, most: int) -> None:
    """However large the batch, and with the same bytes: photographs are large, what they are rendered to is not."""
    data = Dataset.open(chain / "data/train")
    rows = np.arange(107, 47, -1)
    boxes = views.geometry(DRAWN, data.uids[rows], data.sizes[rows], 1)
    pixels = Images(data).get(rows)
    monkeypatch.setattr(decoded, "DECODED_BYTES", at_once)
    for make, expected in (
        (lambda images: Feed(images, DrawnViews(data, DRAWN), 60, 0).make(rows, 1).images, views.render(pixels, boxes, 8)),
        (lambda images: next(inference.evaluation_batches(images, [rows], size=8))[1], views.evaluation(pixels, 8)),
        (lambda images: next(inference.evaluation_batches(images, [rows], size=12))[1], views.evaluation(pixels, 12)),
    ):
        images = Counting(data, keep)
        assert torch.equal(make(images), expected)
        assert images.most == most
    images = Counting(data, keep)
    assert normalisation_of(images) == normalisation_of(Images(data))
    assert images.most == (most if at_once < 10**6 else 108)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 11)], ids=["one size", "two sizes"])
def test_normalisation_is_the_same_in_any_number_of_threads(
    tmp_path: Path, kdprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, threads: int, sizes: tuple[int, int]
) -> None:
    """And it says how far it is."""
    from PIL import Image

    pixels = [np.random.default_rng(n).integers(0, 256, (sizes[n % 2], 9, 3), dtype=np.uint8) for n in range(7)]
    for n, image in enumerate(pixels):
        (tmp_path / f"photos/{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"photos/{n % 2}/{n}.png")
    assert kdprune("import", tmp_path / "photos", cwd=tmp_path).code == 0
    monkeypatch.setattr(decoded, "DECODED_BYTES", 600)
    ticks: list[int] = []
    found = normalisation_of(Images(Dataset.open(tmp_path / "data/train")), threads=threads, tick=ticks.append)
    flat = np.concatenate([image.reshape(-1, 3) for image in pixels]).astype(np.float64) / 255
    assert found.mean == pytest.approx(flat.mean(0), abs=1e-6)
    assert found.std == pytest.approx(flat.std(0), abs=1e-6)
    assert (sum(ticks), len(ticks)) == (7, 4)


def test_normalisation_of_is_the_mean_and_deviation_of_the_pixels(chain: Path) -> None:
    data = Dataset.open(chain / "data/train")
    pixels = np.stack([decode(data.image_bytes(row)) for row in range(len(data))]).astype(np.float64) / 255
    found = normalisation_of(Images(data))
    assert found.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
    assert found.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)


def test_normalisation_of_many_samples_takes_some_of_all(
    tmp_path: Path, class_folders: Path, kdprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adopted shards may come class by class: the samples taken are those of the smallest hashes, wherever they stand."""
    assert kdprune("import", class_folders, cwd=tmp_path).code == 0
    data = Dataset.open(tmp_path / "data/train")
    monkeypatch.setattr(stream, "NORMALISATION_SAMPLES", 10)
    chosen = np.argsort(order.order_hash(data.uids, 0, "normalisation"))[:10]
    assert sorted(chosen.tolist()) != list(range(10))
    pixels = np.stack([decode(data.image_bytes(row)) for row in chosen.tolist()]).astype(np.float64) / 255
    found = normalisation_of(Images(data))
    assert found.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
    assert found.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)


# --- Feed


@pytest.mark.parametrize("batch", [1, 7, 16, 53, 107, 108, 500])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_shows_every_sample_once(chain: Path, batch: int, epoch: int) -> None:
    one = feed(chain / "data/train", batch=batch)
    batches = list(one.epoch(epoch))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(108))
    assert len(batches) == one.steps_per_epoch()
    lengths = [len(b.rows) for b in batches]
    assert max(lengths) <= batch
    assert max(lengths) - min(lengths) <= 1  # no straggler for batch norm to learn noise from


def test_samples_that_do_not_decode_are_not_shown(tmp_path: Path, class_folders: Path, kdprune: Callable[..., Any]) -> None:
    broken = sorted(class_folders.rglob("*.jpg"))[:3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    assert kdprune("import", class_folders, "--on-bad", "keep", cwd=tmp_path).code == 0
    data = Dataset.open(tmp_path / "data/train")
    shown = np.concatenate([b.rows for b in feed(tmp_path / "data/train").epoch(0)])
    left_out = set(data.ids.tolist()) - set(data.ids[shown].tolist())
    assert left_out == {path.relative_to(class_folders).with_suffix("").as_posix() for path in broken}


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(chain: Path, threads: int) -> None:
    plain = list(feed(chain / "data/train", threads=0).epoch(2))
    threaded = list(feed(chain / "data/train", threads=threads).epoch(2))
    assert all(same(a, b) for a, b in zip(plain, threaded, strict=True))


def test_the_order_is_that_of_order_py(chain: Path) -> None:
    data = Dataset.open(chain / "data/train")
    for epoch in range(3):
        walk = order.epoch_order(data.uids, data.shards, seed=5, epoch=epoch)
        shown = np.concatenate([b.rows for b in feed(chain / "data/train", seed=5).epoch(epoch)])
        assert shown.tolist() == walk.tolist()


@pytest.mark.parametrize(("count", "epochs_alike"), [(None, []), (1, [(0, 1), (1, 2)]), (2, [(0, 2), (1, 3)])])
def test_drawn_views_are_fresh_or_come_round(chain: Path, count: int | None, epochs_alike: list[tuple[int, int]]) -> None:
    one = feed(chain / "data/train", count=count)
    rows = np.arange(108)
    shown = [one.make(rows, epoch).images for epoch in range(4)]
    alike = [(a, b) for a in range(4) for b in range(a + 1, 4) if torch.equal(shown[a], shown[b])]
    assert set(epochs_alike) <= set(alike)
    assert (len(alike) == 0) == (count is None)


def test_labels_and_images_belong_to_the_rows(chain: Path) -> None:
    one = feed(chain / "data/train")
    data = one.images.data
    for batch in one.epoch(1):
        boxes = views.geometry(DRAWN, data.uids[batch.rows], data.sizes[batch.rows], 1)
        pixels = np.stack([decode(data.image_bytes(row)) for row in batch.rows.tolist()])
        assert torch.equal(batch.images, views.render(pixels, boxes, 8))
        assert batch.labels.tolist() == data.labels[batch.rows].tolist()
        assert batch.labels.dtype == torch.int64
        assert batch.logits is None


@pytest.mark.parametrize("folder", ["data/train", str(SUBSET)])
def test_a_batch_that_cannot_be_made_says_so(chain_copy: Path, folder: str) -> None:
    """An error in a thread reaches the loop, and ends it."""
    one = feed(chain_copy / folder, threads=2)
    tar = one.images.data.shard_paths[0]
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(Exception, match=r"shard-000000\.tar (was changed|is shorter than its index says)"):
        list(one.epoch(0))


@pytest.mark.parametrize("command", ["teacher", "score"])
def test_a_sample_that_does_not_decode_is_named(chain_copy: Path, kdprune: Callable[..., Any], command: str) -> None:
    """Of a set that was adopted without reading the images; everything before them was."""
    source = Dataset.open(chain_copy / "data/train")
    (chain_copy / "broken").mkdir()
    for path in source.shard_paths:
        (chain_copy / "broken" / path.name).write_bytes(path.read_bytes())
    broken = chain_copy / "broken" / source.shard_paths[1].name
    row = 57
    at, size = (int(source.index[name][row].as_py()) for name in ("image_offset", "image_length"))
    data = bytearray(broken.read_bytes())
    data[at + size // 2 : at + size] = bytes(size - size // 2)
    broken.write_bytes(data)
    index = ["index", "broken", "--no-digests", "--out", "data/broken", "--classes", "names.txt"]
    (chain_copy / "names.txt").write_text("\n".join(source.classes))
    ran = kdprune(*index, cwd=chain_copy)
    assert ran.code == 0, ran.err
    more = ["--model", "resnet8", "--epochs", 1] if command == "teacher" else []
    ran = kdprune(command, "--data", "data/broken", "--name", "x", *more, cwd=chain_copy)
    said = (
        rf"error: sample '{source.ids[row]}' in .*{broken.name}: not an image that decodes .*; index the shards again without --no-digests"
    )
    assert (ran.code, ran.out) == (1, "")
    assert re.search(said, ran.err), ran.err


# --- views replayed from a cache


def replay(chain: Path, **settings: Any) -> tuple[Dataset, CachedViews]:
    data = Dataset.open(chain / SUBSET)
    return data, cached_views(data, LogitCache.open(chain / CACHE), **settings)


def test_cached_views_are_the_drawn_ones_with_what_the_teacher_said(chain: Path) -> None:
    data, source = replay(chain)
    for epoch in range(7):
        cached = Feed(Images(data), source, 16, 0)
        drawn = Feed(Images(data), DrawnViews(data, source.policy, 3), 16, 0)
        for a, b in zip(cached.epoch(epoch), drawn.epoch(epoch), strict=True):
            assert np.array_equal(a.rows, b.rows)
            assert torch.equal(a.images, b.images)
            stored = source.joined.read(a.rows, epoch % 3).logits
            assert a.logits is not None
            assert a.logits.dtype == torch.float32
            assert np.array_equal(a.logits.numpy(), stored.astype(np.float32))
            assert (a.logits.max(1).values == 0).all()


@pytest.mark.parametrize(("count", "period"), [(None, 3), (1, 1), (2, 2), (3, 3)])
def test_epoch_e_reads_view_e_mod_v(chain: Path, count: int | None, period: int) -> None:
    data, source = replay(chain, count=count)
    rows = np.arange(len(data))
    for epoch in range(6):
        assert np.array_equal(source.show(rows, epoch)[1], source.joined.read(rows, epoch % period).logits)


def test_more_views_than_there_are(chain: Path) -> None:
    with pytest.raises(UsageError, match="has 3 views, 4 are asked for"):
        replay(chain, count=4)


def test_other_classes_are_refused(tmp_path: Path, chain: Path, class_folders: Path, kdprune: Callable[..., Any]) -> None:
    assert kdprune("import", class_folders, cwd=tmp_path).code == 0
    with pytest.raises(MismatchError, match="use data with the same classes"):
        cached_views(Dataset.open(tmp_path / "data/train"), LogitCache.open(chain / CACHE))


@pytest.mark.parametrize("start", [0, 2])
def test_a_feed_gives_each_batch_its_weights(chain: Path, start: int) -> None:
    data = Dataset.open(chain / "data/train")
    weights = np.arange(108, dtype=np.float32)
    drawn = DrawnViews(data, DRAWN)
    for batch in Feed(Images(data), drawn, 16, 0, 2, weights).epoch(1, start):
        assert batch.weights is not None
        assert batch.weights.tolist() == batch.rows.tolist()
    assert next(Feed(Images(data), drawn, 16, 0).epoch(1)).weights is None


def test_prefetch_runs_few_items_ahead() -> None:
    """So that memory does not grow with the data."""
    made: list[int] = []
    running = stream.prefetch(lambda n: made.append(n) or n, range(1000), 2)
    assert [next(running) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(made) <= 5 + 2 * 2 + 1
    running.close()
    assert len(made) < 20
