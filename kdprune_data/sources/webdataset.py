"""WebDataset shards that others wrote, to be packed anew: samples in the order of the shards, members under the names that ours have.

1. The headers of every shard are walked once, and labels read: keys, classes and sizes are known before an image is.
2. Shard after shard is read again, sample by sample: the image becomes `KEY.jpg|png|webp` by its magic bytes, the label `KEY.cls`; what
   else a sample holds goes along, in its order.

Shards are read slice by slice, not mapped: what is mapped counts as the process's memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdprune_data import images
from kdprune_data.errors import SourceError, some
from kdprune_data.formats import tar
from kdprune_data.formats.foreign import read_classes
from kdprune_data.formats.members import UNLABELLED, UNNAMED, Members, Numbering, classes_beside, numbering
from kdprune_data.formats.reading import TarFile
from kdprune_data.sources.base import Item, Outline, SourceOptions, key_of, listing, outlined, places_of

NAME_BYTES = 100
"""What a USTAR header holds of a name."""
MAGIC_BYTES = 16
"""Of an image, what tells its type."""


class Found(NamedTuple):
    """What the headers tell. `ends`: for each shard, how many samples there are up to its end; `codes`: each sample's label, as its place
    in `met` (-1 = none), which holds where each distinct label was met first; `uids` in `outline`; `old`: how many samples have a `cls`
    member that is not their label."""

    ends: list[int]
    codes: array[int]
    met: dict[int | str, str]
    bytes: int
    outline: Outline
    old: int


class WebDatasetSource:
    """Tar shards, in the order given."""

    name = "webdataset"
    shuffles = False
    left_out: Sequence[str] = ()

    def __init__(self, paths: Sequence[Path], options: SourceOptions) -> None:
        self.paths = paths
        self.members = Members.parse(options.image_member, options.label_member or "cls")
        self.asked = options.label_member is not None
        self.by_shard = options.id == "shard"
        self.train = options.train
        self.listed = None if options.classes is None else read_classes(options.classes)

    @cached_property
    def _found(self) -> Found:
        ends, codes, met, size, old = [], array("i"), dict[int | str, str](), 0, 0
        numbers: dict[int | str, int] = {}

        def keys() -> Iterator[str]:
            nonlocal size, old
            for path in self.paths:
                with TarFile(path) as buffer:
                    for record in tar.records(buffer, str(path)):
                        image = self.members.image_of(record, str(path))
                        key = self._key(path, record.key)
                        if others := _others(record, image):
                            _check_others(_origin(path, record.key), key, others, _type_of(buffer, image))
                        label = self.members.label_of(buffer, record, str(path))
                        if label is not None and label not in numbers:
                            numbers[label] = len(numbers)
                            met[label] = _origin(path, record.key)
                        codes.append(-1 if label is None else numbers[label])
                        size += record.length
                        old += "cls" in record.members and self.members.label != "cls"
                        yield key
                ends.append(len(codes))

        advice = "rename one" if self.by_shard else "name samples by their shards too, with --id shard, or rename one"
        outline = outlined(keys(), np.zeros(0, np.int32), lambda row: self._named(ends, row), advice)
        if not codes:
            raise SourceError(f"no sample with an image in {some(map(str, self.paths))}: nothing to import")
        if self.asked and not met:
            raise SourceError(f"no sample in {some(map(str, self.paths))} has a label in {self.members.label}: name another member")
        return Found(ends, codes, met, size, outline, old)

    def _key(self, path: Path, key: str) -> str:
        """The key that a sample gets here. Raises SourceError for one that does not fit."""
        try:
            return key_of(f"{path.stem}/{key}" if self.by_shard else key, "pack the set again with another")
        except SourceError as error:
            raise SourceError(f"{path}: {error}") from None

    def _named(self, ends: Sequence[int], row: int) -> tuple[str, str]:
        """(origin, key) of a row: its shard is walked once more."""
        shard = bisect_right(ends, row)
        path = self.paths[shard]
        with TarFile(path) as buffer:
            records = list(tar.records(buffer, str(path)))
        key = records[row - (ends[shard - 1] if shard else 0)].key
        return _origin(path, key), self._key(path, key)

    @cached_property
    def _numbering(self) -> Numbering:
        return numbering(self._found.met, self.listed)

    @cached_property
    def classes(self) -> Sequence[str]:
        """Those listed; else the distinct label texts, sorted; else `class 0` to the largest number. Or train's, where those are among
        them, by name, or by number where neither has names."""
        own = self._numbering
        return own.names if self.listed is not None else classes_beside(self.train, own.names, named=own.named)

    @cached_property
    def notes(self) -> Sequence[str]:
        """See `Source`."""
        old = f"left out: the .cls members of {self._found.old:,} samples, whose labels come from {self.members.label}"
        found = [old] if self._found.old else []
        if not self._found.met:
            return [*found, UNLABELLED]
        return found if self._numbering.named else [*found, UNNAMED]

    @cached_property
    def outline(self) -> Outline:
        """See `Source`."""
        own = np.asarray([self._numbering.number(label) for label in self._found.met], np.int64)
        places = np.append(places_of(self._numbering.names, self.classes)[own] if len(own) else own, -1).astype(np.int32)
        return Outline(self._found.outline.uids, places[np.frombuffer(self._found.codes, np.int32)])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        taken = {} if list(self.classes) == list(self._numbering.names) and self.listed is None else {"classes": list(self.classes)}
        return {
            "source": self.name,
            "source_files": listing((p.name, p.stat().st_size) for p in self.paths),
            "source_id": "shard" if self.by_shard else "key",
            "source_image_member": self.members.image,
            "source_label_member": self.members.label,
        } | taken

    def __len__(self) -> int:
        return len(self._found.codes)

    @property
    def bytes(self) -> int:
        """Bytes of all records."""
        return self._found.bytes

    def __iter__(self) -> Iterator[Item]:
        start = 0
        for path, end in zip(self.paths, self._found.ends, strict=True):
            with TarFile(path) as buffer:
                records = list(tar.records(buffer, str(path)))
                if len(records) != end - start:
                    counts = f"it has {len(records):,} samples, not the {end - start:,} listed before"
                    raise SourceError(f"{path} changed while it was read: {counts}; import it again")
                for record, label in zip(records, self.outline.labels[start:end].tolist(), strict=True):
                    yield self._item(path, buffer, record, label)
            start = end

    def _item(self, path: Path, buffer: TarFile, record: tar.Record, label: int) -> Item:
        image = self.members.image_of(record, str(path))
        data = buffer[image.data : image.data + image.size]
        others = tuple((e, buffer[m.data : m.data + m.size]) for e, m in _others(record, image).items())
        return Item(self._key(path, record.key), data, None if label < 0 else label, _origin(path, record.key), others)


def _others(record: tar.Record, image: tar.Member) -> dict[str, tar.Member]:
    """What goes along with image and label, by extension. A `cls` that is not the label would be taken for it, and does not."""
    return {extension: member for extension, member in record.members.items() if member is not image and extension != "cls"}


def _check_others(origin: str, key: str, others: Collection[str], image: str) -> None:
    """Refuse a member that cannot go along under its name, beside `KEY.IMAGE`."""
    for extension in others:
        if extension == image:
            raise SourceError(
                f"{origin}: its member .{extension} has the name that its image gets: choose that one with --image-member, or pack the set "
                f"again without it"
            )
        if not (extension.isascii() and extension.isprintable()) or len(key) + 1 + len(extension) > NAME_BYTES:
            raise SourceError(
                f"{origin}: its member .{extension} makes the name {f'{key}.{extension}'!r}: at most {NAME_BYTES} bytes of printable ASCII "
                f"fit a tar header; pack the set again with a shorter one"
            )


def _type_of(buffer: TarFile, image: tar.Member) -> str:
    """The extension that an image gets, by its first bytes."""
    return images.extension(buffer[image.data : image.data + min(image.size, MAGIC_BYTES)]) or "bin"


def _origin(path: Path, key: str) -> str:
    return f"{path} sample {key!r}"
