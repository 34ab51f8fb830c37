"""Devices: cpu, cuda, npu (torch_npu, HCCL), xpu, or mps. All differences between them are in this file."""

from __future__ import annotations

import inspect
import os
import platform as host
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import psutil
import torch
import torch.distributed as dist

from halovae.device import metal

ACCELERATORS = ("cuda", "npu", "xpu", "mps")
HOSTS = ("cpu", "meta")  # no accelerators

# The environment of rank processes on the CPU. glibc keeps freed blocks below a threshold that grows to 32 MiB, which
# is a usual size of feature maps. With a fixed threshold, feature maps are returned to the system at once (mallopt(3)).
# Huge pages then make new ones cheap.
RANK_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "THP_MEM_ALLOC_ENABLE": "1"}

# The variables that name the network interface for a collective backend to listen on.
INTERFACES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME", "hccl": "HCCL_SOCKET_IFNAME"}

# Convolutions of larger maps have failed on Ascend 910B ("Conv2D" errors in the VAE at 720p, sgl-project/sglang#27853).
# The limit is not published. This is a quarter of 1280 x 720, to be replaced by a measurement.
NPU_CONVOLUTION_CELLS = 1280 * 720 // 4

_choosing: ContextVar[bool] = ContextVar("halovae_choosing", default=False)


@dataclass(frozen=True)
class Device:
    """A torch device, with the properties of its kind.

    The accelerators' modules (`torch.cuda`, `torch.npu`, `torch.xpu`) share the names that this class calls;
    `device.metal` has them for `torch.mps`.
    """

    torch_device: torch.device

    @classmethod
    def default(cls, kind: str | None = None) -> Device:
        """Return this process's device: the local rank's accelerator if there is one, else the CPU.

        Args:
            kind: "cpu", "cuda", "npu", "xpu", or "mps"; None for the first that is present.

        Raises:
            ValueError: this host has no such device; the message lists those it has.
        """
        present = [*(name for name in ACCELERATORS if _module(name) is not None), "cpu"]
        kind = kind or present[0]
        if kind not in present:
            raise ValueError(f"device {kind!r} is not here; there is {', '.join(present)}")
        if kind == "cpu":
            return cls(torch.device("cpu"))
        return cls(torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % _module(kind).device_count()))

    @property
    def kind(self) -> str:
        """The device's type as torch names it."""
        return self.torch_device.type

    @property
    def module(self) -> Any:
        """torch's module for the device: `torch.cuda`, `torch.npu`, `torch.xpu`; `device.metal` for `torch.mps`.

        Raises:
            ValueError: this host has no such device.
        """
        module = _module(self.kind)
        if module is None:
            raise ValueError(f"device {self.kind!r} is not here")
        return module

    @property
    def count(self) -> int:
        """The number of devices of this kind. For the CPU: the number of cores that this process may use."""
        return len(os.sched_getaffinity(0)) if self.kind == "cpu" else int(self.module.device_count())

    @property
    def backend(self) -> str:
        """The collective backend: gloo, nccl, hccl, xccl.

        Raises:
            ValueError: the device is Apple's, which has none.
        """
        if self.kind == "mps":
            raise ValueError("device 'mps' has no collectives: expected one rank, or device 'cpu'")
        return dist.get_default_backend_for_device(self.torch_device)

    def enter(self) -> None:
        """Make this the process's current device. Call it before the process group is created."""
        if self.kind != "cpu":
            self.module.set_device(self.torch_device)

    def choose_interfaces(self) -> None:
        """Make gloo and this device's backend listen on one network interface.

        Call it before the process group is created. If all ranks are on one host, the interface is loopback unless
        the environment names another. If they are on several hosts, the environment must name it.

        Raises:
            ValueError: ranks span hosts, and a variable does not name exactly one interface of this host.
        """
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        for backend in sorted({"gloo", self.backend} & INTERFACES.keys()):
            variable = INTERFACES[backend]
            if one_host and os.environ.get(variable, "").strip():
                continue
            exactly = "" if backend == "gloo" else "="  # NCCL and HCCL take a bare name for a prefix
            os.environ[variable] = exactly + (_loopback() if one_host else _named_interface(variable))

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.kind != "cpu":
            self.module.synchronize(self.torch_device)

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Make results repeatable bit for bit: use deterministic algorithms, chosen without benchmarking.

        Within `choosing`, cuDNN measures the deterministic ones. It keeps the fastest of each shape for later calls.
        torch's setting of TF32 for fp32 convolutions stays as it is.
        """
        if self.kind == "cuda":
            cudnn = torch.backends.cudnn
            measured, tf32 = self.is_choosing, cudnn.allow_tf32
            with cudnn.flags(enabled=True, benchmark=measured, deterministic=True, allow_tf32=tf32):
                yield
        else:
            yield

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Let this thread's calls within the context choose algorithms by measuring them."""
        before = self.is_choosing
        _choosing.set(True)
        try:
            yield
        finally:
            _choosing.set(before)

    @property
    def is_choosing(self) -> bool:
        """Whether this thread is within `choosing`."""
        return _choosing.get()

    def new_capture(self) -> tuple[Any, AbstractContextManager[Any]] | None:
        """Return a new graph of queued work, and the context that captures it; None if the device has none."""
        module = None if self.kind in HOSTS else _module(self.kind)
        made = getattr(module, f"{self.kind.upper()}Graph", None)  # CUDAGraph, NPUGraph, XPUGraph
        context = getattr(module, "graph", None)
        if made is None or context is None:
            return None
        graph = made()
        # What other threads do on the device is none of the capture's business.
        how: dict[str, Any] = {"capture_error_mode": "thread_local"} if _takes(context, "capture_error_mode") else {}
        if module is not None and hasattr(
            module, "Stream"
        ):  # else it captures what the device queues that was current the first time
            how["stream"] = module.Stream(self.torch_device)
        return graph, context(graph, **how)

    def queue(self) -> Any:
        """This thread's current stream of the device; None if it has no streams."""
        current = None if self.kind in HOSTS else getattr(self.module, "current_stream", None)
        return current and current(self.torch_device)

    @contextmanager
    def queuing(self, queue: Any) -> Iterator[None]:
        """Let this thread queue work on another thread's stream."""
        if queue is None:
            yield
            return
        with self.module.device(self.torch_device), self.module.stream(queue):
            yield

    @contextmanager
    def on_current_stream(self) -> Iterator[None]:
        """Make this device the current one, and restore its current stream at the end, even after a failed capture."""
        before = self.queue()
        if before is None:
            yield
            return
        with self.module.device(self.torch_device):
            try:
                yield
            finally:
                self.module.set_stream(before)

    def event(self) -> Any:
        """Return an event of the device's queue; None if it has none."""
        return self.module.Event() if hasattr(self.module, "Event") else None

    def layout(self, ndim: int = 5) -> torch.memory_format:
        """The memory format of feature maps and weights with `ndim` dims: channels last where that exists."""
        if self.kind in ("npu", "mps"):  # no channels-last for five dims, and HCCL needs tensors contiguous
            return torch.contiguous_format
        return {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim, torch.contiguous_format)

    @property
    def convolution_cells(self) -> int | None:
        """The largest result, in rows x cols, that one convolution may compute; None if there is no limit."""
        return NPU_CONVOLUTION_CELLS if self.kind == "npu" else None

    def memory(self) -> tuple[int, int]:
        """Free and total bytes: the device's, as its driver reports them, or the host's."""
        if self.kind == "cpu":
            host_memory = psutil.virtual_memory()
            return host_memory.available, host_memory.total
        free, total = self.module.mem_get_info(self.torch_device)
        return int(free), int(total)

    @property
    def available(self) -> int:
        """Bytes that tensors could take: free ones, and those of the allocator's unused blocks."""
        free, _ = self.memory()
        if self.kind != "cpu":
            free += self.module.memory_reserved(self.torch_device) - self.module.memory_allocated(self.torch_device)
        return int(free)

    def describe(self) -> dict[str, str]:
        """The device's name and the versions of its software, for reports."""
        described = {"device": self._name(), "torch": torch.__version__, "python": host.python_version()}
        if self.kind == "cuda":
            described |= {"CUDA": str(torch.version.cuda), "driver": _nvidia_driver()}
        if self.kind == "npu":
            import torch_npu

            described |= {"torch_npu": torch_npu.__version__, "CANN": str(self.module.utils.get_cann_version())}
        return described

    def _name(self) -> str:
        if self.kind != "cpu":
            return f"{self.module.get_device_name(self.torch_device)} ({self.kind})"
        return f"{_processor()} ({self.count} cores)"


