"""`README.md` of an export: what it is, where it comes from, and the Python that reads it and trains, with webdataset and torch alone.

The code in it is run by a test, as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdprune_data.formats.members import root_config
from kdprune_data.share.cards import Card, card_head, counted

ANY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
"""A normalisation for logits whose teacher is not known."""
TEMPERATURE = 4.0
Described = Mapping[str, Any]
"""An artefact as an input of a manifest describes it."""


@dataclass(frozen=True)
class ExportCard:
    """What the text is made from. `data`, `cache` and `teachers`: as a manifest's inputs describe them; `images`: the image members'
    extensions; `dtype`: of the logits; `temperatures`: the lowest and the highest that the logits hold for, None: any."""

    title: str
    data: Described
    cache: Described
    teachers: Sequence[Described]
    images: Sequence[str]
    dtype: str
    temperatures: tuple[float, float] | None = None
    classes: Sequence[str] = field(default=())

    @property
    def policy(self) -> Described:
        """What the views look like."""
        found: Described = self.cache["config"]["policy"]
        return found

    @property
    def temperature(self) -> float:
        """One that the logits hold for."""
        low, high = self.temperatures or (TEMPERATURE, TEMPERATURE)
        return min(max(TEMPERATURE, low), high)


def export_card(card: ExportCard, counts: Mapping[str, Any]) -> str:
    """The text; counts are the manifest's."""
    shown = ", ".join(card.classes[:20]) + (f" and {len(card.classes) - 20:,} more" if len(card.classes) > 20 else "")
    images = " or ".join(f"`KEY.{extension}`" for extension in card.images)
    unlabelled = counts["samples"] - counts["labelled"]
    label = "no class" if not counts["labelled"] else "its class number, `KEY.cls`" + (f" ({unlabelled:,} have none)" if unlabelled else "")
    side, views = card.policy["size"], counts["views"]
    return f"""{_head(card, views, labelled=counts["labelled"] > 0)}# {card.title}

{counted(counts["samples"], "sample")} in {counted(counts["shards"], "WebDataset shard")}, {counted(len(card.classes), "class")}: {shown}.
Each sample has its image, {images}, {label}, and in `KEY.kd.npz` what a teacher said of {counted(views, "view")} of it:
students are trained on these soft labels without the teacher. Class names stand in label order in `manifest.json`, under `classes`.

`KEY.kd.npz` is read by numpy with `allow_pickle=False`:

| array | dtype, shape | |
|---|---|---|
| `logits` | {card.dtype} ({views}, {len(card.classes)}) | the teacher's logits of each view, less the largest of them |
| `boxes` | int16 ({views}, 4) | of each view top, left, height and width, in the image's pixels; outside it, pixels are zero |
| `flip` | bool ({views},) | whether it is mirrored, left to right |

A view is the box cut out of the image, mirrored if `flip`, and, where it is not {side} x {side}, resized to that (bilinear, antialiased).
The logits belong to exactly these pixels: show a student the views that are here, in turn, and no other augmentation that moves pixels.

## Read it, and train

```python
{_code(card, labelled=not unlabelled)}```

## Where it comes from

{chr(10).join(_lineage(card))}

`datasets.load_dataset` reads this folder too. `sha256sum -c SHA256SUMS` checks the shards without any tool of ours; `kdprune-data verify .`
checks everything, and `kdprune-data info .` tells more of where it came from.
"""


def _head(card: ExportCard, views: int, *, labelled: bool) -> str:
    """The YAML by which `datasets.load_dataset(FOLDER)` reads the shards: it fails over an .npz whose arrays it is not told of."""
    arrays = [("logits", len(card.classes), card.dtype), ("boxes", 4, "int32")]
    columns = "".join(
        f"    - name: {name}\n      dtype:\n        array2_d:\n          shape: [{views}, {width}]\n          dtype: {dtype}\n"
        for name, width, dtype in arrays
    )
    soft = f"  - name: kd.npz\n    struct:\n{columns}    - name: flip\n      list: bool\n"
    return card_head(Card(card.title, str(root_config(card.data).get("split", "train")), card.images, labelled), soft)


