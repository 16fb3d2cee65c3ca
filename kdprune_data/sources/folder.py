"""A folder of class folders: `CLASS/anything/image.jpg`. Classes are the first-level folder names, sorted.

A first-level folder that is empty is a class without samples; one that holds only files of another kind is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdprune_data.errors import SourceError
from kdprune_data.formats.members import classes_of
from kdprune_data.sources.base import Item, Outline, is_utf8, key_of, listing, outlined

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


class FolderSource:
    """Images under class folders, in the order of their paths."""

    name = "folder"
    shuffles = True
    notes: Sequence[str] = ()

    def __init__(self, root: Path, train: Sequence[str] = ()) -> None:
        self.root = root
        self.train = train

    @cached_property
    def _walk(self) -> tuple[list[tuple[str, int]], list[str]]:
        """(relative path, bytes) of every image file, and the other files; hidden files and folders are left alone.

        Raises SourceError for a folder that cannot be listed.
        """
        found: list[tuple[str, int]] = []
        others: list[str] = []
        for here, folders, files in os.walk(self.root, followlinks=True, onerror=_refuse):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and not _is_loop(here, f))
            for file in files:
                path = Path(here, file)
                relative = path.relative_to(self.root).as_posix()
                if file.startswith("."):
                    continue
                if path.suffix.lower() in IMAGES:
                    found.append((relative, _size(path)))
                else:
                    others.append(relative)
        if not found:
            raise SourceError(f"{self.root} holds no image (.jpg .jpeg .png .webp): give a folder with a folder per class")
        loose = [path for path, _ in found if "/" not in path]
        if loose:
            raise SourceError(f"{self.root / loose[0]} is in no class folder ({len(loose):,} such): move images into CLASS/ folders")
        return sorted(found), sorted(others)

    @property
    def _files(self) -> list[tuple[str, int]]:
        return self._walk[0]

    @property
    def left_out(self) -> Sequence[str]:
        """See `Source`."""
        return self._walk[1]

    @cached_property
    def _empty(self) -> list[str]:
        """The first-level folders in which no file stands, sorted."""
        filled = {path.split("/", 1)[0] for path in [*(path for path, _ in self._files), *self.left_out]}
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in filled)

    @cached_property
    def _own(self) -> Sequence[str]:
        """The names of the class folders, sorted."""
        found = sorted({_class_of(path) for path, _ in self._files} | {_class_of(name) for name in self._empty})
        for name in found:
            if not is_utf8(name):
                raise SourceError(f"{self.root} has the class folder {name!r}, whose name is not UTF-8: rename it")
        return found

    @property
    def classes(self) -> Sequence[str]:
        """The names of the class folders, sorted; or train's classes, where those are among them."""
        return classes_of(self._own, self.train)

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        files = listing([*self._files, *((f"{name}/", 0) for name in self._empty)])
        taken = {} if list(self.classes) == list(self._own) else {"classes": list(self.classes)}
        return {"source": self.name, "source_files": files} | taken

    def __len__(self) -> int:
        return len(self._files)

    @property
    def bytes(self) -> int:
        """Bytes of all image files."""
        return sum(size for _, size in self._files)

    @cached_property
    def outline(self) -> Outline:
        """See `Source`."""
        numbers = {name: n for n, name in enumerate(self.classes)}
        labels = np.asarray([numbers[_class_of(path)] for path, _ in self._files], np.int32)
        return outlined((key_of(path) for path, _ in self._files), labels, self._named)

    def _named(self, row: int) -> tuple[str, str]:
        path = self._files[row][0]
        return str(self.root / path), key_of(path)

    def __iter__(self) -> Iterator[Item]:
        for (relative, _), label in zip(self._files, self.outline.labels, strict=True):
            path = self.root / relative
            yield Item(key_of(relative), path.read_bytes(), int(label), str(path))


def _is_loop(here: str, folder: str) -> bool:
    """Whether a folder is a link to one that was passed on the way to it, or that one of these lies in."""
    path = Path(here, folder)
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(passed.resolve().is_relative_to(target) for passed in (Path(here), *Path(here).parents))


def _refuse(error: OSError) -> None:
    """What a folder is that cannot be listed: its images would be missing without a word."""
    raise SourceError(f"cannot list {error.filename} ({error.strerror}): let it be read, or move it out of the source") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, RuntimeError):
        raise SourceError(f"{path} is a link to nothing: remove it, or fetch what it names") from None
    except PermissionError as error:  # in a folder that may be listed and not entered
        raise SourceError(f"cannot read {path} ({error.strerror}): let its folder be entered, or move it out of the source") from None


def _class_of(path: str) -> str:
    """The class folder's name, as UTF-8 whatever the locale says."""
    return os.fsencode(path.split("/", 1)[0]).decode("utf-8", "surrogateescape")
