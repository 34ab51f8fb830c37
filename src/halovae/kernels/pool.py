"""The buffer pool: memory for a decode's feature maps on the CPU, reused once a map has no references.

Fresh memory is slow: the system allocates and clears it page by page at the first write (a fifth of the time of a bf16
decode). Maps of different sizes can only reuse each other's memory if all maps lie in one range of addresses.
Accelerators need no buffer pool: torch's allocator is one.
"""

from __future__ import annotations

import math
import mmap
import resource
import sys
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from halovae.device.kinds import Device

_ALIGNMENT = 64  # bytes of a cache line
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_NO_RESERVE = 0x4000  # MAP_NORESERVE of linux/mman.h, in Python from 3.13 on; without it, no process could fork
# Scratch memory of at least this many bytes is returned to the system once a convolution needs less than half of it. A
# clip in bf16 on two ranks took 137 MiB at its last level without this, and takes 87 (latents of 1x16x3x16x16).
_LARGE = 2**25


class BufferPool:
    """The memory of one decode.

    Args:
        device: the CPU, or "meta" for maps without data. On other devices torch's own allocator provides each map.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Feature caches have their own arena: between short-lived maps they would leave small gaps.
        self._maps, self._caches = _Arena(), _Arena()
        self._scratch = 0  # bytes of the latest scratch memory

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kept: bool = False) -> Tensor:
        """Allocate an uninitialized map, channels last where the device supports that.

        Args:
            shape: `[B, C, T, H, W]`.
            dtype: of its values.
            kept: whether it is a feature cache, for the next chunk of a clip.
        """
        batch, channels, *rest = shape
        if self.device.type != "cpu":
            layout = Device(self.device).layout(len(shape))
            return torch.empty(list(shape), dtype=dtype, device=self.device, memory_format=layout)
        memory = (self._caches if kept else self._maps).allocate(math.prod(shape) * dtype.itemsize)
        return memory.view(dtype).view(batch, *rest, channels).movedim(-1, 1)

    def scratch(self, count: int) -> Tensor:
        """Allocate `count` uninitialized fp32 elements."""
        if self.device.type != "cpu":
            return torch.empty(count, device=self.device)
        size, before = count * torch.float32.itemsize, self._scratch
        if before >= _LARGE and size < before // 2:
            self._maps.clear()  # later levels need the memory for larger maps
        self._scratch = size
        return self._maps.allocate(size).view(torch.float32)

    def clear(self) -> None:
        """Return free memory to the system. The buffer pool can still allocate it again."""
        self._maps.clear()
        self._caches.clear()

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor lies in the buffer pool. Such a tensor keeps the pool's pages alive."""
        return any(arena.holds(x) for arena in (self._maps, self._caches))


class _Arena:
    """A reserved address range, which takes memory only once written. A map takes the first gap that fits it."""

    def __init__(self) -> None:
        self._reserved: mmap.mmap | None = None
        self._bytes: Tensor | None = None  # the whole range; None before the first allocation
        self._gaps: list[tuple[int, int]] = []  # begin and end of each, in order
        self._freed: deque[tuple[int, int]] = deque()  # added by any thread since the last allocation

    def holds(self, x: Tensor) -> bool:
        return self._bytes is not None and 0 <= x.data_ptr() - self._bytes.data_ptr() < len(self._bytes)

    def allocate(self, size: int) -> Tensor:
        """Allocate bytes; by torch's allocator if they do not fit."""
        if self._bytes is None:
            self._reserved = _reserved()
            memory = self._reserved
            self._bytes = torch.empty(0) if memory is None else torch.frombuffer(memory, dtype=torch.uint8)
            self._gaps = [(0, len(self._bytes))]
        self._reclaim()
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        for at, (start, stop) in enumerate(self._gaps):
            if 0 < taken <= stop - start:
                self._gaps[at : at + 1] = [(start + taken, stop)] if start + taken < stop else []
                buffer: Tensor = torch.ops.halovae.buffer(self._bytes, start, size)
                weakref.finalize(buffer.untyped_storage(), self._freed.append, (start, start + taken)).atexit = False
                return buffer
        return torch.empty(size, dtype=torch.uint8)

    def clear(self) -> None:
        """Return the pages of gaps to the system."""
        if self._reserved is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._reclaim()
            for start, stop in self._gaps:
                first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    self._reserved.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _reclaim(self) -> None:
        while self._freed:
            self._add_gap(*self._freed.popleft())

    def _add_gap(self, start: int, stop: int) -> None:
        """Add a gap, merged with its neighbors."""
        at = bisect(self._gaps, (start, stop))
        if at < len(self._gaps) and self._gaps[at][0] == stop:
            _, stop = self._gaps.pop(at)
        if at and self._gaps[at - 1][1] == start:
            at -= 1
            start, _ = self._gaps.pop(at)
        self._gaps.insert(at, (start, stop))


def _reserved() -> mmap.mmap | None:
    """Reserve addresses for as many bytes as the host has; None where addresses are limited."""
    limits = (resource.getrlimit(name)[0] for name in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    strict = _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "2"  # proc(5): reservations count
    if strict or any(limit != resource.RLIM_INFINITY for limit in limits) or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_NO_RESERVE if sys.platform == "linux" else 0)
    try:
        return mmap.mmap(-1, psutil.virtual_memory().total, flags)
    except OSError:
        return None


def _buffer(memory: Tensor, start: int, size: int) -> Tensor:
    """Return some bytes as a tensor with its own storage, which keeps the whole memory alive."""
    return torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=size, offset=start)


# An operator, so that dispatch modes that count memory see each map.
_library = torch.library.Library("halovae", "FRAGMENT")
_library.define("buffer(Tensor memory, int start, int size) -> Tensor")
_library.impl("buffer", _buffer, "CPU")
