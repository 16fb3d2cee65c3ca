"""A coded cache that somebody wrote wrongly: every file of it in every way, refused in a line that names the file and what to do."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdprune_data.errors import FormatError, KdpruneError
from kdprune_data.formats import check
from kdprune_data.formats import logit_files as files
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.learn.stream import cached_views

Cli = Callable[..., Any]
Change = Callable[[pa.Table, dict[str, str]], tuple[pa.Table, dict[str, str]]]
BASE, VIEWS, FOLDER = files.base_path(0), files.view_path(0, 2, 1), Path("logits/coded")


@pytest.fixture(scope="module")
def coded(chain: Path, kdprune: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace with a coded cache of three views, to read only."""
    workspace = shutil.copytree(chain, tmp_path_factory.mktemp("damaged") / "workspace")
    ran = kdprune("cache", "--fidelity", "1e-2", "--views", 3, "--name", "coded", cwd=workspace)
    assert ran.code == 0, ran.err
    return workspace


def use(folder: Path, workspace: Path) -> None:
    """Do with a cache what a student does."""
    cache, data = LogitCache.open(folder), Dataset.open(workspace / "subsets/random-0.5-s0")
    found = cached_views(data, cache)
    for view in range(found.count):
        found.show(np.arange(len(data)), view)
    assert cache.kl.keys() == {f"{tau:g}" for tau in cache.manifest.config["temperatures"]}


def faults(folder: Path) -> list[str]:
    """What `verify` finds inside."""
    try:
        return [str(one) for one in check.logit_cache(folder, Manifest.load(folder), lambda _: None)]
    except KdpruneError as error:
        return [str(error)]


def rewrite(path: Path, change: Change) -> None:
    """Write an Arrow file anew, a record batch for each row (or of all of them, in a codebook)."""
    with pa.OSFile(str(path)) as source:
        found = pa.ipc.open_file(source).read_all()
    metadata = {k.decode(): v.decode() for k, v in found.schema.metadata.items()}
    made, metadata = change(found.replace_schema_metadata(None), metadata)
    made = made.replace_schema_metadata(metadata)
    rows = len(made) if path.name == files.CODEBOOK else 1
    with pa.ipc.new_file(str(path), made.schema) as writer:
        for batch in made.combine_chunks().to_batches(max_chunksize=rows):
            writer.write_batch(batch)


