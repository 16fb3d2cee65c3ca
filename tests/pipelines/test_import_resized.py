"""`import --max-side`: which images are resized, to what, and what of them is kept; photographs that come with scikit-learn."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import import_, verify
from kdprune_pipelines._console import Outcome
from PIL import Image

from kdprune_data import images
from kdprune_data.errors import KdpruneError, SourceError, UsageError
from kdprune_data.formats import indexing
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.shard import Handling, Sample
from kdprune_data.formats.shards import Limits, ShardWriter

Digests = Callable[[Path], dict[str, str]]
Sources = dict[str, bytes]
SIDE = 64


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos() -> Sources:
    """Crops of real photographs, of many sizes and sorts, by name; those called `small` have no side above 64."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(one) for one in load_sample_images().images]  # 640 x 427

    def cut(n: int, width: int, height: int) -> Image.Image:
        return whole[n % 2].crop((n, n, n + width, n + height))

    turned = Image.Exif()
    turned[0x0112] = 6
    found = {f"jpeg-{n}": encoded(cut(n, 65 + 7 * n, 200 - 5 * n), "JPEG") for n in range(24)}
    found |= {f"small-{n}": encoded(cut(n, 64 - n, 40 + n), ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(12)}
    return found | {
        "turned": encoded(cut(1, 100, 70), "JPEG", exif=turned),
        "small-turned": encoded(cut(1, 60, 40), "JPEG", exif=turned),
        "alpha": encoded(cut(2, 90, 120).convert("RGBA"), "PNG"),
        "palette": encoded(cut(3, 90, 120).convert("P"), "PNG"),
        "grey": encoded(cut(4, 90, 120).convert("L"), "JPEG"),
        "cmyk": encoded(cut(5, 90, 120).convert("CMYK"), "JPEG"),
        "deep": encoded(Image.fromarray(np.asarray(cut(6, 90, 120).convert("L")).astype(np.uint16) * 257), "PNG"),
        "webp": encoded(cut(7, 130, 65), "WEBP"),
        "long": encoded(cut(8, 600, 3), "PNG"),
        "thin": encoded(cut(8, 1, 300), "PNG"),
    }


def folder_of(root: Path, photos: Sources) -> Path:
    (root / "cat").mkdir(parents=True)
    for name, data in photos.items():
        (root / "cat" / f"{name}.jpg").write_bytes(data)
    return root


def parquet_of(root: Path, photos: Sources) -> Path:
    root.mkdir()
    rows = [{"bytes": data, "path": f"cat/{name}.jpg"} for name, data in photos.items()]
    pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), root / "x.parquet")
    return root


def tar_of(root: Path, photos: Sources, *more: tuple[str, bytes]) -> Path:
    root.mkdir()
    with tarfile.open(root / "x.tar", "w") as packed:
        for name, data in [*((f"cat/{name}.{images.extension(data)}", data) for name, data in photos.items()), *more]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return root


SOURCES = {"folder": folder_of, "parquet": parquet_of, "webdataset": tar_of}


def run(source: Path, out: Path, **settings: Any) -> Outcome:
    return import_.run(import_.ImportConfig.from_dict({"source": str(source), "out": out, "max_side": SIDE} | settings))


def refusal(kind: type[KdpruneError], source: Path, out: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        run(source, out, **settings)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", SOURCES)
def test_large_images_are_resized_and_all_others_keep_their_bytes(tmp_path: Path, photos: Sources, kind: str) -> None:
    run(SOURCES[kind](tmp_path / "source", photos), tmp_path / "train")
    read = Dataset.open(tmp_path / "train")
    stored = dict(zip((one.removeprefix("cat/") for one in read.ids.tolist()), read.read(range(len(read))), strict=True))
    assert stored.keys() == photos.keys()
    for name, data in stored.items():
        before, after = images.decode(photos[name]), images.decode(data)
        longer = max(before.shape[:2])
        if longer <= SIDE:
            assert data == photos[name]
            continue
        assert after.shape[:2] == tuple(max(1, int(side * SIDE / longer + 0.5)) for side in before.shape[:2])
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, [part[1:3] for part in image.layer]) == ("JPEG", "RGB", [(2, 2), (1, 1), (1, 1)])  # 4:2:0
            assert not image.getexif()
            assert "icc_profile" not in image.info
        reference = np.asarray(Image.fromarray(before).resize(after.shape[1::-1], Image.Resampling.LANCZOS))
        assert np.abs(after.astype(int) - reference).mean() < 8, name
    assert read.sizes.tolist() == [list(images.decode(stored[one.removeprefix("cat/")]).shape[:2]) for one in read.ids.tolist()]
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as packed:
        kinds = {name.rpartition(".")[0].removeprefix("cat/"): name.rpartition(".")[2] for name in packed.getnames() if ".cls" not in name}
    assert kinds == {name: images.extension(data) for name, data in stored.items()}
    assert verify.run(verify.VerifyConfig(artefact=tmp_path / "train")).facts["faults"] == []


