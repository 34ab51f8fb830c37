"""Copies to the host that run beside the device's other work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halovae.device.kinds import HOSTS, Device


class HostCopies:
    """Copies tensors of a device to pinned memory of the host, on a stream of their own.

    Args:
        device: where the tensors are.

    Attributes:
        beside: whether copies run beside other work: the device has streams.
    """

    def __init__(self, device: Device) -> None:
        module = None if device.kind in HOSTS else device.module
        self._module, self._device = module, device.torch_device
        self.beside = hasattr(module, "Stream")
        self._stream: Any = module.Stream(self._device) if module is not None and self.beside else None

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to copy a tensor, after the work that is queued now; return a function that waits for the copy.

        The tensor must not change until then. Its memory is kept.
        """
        module = self._module
        if module is None or not self.beside:
            return x.cpu
        self._stream.wait_stream(module.current_stream(self._device))
        host, ended = pinned(x), module.Event()
        with module.stream(self._stream):
            host.copy_(x, non_blocking=True)
            ended.record(self._stream)

        kept = [x]

        def wait() -> Tensor:
            ended.synchronize()
            kept.clear()
            return host

        return wait


def pinned(x: Tensor) -> Tensor:
    """Return memory of the host for a copy, laid out alike; not pinned where that is not allowed."""
    try:
        return torch.empty_like(x, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty_like(x, device="cpu")
