"""`README.md` of a data set: a card whose YAML head makes the folder readable by `datasets.load_dataset(FOLDER)`.

Without `configs` that loader would take the Parquet files beside the tars for the data; without `dataset_info.features` it would guess the
columns from the first samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SPLITS = {"train": "train", "val": "validation", "test": "test"}


def dataset_card(*, title: str, split: str, image: str, labelled: bool, counts: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The card's text. `image` is the image members' extension, `split` train, val or test."""
    columns = [("__key__", "string"), ("__url__", "string"), (image, "image")] + ([("cls", "int64")] if labelled else [])
    features = "\n".join(f"  - name: {json.dumps(name)}\n    dtype: {kind}" for name, kind in columns)
    shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20:,} more" if len(classes) > 20 else "")
    return f"""---
configs:
- config_name: default
  data_files:
  - split: {SPLITS.get(split, "train")}
    path: "shard-*.tar"
dataset_info:
  features:
{features}
---
# {title}

{counts["samples"]:,} samples in {counts["shards"]:,} WebDataset shards, {len(classes):,} classes: {shown}.

`sha256sum -c SHA256SUMS` checks the shards without any tool of ours; `kdprune-data verify .` checks everything, and
`kdprune-data info .` tells where it came from.
"""
