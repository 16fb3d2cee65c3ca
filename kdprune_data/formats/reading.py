"""A tar's bytes, slice by slice from the file: for what reads few of them, or must not count a mapped file as its memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from kdprune_data.errors import SourceError


class TarFile:
    """A file opened for reading in slices. A slice costs a system call; the first touch of a mapped page costs more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._file).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        """Raises SourceError where the file has become shorter."""
        start, stop, _ = part.indices(self._size)
        found = os.pread(self._file, max(0, stop - start), start)
        return found if len(found) >= stop - start else self._rest(found, start, stop)

    def _rest(self, found: bytes, start: int, stop: int) -> bytes:
        """One call reads at most 2 GiB."""
        parts = [found]
        at = start + len(found)
        while at < stop:
            parts.append(os.pread(self._file, stop - at, at))
            if not parts[-1]:
                raise SourceError(f"{self._path} changed while it was read: it ends at byte {at:,}, before {stop:,}; import it again")
            at += len(parts[-1])
        return b"".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