def test_verify_finds_an_image_that_was_to_be_smaller(tmp_path: Path, photos: Sources) -> None:
    identity = Identity("dataset", "train", {"split": "train", "max_side": SIDE}, [])
    with Build.begin(tmp_path / "train", identity) as build, ShardWriter(build, limits=Limits(), jobs=1, handling=Handling()) as writer:
        writer.add(Sample("thin", photos["thin"], 0, "here"))
        facts = indexing.write_index(build, writer.finish(), ["cat"], writer.names)
        build.seal(counts=facts.counts | {"resized": 0}, classes=["cat"], content=facts.content)
    (fault,) = verify.run(verify.VerifyConfig(artefact=tmp_path / "train")).facts["faults"]
    assert "has an image of 300 pixels on a side, and was imported with --max-side 64" in str(fault)


def test_it_is_recorded_counted_and_said(tmp_path: Path, photos: Sources) -> None:
    source = folder_of(tmp_path / "source", photos)
    text = run(source, tmp_path / "train", quality=75).text
    made = Manifest.load(tmp_path / "train")
    large = sum(max(images.decode(data).shape[:2]) > SIDE for data in photos.values())
    assert made.counts["resized"] == large
    assert f", {large} images resized; content " in text
    assert {key: made.config[key] for key in ("max_side", "quality", "encoder")} == {
        "max_side": SIDE,
        "quality": 75,
        "encoder": "Pillow: Lanczos, JPEG 4:2:0",
    }
    card = (tmp_path / "train" / "README.md").read_text(encoding="utf-8")
    assert f"{large} of the images were resized on import, to {SIDE} pixels on their longer side, and encoded as JPEG of quality 75" in card
    assert '- name: "png"' in card
    run(source, tmp_path / "plain", max_side=None)
    plain = Manifest.load(tmp_path / "plain")
    assert not {"max_side", "quality", "encoder"} & plain.config.keys()
    assert "resized" not in plain.counts
    assert plain.content != made.content


def test_a_card_tells_of_the_images_that_are_stored(tmp_path: Path, photos: Sources) -> None:
    run(folder_of(tmp_path / "source", {"alpha": photos["alpha"], "webp": photos["webp"]}), tmp_path / "train")
    card = (tmp_path / "train" / "README.md").read_text(encoding="utf-8")
    assert '- name: "jpg"' in card
    assert '"png"' not in card
    assert '"webp"' not in card


def test_quality_is_90_and_finer_takes_more(tmp_path: Path, photos: Sources) -> None:
    source = folder_of(tmp_path / "source", photos)
    sizes = {}
    for name, quality in (("default", None), ("90", 90), ("50", 50), ("100", 100)):
        run(source, tmp_path / name, quality=quality)
        sizes[name] = Dataset.open(tmp_path / name).index["image_length"].to_numpy().sum()
    assert sizes["50"] < sizes["90"] == sizes["default"] < sizes["100"]
    assert Manifest.load(tmp_path / "default").digest == Manifest.load(tmp_path / "90").digest


@pytest.mark.parametrize("shuffle", ["on", "off"])
@pytest.mark.parametrize("settings", [{"jobs": 1}, {"jobs": 5}, {"memory": 1_000_000, "jobs": 3}])
def test_threads_and_memory_change_no_byte(
    tmp_path: Path, photos: Sources, digests: Digests, settings: dict[str, int], shuffle: str
) -> None:
    source = parquet_of(tmp_path / "source", photos)
    for name, how in (("a", {}), ("b", settings)):
        run(source, tmp_path / name / "train", shuffle=shuffle, shard_bytes=20_000, holdout="0.2", **how)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("limit", [20_000, 60_000])