def column(name: str, of: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Change:
    """Other values, or values of another type."""

    def change(found: pa.Table, metadata: dict[str, str]) -> tuple[pa.Table, dict[str, str]]:
        values = pa.array(of(found[name].to_pylist()), kind or found.schema.field(name).type)
        return found.set_column(found.column_names.index(name), name, values), metadata

    return change


def says(**other: str | None) -> Change:
    """Other metadata; None: none."""
    return lambda found, metadata: (found, {key: value for key, value in (metadata | other).items() if value is not None})


def same(values: list[Any]) -> list[Any]:
    return values


def inner(of: Callable[[list[int]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """The first row's list changed."""
    return lambda values: [of(values[0]), *values[1:]]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (files.CODEBOOK, lambda found, metadata: (found.slice(0, 1), metadata)),
        (files.CODEBOOK, column("vector", lambda v: [one[:7] for one in v], pa.list_(pa.int32(), 7))),
        (files.CODEBOOK, column("vector", same, pa.list_(pa.int32()))),
        (files.CODEBOOK, column("vector", same, pa.list_(pa.int64(), 10))),
        (files.CODEBOOK, column("vector", lambda v: [one[0] for one in v], pa.int32())),
        (files.CODEBOOK, column("vector", lambda v: [[None, *v[0][1:]], *v[1:]])),
        (files.CODEBOOK, lambda found, metadata: (found.rename_columns(["other"]), metadata)),
        *((files.CODEBOOK, says(step=text)) for text in ("nan", "0", "-1", "inf", "1e400", "a", "", None)),
        *((files.CODEBOOK, says(multiple=text)) for text in ("0", "129", "1.5", None)),
        *((files.CODEBOOK, says(temperatures=text)) for text in ("a", None)),
        (files.CODEBOOK, says(format="2")),
        (BASE, column("base", inner(lambda v: v[:-1]))),
        (BASE, column("base", inner(lambda v: v[: len(v) // 2]))),
        (BASE, column("base", inner(lambda v: [None, *v[1:]]))),
        (BASE, column("base", lambda v: [None])),
        (BASE, column("base", same, pa.list_(pa.int32()))),
        (BASE, column("base", lambda v: [1], pa.int16())),
        (BASE, lambda found, metadata: (pa.concat_tables([found, found]), metadata)),
        *((BASE, says(**{key: value})) for key in ("format", "rows", "codebook") for value in ("0", None)),
        (VIEWS, column("residual", inner(lambda v: v[:-1]))),
        (VIEWS, column("residual", inner(lambda v: v + v))),
        (VIEWS, column("residual", inner(lambda v: [None, *v[1:]]))),
        (VIEWS, column("residual", lambda v: [None, *v[1:]])),
        (VIEWS, column("residual", inner(lambda v: [300, *v[1:]]), pa.list_(pa.int16()))),
        (VIEWS, column("residual", lambda v: [1, 2, 3], pa.int8())),
        (VIEWS, column("top", inner(lambda v: v[1:]))),
        (VIEWS, column("top", same, pa.list_(pa.float32()))),
        (VIEWS, column("height", inner(lambda v: [0, *v[1:]]))),
        (VIEWS, column("width", inner(lambda v: [-8, *v[1:]]))),
        (VIEWS, column("flip", inner(lambda v: [None, *v[1:]]))),
        (VIEWS, column("flip", lambda v: [[int(x) for x in one] for one in v], pa.list_(pa.int8()))),
        (VIEWS, lambda found, metadata: (found.drop_columns(["flip"]), metadata)),
        (VIEWS, lambda found, metadata: (found.slice(0, 2), metadata)),
        (VIEWS, lambda found, metadata: (pa.concat_tables([found, found]), metadata)),
        *(
            (VIEWS, says(**{key: value}))
            for key in ("format", "rows", "teacher", "policy", "normalisation", "codebook", "views", "top1_correct", "kl", "measured")
            for value in ("0", "a", None)
            if (key, value) != ("measured", "0")
        ),
        (VIEWS, says(top1_correct="[1]")),
        (VIEWS, says(kl='{"1":0.1}')),
        (VIEWS, says(kl="[1,2,4]")),
        (VIEWS, says(classes="0")),
    ],
)
def test_files(coded: Path, tmp_path: Path, reseal: Callable[[Path], None], path: str, change: Change) -> None:
    folder = shutil.copytree(coded / FOLDER, tmp_path / "coded")
    rewrite(folder / path, change)
    reseal(folder)
    with pytest.raises(FormatError) as caught:
        use(folder, coded)
    said = str(caught.value)
    # What stands beside another codebook is coded by another, and is named.
    assert any(str(folder / one) in said for one in {path, *((BASE, files.view_path(0, 2, 0)) if path == files.CODEBOOK else ())}), said
    assert ("again" in said, "\n" in said) == (True, False)
    assert faults(folder)


def config(**other: Any) -> Callable[[Manifest], Manifest]:
    return lambda made: replace(made, config={k: v for k, v in (dict(made.config) | other).items() if v is not None})


@pytest.mark.parametrize(
    "change",
    [
        config(temperatures=None),
        config(temperatures=[]),
        config(temperatures="a"),
        config(fidelity=None),
        config(dtype="float16"),
        config(dtype="int4"),
        config(dtype=None),
        config(policy=None),
        config(policy={}),
        lambda made: replace(made, files=[one for one in made.files if one.path != files.CODEBOOK]),
        lambda made: replace(made, files=[one for one in made.files if not one.path.startswith("base/")]),
        lambda made: replace(made, files=[one for one in made.files if not one.path.startswith("rows/")]),
        lambda made: replace(made, files=[one for one in made.files if not one.path.startswith("views-")]),
        lambda made: replace(made, files=[replace(made.files[-1], path=made.files[-1].path.replace("views-0000", "views-000a"))]),
        lambda made: replace(made, counts=dict(made.counts) | {"views": 0}),
        lambda made: replace(made, counts=dict(made.counts) | {"views": "3"}),
        lambda made: replace(made, counts={}),
        lambda made: replace(made, classes=made.classes[:-1]),
        lambda made: replace(made, inputs=made.inputs[:1]),
    ],
)
def test_manifests(coded: Path, tmp_path: Path, kdprune: Cli, change: Callable[[Manifest], Manifest]) -> None:
    """Whatever it says, nothing falls over it."""
    folder = shutil.copytree(coded / FOLDER, tmp_path / "coded")
    made = change(Manifest.load(folder))
    for file in made.files:
        if not (folder / file.path).exists():
            (folder / file.path).parent.mkdir()
            shutil.copyfile(folder / VIEWS, folder / file.path)
    (folder / "manifest.json").write_bytes(made.to_json())
    with pytest.raises(KdpruneError, match=r"again|use data with the same classes|use the version that made it"):
        use(folder, coded)
    assert faults(folder)
    assert "unexpected" not in kdprune("info", folder, cwd=coded).err


def test_bytes_that_lead_out_of_the_file(coded: Path, tmp_path: Path, reseal: Callable[[Path], None]) -> None:
    """Offsets into nowhere: arrow itself would follow them, and end the process."""
    folder = shutil.copytree(coded / FOLDER, tmp_path / "coded")
    path = folder / VIEWS
    random, whole = np.random.default_rng(0), path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        at = int(random.integers(0, len(whole)))
        damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
        path.write_bytes(bytes(damaged))
        reseal(folder)
        with contextlib.suppress(FormatError):
            use(folder, coded)
