"""The gradient of one layer's parameters, sample by sample: its squared norm, from what the layer read and the gradient of what it said.

For a layer that is linear in its parameters the gradient for a sample is a sum over positions t (pixels, tokens) of g_t a_t^T: `a` its
input at a position (for a convolution, the patch there) and `g` the gradient of its output. That sum can be written out; or, because
|sum_t g_t a_t^T|^2 = sum_tu (a_t . a_u)(g_t . g_u), its norm comes from two matrices of positions by positions, which is far less work
where a layer has few positions and many weights. Each layer takes the way that needs fewer multiplications.

Source of the identity: Goodfellow, "Efficient per-example gradient computations", 2015, for one position; Li et al., "Large language
models can be strong differentially private learners", ICLR 2022, for several ("ghost clipping").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 8
"""Channels below which a convolution in groups is slow: a first layer's three fill no vector register. Measured."""
MOVED = 10
"""What moving a number costs, in multiplications of a matrix product: measured, roughly."""

Rule = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def has_rule(layer: nn.Module) -> bool:
    """Whether `squares` knows the layer: its very type, its own forward, a weight or a bias and no more, and no hook that alters it."""
    if type(layer) not in RULES or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    if not own or not own <= {"weight", "bias"}:
        return False
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return layer.running_mean is not None and not layer.training
    return True


def squares(layer: nn.Module, a: Tensor, g: Tensor, *, memory: int) -> Tensor:
    """Squared norm of the gradient of a layer's parameters for each sample: float64 of shape (n,), on the layer's device.

    a: float of shape (n, ...), the layer's input; g: float of shape (n, ...), the gradient of its output. What it holds besides these
    stays within `memory` bytes where that is room for one sample. Only for a layer that `has_rule`.
    """
    return RULES[type(layer)](layer, a.detach(), g, memory)


