"""What all the scores that are read from outputs cost together, in plain forward passes over the same images.

Two loops, in turns: the plain one runs the network; the scoring one also takes the embedding and the logits, and computes every score of
`FROM_OUTPUTS`, as the command `score` does for one network.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import batch, in_turns, machine, network, ratios, show, timing_parser
from torch import Tensor, nn

from kdprune_data.learn.models import features
from kdprune_data.scores import FROM_OUTPUTS, Outputs


def plain(net: nn.Module, images: Tensor) -> Tensor:
    """The loop to compare with."""
    with torch.inference_mode():
        logits: Tensor = net(images)
        return logits


def scored(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same, and all scores from outputs."""
    with torch.inference_mode():
        embedding, logits = features(net, images)
        out = Outputs(logits, labels, embedding)
        return {name: score(out).float() for name, score in FROM_OUTPUTS.items()}


def main() -> None:
    asked = timing_parser(__doc__.partition("\n")[0] if __doc__ else "").parse_args()
    about = machine(asked.threads) | {"n": asked.n, "rounds": asked.rounds, "time": "processor" if asked.cpu else "clock"}
    rows: list[dict[str, Any]] = []
    for name in asked.models:
        for classes in asked.classes:
            net, (images, labels) = network(name, classes, asked.size), batch(asked.n, classes, asked.size)
            loops = {
                "plain": lambda net=net, x=images: plain(net, x),
                "scored": lambda net=net, x=images, y=labels: scored(net, x, y),
            }
            seconds = in_turns(loops, asked.rounds, cpu=asked.cpu)
            row: dict[str, Any] = {"model": name, "classes": classes, "size": asked.size}
            row |= {f"{loop}, s": statistics.median(s) for loop, s in seconds.items()}
            rows.append(row | {"scored / plain": ratios(seconds, "plain")["scored"]})
    show(rows, about, as_json=asked.json)


if __name__ == "__main__":
    main()
