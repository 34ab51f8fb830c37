"""The device under us: which one, its collective backend, and how much memory a stretch of work took."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def default_device() -> torch.device:
    """The accelerator of this process's local rank where there is one, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def backend(device: torch.device) -> str:
    """The collective backend that PyTorch pairs with a device: gloo, nccl, hccl, xccl."""
    return dist.get_default_backend_for_device(device)


def threads_per_rank(ranks: int) -> int:
    """How many CPU threads each of `ranks` processes on this host may use without crowding out the others."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _resident(field: str) -> int:
    """A field of the kernel's account of this process, in bytes (`VmRSS` now, `VmHWM` at its highest)."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


class PeakMemory:
    """The most memory used since this object was made.

    On an accelerator that is what the caching allocator reserved. On Linux's CPUs it is the process's peak resident
    set, whose high-water mark is reset first (`/proc/self/clear_refs`, see proc(5)); where that is not possible it is
    the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        elif os.access(_CLEAR_REFS, os.W_OK):
            _CLEAR_REFS.write_text("5")
        self.resting = self._now()

    def _now(self) -> int:
        if self._device.type != "cpu":
            return torch.accelerator.memory_reserved(self._device)
        return _resident("VmRSS") if _STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def peak(self) -> int:
        """Bytes at the highest point, the resting process and the weights included."""
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_reserved(self._device)
        return _resident("VmHWM") if _STATUS.exists() else self._now()

    @property
    def above_resting(self) -> int:
        """Bytes by which the peak stands above what was in use when this object was made."""
        return self.peak - self.resting
