"""Memory that networks compute in: kept by the process on the CPU, and filled on CUDA while the device and this process go on."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kdprune_data.learn.stream import Batch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of settings of `mallopt`, from glibc's malloc.h."""
NEVER = 2**31 - 1
LARGEST = 1 << 25
"""The largest block, in bytes, that glibc lets its heap have; larger ones are mapped, and given back, one by one."""


def keep_freed() -> None:
    """Let this process keep, from here on, the blocks of up to 32 MB that it frees, where its allocator is glibc's: what it takes for them
    falls no more.

    Otherwise every activation of some megabytes comes anew from the kernel, page by page and zeroed, at every layer of every batch: of a
    forward pass of resnet20 over 256 images a fifth to a third of the time. No number changes. (Keeping larger ones too would let the heap
    grow without end: whatever small is made behind one keeps its place from being used again.) Left alone where the user has settings of
    malloc (`MALLOC_..._`, `GLIBC_TUNABLES`) in the environment.
    """
    theirs = any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ)
    if sys.platform != "linux" or theirs:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl, for one, has none
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, NEVER)
        mallopt(MMAP_THRESHOLD, LARGEST)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to CUDA through pinned memory, which is copied while this process goes on."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def arriving(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their tensors on a device, in order. On CUDA each one is copied on a stream of its own while the one before it is
    computed with; what computes waits for the copy, and this process for neither."""
    if device.type != "cuda":
        yield from (_sent(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stub lacks it
    under_way: list[tuple[Batch, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(copying):
            under_way.append((_sent(batch, device), copying.record_event()))
        if len(under_way) > 1:
            yield _arrived(*under_way.pop(0), torch.cuda.current_stream(device))
    for last in under_way:
        yield _arrived(*last, torch.cuda.current_stream(device))


def _sent(batch: Batch, device: torch.device) -> Batch:
    logits, weights = (None if one is None else sent(one, device) for one in (batch.logits, batch.weights))
    return replace(batch, images=sent(batch.images, device), labels=sent(batch.labels, device), logits=logits, weights=weights)


def _arrived(batch: Batch, copied: torch.cuda.Event, computing: torch.cuda.Stream) -> Batch:
    computing.wait_event(copied)
    for one in (batch.images, batch.labels, batch.logits, batch.weights):
        if one is not None:
            one.record_stream(computing)  # or its memory might be filled anew as soon as nothing here holds it
    return batch
