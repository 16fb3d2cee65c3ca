"""formats/dataset.py, shards.py, subset.py, table.py: the index, the cut into shards, the plan of a subset, Parquet as others read it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdprune_data import images, order
from kdprune_data.errors import FormatError, MismatchError, SourceError, UsageError
from kdprune_data.formats import copying, indexing, subset, table, tar
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.shard import Handling, Sample
from kdprune_data.formats.shards import Limits, ShardWriter

COLUMNS = {  # docs/formats.md, as DuckDB calls the types
    "id": "VARCHAR",
    "key": "VARCHAR",
    "uid": "UBIGINT",
    "shard": "INTEGER",
    "offset": "BIGINT",
    "length": "BIGINT",
    "label": "INTEGER",
    "image_offset": "BIGINT",
    "image_length": "BIGINT",
    "sha256": "BLOB",
    "width": "INTEGER",
    "height": "INTEGER",
    "ok": "BOOLEAN",
}


def sample(n: int, size: int = 3, label: int | None = 0) -> Sample:
    return Sample(f"{n:03d}", images.encode_png(np.full((size, size), n % 251, np.uint8)), label, f"row {n}")


def written(folder: Path, samples: list[Sample], *, limits: Limits, jobs: int = 2, keep_bad: bool = False) -> Build:
    """Shards and index of some samples, with the build left open for more."""
    build = Build.begin(folder, Identity("dataset", "train", {"split": "train"}, []))
    with ShardWriter(build, limits=limits, jobs=jobs, handling=Handling(keep_bad)) as writer:
        for one in samples:
            writer.add(one)
        index = writer.finish()
    facts = indexing.write_index(build, index, ["a", "b"], writer.names)
    build.seal(counts=facts.counts, classes=["a", "b"], content=facts.content)
    return build


# --- the index


def test_the_index_has_the_pages_columns_as_duckdb_reads_them(digits: Path) -> None:
    path = digits / "data" / "train" / "index.parquet"
    with duckdb.connect() as base:
        found = {name: kind for name, kind, *_ in base.execute(f"DESCRIBE SELECT * FROM '{path}'").fetchall()}
        rows = base.execute(f"SELECT id, uid, shard, label, sha256, ok FROM '{path}'").fetchall()
        per_class = base.execute(f"SELECT label, count(*) FROM '{path}' GROUP BY label ORDER BY label").fetchall()
    assert found == COLUMNS
    read = Dataset.open(path.parent)
    assert [row[0] for row in rows] == read.ids.tolist()
    assert [row[1] for row in rows] == read.uids.tolist() == order.uids_of(read.ids).tolist()
    assert [row[2] for row in rows] == read.shards.tolist()
    assert [row[4] for row in rows] == [one.tobytes() for one in read.sha256]
    assert [count for _, count in per_class] == read.manifest.counts["per_class"]


def test_the_index_says_where_everything_is(digits: Path) -> None:
    """Each row against Python's tarfile: the record's bytes, the image's bytes, the label, and nothing between the records."""
    read = Dataset.open(digits / "data" / "train")
    rows = read.index.to_pylist()
    for shard, path in enumerate(read.shard_paths):
        raw = path.read_bytes()
        mine = [row for row in rows if row["shard"] == shard]
        assert mine[0]["offset"] == 0
        assert [row["offset"] for row in mine[1:]] == [row["offset"] + row["length"] for row in mine[:-1]]
        assert raw[mine[-1]["offset"] + mine[-1]["length"] :] == bytes(1024)
        with tarfile.open(path) as found:
            members = {info.name: info for info in found.getmembers()}
            names = list(members)
        assert names == [name for row in mine for name in (f"{row['key']}.png", f"{row['key']}.cls")]
        for row in mine:
            info = members[f"{row['key']}.png"]
            assert (info.offset, info.offset_data, info.size) == (row["offset"], row["image_offset"], row["image_length"])
            image = raw[info.offset_data : info.offset_data + info.size]
            assert hashlib.sha256(image).digest() == row["sha256"]
            label = members[f"{row['key']}.cls"]
            assert raw[label.offset_data : label.offset_data + label.size] == str(row["label"]).encode()


def test_readers_see_arrays(digits: Path) -> None:
    read = Dataset.open(digits / "data" / "val")
    n = len(read)
    assert (read.uids.dtype, read.labels.dtype, read.shards.dtype, read.ok.dtype) == (np.uint64, np.int32, np.int32, np.bool_)
    assert (read.sizes.shape, read.sha256.shape, read.sha256.dtype) == ((n, 2), (n, 32), np.uint8)
    assert read.rows_of(0).tolist() == list(range(n))
    assert read.usable().tolist() == list(range(n))
    assert hashlib.sha256(read.image_bytes(5)).digest() == read.sha256[5].tobytes()