def _code(card: ExportCard, *, labelled: bool) -> str:
    """The Python of the card: with the class in the loss only where every sample has one."""
    side, classes = card.policy["size"], len(card.classes)
    known = [one["config"]["normalisation"] for one in card.teachers if one["config"].get("normalisation")]
    normalisation = known[0] if known else ANY
    one = f'sample["{card.images[0]}"]' if len(card.images) == 1 else f"next(sample[k] for k in {tuple(card.images)!r} if k in sample)"
    image = one.replace("'", '"')
    label, labels = (', sample["cls"]', "label, ") if labelled else ("", "")
    loss = "0.1 * cross_entropy(out, label) + 0.9 * soft" if labelled else "soft"
    hard = "cross_entropy, " if labelled else ""
    return f"""\
from glob import glob

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch.nn.functional import {hard}kl_div, log_softmax

mean, std = np.float32({normalisation["mean"]}), np.float32({normalisation["std"]})
tau = {card.temperature:g}


def view(sample, epoch=0):
    kd = sample["kd.npz"]  # already arrays: .decode() has read it
    v = epoch % len(kd["flip"])
    top, left, height, width = kd["boxes"][v].tolist()
    crop = {image}.crop((left, top, left + width, top + height))  # zeros outside the image
    crop = (ImageOps.mirror(crop) if kd["flip"][v] else crop).resize(({side}, {side}), Image.BILINEAR)
    return ((np.asarray(crop) / np.float32(255) - mean) / std).transpose(2, 0, 1){label}, kd["logits"][v].astype(np.float32)


model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * {side} * {side}, {classes}))  # or yours
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
samples = wds.WebDataset(sorted(glob("shard-*.tar")), shardshuffle=False).shuffle(1000).decode("pil")
for epoch in range(1):
    for batch in samples.map(lambda sample: view(sample, epoch)).batched(128):
        image, {labels}teacher = map(torch.as_tensor, batch)
        out = model(image)
        soft = tau**2 * kl_div(log_softmax(out / tau, 1), log_softmax(teacher / tau, 1), reduction="batchmean", log_target=True)
        loss = {loss}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


def _lineage(card: ExportCard) -> Iterator[str]:
    """Lines of the last part."""
    whole = ""
    for parent in _parents(card.data):
        whole += f", of {parent['kind']} `{parent['name']}`"
    yield f"- Samples: {card.data['kind']} `{card.data['name']}`{whole}. Content `{card.data['content']}`."
    for one in card.teachers:
        config = one["config"]
        model = config.get("architecture", {}).get("name", "a network")
        yield f"- Teacher: `{one['name']}`, {model}, digest `{one['digest']}`."
        if normalisation := config.get("normalisation"):
            mean, std = (", ".join(f"{v:g}" for v in normalisation[key]) for key in ("mean", "std"))
            yield f"  It saw pixels in [0, 1], less the mean ({mean}), over the deviation ({std}) of each channel."
    if not card.teachers:
        yield "- Teacher: not known; the logits came from elsewhere."
    if card.temperatures is None:
        yield "- Temperatures: the logits hold for any."
    else:
        low, high = card.temperatures
        between = f"for {low:g} alone" if low == high else f"from {low:g} to {high:g}"
        yield f"- Temperatures: the logits hold {between}; train at {'it' if low == high else 'one of these'}."
    how = ", ".join(f"{key} {json.dumps(value)}" for key, value in card.policy.items() if key not in ("version", "kind"))
    yield f"- Views: `{card.policy['kind']}` ({how}), from logit cache `{card.cache['name']}`, digest `{card.cache['digest']}`."


def _parents(described: Described) -> Iterator[Described]:
    """The data sets and subsets that one was chosen from, the nearest first."""
    for one in described["inputs"]:
        if one["role"] == "data":
            yield one
            yield from _parents(one)
