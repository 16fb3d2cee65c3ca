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
    """What a card says. `image`: the image members' extension; `split`: train, val or test; `note`: a sentence on where it came from."""

    title: str
    split: str
    image: str
    labelled: bool
    note: str = ""


def dataset_card(card: Card, counts: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The text of a card; counts and classes are the manifest's."""
    columns = [("__key__", "string"), ("__url__", "string"), (card.image, "image")] + ([("cls", "int64")] if card.labelled else [])
    features = "\n".join(f"  - name: {json.dumps(name)}\n    dtype: {kind}" for name, kind in columns)
    shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20:,} more" if len(classes) > 20 else "")
    note = f"\n\n{card.note}" if card.note else ""
    return f"""---
configs:
- config_name: default
  data_files:
  - split: {SPLITS.get(card.split, "train")}
    path: "shard-*.tar"
dataset_info:
  features:
{features}
---
# {card.title}

{counts["samples"]:,} samples in {counts["shards"]:,} WebDataset shards, {len(classes):,} classes: {shown}.{note}

`sha256sum -c SHA256SUMS` checks the shards without any tool of ours; `kdprune-data verify .` checks everything, and
`kdprune-data info .` tells where it came from.
"""
