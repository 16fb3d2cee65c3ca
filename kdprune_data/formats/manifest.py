"""`manifest.json`: what an artefact is, what it was made from, and the digest of every file in it.

The manifest is written last; a folder without one is not finished and is never read. Two identities live in it: `digest` names the very
bytes, `content` names what a data set is, however it is packed. `docs/formats.md`, "Artefacts".
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdprune_data._version import __version__
from kdprune_data.errors import FormatError, UsageError
from kdprune_data.formats.journal import LOGGER

FORMAT = 1
NAME = "manifest.json"
KINDS = ("dataset", "subset", "scores", "logits", "model", "export")
PARTIAL = ".partial"
TEXT = pa.large_string()
"""Of more than two gigabytes, together."""


def canonical(value: Any) -> bytes:
    """The one way to write a JSON value: sorted keys, no spaces, UTF-8. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class File:
    """A file of an artefact. `path` is relative to the folder (or, outside it, absolute or relative); `sha256` is hex."""

    path: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.json, digests included. `inputs` are ancestors, embedded whole (`as_input`)."""

    kind: str
    name: str
    config: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    counts: Mapping[str, Any]
    classes: Sequence[str]
    files: Sequence[File]
    content: str
    side: Sequence[File] = ()
    outside: Sequence[File] = ()
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names these very bytes: no time, version, name or place enters it."""
        return sha256_json(
            {
                "format": FORMAT,
                "kind": self.kind,
                "config": self.config,
                "inputs": [[i["role"], i["digest"]] for i in self.inputs],
                "counts": self.counts,
                "classes": list(self.classes),
                "files": [asdict(f) for f in self.files],
                "outside": [[f.bytes, f.sha256] for f in self.outside],
            }
        )

    def checked(self, folder: Path, path: str) -> Path:
        """The place of one of its files, once its bytes are found to be those recorded. Raises FormatError when they are not."""
        found, file = folder / path, next((f for f in self.files if f.path == path), None)
        if file is None or not found.is_file():
            raise FormatError(f"{found} is missing: make or fetch it again")
        if sha256_file(found) != file.sha256:
            raise FormatError(f"{found} was changed: its sha256 is not the manifest's; make or fetch it again")
        return found

    def as_input(self, role: str) -> dict[str, Any]:
        """This artefact as an ancestor in another's manifest."""
        keep = {key: getattr(self, key) for key in ("kind", "name", "digest", "content", "config", "counts")}
        return {"role": role, **keep, "inputs": list(self.inputs)}

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        body: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("files", "side", "outside"):
            body[key] = [asdict(f) for f in body[key]]
        body |= {"format": FORMAT, "digest": self.digest, "inputs": list(self.inputs), "classes": list(self.classes)}
        return canonical(body | {"sha256": sha256_json(body)})

    @classmethod
    def load(cls, folder: Path, *, kinds: Iterable[str] = KINDS) -> Manifest:
        """Read and check a folder's manifest, and that its files are there with their sizes (not their digests, nor side files).

        Raises UsageError when there is no finished artefact of one of `kinds`; FormatError when it is not whole.
        """
        manifest = cls.read(folder, kinds=kinds)
        for file in manifest.files:
            there = folder / file.path
            if not there.is_file():
                raise FormatError(f"{there} is missing: the manifest lists it; make or fetch the folder again")
            if there.stat().st_size != file.bytes:
                raise FormatError(f"{there} has {there.stat().st_size:,} bytes, the manifest says {file.bytes:,}: make or fetch it again")
        LOGGER.debug("read %s: %s, digest %s, content %s", folder, manifest.kind, manifest.digest, manifest.content)
        return manifest

    @classmethod
    def read(cls, folder: Path, *, kinds: Iterable[str] = KINDS) -> Manifest:
        """Read and check a folder's manifest alone. Raises as `load` does."""
        path = folder / NAME
        wanted = " or ".join(kinds)
        if not path.is_file():
            if (folder / PARTIAL).is_dir():
                raise UsageError(f"{folder} is unfinished: run the command that makes it again, it continues")
            if folder.is_file():
                raise UsageError(f"{folder} is a file: give the folder it stands in")
            what = "holds no manifest.json" if folder.is_dir() else "does not exist"
            raise UsageError(f"{folder} {what}: expected a finished {wanted}; give another folder, or make it first")
        manifest = cls._parse(path)
        if manifest.kind not in kinds:
            raise UsageError(f"{folder} is of kind {manifest.kind}: expected {wanted}; give another folder")
        return manifest

    @classmethod
    def _parse(cls, path: Path) -> Manifest:
        raw = path.read_bytes()
        try:
            body = json.loads(raw)
            if body.get("format", FORMAT) != FORMAT:  # before all else: another format may sign itself in another way
                raise FormatError(f"{path} is of another format than {FORMAT}: use the version of kdprune-data that wrote it")
            stated = body.pop("sha256")
            if sha256_json(body) != stated or canonical(body | {"sha256": stated}) != raw:
                raise FormatError(f"{path} was changed: its sha256 is not the one it states; make or fetch the folder again")
            del body["format"]
            digest = body.pop("digest")
            for key in ("files", "side", "outside"):
                body[key] = tuple(File(**f) for f in body[key])
            manifest = cls(**body)
            _check_types(manifest)
            for file in (*manifest.files, *manifest.side):
                _check_inside(path, file.path)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path} is not a manifest ({type(error).__name__}): make or fetch the folder again") from None
        if manifest.digest != digest:
            raise FormatError(f"{path} states digest {digest[:12]}, its contents give {manifest.digest[:12]}: make or fetch it again")
        return manifest

    def ancestor(self, role: str) -> Mapping[str, Any]:
        """The direct input of that role. Raises FormatError when there is none."""
        for one in self.inputs:
            if one["role"] == role:
                return one
        raise FormatError(f"{self.kind} {self.name!r} has no input of role {role!r}: its manifest is not one of this version's")