def _linear(layer: nn.Module, a: Tensor, g: Tensor, memory: int) -> Tensor:
    """Of a Linear layer, with any number of dimensions between the first and the last."""
    a, g = a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    t, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    total = _square(g.sum(1)) if layer.bias is not None else 0
    if t == 1:
        return total + _square(a) * _square(g)
    if t * (inputs + outputs) < inputs * outputs:
        return total + _split(lambda x, y: _inner(_gram(x), _gram(y)), a, g, memory // (8 * t * t))
    return total + _split(lambda x, y: _square(y.transpose(1, 2) @ x), a, g, memory // (8 * inputs * outputs))


def _convolution(layer: nn.Module, a: Tensor, g: Tensor, memory: int) -> Tensor:
    """Of a Conv1d, Conv2d or Conv3d layer, with groups or without."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    way, room = _way(layer, a, g)
    total = _square(g.flatten(2).sum(2)) if layer.bias is not None else 0
    return total + _split(lambda x, y: way(layer, x, y), a, g, memory // room)


def _way(layer: nn.modules.conv._ConvNd, a: Tensor, g: Tensor) -> tuple[Callable[[nn.modules.conv._ConvNd, Tensor, Tensor], Tensor], int]:
    """The cheapest way for a convolution, and the bytes that it holds for each sample."""
    weights, taps, t = layer.weight.numel(), math.prod(layer.kernel_size), math.prod(g.shape[2:])
    padded = math.prod(s + 2 * p for s, p in zip(a.shape[2:], _margins(layer), strict=True))
    patches, both = taps * layer.in_channels * t, t * t * layer.out_channels
    ways = [(t * weights, _written_out, 8 * (weights + a[0].numel() + g[0].numel()))]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels < FEW:
        ways = [(0, _unfolded, 4 * (patches + weights))]
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        ways.append((patches * (t + MOVED) + both, _from_patches, 4 * (2 * patches + 3 * t * t)))
        if set(layer.stride) == {1}:
            work = padded * padded * layer.in_channels + MOVED * taps * t * t + both
            ways.append((work, _from_shifts, 4 * (padded * padded + 2 * padded * layer.in_channels + 4 * t * t)))
    return min(ways, key=lambda way: way[0])[1:]


def _written_out(layer: nn.modules.conv._ConvNd, a: Tensor, g: Tensor) -> Tensor:
    """From the gradients themselves, of all samples at once: a convolution in which every sample is a group of its own."""
    n, space = len(a), len(layer.kernel_size)
    weight = layer.weight.new_empty((n * layer.out_channels, *layer.weight.shape[1:]))  # only its shape is read
    gradient = torch.ops.aten.convolution_backward(
        g.reshape(1, -1, *g.shape[2:]),
        a.reshape(1, -1, *a.shape[2:]),
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        (0,) * space,
        n * layer.groups,
        (False, True, False),
    )[1]
    return _square(gradient.reshape(n, -1))


def _unfolded(layer: nn.modules.conv._ConvNd, a: Tensor, g: Tensor) -> Tensor:
    """From the gradients themselves, as products of matrices: the patches side by side."""
    assert isinstance(layer, nn.Conv2d)
    patches = F.unfold(a.contiguous(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]  # see has_rule
    return _square(g.flatten(2) @ patches.transpose(1, 2))


def _from_patches(layer: nn.modules.conv._ConvNd, a: Tensor, g: Tensor) -> Tensor:
    """From the inner products of the patches."""
    corners, steps, size = _taps(layer), layer.stride, g.shape[2:]
    image = _padded(layer, a)
    ends = [[c + s * (k - 1) + 1 for c, s, k in zip(corner, steps, size, strict=True)] for corner in corners]
    parts = [image[:, y : y1 : steps[0], x : x1 : steps[1]] for (y, x), (y1, x1) in zip(corners, ends, strict=True)]
    patches = torch.cat(parts, 3) if len(parts) > 1 else parts[0]
    return _inner(_gram(patches.flatten(1, 2)), _gram(_positions(g)))


def _from_shifts(layer: nn.modules.conv._ConvNd, a: Tensor, g: Tensor) -> Tensor:
    """From the inner products of the pixels: those of two patches are the sum over the kernel of those of the pixels under it."""
    image, (h, w) = _padded(layer, a), g.shape[2:]
    pixels = _gram(image.flatten(1, 2)).view(len(a), *image.shape[1:3], *image.shape[1:3])
    (y, x), *others = _taps(layer)
    patches = pixels[:, y : y + h, x : x + w, y : y + h, x : x + w]
    patches = patches.clone() if others else patches
    for y, x in others:
        patches += pixels[:, y : y + h, x : x + w, y : y + h, x : x + w]
    return _inner(patches.reshape(len(a), h * w, h * w), _gram(_positions(g)))


def _taps(layer: nn.modules.conv._ConvNd) -> list[tuple[int, ...]]:
    """Where each weight of a kernel lies, from the corner."""
    return list(itertools.product(*(range(0, k * d, d) for k, d in zip(layer.kernel_size, layer.dilation, strict=True))))


def _margins(layer: nn.modules.conv._ConvNd) -> list[int]:
    """The padding on either side of each dimension."""
    return [int(p) for p in layer.padding]


def _padded(layer: nn.modules.conv._ConvNd, a: Tensor) -> Tensor:
    """Images of shape (n, h, w, c), with the layer's padding."""
    y, x = _margins(layer)
    return F.pad(a.permute(0, 2, 3, 1), (0, 0, x, x, y, y)) if x or y else a.permute(0, 2, 3, 1)


def _positions(g: Tensor) -> Tensor:
    """(n, c, h, w) as (n, h * w, c)."""
    return g.permute(0, 2, 3, 1).flatten(1, 2)


def _batch_norm(layer: nn.Module, a: Tensor, g: Tensor, memory: int) -> Tensor:
    """Of a BatchNorm layer in eval mode."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    shape = (1, -1, *(1,) * (a.ndim - 2))
    normal = (a - layer.running_mean.view(shape)).mul_((layer.running_var + layer.eps).rsqrt().view(shape))
    return _scaled(layer, _by_channel(normal.mul_(g)), _by_channel(g))


def _group_norm(layer: nn.Module, a: Tensor, g: Tensor, memory: int) -> Tensor:
    """Of a GroupNorm layer."""
    assert isinstance(layer, nn.GroupNorm)
    normal = F.group_norm(a, layer.num_groups, eps=layer.eps)
    return _scaled(layer, _by_channel(normal.mul_(g)), _by_channel(g))


def _layer_norm(layer: nn.Module, a: Tensor, g: Tensor, memory: int) -> Tensor:
    """Of a LayerNorm layer."""
    assert isinstance(layer, nn.LayerNorm)
    normal = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    shape = (len(a), -1, math.prod(layer.normalized_shape))
    return _scaled(layer, normal.mul_(g).reshape(shape).sum(1), g.reshape(shape).sum(1))


def _by_channel(x: Tensor) -> Tensor:
    """Sums over all positions: (n, c, ...) to (n, c)."""
    return x.flatten(2).sum(2) if x.ndim > 2 else x


def _scaled(layer: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    """Of a norm layer, from the gradients of its scale and its shift, of which it may lack one or the other."""
    parts = [_square(own) for own, there in ((weight, layer.weight), (bias, layer.bias)) if there is not None]
    return torch.stack(parts).sum(0)


def _gram(x: Tensor) -> Tensor:
    """Inner products of the rows: (n, t, d) to (n, t, t)."""
    return x @ x.transpose(1, 2)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two tensors, sample by sample, that cannot be below zero but for rounding: float64 of shape (n,)."""
    return (x * y).flatten(1).sum(1).double().clamp_(min=0)


def _square(x: Tensor) -> Tensor:
    """Squared norm, sample by sample: float64 of shape (n,)."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.double().square()


def _split(way: Callable[[Tensor, Tensor], Tensor], a: Tensor, g: Tensor, most: int) -> Tensor:
    """`way` of at most so many samples at a time, one at least."""
    most = max(1, most)
    if len(a) <= most:
        return way(a, g)
    return torch.cat([way(x, y) for x, y in zip(torch.split(a, most), torch.split(g, most), strict=True)])


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
