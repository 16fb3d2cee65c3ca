"""A student in a plain PyTorch loop: batches with soft labels from a subset's shards, the usual loss, and a run that can be interrupted.

    python examples/plain_pytorch.py subsets/random-0.1-s0 logits/random-0.1-s0--resnet20-s0 --test data/test --epochs 30

Interrupt it and run it again: it goes on from where it was saved, with another `--workers` too. Nothing of it is needed with
`kdprune-data distill`, which does all of this.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from kdprune_data import Dataset, SoftLabelDataset
from kdprune_data.learn.stream import Images
from kdprune_data.learn.views import evaluation

ALPHA, TEMPERATURE, SAVE_EVERY = 0.9, 4.0, 30.0


def student(classes: int) -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images."""
    net = resnet18(num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def loss_of(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(1 - alpha) CE + alpha tau^2 KL(teacher || student), both softmaxes at tau; each sample counts as the subset says."""
    hard = F.cross_entropy(logits, batch["label"], reduction="none")
    teacher, own = (torch.log_softmax(z / TEMPERATURE, 1) for z in (batch["logits"], logits))
    soft = F.kl_div(own, teacher, reduction="none", log_target=True).sum(1) * TEMPERATURE**2
    weights = batch["weight"] / batch["weight"].mean()
    return ((1 - ALPHA) * hard + ALPHA * soft).mul(weights).mean()


def accuracy(net: nn.Module, folder: Path, dataset: SoftLabelDataset, size: int) -> float:
    """On a test set, with the inputs normalised as in training."""
    data = Dataset.open(folder)
    images, right = Images(data), 0
    net.eval()
    with torch.inference_mode():
        for rows in torch.from_numpy(data.usable()).split(256):
            pixels = evaluation(images.get(rows.numpy()), size)
            right += int((net(dataset.normalisation.apply(pixels)).argmax(1).numpy() == data.labels[rows.numpy()]).sum())
    return right / len(data.usable())


class Checkpoint:
    """Weights and position in files beside each other. The optimizer's momentum is begun anew, to keep this short."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._weights, self._note = folder / "student.safetensors", folder / "position.json"
        self._saved = time.monotonic()

    def save(self, net: nn.Module, position: dict[str, object]) -> None:
        """Every file is written beside and renamed."""
        save_model(net, str(self._weights.with_suffix(".tmp")))
        self._weights.with_suffix(".tmp").replace(self._weights)
        self._note.with_suffix(".tmp").write_text(json.dumps(position))
        self._note.with_suffix(".tmp").replace(self._note)
        self._saved = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last one is some seconds old."""
        return time.monotonic() - self._saved > SAVE_EVERY

    def load(self, net: nn.Module, dataset: SoftLabelDataset) -> bool:
        """Go on where it was left; False where there is nothing."""
        if not self._note.is_file():
            return False
        load_model(net, str(self._weights))
        dataset.load_state_dict(json.loads(self._note.read_text()))
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("subset", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("plain-student"))
    parser.add_argument("--stop-after", type=int, help="Stop after so many batches, as if interrupted.")
    asked = parser.parse_args()

    dataset = SoftLabelDataset(asked.subset, asked.logits, batch_size=asked.batch)
    loader = DataLoader(dataset, batch_size=None, num_workers=asked.workers)
    torch.manual_seed(0)
    net = student(len(Dataset.open(asked.subset).classes)).to(memory_format=torch.channels_last)
    checkpoint, done = Checkpoint(asked.out), 0
    if checkpoint.load(net, dataset):
        print(f"going on in epoch {dataset.epoch}")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    size = 0
    for epoch in range(dataset.epoch, asked.epochs):
        dataset.set_epoch(epoch)
        net.train()
        for batch in loader:
            size = batch["image"].shape[-1]
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - epoch / asked.epochs)
            loss = loss_of(net(batch["image"]), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += 1
            if checkpoint.is_due() or done == asked.stop_after:
                checkpoint.save(net, dataset.state_after(batch))
            if done == asked.stop_after:
                print(f"stopped in epoch {epoch} after {batch['seen']} samples")
                return
        print(f"epoch {epoch + 1}/{asked.epochs}: loss {loss.item():.3f}")
    if asked.test is not None:
        print(f"test accuracy {accuracy(net, asked.test, dataset, size):.4f}")


if __name__ == "__main__":
    main()
