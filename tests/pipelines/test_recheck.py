"""Soft labels asked of their teacher again: right caches pass, and of every usual mistake, really made, the message names the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from kdprune_pipelines import _recheck
from kdprune_pipelines._models import open_model
from kdprune_pipelines._witness import Limits, Witness, chosen, kl, shifted
from numpy.typing import NDArray
from safetensors.torch import load_file

from kdprune_data.errors import MismatchError
from kdprune_data.formats import indexing, table
from kdprune_data.formats import logit_files as cached
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logit_files import ViewRows
from kdprune_data.formats.logits import LogitCache, read_view
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.learn import views
from kdprune_data.learn.inference import Predictor
from kdprune_data.learn.stream import Images
from kdprune_data.learn.views import Geometry, Normalisation

Cli = Callable[..., Any]
Whole = dict[int, list[ViewRows]]
"""Of every shard its views."""
TEACHER, SUBSET = Path("teachers/resnet8-s0"), Path("subsets/random-0.3-s0")
CACHE = Path("logits/random-0.3-s0--resnet8-s0")
SHORT = ["--model", "resnet8", "--steps", 4, "--batch", 16]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """388 digits in 4 shards, a teacher that knows most of them, and 3 views of each; to read only, but for folders of new names."""
    root = tmp_path_factory.mktemp("recheck")
    for line in (
        ["import", "digits", "--holdout", "0.1"],
        ["teacher", "--model", "resnet8", "--epochs", 4, "--keep-epochs", 1],
        ["select", "--frac", "0.3", "--shard-samples", 100],
        ["cache", "--views", 3, "--dtype", "float16"],
    ):
        ran = kdprune(*line, cwd=root)
        assert ran.code == 0, ran.err
    return root


@dataclass(frozen=True)
class Scene:
    """The right cache, and its teacher, whom anything can be shown."""

    root: Path
    of: Path = SUBSET
    cache: Path = CACHE

    @cached_property
    def data(self) -> Dataset:
        return Dataset.open(self.root / self.of)

    @cached_property
    def whole(self) -> Whole:
        cache = LogitCache.open(self.root / self.cache)
        return {shard: [read_view(cache, shard, view) for view in range(cache.views)] for shard in cache.shards}

    @cached_property
    def policy(self) -> views.Policy:
        return views.Policy.from_dict(LogitCache.open(self.root / self.cache).policy)

    def net(self, epoch: int | None = None) -> torch.nn.Module:
        return open_model(self.root / TEACHER).load(code=None, epoch=epoch).eval()

    def shown(self, shard: int, box: Geometry | None) -> torch.Tensor:
        """The images of a shard as a view shows them; without boxes as they are."""
        images = Images(self.data).get(self.data.rows_of(shard))
        return views.evaluation(images, self.policy.size) if box is None else views.render(images, box, self.policy.size)

    def said(self, inputs: torch.Tensor, net: torch.nn.Module | None = None) -> NDArray[np.float32]:
        with torch.inference_mode():
            return (net or self.net())(inputs).float().numpy()

    @property
    def apply(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return open_model(self.root / TEACHER).normalisation.apply

    def again(self, says: Callable[[int, int, ViewRows], NDArray[np.float32]], dtype: str = "float16") -> Whole:
        """Every view with other logits: `says` gets shard, view and what stands there."""
        return {
            shard: [one._replace(logits=cached.stored(says(shard, view, one), dtype)) for view, one in enumerate(each)]
            for shard, each in self.whole.items()
        }

    def of_boxes(self, boxes: Callable[[int, int, Geometry], Geometry | None]) -> Whole:
        """What the teacher says of other boxes."""
        return self.again(lambda shard, view, one: self.said(self.apply(self.shown(shard, boxes(shard, view, Geometry(*one[:5]))))))

    def of_inputs(self, normalise: Callable[[torch.Tensor], torch.Tensor]) -> Whole:
        """What the teacher says of the right boxes, normalised in another way."""
        return self.again(lambda shard, _, one: self.said(normalise(self.shown(shard, Geometry(*one[:5])))))

    def drawn(self, policy: views.Policy, view: int, shard: int) -> Geometry:
        rows = self.data.rows_of(shard)
        return views.geometry(policy, self.data.uids[rows], self.data.sizes[rows], view)

    def joined(self, change: Callable[[int, ViewRows], ViewRows]) -> Whole:
        """Every view, all shards as one, changed: what knows nothing of shards does so."""
        starts = np.cumsum([0, *(len(each[0].logits) for each in self.whole.values())])
        found: Whole = {shard: [] for shard in self.whole}
        for view in range(len(self.whole[0])):
            one = change(
                view, ViewRows(*(np.concatenate(columns) for columns in zip(*(e[view] for e in self.whole.values()), strict=True)))
            )
            for shard, (a, b) in zip(self.whole, pairwise(starts), strict=True):
                found[shard].append(ViewRows(*(column[a:b] for column in one)))
        return found


@pytest.fixture(scope="module")
def scene(workspace: Path) -> Scene:
    return Scene(workspace)


def write(root: Path, name: str, whole: Mapping[int, list[ViewRows]], beside: Path = CACHE) -> Path:
    """A cache beside the right one that holds something else, and knows no better: its counts and digests are those of what it holds."""
    folder = Path(shutil.copytree(root / beside, root / "logits" / name))
    for shard, each in whole.items():
        rows = table.read(folder / cached.rows_path(shard))
        right = [cached.top1(one.logits, indexing.labels_of(rows["label"])) for one in each]
        counted = pa.array(np.sum(right, 0, dtype=np.int32))
        (folder / cached.rows_path(shard)).write_bytes(table.to_bytes(rows.set_column(5, "top1_correct", counted)))
        path = folder / cached.view_path(0, len(each) - 1, shard)
        metadata = pa.ipc.open_file(path).schema.metadata | {b"top1_correct": json.dumps([int(one.sum()) for one in right]).encode()}
        files = Written(folder)
        cached.write_views(files, str(path.relative_to(folder)), each, {k.decode(): v.decode() for k, v in metadata.items()})
    manifest = Manifest._parse(folder / "manifest.json")
    fresh = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
    (folder / "manifest.json").write_bytes(replace(manifest, name=name, files=fresh).to_json())
    return folder.relative_to(root)


@dataclass(frozen=True)
class Written:
    """What the writer of view files needs of a build."""

    folder: Path

    def create(self, path: str) -> Any:
        return pa.OSFile(str(self.folder / path), "wb")


def witness_of(root: Path, cache: Path, data: Path = SUBSET) -> Witness:
    saved, found = open_model(root / TEACHER), Dataset.open(root / data)
    predictor = Predictor(saved.load(code=None), saved.normalisation, 8, torch.device("cpu"))
    return Witness(LogitCache.open(root / cache).join(found), Images(found), [saved], [predictor])


# --- wrong caches


def shifted_by(by: int, *, with_boxes: bool = False) -> Callable[[Scene], Whole]:
    """Each row holds what belongs to the row `by` before."""

    def change(_: int, one: ViewRows) -> ViewRows:
        if with_boxes:
            return ViewRows(*(np.roll(column, by, axis=0) for column in one))
        return one._replace(logits=np.roll(one.logits, by, axis=0))

    return lambda scene: scene.joined(change)


def swapped(scene: Scene, *, with_boxes: bool = False) -> Whole:
    """Shards 1 and 2 hold each other's."""
    found = {shard: list(each) for shard, each in scene.whole.items()}
    for a, b in ((1, 2), (2, 1)):
        for view, (mine, other) in enumerate(zip(scene.whole[a], scene.whole[b], strict=True)):
            n = min(len(mine.logits), len(other.logits))
            taken = ViewRows(*(np.concatenate([theirs[:n], own[n:]]) for own, theirs in zip(mine, other, strict=True)))
            found[a][view] = taken if with_boxes else mine._replace(logits=taken.logits)
    return found


