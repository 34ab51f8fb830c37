"""Memory for the maps of a decode on the CPU, lent again as soon as nobody holds the map that it was lent for.

Fresh memory is slow: the system hands it over page by page, cleared, when it is first written (a fifth of the time of a
bf16 decode). And what one map leaves is of use to maps of other sizes only where they lie in one range of addresses.
Accelerators need none of this: torch's allocator pools their memory.
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

_ALIGNED = 64  # bytes, a cache line, at which every map begins
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_NO_RESERVE = 0x4000  # MAP_NORESERVE of linux/mman.h, which Python knows since 3.13: else no process could fork
_LARGE = 2**25  # bytes of scratch memory that are given back when the next convolutions need less than half of them


class Pool:
    """Memory that belongs to one decode.

    Args:
        device: the CPU, or "meta" for a walk without data. On other devices torch's own allocator is asked for
            each map: it pools memory itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # What is kept for the next chunk lies apart: it would leave gaps too small for what comes and goes.
        self._passing, self._kept = _Range(), _Range()
        self._scratch = 0  # bytes that were lent last

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kept: bool = False) -> Tensor:
        """A map of `shape` `[B, C, T, H, W]` that holds nothing, channels last.

        Args:
            shape: its own.
            dtype: its own.
            kept: whether it is for the next chunk of a clip.
        """
        batch, channels, *rest = shape
        if self.device.type != "cpu":
            return torch.empty((batch, *rest, channels), dtype=dtype, device=self.device).movedim(-1, 1)
        memory = (self._kept if kept else self._passing).lent(math.prod(shape) * dtype.itemsize)
        return memory.view(dtype).view(batch, *rest, channels).movedim(-1, 1)

    def scratch(self, count: int) -> Tensor:
        """`count` fp32 elements that hold nothing."""
        if self.device.type != "cpu":
            return torch.empty(count, device=self.device)
        size, before = count * torch.float32.itemsize, self._scratch
        if before >= _LARGE and size < before // 2:
            self._passing.clear()  # else it would stay beside the larger maps of the levels that follow
        self._scratch = size
        return self._passing.lent(size).view(torch.float32)

    def clear(self) -> None:
        """Give back to the system what nobody holds, until it is needed again."""
        self._passing.clear()
        self._kept.clear()

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor lies in the pool, all of which it keeps."""
        return any(one.holds(x) for one in (self._passing, self._kept))


class _Range:
    """Addresses of which the system gives memory only for what is written; each map lies in the first gap for it."""

    def __init__(self) -> None:
        self._reserved: mmap.mmap | None = None
        self._bytes: Tensor | None = None
        self._gaps: list[tuple[int, int]] = []  # where each begins and ends, in order
        self._left: deque[tuple[int, int]] = deque()  # what maps left that nobody holds any more: by any thread

    def holds(self, x: Tensor) -> bool:
        return self._bytes is not None and 0 <= x.data_ptr() - self._bytes.data_ptr() < len(self._bytes)

    def lent(self, size: int) -> Tensor:
        """So many bytes."""
        if self._bytes is None:
            self._reserved = _reserved()
            memory = self._reserved or bytearray(1)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
            self._gaps = [(0, len(self._bytes))] if self._reserved else []
        self._find()
        taken = -(-size // _ALIGNED) * _ALIGNED
        for at, (start, stop) in enumerate(self._gaps):
            if 0 < taken <= stop - start:
                self._gaps[at : at + 1] = [(start + taken, stop)] if start + taken < stop else []
                lent: Tensor = torch.ops.halovae.lend(self._bytes, start, size)
                weakref.finalize(lent.untyped_storage(), self._left.append, (start, start + taken)).atexit = False
                return lent
        return torch.empty(size, dtype=torch.uint8)

    def clear(self) -> None:
        """Give the memory of gaps back to the system."""
        if self._reserved is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._find()
            for start, stop in self._gaps:
                first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    self._reserved.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _find(self) -> None:
        """Find what was left since."""
        while self._left:
            self._close(*self._left.popleft())

    def _close(self, start: int, stop: int) -> None:
        """What lay there is a gap, in one piece with those beside it."""
        at = bisect(self._gaps, (start, stop))
        if at < len(self._gaps) and self._gaps[at][0] == stop:
            _, stop = self._gaps.pop(at)
        if at and self._gaps[at - 1][1] == start:
            at -= 1
            start, _ = self._gaps.pop(at)
        self._gaps.insert(at, (start, stop))


def _reserved() -> mmap.mmap | None:
    """Addresses for as many bytes as the host has; None where they are scarce."""
    limits = (resource.getrlimit(one)[0] for one in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    promised = _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "2"  # proc(5): what is reserved counts
    if promised or any(limit != resource.RLIM_INFINITY for limit in limits) or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_NO_RESERVE if sys.platform == "linux" else 0)
    try:
        return mmap.mmap(-1, psutil.virtual_memory().total, flags)
    except OSError:
        return None


def _lend(memory: Tensor, start: int, size: int) -> Tensor:
    """Bytes of a range as a tensor of their own, which keeps the range."""
    return torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=size, offset=start)


# An operator, so that those who count the memory of tensors see each map.
_library = torch.library.Library("halovae", "FRAGMENT")
_library.define("lend(Tensor memory, int start, int size) -> Tensor")
_library.impl("lend", _lend, "CPU")
