"""`score --also --set --epoch --proxies`: every column against a direct computation; what is refused; proxies continued and used again."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kdprune_pipelines import _costs, _models, _scoring

from kdprune_data.errors import SourceError
from kdprune_data.formats import dynamics, table
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.manifest import File, Manifest, sha256_file
from kdprune_data.formats.scores import SCORES, Scores, read_vectors
from kdprune_data.learn import models, views
from kdprune_data.learn.stream import Images
from kdprune_data.scores import FROM_DYNAMICS, FROM_EMBEDDING, FROM_OUTPUTS, Embedded, History, Outputs

Cli = Callable[..., Any]
Digests = Callable[[Path], dict[str, str]]
Refuses = Callable[..., None]
TEACHER, SCORED = Path("teachers/whole"), Path("scores/whole")
LINE = ("score", "--teacher", TEACHER)
EMBEDDED = [name for name, score in SCORES.items() if score.source == "embedding"]
SAID = [name for name, score in SCORES.items() if score.source in ("early", "final") and name != "grand_full"]


@pytest.fixture(scope="module")
def whole(chain: Path, tmp_path_factory: pytest.TempPathFactory, kdprune: Cli) -> Path:
    """A workspace with a teacher that recorded its logits, and all scores; to read only."""
    workspace = tmp_path_factory.mktemp("whole")
    shutil.copytree(chain / "data", workspace / "data")
    shutil.copytree(chain / "subsets", workspace / "subsets")
    kept = ["--keep-epochs", 1, "--keep-epochs", 2]
    for line in (
        ["teacher", "--model", "resnet8", "--epochs", 3, "--batch", 16, "--record", "logits", *kept, "--name", "whole"],
        ["score", "--also", "all", "--logits"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` to write in."""
    return shutil.copytree(whole, tmp_path / "workspace")


