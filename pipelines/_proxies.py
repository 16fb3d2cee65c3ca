"""Proxies: networks that are trained for nothing but to be asked what they say of the data, with other seeds than the teacher's.

The protocol of Paul, Ganguli and Dziugaite, "Deep learning on a data diet", NeurIPS 2021: a score is the mean over several networks, early
in their training. Each is a model folder of its own, `proxies/NAME-eE-pN`, continued when it was interrupted and used again by others.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprune_pipelines import _estimate, _teaching, _training, _workspace
from kdprune_pipelines._console import say
from kdprune_pipelines._fit import samples_in_all
from kdprune_pipelines._models import Saved, open_model
from kdprune_pipelines._preview import steps
from kdprune_pipelines._teaching import Setup

from kdprune_data import order
from kdprune_data.errors import ExistsError, FormatError, KdpruneError, UsageError
from kdprune_data.formats import standing
from kdprune_data.formats.build import Build
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import NAME, Manifest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdprune_data.learn.policy import Policy
    from kdprune_data.learn.recipe import Recipe


@dataclass(frozen=True)
class Proxy:
    """One of several proxies: what it is trained on, and where it goes. `code`: the teacher's own function, where it is one."""

    setup: Setup
    folder: Path
    identity: Identity
    code: str | None

    def finished(self) -> bool:
        """Whether it is there already. Raises ExistsError when something else is."""
        try:
            return Build.look(self.folder, self.identity) == "finished"
        except ExistsError as error:
            said = str(error).split("): use ")[0]
            raise ExistsError(f"{said}): move {self.folder} away, or delete it, and it is trained anew") from None

    def network(self) -> nn.Module:
        """With fresh weights of its own."""
        return _teaching.network(self.setup, self.code)

    def make(self, which: str) -> None:
        """Train it, or go on with that. Raises KdpruneError when training diverges."""
        with Build.begin(self.folder, self.identity) as build:
            if build.done is None:
                say(f"{which}: {self.folder}")
                try:
                    _teaching.train(_teaching.job(self.setup, self.network(), keep=[]), self.setup, build)
                except KdpruneError as error:
                    raise type(error)(f"{which}, which the teacher's recipe trains: {error}") from error

    def load(self) -> nn.Module:
        """The trained network."""
        return open_model(self.folder).load(code=self.code)


def of(saved: Saved, data: Dataset, *, count: int, epochs: int, device: torch.device, how: Mapping[str, Any]) -> list[Proxy]:
    """The proxies of a teacher for some data. how: `jobs` that decode, and `code`, the user's own function.

    Raises UsageError when the teacher has no recipe, or its views cannot be drawn from the data.
    """
    from kdprune_data.learn.stream import Images

    recipe, policy = _recipe(saved), _policy(saved, data)
    if saved.manifest.config.get("init") is not None:
        say("the teacher's training began with given weights (--init); that of its proxies begins with fresh ones")
    same = saved.manifest.content == data.manifest.content
    name = saved.manifest.name if same else f"{data.manifest.name}--{saved.manifest.name}"
    images, found = Images(data), []
    for n in range(count):
        seed = order.derived(recipe.seed, f"proxy/{n}")
        # As in the papers, where the learning rate has not fallen yet when the scores are read.
        own = replace(recipe, epochs=epochs, steps=None, seed=seed, schedule="constant")
        views = replace(policy, seed=_teaching.view_seed(seed))
        setup = Setup(data, images, saved.architecture, saved.normalisation, views, own, device, how["jobs"])
        folder = _workspace.PROXIES / f"{name}-e{epochs}-p{n}"
        found.append(Proxy(setup, folder, _identity(setup, folder), how["code"]))
    return found


def _identity(setup: Setup, folder: Path) -> Identity:
    """What makes a proxy the one it is; one that is finished may have been trained in other numbers, on another device."""
    there = Manifest.read(folder).config if (folder / NAME).is_file() else {}
    precision = there["precision"] if there.get("role") == "proxy" else _training.precision(setup.device)
    settings = _training.setting(
        setup.recipe,
        None,
        architecture=setup.architecture,
        normalisation=setup.normalisation,
        policy=setup.policy,
        precision=precision,
    )
    settings |= {"role": "proxy", "keep_epochs": []}
    return Identity("model", folder.name, settings, _training.inputs(setup.data, val=None))


def _recipe(saved: Saved) -> Recipe:
    from kdprune_data.learn.recipe import Recipe

    stored = saved.manifest.config.get("recipe")
    if stored is None:
        raise UsageError(
            f"--proxies trains networks as the teacher was trained, and {saved.folder} was adopted: nothing is known of its training; "
            f"leave out --proxies, or train a teacher with `kdprune-data teacher --model {saved.architecture.name}`"
        )
    try:
        return Recipe(**{key: value for key, value in stored.items() if key != "optimizer"})
    except TypeError:
        raise FormatError(f"{saved.folder} has a recipe that this version does not know: use the version that made it") from None


def _policy(saved: Saved, data: Dataset) -> Policy:
    """The teacher's views. Raises UsageError where they are crops of images of another size."""
    from kdprune_data.learn.policy import Policy

    policy = Policy.from_dict(saved.manifest.config["policy"])
    if policy.kind == "pad-crop" and not bool((data.sizes[data.usable()] == policy.size).all()):
        raise UsageError(
            f"--proxies are trained with the teacher's views, crops of images of {policy.size} x {policy.size} pixels, and those of "
            f"{data.folder} are not all of that size: score such, or leave out --proxies"
        )
    return policy


def as_inputs(proxies: list[Proxy], there: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The proxies as inputs of scores. Of one that is not finished only a digest: the one that was noted `there` by an identity, if any."""
    found: list[Mapping[str, Any]] = []
    for n, proxy in enumerate(proxies):
        if proxy.finished():
            found.append(Manifest.load(proxy.folder, kinds=("model",)).as_input("proxy"))
        else:
            found.append({"role": "proxy", "digest": there.get(f"proxy {n + 1}" if n else "proxy"), "inputs": []})
    return found


def noted(folder: Path) -> dict[str, str]:
    """The digests of the inputs, by role, of what stands in the folder that is to be written, finished or not; none where that cannot be
    read, which is refused, or replaced, when the folder is begun."""
    found: Any = None
    with suppress(OSError, KdpruneError):
        if (folder / NAME).is_file():
            there = Manifest.read(folder)
            found = Identity(there.kind, there.name, there.config, there.inputs).to_json()["inputs"]
        else:
            found = (standing.noted(folder) or {}).get("inputs")
    return found if isinstance(found, dict) else {}


def make_all(proxies: list[Proxy]) -> None:
    """Train those that are not finished, one after the other."""
    for n, proxy in enumerate(proxies, 1):
        if not proxy.finished():
            proxy.make(f"proxy {n} of {len(proxies)}")


def estimate(proxies: list[Proxy]) -> tuple[int, int, float]:
    """(how many are to be trained, their bytes, the seconds that takes): from at most 3 s of training one."""
    from kdprune_data.learn.weights import weights

    missing = [proxy for proxy in proxies if not proxy.finished()]
    if not missing:
        return 0, 0, 0.0
    net = missing[0].network()
    job = _teaching.job(missing[0].setup, net, keep=[])
    seconds = _estimate.measure(steps(job), samples_in_all(job.training))
    return len(missing), len(missing) * sum(v.nbytes for v in weights(net).values()), len(missing) * seconds