def _check_types(manifest: Manifest) -> None:
    """Raise TypeError unless every value is of the type that the rest of the program takes it for."""
    texts = [manifest.kind, manifest.name, manifest.content, *manifest.classes]
    tables = [manifest.config, manifest.counts, manifest.made, *manifest.inputs]
    lists = [manifest.classes, manifest.inputs]
    for file in (*manifest.files, *manifest.side, *manifest.outside):
        texts += [file.path, file.sha256 or ""]
        if type(file.bytes) is not int:
            raise TypeError(file)
    for one in _lineage(manifest.inputs):
        texts += [one[key] for key in ("role", "kind", "name", "digest", "content")]
        tables += [one["config"], one["counts"]]
        lists.append(one["inputs"])
    for values, kind in ((texts, str), (tables, dict), (lists, list)):
        if not all(isinstance(value, kind) for value in values):
            raise TypeError(kind)


def _lineage(inputs: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """All ancestors, at any depth."""
    for one in inputs:
        yield one
        yield from _lineage(one["inputs"])


def _check_inside(manifest: Path, path: str) -> None:
    """Raise FormatError unless a listed path is plain and relative: a folder that was fetched names no files but its own."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != path or path == ".":
        raise FormatError(f"{manifest} lists a file outside the folder ({path!r}): fetch it again from where you trust it")


def place(folder: Path, path: str) -> Path:
    """Where a listed file lies. Links on the way to the folder are followed first, as they were when `..` was written."""
    return Path(os.path.normpath(folder.resolve() / path)) if path.startswith("..") else folder / path


def content_of(ids: Iterable[str] | pa.ChunkedArray, sha256: NDArray[np.uint8], labels: NDArray[np.int32]) -> str:
    """What a data set is, on any machine and in any packing: the sha256 (hex) of its sorted `id NUL sha256 NUL label LF` lines.

    ids: n of them; sha256: uint8 of shape (n, 32), of the image bytes, zeros = none; labels: int32 of shape (n,), -1 = none.
    """
    names = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else pa.array(ids, TEXT)
    numbers = pc.fill_null(pa.array(labels, pa.int32(), mask=labels < 0).cast(TEXT), "")
    ends = pc.binary_join_element_wise(numbers, _text("\n"), _text(""))
    lines = pc.binary_join_element_wise(names.cast(TEXT), hexes(sha256), ends, _text("\0"))
    lines = lines.take(pc.sort_indices(lines))
    at = np.frombuffer(lines.buffers()[1], np.int64)[lines.offset :][: len(lines) + 1]
    return hashlib.sha256(memoryview(lines.buffers()[2] or b"")[at[0] : at[-1]]).hexdigest()


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, TEXT)


def hexes(sha256: NDArray[np.uint8]) -> pa.Array:
    """Digests, uint8 of shape (n, 32), as texts in lower-case hex; one that was not taken, all zeros, as the empty text."""
    ends = np.arange(0, 64 * len(sha256) + 1, 64)
    whole = pa.LargeStringArray.from_buffers(len(sha256), pa.py_buffer(ends), pa.py_buffer(sha256.tobytes().hex().encode()))
    return pc.if_else(pa.array(np.asarray(sha256.any(1), np.bool_)), whole, _text(""))


def made(started: float) -> dict[str, Any]:
    """When, with what and where: kept outside every digest. `started` is a time.monotonic()."""
    versions = {"kdprune-data": __version__, "python": platform.python_version()}
    for package in ("numpy", "pyarrow", "torch", "torchvision", "pillow", "simplejpeg", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "time": stamp,
        "versions": versions,
        "host": platform.platform(),
        "seconds": round(time.monotonic() - started, 3),
    }