def turned_round(scene: Scene) -> Whole:
    return {shard: [one._replace(logits=one.logits[::-1]) for one in each] for shard, each in scene.whole.items()}


def as_text(scene: Scene) -> Whole:
    """Eleven classes or more are often sorted as text; ten are turned by one here, which is as wrong."""
    return scene.again(lambda _, __, one: np.roll(one.logits.astype(np.float32), 1, axis=1))


def next_view(by: int) -> Callable[[Scene], Whole]:
    return lambda scene: scene.of_boxes(lambda shard, view, _: scene.drawn(scene.policy, view + by, shard))


def of_policy(**changes: Any) -> Callable[[Scene], Whole]:
    return lambda scene: scene.of_boxes(lambda shard, view, _: scene.drawn(replace(scene.policy, **changes), view, shard))


def divided(scene: Scene) -> Whole:
    return scene.again(lambda _, __, one: one.logits.astype(np.float32) / 4)


def probabilities(tau: float) -> Callable[[Scene], Whole]:
    return lambda scene: scene.again(lambda _, __, one: torch.softmax(torch.from_numpy(one.logits.astype(np.float32)) / tau, 1).numpy())


def other_boxes(scene: Scene) -> Whole:
    """The right logits beside boxes that were drawn with another seed."""
    policy = replace(scene.policy, seed=7)
    return {
        shard: [ViewRows(*vars(scene.drawn(policy, view, shard)).values(), one.logits) for view, one in enumerate(each)]
        for shard, each in scene.whole.items()
    }


