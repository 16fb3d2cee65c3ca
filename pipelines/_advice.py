"""Commands that provide what a selection lacks. Each can be pasted as it stands, and replaces nothing that is there.

Beside scores that stand, the same are made anew with what is lacking, from the same data, teacher and settings, under a name that is free.
What only the training of a teacher can record comes from a teacher like the one that scored.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdprune_pipelines import _workspace as workspace
from kdprune_pipelines._columns import ALSO, name_of
from kdprune_pipelines._training import TrainingConfig, kept_epochs

from kdprune_data.config import Settings
from kdprune_data.errors import KdpruneError
from kdprune_data.formats.manifest import NAME, Manifest
from kdprune_data.formats.scores import KINDS_OF_VECTORS, SCORES

Described = Mapping[str, Any]
"""An artefact, as an input of a manifest describes it."""
BATCH, MEMORY = 256, 1_000_000_000
"""Defaults of `score`."""


def score_command(names: Iterable[str]) -> str:
    """The plain `kdprune-data score` that makes these scores and vectors."""
    wanted = set(names)
    vectors = [f"--{what}" for what in KINDS_OF_VECTORS if what in wanted]
    asked = [name for name, score in SCORES.items() if score.asked and name in wanted]
    asked = [f"--also {name}" for name in (asked if len(asked) < len(ALSO) else ["all"])]
    return " ".join(["kdprune-data", "score", *vectors, *asked])


def first(lacking: Sequence[str], parent: Manifest, folder: Path) -> str:
    """What to do where nothing is scored. parent, folder: the data that is selected from."""
    score = " ".join([score_command(lacking), *_data(workspace.contents(parent.as_input("data")), parent, folder)])
    if not dynamic(lacking):
        return f"run `{score}`"
    teachers = workspace.candidates(workspace.TEACHERS)
    serving = [one for one in teachers if _serves(Manifest.read(one), lacking)]
    if serving:
        return f"run `{score}{_option('--teacher', serving[0]) if len(teachers) > 1 else ''}`"
    if len(teachers) == 1:
        model = Manifest.read(teachers[0])
        made, name = _retrain(model.as_input("teacher"), lacking)
        return f"train a teacher with `{made}`{_why(model.as_input('teacher'), lacking)}, then run `{score}{_option('--teacher', name)}`"
    train = "kdprune-data teacher --record logits" if "tdds" in lacking else "kdprune-data teacher"
    return f"train a teacher with `{train}`, then run `{score}`"


def again(scores: Manifest, folder: Path, lacking: Sequence[str], parent: Manifest, data: Path) -> tuple[str, Path]:
    """What to do where a scores folder lacks something, and the folder that comes of it. parent, data: what is selected from."""
    of: Described = next(one for one in scores.inputs if one["role"] == "teacher")
    where = _data({scores.content}, parent, data)
    if not dynamic(lacking):
        name = _free(workspace.SCORES, f"{folder.name}-full")
        words = [*where, *_teacher(of), *_remade(scores, lacking, of), "--name", shlex.quote(name)]
        return f"run `{' '.join(['kdprune-data score', *words])}`", workspace.SCORES / name
    serving = [one for one in workspace.candidates(workspace.TEACHERS) if _serves(Manifest.read(one), lacking, of)]
    train = "" if serving else _retrain(of, lacking)[0]
    teacher = serving[0] if serving else _retrain(of, lacking)[1]
    proxies = scores.config.get("proxies") or {}
    usual = name_of(teacher.name, epoch=scores.config.get("epoch"), proxies=proxies.get("count"), epochs=proxies.get("epochs"))
    name = _free(workspace.SCORES, usual)
    called = [] if name == usual else ["--name", shlex.quote(name)]
    words = [*where, f"--teacher {shlex.quote(str(teacher))}", *_remade(scores, lacking, of), *called]
    score = f"run `{' '.join(['kdprune-data score', *words])}`"
    return (f"train a teacher with `{train}`{_why(of, lacking)}, then {score}" if train else score), workspace.SCORES / name


def dynamic(names: Iterable[str]) -> list[str]:
    """Those that are read from the dynamics of a training."""
    return [name for name in names if name in SCORES and SCORES[name].source == "dynamics"]


def _remade(scores: Manifest, lacking: Iterable[str], teacher: Described) -> Iterator[str]:
    """The options of `score` by which these scores were made, and those for what they lack."""
    config = scores.config
    wanted = {*lacking, *config["columns"], *(what for what in KINDS_OF_VECTORS if config.get(what))}
    yield from score_command(wanted).split()[2:]
    proxies = config.get("proxies") or {}
    numbers = {"epoch": config.get("epoch"), "proxies": proxies.get("count"), "epochs": proxies.get("epochs")}
    numbers |= {key: config.get(key) for key, usual in (("seed", 0), ("batch", BATCH), ("memory", MEMORY)) if config.get(key) != usual}
    yield from (f"--{key} {value}" for key, value in numbers.items() if value is not None)
    for score, settings in sorted(config.get("settings", {}).items()):
        usual = _defaults(score)
        yield from (f"--set {score}.{key}={_text(value)}" for key, value in settings.items() if value != usual.get(key, value))
    name = str(teacher["config"]["architecture"]["name"])
    if ":" in name:
        yield f"--code {shlex.quote(name)}"


def _defaults(score: str) -> dict[str, Any]:
    from kdprune_data.scores import FROM_DYNAMICS, FROM_EMBEDDING  # which import torch

    table: Mapping[str, Any] = {**FROM_DYNAMICS, **FROM_EMBEDDING}
    kind: Callable[[], Settings] | None = table[score].settings if score in table else None
    return {} if kind is None else kind().own()


def _text(value: Any) -> str:
    """A setting as `--set` takes it."""
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def _data(contents: set[str], parent: Manifest, folder: Path) -> list[str]:
    """The option for the data that is scored, where it is not `data/train`: that which is selected from, or one in its usual place."""
    usual = workspace.DATA / "train"
    if (usual / NAME).is_file() and Manifest.read(usual).content in contents:
        return []
    if parent.content in contents:
        return ["--data", shlex.quote(str(folder))]
    found = [one for place in (workspace.DATA, workspace.SUBSETS) for one in workspace.candidates(place, lambda m: m.content in contents)]
    return ["--data", shlex.quote(str(found[0])) if found else "FOLDER"]


def _teacher(of: Described) -> list[str]:
    """The option for the teacher that scored, where it is not the only one in its usual place."""
    there = workspace.candidates(workspace.TEACHERS)
    mine = [one for one in there if Manifest.read(one).digest == of["digest"]]
    if mine and len(there) == 1:
        return []
    return ["--teacher", shlex.quote(str(mine[0])) if mine else "FOLDER"]


def _serves(model: Manifest, names: Iterable[str], like: Described | None = None) -> bool:
    """Whether a teacher has recorded what these scores are read from; like: of the data of that one, and as the same kind of network."""
    described = model.as_input("teacher")
    if like is not None and (model.content != like["content"] or model.config["architecture"] != like["config"]["architecture"]):
        return False
    recorded = model.config.get("record") == "logits" or "tdds" not in names
    return recorded and _epochs(described) >= _least(names)


def _epochs(teacher: Described) -> int:
    """How many epochs of its training a teacher has recorded."""
    return 0 if teacher["config"].get("recipe") is None else int(teacher["counts"]["epochs"])


def _least(names: Iterable[str]) -> int:
    from kdprune_data.scores import FROM_DYNAMICS  # which imports torch

    return max((FROM_DYNAMICS[name].least for name in dynamic(names)), default=1)


def _why(teacher: Described, names: Iterable[str]) -> str:
    """Why the dynamics of a teacher do not do, in brackets."""
    least, epochs = _least(names), _epochs(teacher)
    if not epochs:
        return " (an adopted one has no dynamics)"
    return f" ({least} recorded epochs or more are needed, not {epochs})" if epochs < least else ""


def keeping(teacher: Manifest, epoch: int) -> str:
    """The `kdprune-data teacher` that trains one like this, and keeps the weights after an epoch."""
    return _retrain(teacher.as_input("teacher"), (), epoch)[0]


def _retrain(teacher: Described, names: Sequence[str], epoch: int = 0) -> tuple[str, Path]:
    """The `kdprune-data teacher` that trains one like this, and records what is lacking; and its folder. epoch: one to keep, if any."""
    config, usual = teacher["config"], {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    recipe: dict[str, Any] = dict(config.get("recipe") or {})
    epochs, least = _epochs(teacher), max(_least(names), epoch)
    words = ["kdprune-data teacher", "--model", shlex.quote(str(config["architecture"]["name"]))]
    if epochs < least and (epochs or epoch):
        recipe |= {"epochs": least, "steps": None}
    if recipe.get("steps") is not None:
        del recipe["epochs"]
    for key in usual:
        value = recipe.get(key)
        if value is not None and (key == "epochs" or value != usual[key]):
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [f"{value}"])]
    if config["architecture"].get("norm", "batch") != "batch":
        words += ["--norm", str(config["architecture"]["norm"])]
    words += [f"--keep-epochs {epoch}"] if epoch else _kept(config, epochs) if epochs >= least else []
    words += ["--record logits"] if "tdds" in names or config.get("record") == "logits" else []
    why = f"e{epoch}" if epoch else "logits" if "tdds" in names else "longer" if epochs else "trained"
    name = _free(workspace.TEACHERS, f"{teacher['name']}-{why}")
    return " ".join([*words, "--name", shlex.quote(name)]), workspace.TEACHERS / name


def _kept(config: Described, epochs: int) -> list[str]:
    """The epochs whose weights are kept, where they are not the usual ones."""
    kept = list(config.get("keep_epochs") or [])
    try:
        return [] if kept == kept_epochs((), epochs) else [f"--keep-epochs {one}" for one in kept]
    except KdpruneError:
        return []


def _option(flag: str, folder: Path) -> str:
    return f" {flag} {shlex.quote(str(folder))}"


def _free(place: Path, name: str) -> str:
    """The first name in a usual place that is not taken: this one, or with a number."""
    found, n = name, 1
    while (place / found).exists():
        n += 1
        found = f"{name}-{n}"
    return found
