"""Every example of every command is run, in a workspace of real digits. What it names and is not there is made first, by rule.

Training is cut short; everything else runs as it stands in `--help` and docs/cli.md.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_cli.main import COMMANDS, module_of

Cli = Callable[..., Any]
FROM_NOTHING = {"import", "index", "demo", "run", "completion"}
"""Commands whose examples start in an empty folder; the others find what the six commands made."""
USUAL = {"teachers", "scores", "subsets", "logits", "students"}
BASE = ["teacher --steps 2", "score", "select --frac 0.5", "cache --views 2", "distill --model resnet8 --steps 2"]
RECIPE = """\
[import]
source = "photos"
holdout = 0.1

[teacher]
model = "resnet8"
steps = 2

[select]
frac = 0.5

[cache]
views = 2

[distill]
model = "resnet8"
steps = 2
"""


def examples() -> list[Any]:
    found = []
    for name in COMMANDS:
        lines = importlib.import_module(module_of(name)).EXAMPLES.splitlines()
        assert lines, f"{name} has no examples"
        marks = [pytest.mark.long] if name == "demo" else []
        found += [pytest.param(line, id=line.removeprefix("kdprune-data "), marks=marks) for line in lines]
    return found


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, few_digits: Path, kdprune: Cli) -> Path:
    """A workspace with the usual names, after two steps of training each; to read only."""
    workspace = tmp_path_factory.mktemp("finished")
    imports = [f"import {few_digits / 'train'} --holdout 0.1 --shard-samples 40", f"import {few_digits / 'test'} --split test"]
    for line in [*imports, *BASE]:
        ran = kdprune(*line.split(), cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace


def quick(words: list[str]) -> list[str]:
    """The same command with little training, and of little training; `--epochs 0` stays: it adopts."""
    if "--epoch" in words:  # of a teacher as long as the default: the one kept, of the teacher here the only one
        at = words.index("--epoch") + 1
        return [*words[:at], "1", *words[at + 1 :]]
    if words[0] not in ("teacher", "distill"):
        return words
    for option, least in (("--epochs", "1"), ("--steps", "2")):
        if option in words:
            at = words.index(option) + 1
            return words if words[at] == "0" else [*words[:at], least, *words[at + 1 :]]
    return [*words, "--steps", "2"]


class Maker:
    """Makes, in a workspace, the files that a command names; a path of no known sort fails the test."""

    def __init__(self, workspace: Path, few_digits: Path, finished: Path, kdprune: Cli) -> None:
        self.workspace, self.few_digits, self.finished, self.kdprune = workspace, few_digits, finished, kdprune
        self.words: list[str] = []

    def line(self, words: list[str]) -> list[str]:
        """The words as the command gets them: a pattern becomes the files, NAME what there is. What is to be written is not made."""
        self.words = words
        return [made for at, word in enumerate(words) for made in ([word] if words[at - 1] in ("--out", "--name") else self.make(word))]

    def make(self, word: str) -> list[str]:
        """Make what one word names."""
        path = self.workspace / word
        if "=" in word or not ("/" in word or Path(word).suffix in (".parquet", ".txt", ".pth", ".toml", ".tar", ".safetensors")):
            return [word]
        if path.name == "NAME":
            return [str(next(path.parent.iterdir()).relative_to(self.workspace))]
        if path.parent.name in USUAL:
            return [self._usual(path, word)]
        kind = "folder" if not path.suffix else path.suffix[1:]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            getattr(self, f"_{kind}", self._unknown)(path)
        return sorted(str(p.relative_to(self.workspace)) for p in path.parent.glob(path.name)) if "*" in word else [word]

    def _usual(self, path: Path, word: str) -> str:
        if path.parent.name == "teachers" and not path.exists():
            ran = self.kdprune("teacher", "--steps", "2", "--seed", "1", "--name", path.name, cwd=self.workspace)
            assert ran.code == 0, ran.err
        elif not path.exists():
            shutil.copytree(next(path.parent.iterdir()), path)
        return word

    def _unknown(self, path: Path) -> None:
        pytest.fail(f"{path.name}: tests/cli/test_examples.py knows no such file; teach it to make one")

    def _folder(self, path: Path) -> None:
        shutil.copytree(self.few_digits / "train", path)

    def _parquet(self, path: Path) -> None:
        if "--column" in self.words or self.words[0] == "pick":
            rows = pq.read_table(self.finished / "data/train/index.parquet").select(["id", "label"])
            if "--column" in self.words:
                rows = rows.append_column(self.words[self.words.index("--column") + 1], pa.array(range(len(rows)), pa.float32()))
            pq.write_table(rows, path)
            return
        files = sorted((self.few_digits / "train").glob("*/*.png"))
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        pq.write_table(pa.table({"image": images, "label": [int(file.parent.name) for file in files]}), path)

    def _tar(self, path: Path) -> None:
        for tar in (self.finished / "data/train").glob("*.tar"):
            shutil.copy(tar, path.parent)

    def _txt(self, path: Path) -> None:
        if "--classes" in self.words:
            path.write_text("".join(f"digit {n}\n" for n in range(10)))
        else:
            ids = pq.read_table(self.finished / "data/train/index.parquet")["id"].to_pylist()
            path.write_text("".join(f"{one}\n" for one in ids[::2]))

    def _pth(self, path: Path) -> None:
        import torch
        import torchvision

        model = getattr(torchvision.models, self.words[self.words.index("--model") + 1])(num_classes=10)
        model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # as `--stem auto` builds it for small images
        torch.save(model.state_dict(), path)

    def _toml(self, path: Path) -> None:
        path.write_text(RECIPE)
        if not (self.workspace / "photos").exists():
            self._folder(self.workspace / "photos")


@pytest.mark.parametrize("line", examples())
def test_example(tmp_path: Path, few_digits: Path, finished: Path, kdprune: Cli, line: str) -> None:
    words = quick(shlex.split(line)[1:])
    workspace = tmp_path / "workspace"
    if words[0] in FROM_NOTHING and words[:2] != ["run", "small"]:
        workspace.mkdir()
    else:
        shutil.copytree(finished, workspace)
    if "herding" in words:
        assert kdprune("score", "--embedding", "--overwrite", cwd=workspace).code == 0
    maker = Maker(workspace, few_digits, finished, kdprune)
    ran = kdprune(*maker.line([word.removeprefix("/") for word in words]), cwd=workspace)
    assert ran.code == 0, ran.err
    assert ran.out.strip()
    assert "error" not in ran.err.lower()