def early(scene: Scene) -> Whole:
    net = scene.net(epoch=1)
    return scene.again(lambda shard, _, one: scene.said(scene.apply(scene.shown(shard, Geometry(*one[:5]))), net))


def training(scene: Scene) -> Whole:
    net = scene.net().train()
    return scene.again(lambda shard, _, one: scene.said(scene.apply(scene.shown(shard, Geometry(*one[:5]))), net))


def halves(scene: Scene) -> Whole:
    net = scene.net().to(torch.bfloat16)
    return scene.again(lambda shard, _, one: scene.said(scene.apply(scene.shown(shard, Geometry(*one[:5]))).bfloat16(), net))


REQUIRED: dict[str, tuple[Callable[[Scene], Whole], str]] = {
    "shifted-1": (shifted_by(1), "each is that of the sample 1 row before: a join by position, shifted"),
    "shifted-2": (shifted_by(2), "each is that of the sample 2 rows before: a join by position, shifted"),
    "shards": (swapped, "each is that of the sample in the same place of another shard: shards 1 and 2 are swapped"),
    "policy": (lambda s: s.of_boxes(lambda *_: None), "another policy: they are of the images as they are evaluated"),
    "normalisation": (
        lambda s: s.of_inputs(lambda x: x.float() / 255),
        "another normalisation of the teacher's inputs: none, pixels from 0 to 1",
    ),
    "classes": (as_text, "another class order: each row holds the right numbers in other columns ('0' in that of '1', '1' in that of '2')"),
}
OTHERS: dict[str, tuple[Callable[[Scene], Whole], str]] = {
    "shifted-back": (shifted_by(-1), "each is that of the sample 1 row after"),
    "shifted-with-boxes": (shifted_by(1, with_boxes=True), "each is that of the sample 1 row before"),
    "shards-with-boxes": (lambda s: swapped(s, with_boxes=True), "in the same place of another shard: shards 1 and 2 are swapped"),
    "turned": (turned_round, "they are those of other samples of the same shard: rows in another order"),
    "mirrored": (lambda s: s.of_boxes(lambda _, __, b: replace(b, flip=~b.flip)), "they are of mirrored images: flips are inverted"),
    "next-view": (next_view(1), "they are those of another view, number v + 1 in the place of v"),
    "view-before": (next_view(-1), "they are those of another view, number v - 1 in the place of v"),
    "boxes": (other_boxes, "they are of the boxes that the policy draws, and other boxes are stored"),
    "pad": (of_policy(pad=2), "another policy: they are of views with --pad 2"),
    "seed": (of_policy(seed=1), "another policy: they are of views with --seed 1"),
    "bytes": (lambda s: s.of_inputs(lambda x: x.float()), "another normalisation of the teacher's inputs: none, pixels from 0 to 255"),
    "halves": (lambda s: s.of_inputs(Normalisation((0.5,) * 3, (0.5,) * 3).apply), "inputs: mean and deviation 0.5"),
    "twice": (lambda s: s.of_inputs(lambda x: s.apply(s.apply(x) * 255)), "inputs: the teacher's own, twice"),
    "divided": (divided, "they are divided by 4, as by a temperature"),
    "probabilities": (probabilities(1), "probabilities (at temperature 1) are stored, not logits"),
    "soft-probabilities": (probabilities(4), "probabilities (at temperature 4) are stored, not logits"),
    "early": (early, "other weights: those that the teacher had after epoch 1"),
    "training": (training, "another teacher, other weights, or a teacher in train mode"),
    "precision": (halves, "the same teacher, likely, in another precision"),
}


@pytest.fixture(scope="module")
def wrong(scene: Scene) -> Callable[[str], Path]:
    """A wrong cache, by name; each is made once."""

    def made(name: str) -> Path:
        there = Path("logits") / name
        return there if (scene.root / there).exists() else write(scene.root, name, (REQUIRED | OTHERS)[name][0](scene))

    return made


@pytest.mark.parametrize("name", [*REQUIRED, *OTHERS])
def test_the_cause_is_named(workspace: Path, kdprune: Cli, wrong: Callable[[str], Path], name: str) -> None:
    said = (REQUIRED | OTHERS)[name][1]
    ran = kdprune("verify", wrong(name), "--teacher", TEACHER, "--json", cwd=workspace)
    found = json.loads(ran.out)
    assert (ran.code, found["ok"]) == (1, False)
    (fault,) = [one for one in found["faults"] if "soft labels" in one]
    assert said in fault
    assert found["asked"]["cause"] in fault
    assert f"of 256 soft labels are not what {TEACHER} says of them again (largest difference " in fault
    assert fault.endswith("; make the cache again (cache --overwrite)")
    assert "\n" not in fault
    assert "of shard 1" not in fault or name.startswith("shards")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_student_of_it_is_refused(workspace: Path, kdprune: Cli, wrong: Callable[[str], Path], name: str) -> None:
    """Before any step, and nothing is left of it."""
    ran = kdprune("distill", *SHORT, "--logits", wrong(name), "--name", f"of-{name}", cwd=workspace)
    assert ran.code == 1
    line = ran.err.splitlines()[-1]
    assert line.startswith(f"error: logits/{name}: ")
    assert "of 32 soft labels" in line
    assert REQUIRED[name][1] in line
    assert "training" not in ran.err
    assert not (workspace / f"students/of-{name}").exists()


