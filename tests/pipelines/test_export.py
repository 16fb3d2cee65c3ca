"""`export`: every number is the cache's, every byte is told, and the README's own code reads it and trains, without any of ours."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from kdprune_pipelines import _models

from kdprune_data.formats import export, tar
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.learn import views
from kdprune_data.learn.stream import Images
from kdprune_data.share.exports import ExportCard, export_card

# webdataset leaves its shards for the garbage collector to close
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
SUBSET, CACHE = Path("subsets/random-0.5-s0"), Path("logits/random-0.5-s0--resnet8-s0")
EXPORT = Path("exports/random-0.5-s0--resnet8-s0")
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def exported(chain: Path, tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """`chain` with its cache exported (3 views), to read only; and `mirrored`, of a cache in float32 whose views are flipped too."""
    root = shutil.copytree(chain, tmp_path_factory.mktemp("exported") / "workspace")
    for line in (
        ["export", "--logits", CACHE],
        ["cache", "--views", 4, "--flip", "on", "--dtype", "float32", "--name", "flips"],
        ["export", "--logits", "logits/flips", "--name", "mirrored"],
    ):
        ran = kdprune(*line, cwd=root)
        assert ran.code == 0, ran.err
    return root


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a folder's tars, in order: its members by extension, read by tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for one in shard:
                key, _, extension = one.name.rpartition("/")[2].partition(".")
                whole = one.name.removesuffix(f".{extension}")
                assert (one.mtime, one.mode, one.uid, one.gid, one.type) == (0, 0o644, 0, 0, tarfile.REGTYPE), key
                found.setdefault(whole, {})[extension] = shard.extractfile(one).read()
    return found


def soft(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return dict(found)


def agrees(workspace: Path, folder: Path, subset: Path, cache: Path) -> None:
    """Each sample has its own members and what the cache says of every view, to the bit."""
    data, of = Dataset.open(workspace / subset), LogitCache.open(workspace / cache)
    n_views = Manifest.load(workspace / folder).counts["views"]
    joined, rows = of.join(data), data.usable()
    all_views = [joined.read(rows, view) for view in range(n_views)]
    found = members(workspace / folder)
    assert list(found) == data.ids[rows].tolist()
    for n, (row, sample) in enumerate(zip(rows.tolist(), found.values(), strict=True)):
        assert list(sample)[1:2] + list(sample)[-1:] == ["cls", "kd.npz"]
        assert next(iter(sample.values())) == data.image_bytes(row)
        assert sample["cls"] == b"%d" % data.labels[row]
        kd = soft(sample["kd.npz"])
        assert list(kd) == ["logits", "boxes", "flip"]
        assert [str(a.dtype) for a in kd.values()] == [str(all_views[0].logits.dtype), "int16", "bool"]
        assert np.array_equal(kd["logits"], [v.logits[n] for v in all_views])
        assert np.array_equal(kd["boxes"], [[v.top[n], v.left[n], v.height[n], v.width[n]] for v in all_views])
        assert np.array_equal(kd["flip"], [v.flip[n] for v in all_views])


# --- what is written


def test_the_folder(exported: Path) -> None:
    manifest, subset = Manifest.load(exported / EXPORT), Manifest.load(exported / SUBSET)
    assert [f.path for f in manifest.files] == ["SHA256SUMS", "shard-000000.tar", "shard-000001.tar", "sizes.json"]
    assert {f.path for f in manifest.side} == {"README.md", "log.txt"}
    assert (manifest.kind, manifest.name, manifest.config) == ("export", EXPORT.name, {"views": 3, "dtype": "float16"})
    counts = {key: subset.counts[key] for key in ("samples", "shards", "labelled", "per_class")}
    assert manifest.counts == counts | {"views": 3}
    assert [(i["role"], i["kind"]) for i in manifest.inputs] == [("data", "subset"), ("logits", "logits")]
    assert (manifest.content, manifest.classes) == (subset.content, subset.classes)
    sizes = json.loads((exported / SUBSET / "sizes.json").read_bytes())
    assert json.loads((exported / EXPORT / "sizes.json").read_bytes()) == sizes
    sums = [f"{sha256_file(exported / EXPORT / name)}  {name}" for name in sizes]
    assert (exported / EXPORT / "SHA256SUMS").read_text().splitlines() == sums


@pytest.mark.parametrize(("folder", "cache"), [(EXPORT, CACHE), (Path("exports/mirrored"), Path("logits/flips"))])
def test_every_number_is_the_caches(exported: Path, folder: Path, cache: Path) -> None:
    agrees(exported, folder, SUBSET, cache)


def test_records_are_the_subsets_with_one_member_more(exported: Path) -> None:
    """Byte for byte, headers and padding too; and the file ends as a tar of ours does."""
    for name in ("shard-000000.tar", "shard-000001.tar"):
        ours, theirs = ((exported / folder / name).read_bytes() for folder in (SUBSET, EXPORT))
        records = zip(tar.records(ours, name), tar.records(theirs, name), strict=True)
        end = 0
        for own, other in records:
            own_bytes = ours[own.offset : own.offset + own.length]
            added = tar.member(f"{own.key}.kd.npz", theirs[(m := other.members["kd.npz"]).data : m.data + m.size])
            assert theirs[other.offset : other.offset + other.length] == own_bytes + added
            end = other.offset + other.length
        assert theirs[end:] == bytes(1024)


def test_the_bytes_of_a_member(exported: Path) -> None:
    """As docs/formats.md tells: stored, one date, no extra fields, NumPy's version 1.0, data at multiples of 64."""
    data = next(iter(members(exported / EXPORT).values()))["kd.npz"]
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        assert found.testzip() is None
        assert [one.filename for one in found.infolist()] == ["logits.npy", "boxes.npy", "flip.npy"]
        for one in found.infolist():
            assert (one.compress_type, one.date_time, one.extra, one.comment) == (0, (1980, 1, 1, 0, 0, 0), b"", b"")
            assert (one.create_system, one.create_version, one.extract_version, one.flag_bits) == (3, 20, 20, 0)
            assert one.external_attr == 0x81A40000
            part = found.read(one)
            at = 10 + int.from_bytes(part[8:10], "little")
            assert (part[:8], at % 64, part[at - 1 : at]) == (b"\x93NUMPY\x01\x00", 0, b"\n")
    assert export.Soft(*soft(data).values()).to_bytes() == data


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 3, 4), ()])
@pytest.mark.parametrize("dtype", ["float16", ">f4", "int32", "bool"])
def test_arrays_of_any_shape_are_read_by_numpy(shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    found = soft(export.npz({"a": array, "b": array.T}))
    assert np.array_equal(found["a"], array)
    assert np.array_equal(found["b"], array.T)
    assert found["a"].dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize(("edge", "dtype"), [(32_767, "int16"), (32_768, "int32")])
def test_boxes_leave_room_for_their_edges(edge: int, dtype: str) -> None:
    """top + height, in the array's own dtype, is right."""
    made = export.narrow(np.array([[0, 0, 8, 8], [edge - 30_000, -4, 30_000, 8]], np.int32))
    assert str(made.dtype) == dtype
    assert made[1, 0] + made[1, 2] == edge


def test_any_number_of_threads_gives_the_same_bytes(exported: Path, tmp_path: Path, kdprune: Cli, digests: Digests) -> None:
    """Read a sample at a time too."""
    for jobs in (1, 3):
        assert kdprune("export", SUBSET, "--logits", CACHE, "--out", tmp_path / f"{jobs}", "-j", jobs, cwd=exported).code == 0
        found = digests(tmp_path / f"{jobs}")
        assert {k: v for k, v in found.items() if k != "README.md"} == {
            k: v for k, v in digests(exported / EXPORT).items() if k != "README.md"
        }


def test_few_samples_at_a_time(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by reading fewer, which changes nothing."""
    data, cache = Dataset.open(exported / SUBSET), LogitCache.open(exported / CACHE)
    whole = export.Export(data, cache.join(data), 3)
    at_once = [one.record() for one in whole.samples(data.usable())]
    monkeypatch.setattr(export, "AT_ONCE", 300)
    assert [one.record() for one in whole.samples(data.usable())] == at_once
    assert not any(len(one) for one in vars(whole.joined).values() if isinstance(one, dict))  # nothing is kept open


@pytest.mark.parametrize("asked", [1, 2])
def test_the_first_views(exported: Path, tmp_path: Path, kdprune: Cli, asked: int) -> None:
    assert kdprune("export", "--logits", CACHE, "--views", asked, "--out", tmp_path / "few", cwd=exported).code == 0
    for one, whole in zip(members(tmp_path / "few").values(), members(exported / EXPORT).values(), strict=True):
        some, every = soft(one["kd.npz"]), soft(whole["kd.npz"])
        assert all(np.array_equal(some[name], every[name][:asked]) for name in ("logits", "boxes", "flip"))


def test_a_cache_of_everything_serves_a_subset(exported: Path, kdprune: Cli) -> None:
    for line in (["cache", "data/train", "--views", 2, "--name", "all"], ["export", SUBSET, "--logits", "logits/all"]):
        assert kdprune(*line, cwd=exported).code == 0
    agrees(exported, Path("exports/all"), SUBSET, Path("logits/all"))
    assert kdprune("verify", "exports/all", cwd=exported).code == 0


# --- habits


def test_what_is_said(exported: Path, tmp_path: Path, kdprune: Cli, digests: Digests) -> None:
    line = ["export", SUBSET, "--logits", CACHE, "--out", tmp_path / "new"]
    told = kdprune(*line, "--dry-run", "--json", cwd=exported)
    assert (told.code, list(tmp_path.iterdir())) == (0, [])
    facts = json.loads(told.out)
    assert (facts["state"], facts["counts"]) == ("new", {"sample": 54, "view": 3, "shard": 2})
    made = kdprune(*line, "--json", cwd=exported)
    assert json.loads(made.out).keys() == {"folder", "counts", "bytes", "digest", "content"}
    assert facts["bytes"] == sum(p.stat().st_size for p in (tmp_path / "new").glob("*.tar"))
    before = digests(tmp_path)
    again = kdprune(*line, cwd=exported)
    assert (again.code, "already done" in again.err, digests(tmp_path)) == (0, True, before)
    assert json.loads(kdprune(*line, "--dry-run", "--json", cwd=exported).out)["state"] == "finished"
    refused = kdprune(*line, "--views", 2, cwd=exported)
    assert (refused.code, "views is 3, now 2" in refused.err) == (2, True)
    replaced = kdprune(*line, "--views", 2, "--overwrite", cwd=exported)
    assert (replaced.code, Manifest.load(tmp_path / "new").counts["views"]) == (0, 2)


def test_info_and_verify(exported: Path, kdprune: Cli) -> None:
    told = kdprune("info", EXPORT, cwd=exported)
    assert f"export '{EXPORT.name}'" in told.out
    assert "teacher: model 'resnet8-s0'" in told.out
    assert kdprune("verify", EXPORT, cwd=exported).code == 0


def test_a_recipe_exports(chain_copy: Path, kdprune: Cli) -> None:
    """A section, after the cache that the recipe makes of its subset."""
    text = "[select]\nfrac = 0.4\n[cache]\nviews = 2\n[export]\nviews = 1\n[verify]\n"
    (chain_copy / "r.toml").write_text(text)
    assert kdprune("run", "r.toml", "--dry-run", cwd=chain_copy).code == 0
    ran = kdprune("run", "r.toml", cwd=chain_copy)
    assert ran.code == 0, ran.err
    agrees(chain_copy, Path("exports/random-0.4-s0--resnet8-s0"), Path("subsets/random-0.4-s0"), Path("logits/random-0.4-s0--resnet8-s0"))
    again = kdprune("run", "r.toml", cwd=chain_copy)
    assert (again.code, "[export]: skipped: already done" in again.err) == (0, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[export]\n", "[export]: there is no logit cache in logits/"),
        ("[[select]]\nfrac=0.4\n[[select]]\nfrac=0.3\n[cache]\nsubset='data/train'\n[export]\n", "with `subset` and `name`"),
        ("[export]\nlogits='logits/none'\n", "logits = 'logits/none' does not exist"),
    ],
)
def test_a_recipe_that_cannot_export(chain_copy: Path, kdprune: Cli, text: str, said: str) -> None:
    shutil.rmtree(chain_copy / "logits")
    (chain_copy / "r.toml").write_text(text)
    ran = kdprune("run", "r.toml", cwd=chain_copy)
    assert (ran.code, said in ran.err) == (2, True), ran.err


# --- refused


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["data/train", "--logits", CACHE], 1, "has no logits for 54 of 108 samples"),
        ([SUBSET, "--logits", CACHE, "--views", 4], 2, "has 3 views, 4 are asked for: make more with cache --views 4"),
        ([SUBSET, "--logits", CACHE, "--views", 0], 2, "--views 0"),
        ([CACHE, "--logits", CACHE], 2, "is of kind logits: expected dataset or subset"),
        ([SUBSET, "--logits", SUBSET], 2, "is of kind subset: expected logits"),
        ([SUBSET, "--logits", EXPORT], 2, "is of kind export: expected logits"),
        ([SUBSET, "--logits", CACHE, "--out", SUBSET], 2, "holds a subset, not an export"),
        ([SUBSET], 2, "several in logits/ fit"),
        (["data/test"], 2, "no fitting logit cache in logits/"),
    ],
)
def test_refused(exported: Path, kdprune: Cli, line: list[Any], code: int, said: str) -> None:
    shutil.rmtree(exported / "logits/all", ignore_errors=True)
    before = set(exported.rglob("*"))
    ran = kdprune("export", *line, *(["--name", "x"] if "--out" not in line else []), cwd=exported)
    assert (ran.code, said in ran.err) == (code, True), ran.err
    assert len([one for one in ran.err.splitlines() if one.startswith("error")]) == 1
    assert set(exported.rglob("*")) == before


def test_other_images_are_refused(chain_copy: Path, few_digits: Path, kdprune: Cli) -> None:
    """The same ids, another data set."""
    source = shutil.copytree(few_digits / "train", chain_copy / "source")
    images = sorted(source.rglob("*.png"))
    for one in images[::2]:
        shutil.copy(images[1], one)
    for line in (["import", "source", "--out", "other/train"], ["select", "other/train", "--keys", "ids.txt", "--out", "other/subset"]):
        ids = Dataset.open(chain_copy / SUBSET).ids
        (chain_copy / "ids.txt").write_text("".join(f"{one}\n" for one in ids))
        assert kdprune(*line, cwd=chain_copy).code == 0
    ran = kdprune("export", "other/subset", "--logits", CACHE, cwd=chain_copy)
    assert (ran.code, "was made of other data: the image of" in ran.err) == (1, True), ran.err
    assert not (chain_copy / "exports").exists()


def test_damaged_shards_leave_nothing(chain_copy: Path, kdprune: Cli) -> None:
    shard = chain_copy / SUBSET / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"iDAT"))
    ran = kdprune("export", "-j", 1, cwd=chain_copy)
    assert (ran.code, "is not the image that was indexed" in ran.err) == (1, True), ran.err
    assert not (chain_copy / "exports").exists()


# --- shards of others


def adopt(workspace: Path, kdprune: Cli, *, names: Callable[[int], str], others: dict[str, Any], more: list[Any]) -> Path:
    """Two shards by webdataset's own writer of the first digits, adopted as `data/train` of `workspace`, with a cache of two views."""
    from sklearn.datasets import load_digits

    from kdprune_data.images import encode_png

    workspace.mkdir()
    data = load_digits()
    for shard in range(2):
        with webdataset.TarWriter(str(workspace / f"part.{shard}.tar")) as sink:
            for n in range(20):
                pixels = np.floor(data.images[20 * shard + n] * (255 / 16) + 0.5).astype(np.uint8)
                fields = {key: value(20 * shard + n) if callable(value) else value for key, value in others.items()}
                sink.write({"__key__": names(n), **fields, "image.png": encode_png(pixels)})
    (workspace / "classes.txt").write_text("".join(f"digit {n}\n" for n in range(10)))
    for line in (
        ["index", *sorted(workspace.glob("*.tar")), "--id", "shard", *more],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 8] if "--label-member" in more else None,
    ):
        if line is not None:
            ran = kdprune(*line, cwd=workspace)
            assert ran.code == 0, ran.err
    return workspace


def test_adopted_shards_become_plain_ones(tmp_path: Path, kdprune: Cli) -> None:
    """PAX tars, image.png, a label in JSON beside an old .cls, keys that repeat: KEY.png, KEY.cls, the others, and KEY is the id."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    others = {"cls": 3, "json": lambda n: {"name": f"digit {labels[n]}"}, "txt": "seen"}
    labelled = ["--image-member", "image.png", "--label-member", "json:name", "--classes", "classes.txt"]
    workspace = adopt(tmp_path / "w", kdprune, names=lambda n: f"{n:04d}", others=others, more=labelled)
    for line in (
        ["select", "--frac", "0.5", "--shard-samples", 100],
        ["select", "--frac", "0.5", "--ids-only", "--out", "subsets/ids"],
        ["cache", "data/train", "--views", 2],
        ["export", "subsets/random-0.5-s0", "--name", "copied"],
        ["export", "subsets/ids", "--name", "listed"],
        ["verify", "exports/copied"],
        ["verify", "exports/listed"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err + ran.out
    data = Dataset.open(workspace / "subsets/random-0.5-s0")
    found = members(workspace / "exports/copied")
    assert list(found) == data.ids.tolist()
    assert {one.split("/")[0] for one in found} == {"part.0", "part.1"}
    for row, one in enumerate(found.values()):
        assert list(one) == ["png", "cls", "json", "txt", "kd.npz"]
        assert (one["png"], one["cls"], one["txt"]) == (data.image_bytes(row), b"%d" % data.labels[row], b"seen")
        assert json.loads(one["json"]) == {"name": f"digit {data.labels[row]}"}
    assert members(workspace / "exports/listed") == found
    assert Manifest.load(workspace / "exports/listed").counts["shards"] == 2
    run_readme(workspace / "exports/copied")


@pytest.mark.parametrize(
    ("names", "others", "said"),
    [
        (lambda n: f"{n:04d}", {"kd.npz": b"theirs"}, "has a member .kd.npz beside the one that gets this name"),
        (lambda n: f"{n:04d}", {"png": b"theirs"}, "has a member .png beside the one that gets this name"),
        (lambda n: f"{n:0100d}", {}, "at most 100 bytes of printable ASCII fit a tar header"),
        (lambda n: f"é{n:04d}", {}, "at most 100 bytes of printable ASCII fit a tar header"),
    ],
)
def test_members_that_no_tar_can_hold(tmp_path: Path, kdprune: Cli, names: Any, others: dict[str, Any], said: str) -> None:
    labelled = ["--image-member", "image.png", "--label-member", "json:name", "--classes", "classes.txt"]
    workspace = adopt(tmp_path / "w", kdprune, names=names, others={"json": {"name": "digit 0"}, **others}, more=labelled)
    assert kdprune("cache", "data/train", "--views", 1, cwd=workspace).code == 0
    ran = kdprune("export", "data/train", cwd=workspace)
    assert (ran.code, said in ran.err) == (1, True), ran.err
    assert not (workspace / "exports").exists()


def test_samples_without_a_label_and_without_an_image(chain_copy: Path, unlabelled: Path, tmp_path: Path, kdprune: Cli) -> None:
    """The first have no .cls, and the README's loss goes without; the others are left out, and said to be."""
    spoilt, whole = tmp_path / "spoilt.tar", unlabelled.read_bytes()
    end = max(one.end for one in tar.scan(whole, "bare.tar"))
    spoilt.write_bytes(whole[:end] + tar.member("zz.png", b"\x89PNG\r\n\x1a\n") + tar.END)
    (chain_copy / "classes.txt").write_text("".join(f"{n}\n" for n in range(10)))
    for line in (
        ["index", spoilt, "--out", "data/bare", "--classes", "classes.txt", "--on-bad", "keep"],
        ["cache", "data/bare", "--views", 2, "--name", "bare"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    ran = kdprune("export", "data/bare", cwd=chain_copy)
    assert (ran.code, "1 sample that do not decode" in ran.err) == (0, True), ran.err
    folder = chain_copy / "exports/bare"
    assert {tuple(one) for one in members(folder).values()} == {("png", "kd.npz")}
    counts = Manifest.load(folder).counts
    assert (counts["samples"], counts["labelled"], sum(counts["per_class"])) == (40, 0, 0)
    assert kdprune("verify", folder, cwd=chain_copy).code == 0
    assert "no class" in (folder / "README.md").read_text()
    run_readme(folder)


# --- the README


def run_readme(folder: Path) -> dict[str, Any]:
    """Run the code of a README as it stands, in the folder, in a namespace of its own, which is returned."""
    (code,) = CODE.findall((folder / "README.md").read_text(encoding="utf-8"))
    space: dict[str, Any] = {"__name__": "__readme__"}
    with contextlib.chdir(folder):
        exec(compile(code, "README.md", "exec"), space)
    assert torch.isfinite(space["loss"])
    assert "kdprune" not in code
    return space


@pytest.mark.parametrize(("name", "cache"), [(EXPORT.name, CACHE), ("mirrored", Path("logits/flips"))])
def test_the_readme_trains_on_the_views_of_the_teacher(exported: Path, name: str, cache: Path) -> None:
    """Its code takes steps; and for every sample and view its pixels and logits are what the teacher saw and said."""
    space = run_readme(exported / "exports" / name)
    data, of = Dataset.open(exported / SUBSET), LogitCache.open(exported / cache)
    rows, joined = np.arange(len(data)), of.join(data)
    saved = _models.open_model(exported / "teachers/resnet8-s0")
    samples = webdataset.WebDataset([str(p) for p in sorted((exported / "exports" / name).glob("*.tar"))], shardshuffle=False).decode("pil")
    for view in range(of.views):
        found = joined.read(rows, view)
        boxes = views.Geometry(*found[:5])
        pixels = saved.normalisation.apply(views.render(Images(data).get(rows), boxes, 8)).numpy()
        shown = [space["view"](sample, view) for sample in samples]
        assert np.stack([one[0] for one in shown]) == pytest.approx(pixels, abs=1e-6)
        assert [one[1] for one in shown] == data.labels.tolist()
        assert np.array_equal([one[2] for one in shown], found.logits.astype(np.float32))
        assert not found.flip.any() if name == EXPORT.name else found.flip.any()


def test_the_readme_tells_where_it_comes_from(exported: Path) -> None:
    text = (exported / EXPORT / "README.md").read_text()
    teacher = Manifest.load(exported / "teachers/resnet8-s0")
    for told in (
        f"subset `{SUBSET.name}`, of dataset `train`",
        Manifest.load(exported / SUBSET).content,
        f"`resnet8-s0`, resnet8, digest `{teacher.digest}`",
        ", ".join(f"{v:g}" for v in teacher.config["normalisation"]["mean"]),
        "the logits hold for any",
        "`pad-crop`",
        "54 samples in 2 WebDataset shards, 10 classes",
    ):
        assert told in text, told


def card(exported: Path, **changed: Any) -> str:
    manifest = Manifest.load(exported / EXPORT)
    data, cache = manifest.inputs
    facts = {"title": "x", "data": data, "cache": cache, "teachers": [cache["inputs"][1]], "images": ["png"], "dtype": "float16"}
    return export_card(ExportCard(**(facts | {"classes": manifest.classes} | changed)), manifest.counts)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ["tau = 4\n", "hold for any."]),
        ({"temperatures": (2.0, 2.0)}, ["tau = 2\n", "hold for 2 alone; train at it."]),
        ({"temperatures": (1.0, 3.0)}, ["tau = 3\n", "hold from 1 to 3; train at one of these."]),
        ({"temperatures": (5.0, 8.0)}, ["tau = 5\n", "hold from 5 to 8"]),
        ({"teachers": []}, ["mean, std = np.float32([0.5, 0.5, 0.5])", "not known; the logits came from elsewhere"]),
        ({"images": ["jpg", "webp"]}, ['next(sample[k] for k in ("jpg", "webp") if k in sample).crop(', "`KEY.jpg` or `KEY.webp`"]),
    ],
)
def test_the_readme_of_other_caches(exported: Path, changed: dict[str, Any], told: list[str]) -> None:
    """Its code is Python still."""
    text = card(exported, **changed)
    assert all(one in text for one in told), text
    (code,) = CODE.findall(text)
    compile(code, "README.md", "exec")