@pytest.mark.parametrize("open_files", [64, 2], ids=["all-open", "one-by-one"])
def test_many_images_are_read_at_once_in_any_order(digits: Path, open_files: int) -> None:
    read = Dataset.open(digits / "data" / "train")
    vars(read)["maps"] = tar.Maps(read.shard_paths, open_files)
    shards = [path.read_bytes() for path in read.shard_paths]
    assert len(shards) > 2
    at = zip(*(read.index[name].to_pylist() for name in ("shard", "image_offset", "image_length")), strict=True)
    expected = [shards[shard][offset : offset + length] for shard, offset, length in at]
    rows = np.random.default_rng(0).integers(0, len(read), 700)
    assert read.read(rows) == [expected[row] for row in rows]
    assert read.read(range(len(read))) == expected
    assert read.read([]) == []


def test_of_many_images_the_first_that_was_changed_is_named(digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits / "data" / "val", tmp_path / "val")
    read = Dataset.open(folder)
    with (folder / "shard-000000.tar").open("r+b") as file:
        for row in (7, 30):
            file.seek(read.index["image_offset"][row].as_py() + 20)
            file.write(b"!")
    rows = [n for n in range(len(read)) if n not in (7, 30)]
    assert len(read.read(rows)) == len(rows)
    with pytest.raises(SourceError) as caught:
        read.read([3, 30, 7])
    assert str(caught.value) == (
        f"{folder / 'shard-000000.tar'} was changed: sample {read.ids[30]!r} is not the image that was indexed; "
        f"make or fetch {folder} again"
    )


def test_bad_samples_are_counted_and_never_usable(tmp_path: Path) -> None:
    samples = [sample(0), Sample("001", b"not an image", 1, "row 1"), sample(2, label=None), Sample("003", b"", 1, "row 3")]
    written(tmp_path / "x", samples, limits=Limits(3), keep_bad=True)
    read = Dataset.open(tmp_path / "x")
    assert read.manifest.counts == {"samples": 4, "ok": 2, "shards": 2, "labelled": 3, "per_class": [1, 2]}
    assert (read.usable().tolist(), read.rows_of(0).tolist(), read.rows_of(1).tolist()) == ([0, 2], [0, 2], [])
    assert read.labels.tolist() == [0, 1, -1, 1]
    assert read.sizes.tolist() == [[3, 3], [0, 0], [3, 3], [0, 0]]
    with tarfile.open(tmp_path / "x" / "shard-000000.tar") as found:
        assert found.getnames() == ["000.png", "000.cls", "001.bin", "001.cls", "002.png"]


