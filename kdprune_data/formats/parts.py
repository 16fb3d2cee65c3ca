"""The finished files of a folder in the making, each with a note in `.partial/parts/`: what an interrupted run leaves to the next.

A note holds the file's path, bytes and sha256, and facts of its maker. A file is trusted only if it is there with that size and digest.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from kdprune_data.formats import journal
from kdprune_data.formats import manifest as m
from kdprune_data.formats.atomic import write_whole
from kdprune_data.formats.manifest import PARTIAL, File

FOLDER = "parts"


class Parts:
    """The finished files of one folder. `kept`: those of a finished artefact that is taken up again. May be used by several threads."""

    def __init__(self, folder: Path, kept: Sequence[File] = ()) -> None:
        self._folder = folder
        self._found: dict[str, tuple[File, dict[str, Any]]] = {f.path: (f, {}) for f in kept}
        self._mutex = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def load(self) -> None:
        """Take over what an earlier run finished; what is not as it was noted goes."""
        for note in self._notes():
            found = _read(note)
            if found is not None and _is_whole(self._folder, found[0]):
                self._found[found[0].path] = found
            else:
                self._drop(note)

    def forget(self) -> None:
        """Remove all that is noted: nothing tells what it was to become."""
        for note in self._notes():
            self._drop(note)

    def facts(self, path: str) -> dict[str, Any] | None:
        """The facts noted with a finished file, or None where there is none."""
        part = self._found.get(path)
        return None if part is None else part[1]

    def note(self, file: File, facts: dict[str, Any]) -> None:
        """Note a file that is about to get its name: so that none stands there that nothing tells of."""
        body = {"path": file.path, "bytes": file.bytes, "sha256": file.sha256, "facts": facts}
        write_whole(self._note_of(file.path), m.canonical(body))

    def add(self, file: File, facts: dict[str, Any]) -> None:
        """A file that was noted has its name."""
        with self._mutex:
            self._found[file.path] = (file, facts)

    def keep_only(self, paths: Iterable[str]) -> None:
        """Remove finished files that are not among these, and their notes."""
        wanted = set(paths)
        for path in [p for p in self._found if p not in wanted]:
            (self._folder / path).unlink(missing_ok=True)
            self._note_of(path).unlink(missing_ok=True)
            del self._found[path]

    def files(self) -> list[File]:
        """The finished files, by path."""
        return [self._found[path][0] for path in sorted(self._found)]

    def _notes(self) -> list[Path]:
        return sorted((self._folder / PARTIAL / FOLDER).glob("*.json"))

    def _note_of(self, path: str) -> Path:
        return self._folder / PARTIAL / FOLDER / (quote(path, safe="") + ".json")

    def _drop(self, note: Path) -> None:
        """Remove a part and its note; a file that a finished artefact has is no part."""
        path = _path_of(note)
        if path is not None and path not in self._found and path != journal.NAME:
            (self._folder / path).unlink(missing_ok=True)
        note.unlink()


def _path_of(note: Path) -> str | None:
    """The path that a part's note is of, by its name; None where it leads out of the folder."""
    path = unquote(note.name.removesuffix(".json"))
    return None if Path(path).is_absolute() or ".." in Path(path).parts else path


def _read(note: Path) -> tuple[File, dict[str, Any]] | None:
    """What was noted of a part: the file and its facts; None where the note is torn."""
    try:
        body = json.loads(note.read_bytes())
        facts = body.pop("facts")
        file = File(**body)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (file, facts) if file.path == _path_of(note) and isinstance(facts, dict) else None


def _is_whole(folder: Path, part: File) -> bool:
    path = folder / part.path
    return path.is_file() and path.stat().st_size == part.bytes and m.sha256_file(path) == part.sha256