def test_the_readme_of_several_teachers(exported: Path) -> None:
    (_, cache) = Manifest.load(exported / EXPORT).inputs
    teacher = cache["inputs"][1]
    text = card(exported, teachers=[teacher, {**teacher, "name": "second"}])
    assert text.count("- Teacher: ") == 2
    assert "`second`" in text


# --- real images


def test_cifar(tmp_path: Path, cifar_rows: list[tuple[bytes, int]], kdprune: Cli) -> None:
    """JPEGs, mirrored crops: every number is the cache's, and the README's code trains."""
    rows = [{"bytes": data, "path": None} for data, _ in cifar_rows]
    pq.write_table(pa.table({"image": rows, "label": [label for _, label in cifar_rows]}), tmp_path / "cifar.parquet")
    for line in (
        ["import", "cifar.parquet", "--shard-samples", 150],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 64],
        ["select", "--frac", "0.5", "--shard-samples", 80],
        ["cache", "--views", 4],
        ["export"],
        ["verify", EXPORT],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    agrees(tmp_path, EXPORT, SUBSET, CACHE)
    space = run_readme(tmp_path / EXPORT)
    assert space["image"].shape[1:] == (3, 32, 32)


def test_photographs(tmp_path: Path, real_data: Path, kdprune: Cli) -> None:
    """Resized crops: the README's pixels are the teacher's within a grey level."""
    for line in (
        ["import", real_data / "photos/train.parquet"],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 32, "--size", 32],
        ["select", "--frac", "0.1", "--balance", "none", "--name", "few"],
        ["cache", "--views", 2, "--name", "few"],
        ["export"],
        ["verify", "exports/few"],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    agrees(tmp_path, Path("exports/few"), Path("subsets/few"), Path("logits/few"))
    space = run_readme(tmp_path / "exports/few")
    data, of = Dataset.open(tmp_path / "subsets/few"), LogitCache.open(tmp_path / "logits/few")
    rows, joined = np.arange(len(data)), of.join(data)
    samples = webdataset.WebDataset([str(tmp_path / "exports/few/shard-000000.tar")], shardshuffle=False).decode("pil")
    pixels = views.render(Images(data).get(rows), views.Geometry(*joined.read(rows, 1)[:5]), 32).numpy().astype(float)
    shown = np.stack([space["view"](sample, 1)[0] for sample in samples])
    grey = (shown * space["std"][:, None, None] + space["mean"][:, None, None]) * 255
    assert np.abs(grey - pixels).max() < 1.01