@pytest.mark.parametrize("data", [b"not an image", b"GIF89a", images.encode_png(np.zeros((4, 4), np.uint8))[:-40]])
def test_a_bad_sample_is_refused_naming_it(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(
        SourceError, match=r"^row 7 \(key '007'\): not an? .*; mend or remove it, or pass --on-bad keep to carry it along unused$"
    ):
        written(tmp_path / "x", [sample(0), Sample("007", data, 1, "row 7")], limits=Limits())


def test_a_set_without_a_sample_that_decodes_cannot_be_used(tmp_path: Path) -> None:
    written(tmp_path / "x", [Sample("001", b"not an image", 1, "row 1")], limits=Limits(), keep_bad=True)
    with pytest.raises(SourceError, match="has no sample that decodes: import it again"):
        Dataset.open(tmp_path / "x").usable()


def test_equal_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^id '000' occurs twice: ids must be unique; rename one \(adopted shards: --id shard\)$"):
        written(tmp_path / "x", [sample(0), sample(1), sample(0)], limits=Limits())


# --- the cut


@pytest.mark.parametrize(("n", "limit", "sizes"), [(1, 1, [1]), (7, 3, [3, 3, 1]), (6, 3, [3, 3]), (5, 100, [5])])
def test_shards_are_cut_by_count(tmp_path: Path, n: int, limit: int, sizes: list[int]) -> None:
    written(tmp_path / "x", [sample(i) for i in range(n)], limits=Limits(limit))
    names = [f"shard-{i:06d}.tar" for i in range(len(sizes))]
    assert json.loads((tmp_path / "x" / "sizes.json").read_bytes()) == dict(zip(names, sizes, strict=True))
    assert sorted(p.name for p in (tmp_path / "x").glob("*.tar")) == names


@pytest.mark.parametrize("limit", [1, 4096, 4096 + 1023, 5119, 5120, 5121, 9216, 100_000])
def test_shards_are_cut_by_bytes(tmp_path: Path, limit: int) -> None:
    """The record that would take the file past the limit, its 1,024 closing bytes included, opens the next shard."""
    samples = [sample(i, size=3 + 20 * (i % 4)) for i in range(30)]
    written(tmp_path / "x", samples, limits=Limits(bytes=limit))
    expected: list[list[int]] = []
    for one in samples:
        record = 512 + -(-len(one.data) // 512) * 512 + 1024
        if expected and sum(expected[-1]) + record + 1024 <= limit:
            expected[-1].append(record)
        else:
            expected.append([record])
    assert [path.stat().st_size for path in sorted((tmp_path / "x").glob("*.tar"))] == [sum(shard) + 1024 for shard in expected]


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("changed", [False, True])
def test_shards_left_by_an_interrupted_run_are_taken_as_they_are(tmp_path: Path, jobs: int, changed: bool) -> None:
    """They stand, and are compared with the samples that pass by; a source that is another one now is refused."""

    def begin(name: str) -> Build:
        return Build.begin(tmp_path / name, Identity("dataset", "train", {}, []))

    def shards() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "x").glob("*.tar")}

    samples = [sample(n) for n in range(20)]
    with begin("x") as build, ShardWriter(build, limits=Limits(5), jobs=jobs, handling=Handling(), window=0) as writer:
        for one in samples[:12]:
            writer.add(one)
    stamps = shards()
    assert sorted(stamps) == ["shard-000000.tar", "shard-000001.tar"]
    assert not list((tmp_path / "x").rglob("*.tmp"))
    if changed:
        samples[7] = Sample("007", samples[8].data, 0, "")

    def write(name: str) -> pa.Table:
        with begin(name) as build, ShardWriter(build, limits=Limits(5), jobs=jobs, handling=Handling()) as writer:
            for one in samples:
                writer.add(one)
            return writer.finish()

    fresh = write("fresh")
    if changed:
        with pytest.raises(SourceError, match=r"^the source changed since .*shard-000001.tar holds other samples"):
            write("x")
        return
    assert fresh.equals(write("x"))
    assert shards().items() >= stamps.items()
    for path in (tmp_path / "fresh").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "x" / path.name).read_bytes()


# --- the plan of a subset


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [Limits(), Limits(samples=7), Limits(bytes=6000), Limits(samples=4, bytes=9000), Limits(bytes=1)])
def test_a_plan_cuts_as_the_writer_would(tmp_path: Path, limits: Limits, seed: int) -> None:
    """Kept records, packed by the plan, are the shards that the writer makes of the kept samples."""
    rng = np.random.default_rng(seed)
    samples = [sample(n, size=int(rng.integers(1, 70))) for n in range(40)]
    written(tmp_path / "all", samples, limits=Limits(9))
    rows = np.sort(rng.choice(40, int(rng.integers(1, 41)), replace=False))
    written(tmp_path / "kept", [samples[n] for n in rows], limits=limits)
    parent, kept = Dataset.open(tmp_path / "all"), Dataset.open(tmp_path / "kept")
    plan = subset.plan(parent, rows, limits)
    assert subset.index_of(parent, plan).equals(kept.index)
    with Build.begin(tmp_path / "copied", Identity("subset", "x", {}, [])) as build:
        assert list(copying.copy(parent, plan, build, 3)) == plan.names
    assert [(tmp_path / "copied" / name).read_bytes() for name in plan.names] == [p.read_bytes() for p in kept.shard_paths]


# --- what is not as it should be


