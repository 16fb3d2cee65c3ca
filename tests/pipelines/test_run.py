"""`run`: the chain from one TOML file is what the single commands make, its record says so, and what is wrong is said before any work."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kdprune_pipelines import _recipes
from kdprune_pipelines.cache import CacheConfig
from kdprune_pipelines.run import RunConfig, run
from kdprune_pipelines.score import ScoreConfig

from kdprune_data.errors import KdpruneError, UsageError
from kdprune_data.formats.manifest import Manifest

Cli = Callable[..., Any]

CHAIN = """\
[[import]]
source = "{few}/train"
holdout = 0.1
shard-samples = 40

[[import]]
source = "{few}/test"
split = "test"

[teacher]
model = "resnet8"
epochs = 3
batch = 16

[score]
embedding = true
logits = true

[[select]]
frac = 0.5
shard_samples = 30

[[select]]
frac = 0.2
method = "el2n"

[cache]
views = 3

[distill]
model = "resnet8"
epochs = 4
batch = 16

[evaluate]

[verify]
"""
SAME = ("data/train", "data/val", "data/test", "teachers/resnet8-s0", "scores/resnet8-s0", "subsets/random-0.5-s0")
OWN = """\
from pathlib import Path

from torch import nn


def tiny(classes):
    Path("it-ran").touch()
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes)) if False else Tiny(classes)


class Tiny(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.body(x))
"""


def tree(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every path: when it was changed, how large it is and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.stat()
        held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(folder).as_posix()] = (about.st_mtime_ns, about.st_size, held)
    return found


def record(workspace: Path, name: str = "r") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workspace / f"runs/{name}.json").read_bytes())
    return found


def recipe(workspace: Path, text: str, name: str = "r") -> str:
    (workspace / f"{name}.toml").write_text(text, encoding="utf-8")
    return f"{name}.toml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, few_digits: Path, kdprune: Cli) -> tuple[Path, str]:
    """A workspace in which CHAIN has run, to read only; and what the run printed."""
    workspace = tmp_path_factory.mktemp("run")
    ran = kdprune("run", recipe(workspace, CHAIN.format(few=few_digits)), cwd=workspace)
    assert ran.code == 0, ran.err
    return workspace, ran.out


@pytest.fixture
def copy(done: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it to write in."""
    return shutil.copytree(done[0], tmp_path / "copy", copy_function=shutil.copy2)


def test_a_recipe_makes_what_the_commands_make(done: tuple[Path, str], chain: Path) -> None:
    workspace, printed = done
    for folder in SAME:
        assert Manifest.load(workspace / folder).digest == Manifest.load(chain / folder).digest, folder
    # Each subset has its cache and its student.
    assert sorted(p.name for p in (workspace / "logits").iterdir()) == ["el2n-0.2-s0--resnet8-s0", "random-0.5-s0--resnet8-s0"]
    students = sorted(p.name for p in (workspace / "students").iterdir())
    assert [name.split("--")[0] for name in students] == ["el2n-0.2-s0", "random-0.5-s0"]
    for student in students:
        from_cache = Manifest.load(workspace / "students" / student).config["views"]
        assert from_cache["from"] == "cache"
    lines = printed.splitlines()
    assert lines[0].split() == ["stage", "folder", "result", "seconds"]
    assert max(map(len, lines)) <= 100
    assert lines[-1].startswith("runs/r.json: 24 of 24 done in ")
    assert sum("accuracy" in line for line in lines) == 3
    assert sum("whole" in line for line in lines) == 11


def test_the_record_says_everything(done: tuple[Path, str]) -> None:
    workspace, _ = done
    found = record(workspace)
    text = (workspace / "r.toml").read_bytes()
    assert found["recipe"] == {"text": text.decode(), "sha256": hashlib.sha256(text).hexdigest()}
    assert (found["name"], found["format"], found["finished"], found["overwrite"]) == ("r", 1, True, False)
    assert set(found["made"]) == {"time", "versions", "host", "seconds"}
    for stage in found["stages"]:
        assert set(stage) == {"section", "command", "options", "folder", "digest", "made", "seconds", "result"}
        if stage["folder"] is not None:
            assert stage["digest"] == Manifest.load(workspace / stage["folder"]).digest
            assert stage["made"] is True
    select = next(one for one in found["stages"] if one["section"] == "[[select]] 2")
    assert (select["options"]["frac"], select["options"]["scores"], select["options"]["seed"]) == ("0.2", "scores/resnet8-s0", 0)
    tested = [one for one in found["stages"] if one["command"] == "evaluate"]
    assert [one["options"]["model"].split("/")[0] for one in tested] == ["teachers", "students", "students"]
    assert all(0 <= one["result"]["accuracy"] <= 1 for one in tested)
    assert json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == (workspace / "runs/r.json").read_bytes()