def test_what_differs_in_one_place_is_told(scene: Scene, kdprune: Cli) -> None:
    """One view of three, one shard of four."""
    for name, at in (("view 1", lambda shard, view: view == 1), ("shard 3", lambda shard, view: shard == 3)):
        there = {
            shard: [one._replace(logits=one.logits / np.float16(2 if at(shard, view) else 1)) for view, one in enumerate(each)]
            for shard, each in scene.whole.items()
        }
        ran = kdprune("verify", write(scene.root, name.replace(" ", "-"), there), "--teacher", TEACHER, cwd=scene.root)
        assert ran.code == 1
        assert f" of 256 soft labels, all those of {name}, are not what" in ran.out
        assert "they are divided by 2" in ran.out


def test_a_single_wrong_row_is_found_when_it_is_asked_for(scene: Scene, kdprune: Cli) -> None:
    def change(shard: int, view: int, one: ViewRows) -> NDArray[np.float32]:
        found = one.logits.astype(np.float32)
        if (shard, view) == (2, 1):
            found[5, 3] += 0.1
        return found

    folder = write(scene.root, "one-row", scene.again(change))
    ran = kdprune("verify", folder, "--teacher", TEACHER, "--sample", 388 * 3, cwd=scene.root)
    assert ran.code == 1
    assert "1 of 1,164 soft labels are not what" in ran.out


# --- right caches


@pytest.mark.parametrize(
    "options",
    [["--dtype", "float16"], ["--dtype", "float32"], ["--flip", "on", "--pad", 3], ["--scale", "0.3", "1"], ["--batch", 7]],
    ids=lambda o: "-".join(str(word).strip("-") for word in o),
)
def test_a_right_cache_passes(workspace: Path, kdprune: Cli, options: list[Any]) -> None:
    """All of it: of every row every view."""
    folder = Path("logits") / ("right-" + "-".join(str(word).strip("-") for word in options))
    assert kdprune("cache", "--views", 3, *options, "--out", folder, cwd=workspace).code == 0
    ran = kdprune("verify", folder, "--teacher", TEACHER, "--sample", 10_000, "--json", cwd=workspace)
    found = json.loads(ran.out)
    assert (ran.code, found["faults"]) == (0, [])
    asked = found["asked"]
    assert (asked["pairs"], asked["differing"], asked["cause"]) == (388 * 3, 0, None)
    assert 0 <= asked["mean"] <= asked["largest"] < (1e-4 if "float32" in options else 0.05)
    assert asked["top1"] == 1
    assert asked["kl"].keys() == {"1", "2", "4"}
    assert max(asked["kl"].values()) < 1e-6


def test_what_verify_says(workspace: Path, kdprune: Cli) -> None:
    bare = kdprune("verify", CACHE, cwd=workspace)
    assert bare.code == 0
    assert bare.out.strip().endswith("; its teacher was not asked: --teacher DIR asks it again about some soft labels")
    ran = kdprune("verify", CACHE, "--teacher", TEACHER, "--sample", 20, cwd=workspace)
    assert ran.code == 0
    assert f"; 20 soft labels asked of {TEACHER} again: largest difference 0.0" in ran.out
    assert ran.out.strip().endswith(" at temperature 1 / 2 / 4, top 1 the same in all")
    assert ran.err == f"data: {SUBSET}\n"
    assert "not asked" not in kdprune("verify", SUBSET, cwd=workspace).out
    again = [json.loads(kdprune("verify", CACHE, "--teacher", TEACHER, "--seed", s, "--json", cwd=workspace).out) for s in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0]["asked"]["mean"] != again[2]["asked"]["mean"]


def test_pairs_are_chosen_by_hash(scene: Scene) -> None:
    data = scene.data
    rows, numbers = chosen(data, 3, 388 * 3, 0)
    assert len({(r, v) for r, v in zip(rows.tolist(), numbers.tolist(), strict=True)}) == 388 * 3
    few = chosen(data, 3, 50, 0)
    assert np.array_equal(few[0], rows[:50])  # a larger sample holds the smaller
    assert np.array_equal(few[1], numbers[:50])
    assert len(set(few[0].tolist())) == 50
    assert np.bincount(few[1]).min() >= 8
    assert not np.array_equal(chosen(data, 3, 50, 1)[0], few[0])
    assert chosen(data, 1, 9999, 0)[1].max() == 0


