"""The residual networks that He et al. made for CIFAR, of depth 6n + 2.

A 3x3 convolution to 16 channels, then three stages of n two-convolution blocks with 16, 32 and 64 channels, the second and third
stage beginning with stride 2; then the global average and one linear layer. The shortcut has no parameters ("option A"): where a stage
begins, every second pixel is taken and the new channels are zeros. Any image size works: a 32x32 image ends as 8x8 and an 8x8 image
as 2x2 before the average.

Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kdprune_data.errors import UsageError, unknown

DEPTHS = (8, 14, 20, 32, 44, 56, 110)
NORMS = ("batch", "group")


def norm_layer(norm: str, channels: int, eps: float = 1e-5) -> nn.Module:
    """The normalisation of a feature map: "batch" (BatchNorm2d) or "group" (GroupNorm, which knows no batch statistics).

    The number of groups is the largest divisor of `channels` up to 32 that leaves two channels or more in a group: with one, each
    channel's own mean would be subtracted, and a map of 1x1 pixels would come out as nothing. (Wu and He, "Group normalization",
    ECCV 2018, use 32 groups.)

    Raises UsageError for another norm.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=eps)
    most = max(1, min(32, channels // 2))
    return nn.GroupNorm(max(g for g in range(1, most + 1) if channels % g == 0), channels, eps=eps)


class Block(nn.Module):
    """Two 3x3 convolutions and the shortcut around them: (n, inside, h, w) -> (n, outside, h / stride, w / stride)."""

    def __init__(self, inside: int, outside: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, outside)
        self.stride = stride
        self.zeros = (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.zeros:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.zeros, self.zeros))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Images, float32 of shape (n, 3, h, w) -> logits of shape (n, classes).

    The parameters' names, and half of the zero channels on either side, are those of the checkpoints that people share
    (akamaster/pytorch_resnet_cifar10), so those load as they are.
    """

    def __init__(self, blocks: int, classes: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = norm_layer(norm, 16)
        self.layer1 = _stage(blocks, 16, 16, norm)
        self.layer2 = _stage(blocks, 16, 32, norm)
        self.layer3 = _stage(blocks, 32, 64, norm)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(blocks: int, inside: int, outside: int, norm: str) -> nn.Sequential:
    """`blocks` blocks, of which the first widens the map and halves its sides, unless its width stays."""
    first = Block(inside, outside, 1 if inside == outside else 2, norm)
    return nn.Sequential(first, *(Block(outside, outside, 1, norm) for _ in range(blocks - 1)))


def resnet(depth: int, classes: int, norm: str = "batch") -> CifarResNet:
    """The CIFAR ResNet of that depth, with fresh weights from torch's generator.

    Raises UsageError unless the depth is 6n + 2 with n of 1 or more, or for an unknown norm.
    """
    if depth < 8 or depth % 6 != 2:
        raise UsageError(f"depth {depth} is not 6n + 2: give one of {', '.join(map(str, DEPTHS))}")
    return CifarResNet((depth - 2) // 6, classes, norm)
