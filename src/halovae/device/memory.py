"""The memory that a piece of work takes, in the same terms on every device.

reserved     memory that the process holds: the caching allocator's pool; on the CPU, the resident set
allocated    memory of tensors: the allocator's count; on the CPU, tensors that the work created, without weights
overhead     the difference: unused memory of the pool; on the CPU, scratch memory of libraries and of malloc
remaining    free memory of the device, or of the host, at the reserved peak
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
    """Peaks in bytes; the module's docstring explains the terms.

    Attributes:
        peak_reserved: includes weights, and on the CPU the whole process.
        peak_allocated: includes weights on accelerators, but not on the CPU.
        pool_overhead: reserved but not allocated.
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
        """Combine ranks: the highest peaks and the least remaining memory. `above_resting` is the highest, too."""
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
        """By how much the work raised the reserved memory."""
        return self.peak_reserved - self.resting


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that this thread creates within the context, and their peak."""

    counts_meta = False  # whether meta tensors are counted, as if they had data

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[weakref.ref[Any], int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first call imports all of torch._dynamo, which takes seconds

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled kernels write into memory that was counted when it was allocated

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
        """Call the operator, and return its result."""
        return func(*args, **kwargs)

    def _freed(self, storage: weakref.ref[Any]) -> None:
        self.live -= self._held.pop(storage)


@cache
def _may_allocate(operator: Any) -> bool:
    """Whether an operator may allocate: False if it writes in place or always returns a view. Each call asks this."""
    schema = operator._schema
    if not schema.returns or schema.returns[0].alias_info is None:
        return True
    # The schemas of composite operators, such as reshape, declare a view, but the operators may copy.
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, including those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class MemoryMeter:
    """Measures the memory of the work done within `counting`, which may be entered several times.

    The high-water mark of the resident set belongs to the process: of two meters in one process, the later one resets
    the earlier one's mark. The mark is reset through `/proc/self/clear_refs` (proc(5)). Where that is not possible, the
    peak is the one since the process began.

    Args:
        device: the device to measure.
        by_thread: count only tensors of this thread as allocated, also on an accelerator.
    """

    def __init__(self, device: Device, by_thread: bool = False) -> None:
        self._device = device
        self._live = LiveBytes() if by_thread or device.kind in ("cpu", "mps") else None
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
        """Return the peaks up to now."""
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