def test_the_kl_is_that_of_the_loss(scene: Scene) -> None:
    from kdprune_data.learn.losses import kl as of_torch

    full, stored = (scene.whole[0][view].logits.astype(np.float64) for view in (0, 1))
    for tau in (1.0, 2.0, 4.0):
        expected = float(of_torch(torch.from_numpy(stored), torch.from_numpy(full), tau))
        assert kl(full, stored, tau).mean() == pytest.approx(expected, rel=1e-9)


# --- coded caches, whose metadata state a KL


def test_a_coded_cache_is_held_to_the_kl_that_it_states(scene: Scene) -> None:
    step = 0.5  # every number a multiple of this, as a coarse code stores it
    coded = scene.again(lambda _, __, one: np.round(one.logits.astype(np.float32) / step) * step)
    witness = witness_of(scene.root, write(scene.root, "coded", coded))
    all_of = {"views": 3, "sample": 10_000, "seed": 0}
    whole = _recheck.recheck(witness, **all_of)
    assert whole.fault is not None  # as a plain cache it would not do
    stated = Limits(kl=whole.kl)
    assert _recheck.recheck(witness, **all_of, limits=stated).fault is None
    assert _recheck.recheck(witness, views=3, sample=32, seed=0, limits=stated).fault is None
    less = Limits(kl={tau: value / 10 for tau, value in whole.kl.items()})
    found = _recheck.recheck(witness, **all_of, limits=less).fault
    assert found is not None
    assert "a mean KL of " in found


@pytest.mark.parametrize("name", [n for n in [*REQUIRED, *OTHERS] if n not in ("training", "precision")])
def test_the_cause_is_named_of_a_coded_cache_too(scene: Scene, name: str) -> None:
    make, said = (REQUIRED | OTHERS)[name]
    rough = {
        shard: [one._replace(logits=np.float16(np.round(one.logits.astype(np.float32) * 8) / 8)) for one in each]
        for shard, each in make(scene).items()
    }
    witness = witness_of(scene.root, write(scene.root, f"coded-{name}", rough))
    limits = Limits(kl=dict.fromkeys((1.0, 2.0, 4.0), 1e-3))
    found = _recheck.recheck(witness, views=3, sample=256, seed=0, limits=limits)
    assert found.cause is not None
    assert said in found.cause


# --- photographs of all sizes, whose views are resized


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, kdprune: Cli, real_data: Path) -> Scene:
    """100 photographs in 2 shards, seen at 32 pixels."""
    root = tmp_path_factory.mktemp("photos")
    for line in (
        ["import", real_data / "photos/train.parquet", "--shard-samples", 50],
        ["teacher", "--model", "resnet8", "--size", 32, "--steps", 12, "--batch", 16],
        ["cache", "data/train", "--views", 2, "--dtype", "float16"],
    ):
        ran = kdprune(*line, cwd=root)
        assert ran.code == 0, ran.err
    return Scene(root, Path("data/train"), Path("logits/train--resnet8-s0"))


@pytest.mark.parametrize("name", ["right", "shifted-1", "shards-with-boxes", "policy", "mirrored", "scale", "normalisation", "whole"])
def test_photographs(photos: Scene, kdprune: Cli, name: str) -> None:
    zero = lambda box: np.zeros_like(box.top)  # noqa: E731 - a line of its own

    def whole(shard: int, _: int, box: Geometry) -> Geometry:
        sizes = photos.data.sizes[photos.data.rows_of(shard)]
        return Geometry(zero(box), zero(box), sizes[:, 0], sizes[:, 1], zero(box).astype(bool))

    make, said = (REQUIRED | OTHERS).get(name, (lambda scene: scene.whole, ""))
    if name == "scale":
        make, said = of_policy(scale=(0.08, 1.0)), "another policy: they are of views with --scale 0.08 1"
    if name == "whole":
        make, said = (lambda scene: scene.of_boxes(whole)), "another policy: they are of whole images, without augmentation"
    said = said.replace("shards 1 and 2", "shards 0 and 1")
    made = make(photos) if name != "shards-with-boxes" else dict(zip((0, 1), (photos.whole[1], photos.whole[0]), strict=True))
    folder = write(photos.root, name, made, photos.cache)
    ran = kdprune("verify", folder, "--teacher", TEACHER, "--sample", 200, cwd=photos.root)
    if name == "right":
        assert ran.code == 0, ran.out
        assert "200 soft labels asked of" in ran.out
        return
    assert ran.code == 1
    assert said in ran.out


