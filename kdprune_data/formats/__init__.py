"""Bytes on disk. `docs/formats.md` is the promise; the modules here keep it, and nothing here imports torch."""
