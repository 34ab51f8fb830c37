"""How much memory a stretch of work takes, in the same words on every device.

reserved     what the process holds of the device: the caching allocator's pool; on the CPU, its resident set
allocated    what tensors live in: the allocator's count; on the CPU, the tensors that the work made, no weights
overhead     the difference: a pool's unused part; on the CPU what else the work took (scratch of libraries, malloc)
remaining    what was free on the device, or the host, when the most was reserved
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halovae.device.kinds import Device

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes; see the module for the words.

    Attributes:
        peak_reserved: weights, and on the CPU the whole process, included.
        peak_allocated: on accelerators weights included, on the CPU not.
        pool_overhead: reserved and not allocated.
        remaining: free at the peak.
        resting: reserved before the work began.
    """

    peak_reserved: int
    peak_allocated: int
    pool_overhead: int
    remaining: int
    resting: int

    @classmethod
    def over(cls, ranks: Sequence[Memory]) -> Memory:
        """Of several ranks the highest peaks and the least that remained; `above_resting` is the highest rank's too."""
        peak = max(rank.peak_reserved for rank in ranks)
        return cls(
            peak_reserved=peak,
            peak_allocated=max(rank.peak_allocated for rank in ranks),
            pool_overhead=max(rank.pool_overhead for rank in ranks),
            remaining=min(rank.remaining for rank in ranks),
            resting=peak - max(rank.above_resting for rank in ranks),
        )

    @property
    def above_resting(self) -> int:
        """By how much the work raised what is reserved."""
        return self.peak_reserved - self.resting


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that this thread makes under it, while they live, and their peak."""

    counts_meta = False  # whether tensors without data are counted, as if they had some

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[weakref.ref[Any], int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports all of torch._dynamo, which takes seconds

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled kernels write into memory that was counted when it was made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.called(func, args, kwargs or {})
        if _may_allocate(func):
            inputs = {id(tensor.untyped_storage()) for tensor in tensors_in(args)}
            for tensor in tensors_in(result if isinstance(result, (list, tuple)) else (result,)):
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and (self.counts_meta or not tensor.is_meta):
                    size = storage.nbytes()
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    self._held[weakref.ref(storage, self._freed)] = size
        return result

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator returns."""
        return func(*args, **kwargs)

    def _freed(self, storage: weakref.ref[Any]) -> None:
        self.live -= self._held.pop(storage)


@cache
def _may_allocate(operator: Any) -> bool:
    """False for operators that write in place or only ever return a view: most, and this is asked for each call."""
    schema = operator._schema
    if not schema.returns or schema.returns[0].alias_info is None:
        return True
    # Composite ones, such as reshape, say that they return a view and may yet copy.
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, also in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class MemoryMeter:
    """Measures the memory of the work done under `counting`, which may come in several pieces.

    The high-water mark of the resident set is the process's, not the work's: of two meters at once in one process, the
    later one resets the earlier one's. It is reset through `/proc/self/clear_refs` (proc(5)); where that is not
    possible, the peak is that since the process began.

    Args:
        device: whose memory.
        by_thread: count the tensors of this thread alone as allocated, also on an accelerator.
    """

    def __init__(self, device: Device, by_thread: bool = False) -> None:
        self._device = device
        self._live = LiveBytes() if by_thread or device.kind == "cpu" else None
        if device.kind != "cpu":
            device.module.reset_peak_memory_stats(device.torch_device)
        elif os.access(_CLEAR_REFS, os.W_OK):
            _CLEAR_REFS.write_text("5")
        self._free, _ = device.memory()
        self.resting = self._reserved()

    def _reserved(self) -> int:
        if self._device.kind != "cpu":
            return int(self._device.module.memory_reserved(self._device.torch_device))
        return int(psutil.Process().memory_info().rss)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what this thread allocates."""
        if self._live is None:
            yield
        else:
            with self._live:
                yield

    def read(self) -> Memory:
        """The peaks up to now."""
        if self._device.kind == "cpu":
            reserved, outside = _peak_resident(), self.resting
        else:
            module, device = self._device.module, self._device.torch_device
            reserved, outside = int(module.max_memory_reserved(device)), 0
        allocated = int(module.max_memory_allocated(device)) if self._live is None else self._live.peak
        overhead = max(0, reserved - outside - allocated)
        remaining = self._free - (reserved - self.resting)
        return Memory(reserved, allocated, overhead, remaining, self.resting)


def _peak_resident() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
