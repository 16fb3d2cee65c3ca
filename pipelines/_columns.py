"""Which scores `score` makes, by which settings, and those that are made of the teacher's dynamics alone.

Of `SCORES` all are made that can be, but for those that cost more: these are asked for with `--also`. One that cannot be made is left out,
with a line that says which command provides what it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from kdprune_pipelines import _workspace
from kdprune_pipelines._console import count, say
from kdprune_pipelines._models import Saved
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.config import Settings, pairs
from kdprune_data.errors import FormatError, UsageError, unknown
from kdprune_data.formats import dynamics
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.scores import SCORES

if TYPE_CHECKING:
    from kdprune_data.scores import History

ALSO = tuple(name for name, score in SCORES.items() if score.asked)
"""The scores that are made only when asked for."""
DYNAMICS = tuple(name for name, score in SCORES.items() if score.source == "dynamics")
READ = ["uid", "correct", "logit_margin", "p_true"]


@dataclass(frozen=True)
class Columns:
    """The scores to make, in the order of `SCORES`, and the settings of each."""

    names: Sequence[str]
    settings: Mapping[str, Settings]

    def of(self, *sources: str) -> list[str]:
        """Those that are made of one of these."""
        return [name for name in self.names if SCORES[name].source in sources]

    def stored(self) -> dict[str, dict[str, Any]]:
        """The settings as a manifest keeps them: of the scores that have some."""
        return {name: own for name, settings in self.settings.items() if (own := settings.own())}


def asked(also: Sequence[str]) -> set[str]:
    """The scores that `--also` names, `all` being all of them."""
    return set(ALSO if "all" in also else also)


def name_of(teacher: str, *, epoch: int | None = None, proxies: int | None = None, epochs: int | None = None) -> str:
    """The name of scores, by what they are made from.

    >>> name_of("resnet20-s0"), name_of("resnet20-s0", epoch=5), name_of("resnet20-s0", proxies=3, epochs=20)
    ('resnet20-s0', 'resnet20-s0-e5', 'resnet20-s0-p3-e20')
    """
    if proxies is not None:
        return f"{teacher}-p{proxies}-e{epochs}"
    return teacher if epoch is None else f"{teacher}-e{epoch}"


def chosen(saved: Saved, data: Dataset, also: Sequence[str], given: Sequence[str], *, code: str | None) -> Columns:
    """The scores that can be made of a teacher and asked for, with what `--set` says. `code`: the user's own function, where it is one.

    Raises UsageError for a setting that is none, and for a network that has no last layer to read.
    """
    from kdprune_data.scores import FROM_DYNAMICS

    wanted, lacking = asked(also), _lacking(saved, data)
    if lacking is not None:
        say(f"{lacking}: {', '.join(DYNAMICS[:-1])} and {DYNAMICS[-1]} are left out")
    whole = {name for name, score in FROM_DYNAMICS.items() if score.logits}
    recorded = saved.manifest.config.get("record") == "logits"
    if lacking is None and not recorded:
        for name in whole:
            say(f"{name} needs whole logits: make the teacher with --record logits")
    few = set() if lacking is not None else _too_few(len(saved.recorded_epochs), set() if recorded else whole)
    left_out = set(ALSO) - wanted | few | (whole if not recorded else set()) | (set(DYNAMICS) if lacking is not None else set())
    if not _linear(saved, code):
        say("grand is left out: it is of a linear last layer, and this network ends in a convolution; --also grand_full fits any")
        left_out.add("grand")
    names = [name for name in SCORES if name not in left_out]
    texts = _by_score(given)
    for score, of in texts.items():
        if score not in names and score != "grand":
            first = f"--set {score}.{next(iter(of))} is for a score that is not computed"
            other = "train the teacher for longer" if score in few else "make the teacher with --record logits"
            why = f"add --also {score}" if score in set(ALSO) - wanted else lacking or other
            raise UsageError(f"{first}: {why}, or leave it out")
    return Columns(names, {name: _settings(name, texts.get(name, {})) for name in names})


def _linear(saved: Saved, code: str | None) -> bool:
    """Whether the last layer of a teacher's network is a Linear one. Raises UsageError when it has none that can be read."""
    from torch import nn

    from kdprune_data.learn import models

    if saved.architecture.name in models.CIFAR:  # which need not be made to know it
        return True
    return isinstance(models.head(models.build(saved.architecture, seed=0, code=code)), nn.Linear)


def _too_few(epochs: int, but: Collection[str]) -> set[str]:
    """The scores from dynamics, but some, that need more epochs than were recorded: said, one a line."""
    from kdprune_data.scores import FROM_DYNAMICS

    found = {name: score.least for name, score in FROM_DYNAMICS.items() if score.least > epochs and name not in but}
    for name, least in found.items():
        say(f"{name} needs {least} recorded epochs or more, not {epochs}: train the teacher for longer")
    return set(found)


