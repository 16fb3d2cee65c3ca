"""Decoded images of a data set, by row: read and decoded when they are wanted, and kept in memory where they fit there.

What is kept lies in one anonymous block of memory, image after image, which processes forked from this one share; on a device that is not
the CPU images of one size are kept there too, and crops are rendered there. Whether anything is kept changes no pixel.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdprune_data import order
from kdprune_data.errors import SourceError, UsageError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.images import decode
from kdprune_data.learn import views
from kdprune_data.learn.policy import PADDED
from kdprune_data.learn.views import Geometry, Pixels, Policy, Scalable

KEEPS = ("auto", "on", "off")
SHARE = 0.5
"""`auto` keeps images that take at most this share of the memory that is free."""
DECODED_BYTES = 32_000_000
"""Images that are decoded to be rendered take about this much memory in each thread, or one image does: photographs are large."""


class Images:
    """Decoded images of a data set, by row. May be used by several threads, and by processes that are forked.

    keep: `on` keeps every image that was decoded once, `off` none, `auto` all or none, as they fit; device: where batches of crops are
    rendered, and images of one size kept too, by the same rule for its memory.

    Raises UsageError when all are to be kept and are larger than the memory that is free.
    """

    def __init__(self, data: Dataset, *, keep: str = "auto", device: torch.device | str = "cpu") -> None:
        self.data, self.keep, self.device = data, keep, torch.device(device)
        rows = data.usable()
        sizes = data.sizes[rows].astype(np.int64)
        self.equal = bool((sizes == sizes[0]).all())
        self._shape = (int(sizes[0, 0]), int(sizes[0, 1]), 3)
        lengths = np.zeros(len(data), np.int64)
        lengths[rows] = 3 * sizes.prod(1)
        self._ends = np.cumsum(lengths)
        self.bytes = int(self._ends[-1])
        self._kept: NDArray[np.uint8] | None = None
        if _fits(self.bytes, keep, free_memory()):
            self._kept = np.frombuffer(mmap.mmap(-1, self.bytes), np.uint8)
            self._there = np.frombuffer(mmap.mmap(-1, len(data)), np.bool_)
        self._copy = _Copy(len(data), self._shape, self.device) if self._copies() else None

    def _copies(self) -> bool:
        """Whether they are kept on a device of their own."""
        if not self.equal or self.device.type != "cuda":
            return False
        return _fits(self.bytes, self.keep, torch.cuda.mem_get_info(self.device)[0])

    def get(self, rows: NDArray[np.int64]) -> Pixels | list[Pixels]:
        """Images of some rows, not to be written to: uint8 of shape (n, h, w, 3) where all images are of one size, else a list of (h, w,
        3).

        Raises SourceError that names a sample which does not decode.
        """
        if self._kept is None:
            found = [self._decoded(row, data) for row, data in zip(rows.tolist(), self.data.read(rows), strict=True)]
            return np.stack(found) if self.equal else found
        missing = rows[~self._there[rows]]
        for row, data in zip(missing.tolist(), self.data.read(missing), strict=True):
            pixels, end = self._decoded(row, data).reshape(-1), self._ends[row]
            self._kept[end - len(pixels) : end] = pixels
            self._there[row] = True
        if self.equal:
            return self._kept.reshape(-1, *self._shape)[self._ends[rows] // int(np.prod(self._shape)) - 1]
        sides = self.data.sizes[rows].tolist()
        return [self._kept[end - 3 * h * w : end].reshape(h, w, 3) for end, (h, w) in zip(self._ends[rows].tolist(), sides, strict=True)]

    def rendered(self, rows: NDArray[np.int64], boxes: Geometry, policy: Policy) -> Tensor:
        """Views of some rows: uint8 of shape (n, 3, s, s), on the device where they are rendered there, else on the CPU.

        Raises as `get` does.
        """
        if self._copy is not None and policy.kind in PADDED:
            return views.shown(policy, self._copy.get(rows, self), boxes, self.device)
        parts = self.few(rows)
        if len(parts) == 1:
            return self._rendered(rows, boxes, policy)
        return torch.cat([self._rendered(rows[at], boxes.take(at), policy) for at in parts])

    def _rendered(self, rows: NDArray[np.int64], boxes: Geometry, policy: Policy) -> Tensor:
        return views.shown(policy, self.scalable(rows) if policy.scaled else self.get(rows), boxes)

    def scalable(self, rows: NDArray[np.int64]) -> list[Scalable]:
        """Images of some rows that are decoded as large as they are needed; they are not kept, which would be another size each time."""
        sides = self.data.sizes[rows].tolist()
        return [Scalable(data, (h, w)) for data, (h, w) in zip(self.data.read(rows), sides, strict=True)]

    def _decoded(self, row: int, data: bytes) -> Pixels:
        try:
            pixels = decode(data)
        except SourceError as error:
            raise SourceError(
                f"sample {self.data.ids[row]!r} in {self.data.shard_paths[self.data.shards[row]]}: {error}; index the shards again without "
                "--no-digests, or import them again, and it is left out"
            ) from None
        if pixels.shape[:2] != tuple(self.data.sizes[row].tolist()):
            raise SourceError(
                f"{self.data.shard_paths[self.data.shards[row]]} was changed: sample {self.data.ids[row]!r} is not as large as the image "
                f"that was indexed; make or fetch {self.data.folder} again"
            )
        return pixels

    def few(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Places in `rows`, in parts so small that the images of one take at most DECODED_BYTES, or are one image."""
        largest = 3 * int(self.data.sizes[rows].astype(np.int64).prod(1).max(initial=1))
        return list(order.batches(np.arange(len(rows)), max(1, DECODED_BYTES // largest)))

    def __reduce__(self) -> tuple[object, ...]:
        return (_again, (self.data, self.keep, str(self.device)))


def _again(data: Dataset, keep: str, device: str) -> Images:
    return Images(data, keep=keep, device=device)


class _Copy:
    """The images on a device, each brought there when it is wanted first: uint8 of shape (n, h, w, 3)."""

    def __init__(self, samples: int, shape: tuple[int, int, int], device: torch.device) -> None:
        self._pixels = torch.zeros((samples, *shape), dtype=torch.uint8, device=device)
        self._there = np.zeros(samples, bool)

    def get(self, rows: NDArray[np.int64], images: Images) -> Tensor:
        """Those of some rows."""
        missing = rows[~self._there[rows]]
        if len(missing):
            self._pixels[self._where(missing)] = torch.from_numpy(np.asarray(images.get(missing))).to(self._pixels.device)
            self._there[missing] = True
        return self._pixels[self._where(rows)]

    def _where(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self._pixels.device, non_blocking=True)


def _fits(size: int, keep: str, free: int) -> bool:
    """Whether to keep so many bytes where so many are free. Raises UsageError when they are to be kept and cannot be."""
    if keep == "on" and size > free:
        raise UsageError(
            f"--in-memory on keeps all images decoded, {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: leave it out to "
            "decode them as they are needed"
        )
    return keep == "on" or (keep == "auto" and size <= SHARE * free)


def free_memory() -> int:
    """Bytes of memory that this process may still take: what the system says, or its control group where that allows less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        caches = [int(line.split()[1]) for line in _lines(Path("/sys/fs/cgroup/memory.stat")) if line.startswith("inactive_file ")]
        free = min(free, int(limit[0]) - int(used[0]) + sum(caches))
    return max(free, 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
