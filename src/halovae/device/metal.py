"""Apple's GPUs (`torch.mps`), under the names that the modules of other accelerators have.

There is one device, without collectives. Metal shares the host's memory, and does not count peaks: `MemoryMeter` counts
tensors itself, as on the CPU, and takes what the driver holds for the reserved peak.
"""

from __future__ import annotations

from typing import Any

import torch

Event = torch.mps.Event


def is_available() -> bool:
    return bool(torch.backends.mps.is_available())


def device_count() -> int:
    return 1


def set_device(device: Any) -> None:
    """There is one."""


def synchronize(device: Any = None) -> None:
    torch.mps.synchronize()


def empty_cache() -> None:
    torch.mps.empty_cache()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes, of what Metal recommends that a process uses."""
    total = torch.mps.recommended_max_memory()
    return total - torch.mps.driver_allocated_memory(), total


def memory_allocated(device: Any = None) -> int:
    return torch.mps.current_allocated_memory()


def memory_reserved(device: Any = None) -> int:
    return torch.mps.driver_allocated_memory()


def max_memory_reserved(device: Any = None) -> int:
    """What the driver holds now: it seldom returns memory."""
    return torch.mps.driver_allocated_memory()


def reset_peak_memory_stats(device: Any = None) -> None:
    """No peak is counted."""


def get_device_name(device: Any = None) -> str:
    return "Apple GPU"