# --- verify


@pytest.fixture
def changed(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of an export whose first shard was changed, member by member, with a manifest and sums that agree with it."""

    def change(edit: Callable[[str, bytes], bytes | None]) -> Path:
        folder = shutil.copytree(exported / EXPORT, tmp_path / "changed")
        shard = folder / "shard-000000.tar"
        whole = shard.read_bytes()
        parts = [(one.name, whole[one.data : one.data + one.size]) for one in tar.scan(whole, "x")]
        made = [(name, edit(name, data) if n < 3 else data) for n, (name, data) in enumerate(parts)]
        shard.write_bytes(b"".join(tar.member(name, data) for name, data in made if data is not None) + tar.END)
        tars = sorted(folder.glob("*.tar"))
        (folder / "SHA256SUMS").write_text("".join(f"{sha256_file(p)}  {p.name}\n" for p in tars))
        manifest = Manifest.read(folder)
        files = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
        (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())
        return folder

    return change


def other(**arrays: Any) -> Callable[[str, bytes], bytes]:
    """The member with other arrays."""
    return lambda name, data: export.npz(soft(data) | arrays) if name.endswith(".kd.npz") else data


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda name, data: None if name.endswith(".kd.npz") else data, "has no member .kd.npz"),
        (lambda name, data: data[:-9] if name.endswith(".kd.npz") else data, "cannot be read by numpy"),
        (lambda name, data: b"PK\x03\x04 no" if name.endswith(".kd.npz") else data, "cannot be read by numpy"),
        (lambda name, data: data.replace(b"!\0", b"\x22\0") if name.endswith(".kd.npz") else data, "is not written as its format says"),
        (other(logits=np.full((3, 10), np.nan, np.float16)), "holds a logit that is not finite"),
        (other(logits=np.zeros((2, 10), np.float16)), "holds arrays of shapes"),
        (other(logits=np.zeros((3, 9), np.float16)), "has float16 logits of shape (3, 9)"),
        (other(logits=np.zeros((3, 10), np.float32)), "has float32 logits of shape (3, 10)"),
        (other(boxes=np.zeros((3, 4), np.int16)), "an empty box"),
        (other(flip=np.zeros(2, bool)), "is not written as its format says"),
        (other(more=np.zeros(2, bool)), "holds logits, boxes, flip, more, not"),
        (lambda name, data: b"%d" % (9 - int(data)) if name.endswith(".cls") else data, "do not give the manifest's content"),
        (lambda name, data: b"77" if name.endswith(".cls") else data, "has label 77, of 10 classes"),
        (lambda name, data: data + b"x" if name.endswith(".png") else data, "do not give the manifest's content"),
        (lambda *_: None, "says samples 54, the shards give 53"),
    ],
)
def test_lies_that_every_digest_agrees_with(changed: Callable[..., Path], kdprune: Cli, tmp_path: Path, edit: Any, said: str) -> None:
    ran = kdprune("verify", changed(edit), cwd=tmp_path)
    assert (ran.code, said in ran.out) == (1, True), ran.out