def test_again_is_already_done(copy: Path, kdprune: Cli) -> None:
    before = {path: about for path, about in tree(copy).items() if not path.startswith("runs")}
    ran = kdprune("run", "r.toml", "--json", cwd=copy)
    assert ran.code == 0, ran.err
    assert {p: a[1:] for p, a in tree(copy).items() if not p.startswith("runs")} == {p: a[1:] for p, a in before.items()}
    stages = json.loads(ran.out)["stages"]
    assert all(stage["made"] is False for stage in stages if stage["folder"])
    assert ran.err.count("skipped: already done") == 10
    assert kdprune("run", "r.toml", "--dry-run", cwd=copy).out.count("nothing would be done") >= 8


def test_another_text_keeps_the_record_of_the_first(copy: Path, kdprune: Cli) -> None:
    first = record(copy)
    ran = kdprune("run", recipe(copy, "[[select]]\nfrac = 0.9\n"), cwd=copy)
    assert ran.code == 0, ran.err
    assert record(copy, f"r-{first['recipe']['sha256'][:12]}") == first
    assert [one["command"] for one in record(copy)["stages"]] == ["select"]
    (copy / "runs/r.json").write_text("[]")
    ran = kdprune("run", "r.toml", cwd=copy)
    assert (ran.code, "runs/r.json is not a run record of this version" in ran.err) == (2, True)
    shutil.rmtree(copy / "runs")
    (copy / "runs").touch()
    ran = kdprune("run", "r.toml", cwd=copy)
    assert (ran.code, "runs is a file, and records of runs go to a folder of this name: move it away" in ran.err) == (2, True), ran.err


def test_dry_run_touches_nothing(copy: Path, kdprune: Cli) -> None:
    shutil.rmtree(copy / "logits/el2n-0.2-s0--resnet8-s0")
    shutil.rmtree(copy / "runs")
    before = tree(copy)
    ran = kdprune("run", "r.toml", "--dry-run", "--json", cwd=copy)
    assert ran.code == 0, ran.err
    assert tree(copy) == before
    facts = json.loads(ran.out)
    by_section = {one["section"]: one for one in facts["stages"]}
    assert by_section["[cache] for subsets/el2n-0.2-s0"]["state"] == "new"
    assert by_section["[cache] for subsets/el2n-0.2-s0"]["counts"] == {"sample": 22, "view": 3}
    assert by_section["[distill] for subsets/el2n-0.2-s0"]["after"] == "[cache] for subsets/el2n-0.2-s0"
    assert by_section["[distill] for subsets/random-0.5-s0"]["state"] == "finished"


