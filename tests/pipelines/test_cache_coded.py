"""`cache --fidelity`: as near as was asked, the same bytes however it was interrupted, refused where it does not hold."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from kdprune_pipelines import _storing

from kdprune_data import order
from kdprune_data.formats import logit_files as files
from kdprune_data.formats import lowrank
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
SUBSET, TEACHER = Path("subsets/random-0.5-s0"), Path("teachers/resnet8-s0")
CODED = ["cache", "--teacher", TEACHER, "--fidelity", "1e-2", "--name", "coded"]


@pytest.fixture(scope="module")
def both(chain: Path, kdprune: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace with five views stored in float32 and coded, to read only."""
    workspace = shutil.copytree(chain, tmp_path_factory.mktemp("coded") / "workspace")
    for line in ([*CODED, "--views", 5], ["cache", "--views", 5, "--dtype", "float32", "--name", "exact"]):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


def whole(workspace: Path, name: str, view: int) -> Any:
    data = Dataset.open(workspace / SUBSET)
    return LogitCache.open(workspace / "logits" / name).join(data).read(np.arange(len(data)), view)


def test_the_folder(both: Path) -> None:
    cache = LogitCache.open(both / "logits/coded")
    assert [f.path for f in cache.manifest.files] == [
        *(files.base_path(n) for n in (0, 1)),
        files.CODEBOOK,
        *(files.rows_path(n) for n in (0, 1)),
        *(files.view_path(0, 4, n) for n in (0, 1)),
    ]
    assert cache.manifest.config["dtype"] == "coded"
    assert cache.temperatures == (1, 4)
    assert LogitCache.open(both / "logits/exact").temperatures is None


