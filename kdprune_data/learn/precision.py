"""Networks that are asked in bf16: half the bytes, and on processors with its instructions about half the time, for some of the digits.

A copy of a network in eval mode gets its batch norms folded into the convolutions before them and its weights cast; the last layer, and
what it says, stay float32. A network that cannot be folded is cast as it is, and one that cannot be cast runs under autocast: which way
goes is found out on two made-up images, and said.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdprune_data.errors import UsageError, first_line
from kdprune_data.learn.heads import head

FOLDED_WITHIN = 1e-3
"""Folding changes the last digits of what a network says; more than this share of its largest number is another network."""


class Cast(nn.Module):
    """A network of which all but the last layer was cast. Images float32 in, logits float32 out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.to(torch.bfloat16))
        return logits.float()


class Autocast(nn.Module):
    """A network whose layers choose. Images float32 in, logits float32 out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = self.net(images)
        return logits.float()


def in_bf16(net: nn.Module, *, size: int, device: torch.device, tell: Callable[[str], None]) -> nn.Module:
    """A network in eval mode, on the device, that says in bf16 what another says; that one is left as it is.

    size: of the images' sides, in pixels; tell: gets a line where it is not done the fast way. Raises UsageError where it cannot be done.
    """
    exact = _on(copy.deepcopy(net), device)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(device, memory_format=torch.channels_last)
    error = ""
    with torch.no_grad():  # not inference_mode, whose tensors could not be moved after it
        said = exact(images)
        for make, less in _ways(exact, images, said):
            try:
                found = _on(make(), device)
                if found(images).shape != said.shape:
                    raise ValueError("its output has another shape")
            except Exception as failed:  # it may be anybody's network, and raise anything
                error = f"{type(failed).__name__}: {first_line(failed)}"
                continue
            if less:
                tell(f"{type(net).__name__} in bf16: {less}")
            return found
    raise UsageError(f"{type(net).__name__} does not run in bf16 ({error}): leave out --precision bf16")


def _on(net: nn.Module, device: torch.device) -> nn.Module:
    return net.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it


def _ways(exact: nn.Module, images: Tensor, said: Tensor) -> Iterator[tuple[Callable[[], nn.Module], str]]:
    """How a network can be run, the fastest first, and what is said of those that are less than that."""

    def folded() -> nn.Module:
        found = fold(exact)
        if not torch.allclose(found(images), said, rtol=0, atol=FOLDED_WITHIN * float(said.abs().max())):
            raise ValueError("folded it says something else")
        return cast(found)

    yield folded, ""
    normed = any(type(module) is nn.BatchNorm2d for module in exact.modules())
    yield lambda: cast(exact), "its batch norms stay as they are, for they cannot be folded" if normed else ""
    yield lambda: Autocast(exact), "under autocast, for its weights cannot be cast"


def cast(net: nn.Module) -> Cast:
    """A copy in bf16 but for the layer that makes the logits, where there is one: it stays float32."""
    made = copy.deepcopy(net)
    try:
        last = head(made)
    except UsageError:  # it ends in something else
        return Cast(made.to(torch.bfloat16))
    exact = copy.deepcopy(last.state_dict())
    made.to(torch.bfloat16)
    last.float().load_state_dict(exact)
    last.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return Cast(made)


def fold(net: nn.Module) -> nn.Module:
    """A copy of a network in eval mode in which each batch norm that alone reads a convolution's output is part of that convolution.

    Raises what torch.fx raises for code that it cannot follow.
    """
    traced = fx.symbolic_trace(copy.deepcopy(net))
    modules = dict(traced.named_modules())
    called = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for norm in list(traced.graph.nodes):
        before = norm.args[0] if norm.args else None
        if not (isinstance(before, fx.Node) and norm.op == before.op == "call_module" and len(before.users) == 1):
            continue
        conv, bn = modules[str(before.target)], modules[str(norm.target)]
        if type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d and called[norm.target] == called[before.target] == 1:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(conv, bn))
            norm.replace_all_uses_with(before)
            traced.graph.erase_node(norm)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
