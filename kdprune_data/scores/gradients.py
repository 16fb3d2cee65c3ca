"""The GraNd score over all parameters: per-sample gradient norms of a whole network, without a backward pass for every sample.

1. One sample is looked at first: which layers it runs through, how often each parameter is used, and how many bytes it keeps.
2. Where a rule of `scores/layers.py` covers every parameter, batches go forward and backward once, with a hook on each layer that turns
   its input and the gradient of its output into the norms of its parameters' gradients: no gradient of a parameter is kept.
3. Other networks (attention, class tokens, layer scale, a layer used twice) go through torch.func's vmap of grad; what that cannot do
   (values that steer the code), sample by sample.

Every way starts backward from the unit vector along softmax(z) - onehot(y) and multiplies its length in afterwards: a gradient of any
size keeps all its digits.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kdprune_data.scores.layers import has_rule, squares

Tensors = dict[str, Tensor]


class _NoRuleError(Exception):
    """A layer was used in a way that its rule does not cover."""


def grand_full(net: nn.Module, images: Tensor, labels: Tensor, *, memory: int = 1_000_000_000) -> Tensor:
    """Norm of the gradient of a sample's cross-entropy with respect to all parameters: float64 of shape (n,), on the CPU. High is hard.

    net: a classifier in eval mode, on its device, to which each sample is independent of the others; images: float of shape (n, 3, s, s),
    normalised; labels: int64 of shape (n,). All parameters count, frozen ones too. Activations and gradients stay within `memory` bytes
    where that is room for one sample. The network is left as it was, and the caller may be in inference mode.

    Raises ValueError for a network in train mode, and what the network raises.
    Source: Paul, Ganguli and Dziugaite, "Deep learning on a data diet", NeurIPS 2021, definition 2.1.
    """
    if net.training:
        raise ValueError("grand_full needs the network in eval mode: call net.eval() first")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        images, labels = _plain(images), _plain(labels.to(images.device))
        if not len(images):
            return torch.zeros(0, dtype=torch.float64)
        one = _Network.of(net)
        look = _look(one, images[:1])
        if look.covered:
            try:
                return _batched(lambda x, y: _by_layers(one, x, y, memory // 4), images, labels, 3 * memory // 4 // look.kept)
            except _NoRuleError:
                pass
        size = sum(p.nbytes for p in one.parameters.values())
        try:
            return _batched(lambda x, y: _by_vmap(one, x, y), images, labels, memory // (2 * (look.kept + size)))
        except RuntimeError:  # which vmap raises for code that it cannot follow; what is wrong with the network comes up again
            return _batched(lambda x, y: _by_sample(one, x, y), images, labels, 1)


@dataclass(frozen=True)
class _Network:
    """A network whose parameters and buffers are given to it: nothing of its own is touched."""

    net: nn.Module
    parameters: Tensors
    buffers: Tensors

    @classmethod
    def of(cls, net: nn.Module) -> _Network:
        """Its tensors, detached; tied parameters are one."""
        return cls(net, {n: _plain(p) for n, p in net.named_parameters()}, {n: _plain(b) for n, b in net.named_buffers()})

    def __call__(self, images: Tensor, parameters: Tensors | None = None) -> Tensor:
        """Logits, of shape (n, c)."""
        logits: Tensor = functional_call(self.net, (self.parameters if parameters is None else parameters, self.buffers), (images,))
        return logits


def _plain(tensor: Tensor) -> Tensor:
    """Without a gradient, and fit to be saved for a backward pass, which tensors made in inference mode are not."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _batched(way: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, most: int) -> Tensor:
    """`way` of at most so many samples at a time, one at least, in parts of about one size."""
    count = -(-len(images) // max(1, most))
    parts = [way(x, y).cpu() for x, y in zip(images.tensor_split(count), labels.tensor_split(count), strict=True)]
    return torch.cat(parts)


def _start(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the cross-entropies with respect to the logits, as unit vectors of shape (n, c), and their lengths, (n,)."""
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # which mps does not have
    others = torch.softmax(logits.detach().to(exact), 1).scatter(1, labels[:, None], 0.0)
    # 1 - p of the label, as the sum of the others: exact where p is all but 1.
    error = others.scatter(1, labels[:, None], -others.sum(1, keepdim=True))
    length = torch.linalg.vector_norm(error, dim=1)
    return (error / length.clamp(min=torch.finfo(exact).tiny)[:, None]).to(logits.dtype), length


@dataclass(frozen=True)
class _Look:
    """What one sample's way through the network shows: whether rules cover every parameter, and the bytes that are kept for backward."""

    covered: bool
    kept: int


def _look(one: _Network, image: Tensor) -> _Look:
    leaves = {name: p.detach().requires_grad_() for name, p in one.parameters.items()}
    own = {p.untyped_storage().data_ptr() for p in leaves.values()}
    kept: dict[int, int] = {}
    calls: Counter[nn.Module] = Counter()
    strange: set[nn.Module] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def called(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[layer] += 1
        if len(inputs) != 1 or len(inputs[0]) != 1 or len(output) != 1:
            strange.add(layer)

    ruled = [layer for layer in one.net.modules() if has_rule(layer)]
    with _hooked(ruled, called), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = one(image, leaves)
    uses = _uses(logits)
    fit = {layer for layer in ruled if calls[layer] == 1 and layer not in strange}
    owners = {name: one.net.get_submodule(name.rpartition(".")[0]) for name in leaves}
    covered = all(uses[leaf] == 0 or (uses[leaf] == 1 and owners[name] in fit) for name, leaf in leaves.items())
    sizes = [size for place, size in kept.items() if place not in own]
    # Beside what is kept, a few gradients of activations live at a time.
    return _Look(covered, 1 + sum(sizes) + 3 * max(sizes, default=0))


def _uses(logits: Tensor) -> Counter[Tensor]:
    """How often each leaf enters the graph behind the logits."""
    counts: Counter[Tensor] = Counter()
    seen, todo = set(), [logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                counts[leaf] += 1
            else:
                todo.append(following)
    return counts


@contextmanager
def _hooked(layers: list[nn.Module], hook: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]) -> Iterator[None]:
    """`hook(layer, inputs, output)` after each layer's forward, taken off in any case."""
    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Tape:
    """Adds up the squared norms of a batch of n samples, layer by layer, while the gradient comes back."""

    n: int
    memory: int
    total: Tensor
    inputs: dict[nn.Module, tuple[Tensor, int]] = field(default_factory=dict)

    def forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Keep what a layer read, and wait for the gradient of what it said."""
        if layer in self.inputs or len(inputs) != 1 or len(inputs[0]) != self.n or len(output) != self.n:
            raise _NoRuleError
        self.inputs[layer] = inputs[0], inputs[0]._version
        if not output.requires_grad:
            # The first layer: here the graph begins. A copy, because what follows may change it in place, which leaves forbid.
            output = output.requires_grad_().clone()
        output.register_hook(lambda gradient: self.backward(layer, gradient))  # type: ignore[no-untyped-call]  # torch's own lacks types
        return output

    def backward(self, layer: nn.Module, gradient: Tensor) -> None:
        """Add a layer's part, and let its input go."""
        a, version = self.inputs[layer]
        if a._version != version:  # changed in place after the layer read it
            raise _NoRuleError
        self.inputs[layer] = a.new_empty(0), version
        self.total += squares(layer, a, gradient, memory=self.memory)


def _by_layers(one: _Network, images: Tensor, labels: Tensor, memory: int) -> Tensor:
    """Through the rules of the layers. Raises _NoRuleError where one does not fit."""
    tape = _Tape(len(images), memory, torch.zeros(len(images), dtype=torch.float64, device=images.device))
    with _hooked([layer for layer in one.net.modules() if has_rule(layer)], tape.forward):
        logits = one(images)
    unit, length = _start(logits, labels)
    if logits.requires_grad:
        torch.autograd.backward(logits, unit)
    return length * tape.total.sqrt()


def _by_vmap(one: _Network, images: Tensor, labels: Tensor) -> Tensor:
    """Through the gradients of every sample, all at once. Raises RuntimeError for code that vmap cannot follow."""

    def start(parameters: Tensors, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits = one(image[None], parameters)
        unit, length = _start(logits, label[None])
        return (unit * logits).sum(), length[0]

    with warnings.catch_warnings():
        # torch's own note on operations that it takes one sample at a time: nothing that the caller could change.
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented", UserWarning)
        found, length = vmap(grad(start, has_aux=True), in_dims=(None, 0, 0))(one.parameters, images, labels)
    whole: Tensor = length * _together([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in found.values()])
    return whole


def _by_sample(one: _Network, images: Tensor, labels: Tensor) -> Tensor:
    """Through a backward pass for a single sample."""
    leaves = {name: p.detach().requires_grad_() for name, p in one.parameters.items()}
    logits = one(images, leaves)
    unit, length = _start(logits, labels)
    found = torch.autograd.grad(logits, list(leaves.values()), unit, allow_unused=True)
    return length * _together([torch.linalg.vector_norm(g)[None] for g in found if g is not None])


def _together(norms: list[Tensor]) -> Tensor:
    """The norm of the whole from those of its parts, each of shape (n,)."""
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
    return whole