def test_boxes_are_the_same_and_logits_as_near_as_the_manifest_says(both: Path, kdprune: Cli) -> None:
    """What is reported is measured on other samples than the code was learned from."""
    data = Dataset.open(both / SUBSET)
    by_hash = np.argsort(order.order_hash(data.uids, 0, "probe"))
    others = np.sort(by_hash[max(8, len(data) // 4) :])
    lost = dict.fromkeys(_storing.TEMPERATURES, 0.0)
    for view in range(5):
        full, coded = whole(both, "exact", view), whole(both, "coded", view)
        for side in (*files.GEOMETRY, "flip"):
            assert np.array_equal(getattr(full, side), getattr(coded, side))
        assert coded.logits.dtype == np.float32
        assert (coded.logits.max(1) == 0).all()
        for tau in lost:
            lost[tau] += lowrank.mean_kl(full.logits[others], coded.logits[others], tau) / 5
    told = json.loads(kdprune("info", "logits/coded", "--json", cwd=both).out)["soft_labels"]
    assert told["kl"] == {f"{tau:g}": pytest.approx(kl, abs=1e-6) for tau, kl in lost.items()}
    assert max(lost.values()) < 2e-2
    size = sum(f.bytes for f in LogitCache.open(both / "logits/coded").manifest.files)
    assert told["bytes_per_view"] == pytest.approx(size / (54 * 5), abs=1e-3)


def test_a_view_is_one_row_of_lists(both: Path) -> None:
    reader = pa.ipc.open_file(both / "logits/coded" / files.view_path(0, 4, 0))
    assert reader.num_record_batches == 5
    batch = reader.get_batch(3)
    assert (len(batch), batch.schema.names) == (1, ["top", "left", "height", "width", "flip", "residual"])
    cache = LogitCache.open(both / "logits/coded")
    n, k = len(cache.rows(0)), cache.codebook.directions
    assert [len(batch.column(name)[0]) for name in batch.schema.names] == [n, n, n, n, n, k * n]
    assert cache.base_of(0).shape == (n, k)


@pytest.mark.parametrize(("temperature", "code"), [(0.5, 1), (1, 0), (2.5, 0), (4, 0), (4.5, 1)])
def test_students_at_temperatures_it_does_not_serve_are_refused(
    chain_copy: Path, both: Path, kdprune: Cli, temperature: float, code: int
) -> None:
    shutil.copytree(both / "logits/coded", chain_copy / "logits/coded")
    line = ["distill", "--logits", "logits/coded", "--model", "resnet8", "--steps", 2, "--name", "x", "--temperature", temperature]
    ran = kdprune(*line, cwd=chain_copy)
    assert ran.code == code, ran.err
    if code:
        assert f"holds at temperatures from 1 to 4, --temperature is {temperature:g}: train at one it holds at, or cache with" in ran.err
        assert not (chain_copy / "students/x").exists()


def test_one_temperature_takes_fewer_bytes(chain_copy: Path, kdprune: Cli) -> None:
    for name, more in (("all", []), ("four", ["--temperature", 4])):
        assert kdprune("cache", "--views", 4, "--fidelity", "1e-3", "--name", name, *more, cwd=chain_copy).code == 0
    all_, four = (LogitCache.open(chain_copy / "logits" / name) for name in ("all", "four"))
    assert four.temperatures == (4, 4)
    assert list(four.kl) == ["4"]
    assert four.codebook.step > all_.codebook.step


def test_more_views_add_files_and_leave_those_that_stand(both: Path, kdprune: Cli, digests: Digests, tmp_path: Path) -> None:
    shutil.copytree(both, tmp_path / "w")
    before = digests(tmp_path / "w/logits/coded")
    ran = kdprune(*CODED, "--views", 7, cwd=tmp_path / "w")
    assert ran.code == 0, ran.err
    after = digests(tmp_path / "w/logits/coded")
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {files.view_path(5, 6, n) for n in (0, 1)}
    assert kdprune("verify", "logits/coded", cwd=tmp_path / "w").code == 0
    exact = ["cache", "--views", 7, "--dtype", "float32", "--name", "exact"]
    assert kdprune(*exact, cwd=tmp_path / "w").code == 0
    full, coded = (whole(tmp_path / "w", name, 6) for name in ("exact", "coded"))
    assert lowrank.mean_kl(full.logits, coded.logits, 1) < 3e-2


@pytest.mark.parametrize(("until", "then"), [("codebook", 4), ("base", 4), ("view", 4), ("rows", 4), ("codebook", 6), ("rows", 6)])
def test_killed_and_continued(chain_copy: Path, kdprune: Cli, started: Cli, digests: Digests, until: str, then: int) -> None:
    """Killed at different moments and continued, or asked for more views: the bytes of a run that was not disturbed."""
    many = "subsets/many"
    assert kdprune("select", "--frac", "0.25", "--shard-samples", "1", "--out", many, cwd=chain_copy).code == 0
    line = ["cache", many, "--fidelity", "1e-2", "--jobs", 1, "--out"]
    folder = chain_copy / "logits/killed"
    running = started(*line, folder, "--views", 4, cwd=chain_copy)
    seen = {
        "codebook": files.CODEBOOK,
        "base": files.base_path(7),
        "view": files.view_path(0, 3, 11),
        "rows": files.rows_path(17),
    }[until]
    while not (folder / seen).exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (folder / "manifest.json").exists()
    for where in (folder, chain_copy / "logits/undisturbed"):
        ran = kdprune(*line, where, "--views", then, cwd=chain_copy)
        assert ran.code == 0, ran.err
    assert digests(folder) == digests(chain_copy / "logits/undisturbed")
    assert kdprune("verify", folder, cwd=chain_copy).code == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--fidelity", "2e-2"], "fidelity is 0.01, now 0.02"),
        (["--temperature", "4"], "temperatures is"),
        (["--views", "identity"], "policy.kind is pad-crop, now identity"),
        (["--views", "all"], "policy.kind is pad-crop, now every-crop"),
    ],
)
def test_another_configuration_is_refused(both: Path, kdprune: Cli, more: list[str], said: str) -> None:
    ran = kdprune(*CODED, "--views", 6, *more, cwd=both)
    assert (ran.code, said in ran.err) == (2, True), ran.err


def test_it_is_coded_or_plain(both: Path, kdprune: Cli) -> None:
    ran = kdprune(*CODED, "--dtype", "float32", cwd=both)
    assert (ran.code, "--fidelity stores them coded: give one of the two" in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("more", [[], ["--fidelity", "1e-2"]])
@pytest.mark.parametrize("subset", [SUBSET, "subsets/many"])
def test_the_size_is_told_before_it_is_made(chain_copy: Path, kdprune: Cli, more: list[str], subset: Path | str) -> None:
    """Few samples in a shard, or one: then most of it is what files take before they hold anything."""
    assert kdprune("select", "--frac", "0.25", "--shard-samples", "1", "--out", "subsets/many", cwd=chain_copy).code == 0
    line = ["cache", subset, "--views", 6, "--name", "sized", "--json", *more]
    told = json.loads(kdprune(*line, "--dry-run", cwd=chain_copy).out)["bytes"]
    made = json.loads(kdprune(*line, cwd=chain_copy).out)["bytes"]
    assert 0.75 * made < told < 1.25 * made


def test_too_few_samples(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("select", "--frac", "0.1", "--out", "subsets/few", cwd=chain_copy).code == 0
    ran = kdprune("cache", "subsets/few", "--fidelity", "1e-2", cwd=chain_copy)
    assert (ran.code, "learns a code from samples, and there are 11: at least 16, or leave it out" in ran.err) == (2, True), ran.err


def test_a_fidelity_out_of_reach(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune("cache", "--fidelity", "1e-7", "--name", "fine", cwd=chain_copy)
    assert (ran.code, "no code keeps KL within" in ran.err) == (1, True)
    assert not (chain_copy / "logits/fine/manifest.json").exists()


def change_codebook(folder: Path) -> None:
    book, facts = files.read_codebook(folder / files.CODEBOOK)
    other = lowrank.Codebook(book.vectors, book.step * 2, book.multiple)
    (folder / files.CODEBOOK).write_bytes(files.codebook_bytes(other, facts))


def swap_bases(folder: Path) -> None:
    one, two = (folder / files.base_path(n) for n in (0, 1))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


@pytest.mark.parametrize(
    ("damage", "sealed", "said"),
    [
        (change_codebook, False, "codebook.arrow was changed: its sha256 is not the manifest's"),
        (change_codebook, True, "is coded by another codebook than the one beside it"),
        (swap_bases, False, "was changed: its sha256 is not the manifest's"),
        (swap_bases, True, "was made for other samples or another codebook than those beside it"),
    ],
)
def test_parts_that_do_not_belong_together(
    both: Path, tmp_path: Path, kdprune: Cli, reseal: Callable[[Path], None], damage: Callable[[Path], None], sealed: bool, said: str
) -> None:
    shutil.copytree(both, tmp_path / "w")
    damage(tmp_path / "w/logits/coded")
    if sealed:
        reseal(tmp_path / "w/logits/coded")
    line = ["distill", "--logits", "logits/coded", "--model", "resnet8", "--steps", 2, "--name", "x"]
    ran = kdprune(*line, cwd=tmp_path / "w")
    assert ran.code == 1
    # Where only sizes tell, the manifest speaks first.
    assert said in ran.err or "the manifest says" in ran.err
    assert not (tmp_path / "w/students/x/manifest.json").exists()
    assert kdprune("verify", "logits/coded", cwd=tmp_path / "w").code == 1


def test_a_cache_of_everything_serves_a_subset(chain_copy: Path, kdprune: Cli) -> None:
    for line in (
        ["cache", "data/train", "--views", 3, "--fidelity", "1e-2", "--name", "every"],
        ["distill", SUBSET, "--logits", "logits/every", "--model", "resnet8", "--epochs", 3, "--batch", 16, "--name", "x"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    data, every = Dataset.open(chain_copy / SUBSET), Dataset.open(chain_copy / "data/train")
    cache = LogitCache.open(chain_copy / "logits/every")
    mine = cache.join(data).read(np.arange(len(data)), 1)
    all_ = cache.join(every).read(np.arange(len(every)), 1)
    at = order.locate(every.uids, data.uids)
    assert np.array_equal(mine.logits, all_.logits[at])
