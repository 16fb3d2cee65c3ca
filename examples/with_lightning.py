"""A student in Lightning: batches with soft labels from a subset's shards, and a trainer that goes on in the middle of an epoch.

    pip install 'kdprune-data[examples]'
    python examples/with_lightning.py subsets/random-0.1-s0 logits/random-0.1-s0--resnet20-s0 --epochs 30

`--ckpt FILE` goes on from a checkpoint of Lightning's, with another number of workers too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from kdprune_data import Dataset, SoftLabelDataset

ALPHA, TEMPERATURE = 0.9, 4.0


class Student(lightning.LightningModule):
    """torchvision's ResNet-18 with a stem for small images, trained on labels and soft labels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = resnet18(num_classes=classes)
        self.net.conv1, self.net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """(1 - alpha) CE + alpha tau^2 KL(teacher || student), both softmaxes at tau."""
        logits = self.net(batch["image"])
        teacher, own = (torch.log_softmax(z / TEMPERATURE, 1) for z in (batch["logits"], logits))
        soft = F.kl_div(own, teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2
        loss = (1 - ALPHA) * F.cross_entropy(logits, batch["label"]) + ALPHA * soft
        self.log("train_loss", loss, batch_size=len(logits), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As `kdprune-data distill` has it, but for the learning rate's way down."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)


class Position(lightning.Callback):
    """Tells the data set which epoch it is, as every epoch shows the next view; and saves where in it the training is."""

    def __init__(self, dataset: SoftLabelDataset) -> None:
        self._dataset = dataset
        self._state = dataset.state_dict()
        self.shown: list[tuple[int, list[str]]] = []
        """Of each batch the epoch, and the ids."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        """Called before the workers begin the epoch; they began the first, whose number the data set knows, already."""
        self._dataset.set_epoch(trainer.current_epoch)

    def on_train_batch_end(self, _: lightning.Trainer, __: lightning.LightningModule, ___: Any, batch: dict[str, Any], ____: int) -> None:
        """Before any checkpoint of this step."""
        self._state = self._dataset.state_after(batch)
        self.shown.append((self._dataset.epoch, batch["id"]))

    def state_dict(self) -> dict[str, Any]:
        """Part of Lightning's checkpoint."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the workers begin."""
        self._dataset.load_state_dict(state)


def main(words: list[str] | None = None) -> Position:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("subset", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=-1, help="Stop after so many steps.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("lightning-student"))
    parser.add_argument("--ckpt", type=Path, help="Go on from this checkpoint.")
    asked = parser.parse_args(words)

    dataset = SoftLabelDataset(asked.subset, asked.logits, batch_size=asked.batch)
    position = Position(dataset)
    trainer = lightning.Trainer(
        max_epochs=asked.epochs,
        max_steps=asked.steps,
        default_root_dir=asked.out,
        callbacks=[position, ModelCheckpoint(asked.out, every_n_train_steps=1, save_last=True)],
        logger=False,
    )
    student = Student(len(Dataset.open(asked.subset).classes))
    loader = DataLoader(dataset, batch_size=None, num_workers=asked.workers)
    trainer.fit(student, loader, ckpt_path=None if asked.ckpt is None else str(asked.ckpt), weights_only=True)
    return position


if __name__ == "__main__":
    main()
