"""`as_webdataset`: the soft labels of the view that an epoch shows, joined by id, behind webdataset's own stages."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import DataLoader

from kdprune_data import as_webdataset, order
from kdprune_data.errors import KdpruneError, MismatchError, SourceError, UsageError
from kdprune_data.formats import tar
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.learn import views
from kdprune_data.learn.stream import Images

Cli = Callable[..., Any]
SUBSET, CACHE = "subsets/random-0.5-s0", "logits/random-0.5-s0--resnet8-s0"


def agrees(samples: Any, subset: Path, cache: Path, epoch: int) -> None:
    """Every sample of the subset once, with what the cache says of it in that epoch, to the bit, and those very pixels."""
    data, of = Dataset.open(subset), LogitCache.open(cache)
    joined, place = of.join(data), {one: row for row, one in enumerate(data.ids.tolist())}
    found = list(samples)
    assert sorted(one["__id__"] for one in found) == sorted(data.ids[data.usable()])
    for one in found:
        row = np.array([place[one["__id__"]]])
        said = joined.read(row, epoch % of.views)
        assert one["__key__"] == data.index["key"][int(row[0])].as_py()
        assert (one["logits"].dtype, one["logits"].tolist()) == (torch.float32, said.logits[0].astype(np.float32).tolist())
        assert one["box"].tolist() == [int(side[0]) for side in said[:4]]
        assert (one["flip"], one["weight"]) == (bool(said.flip[0]), float(data.weights[row[0]]))
        assert one.get("cls") == (b"%d" % data.labels[row[0]] if data.labels[row[0]] >= 0 else None)
        pixels = views.render(Images(data).get(row), views.Geometry(*said[:5]), of.policy["size"])[0]
        assert torch.equal(one["image"], pixels)


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_every_sample_with_what_the_cache_says(chain: Path, epoch: int) -> None:
    agrees(as_webdataset(chain / SUBSET, chain / CACHE, epoch=epoch, render=True), chain / SUBSET, chain / CACHE, epoch)


def test_members_are_the_shards(chain: Path) -> None:
    """webdataset's own samples, with ours beside."""
    plain = {one["__key__"]: one for one in map(dict, as_webdataset(chain / SUBSET, chain / CACHE))}
    data = Dataset.open(chain / SUBSET)
    for row, one in enumerate(plain.values()):
        assert one.keys() == {"__key__", "__url__", "__id__", "png", "cls", "logits", "box", "flip", "weight"}, row
    assert {key: one["png"] for key, one in plain.items()} == {key: data.image_bytes(row) for row, key in enumerate(data.ids)}


def test_the_first_views_in_turn(chain: Path) -> None:
    for epoch in range(4):
        few, of_two = (as_webdataset(chain / SUBSET, chain / CACHE, epoch=e, views=v) for e, v in ((epoch, 2), (epoch % 2, None)))
        assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(sorted_(few), sorted_(of_two), strict=True))


def sorted_(samples: Any) -> list[Any]:
    return sorted(samples, key=lambda one: one["__key__"])


@pytest.mark.parametrize("epoch", [0, 3])
def test_fresh_views_without_a_cache(chain: Path, epoch: int) -> None:
    data = Dataset.open(chain / SUBSET)
    policy = views.policy_for(data.sizes, data.classes, size=None, flip="auto", seed=7)
    boxes = views.geometry(policy, data.uids, data.sizes, epoch)
    pixels = views.render(Images(data).get(np.arange(len(data))), boxes, 8)
    found = {one["__id__"]: one for one in as_webdataset(chain / SUBSET, epoch=epoch, seed=7, render=True)}
    for row, one in enumerate(data.ids):
        assert torch.equal(found[one]["image"], pixels[row])
        assert "logits" not in found[one]


def test_weights_of_a_subset(chain_copy: Path, weigh: Any) -> None:
    n = len(Dataset.open(chain_copy / SUBSET))
    weigh(chain_copy / SUBSET, np.linspace(0, 2, n))
    found = {one["__id__"]: one["weight"] for one in as_webdataset(chain_copy / SUBSET)}
    data = Dataset.open(chain_copy / SUBSET)
    assert [found[one] for one in data.ids] == data.weights.tolist()


# --- order


def test_shards_come_as_an_epoch_takes_them(chain: Path) -> None:
    """Another order in another epoch and for another seed; the samples of one as they lie."""
    data = Dataset.open(chain / "data/train")
    met = set()
    for seed, epoch in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0)):
        shards = order.shard_order(data.shards, seed=seed, epoch=epoch)
        ids = [one["__id__"] for one in as_webdataset(chain / "data/train", seed=seed, epoch=epoch)]
        assert ids == [one for shard in shards for one in data.ids[data.rows_of(shard)]]
        met.add(tuple(shards))
    assert len(met) > 1


