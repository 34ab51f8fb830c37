"""The stage `kernels` of `accelerator.py`: each Triton kernel beside the same by PyTorch's operators, and compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.device.kinds import Device
from halovae.plane import backends
from halovae.plane.norms import per_channel

Record = dict[str, Any]
Times = Callable[[Device, Callable[[], Any]], list[float]]
CLIP, PICTURE = (192, 4, 240, 416), (256, 512, 512)
"""Maps of Wan2.1 at 832x480 and of FLUX at 1024x1024: channels, then frames, rows, and cols."""


def cases(device: Device, toys: bool, times: Times) -> dict[str, Callable[[], Record]]:
    """Return the cases by name. On the CPU, Triton's interpreter stands for the compiler.

    Args:
        device: which computes.
        toys: whether maps are tiny.
        times: measures a function.
    """
    clip, picture = ((6, 2, 5, 7), (6, 7, 9)) if toys else (CLIP, PICTURE)
    makers: dict[str, Callable[[Any, Device, tuple[int, ...]], Any]] = {
        "norm over channels, SiLU, into a window": _norm_of_cells,
        "the same of a sum with bias and residual": partial(_norm_of_cells, of_sum=True),
        "GroupNorm, SiLU": _group_norm,
        "the same of a sum with bias and residual, statistics in one pass": partial(_group_norm, of_sum=True),
        "upsampling into a window": _upsampling,
        "packing two halo borders": _packing,
        "unpacking two halo borders": _unpacking,
        "pictures to bytes": _bytes,
    }
    return {
        f"{name}, {'x'.join(map(str, shape))}": partial(_compared, device, make, shape, times, toys)
        for name, make in makers.items()
        for shape in ((clip, picture) if "over channels" not in name else (clip,))
    }


def _compared(device: Device, make: Any, shape: tuple[int, ...], times: Times, toys: bool) -> Record:
    """Seconds by the kernel, by PyTorch, and by PyTorch compiled; and how far the kernel is from PyTorch in fp64."""
    kernels = backends.kernels(device.kind)
    if kernels is None and toys:
        from halovae.kernels import triton_kernels as kernels
    if kernels is None:
        return {"kernel": "none: Triton has no driver for this device, or cannot compile"}
    by_kernel, plain, wide = make(kernels, device, shape)
    found, truth = by_kernel().double(), wide()
    error = float((found - truth).abs().max() / truth.abs().max())
    compiled = torch.compile(plain, backend="eager" if toys else "inductor", dynamic=False)
    return {
        "seconds": statistics.median(times(device, by_kernel)), "by PyTorch": statistics.median(times(device, plain)),
        "compiled": statistics.median(times(device, compiled)), "error": error, "plain": 0.0, "exact": error <= 2e-2,
    }  # fmt: skip


def _map(device: Device, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, *shape, generator=generator).to(device.torch_device, torch.bfloat16)
    return x.contiguous(memory_format=device.layout(x.ndim))


def _window(x: Tensor, times: int = 1) -> tuple[Tensor, Tensor]:
    rows, cols = times * x.shape[-2], times * x.shape[-1]
    whole = x.new_zeros(*x.shape[:-2], rows + 2, cols + 2)
    whole = whole.contiguous(memory_format=Device(x.device).layout(x.ndim))
    return whole, whole[..., 1:-1, 1:-1]


def _norm_of_cells(kernels: Any, device: Device, shape: tuple[int, ...], of_sum: bool = False) -> Any:
    x, y, gamma = _map(device, shape), _map(device, shape, 1), _map(device, (shape[0], 1, 1)).flatten()
    (_, inner), factor = _window(x), shape[0] ** 0.5
    own, bias, plus = x.clone(), gamma if of_sum else None, y if of_sum else None

    def by_kernel() -> Tensor:
        kernels.norm_of_cells(own, bias, gamma, (1e-12, 0.0, factor), True, inner, plus)
        return inner

    def plain() -> Tensor:
        given = x + y + per_channel(gamma, x) if of_sum else x
        normalized = F.normalize(given.float(), dim=1) * factor
        inner.copy_(F.silu(normalized.to(x.dtype) * per_channel(gamma, x)))
        return inner

    def wide() -> Tensor:
        given = (x.double() + y.double() + per_channel(gamma, x).double()) if of_sum else x.double()
        return F.silu(F.normalize(given, dim=1) * factor * per_channel(gamma, x).double())

    return by_kernel, plain, wide


def _group_norm(kernels: Any, device: Device, shape: tuple[int, ...], of_sum: bool = False) -> Any:
    x, y, gamma = _map(device, shape), _map(device, shape, 1), _map(device, (shape[0], 1, 1)).flatten()
    groups = 32 if shape[0] % 32 == 0 else 2
    own, out, bias, plus = x.clone(), torch.empty_like(x), gamma if of_sum else None, y if of_sum else None

    def by_kernel() -> Tensor:
        moments = kernels.moments(own, bias, groups, plus)
        kernels.group_norm(own, None, moments, gamma, gamma, 1e-6, True, out)
        return out

    def plain() -> Tensor:
        given = x + y + per_channel(gamma, x) if of_sum else x
        return F.silu(F.group_norm(given, groups, gamma, gamma, 1e-6))

    def wide() -> Tensor:
        given = (x.double() + y.double() + per_channel(gamma, x).double()) if of_sum else x.double()
        return F.silu(F.group_norm(given, groups, gamma.double(), gamma.double(), 1e-6))

    return by_kernel, plain, wide


def _upsampling(kernels: Any, device: Device, shape: tuple[int, ...]) -> Any:
    x = _map(device, shape)
    _, inner = _window(x, 2)
    factors = (1,) * (len(shape) - 3) + (2, 2)

    def by_kernel() -> Tensor:
        kernels.upsample(x, factors, inner)
        return inner

    def plain() -> Tensor:
        return inner.copy_(F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest"))

    return by_kernel, plain, lambda: plain().double()


def _borders(whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The halo before, the first and last rows, and the halo after."""
    first, second, *_ = whole.unbind(-2)
    *_, before, last = whole.unbind(-2)
    return first.unsqueeze(-2), second.unsqueeze(-2), before.unsqueeze(-2), last.unsqueeze(-2)


def _packing(kernels: Any, device: Device, shape: tuple[int, ...]) -> Any:
    _, first, last, _ = _borders(_map(device, shape))

    def plain() -> Tensor:
        return torch.stack((first.contiguous(), last.contiguous()))

    return lambda: kernels.packed(first, last), plain, lambda: plain().double()


def _unpacking(kernels: Any, device: Device, shape: tuple[int, ...]) -> Any:
    whole = _map(device, shape)
    before, first, last, after = _borders(whole)
    messages = torch.stack((first.contiguous(), last.contiguous()))

    def by_kernel() -> Tensor:
        kernels.unpack((messages[0], messages[1]), (before, after))
        return whole

    def plain() -> Tensor:
        before.copy_(messages[0])
        after.copy_(messages[1])
        return whole

    return by_kernel, plain, lambda: plain().double()


def _bytes(kernels: Any, device: Device, shape: tuple[int, ...]) -> Any:
    x = _map(device, (3, *shape[1:]))

    def plain() -> Tensor:
        return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8, memory_format=torch.contiguous_format)

    return lambda: kernels.as_bytes(x), plain, lambda: plain().double()
