"""docs/formats.md says what is in the files: a finished workspace is read as the page tells, with none of our code, and all of it agrees.

Digests, contents, orders and views are computed again in plain loops; tables of headers, columns and keys are taken from the page itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
KINDS = {"data": "dataset", "teachers": "model", "scores": "scores", "subsets": "subset", "logits": "logits", "students": "model"}
SPAN = re.compile(r"`([^`]+)`")
MASK = (1 << 64) - 1


def section(name: str) -> str:
    """The text of a chapter of the page."""
    return re.split(r"^## ", PAGE.split(f"\n## {name}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def keys_of(text: str, head: str) -> dict[str, str]:
    """The table under a head: each name in its first column, with the second."""
    rows = text[text.index(head) :].split("\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    cells = [row.strip("|").split(" | ", 1) for row in rows if row.startswith("|")]
    return {name: about.strip() for names, about in cells for name in SPAN.findall(names)}


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def uid(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def order_hash(name: str, seed: int, purpose: str) -> int:
    return mix(mix(mix(uid(purpose)) ^ seed) ^ uid(name))


def unit(h: int) -> float:
    return (h >> 11) / 2**53


def folders(chain: Path) -> Iterator[Path]:
    for place in KINDS:
        yield from sorted(p for p in (chain / place).iterdir() if p.is_dir())


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def only(folder: Path) -> Path:
    (found,) = (p for p in folder.iterdir() if p.is_dir())
    return found


# --- every artefact


def test_manifests(chain: Path) -> None:
    """Their keys, canonical JSON, both sha256, the digest, and every file's bytes and sha256."""
    listed = keys_of(PAGE, "| key | value |")
    described = set(re.findall(r"\w+", SPAN.findall(listed["inputs"])[0]))
    for folder in folders(chain):
        found = manifest(folder)
        assert canonical(found) == (folder / "manifest.json").read_bytes()
        assert found.keys() == listed.keys()
        assert (found["kind"], found["name"], found["format"]) == (KINDS[folder.parent.name], folder.name, 1)
        assert {"{" + ", ".join(found["made"]) + "}"} == {"{host, seconds, time, versions}"}
        assert sha(canonical({k: v for k, v in found.items() if k != "sha256"})) == found["sha256"]
        named = {k: found[k] for k in ("format", "kind", "config", "counts", "classes", "files")}
        named["inputs"] = [[one["role"], one["digest"]] for one in found["inputs"]]
        named["outside"] = [[one["bytes"], one["sha256"]] for one in found["outside"]]
        assert sha(canonical(named)) == found["digest"]
        assert all(one.keys() == described for one in found["inputs"])
        for file in found["files"] + found["side"]:
            data = (folder / file["path"]).read_bytes()
            assert file == {"path": file["path"], "bytes": len(data), "sha256": sha(data)}
        assert found["files"] == sorted(found["files"], key=lambda file: str(file["path"]))
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert there == {"manifest.json"} | {file["path"] for file in found["files"] + found["side"]}
        assert "log.txt" in {file["path"] for file in found["side"]}
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ .", line) for line in (folder / "log.txt").read_text().splitlines())


def test_content(chain: Path) -> None:
    """Of data sets and subsets, from the index; what is made of one carries the same."""
    for folder in folders(chain):
        found = manifest(folder)
        if found["kind"] not in ("dataset", "subset"):
            (data,) = (one for one in found["inputs"] if one["role"] == "data")
            assert found["content"] == data["content"]
            continue
        index = rows(folder / "index.parquet")
        lines = [f"{r['id']}\0{(r['sha256'] or b'').hex()}\0{'' if r['label'] is None else r['label']}\n".encode() for r in index]
        assert sha(b"".join(sorted(lines))) == found["content"]


# --- data sets and subsets