def test_shard_order_is_that_of_training() -> None:
    """With more shards than a group holds, groups follow one another as their shards do."""
    shards = np.repeat(np.arange(40), 3)
    uids = order.uids_of(map(str, range(len(shards))))
    for epoch in range(3):
        walk = shards[order.epoch_order(uids, shards, seed=5, epoch=epoch)]
        by_hash = order.shard_order(shards, seed=5, epoch=epoch)
        assert [set(walk[48 * n : 48 * (n + 1)]) for n in range(3)] == [set(by_hash[16 * n : 16 * (n + 1)]) for n in range(3)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_share_the_shards_and_see_the_epoch(chain: Path, context: str) -> None:
    """Persistent ones too: each sample once in every epoch, with that epoch's view."""
    samples = as_webdataset(chain / SUBSET, chain / CACHE).decode().to_tuple("__id__", "logits").batched(8)
    loader = DataLoader(samples, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=context)
    for epoch in range(3):
        samples.set_epoch(epoch)
        told = {one: z for ids, logits in loader for one, z in zip(ids, logits.tolist(), strict=True)}
        expected = {one["__id__"]: one["logits"].tolist() for one in as_webdataset(chain / SUBSET, chain / CACHE, epoch=epoch)}
        assert told == expected
    del loader


def test_an_epoch_is_whole_whatever_is_set_meanwhile(chain: Path) -> None:
    samples = as_webdataset(chain / SUBSET, chain / CACHE)
    whole = [one["logits"].tolist() for one in samples]
    met = []
    for n, one in enumerate(samples):
        samples.set_epoch(n % 3)
        met.append(one["logits"].tolist())
    assert met == whole


def test_it_pickles(chain: Path) -> None:
    samples = as_webdataset(chain / SUBSET, chain / CACHE, epoch=1).to_tuple("__id__", "box")
    again = pickle.loads(pickle.dumps(samples))
    assert [(a, b.tolist()) for a, b in again] == [(a, b.tolist()) for a, b in samples]


# --- with webdataset's stages


def test_a_step_of_training(chain: Path) -> None:
    """Decoded, shuffled, batched by webdataset: cropped by hand or rendered, the student sees the same, and learns."""
    torch.manual_seed(0)
    samples = as_webdataset(chain / SUBSET, chain / CACHE, epoch=1, render=True)
    stages = samples.shuffle(20, seed=1).decode("torchrgb8").to_tuple("image", "png", "box", "flip", "cls", "logits").batched(54)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        for image, png, box, flip, label, logits in stages:
            assert [x.shape for x in (image, png, box, logits)] == [(54, 3, 8, 8), (54, 3, 8, 8), (54, 4), (54, 10)]
            around = torch.nn.functional.pad(png, (8, 8, 8, 8))
            top, left = box[0, :2].tolist()
            crop = around[0, :, 8 + top : 16 + top, 8 + left : 16 + left]
            assert torch.equal(image[0], crop.flip(2) if flip[0] else crop)
            out = model(image / 255)
            soft = 16 * kl_div(log_softmax(out / 4, 1), log_softmax(logits / 4, 1), reduction="batchmean", log_target=True)
            loss = 0.1 * cross_entropy(out, torch.as_tensor(label)) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]


def test_decode_leaves_what_is_decoded(chain: Path) -> None:
    one = next(iter(as_webdataset(chain / SUBSET, chain / CACHE).decode("pil")))
    assert one["png"].size == (8, 8)
    assert isinstance(one["cls"], int)
    assert one["logits"].shape == (10,)
    with pytest.raises(webdataset.autodecode.DecodingError):  # webdataset's own default: only bytes
        next(iter(as_webdataset(chain / SUBSET, chain / CACHE).decode("pil", partial=False)))


# --- other shards


@pytest.fixture
def adopted(tmp_path: Path, kdprune: Cli) -> Path:
    """Two PAX shards with the same keys, a label in JSON beside an old .cls, and an image called `image.png`; a cache of two views."""
    from sklearn.datasets import load_digits

    from kdprune_data.images import encode_png

    root = tmp_path / "a #1? set"
    root.mkdir()
    data = load_digits()
    for shard in range(2):
        with webdataset.TarWriter(str(root / f"part-{shard}.tar")) as sink:
            for n in range(20):
                row = 20 * shard + n
                pixels = np.floor(data.images[row] * (255 / 16) + 0.5).astype(np.uint8)
                label = {"label": int(data.target[row])}
                sink.write({"__key__": f"{n:04d}", "cls": 3, "json": label, "image.png": encode_png(pixels)})
    labelled = ["--id", "shard", "--image-member", "image.png", "--label-member", "json:label"]
    for line in (
        ["index", *sorted(root.glob("*.tar")), *labelled],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 8],
        ["cache", "data/train", "--views", 2, "--name", "all"],
        ["select", "--frac", 0.6, "--balance", "none", "--shard-samples", 100, "--name", "copied"],
        ["select", "--frac", 0.6, "--balance", "none", "--ids-only", "--name", "listed"],
    ):
        ran = kdprune(*line, cwd=root)
        assert ran.code == 0, ran.err
    return root


