"""Where labelled images come from: one importer a file, each a `Source` that yields items in the source's own order.

`open_source` decides by what stands at the path: a `.parquet` file or a folder of them, a folder of class folders, or the word `digits`.
"""

from __future__ import annotations

from pathlib import Path

from kdprune_data.errors import UsageError
from kdprune_data.sources.base import Item, Source, SourceOptions

__all__ = ["Item", "Source", "SourceOptions", "open_source"]


def open_source(where: str, options: SourceOptions) -> Source:
    """The source at a path. Raises UsageError when there is nothing that can be imported."""
    if where == "digits":
        from kdprune_data.sources.digits import DigitsSource

        return DigitsSource(options.split)
    path = Path(where)
    if not path.exists():
        raise UsageError(f"source {where!r} does not exist: give a Parquet file, a folder of class folders, or the word digits")
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        from kdprune_data.sources.parquet import ParquetSource

        return ParquetSource(path, options)
    if path.is_dir():
        from kdprune_data.sources.folder import FolderSource

        return FolderSource(path, options.train)
    if path.suffix == ".tar":
        raise UsageError(f"source {where!r} is a tar: use `kdprune-data index {where} --out DIR` to take WebDataset shards in place")
    raise UsageError(
        f"source {where!r} is not a kind that can be imported: give a Parquet file, a folder of class folders, or the word digits"
    )
