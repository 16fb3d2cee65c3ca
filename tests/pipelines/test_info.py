"""pipelines/info.py: what a folder is and where it came from, for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kdprune_pipelines import index, info, select

from kdprune_data.errors import FormatError, UsageError
from kdprune_data.formats.manifest import Manifest


@pytest.fixture(scope="module")
def grandchild(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subset of a subset, without tars."""
    folder = tmp_path_factory.mktemp("subsets")
    select.run(select.SelectConfig(digits / "data" / "train", frac="0.5", out=folder / "half"))
    select.run(select.SelectConfig(folder / "half", frac="0.2", out=folder / "tenth", ids_only=True))
    return folder / "tenth"


def test_the_facts_are_the_manifests(grandchild: Path) -> None:
    facts = info.run(info.InfoConfig(grandchild)).facts
    body = json.loads((grandchild / "manifest.json").read_bytes())
    assert facts["folder"] == str(grandchild)
    for key in ("kind", "name", "digest", "content", "counts", "classes", "config", "files", "side", "outside", "inputs", "made"):
        assert facts[key] == body[key]
    assert facts["bytes"] == sum(p.stat().st_size for p in grandchild.iterdir() if p.name != "manifest.json")
    assert json.loads(json.dumps(facts)) == facts


def test_the_text_tells_what_it_is_and_its_ancestors(digits: Path, grandchild: Path) -> None:
    text = info.run(info.InfoConfig(grandchild)).text
    lines = text.splitlines()
    found, half, whole = (Manifest.load(p) for p in (grandchild, grandchild.parent / "half", digits / "data" / "train"))
    assert lines[0] == f"{grandchild}: subset 'tenth'"
    assert f"  digest    {found.digest}" in lines
    assert f"  content   {found.content}" in lines
    assert "  classes   10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in lines
    assert any("samples 129" in line and "candidates 647" in line and "kept 129" in line for line in lines)
    assert any("read where they lie" in line and "1 shard" in line for line in lines)
    for line in ("frac = 0.2", "ids_only = true", "method = random", "shard_samples = 10,000"):
        assert any(one.endswith(line) for one in lines)
    ancestors = lines[lines.index("  made from") + 1 :]
    assert ancestors == [
        f"    data: subset 'half', 647 samples, digest {half.digest[:12]}, content {half.content[:12]}",
        f"      data: dataset 'train', 1,294 samples, digest {whole.digest[:12]}, content {whole.content[:12]}",
    ]


def test_adopted_shards_are_said_to_lie_elsewhere(digits: Path, tmp_path: Path) -> None:
    shards = tuple(sorted((digits / "data" / "train").glob("*.tar")))
    index.run(index.IndexConfig(shards, out=tmp_path / "train"))
    text = info.run(info.InfoConfig(tmp_path / "train")).text
    megabytes = sum(path.stat().st_size for path in shards) / 1e6
    assert f"  outside   3 shards, {megabytes:.1f} MB, read where they lie ({shards[0].parent})" in text.splitlines()
    assert "made from" not in text


def test_nothing_is_written(digits: Path) -> None:
    folder = digits / "data" / "val"
    before = {p: p.stat().st_mtime_ns for p in (folder, *folder.iterdir())}
    info.run(info.InfoConfig(folder))
    assert {p: p.stat().st_mtime_ns for p in (folder, *folder.iterdir())} == before


def test_what_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"holds no manifest.json: expected a finished dataset or subset or scores or logits or model or export; give another folder",
    ):
        info.run(info.InfoConfig(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(FormatError, match=r"is not a manifest \(KeyError\)"):
        info.run(info.InfoConfig(tmp_path))
