"""Model folders: from a manifest to a network that runs, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdprune_data.errors import FormatError
from kdprune_data.formats.manifest import Manifest

if TYPE_CHECKING:
    from torch import nn

    from kdprune_data.learn.models import Architecture
    from kdprune_data.learn.views import Normalisation

WEIGHTS = "model.safetensors"


def plain(model: str) -> str:
    """A model's name as it stands in the names of folders: `timm/NAME` and `package.module:function` too.

    >>> plain("timm/vit_tiny"), plain("mine:net")
    ('timm-vit_tiny', 'mine-net')
    """
    return model.replace(":", "-").replace("/", "-")


def epoch_weights(epoch: int) -> str:
    """The file that holds the weights after an epoch, counted from 1."""
    return f"epoch-{epoch:03d}.safetensors"


@dataclass(frozen=True)
class Saved:
    """A finished model folder."""

    folder: Path
    manifest: Manifest
    architecture: Architecture
    normalisation: Normalisation

    @property
    def kept_epochs(self) -> list[int]:
        """Epochs whose weights are kept, ascending."""
        names = [f.path for f in self.manifest.files if f.path.startswith("epoch-")]
        return sorted(int(name[6:].split(".")[0]) for name in names)

    @property
    def early_epoch(self) -> int | None:
        """The kept epoch that early scores are read from: the first, when it is not the last."""
        kept = self.kept_epochs
        return kept[0] if kept and kept[0] < self.manifest.counts["epochs"] else None

    @property
    def recorded_epochs(self) -> list[int]:
        """Epochs whose dynamics are recorded, ascending."""
        names = [f.path for f in self.manifest.files if f.path.startswith("dynamics/epoch-")]
        return sorted(int(name[15:].split(".")[0]) for name in names)

    def may_run(self, code: str | Sequence[str] | None) -> bool:
        """Whether it needs no function of the user's, or one of those named on the command line."""
        return ":" not in self.architecture.name or self.architecture.name in ([code] if isinstance(code, str) else code or ())

    def load(self, *, code: str | Sequence[str] | None, epoch: int | None = None) -> nn.Module:
        """The network with the final weights, or those after a kept epoch. code: the user's own function, or several, of the command line.

        Raises UsageError when it is the user's own function and `code` does not name it, FormatError when the file is not that of the
        manifest.
        """
        from kdprune_data.learn.models import build
        from kdprune_data.learn.weights import load_weights

        net = build(self.architecture, seed=0, code=self.architecture.name if self.may_run(code) else None)
        load_weights(net, self.manifest.checked(self.folder, WEIGHTS if epoch is None else epoch_weights(epoch)))
        return net


def open_model(folder: Path) -> Saved:
    """Open a finished model folder. Raises UsageError when it is none, FormatError when its manifest lacks what a model needs."""
    manifest = Manifest.load(folder, kinds=("model",))
    from kdprune_data.learn.models import Architecture  # which imports torch: after what a mistyped folder is told
    from kdprune_data.learn.views import Normalisation

    try:
        stored = manifest.config["normalisation"]
        normalisation = Normalisation(tuple(stored["mean"]), tuple(stored["std"]))
        return Saved(folder, manifest, Architecture.from_dict(manifest.config["architecture"]), normalisation)
    except (KeyError, TypeError):
        raise FormatError(f"{folder} lacks an architecture or a normalisation in its manifest: make or fetch it again") from None