@pytest.mark.parametrize("folder", ["data/train", "subsets/copied", "subsets/listed"])
def test_adopted_shards(adopted: Path, folder: str) -> None:
    """Ids are SHARD/key, keys repeat; the class is the one that was named. A list has only its own samples."""
    agrees(as_webdataset(adopted / folder, adopted / "logits/all", epoch=1, render=True), adopted / folder, adopted / "logits/all", 1)


def test_samples_without_a_label(tmp_path: Path, chain: Path, kdprune: Cli) -> None:
    whole = (chain / "data/train/shard-000000.tar").read_bytes()
    parts = [(one.name, whole[one.data : one.data + one.size]) for one in tar.scan(whole, "x")]
    (tmp_path / "bare.tar").write_bytes(b"".join(tar.member(*one) for one in parts if not one[0].endswith(".cls")) + tar.END)
    assert kdprune("index", "bare.tar", "--out", "bare", cwd=tmp_path).code == 0
    assert all("cls" not in one for one in as_webdataset(tmp_path / "bare").decode("pil"))


def test_cifar(tmp_path: Path, cifar_rows: list[tuple[bytes, int]], kdprune: Cli) -> None:
    """JPEGs, mirrored crops."""
    rows = [{"bytes": data, "path": None} for data, _ in cifar_rows]
    pq.write_table(pa.table({"image": rows, "label": [label for _, label in cifar_rows]}), tmp_path / "cifar.parquet")
    for line in (
        ["import", "cifar.parquet", "--shard-samples", 150],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 64],
        ["select", "--frac", "0.5", "--shard-samples", 80],
        ["cache", "--views", 2],
    ):
        assert kdprune(*line, cwd=tmp_path).code == 0
    samples = as_webdataset(tmp_path / SUBSET, tmp_path / CACHE, epoch=1, render=True)
    agrees(samples, tmp_path / SUBSET, tmp_path / CACHE, 1)
    assert {one["flip"] for one in samples} == {False, True}


# --- refused


def spoil(data: bytes) -> bytes:
    """Another image of the same length."""
    return data.replace(b"IDAT", b"iDAT", 1)


def one_less(data: bytes) -> bytes:
    """A whole tar without its last sample."""
    *_, last = tar.records(data, "x")
    return data[: last.offset] + tar.END


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoil, "is not the image that was indexed"),
        (one_less, "it lacks the samples"),
        (lambda _: tar.END, "it lacks the samples"),
        (lambda data: data[: len(data) // 2], "cannot be read as a tar"),
        (lambda _: b"no tar" * 500, "cannot be read as a tar"),
        (None, "does not exist"),
    ],
)
def test_a_shard_that_changed(chain_copy: Path, change: Any, said: str) -> None:
    samples = as_webdataset(chain_copy / SUBSET, chain_copy / CACHE)
    path = chain_copy / SUBSET / "shard-000001.tar"
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    with pytest.raises(SourceError, match=said):
        list(samples)


def test_a_member_that_has_the_name_of_ours(tmp_path: Path, adopted: Path, kdprune: Cli) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        data = Dataset.open(adopted / "data/train")
        sink.write({"__key__": "a", "png": data.image_bytes(0), "cls": 1, "box": b"theirs"})
    assert kdprune("index", "x.tar", "--out", "x", cwd=tmp_path).code == 0
    with pytest.raises(SourceError, match=r"sample 'a' has a member \.box"):
        list(as_webdataset(tmp_path / "x"))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"views": 0}, UsageError, "views 0 is too small"),
        ({"views": 4}, UsageError, "has 3 views, 4 are asked for"),
        ({"subset": "data/train"}, MismatchError, "has no logits for 54 of 108 samples"),
        ({"subset": "nowhere"}, UsageError, "does not exist"),
        ({"logits": SUBSET}, UsageError, "expected logits"),
    ],
)
def test_refused(chain: Path, settings: dict[str, Any], error: type[KdpruneError], said: str) -> None:
    given = {"subset": SUBSET, "logits": CACHE} | settings
    with pytest.raises(error, match=said):
        as_webdataset(chain / given.pop("subset"), chain / given.pop("logits"), **given)


def test_weights_are_checked_at_once(chain_copy: Path) -> None:
    """Not in the midst of an epoch."""
    shutil.copy(chain_copy / SUBSET / "index.parquet", chain_copy / SUBSET / "selection.parquet")
    with pytest.raises(KdpruneError):
        as_webdataset(chain_copy / SUBSET)
