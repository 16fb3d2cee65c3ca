"""Files that are there whole or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kdprune_data.errors import ExistsError, KdpruneError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a write for which there is no room name the file: the system's own does not."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write beside the final name, then rename. `durable`: on the disk when this returns. Where it fails, nothing is left."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), beside.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
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


def make_folder(folder: Path) -> list[Path]:
    """Make a folder two levels inside an artefact; returns the folders around the artefact that had to be made, the innermost first.

    Raises KdpruneError where nothing can be written.
    """
    artefact = folder.parent.parent
    made = [parent for parent in artefact.absolute().parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(made)
        raise KdpruneError(f"cannot write in {artefact}: {error.strerror}; choose another --out") from None
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def lock(folder: Path) -> int:
    """Become the one process that writes. Raises ExistsError when another is."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(handle), (folder / "lock").stat()
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):  # whoever held it has finished, and made it anew
            raise BlockingIOError
    except OSError:
        os.close(handle)
        raise ExistsError(f"another process is writing {folder.parent}: wait for it, or choose another --out") from None
    return handle
