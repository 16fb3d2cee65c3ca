"""Re-reading exports: from the tars alone, each member as the format says, and together the counts and the content of the manifest.

Part of `check`, which see.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdprune_data import images
from kdprune_data.errors import FormatError, KdpruneError
from kdprune_data.formats import export, indexing, tar
from kdprune_data.formats import manifest as m
from kdprune_data.formats.check import Fault, Tick
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.members import Members, root_config


@dataclass
class Met:
    """What the samples of an export say, one after the other. `digest`: whether their images have one."""

    digest: bool
    ids: list[str] = field(default_factory=list)
    sha256: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The content that they make."""
        sha256 = np.frombuffer(b"".join(self.sha256), np.uint8).reshape(-1, 32)
        return m.content_of(self.ids, sha256, np.asarray(self.labels, np.int32))


def contents(folder: Path, manifest: Manifest, tick: Tick) -> Iterator[Fault]:
    """An export: every sample is whole, and all of them are what the manifest says. `tick` gets samples."""
    met = Met(root_config(manifest.ancestor("data")).get("digests", True))
    sizes: dict[str, int] = {}
    for file in (f for f in manifest.files if f.path.endswith(".tar")):
        path, before = folder / file.path, len(met.ids)
        try:
            buffer = tar.map_file(path)
            for record in tar.records(buffer, str(path)):
                yield from _sample(manifest, met, path, record, buffer)
                tick(1)
        except KdpruneError as error:
            yield Fault(str(path), str(error))
        sizes[file.path] = len(met.ids) - before
    labelled = np.asarray([label for label in met.labels if label >= 0], np.int64)
    counts = {
        "samples": len(met.ids),
        "shards": len(sizes),
        "labelled": len(labelled),
        "per_class": np.bincount(labelled, minlength=len(manifest.classes)).tolist(),
        "views": manifest.config["views"],
    }
    for key, value in counts.items():
        if manifest.counts.get(key) != value:
            yield Fault(str(folder / m.NAME), f"says {key} {manifest.counts.get(key)}, the shards give {value}")
    if met.content != manifest.content:
        yield Fault(str(folder), "ids, images and labels do not give the manifest's content")
    yield from _side_files(folder, manifest, sizes)


def _sample(manifest: Manifest, met: Met, path: Path, record: tar.Record, buffer: tar.Buffer) -> Iterator[Fault]:
    """One sample: its image, its class, and the soft labels of all views."""
    image, where = next(iter(record.members.values())), f"sample {record.key!r}"
    data = bytes(buffer[image.data : image.data + image.size])
    met.ids.append(record.key)
    met.sha256.append(indexing.image_digest(data) if met.digest else bytes(32))
    label = Members().label_of(buffer, record, str(path))
    met.labels.append(label if isinstance(label, int) else -1)
    if met.labels[-1] >= len(manifest.classes):
        yield Fault(str(path), f"{where} has label {label}, of {len(manifest.classes)} classes")
    if images.extension(data) not in record.members:
        yield Fault(str(path), f"{where}: its first member is not an image by its name")
    if (soft := record.members.get(export.MEMBER)) is None:
        yield Fault(str(path), f"{where} has no member .{export.MEMBER}")
        return
    try:
        found = export.read_soft(bytes(buffer[soft.data : soft.data + soft.size]))
    except FormatError as error:
        yield Fault(str(path), f"{where}: its .{export.MEMBER} {error}")
        return
    expected: dict[str, Any] = {"views": len(found.logits), "dtype": str(found.logits.dtype)}
    if expected != manifest.config or found.logits.shape[1] != len(manifest.classes):
        yield Fault(str(path), f"{where}: its .{export.MEMBER} has {found.logits.dtype} logits of shape {found.logits.shape}")


def _side_files(folder: Path, manifest: Manifest, sizes: dict[str, int]) -> Iterator[Fault]:
    try:
        if json.loads((folder / "sizes.json").read_bytes()) != sizes:
            yield Fault(str(folder / "sizes.json"), "its counts are not those of the shards")
    except ValueError:
        yield Fault(str(folder / "sizes.json"), "is not JSON")
    sums = "".join(f"{f.sha256}  {f.path}\n" for f in manifest.files if f.path.endswith(".tar"))
    if (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace") != sums:
        yield Fault(str(folder / "SHA256SUMS"), "its lines are not the manifest's digests")