def test_shards_are_cut_by_what_is_stored(tmp_path: Path, photos: Sources, limit: int) -> None:
    run(folder_of(tmp_path / "source", photos), tmp_path / "train", shard_bytes=limit)
    read = Dataset.open(tmp_path / "train")
    sizes = [path.stat().st_size for path in read.shard_paths]
    first = [int(read.index["length"][int(row)].as_py()) for row in np.searchsorted(read.shards, range(1, len(sizes)))]
    assert max(sizes) <= limit
    assert all(size + more > limit for size, more in zip(sizes[:-1], first, strict=True))  # the next sample would not have fitted


@pytest.mark.parametrize("tars", [1, 4])
def test_one_that_was_killed_goes_on(
    tmp_path: Path, photos: Sources, digests: Digests, kill_midway: Callable[[str, Path, int], None], tars: int
) -> None:
    """Finished shards stand, with what they counted; a source that changed meanwhile is refused."""
    many = {f"{name}-{n}": data for n in range(20) for name, data in photos.items()}
    source = folder_of(tmp_path / "source", many)
    settings = {"shard_bytes": 30_000, "max_side": SIDE, "jobs": 1}
    out = tmp_path / "a" / "train"
    values = settings | {"source": str(source), "out": str(out)}
    kill_midway(f"from kdprune_pipelines import import_; import_.run(import_.ImportConfig.from_dict({values}))", out, tars)
    before = {p.name: p.stat().st_mtime_ns for p in sorted(out.glob("*.tar"))[: tars - 1]}
    run(source, out, **settings)
    run(source, tmp_path / "b" / "train", **settings)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    counts = json.loads((out / "manifest.json").read_bytes())["counts"]
    assert counts["resized"] == Manifest.load(tmp_path / "b" / "train").counts["resized"]


def test_images_that_do_not_decode_stay_as_they_came(tmp_path: Path, photos: Sources) -> None:
    bad = {"broken": photos["jpeg-3"][:500], "gif": b"GIF89a", "jpeg-1": photos["jpeg-1"]}
    source = folder_of(tmp_path / "source", bad)
    assert "--on-bad keep" in refusal(SourceError, source, tmp_path / "train")
    run(source, tmp_path / "train", on_bad="keep")
    read = Dataset.open(tmp_path / "train")
    assert {one: read.image_bytes(n) for n, one in enumerate(read.ids) if not read.ok[n]} == {
        f"cat/{name}": bad[name] for name in ("broken", "gif")
    }
    assert read.manifest.counts["resized"] == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_side": None, "quality": 80}, "--quality goes with --max-side: images that are not resized keep their bytes"),
        ({"max_side": 15}, "--max-side 15 is too small: at least 16"),
        ({"quality": 0}, "--quality 0 is too small: at least 1"),
        ({"quality": 101}, "--quality 101 is too large: at most 100"),
    ],
)
def test_wrong_usage(tmp_path: Path, photos: Sources, settings: dict[str, Any], says: str) -> None:
    assert says in refusal(UsageError, folder_of(tmp_path / "source", photos), tmp_path / "train", **settings)


def test_a_resized_image_takes_no_other_members_name(tmp_path: Path, photos: Sources) -> None:
    source = tar_of(tmp_path / "source", {"alpha": photos["alpha"]}, ("cat/alpha.jpg", photos["jpeg-1"]))
    line = refusal(SourceError, source, tmp_path / "train", image_member="png")
    assert "(key 'cat/alpha'): resized, its image is called .jpg, as another of its members is: pack the set again without that" in line
    run(source, tmp_path / "train", image_member="png", max_side=None)


def test_other_members_go_along_as_they_are(tmp_path: Path, photos: Sources) -> None:
    run(tar_of(tmp_path / "source", {"alpha": photos["alpha"]}, ("cat/alpha.json", b'{"box": [1, 2]}')), tmp_path / "train")
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as packed:
        assert packed.getnames() == ["cat/alpha.jpg", "cat/alpha.json"]
        assert packed.extractfile("cat/alpha.json").read() == b'{"box": [1, 2]}'  # type: ignore[union-attr]  # it is there


def test_a_dry_run_knows_what_resized_images_take(tmp_path: Path, photos: Sources) -> None:
    source = folder_of(tmp_path / "source", photos)
    found = run(source, tmp_path / "train", dry_run=True, max_side=16).facts["bytes"]
    run(source, tmp_path / "train", max_side=16)
    size = sum(path.stat().st_size for path in (tmp_path / "train").glob("*.tar"))
    assert 0.5 * size < found < 2 * size