# --- which teacher, which images


def test_another_teacher_is_refused(workspace: Path, kdprune: Cli) -> None:
    assert kdprune("teacher", "--model", "resnet8", "--epochs", 1, "--seed", 1, "--out", "others/t1", cwd=workspace).code == 0
    ran = kdprune("verify", CACHE, "--teacher", "others/t1", cwd=workspace)
    digests = [Manifest.load(workspace / folder).digest[:12] for folder in (TEACHER, "others/t1")]
    assert ran.code == 1
    assert ran.err.strip() == (
        f"error: {CACHE} holds the logits of teacher resnet8-s0 ({digests[0]}), not of others/t1 ({digests[1]}): "
        "give its own teacher, or run cache with this one"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ((SUBSET, "--teacher", TEACHER), f"--teacher is for logit caches, and {SUBSET} is of kind subset: leave it out"),
        (("data/train", "--sample", 3), "--sample is for logit caches, and data/train is of kind dataset: leave it out"),
        ((TEACHER, "--seed", 3), f"--seed is for logit caches, and {TEACHER} is of kind model: leave it out"),
        ((CACHE, "--sample", 3), "--sample is for asking a teacher, and none is given: add --teacher DIR, or leave it out"),
        ((CACHE, "--data", SUBSET), "--data is for asking a teacher, and none is given: add --teacher DIR, or leave it out"),
        ((CACHE, "--teacher", SUBSET), f"{SUBSET} is of kind subset: expected model"),
        ((CACHE, "--teacher", TEACHER, "--sample", 0), "--sample 0 is too small: at least 1"),
    ],
)
def test_options_without_use_are_refused(workspace: Path, kdprune: Cli, line: tuple[Any, ...], said: str) -> None:
    ran = kdprune("verify", *line, cwd=workspace)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_the_images_are_found_by_content(workspace: Path, tmp_path: Path, kdprune: Cli) -> None:
    """The data set of the cache under another name, else a part of it, else none."""
    asked = ("verify", workspace / CACHE, "--teacher", workspace / TEACHER)
    (tmp_path / "subsets").mkdir()
    ran = kdprune(*asked, cwd=tmp_path)
    assert ran.code == 2
    assert "no images of " in ran.err
    assert "give the data set that it was made for with --data" in ran.err
    part = ["select", workspace / SUBSET, "--frac", "0.5", "--seed", 5, "--out"]
    for place, name in (("subsets/b", "subsets/b"), ("data/whole", "data/whole")):
        if place == "data/whole":
            shutil.copytree(workspace / SUBSET, tmp_path / place)
        else:
            assert kdprune(*part, place, cwd=tmp_path).code == 0
        (tmp_path / "data" / "damaged").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "damaged" / "manifest.json").write_text("{}")
        ran = kdprune(*asked, cwd=tmp_path)
        assert (ran.code, ran.err) == (0, f"data: {name}\n")
    ran = kdprune(*asked, "--data", tmp_path / "subsets/b", "--sample", 10_000, cwd=workspace)
    assert ran.code == 0
    assert f"{194 * 3} soft labels asked" in ran.out
    ran = kdprune(*asked, "--data", workspace / "data/train", cwd=workspace)
    assert ran.code == 1
    assert "has no logits for 906 of 1,294 samples" in ran.err


def test_logits_from_elsewhere_and_of_several_teachers(workspace: Path, kdprune: Cli) -> None:
    """Of the former any teacher may be asked; what several say together one of them does not know."""
    for name, times in (("elsewhere", 0), ("ensemble", 2)):
        folder = workspace / "logits" / name
        shutil.copytree(workspace / CACHE, folder)
        manifest = Manifest._parse(folder / "manifest.json")
        teachers = [one for one in manifest.inputs if one["role"] == "teacher"]
        kept = [one for one in manifest.inputs if one["role"] != "teacher"]
        found = replace(manifest, name=name, inputs=[*kept, *([*teachers, {**teachers[0], "name": "b", "digest": "0" * 64}][:times])])
        (folder / "manifest.json").write_bytes(found.to_json())
        saved = open_model(workspace / TEACHER)
        if times:
            with pytest.raises(MismatchError, match=r"say together: give b \(0{12}\) too, with --ensemble DIR"):
                _recheck.check_asked(folder, found, [saved])
        else:
            _recheck.check_asked(folder, found, [saved])


def test_classes_of_another_order_in_the_manifest(workspace: Path, tmp_path: Path, kdprune: Cli) -> None:
    folder = Path(shutil.copytree(workspace / CACHE, tmp_path / "x"))
    manifest = Manifest._parse(folder / "manifest.json")
    (folder / "manifest.json").write_bytes(replace(manifest, classes=[*manifest.classes[1:], manifest.classes[0]]).to_json())
    ran = kdprune("verify", folder, "--teacher", TEACHER, cwd=workspace)
    assert ran.code == 1
    assert "use data with the same classes in the same order" in ran.err