def _module(kind: str) -> Any:
    """torch's module for an accelerator; None if it is not installed or has no device. torch itself loads torch_npu."""
    module = metal if kind == "mps" else getattr(torch, kind, None)
    return module if isinstance(module, ModuleType) and module.is_available() else None


def _takes(function: Any, name: str) -> bool:
    """Whether a function or class takes an argument of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _loopback() -> str:
    """The name of the interface that has 127.0.0.1: lo on Linux, lo0 on macOS."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == "127.0.0.1" for address in addresses):
            return name
    raise OSError("no network interface has the address 127.0.0.1, which the ranks of one host use")


def _named_interface(variable: str) -> str:
    """The interface that an environment variable names, for ranks on several hosts.

    Raises:
        ValueError: it names none, several, loopback, or one that this host does not have.
    """
    loopback = _loopback()
    accepted = sorted(name for name in psutil.net_if_addrs() if name != loopback)
    named = os.environ.get(variable, "")
    if named.removeprefix("=") not in accepted:
        raise ValueError(
            f"{variable}={named}: the ranks span hosts, so it must name the one interface of their private network; "
            f"here: {', '.join(accepted) or 'none but loopback'}. Ranks on one host need LOCAL_WORLD_SIZE, as torchrun "
            "sets it"
        )
    return named.removeprefix("=")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return host.processor() or host.machine()


def _nvidia_driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as lines:
            return next(word for word in lines.readline().split() if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return "unknown"


def threads_per_rank(ranks: int) -> int:
    """The number of CPU threads that each of `ranks` processes on this host may use without slowing the others."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


class Stopwatch:
    """Measures the total time of several pieces of work, on the device's own clock if it has one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the work that is done, or queued on the current stream, within this context."""
        if self._device.kind == "cpu":
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
        else:
            module = self._device.module
            begun, ended = module.Event(enable_timing=True), module.Event(enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))

    def seconds(self) -> float:
        """Return the total in seconds, after the device has finished the work."""
        if self._events:
            self._device.synchronize()
        while self._events:
            begun, ended = self._events.pop()
            self._seconds += begun.elapsed_time(ended) / 1000
        return self._seconds

    def __getstate__(self) -> dict[str, Any]:
        self.seconds()  # events cannot be sent to another process
        return vars(self)


def cache_folder() -> Path:
    """The folder for graphs, calibrations, and compiled kernels: `HALOVAE_CACHE`, else the user's cache directory."""
    return Path(os.environ.get("HALOVAE_CACHE") or platformdirs.user_cache_path("halovae"))
