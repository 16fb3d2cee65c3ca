"""The parts of kdprune-data, importable one by one; nothing heavy is loaded until it is used.

`SoftLabelDataset` yields whole training batches with soft labels, for people with their own trainer; `Dataset` reads the samples of a data
set or subset; `LogitCache` reads a teacher's cached logits; `as_webdataset` joins the two into a pipeline of `webdataset`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdprune_data._version import __version__

if TYPE_CHECKING:
    from kdprune_data.formats.dataset import Dataset
    from kdprune_data.formats.logits import LogitCache
    from kdprune_data.learn.loader import SoftLabelDataset
    from kdprune_data.learn.webdataset import as_webdataset

__all__ = ["Dataset", "LogitCache", "SoftLabelDataset", "as_webdataset", "__version__"]

_HOMES = {
    "Dataset": "kdprune_data.formats.dataset",
    "LogitCache": "kdprune_data.formats.logits",
    "SoftLabelDataset": "kdprune_data.learn.loader",
    "as_webdataset": "kdprune_data.learn.webdataset",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