def test_the_same_command_continues(done: tuple[Path, str], few_digits: Path, tmp_path: Path, started: Cli, kdprune: Cli) -> None:
    recipe(tmp_path, CHAIN.format(few=few_digits))
    with started("run", "r.toml", cwd=tmp_path) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "teachers/resnet8-s0/manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    interrupted = record(tmp_path)
    assert interrupted["finished"] is False
    assert [one["made"] for one in interrupted["stages"]][:2] == [True, True]
    ran = kdprune("run", "r.toml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    again = record(tmp_path)
    assert (again["finished"], again["stages"][0]["made"]) == (True, False)
    digest_of = {one["section"]: one["digest"] for one in record(done[0])["stages"]}
    assert {one["section"]: one["digest"] for one in again["stages"]} == digest_of


def test_overwrite_replaces_and_goes_on_where_it_stopped(chain_copy: Path, kdprune: Cli) -> None:
    name = recipe(
        chain_copy, '[[select]]\nfrac = 0.5\nshard-samples = 20\n[[select]]\nfrac = 0.25\n[distill]\nsteps = 2\nlogits = "none"\n'
    )
    ran = kdprune("run", name, cwd=chain_copy)
    assert ran.code == 2
    assert "error: r.toml [[select]] 1: subsets/random-0.5-s0 was made with other settings (shard_samples is 30, now 20)" in ran.err
    assert kdprune("run", name, "--overwrite", cwd=chain_copy).code == 0
    assert Manifest.load(chain_copy / "subsets/random-0.5-s0").config["shard_samples"] == 20
    # As if it had been interrupted after the first step.
    found = record(chain_copy)
    sections = [found["stages"][n]["section"] for n in (0, 3)]
    found |= {"finished": False, "stages": [], "replaced": [one for one in found["replaced"] if one["section"] in sections]}
    (chain_copy / "runs/r.json").write_text(json.dumps(found))
    assert kdprune("run", name, "--overwrite", cwd=chain_copy).code == 0
    # The second student is of the second subset, which was made anew since, with the same bytes.
    assert [one["made"] for one in record(chain_copy)["stages"]] == [False, True, True, False]


def test_overwrite_may_be_interrupted_more_than_once(chain_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second student cannot be made until the third run: what the first has replaced is replaced by none of them."""
    monkeypatch.chdir(chain_copy)
    (chain_copy / "logits/late").mkdir()
    text = '[[select]]\nfrac = 0.5\nshard-samples = 30\n[[select]]\nfrac = 0.25\n[[distill]]\nname = "late"\nlogits = "logits/late"\n'
    config = RunConfig(recipe=recipe(chain_copy, text + 'subset = "subsets/random-0.5-s0"\nsteps = 1\n'), overwrite=True)
    stamps = []
    for _ in range(2):
        with pytest.raises(KdpruneError):
            run(config)
        stamps.append((chain_copy / "subsets/random-0.5-s0/manifest.json").stat().st_mtime_ns)
    found = record(chain_copy)
    assert [one["made"] for one in found["stages"]] == [False, False]
    assert [set(one) for one in found["replaced"]] == [{"section", "folder", "digest"}] * 2
    # As if it had been interrupted before its first step was done.
    (chain_copy / "runs/r.json").write_text(json.dumps(found | {"stages": []}))
    shutil.rmtree(chain_copy / "logits/late")
    shutil.copytree(chain_copy / "logits/random-0.5-s0--resnet8-s0", chain_copy / "logits/late")
    assert [one["made"] for one in run(config).facts["stages"]] == [False, False, True]
    stamps.append((chain_copy / "subsets/random-0.5-s0/manifest.json").stat().st_mtime_ns)
    assert len(set(stamps)) == 1
    assert run(config).facts["stages"][0]["made"] is True  # a run that is done is not gone on with


def test_a_fault_is_exit_1(chain_copy: Path, kdprune: Cli) -> None:
    shard = chain_copy / "data/train/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    name = recipe(chain_copy, '[[verify]]\nartefact = "data/train"\n[[verify]]\nartefact = "data/val"\n')
    ran = kdprune("run", name, cwd=chain_copy)
    assert ran.code == 1
    assert [one["result"]["ok"] for one in record(chain_copy)["stages"]] == [False, True]


# --- several of a kind


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (
            "[[select]]\nfrac=0.4\n[[select]]\nfrac=0.1\n[distill]\n",
            ["[distill] for subsets/random-0.4-s0", "[distill] for subsets/random-0.1-s0"],
        ),
        ('[select]\nfrac=0.4\n[[distill]]\n[[distill]]\nmodel="resnet8"\n', ["[[distill]] 1", "[[distill]] 2"]),
        ('[[select]]\nfrac=0.4\n[[distill]]\nsubset="data/train"\n', ["[[distill]] 1"]),
        (
            '[[teacher]]\n[[teacher]]\nmodel="resnet14"\n[[select]]\nfrac=0.4\n[[select]]\nfrac=0.1\n[cache]\n',
            [
                f"[cache] for subsets/random-{frac}-s0 and teachers/{model}-s0"
                for frac in ("0.4", "0.1")
                for model in ("resnet20", "resnet14")
            ],
        ),
        ('[select]\nfrac=0.4\n[[cache]]\nsubset="data/train"\n[distill]\n[evaluate]\n', ["[evaluate]"]),
        ('[select]\nfrac=0.4\n[[cache]]\nviews=2\n[[cache]]\nname="more"\n[[distill]]\nlogits="logits/more"\n', ["[[distill]] 1"]),
    ],
)
def test_one_step_for_each_of_what_the_recipe_makes(chain_copy: Path, kdprune: Cli, text: str, labels: list[str]) -> None:
    ran = kdprune("run", recipe(chain_copy, text), "--dry-run", "--json", cwd=chain_copy)
    assert ran.code == 0, ran.err
    stages = json.loads(ran.out)["stages"]
    assert [one["section"] for one in stages if one["command"] == stages[-1]["command"]] == labels


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ('[select]\nfrac=0.4\n[cache]\nsubset="subsets/random-0.4-s0"\n', ["[select]"]),
        ('[select]\nfrac=0.4\n[cache]\nsubset="./subsets/../subsets/random-0.4-s0"\n', ["[select]"]),
        ('[[teacher]]\nname="a"\n[[teacher]]\ninit="teachers/a/model.safetensors"\n', ["[[teacher]] 1"]),
        ('[[teacher]]\nname="a"\n[[teacher]]\ninit="teachers/a"\n', ["[[teacher]] 1"]),
        ('[teacher]\nname="a"\n[cache]\n[distill]\nteacher="teachers/a"\n', ["[teacher]", "[cache]"]),
        (
            '[[teacher]]\nname="a"\n[[teacher]]\nname="b"\n[cache]\n[distill]\nteacher="teachers/a"\n',
            ["[[teacher]] 1", "[[teacher]] 2", "[cache] for teachers/a"],
        ),
        ('[select]\nfrac=0.4\nname="mine"\n[cache]\n[distill]\nlogits="logits/mine--resnet8-s0"\n', ["[select]", "[cache]"]),
        ('[cache]\nviews=5\nname="more"\n[distill]\n', ["[cache]"]),
        (
            '[select]\nfrac=0.4\n[cache]\n[distill]\n[evaluate]\nmodel="students/random-0.4-s0--resnet20-a0.6592-s0"\n',
            ["[select]", "[cache]", "[distill]"],
        ),
        ('[teacher]\nmodel="resnet14"\n[verify]\nartefact="teachers/resnet14-s0"\n', ["[teacher]"]),
        ('[[distill]]\nalpha="0.9"\n[[distill]]\n', []),
        ('[[distill]]\nlive="teachers/resnet8-s0"\n[[distill]]\nlogits="none"\n', []),
        ('[teacher]\nname="a"\n[distill]\nlive="teachers/a"\n', ["[teacher]"]),
        (
            '[[teacher]]\nname="a"\n[[teacher]]\nname="b"\n[cache]\n[[distill]]\nlive="teachers/b"\n[[distill]]\nlive="teachers/b"\n'
            'logits="none"\nname="x"\n',
            ["[[teacher]] 1", "[[teacher]] 2", "[cache] for teachers/b", "[[teacher]] 2"],
        ),
    ],
)
def test_what_waits_for_what(chain_copy: Path, kdprune: Cli, text: str, after: list[str]) -> None:
    """Inputs may be named by the folders that earlier steps make; two sections that find them by convention find the same."""
    ran = kdprune("run", recipe(chain_copy, text), "--dry-run", "--json", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert [one["after"] for one in json.loads(ran.out)["stages"] if "after" in one] == after


def test_inputs_that_are_named_by_their_folders(chain_copy: Path, kdprune: Cli) -> None:
    text = """
[[teacher]]
model = "resnet8"
epochs = 1
name = "a"

[[teacher]]
model = "resnet8"
epochs = 1
name = "b"
init = "teachers/a/model.safetensors"

[cache]
subset = "subsets/random-0.5-s0"
teacher = "teachers/b"
views = 1

[distill]
model = "resnet8"
steps = 1
teacher = "teachers/b"
name = "of-b"
"""
    ran = kdprune("run", recipe(chain_copy, text), cwd=chain_copy)
    assert ran.code == 0, ran.err
    teachers, student = record(chain_copy)["stages"][:2], record(chain_copy)["stages"][3]
    assert [one["options"]["init"] for one in teachers] == [None, "teachers/a/model.safetensors"]
    assert student["options"]["logits"] == "logits/random-0.5-s0--b"
    assert Manifest.load(chain_copy / student["folder"]).ancestor("teacher")["name"] == "b"


def test_settings_may_be_a_table(chain_copy: Path, kdprune: Cli) -> None:
    text = "[[select]]\nfrac = 0.5\nmethod = 'ccs'\nname = 'a'\nset = {}\n[[select]]\nfrac = 0.5\nmethod = 'ccs'\nname = 'b'\nset = {}\n"
    text = text.format("['bins=7', 'cut=0.25', 'score=el2n']", "{ bins = 7, cut = 0.25, score = 'el2n' }")
    ran = kdprune("run", recipe(chain_copy, text), cwd=chain_copy)
    assert ran.code == 0, ran.err
    one, two = (Manifest.load(chain_copy / "subsets" / name).config for name in "ab")
    assert one == two
    assert one["settings"] == {"bins": 7, "cut": 0.25, "score": "el2n"}
    assert record(chain_copy)["stages"][1]["options"]["set"] == ["bins=7", "cut=0.25", "score=el2n"]
    nested = {"set": {"density": {"clusters": 3}, "prototype.distance": "cosine", "x": {"y": True}}}
    found = _recipes.checked("r.toml", "[score]", nested, ScoreConfig)
    assert found == {"set": ("density.clusters=3", "prototype.distance=cosine", "x.y=true")}


# --- refused before any work

BAD = [
    ("", "r.toml has no section"),
    ("frac = 0.5\n", "r.toml: frac = 0.5 stands outside a section: write it under its command's"),
    ("select = 5\n", "r.toml: select = 5 stands outside a section"),
    ("select = []\n", "r.toml: select = [] stands outside a section"),
    ("select = [1]\n", "r.toml: select = [1] stands outside a section"),
    ("[info]\nartefact = 'x'\n", "unknown section of r.toml 'info'"),
    ("[selekt]\n", "unknown section of r.toml 'selekt'; did you mean 'select'?"),
    ("[select]\nfraction = 1\n", "unknown option in [select] of r.toml 'fraction'; did you mean 'frac'?"),
    ("[[select]]\nfrac = 1\n[[select]]\nfrc = 1\n", "unknown option in [[select]] 2 of r.toml 'frc'; did you mean 'frac'?"),
    ("[select]\nfrac = 0.5\n[teacher]\nepochs = 'many'\n", "r.toml [teacher]: option 'epochs' is 'many': expected a whole number"),
    ("[select]\nfrac = 0.5\n[teacher]\nepochs = -1\n", "r.toml [teacher]: --epochs -1 is too small: at least 0"),
    ("[select]\nfrac = 2\n", "r.toml [select]: fraction 2 is out of range"),
    ("[select]\nfrac = nan\n", "r.toml [select]: fraction nan is out of range"),
    ("[select]\nfrac = 2020-01-02\n", "r.toml [select]: option 'frac' is datetime.date(2020, 1, 2): expected a text"),
    ("[select.more]\nfrac = 1\n", "unknown option in [select] of r.toml 'more'"),
    ("[select]\nfrac = 1\nshard-samples = 5\nshard_samples = 6\n", "r.toml [select] gives 'shard_samples' twice"),
    ("[select]\nfrac = 1\nmethod = 'random2'\n", "r.toml [select]: unknown method 'random2'; did you mean 'random'?"),
    ("[select]\n", "r.toml [select]: say what to keep: either --frac FRACTION"),
    ("[select]\nfrac = 1\nfrac = 2\n", "r.toml cannot be read (Cannot overwrite a value (at line 3"),
    ("[import]\n", "r.toml [import]: 'source' is missing: every such section needs it"),
    ("[teacher]\nmodel = 'resnet19'\n", "r.toml [teacher]: unknown model 'resnet19'; did you mean 'resnet18'?"),
    ("[teacher]\nmodel = 'mine:net'\n", "r.toml [teacher]: names the function 'mine:net' to run: functions are run only when named on the"),
    ("[score]\ncode = 'mine:net'\n", "r.toml [score]: names the function 'mine:net' to run"),
    ("[teacher]\nrecipe = 'smal'\n", "r.toml [teacher]: unknown recipe 'smal'; did you mean 'small'?"),
    ("[teacher]\ndata = 'nowhere'\n", "r.toml [teacher]: data = 'nowhere' does not exist, and no earlier step makes it"),
    ("[select]\nfrac = 0.5\n[distill]\nsubset = 'elsewhere/x'\n", "r.toml [distill]: subset = 'elsewhere/x' does not exist"),
    ("[select]\nfrac = 0.5\n[distill]\nlive = 'teachers/x'\n", "r.toml [distill]: live = 'teachers/x' does not exist"),
    ("[select]\nfrac = 0.5\n[distill]\nset = ['beta=2']\n", "r.toml [distill]: kl has no settings: leave out --set beta"),
    ("[select]\nfrac = 0.5\n[distill]\nloss = 'dkd'\nset = { gama = 2 }\n", "r.toml [distill]: unknown setting of dkd 'gama'"),
    ("[evaluate]\ndata = 'data/test'\n", "r.toml [evaluate]: model is not given, and the recipe makes none"),
    ("[verify]\n", "r.toml [verify]: artefact is not given, and the recipe makes none"),
    ("[[select]]\nfrac = 0.5\n[[select]]\nfrac = 0.50\n", "r.toml: [[select]] 1 and [[select]] 2 would write subsets/random-0.5-s0 twice"),
    (
        "[[select]]\nfrac = 0.5\n[[select]]\nfrac = 0.1\n[distill]\nname = 'x'\n",
        "r.toml: [distill], which runs several times, would write students/x twice: write one section for each, with `subset` and `name`",
    ),
    (
        "[[teacher]]\n[[teacher]]\nseed = 1\n[select]\nfrac = 0.1\n[cache]\n[distill]\n",
        "students/random-0.1-s0--resnet20-a0.*-s0 twice: write one section for each, with `logits` and `name`",
    ),
    (
        "[teacher]\n[select]\nfrac = 0.05\n[cache]\n[[distill]]\n[[distill]]\nalpha = 0.90\n",
        "[[distill]] 1 and [[distill]] 2 would write students/random-0.05-s0--resnet20-a0.9-s0 twice: give each a name of its own",
    ),
    (
        "[teacher]\n[select]\nfrac = 0.1\n[cache]\n[[distill]]\n[[distill]]\nalpha = 0.9\n",
        "[[distill]] 1 and [[distill]] 2 would write students/random-0.1-s0--resnet20-a0.9-s0 twice",
    ),
    (
        "[teacher]\n[select]\nfrac = 1\n[cache]\n[distill]\nlogits = 'logits/typo'\n",
        "r.toml [distill]: logits = 'logits/typo' does not exist",
    ),
    ("[[teacher]]\ninit = 'teachers/b'\n[[teacher]]\nname = 'b'\n", "r.toml [[teacher]] 1: init = 'teachers/b' does not exist"),
    (
        "[[import]]\nsource = 'digits'\n[[import]]\nsource = 'digits'\nout = 'b'\n[teacher]\n",
        'r.toml [teacher]: the recipe makes 2 train splits: say which with data = "FOLDER"',
    ),
    ("[select]\nfrac = 1\nmethod = 'ccs'\nset = ['bin=3']\n", "r.toml [select]: unknown setting of ccs 'bin'; did you mean 'bins'?"),
    ("[select]\nfrac = 1\nmethod = 'ccs'\nset = { bins = 'x' }\n", "r.toml [select]: --set bins=x: expected a whole number"),
    ("[select]\nfrac = 1\nmethod = 'ccs'\nset = { bins = [3] }\n", "r.toml [select]: set: bins is [3]: expected a text, a number, true or"),
    ("[select]\nfrac = 1\nwhere = 'labl == 3'\n", "r.toml [select]: --where, character 1: unknown column 'labl'; did you mean 'label'?"),
    (
        "[teacher]\n[score]\n[select]\nfrac = 1\nmethod = 'el2n'\nwhere = 'label =='\n",
        "r.toml [select]: --where, character 9: found the end",
    ),
    ("[teacher]\n[score]\nset = ['density.x=1']\n", "r.toml [score]: unknown setting of density 'x'"),
    ("[teacher]\n[score]\nset = { density = { clusters = 3 } }\n", 'set density.* is for a score that is not made: add also = ["density"]'),
    ("[teacher]\n[score]\nproxies = 2\n", "r.toml [score]: --proxies 2 says how many networks to train, and --epochs for how long"),
    ("[teacher]\nepochs = 3\n[score]\nepoch = 2\n", "r.toml [score]: epoch = 2: [teacher] keeps the weights after epoch 1, 3; choose one"),
    *(
        (f"[teacher]\nepochs = 1\n[score]\n[select]\nfrac = 0.5\n{text}\n", f"r.toml [select]: {message}")
        for text, message in (
            ("method = 'herding'", "herding needs embedding, which [score] does not make: add embedding = true to [score]"),
            ("dedup = 'near'", "--dedup near needs embedding, which [score] does not make: add embedding = true to [score]"),
            ("method = 'density'", 'method density ranks by a score that [score] does not make: add also = ["density"] to [score]'),
            ("where = 'density < 1'", '--where needs density, which [score] does not make: add also = ["density"] to [score]'),
            ("method = 'tdds'", 'method tdds ranks by a score that [score] does not make: add record = "logits" to [teacher]'),
            (
                "method = 'dual_beta'",
                "dual_beta needs dual, which [score] does not make: it needs 2 recorded epochs or more, and [teacher] has 1: train",
            ),
        )
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_what_is_wrong_is_said_before_any_work(chain: Path, kdprune: Cli, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data").symlink_to(chain / "data")
    name = recipe(tmp_path, text)
    ran = kdprune("run", name, cwd=tmp_path)
    assert ran.code == 2, ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert [message in line for line in errors] == [True], ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "r.toml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[score]\n", "r.toml [score]: no fitting teacher in teachers/"),
        ("[cache]\n", "r.toml [cache]: no fitting teacher in teachers/"),
        ("[teacher]\n[cache]\n", "r.toml [cache]: no fitting subset in subsets/"),
        (
            "[select]\nfrac = 1\nmethod = 'el2n'\n",
            "r.toml [select]: method el2n ranks by a score, and there are none in scores/: add a section [score]",
        ),
        ("[[import]]\nsource = 'digits'\nout = 'a/train'\n[teacher]\n[evaluate]\n", "r.toml [evaluate]: no data/test here"),
    ],
)
def test_inputs_that_nothing_makes(chain: Path, kdprune: Cli, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(chain / "data/train")
    ran = kdprune("run", recipe(tmp_path, text), cwd=tmp_path)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "r.toml"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal", "unknown recipe 'smal'; did you mean 'small'? known: "),
        ("none.toml", "none.toml does not exist: give a TOML file, or the name of a recipe (few-steps"),
        ("./", "is a folder, where a TOML file is expected"),
        ("", "RECIPE is empty: give a value"),
        ("a\udcff.toml", "has a name that cannot be written down: rename the file"),
    ],
)
def test_recipes_that_are_not_there(kdprune: Cli, tmp_path: Path, name: str, message: str) -> None:
    ran = kdprune("run", name, cwd=tmp_path)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert kdprune("run", cwd=tmp_path).code == 2


# --- functions of the user's


def test_functions_run_only_when_named(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "mine_for_run.py").write_text(OWN)
    text = '[teacher]\nmodel = "mine_for_run:tiny"\nepochs = 1\n[score]\n[cache]\nsubset = "data/val"\nviews = 1\n[evaluate]\n'
    name = recipe(chain_copy, text)
    for line in ([], ["--code", "mine_for_run:other"]):
        assert kdprune("run", name, *line, cwd=chain_copy).code == 2
    (chain_copy / "kdprune.toml").write_text('[run]\ncode = ["mine_for_run:tiny"]\n')
    ran = kdprune("run", name, cwd=chain_copy)
    assert (ran.code, "functions are run only when named with --code" in ran.err) == (2, True), ran.err
    (chain_copy / "kdprune.toml").unlink()
    assert not (chain_copy / "it-ran").exists()
    ran = kdprune("run", name, "--code", "mine_for_run:tiny", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert (chain_copy / "it-ran").exists()


# --- recipes for single commands


@pytest.mark.parametrize(
    ("line", "views", "flip"),
    [
        ([], "4", "on"),  # kdprune.toml over the recipe that it names
        (["--views", "5"], "5", "on"),
        (["--recipe", "b.toml"], "6", "on"),  # a recipe named here over kdprune.toml
        (["--recipe", "b.toml", "--views", "7"], "7", "on"),
    ],
)
def test_which_layer_has_the_last_word(tmp_path: Path, line: list[str], views: str, flip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text('[cache]\nviews = 3\nflip = "on"\n[teacher]\nepochs = 1\n')
    Path("b.toml").write_text("[cache]\nviews = 6\n")
    Path("kdprune.toml").write_text('[cache]\nrecipe = "a.toml"\nviews = 4\n')
    given = {key.removeprefix("--"): value for key, value in zip(line[::2], line[1::2], strict=True)}
    found = _recipes.settle("cache", CacheConfig, given, _recipes.read(Path("kdprune.toml"))).values
    assert found == {"views": views, "flip": flip}


def test_a_recipe_in_python(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[cache]\nviews = 3\nbatch = 9\n")
    found = _recipes.applied("cache", CacheConfig(recipe=str(tmp_path / "a.toml"), batch=7))
    assert (found.views, found.batch, found.recipe) == ("3", 7, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[teacher]\n", "a.toml has no section [cache]: it has [teacher]"),
        ("[[cache]]\n[[cache]]\n", "a.toml has 2 sections [[cache]], and options are taken from one: leave one"),
        ("[cache]\nrecipe = 'small'\n", "a.toml [cache] names another recipe ('small'): write its options out"),
        ("[cache]\ncode = 'a:b'\n", "a.toml [cache] names the function 'a:b' to run: functions are run only when named with --code"),
        ("[cache]\nviews = 0\n", "a.toml [cache]: --views 0 is too small: at least 1"),
    ],
)
def test_recipes_that_do_not_fit(chain: Path, kdprune: Cli, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    ran = kdprune("cache", "--recipe", "a.toml", cwd=tmp_path)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_a_recipe_is_no_part_of_what_it_makes(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "a.toml").write_text("[cache]\nviews = 3\n")
    before = Manifest.load(chain_copy / "logits/random-0.5-s0--resnet8-s0").digest
    ran = kdprune("cache", "--recipe", "a.toml", cwd=chain_copy)
    assert (ran.code, "already done: 3 views there" in ran.err) == (0, True), ran.err
    assert Manifest.load(chain_copy / "logits/random-0.5-s0--resnet8-s0").digest == before


def test_packaged_recipes_are_listed_and_shown(kdprune: Cli, tmp_path: Path) -> None:
    assert "small" in _recipes.names()
    listed = kdprune("run", "--list", cwd=tmp_path)
    assert [line.split()[0] for line in listed.out.splitlines()] == _recipes.names()
    for name in _recipes.names():
        shown = kdprune("run", "--show", name, cwd=tmp_path)
        (tmp_path / "mine.toml").write_text(shown.out, encoding="utf-8")
        assert _recipes.find(str(tmp_path / "mine.toml")).sections == _recipes.find(name).sections


def test_a_packaged_recipe_runs_by_its_name(chain_copy: Path, kdprune: Cli) -> None:
    ran = kdprune("run", "small", "--dry-run", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert "[teacher]: teachers/resnet20-s0 would be made" in ran.out
    assert "[select]: subsets/random-0.1-s0 would be made: 11 samples" in ran.out


def test_options_of_the_workspace_do_not_count(chain_copy: Path, kdprune: Cli) -> None:
    (chain_copy / "kdprune.toml").write_text("[select]\nseed = 5\n")
    assert kdprune("run", recipe(chain_copy, "[select]\nfrac = 0.75\n"), cwd=chain_copy).code == 0
    assert record(chain_copy)["stages"][0]["options"]["seed"] == 0


def test_in_python(chain_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain_copy)
    outcome = run(RunConfig(recipe=recipe(chain_copy, "[select]\nfrac = 0.75\n", "three")))
    assert (outcome.facts["record"], outcome.ok) == ("runs/three.json", True)
    with pytest.raises(UsageError, match="which recipe"):
        run(RunConfig())


def test_a_step_made_with_other_settings_says_what_a_recipe_can_do(chain_copy: Path, kdprune: Cli) -> None:
    text = "[[select]]\nfrac = 0.1\nname = 'few'\n"
    assert kdprune("run", recipe(chain_copy, text), cwd=chain_copy).code == 0
    ran = kdprune("run", recipe(chain_copy, text + "balance = 'none'\n"), cwd=chain_copy)
    assert (ran.code, "give its section another `name` or `out`" in ran.err, "use --name" in ran.err) == (2, True, False)