def header(name: bytes, size: int) -> bytes:
    """A tar header, field by field from the page's table."""
    told = PAGE[PAGE.index("| offset | bytes | value |\n|---|---|---|") :].split("\n\n")[0].splitlines()[2:]
    block = bytearray(b"\xff" * 512)
    for row in told:
        places, length, value = (cell.strip() for cell in row.strip("|").split(" | "))
        field = {
            "name, NUL-padded": name,
            "`0000644` NUL": b"0000644\0",
            "uid and gid, `0000000` NUL": b"0000000\0",
            "size, 11 octal digits and NUL": b"%011o\0" % size,
            "mtime, `00000000000` NUL": b"00000000000\0",
            "checksum: 6 octal digits, NUL, space": b" " * 8,
            "`0`": b"0",
            "NUL": b"",
            "`ustar` NUL `00`": b"ustar\x0000",
        }[value]
        for place in places.split(", "):
            block[int(place) : int(place) + int(length.split()[0])] = field.ljust(int(length.split()[0]), b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def members(record: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of a record, each header compared byte by byte."""
    at = 0
    while at < len(record):
        name, size = record[at : at + 100].rstrip(b"\0"), int(record[at + 124 : at + 135], 8)
        assert record[at : at + 512] == header(name, size)
        data = record[at + 512 : at + 512 + size]
        at += 512 + size
        assert set(record[at : at + -size % 512]) <= {0}
        at += -size % 512
        yield name.decode(), data


def test_shards_and_their_index(chain: Path) -> None:
    """Every record where the index says, with nothing between or after; the image's bytes, its digest, its label."""
    for folder in [*sorted((chain / "data").iterdir()), only(chain / "subsets")]:
        tars = {name: (folder / name).read_bytes() for name in sorted(p.name for p in folder.glob("*.tar"))}
        assert list(tars) == [f"shard-{n:06d}.tar" for n in range(len(tars))]
        ends = dict.fromkeys(tars, 0)
        for row in rows(folder / "index.parquet"):
            name = f"shard-{row['shard']:06d}.tar"
            assert row["offset"] == ends[name]
            ends[name] += row["length"]
            (image_name, image), (label_name, label) = members(tars[name][row["offset"] : ends[name]])
            assert (image_name, label_name) == (f"{row['key']}.png", f"{row['key']}.cls")
            assert tars[name][row["image_offset"] : row["image_offset"] + row["image_length"]] == image
            assert (row["sha256"], label, row["uid"], row["ok"]) == (
                hashlib.sha256(image).digest(),
                b"%d" % row["label"],
                uid(row["id"]),
                True,
            )
            assert struct.unpack(">II", image[16:24]) == (row["width"], row["height"])
        assert {name: data[ends[name] :] for name, data in tars.items()} == dict.fromkeys(tars, bytes(1024))
        counted = [row["shard"] for row in rows(folder / "index.parquet")]
        assert json.loads((folder / "sizes.json").read_bytes()) == {name: counted.count(n) for n, name in enumerate(tars)}
        sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
        assert sums == {
            p.name: sha(p.read_bytes()) for p in [*folder.glob("*.tar"), *folder.glob("*.parquet")] if p.name != "ranking.parquet"
        }


def test_settings_of_data_sets(chain: Path) -> None:
    """`config` holds what the page lists; what it leaves out is told to belong to other sources, or not to be always there."""
    listed = keys_of(section("Data set"), "| key | value |\n|---|---|\n| `source`")
    for split in ("train", "val", "test"):
        config = manifest(chain / "data" / split)["config"]
        assert config.keys() <= listed.keys()
        assert {"source", "source_files", "split", "of", "holdout", "on_bad", "seed", "shard_samples", "shard_bytes"} <= config.keys()
    assert manifest(chain / "data/val")["config"] | {"split": "train"} == manifest(chain / "data/train")["config"]


def test_order_of_an_import_and_its_holdout(chain: Path) -> None:
    """The shuffle is ascending in the hash `import`; val holds the floor(RATE N + 1/2) smallest by `holdout`."""
    ids = {split: [row["id"] for row in rows(chain / "data" / split / "index.parquet")] for split in ("train", "val")}
    for names in ids.values():
        assert names == sorted(names, key=lambda name: order_hash(name, 0, "import"))
    everything = sorted(ids["train"] + ids["val"], key=lambda name: order_hash(name, 0, "holdout"))
    assert set(everything[: int(0.1 * len(everything) + 0.5)]) == set(ids["val"])


def test_a_selection(chain: Path) -> None:
    """Which samples are kept, in which order, and the ranking: by quotas in plain loops."""
    folder = only(chain / "subsets")
    listed = keys_of(section("Subset"), "| key of a subset's `config`")
    left_out = {
        "keep",
        "skip_hardest",
        "settings",
        "where",
        "dedup",
        "dedup_eps",
        "dedup_clusters",
        "scores_file",
        "column",
        "hard",
        "keys",
        "normalize",
    }
    assert manifest(folder)["config"].keys() == listed.keys() - left_out
    parent = [(row["id"], row["label"]) for row in rows(chain / "data/train/index.parquet")]
    by_hash = sorted(parent, key=lambda one: order_hash(one[0], 0, "select"))
    quotas = []
    for label in range(10):
        of_class = [name for name, found in by_hash if found == label]
        quotas += [((2 * r + 1) / (2 * len(of_class)), label, order_hash(name, 0, "select"), name) for r, name in enumerate(of_class)]
    keep = int(0.5 * len(parent) + 0.5)
    kept = {name for *_, name in sorted(quotas)[:keep]}
    chosen = rows(folder / "selection.parquet")
    assert [row["id"] for row in chosen] == [name for name, _ in parent if name in kept]
    assert {(row["score"], row["weight"]) for row in chosen} == {(None, 1.0)}
    ranking = {row["id"]: row["rank"] for row in rows(folder / "ranking.parquet")}
    assert sorted(ranking, key=ranking.__getitem__) == [name for *_, name in sorted(quotas)]


# --- models and scores


@pytest.mark.parametrize(("place", "other"), [("teachers", "students only"), ("students", "teachers only")])
def test_models(chain: Path, place: str, other: str) -> None:
    """The keys of `config` and those inside, the lines of metrics.jsonl, the head of the weights."""
    folder = only(chain / place)
    config = manifest(folder)["config"]
    listed = keys_of(section("Model"), "| key of `config`")
    may_lack = {name for name, about in listed.items() if about.endswith("else absent")}
    assert config.keys() | may_lack == {name for name, about in listed.items() if not about.startswith(other)}
    for name in ("architecture", "normalisation", "recipe"):
        assert config[name].keys() == set(SPAN.findall(listed[name])[0].split())
    said = re.search(r"metrics\.jsonl +a JSON object a line: (.+)$", PAGE, re.MULTILINE)
    assert said is not None
    names = re.sub(r"\(.*?\)", "", said[1]).replace(",", " ").split()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines
    assert all(line.keys() == set(names) for line in lines)
    assert manifest(folder)["counts"].keys() == {"samples", "steps", "epochs", "parameters"}
    weights = (folder / "model.safetensors").read_bytes()
    head = json.loads(weights[8 : 8 + struct.unpack("<Q", weights[:8])[0]])
    assert "fc.weight" in head or any(name.endswith(".weight") for name in head)


def test_dynamics_and_scores(chain: Path) -> None:
    """Each sample once in every epoch; a part per shard, each score with its hard end and what it was read from."""
    index = rows(chain / "data/train/index.parquet")
    for path in sorted((only(chain / "teachers") / "dynamics").iterdir()):
        assert [row["uid"] for row in rows(path)] == [row["uid"] for row in index]
    folder = only(chain / "scores")
    config = manifest(folder)["config"]
    assert config.keys() == keys_of(section("Scores"), "| key of the scores' `config`").keys()
    hard = {
        row.split(" | ")[0].strip("| `"): row.split(" | ")[2]
        for row in section("Scores").splitlines()
        if row.startswith("| `") and row.count(" | ") == 3
    }
    for n in range(3):
        schema = pq.read_schema(folder / f"part-{n:06d}.parquet")
        assert schema.names == ["id", "label", *config["columns"]]
        told = {name: schema.field(name).metadata[b"hard"].decode() for name in config["columns"]}
        assert told == {name: hard[name] for name in config["columns"]}
        assert all(schema.field(name).metadata.keys() >= {b"hard", b"source"} for name in config["columns"])
        assert [row["id"] for row in rows(folder / f"part-{n:06d}.parquet")] == [row["id"] for row in index if row["shard"] == n]
        for name in ("embedding", "logits"):
            (batch,) = batches(folder / f"{name}-{n:06d}.arrow")
            assert batch.schema.names == [name]
            assert batch.schema.field(name).type.value_type == pa.float16()


# --- logits


def batches(path: Path) -> list[pa.RecordBatch]:
    file = pa.ipc.open_file(path)
    return [file.get_batch(n) for n in range(file.num_record_batches)]


def box(name: str, view: int, policy: dict[str, Any]) -> tuple[int, int, int, int]:
    """The geometry of `pad-crop`."""
    h0 = order_hash(name, policy["seed"], f"view/{view}")
    h1, pad, size = mix(h0), policy["pad"], policy["size"]
    return int(unit(h0) * (2 * pad + 1)) - pad, int(unit(h1) * (2 * pad + 1)) - pad, size, size


def test_logits(chain: Path) -> None:
    """Rows, geometry, largest logits and metadata of every view file."""
    folder = only(chain / "logits")
    made = manifest(folder)
    told = re.search(r"The manifest's `config` holds ([^;]+); `counts` holds ([^.]+)\.", PAGE)
    assert told is not None
    assert (made["config"].keys(), made["counts"].keys()) == (set(SPAN.findall(told[1])), set(SPAN.findall(told[2])))
    told_of = PAGE[PAGE.index("**Schema metadata** of every view file, all text:") :].split("\n\n")[0]
    keys = set(SPAN.findall(told_of)) - {"1", "id NUL image-sha256 NUL label LF"}
    for path in sorted(folder.glob("views-*/*.arrow")):
        kept = rows(folder / "rows" / f"{path.stem}.parquet")
        metadata = {k.decode(): v.decode() for k, v in pa.ipc.open_file(path).schema.metadata.items()}
        assert metadata.keys() <= keys
        assert metadata.keys() == {"format", "rows", "teacher", "policy", "normalisation", "classes", "views", "top1_correct", "kl"}
        assert metadata["rows"] == sha(b"".join(f"{row['id']}\0{row['sha256'].hex()}\n".encode() for row in kept))
        assert metadata["teacher"] == manifest(only(chain / "teachers"))["digest"]
        assert json.loads(metadata["policy"]) == made["config"]["policy"]
        assert json.loads(metadata["kl"]).keys() == {"1", "2", "4"}
        first, last = json.loads(f"[{metadata['views']}]")
        assert path.parent.name == f"views-{first:04d}-{last:04d}"
        correct = []
        for view, batch in zip(range(first, last + 1), batches(path), strict=True):
            boxes = zip(*(batch[name].to_pylist() for name in ("top", "left", "height", "width")), strict=True)
            assert list(boxes) == [box(row["id"], view, made["config"]["policy"]) for row in kept]
            largest = [max(range(10), key=logits.__getitem__) for logits in batch["logits"].to_pylist()]
            assert {max(logits) for logits in batch["logits"].to_pylist()} == {0}
            correct.append(sum(at == row["label"] for at, row in zip(largest, kept, strict=True)))
        assert json.loads(metadata["top1_correct"]) == correct


def test_the_page_is_read(chain: Path) -> None:
    """The tables above are not empty, and a wrong header is seen."""
    assert len(keys_of(section("Model"), "| key of `config`")) > 8
    assert header(b"a.png", 7) != header(b"a.png", 8)
    data = (chain / "data/train/shard-000000.tar").read_bytes()
    with pytest.raises(AssertionError):
        list(members(data[:100] + b"1" + data[101:512] + data[512:]))


# --- lists


def test_lists(chain: Path, kdprune: Any, tmp_path: Path) -> None:
    """Columns, metadata, the sha256 of the footer, and which rows of a class are kept."""
    table, out = next((chain / "scores").glob("*/part-000000.parquet")), tmp_path / "list.parquet"
    ran = kdprune("pick", table, "--frac", "0.4", "--column", "el2n", "--seed", "7", "--out", out, cwd=tmp_path)
    assert ran.code == 0, ran.err
    told = section("List")
    listed = re.findall(r"^\| `(\w+)` \|", told.split("| column of a list |")[1].split("\n\n")[0], re.MULTILINE)
    assert pq.read_schema(out).names == listed
    facts = json.loads(pq.read_metadata(out).metadata[b"kdprune"])
    assert canonical(facts) == pq.read_metadata(out).metadata[b"kdprune"]
    assert facts.keys() == keys_of(told, "| key | value |").keys()
    data = table.read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    known = rows(table)
    assert facts["inputs"] == [{"name": table.name, "bytes": len(data), "rows": len(known), "footer": sha(footer)}]
    assert {key: facts["config"][key] for key in ("method", "hard", "keep")} == {"method": "el2n", "hard": "high", "keep": "hard"}
    quotas = []
    for label in {row["label"] for row in known}:
        own = sorted((row for row in known if row["label"] == label), key=lambda row: (-row["el2n"], order_hash(row["id"], 7, "select")))
        quotas += [((2 * r + 1) / (2 * len(own)), label, row["id"]) for r, row in enumerate(own)]
    kept = {name for _, _, name in sorted(quotas)[: int(0.4 * len(known) + 0.5)]}
    assert [row["id"] for row in rows(out)] == [row["id"] for row in known if row["id"] in kept]
    assert facts["counts"] == {"candidates": len(known), "kept": len(kept), "classes": 10, "fewest": 1, "most": 2}
