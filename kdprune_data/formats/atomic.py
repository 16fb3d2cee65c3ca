"""Files that are there whole or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kdprune_data.errors import ExistsError, KdpruneError


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write beside the final name, then rename. `durable`: on the disk when this returns."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    beside.replace(path)
    if durable:
        _fsync_dir(path.parent)


def _fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder two levels inside an artefact. Raises KdpruneError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KdpruneError(f"cannot write in {folder.parent.parent}: {error.strerror}; choose another --out") from None


def lock(folder: Path) -> int:
    """Become the one process that writes. Raises ExistsError when another is."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ExistsError(f"another process is writing {folder.parent}: wait for it, or choose another --out") from None
    return handle
