"""The last layer of any classifier, and what it reads: logits and embeddings of one and the same pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdprune_data.errors import UsageError


def head(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer that makes the logits: the last Linear, or where there is none the last convolution, if it is 1x1 (squeezenet).

    Raises UsageError where there is neither.
    """
    modules = list(model.modules())
    if linear := [module for module in modules if isinstance(module, nn.Linear)]:
        return linear[-1]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    if convolutions and convolutions[-1].kernel_size == (1, 1):
        return convolutions[-1]
    raise UsageError(f"{type(model).__name__} has no embedding: it ends in neither a Linear layer nor a 1x1 convolution")


def features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding, float32 of shape (n, d), and the logits, float32 of shape (n, c), of images of shape (n, 3, h, w).

    The embedding is the input of `head(model)`, averaged over the image where that is a convolution. For a Linear head
    `embedding @ head.weight.T + head.bias` are the logits, in eval mode and in train mode (there the embedding is after the dropout).

    Raises UsageError when the model has no such head, or its output is not what a Linear head makes (an average of two heads).
    """
    last = head(model)
    met: list[tuple[Tensor, Tensor]] = []
    hook = last.register_forward_hook(lambda _, inputs, output: met.extend([(inputs[0], output)] if inputs else []))
    try:
        logits = model(images)
    finally:
        hook.remove()
    if not met or not isinstance(logits, Tensor) or not _made_by(last, met[-1][1], logits):
        kind = type(last).__name__
        raise UsageError(f"{type(model).__name__} has no embedding: its output is not what its last {kind} layer makes")
    embedding = met[-1][0].mean(dim=(2, 3)) if isinstance(last, nn.Conv2d) else met[-1][0]
    return embedding.float(), logits.float()


def _made_by(last: nn.Linear | nn.Conv2d, output: Tensor, logits: Tensor) -> bool:
    """Whether the head's output is the logits: itself or its values; of a convolution, which is averaged later, only the channels."""
    if logits.ndim != 2:
        return False
    if isinstance(last, nn.Conv2d):
        return logits.shape == output.shape[:2]
    return output is logits or torch.equal(output.float(), logits.float())