def spoiled(digits: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of the val split whose index was changed, with a manifest that does not mind."""
    folder = shutil.copytree(digits / "data" / "val", tmp_path / "val")
    index = change(pq.read_table(folder / "index.parquet"))
    body = json.loads((folder / "manifest.json").read_bytes())
    shutil.rmtree(folder)
    with Build.begin(folder, Identity("dataset", "val", body["config"], [])) as build:
        with build.create("index.parquet") as sink:
            pq.write_table(index, sink)
        build.seal(counts=body["counts"], classes=body["classes"], content=body["content"])
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop_columns(["ok"]), "does not have the columns of its format (without ok)"),
        (lambda t: t.append_column("more", t["label"]), "does not have the columns of its format (unexpected more: int32)"),
        (
            lambda t: t.set_column(6, "label", t["label"].cast(pa.int64())),
            "does not have the columns of its format (unexpected label: int64)",
        ),
        (lambda t: t.select(t.column_names[::-1]), "does not have the columns of its format (in another order)"),
        (lambda t: t.slice(1), "rows, the manifest says"),
    ],
)
def test_an_index_that_is_not_the_pages_is_refused(digits: Path, tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        Dataset.open(spoiled(digits, tmp_path, change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_shorter_than_its_index_says_or_another_is_refused(digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits / "data" / "val", tmp_path / "val")
    read = Dataset.open(folder)
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(SourceError, match=r"shard-000000.tar was changed: sample '\d{8}' is not the image that was indexed; make or fetch"):
        read.image_bytes(len(read) - 1)
    tar = (digits / "data/val/shard-000000.tar").read_bytes()
    (folder / "shard-000000.tar").write_bytes(tar[1024:] + tar[:1024])  # records of one length, one further on
    with pytest.raises(SourceError, match=r"is not the image that was indexed"):
        Dataset.open(folder).image_bytes(0)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with Build.begin(tmp_path / "x", Identity("scores", "x", {}, [])) as build:
        build.seal(counts={}, classes=[], content="")
    with pytest.raises(UsageError, match=r"x is of kind scores: expected dataset or subset; give another folder$"):
        Dataset.open(tmp_path / "x")


@pytest.mark.parametrize(
    "wrong",
    [[str(n) for n in range(9)], [str(n) for n in range(10, 0, -1)], []],
)
def test_other_classes_are_refused(digits: Path, wrong: list[str]) -> None:
    read = Dataset.open(digits / "data" / "val")
    read.same_classes(list("0123456789"), "the teacher")
    with pytest.raises(MismatchError, match=r"has 10 classes .*: use data with the same classes in the same order$"):
        read.same_classes(wrong, "the teacher has")


def test_another_order_of_the_classes_is_named(digits: Path) -> None:
    read = Dataset.open(digits / "data" / "val")
    with pytest.raises(
        MismatchError, match=r"has the classes of it in another order \(class 8 is '8', there '9'\): use data with the same"
    ):
        read.same_classes(list("0123456798"), "it")


# --- Parquet


def test_a_table_comes_back_and_others_read_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (1000, 32), np.uint8)
    labels = np.where(rng.random(1000) < 0.1, -1, rng.integers(0, 10, 1000)).astype(np.int32)
    made = pa.table(
        {
            "id": pa.array([f"cats/ü{n}" for n in range(1000)]),
            "score": pa.array(rng.standard_normal(1000), pa.float32()),
            "sha256": pa.array([one.tobytes() for one in digests], pa.binary(32)),
            "label": indexing.label_array(labels),
        }
    )
    path = tmp_path / "x.parquet"
    path.write_bytes(table.to_bytes(made))
    assert table.read(path, made.schema).equals(made)
    assert table.read(path, made.schema, columns=["label", "id"]).column_names == ["label", "id"]
    assert np.array_equal(indexing.digests_of(table.read(path)["sha256"]), digests)
    assert np.array_equal(indexing.digests_of(made["sha256"].slice(7, 5)), digests[7:12])
    assert np.array_equal(indexing.digests_of(made["sha256"].chunk(0).slice(7, 5)), digests[7:12])
    assert np.array_equal(indexing.labels_of(table.read(path)["label"]), labels)
    with duckdb.connect() as base:
        ids, scores, kept, numbers = zip(*base.execute(f"SELECT * FROM '{path}'").fetchall(), strict=True)
    assert list(ids) == made["id"].to_pylist()
    assert np.array_equal(np.array(scores, np.float32), made["score"].to_numpy())
    assert b"".join(kept) == digests.tobytes()
    assert list(numbers) == made["label"].to_pylist()
    assert table.to_bytes(made) == path.read_bytes()


def test_an_empty_table() -> None:
    made = pa.table({"id": pa.array([], pa.string()), "sha256": pa.array([], pa.binary(32)), "label": pa.array([], pa.int32())})
    found = pq.read_table(io.BytesIO(table.to_bytes(made)))
    assert indexing.digests_of(found["sha256"]).shape == (0, 32)
    assert indexing.labels_of(found["label"]).shape == (0,)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 1000])
def test_what_is_no_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(FormatError, match=r"x.parquet cannot be read as Parquet \(.*\): make or fetch it again$"):
        table.read(tmp_path / "x.parquet")
    with pytest.raises(FormatError, match=r"x.parquet cannot be read as an Arrow file \(.*\): make or fetch it again$"):
        table.ipc_open(tmp_path / "x.parquet")


def test_a_shard_reads_with_the_readers_of_tars(digits: Path) -> None:
    path = digits / "data" / "val" / "shard-000000.tar"
    found = list(tar.records(tar.map_file(path), path.name))
    read = Dataset.open(path.parent)
    assert [(r.key, r.offset, r.length) for r in found] == list(
        zip(read.ids, read.index["offset"].to_pylist(), read.index["length"].to_pylist(), strict=True)
    )
