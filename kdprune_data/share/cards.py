"""`README.md` of a data set: a card whose YAML head makes the folder readable by `datasets.load_dataset(FOLDER)`.

Without `configs` that loader would take the Parquet files beside the tars for the data; without `dataset_info.features` it would guess the
columns from the first samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPLITS = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Card:
    """What a card says. `split`: train, val or test; `images`: the image members' extensions (none: the shards lie elsewhere, and no loader
    is told of them); `labelled`: some samples have a class; `note`: a sentence on where it came from."""

    title: str
    split: str
    images: Sequence[str]
    labelled: bool
    note: str = ""


def dataset_card(card: Card, counts: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The text of a card; counts and classes are the manifest's."""
    shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20:,} more" if len(classes) > 20 else "")
    note = f"\n\n{card.note}" if card.note else ""
    return f"""{card_head(card) if card.images else ""}# {card.title}

{counted(counts["samples"], "sample")} in {counted(counts["shards"], "WebDataset shard")}, {counted(len(classes), "class")}: {shown}.{note}

`sha256sum -c SHA256SUMS` checks the shards without any tool of ours; `kdprune-data verify .` checks everything, and
`kdprune-data info .` tells where it came from.
"""


def counted(n: int, what: str) -> str:
    """`1 sample`, `2 classes`."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{n:,} {what if n == 1 else plural}"


def card_head(card: Card, more: str = "") -> str:
    """The YAML. A sample that lacks one of the columns has null there. more: lines of further columns."""
    columns = [("__key__", "string"), ("__url__", "string"), *((image, "image") for image in card.images)]
    columns += [("cls", "int64")] if card.labelled else []
    features = "\n".join(f"  - name: {json.dumps(name)}\n    dtype: {kind}" for name, kind in columns)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: {SPLITS.get(card.split, "train")}
    path: "shard-*.tar"
dataset_info:
  features:
{features}
{more}---
"""