def _by_score(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """`SCORE.NAME=VALUE` texts by score. Raises UsageError for one that is none, or of no score."""
    found: dict[str, dict[str, str]] = {}
    for key, value in pairs(given).items():
        score, _, name = key.partition(".")
        if not (score and name):
            raise UsageError(f"--set {key}={value} names no score: give SCORE.NAME=VALUE, as in --set forgetting.never=zero")
        if score not in SCORES:
            raise unknown("score in --set", score, SCORES)
        found.setdefault(score, {})[name] = value
    return found


def check_settings(given: Sequence[str]) -> list[str]:
    """The scores that `--set` speaks of. Raises UsageError for a setting that none has, before there is a teacher."""
    texts = _by_score(given)
    for score, of in texts.items():
        _settings(score, of)
    return list(texts)


def _settings(score: str, given: Mapping[str, str]) -> Settings:
    """A score's settings; messages name it too."""
    from kdprune_data.scores import FROM_DYNAMICS, FROM_EMBEDDING

    table: Mapping[str, Any] = {**FROM_DYNAMICS, **FROM_EMBEDDING}
    kind: type[Settings] = table[score].settings if score in table else Settings
    try:
        return kind.parse(score, given)
    except UsageError as error:
        text = str(error)
        for name in given:
            text = text.replace(f"--set {name}", f"--set {score}.{name}").replace(f"unknown setting {name}", f"unknown {score}.{name}")
        raise UsageError(text) from None


def _lacking(saved: Saved, data: Dataset) -> str | None:
    """Why no score can be made of the teacher's dynamics; None where they can."""
    epochs = saved.recorded_epochs
    if not epochs:
        return "the teacher has no training dynamics (`kdprune-data teacher` records them while it trains)"
    if saved.manifest.content not in _workspace.contents(data.manifest.as_input("data")):
        return "the teacher was trained on other data (`kdprune-data teacher --data` records the dynamics of these)"
    if not data.has_digests and data_of(saved)["digest"] not in _digests(data.manifest.as_input("data")):
        return (
            "without digests of the images (index --no-digests) nothing tells whether the teacher was trained on these samples or others "
            "of the same ids (`kdprune-data teacher --data` records the dynamics of these)"
        )
    found = order.locate(dynamics.read(saved.folder, epochs[0], ["uid"])["uid"], data.uids[data.usable()])
    if (found < 0).any():
        return f"the teacher was trained without {count(int((found < 0).sum()), 'sample')} of these"
    return None


def data_of(saved: Saved) -> Mapping[str, Any]:
    """The data that a teacher was trained on, as an input's description."""
    found: Mapping[str, Any] = next(one for one in saved.manifest.inputs if one["role"] == "data")
    return found


def _digests(described: Mapping[str, Any]) -> set[str]:
    """The digests of a data set (as an input's description) and of all data sets it was chosen from."""
    return {described["digest"]}.union(*(_digests(one) for one in described["inputs"] if one["role"] == "data"))


def past(saved: Saved, data: Dataset, columns: Columns) -> dict[str, NDArray[np.float32]]:
    """The scores from dynamics, of every row of the data set that decodes (others 0), joined by uid.

    Raises FormatError unless every epoch's dynamics are of the same samples in the same order.
    """
    from kdprune_data.scores import FROM_DYNAMICS

    names = columns.of("dynamics")
    history = _history(saved, data) if names else None
    scores = {}
    for name in names:
        assert history is not None
        scores[name] = np.zeros(len(data), np.float32)
        scores[name][data.usable()] = FROM_DYNAMICS[name].compute(history, columns.settings[name])
    return scores


def _history(saved: Saved, data: Dataset) -> History:
    from kdprune_data.scores import History

    folder, epochs = saved.folder, saved.recorded_epochs
    read = [dynamics.read(folder, epoch, READ) for epoch in epochs]
    for epoch, one in zip(epochs, read, strict=True):
        if not np.array_equal(one["uid"], read[0]["uid"]):
            raise FormatError(
                f"{folder / dynamics.path_of(epoch)} is not of the same samples, in the same order, as that of epoch {epochs[0]}: "
                "make or fetch the teacher again"
            )
    found = order.locate(read[0]["uid"], data.uids[data.usable()])
    correct, margin, p_true = (np.stack([one[name][found] for one in read]) for name in READ[1:])
    recorded = saved.manifest.config.get("record") == "logits"
    return History(correct, margin, p_true, (lambda e: dynamics.read_logits(folder, epochs[e])[found]) if recorded else None)