@pytest.fixture
def own(workspace: Path, tmp_path: Path, kdprune: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose teacher is the user's own function."""
    monkeypatch.setattr("sys.modules", dict(__import__("sys").modules))
    (tmp_path / "recheck_mine.py").write_text(
        "from torch import nn\n\n\ndef net(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))\n"
    )
    shutil.copytree(workspace / SUBSET, tmp_path / SUBSET)
    line = ["teacher", "--data", SUBSET, "--model", "recheck_mine:net", "--epochs", 1, "--name", "mine"]
    assert kdprune(*line, cwd=tmp_path).code == 0
    assert kdprune("cache", "--code", "recheck_mine:net", "--views", 2, "--name", "mine", cwd=tmp_path).code == 0
    return tmp_path


def test_the_users_own_function_runs_only_when_named(own: Path, kdprune: Cli) -> None:
    ran = kdprune("verify", "logits/mine", "--teacher", "teachers/mine", cwd=own)
    assert ran.code == 2
    assert "--code recheck_mine:net" in ran.err
    ran = kdprune("verify", "logits/mine", "--teacher", "teachers/mine", "--code", "recheck_mine:net", cwd=own)
    assert ran.code == 0
    assert "256 soft labels asked of teachers/mine again" in ran.out
    ran = kdprune("distill", *SHORT, cwd=own)
    assert ran.code == 0
    assert "asked of" not in ran.err


def test_a_damaged_cache_is_not_asked_about(workspace: Path, tmp_path: Path, kdprune: Cli) -> None:
    folder = Path(shutil.copytree(workspace / CACHE, tmp_path / "logits/x"))
    path = folder / cached.view_path(0, 2, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ran = kdprune("verify", folder, "--teacher", TEACHER, "--json", cwd=workspace)
    found = json.loads(ran.out)
    assert ran.code == 1
    assert any("its sha256 is not the manifest's" in fault for fault in found["faults"])
    assert "asked" not in found


def test_a_recipe_asks_only_where_it_names_a_teacher(tmp_path: Path, kdprune: Cli) -> None:
    """And then of every cache that it makes, and of nothing else."""
    (tmp_path / "chain.toml").write_text(
        '[import]\nsource = "digits"\n[teacher]\nmodel = "resnet8"\nepochs = 1\n[[select]]\nfrac = "0.1"\n[[select]]\nfrac = "0.2"\n'
        '[cache]\nviews = 2\n[[verify]]\nartefact = "data/train"\n[[verify]]\nteacher = "teachers/resnet8-s0"\nsample = 9\n'
    )
    ran = kdprune("run", "chain.toml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "runs/chain.json").read_text())
    results = [stage["result"] for stage in record["stages"] if stage["command"] == "verify"]
    assert [(one["folder"], one.get("asked", {}).get("pairs"), one["ok"]) for one in results] == [
        ("data/train", None, True),
        ("logits/random-0.1-s0--resnet8-s0", 9, True),
        ("logits/random-0.2-s0--resnet8-s0", 9, True),
    ]


# --- at the start of a training


def test_a_student_of_the_right_cache_says_so(workspace: Path, kdprune: Cli) -> None:
    """And is the student that it would be without."""
    asked = kdprune("distill", *SHORT, "--logits", CACHE, "--name", "asked", cwd=workspace)
    assert asked.code == 0
    assert f"32 soft labels asked of {TEACHER} again: largest difference 0.0" in asked.err
    assert "top 1 the same in all" in asked.err
    assert asked.err.index("again") < asked.err.index("training resnet8")
    unasked = kdprune("distill", *SHORT, "--logits", CACHE, "--name", "unasked", "--check-labels", 0, cwd=workspace)
    assert (unasked.code, "again" in unasked.err) == (0, False)
    a, b = (load_file(workspace / "students" / name / "model.safetensors") for name in ("asked", "unasked"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    again = kdprune("distill", *SHORT, "--logits", CACHE, "--name", "asked", "--check-labels", 5, cwd=workspace)
    assert (again.code, "already done" in again.err, "again:" in again.err) == (0, True, False)
    for name, more in (("labels", ["--alpha", 0]), ("not-made", ["--dry-run"])):
        ran = kdprune("distill", *SHORT, "--logits", CACHE, "--name", name, *more, cwd=workspace)
        assert (ran.code, "again:" in ran.err) == (0, False)


def test_only_views_that_are_used_are_asked_about(scene: Scene, kdprune: Cli) -> None:
    """Views 1 and 2 are wrong, and the student reads view 0."""
    change = lambda _, view, one: one.logits.astype(np.float32) * (1 if view == 0 else 0.5)  # noqa: E731 - a line of its own
    folder = write(scene.root, "first-right", scene.again(change))
    assert kdprune("distill", *SHORT, "--logits", folder, "--views", 1, "--name", "first", cwd=scene.root).code == 0
    assert kdprune("distill", *SHORT, "--logits", folder, "--views", 2, "--name", "second", cwd=scene.root).code == 1


def test_without_the_teacher_there_is_silence(workspace: Path, tmp_path: Path, kdprune: Cli, scene: Scene) -> None:
    """As where subset and cache were fetched. A damaged teacher is no student's concern, but is told of."""
    for folder in (SUBSET, CACHE):
        shutil.copytree(workspace / folder, tmp_path / folder)
    bare = kdprune("distill", *SHORT, "--name", "bare", cwd=tmp_path)
    assert bare.code == 0
    assert "asked" not in bare.err
    shutil.copytree(workspace / TEACHER, tmp_path / "teachers/renamed")
    (tmp_path / "teachers/broken").mkdir()
    (tmp_path / "teachers/broken/manifest.json").write_text("{}")
    ran = kdprune("distill", *SHORT, "--name", "found", cwd=tmp_path)
    assert ran.code == 0
    assert "32 soft labels asked of teachers/renamed again" in ran.err
    given = ["--teacher", workspace / TEACHER, "--name", "given"]
    assert f"asked of {workspace / TEACHER} again" in kdprune("distill", *SHORT, *given, cwd=tmp_path).err
    path = tmp_path / "teachers/renamed/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    ran = kdprune("distill", *SHORT, "--name", "damaged", cwd=tmp_path)
    assert ran.code == 0
    assert "teachers/renamed, of which the soft labels are, cannot be asked about them again: " in ran.err
    assert "was changed: its sha256 is not the manifest's" in ran.err


def test_the_cache_of_the_whole_set_serves_a_subset(workspace: Path, kdprune: Cli, scene: Scene) -> None:
    """The pairs are the subset's, joined by id; of a shift the cause is named though the neighbours' images are not there."""
    assert kdprune("cache", "data/train", "--views", 2, "--dtype", "float16", "--out", "whole", cwd=workspace).code == 0
    ran = kdprune("distill", *SHORT, "--logits", "whole", "--name", "of-whole", cwd=workspace)
    assert ran.code == 0
    assert "32 soft labels asked of" in ran.err
    found = witness_of(workspace, Path("whole"))
    roll = replace(found.joined, place=np.where(found.joined.place >= 0, (found.joined.place + 1) % found.joined.starts[-1], -1))
    said = _recheck.recheck(replace(found, joined=roll), views=2, sample=64, seed=0)
    assert said.cause == "each is that of the sample 1 row after: a join by position, shifted"


@pytest.mark.parametrize("kind", [["identity"], ["all", "--flip", "on"]], ids=" ".join)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda scene: scene.joined(shifted_by_rows), "each is that of the sample 1 row before: a join by position, shifted"),
        (lambda scene: scene.of_inputs(lambda pixels: pixels.float() / 255), "another normalisation of the teacher's inputs"),
        (lambda scene: scene.again(lambda shard, view, one: np.roll(one.logits, 3, 0)[:, ::-1] * 3 + view), ""),
    ],
    ids=["shifted", "normalisation", "nonsense"],
)
def test_views_that_have_an_end(workspace: Path, kdprune: Cli, kind: list[str], wrong: Callable[[Scene], Whole], said: str) -> None:
    """The image itself has no next view, and of every crop without mirroring there are half as many."""
    made = f"logits/of-{kind[0]}"
    assert kdprune("cache", "--views", *kind, "--dtype", "float16", "--out", made, cwd=workspace).code == 0
    scene = Scene(workspace, cache=Path(made))
    shutil.rmtree(workspace / "logits/ended", ignore_errors=True)
    folder = write(workspace, "ended", wrong(scene), beside=Path(made))
    ran = kdprune("verify", folder, "--teacher", TEACHER, cwd=workspace)
    assert (ran.code, "are not what teachers/resnet8-s0 says of them again" in ran.out, said in ran.out) == (1, True, True), (
        ran.out + ran.err
    )


def shifted_by_rows(_: int, one: ViewRows) -> ViewRows:
    return one._replace(logits=np.roll(one.logits, 1, axis=0))


def test_shifted_rows_have_largest_value_zero() -> None:
    found = shifted(np.array([[1.0, 3.0], [-2.0, -5.0]], np.float32))
    assert found.tolist() == [[-2, 0], [0, -3]]