@pytest.fixture
def bare(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` without scores."""
    return shutil.copytree(whole, tmp_path / "workspace", ignore=shutil.ignore_patterns("scores"))


@pytest.fixture
def refuses(kdprune: Cli) -> Refuses:
    """Run a command line that must be refused in one line, and leave the workspace as it was."""

    def run(workspace: Path, line: Sequence[object], code: int, said: str) -> None:
        before = {path: path.lstat().st_mtime_ns for path in workspace.rglob("*")}
        ran = kdprune(*line, cwd=workspace)
        errors = [one for one in ran.err.splitlines() if one.startswith("error: ")]
        assert (ran.code, ran.out, len(errors)) == (code, "", 1), ran
        assert re.search(said, errors[0]), errors[0]
        assert {path: path.lstat().st_mtime_ns for path in workspace.rglob("*")} == before

    return run


def column(folder: Path, name: str) -> np.ndarray:
    return np.concatenate([pq.read_table(path)[name].to_numpy() for path in sorted(folder.glob("part-*.parquet"))])


def sources(folder: Path) -> dict[str, str]:
    schema = pq.read_schema(folder / "part-000000.parquet")
    return {name: schema.field(name).metadata[b"source"].decode() for name in schema.names[2:]}


def seen(workspace: Path, folder: Path, epoch: int | None = None) -> tuple[Outputs, Any, torch.Tensor]:
    """What a model of these data says of all images at once; itself; and the images as it takes them."""
    data = Dataset.open(workspace / "data/train")
    saved = _models.open_model(workspace / folder)
    net = saved.load(code=None, epoch=epoch).eval()
    images = saved.normalisation.apply(views.evaluation(Images(data).get(np.arange(len(data))), 8))
    with torch.no_grad():
        embedding, logits = models.features(net, images)
    return Outputs(logits, torch.from_numpy(data.labels.astype(np.int64)), embedding), net, images


def gradient_norms(net: Any, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The norm of the gradient of each sample's loss in all parameters, one sample after the other."""
    found = []
    for image, label in zip(images, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(net(image[None]), label[None])
        found.append(float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).double().norm()))
    return found


# --- all scores


def test_every_score_is_there_and_says_what_it_is_made_from(whole: Path) -> None:
    made = Scores.open(whole / SCORED)
    assert made.columns == list(SCORES)
    told = {"early": "epoch-001.safetensors", "final": "model.safetensors", "dynamics": "dynamics of 3 epochs"}
    told["embedding"] = "model.safetensors (embedding)"
    assert sources(whole / SCORED) == {name: told[score.source] for name, score in SCORES.items()}
    config = made.manifest.config
    assert (config["embedding"], config["seed"], config["epoch"], config["proxies"]) == (True, 0, None, None)
    table = {**FROM_DYNAMICS, **FROM_EMBEDDING}
    assert config["settings"] == {name: own for name in table if (own := table[name].settings().own())}


@pytest.mark.parametrize("name", FROM_DYNAMICS)
def test_scores_of_dynamics(whole: Path, name: str) -> None:
    read = [dynamics.read(whole / TEACHER, n, ["correct", "logit_margin", "p_true"]) for n in (1, 2, 3)]
    columns = [np.stack([one[what] for one in read]) for what in ("correct", "logit_margin", "p_true")]
    past = History(*columns, lambda e: dynamics.read_logits(whole / TEACHER, e + 1))
    expected = FROM_DYNAMICS[name].compute(past, FROM_DYNAMICS[name].settings())
    assert column(whole / SCORED, name) == pytest.approx(expected, rel=1e-6)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("name", FROM_EMBEDDING)
def test_scores_of_the_embedding_are_of_what_is_stored(whole: Path, name: str) -> None:
    uids, vectors = Scores.open(whole / SCORED).vectors("embedding")
    data = Dataset.open(whole / "data/train")
    assert vectors == pytest.approx(seen(whole, TEACHER)[0].embedding.numpy().astype(np.float16), rel=2e-3, abs=2e-3)
    expected = FROM_EMBEDDING[name].compute(Embedded(uids, data.labels, vectors, 0, 10**9), FROM_EMBEDDING[name].settings())
    assert (column(whole / SCORED, name) == expected.astype(np.float32)).all()
    assert len(np.unique(expected)) > 10


def test_gradients_of_the_whole_network(whole: Path) -> None:
    out, net, images = seen(whole, TEACHER, epoch=1)
    assert column(whole / SCORED, "grand_full")[:20] == pytest.approx(gradient_norms(net, images[:20], out.labels[:20]), rel=1e-4)


def test_one_shard_at_a_time_or_all_at_once_is_the_same(copy: Path, kdprune: Cli) -> None:
    """What needs the whole data set changes nothing of the rest; and what is asked for alone is as with all."""
    assert kdprune(*LINE, "--also", "density", "--also", "prototype", "--name", "two", cwd=copy).code == 0
    two = copy / "scores/two"
    assert Scores.open(two).columns == [name for name in SCORES if name not in ("grand_full", "class_distance")]
    assert [Manifest.load(folder).config["memory"] for folder in (two, copy / SCORED)] == [None, 10**9]  # which grand_full alone follows
    for name in Scores.open(two).columns:
        assert (column(two, name) == column(copy / SCORED, name)).all()
    assert not list(two.glob("**/*.npy"))


@pytest.mark.parametrize("option", [["--batch", "7"], ["--jobs", "3"], ["--memory", "1000000"]])
def test_batch_jobs_and_memory_change_nothing(copy: Path, kdprune: Cli, option: list[str]) -> None:
    assert kdprune(*LINE, "--also", "all", "--name", "again", *option, cwd=copy).code == 0
    for name, score in SCORES.items():
        there, again = column(copy / SCORED, name), column(copy / "scores/again", name)
        if score.source == "dynamics":
            assert (again == there).all(), name
        elif score.source == "embedding":  # of float16 numbers, of which some round otherwise in other batches
            assert again == pytest.approx(there, rel=1e-3, abs=1e-4), name
        else:
            assert again == pytest.approx(there, rel=1e-5, abs=1e-5), name


def test_without_recorded_logits_a_line_says_how_to_get_them(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune("score", "--name", "plain", cwd=chain_copy)
    assert "tdds needs whole logits: make the teacher with --record logits" in ran.err
    assert Scores.open(chain_copy / "scores/plain").columns == [n for n, s in SCORES.items() if not s.asked and n != "tdds"]


# --- settings


@pytest.mark.parametrize("where", ["line", "file"])
def test_settings_of_scores(copy: Path, kdprune: Cli, where: str) -> None:
    given = ["forgetting.never=zero", "p_true.epochs=1", "density.neighbours=3"]
    more = [word for one in given for word in ("--set", one)] if where == "line" else []
    if where == "file":
        (copy / "kdprune.toml").write_text(f'[score]\nalso = ["density"]\nset = {json.dumps(given)}\n')
    ran = kdprune(*LINE, "--name", "set", *(["--also", "density"] if where == "line" else []), *more, cwd=copy)
    assert ran.code == 0, ran.err
    folder = copy / "scores/set"
    settings = Manifest.load(folder).config["settings"]
    assert (settings["forgetting"], settings["p_true"]["epochs"], settings["density"]["neighbours"]) == ({"never": "zero"}, 1, 3)
    first = dynamics.read(copy / TEACHER, 1, ["p_true"])["p_true"]
    assert column(folder, "p_true") == pytest.approx(first, rel=1e-6)
    never = column(copy / SCORED, "correct") == 0
    assert never.any()
    assert (column(folder, "forgetting")[never] == 0).all()
    assert (column(copy / SCORED, "forgetting")[never] == 3).all()
    assert not np.allclose(column(folder, "density"), column(copy / SCORED, "density"))


REFUSED = [
    (["--set", "forgetting=zero"], "names no score: give SCORE.NAME=VALUE"),
    (["--set", "forgetting.never"], "is no setting"),
    (["--set", "forgeting.never=zero"], "unknown score in --set 'forgeting'; did you mean 'forgetting'"),
    (["--set", "forgetting.nevr=zero"], "unknown setting of forgetting 'nevr'; did you mean 'never'"),
    (["--set", "forgetting.never=zro"], "unknown forgetting.never 'zro'; did you mean 'zero'"),
    (["--set", "tdds.window=wide"], "--set tdds.window=wide: expected a whole number"),
    (["--set", "tdds.window=1"], "--set tdds.window 1 is too small: at least"),
    (["--set", "el2n.x=1"], "el2n has no settings: leave out --set el2n.x"),
    (["--set", "density.neighbours=5"], "--set density.neighbours is for a score that is not computed: add --also density"),
    (["--set", "p_true.epochs=1", "--set", "p_true.epochs=2"], "--set p_true.epochs was given twice"),
    (["--also", "densty"], "'densty' is not one of"),
    (["--epoch", "4"], "teachers/whole keeps the weights after epochs 1, 2, 3; choose one of these.*teacher .*--keep-epochs 4"),
    (["--epoch", "0"], "--epoch 0 is too small"),
    (["--epochs", "2"], "--epochs 2 says how long to train --proxies: give both"),
    (["--proxies", "2"], "--proxies 2 says how many networks to train, and --epochs for how long: give both"),
    (["--proxies", "2", "--epochs", "1", "--epoch", "1"], "--epoch 1 chooses weights of the teacher and --proxies"),
    (["--memory", "10"], "--memory 10 is too small"),
    (["--epoch", "1", "--name", "whole"], "was made with other settings .*early_epoch|epoch is null, now 1"),
    (["--also", "all", "--logits", "--seed", "3"], "seed is 0, now 3"),
    (["--also", "all", "--logits", "--memory", "2000000"], "memory is 1000000000, now 2000000"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED, ids=[" ".join(line) for line, _ in REFUSED])
def test_refused(whole: Path, refuses: Refuses, line: list[str], said: str) -> None:
    refuses(whole, [*LINE, *line], 2, said)


def test_settings_of_scores_that_cannot_be_made(chain: Path, refuses: Refuses) -> None:
    refuses(chain, ["score", "--name", "x", "--set", "tdds.window=3"], 2, "--set tdds.window .* make the teacher with --record logits")
    line = ["score", "--data", "data/test", "--name", "x", "--set", "dual.window=3"]
    refuses(chain, line, 2, "--set dual.window .* the teacher was trained on other data")


# --- the checkpoint


def test_epoch(copy: Path, kdprune: Cli) -> None:
    ran = kdprune(*LINE, "--epoch", 2, "--also", "all", "--logits", cwd=copy)
    assert ran.code == 0, ran.err
    folder = copy / "scores/whole-e2"
    out, net, images = seen(copy, TEACHER, epoch=2)
    for name in FROM_OUTPUTS:
        assert column(folder, name) == pytest.approx(FROM_OUTPUTS[name](out).numpy(), abs=1e-5, rel=1e-5)
        assert not np.allclose(column(folder, name), column(copy / SCORED, name), atol=1e-2)
    assert column(folder, "grand_full")[:9] == pytest.approx(gradient_norms(net, images[:9], out.labels[:9]), rel=1e-4)
    for name in FROM_DYNAMICS:
        assert (column(folder, name) == column(copy / SCORED, name)).all()
    for what in ("embedding", "logits"):
        assert Scores.open(folder).vectors(what)[1] == pytest.approx(getattr(out, what).numpy(), rel=2e-3, abs=2e-3)
    told = sources(folder)
    assert {told[name] for name in [*SAID, "grand_full"]} == {"epoch-002.safetensors"}
    assert {told[name] for name in EMBEDDED} == {"epoch-002.safetensors (embedding)"}
    config = Manifest.load(folder).config
    assert (config["epoch"], config["early_epoch"]) == (2, 2)
    assert kdprune("verify", folder, cwd=copy).code == 0


# --- proxies


def test_proxies(bare: Path, kdprune: Cli, digests: Digests) -> None:
    """The mean of what they say; independent of the teacher and of one another; used again, and more of them added."""
    line = [*LINE, "--proxies", 2, "--epochs", 1, "--also", "grand_full", "--embedding"]
    ran = kdprune(*line, cwd=bare)
    assert ran.code == 0, ran.err
    folder = bare / "scores/whole-p2-e1"
    places = [Path(f"proxies/whole-e1-p{n}") for n in range(2)]
    each = [seen(bare, place) for place in places]
    for name in FROM_OUTPUTS:
        expected = np.mean([FROM_OUTPUTS[name](out).numpy() for out, _, _ in each], axis=0)
        assert column(folder, name) == pytest.approx(expected, abs=1e-5, rel=1e-5)
    gradients = np.mean([gradient_norms(net, images[:9], out.labels[:9]) for out, net, images in each], axis=0)
    assert column(folder, "grand_full")[:9] == pytest.approx(gradients, rel=1e-4)
    assert column(folder, "aum").std() > 0
    assert Scores.open(folder).vectors("embedding")[1] == pytest.approx(seen(bare, TEACHER)[0].embedding.numpy(), rel=2e-3, abs=2e-3)
    told = sources(folder)
    assert {told[name] for name in [*SAID, "grand_full"]} == {"mean of 2 proxies after 1 epoch"}
    assert told["aum"] == "dynamics of 3 epochs"
    manifest = Manifest.load(folder)
    assert [one["role"] for one in manifest.inputs] == ["data", "teacher", "proxy", "proxy"]
    assert [one["name"] for one in manifest.inputs[2:]] == [place.name for place in places]
    assert manifest.config["proxies"] == {"count": 2, "epochs": 1}

    made = {place: digests(bare / place) for place in places}
    again = kdprune(*line, "--overwrite", cwd=bare)
    assert (again.code, "training" in again.err) == (0, False)
    before = digests(folder)
    more = kdprune(*LINE, "--proxies", 3, "--epochs", 1, cwd=bare)
    assert (more.code, more.err.count("training resnet8")) == (0, 1)
    assert {place: digests(bare / place) for place in places} == made
    shutil.rmtree(bare / places[0])
    assert "already done" in kdprune(*line, cwd=bare).err  # what is finished needs none of them
    assert not (bare / places[0]).exists()
    assert kdprune(*line, "--overwrite", cwd=bare).code == 0
    assert digests(bare / places[0]) == made[places[0]]
    assert digests(folder) == before
    for place in (folder, *places):
        assert kdprune("verify", place, cwd=bare).code == 0
        assert "proxy" in kdprune("info", place, cwd=bare).out


def test_proxies_are_independent(bare: Path, kdprune: Cli) -> None:
    """Neither seeds nor views nor first weights are shared; all else of the recipe is the teacher's, but that the rate does not fall."""
    assert kdprune(*LINE, "--proxies", 2, "--epochs", 1, cwd=bare).code == 0
    configs = [Manifest.load(bare / place).config for place in (TEACHER, "proxies/whole-e1-p0", "proxies/whole-e1-p1")]
    for of in (lambda c: c["recipe"]["seed"], lambda c: c["policy"]["seed"]):
        assert len({of(config) for config in configs}) == 3
    teacher = configs[0]
    for config in configs[1:]:
        assert config["role"] == "proxy"
        assert config["recipe"] == teacher["recipe"] | {"epochs": 1, "schedule": "constant", "seed": config["recipe"]["seed"]}
        assert config["policy"] == teacher["policy"] | {"seed": config["policy"]["seed"]}
        assert (config["architecture"], config["normalisation"]) == (teacher["architecture"], teacher["normalisation"])


def test_proxies_for_other_data_have_names_of_their_own(bare: Path, kdprune: Cli) -> None:
    """They are trained on what is scored."""
    line = [*LINE, "--proxies", 1, "--epochs", 1]
    assert kdprune(*line, cwd=bare).code == 0
    assert kdprune(*line, "--data", "subsets/random-0.5-s0", "--name", "half", cwd=bare).code == 0
    assert sorted(p.name for p in (bare / "proxies").iterdir()) == ["random-0.5-s0--whole-e1-p0", "whole-e1-p0"]
    assert Manifest.load(bare / "proxies/random-0.5-s0--whole-e1-p0").counts["samples"] == 54


def test_the_dry_run_of_all_that_takes_long(bare: Path, kdprune: Cli) -> None:
    before = sorted(bare.rglob("*"))
    ran = kdprune(*LINE, "--proxies", 2, "--epochs", 1, "--also", "all", "--dry-run", "--json", cwd=bare)
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["state"], facts["counts"]) == ("new", {"sample": 108, "shard": 3, "untrained network": 2})
    weights = (bare / TEACHER / "model.safetensors").stat().st_size
    assert 2 * 0.9 * weights < facts["bytes"] < 2 * weights + 108 * 1000
    assert sorted(bare.rglob("*")) == before


def test_an_adopted_teacher_has_no_proxies(bare: Path, kdprune: Cli, refuses: Refuses) -> None:
    line = ["teacher", "--model", "resnet8", "--weights", TEACHER / "model.safetensors", "--epochs", 0, "--name", "adopted"]
    assert kdprune(*line, cwd=bare).code == 0
    said = "adopted was adopted: nothing is known of its training; leave out --proxies, or train a teacher with"
    refuses(bare, ["score", "--teacher", "teachers/adopted", "--proxies", 1, "--epochs", 1], 2, said)
    refuses(bare, ["score", "--teacher", "teachers/adopted", "--epoch", 1], 2, "adopted keeps no epoch's weights; make a teacher with")


def test_what_stands_in_the_place_of_a_proxy_is_refused(bare: Path, kdprune: Cli, refuses: Refuses) -> None:
    assert kdprune("teacher", "--model", "resnet8", "--epochs", 1, "--out", "proxies/whole-e1-p0", cwd=bare).code == 0
    said = r"proxies/whole-e1-p0 was made with other settings \(.*\): move .* away, or delete it"
    refuses(bare, [*LINE, "--proxies", 1, "--epochs", 1], 2, said)


def test_scores_that_stand_there_are_refused_before_any_training(copy: Path, kdprune: Cli) -> None:
    ran = kdprune(*LINE, "--proxies", 1, "--epochs", 1, "--name", "whole", cwd=copy)
    assert (ran.code, "was made with other settings" in ran.err) == (2, True)
    assert not (copy / "proxies").exists()


@pytest.mark.parametrize(
    "when", ["proxies/whole-e1-p0/.partial/identity.json", "proxies/whole-e1-p0/manifest.json", "scores/x/part-000000.parquet"]
)
def test_killed_with_proxies(bare: Path, started: Cli, kdprune: Cli, digests: Digests, when: str) -> None:
    """Inside the first, between the two, after both: the same bytes in the end, and what was finished is not trained again."""
    line = [*LINE, "--proxies", 2, "--epochs", 1, "--also", "density", "--out"]
    running = started(*line, "scores/x", cwd=bare)
    while not (bare / when).exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    done = [p for p in (bare / "proxies").iterdir() if (p / "manifest.json").exists()]
    times = [(p / "model.safetensors").stat().st_mtime_ns for p in done]
    for out in ("scores/x", "scores/y"):
        ran = kdprune(*line, out, cwd=bare)
        assert ran.code == 0, ran.err
    assert [(p / "model.safetensors").stat().st_mtime_ns for p in done] == times
    assert digests(bare / "scores/x") == digests(bare / "scores/y")
    assert Manifest.load(bare / "scores/x").digest == Manifest.load(bare / "scores/y").digest


def test_a_recipe_with_proxies(bare: Path, kdprune: Cli) -> None:
    recipe = '[score]\nteacher = "teachers/whole"\nproxies = 1\nepochs = 1\n\n[select]\nfrac = 0.5\nmethod = "el2n"\n'
    (bare / "study.toml").write_text(recipe)
    ran = kdprune("run", "study.toml", cwd=bare)
    assert ran.code == 0, ran.err
    chosen = Manifest.load(bare / "subsets/el2n-0.5-s0")
    assert next(one for one in chosen.inputs if one["role"] == "scores")["name"] == "whole-p1-e1"


# --- looked at again


OUTSIDE = {
    "el2n": (1.5, "0 to 1.414"),
    "margin": (1.1, "0 to 1"),
    "confidence": (1.1, "0 to 1"),
    "correct": (1.1, "0 to 1"),
    "p_true": (1.1, "0 to 1"),
    "density": (-1.1, "-1 to 1"),
}
"""A value that is out of a score's range, and the range; of those not listed -0.1, as they are at least 0."""


def resealed(folder: Path) -> None:
    """Make the manifest fit files that were changed."""
    manifest = Manifest.read(folder)
    files = [File(f.path, (folder / f.path).stat().st_size, sha256_file(folder / f.path)) for f in manifest.files]
    (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())


@pytest.mark.parametrize("name", [name for name in SCORES if name != "aum"])
def test_verify_knows_the_range_of_a_score(whole: Path, tmp_path: Path, kdprune: Cli, name: str) -> None:
    folder = shutil.copytree(whole / SCORED, tmp_path / "scores")
    path = folder / "part-000001.parquet"
    rows = pq.read_table(path)
    at = rows.schema.names.index(name)
    values = rows[name].to_numpy().copy()
    wrong, limits = OUTSIDE.get(name, (-0.1, "0 to inf"))
    values[3] = wrong
    pq.write_table(rows.set_column(at, rows.schema.field(at), [values]), path)
    resealed(folder)
    ran = kdprune("verify", folder, cwd=tmp_path)
    assert ran.code == 1
    assert f"{name} of {rows['id'][3].as_py()!r} is {wrong:.4g}: it is from {limits}" in ran.out


def test_aum_may_be_anything(whole: Path, tmp_path: Path, kdprune: Cli) -> None:
    folder = shutil.copytree(whole / SCORED, tmp_path / "scores")
    path = folder / "part-000001.parquet"
    rows = pq.read_table(path)
    at = rows.schema.names.index("aum")
    pq.write_table(rows.set_column(at, rows.schema.field(at), [np.linspace(-9e9, 9e9, len(rows), dtype=np.float32)]), path)
    resealed(folder)
    assert kdprune("verify", folder, cwd=tmp_path).code == 0


@pytest.mark.parametrize("what", ["embedding", "logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_sees_vectors_that_are_not_finite(whole: Path, tmp_path: Path, kdprune: Cli, what: str, value: float) -> None:
    folder = shutil.copytree(whole / SCORED, tmp_path / "scores")
    path = folder / f"{what}-000002.arrow"
    vectors = read_vectors(path, what).copy()
    vectors[5, 1] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    batch = pa.record_batch([column], names=[what])
    with path.open("wb") as file:
        table.ipc_write(file, [batch], batch.schema)
    resealed(folder)
    ran = kdprune("verify", folder, cwd=tmp_path)
    assert (ran.code, f"{what}-000002.arrow: holds a number that is not finite" in ran.out) == (1, True), ran


# --- who scored what


@pytest.mark.parametrize("half", [True, False])
def test_whole_logits_are_joined_by_id(copy: Path, kdprune: Cli, half: bool) -> None:
    """Of a subset, whose rows stand elsewhere, by a teacher that recorded the logits of all."""
    data = "subsets/random-0.5-s0" if half else "data/train"
    assert kdprune(*LINE, "--data", data, "--name", "joined", cwd=copy).code == 0
    ids = [list(part) for part in (Dataset.open(copy / "data/train").ids, Dataset.open(copy / data).ids)]
    rows = [ids[0].index(one) for one in ids[1]]
    assert (rows != list(range(len(rows)))) == half
    for name in FROM_DYNAMICS:
        assert (column(copy / "scores/joined", name) == column(copy / SCORED, name)[rows]).all(), name


def test_all_scores_with_a_sample_that_does_not_decode(tmp_path: Path, kdprune: Cli, class_folders: Path) -> None:
    """Every column is of the samples that do, in their order, in the shard of a broken one too."""
    broken = sorted(class_folders.rglob("*.jpg"))[4]
    broken.write_bytes(broken.read_bytes()[:100])
    for line in (
        ["import", class_folders, "--on-bad", "keep", "--shard-samples", 10],
        ["teacher", "--model", "resnet8", "--epochs", 3, "--batch", 9, "--record", "logits"],
        ["score", "--also", "all", "--logits"],
        ["verify", "scores/resnet8-s0"],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    data, made = Dataset.open(tmp_path / "data/train"), Scores.open(tmp_path / "scores/resnet8-s0")
    assert (len(data) - data.ok.sum(), made.columns) == (1, list(SCORES))
    uids = data.uids[data.usable()]
    vectors = made.vectors("embedding")
    assert (vectors[0] == uids).all()
    embedded = Embedded(uids, data.labels[data.usable()], vectors[1], 0, 10**9)
    past = dynamics.read(tmp_path / "teachers/resnet8-s0", 1, ["uid"])["uid"]
    assert (past == uids).all()
    for name in SCORES:
        of, values = made.read(name)
        assert (of == uids).all()
        if name in FROM_EMBEDDING:
            assert (values == FROM_EMBEDDING[name].compute(embedded, FROM_EMBEDDING[name].settings()).astype(np.float32)).all(), name
    p_true = np.stack([dynamics.read(tmp_path / "teachers/resnet8-s0", n, ["p_true"])["p_true"] for n in (1, 2, 3)])
    assert made.read("p_true")[1] == pytest.approx(p_true.mean(0), rel=1e-6)


def test_the_seed_is_of_the_clusterings(copy: Path, kdprune: Cli) -> None:
    """Of nothing else; and it is the one that the score's definition takes."""
    line = [*LINE, "--also", "prototype", "--also", "density", "--set", "prototype.clusters=7", "--set", "density.clusters=4"]
    for seed in (0, 3):
        assert kdprune(*line, "--seed", seed, "--name", f"s{seed}", cwd=copy).code == 0
    first, second = copy / "scores/s0", copy / "scores/s3"
    uids, vectors = Scores.open(second).vectors("embedding")
    labels = Dataset.open(copy / "data/train").labels
    for name in Scores.open(first).columns:
        assert (column(first, name) == column(second, name)).all() == (name not in ("prototype", "density")), name
    for name, clusters in (("prototype", 7), ("density", 4)):
        score = FROM_EMBEDDING[name]
        expected = score.compute(Embedded(uids, labels, vectors, 3, 10**9), score.settings(clusters=clusters))
        assert (column(second, name) == expected.astype(np.float32)).all()


def test_the_cost_of_what_compares_samples_is_said_first(copy: Path, kdprune: Cli) -> None:
    ran = kdprune(*LINE, "--also", "density", "--also", "prototype", "--also", "class_distance", "--name", "cost", cwd=copy)
    for name in ("density", "prototype", "class_distance"):
        assert re.search(rf"{name}: 108 embeddings of 64 numbers, .* multiplications, up to .*B, about ", ran.err), ran.err
    assert "density.clusters" not in ran.err


@pytest.mark.parametrize(("n", "clusters", "named"), [(500_000, None, True), (500_000, 100, False), (50_000, None, False)])
def test_the_approximation_is_named_where_it_matters(n: int, clusters: int | None, named: bool) -> None:
    embedded = Embedded(np.arange(1), np.zeros(2, np.int32), np.broadcast_to(np.float16(0), (n, 64)), 0, 10**9)
    said = _costs.told("density", embedded, FROM_EMBEDDING["density"].settings(clusters=clusters), 10**9)
    assert ("--set density.clusters=K" in said) == named, said


ADOPTED = ["teacher", "--model", "resnet8", "--weights", TEACHER / "model.safetensors", "--epochs", 0, "--name", "adopted"]
LEARNED = "learned from these samples: for scores independent of it, score with"


def test_who_scores_is_told(bare: Path, kdprune: Cli) -> None:
    subset = "subsets/random-0.5-s0"
    assert kdprune(*ADOPTED, cwd=bare).code == 0
    assert kdprune("teacher", "--model", "resnet8", "--steps", 3, "--data", subset, "--name", "half", cwd=bare).code == 0
    for n, (teacher, data, said) in enumerate(
        [
            ("whole", "data/train", f"whole, {LEARNED} --proxies, or with another seed's teacher\n"),
            ("whole", subset, f"whole, {LEARNED} --proxies"),
            ("half", "data/train", f"half, {LEARNED} --proxies"),
            ("half", subset, f"half, {LEARNED} --proxies"),
            ("adopted", "data/train", f"adopted, {LEARNED} another network\n"),
            ("whole", "data/test", None),
        ]
    ):
        ran = kdprune("score", "--teacher", f"teachers/{teacher}", "--data", data, "--name", f"n{n}", cwd=bare)
        assert ran.code == 0, ran.err
        assert said in ran.err if said else LEARNED not in ran.err, ran.err


def test_early_scores_are_named_where_there_is_no_early_epoch(bare: Path, kdprune: Cli) -> None:
    assert kdprune(*ADOPTED, cwd=bare).code == 0
    ran = kdprune("score", "--teacher", "teachers/adopted", "--also", "grand_full", "--name", "x", cwd=bare)
    assert "keeps no early epoch: el2n, grand and grand_full are read from its final weights" in ran.err


# --- what is broken


def test_a_number_that_is_not_finite_is_blamed_on_what_it_is_made_from(copy: Path, kdprune: Cli) -> None:
    """Dynamics with a NaN in them."""
    path = copy / TEACHER / dynamics.path_of(2)
    rows = pq.read_table(path)
    values = rows["p_true"].to_numpy().copy()
    values[7] = np.nan
    pq.write_table(rows.set_column(rows.schema.names.index("p_true"), rows.schema.field("p_true"), [values]), path)
    resealed(copy / TEACHER)
    ran = kdprune(*LINE, "--name", "x", cwd=copy)
    said = r"error: p_true is not a finite number for 1 sample \(.*\): the teacher's files in dynamics/ are broken; make or fetch it again"
    assert (ran.code, len(re.findall(said, ran.err))) == (1, 1), ran.err


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_never_written(copy: Path, value: float) -> None:
    """What is too large for float16 is clipped; what is no number at all is an error, before anything is written."""
    found = _scoring._half(np.array([[value, 1e9], [2.0, -1e9]], np.float32))
    assert found.tolist()[1] == [2.0, -65504.0]
    assert np.isnan(found[0, 0])
    images = Images(Dataset.open(copy / "data/train"))
    scorer = _scoring.Scorer(None, images, None, {}, ["embedding"], batch=1, jobs=1, memory=1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"embedding is not a finite number for 1 sample \('.*'\): the network's weights are broken"):
        _scoring._check_finite(scorer, {"embedding": found}, np.arange(2))


# --- sets without digests


def test_dynamics_of_other_images_of_the_same_ids(tmp_path: Path, chain: Path, kdprune: Cli) -> None:
    """Two sets, adopted without digests, of the same ids and labels: what else differs is not known."""
    shutil.copytree(chain / "data/train", tmp_path / "one")
    source = Dataset.open(tmp_path / "one")
    other = tmp_path / "two"
    shutil.copytree(tmp_path / "one", other)
    path = other / source.shard_paths[0].name
    path.write_bytes(path.read_bytes() + b"\0" * 10240)  # which is the end of a tar, once more
    for name in ("one", "two"):
        ran = kdprune("index", *sorted((tmp_path / name).glob("*.tar")), "--no-digests", "--out", f"data/{name}", cwd=tmp_path)
        assert ran.code == 0, ran.err
    sets = [Manifest.load(tmp_path / "data" / name) for name in ("one", "two")]
    assert sets[0].content == sets[1].content
    assert sets[0].digest != sets[1].digest
    assert kdprune("teacher", "--model", "resnet8", "--epochs", 2, "--data", "data/one", "--name", "t", cwd=tmp_path).code == 0
    assert kdprune("select", "data/one", "--frac", 0.5, "--out", "subsets/half", cwd=tmp_path).code == 0
    for folder, there in (("data/one", True), ("subsets/half", True), ("data/two", False)):
        ran = kdprune("score", "--data", folder, "--out", f"scores/{Path(folder).name}", cwd=tmp_path)
        assert ran.code == 0, ran.err
        assert ("aum" in Scores.open(tmp_path / "scores" / Path(folder).name).columns) == there
        assert ("nothing tells whether the teacher was trained on these samples or others of the same ids" in ran.err) != there, ran.err


# --- the last layer


SQUEEZED = ["teacher", "--model", "squeezenet1_1", "--size", 32, "--steps", 2, "--batch", 8, "--lr", 0.001, "--name", "squeezed"]
UNBIASED = """
import torch

def net(classes):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, classes, bias=False)]
    return torch.nn.Sequential(*layers)
"""


def test_grand_is_left_out_where_no_linear_layer_is_the_last(bare: Path, kdprune: Cli) -> None:
    assert kdprune(*SQUEEZED, cwd=bare).code == 0
    ran = kdprune("score", "--teacher", "teachers/squeezed", "--name", "x", cwd=bare)
    assert ran.code == 0, ran.err
    assert "grand is left out: it is of a linear last layer, and this network ends in a convolution" in ran.err
    assert {"grand", "el2n"} & set(Scores.open(bare / "scores/x").columns) == {"el2n"}


def test_grand_of_a_network_whose_last_layer_has_no_bias(bare: Path, kdprune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "unbiased.py").write_text(UNBIASED)
    line = ["teacher", "--model", "unbiased:net", "--epochs", 1, "--name", "own"]
    ran = kdprune(*line, cwd=bare)
    assert ran.code == 0, ran.err
    ran = kdprune("score", "--teacher", "teachers/own", "--code", "unbiased:net", "--name", "x", cwd=bare)
    assert ran.code == 0, ran.err
    found = column(bare / "scores/x", "grand")
    monkeypatch.chdir(bare)
    saved = _models.open_model(bare / "teachers/own")
    net, data = saved.load(code="unbiased:net").eval(), Dataset.open(bare / "data/train")
    images = saved.normalisation.apply(views.evaluation(Images(data).get(np.arange(5)), 8))
    for n in range(5):
        loss = torch.nn.functional.cross_entropy(net(images[n : n + 1]), torch.tensor([int(data.labels[n])]))
        (gradient,) = torch.autograd.grad(loss, list(models.head(net).parameters()))
        assert found[n] == pytest.approx(float(gradient.norm()), rel=1e-4)
