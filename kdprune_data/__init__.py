"""The parts of kdprune-data, importable one by one; nothing heavy is loaded until it is used."""

from __future__ import annotations

from kdprune_data._version import __version__

__all__ = ["__version__"]
