"""What exact gradient norms over all parameters cost, in plain forward passes over the same images.

Beside `grand_full` run, in the same rounds, where they are asked for: with `--vmap N` torch.func's vmap of grad over the whole batch, N
samples at a time; with `--loop N` a backward pass for each of the first N samples, whose time is scaled to the batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import batch, in_turns, machine, network, ratios, show, timing_parser
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kdprune_data.scores import FROM_MODEL


def forward(net: nn.Module, images: Tensor) -> Tensor:
    """Logits, without gradients."""
    with torch.inference_mode():
        logits: Tensor = net(images)
        return logits


def mapped(net: nn.Module, images: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Norms through vmap(grad), in chunks."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(given: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, given, (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))
    parts = []
    for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
        parts.append(torch.stack([g.flatten(1).square().sum(1) for g in found(parameters, x, y).values()]).sum(0).sqrt())
    return torch.cat(parts)


def looped(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Norms through a backward pass a sample."""
    parameters = list(net.parameters())
    norms = []
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        found = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
        norms.append(torch.stack([g.square().sum() for g in found]).sum().sqrt())
    return torch.stack(norms)


def main() -> None:
    made = timing_parser(__doc__.partition("\n")[0] if __doc__ else "")
    made.add_argument("--memory", type=int, default=1_000_000_000, help="Bytes that grand_full may take.")
    made.add_argument("--vmap", type=int, default=0, help="Samples at a time of vmap; 0: leave it out.")
    made.add_argument("--loop", type=int, default=0, help="Samples of the naive loop; 0: leave it out.")
    made.set_defaults(rounds=5, n=128)
    asked = made.parse_args()
    about = machine(asked.threads) | {"n": asked.n, "rounds": asked.rounds, "time": "processor" if asked.cpu else "clock"}
    rows: list[dict[str, Any]] = []
    for name in asked.models:
        for classes in asked.classes:
            net, (images, labels) = network(name, classes, asked.size), batch(asked.n, classes, asked.size)
            loops: dict[str, Callable[[], object]] = {
                "forward": lambda net=net, x=images: forward(net, x),
                "grand_full": lambda net=net, x=images, y=labels: FROM_MODEL["grand_full"](net, x, y, memory=asked.memory),
            }
            if asked.vmap:
                loops["vmap"] = lambda net=net, x=images, y=labels: mapped(net, x, y, asked.vmap)
            if asked.loop:
                loops["loop"] = lambda net=net, x=images[: asked.loop], y=labels[: asked.loop]: looped(net, x, y)
            seconds = in_turns(loops, asked.rounds, cpu=asked.cpu)
            if asked.loop:
                seconds["loop"] = [s * asked.n / asked.loop for s in seconds["loop"]]
            row: dict[str, Any] = {"model": name, "classes": classes, "size": asked.size}
            row["forward, s"] = statistics.median(seconds["forward"])
            rows.append(row | {f"{n} / forward": r for n, r in ratios(seconds, "forward").items() if n != "forward"})
    show(rows, about, as_json=asked.json)


if __name__ == "__main__":
    main()
