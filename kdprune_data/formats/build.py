"""A folder in the making: every command that writes an artefact writes it through a `Build`.

1. `Build.begin` looks at the folder. Nothing there: start. The same thing unfinished: continue. The same thing finished: `done` holds its
   manifest. Something else: refuse, saying what differs (or replace it, when asked to).
2. `create` writes one file beside its name, hashes it while it is written, notes it in `.partial/parts/`, and renames it.
   `finished` tells of a file that an earlier, interrupted run left whole.
3. `seal` writes the manifest and removes `.partial/`. Until then nobody takes the folder for an artefact.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from kdprune_data.errors import ExistsError, KdpruneError
from kdprune_data.formats import journal, parts, standing
from kdprune_data.formats import manifest as m
from kdprune_data.formats.atomic import lock, make_folder, naming, remove_empty, write_whole
from kdprune_data.formats.identity import Identity, refuse_other
from kdprune_data.formats.journal import Journal
from kdprune_data.formats.manifest import PARTIAL, File, Manifest
from kdprune_data.formats.parts import Parts

SPOOL = "spool"
"""Scratch that no later run continues from; any other scratch is work."""


class Sink(io.RawIOBase):
    """A binary file that hashes what is written to it, forward only: by `write`, or by `place` and `count`, not by both."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.count(view)
        return len(view)

    def place(self, data: bytes | memoryview, at: int) -> None:
        """Write at a byte of the file, from any thread and in any order: whoever places bytes gives the same ones to `count`, in order."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            view, at = view[written:], at + written

    def count(self, data: bytes | memoryview) -> None:
        """Hash the next bytes of the file, which stand there or are about to."""
        self.hash.update(data)
        self.bytes += len(data)

    def tell(self) -> int:
        return self.bytes


class Build:
    """See the module's text. Not to be shared between processes; `create` and `finished` may be called from threads."""

    def __init__(self, folder: Path, identity: Identity, kept: Sequence[File] = ()) -> None:
        self.folder = folder
        self.identity = identity
        self.done: Manifest | None = None
        self._parts = Parts(folder, kept)
        self._lock: int | None = None
        self._journal: Journal | None = None
        self._around: list[Path] = []
        self._started = time.monotonic()

    @classmethod
    def begin(cls, folder: Path, identity: Identity, *, overwrite: bool = False, append: bool = False) -> Self:
        """Start, continue, or find it done (`append`: a finished one is taken up again to add files).

        Raises ExistsError when the folder holds anything else, or another process is writing it.
        """
        standing.check_name(folder, identity)
        folder = folder.resolve() if folder.is_symlink() else folder  # or a link would be set aside, and not what it names
        standing.check_ours(folder)
        if overwrite and standing.is_to_replace(folder, identity):
            standing.check_replaceable(folder, identity)
            standing.set_aside(folder)
        there = standing.finished(folder, identity)
        if there is not None:
            shutil.rmtree(standing.aside(folder), ignore_errors=True)  # killed between the manifest and this
        if there is not None and not append:
            _clear(folder)
            build = cls(folder, identity)
            build.done = there
            return build
        build = cls(folder, identity, () if there is None else there.files)
        try:
            build._open(there)
        except BaseException:
            build.close()
            if not folder.exists():
                standing.put_back(folder)
            raise
        return build

    @staticmethod
    def look(folder: Path, identity: Identity, *, overwrite: bool = False) -> str:
        """What `begin` would find, without touching anything: `new`, `unfinished`, `finished`, or `replaced`. Raises as `begin` does."""
        standing.check_name(folder, identity)
        standing.check_ours(folder)
        if overwrite and standing.is_to_replace(folder, identity):
            standing.check_replaceable(folder, identity)
            return "replaced"
        if standing.finished(folder, identity) is not None:
            return "finished"
        noted = standing.noted(folder)
        if noted is None:
            return "new"
        refuse_other(folder, noted, identity.to_json(), unfinished=True)
        return "unfinished"

    def _open(self, there: Manifest | None) -> None:
        partial = self.folder / PARTIAL
        self._around = make_folder(partial / parts.FOLDER)
        self._lock = lock(self.folder / PARTIAL)
        if standing.finished(self.folder, self.identity) != there:  # between our look at the folder and this
            raise ExistsError(f"another process has just finished {self.folder}: run the same command again")
        wanted = self.identity.to_json()
        noted = standing.noted(self.folder)
        if noted is None:
            self._forget()
            write_whole(partial / "identity.json", m.canonical(wanted))
        else:
            refuse_other(self.folder, noted, wanted, unfinished=True)
        before, log = self.folder / journal.NAME, partial / journal.NAME
        if before.is_file() and not log.is_file():  # a cache that grows keeps what it said
            write_whole(log, before.read_bytes())
        self._journal = Journal(log)
        self._journal.begin(self.folder, continued=noted is not None)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        self._parts.load()

    def _forget(self) -> None:
        """Nothing tells what the leftovers here were to become: they go."""
        self._parts.forget()
        for path in [p for p in (self.folder / PARTIAL).iterdir() if p.name not in ("lock", parts.FOLDER)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finished(self, path: str) -> dict[str, Any] | None:
        """The facts noted with a file that is already whole, or None."""
        return self._parts.facts(path)

    @contextmanager
    def create(self, path: str, facts: Mapping[str, Any] | None = None) -> Iterator[Sink]:
        """Write one file of the artefact; `facts` (plain JSON) are noted with it and may be filled until the block ends."""
        final = self.folder / path
        beside = final.with_name(f".{final.name}.tmp")
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with naming(final), beside.open("wb") as file:
                sink = Sink(file)
                yield sink
            made, noted = File(path, sink.bytes, sink.hash.hexdigest()), dict(facts or {})
            self._parts.note(made, noted)
            beside.replace(final)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        journal.LOGGER.debug("wrote %s: %s bytes, sha256 %s", final, f"{made.bytes:,}", made.sha256)
        self._parts.add(made, noted)

    def write(self, path: str, data: bytes, facts: Mapping[str, Any] | None = None) -> None:
        """Write one small file."""
        with self.create(path, facts) as sink:
            sink.write(data)

    def scratch(self, name: str) -> Path:
        """A place for work in progress, inside `.partial/`: gone when the artefact is sealed."""
        return self.folder / PARTIAL / name

    def write_scratch(self, name: str, data: bytes) -> None:
        """Write a scratch file whole or not at all."""
        write_whole(self.scratch(name), data)

    def keep_only(self, paths: Iterable[str]) -> None:
        """Drop finished files that are no part of this artefact: left by an interrupted run that was asked for more."""
        self._parts.keep_only({*paths, journal.NAME})

    def files(self) -> list[File]:
        """The files written so far, by path."""
        return self._parts.files()

    def seal(
        self,
        *,
        counts: Mapping[str, Any],
        classes: Sequence[str],
        content: str,
        side: Iterable[str] = (),
        outside: Sequence[File] = (),
    ) -> Manifest:
        """Write the manifest: from here on the folder is an artefact. `side`: paths of files that stay outside the digest."""
        self._write_log()
        apart = {*side, journal.NAME}
        files = self.files()
        identity = self.identity
        manifest = Manifest(
            kind=identity.kind,
            name=identity.name,
            config=json.loads(m.canonical(identity.config)),
            inputs=list(identity.inputs),
            counts=dict(counts),
            classes=list(classes),
            files=tuple(f for f in files if f.path not in apart),
            content=content,
            side=tuple(f for f in files if f.path in apart),
            outside=tuple(outside),
            made=m.made(self._started),
        )
        write_whole(self.folder / m.NAME, manifest.to_json(), durable=True)
        _clear(self.folder)
        self.close()
        return manifest

    def _write_log(self) -> None:
        """What was logged becomes a file of the artefact."""
        if self._journal is not None:
            self._journal.close()
        log = self.scratch(journal.NAME)
        self.write(journal.NAME, log.read_bytes() if log.is_file() else b"")

    def abandon(self) -> None:
        """Leave a finished artefact that was taken up again as it was, without what an interrupted run had added."""
        there = Manifest.load(self.folder)
        self.keep_only(f.path for f in there.files)
        self._cut_log(there)
        _clear(self.folder)
        self.close()

    def _cut_log(self, there: Manifest) -> None:
        """A log is only ever added to: what an interrupted run has said goes again."""
        path = self.folder / journal.NAME
        for file in [f for f in there.side if f.path == journal.NAME and path.is_file()]:
            before = path.read_bytes()[: file.bytes]
            if path.stat().st_size > len(before) and hashlib.sha256(before).hexdigest() == file.sha256:
                write_whole(path, before)

    def discard(self) -> None:
        """Leave nothing, unless it is done: what was asked for cannot be made, and its settings must not stand in the way of others."""
        if self.done is None and not (self.folder / m.NAME).exists():
            standing.remove(self.folder)
            standing.put_back(self.folder)
        self.close()

    def close(self) -> None:
        """Let others write here; what is finished stays for the next run. Folders that were made around nothing go again."""
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if not self.folder.exists():
            remove_empty(self._around)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        refused = isinstance(error, KdpruneError) and standing.aside(self.folder).is_dir()
        if self._lock is not None and (refused or (isinstance(error, KdpruneError | OSError) and self._is_bare())):
            self.discard()
        self.close()

    def _is_bare(self) -> bool:
        """Nothing has been made yet: there is no work that another run could continue."""
        if len(self._parts) or not self.folder.is_dir() or [p.name for p in self.folder.iterdir()] != [PARTIAL]:
            return False
        return {p.name for p in (self.folder / PARTIAL).iterdir()} <= {"identity.json", "lock", parts.FOLDER, journal.NAME, SPOOL}


def relocate(folder: Path, manifest: Manifest, outside: Sequence[File]) -> Manifest:
    """Say that the files outside an artefact lie elsewhere now: the same bytes, so the same digest."""
    moved = replace(manifest, outside=tuple(outside))
    write_whole(folder / m.NAME, moved.to_json(), durable=True)
    return moved


def _clear(folder: Path) -> None:
    """Remove what a finished artefact needs no more: the work in progress, and what it has replaced."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    shutil.rmtree(standing.aside(folder), ignore_errors=True)
