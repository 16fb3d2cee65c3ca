"""Where labelled images come from: one importer a file, each a `Source` that yields items in the source's own order.

`open_source` decides by what stands there: Parquet files, WebDataset shards, a folder of either, a folder of class folders, or the word
`digits`. Files may be several, of one kind, also as patterns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from kdprune_data.errors import UsageError, some
from kdprune_data.formats.manifest import NAME
from kdprune_data.sources.base import Item, Outline, Source, SourceOptions, numbered
from kdprune_data.sources.patterns import expand

__all__ = ["Item", "Outline", "Source", "SourceOptions", "numbered", "open_source"]

KINDS = {
    "parquet": "Parquet files",
    "webdataset": "WebDataset shards",
    "folder": "a folder of class folders",
    "digits": "scikit-learn's digits",
}
ADVICE = "give Parquet files, WebDataset shards, a folder of class folders, or the word digits"
SUFFIXES = {".parquet": "parquet", ".tar": "webdataset"}
BELONGS = {
    "image_column": "parquet",
    "label_column": "parquet",
    "image_member": "webdataset",
    "label_member": "webdataset",
    "classes": "webdataset",
    "id": "webdataset",
}
"""Options that only one kind of source takes."""
SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(?![^\W\d_])", re.IGNORECASE)
"""How the name of a file begins that holds one split."""


def open_source(where: Sequence[str], options: SourceOptions) -> Source:
    """The source at one or more places. Raises UsageError when there is nothing that can be imported, or things of several kinds."""
    kind = kind_of(where)
    usual = {field.name: field.default for field in fields(SourceOptions)}
    for name, belongs in BELONGS.items():
        if belongs != kind and getattr(options, name) != usual[name]:
            raise UsageError(f"--{name.replace('_', '-')} goes with {KINDS[belongs]}, and the source is {KINDS[kind]}: leave it out")
    if kind == "digits":
        from kdprune_data.sources.digits import DigitsSource

        return DigitsSource(options.split)
    if kind == "folder":
        from kdprune_data.sources.folder import FolderSource

        return FolderSource(Path(where[0]), options.train)
    if kind == "parquet":
        from kdprune_data.sources.parquet import ParquetSource

        return ParquetSource(_files(where, ".parquet"), options)
    from kdprune_data.sources.webdataset import WebDatasetSource

    return WebDatasetSource(_files(where, ".tar"), options)


def kind_of(where: Sequence[str]) -> str:
    """What kind of source stands at the places: `parquet`, `webdataset`, `folder` or `digits`. Raises UsageError for none, or several."""
    kinds = {text: _one_kind(text) for text in where}
    first = next(iter(kinds), "")
    for text, kind in kinds.items():
        if kind != kinds[first]:
            raise UsageError(f"{first} is {KINDS[kinds[first]]}, {text} is {KINDS[kind]}: import sources of one kind at a time")
    if kinds.get(first) in ("folder", "digits") and len(where) > 1:
        raise UsageError(
            f"{some(where)} are several sources, each with classes of its own: import one, or put its class folders into one folder"
        )
    return kinds[first]


def _one_kind(text: str) -> str:
    if text == "digits":
        return text
    if not text:
        raise UsageError(f"a source is named by an empty text: {ADVICE}")
    path = Path(text)
    if path.is_dir():
        return _kind_of_folder(path)
    if path.suffix in SUFFIXES and path.exists():
        return SUFFIXES[path.suffix]
    if path.exists():
        hint = "it is compressed: unpack it (gzip -dk) first" if path.suffix in (".gz", ".tgz", ".zst", ".bz2", ".xz") else ADVICE
        raise UsageError(f"source {text!r} is not a kind that can be imported: {hint}")
    if any(c in text for c in "*?[{"):
        found = {SUFFIXES.get(p.suffix) for p in expand([text])}
        if len(found) == 1 and (kind := found.pop()) is not None:
            return kind
        raise UsageError(f"the pattern {text!r} matches files of several kinds, or of none that can be imported: {ADVICE}")
    raise UsageError(f"source {text!r} does not exist: {ADVICE}")


def _kind_of_folder(path: Path) -> str:
    """Files at the top make it. Raises UsageError for what may be either of two kinds."""
    if (path / NAME).is_file():
        raise UsageError(f"{path} is a finished artefact, no source: use it as it is (--data {path}), or name its shards ('{path}/*.tar')")
    names = [p for p in path.iterdir() if not p.name.startswith(".")]
    tars = any(p.suffix == ".tar" and p.is_file() for p in names)
    if any(p.suffix == ".parquet" for p in names):
        if tars:
            raise UsageError(f"{path} holds Parquet files and tars: name the ones to import, as '{path}/*.tar'")
        return "parquet"
    folders = [p.name for p in names if p.is_dir()]
    if tars and folders:
        advice = f"name the tars to import, as '{path}/*.tar', or move them out of the class folders"
        raise UsageError(f"{path} holds tars and folders ({some(folders)}): {advice}")
    return "webdataset" if tars else "folder"


def _files(where: Sequence[str], suffix: str) -> list[Path]:
    """The files, in order. Raises UsageError where files of several splits were not named one by one: a test set would be trained on."""
    paths = expand(where, suffix)
    splits = sorted({found[1].lower() for p in paths if (found := SPLIT.match(p.name))})
    if len(splits) > 1 and not all(Path(text).is_file() for text in where):
        raise UsageError(
            f"{where[0]} holds files of several splits ({some(splits)}): import one at a time, by its file or a folder of its own"
        )
    return paths
