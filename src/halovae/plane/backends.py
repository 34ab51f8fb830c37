"""Which kernels of halovae's own a device has, besides PyTorch's operators."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

from halovae.device.kinds import HOSTS

_PROGRAMS = 2**17  # more than some devices start at once, and fewer than a large map needs


@cache
def kernels(kind: str) -> Any:
    """Return `halovae.kernels.triton_kernels` where Triton's driver is of this kind of device and compiles; else None.

    Warns:
        RuntimeWarning: Triton is installed, but cannot compile. Is a C compiler missing, or is the device too old?
    """
    if kind in HOSTS:
        return None
    try:
        from triton.runtime import driver

        active = driver.active.get_active_torch_device()
        from halovae.kernels import triton_kernels
    except Exception:  # Triton is not installed, has no driver for what is here, or several
        return None
    if active is None or active.type != kind:
        return None
    try:
        x = torch.zeros(1, 1, _PROGRAMS, 1, device=kind)
        triton_kernels.moments(x, None, 1)
        triton_kernels.norm_of_cells(x, None, None, (1.0, 0.0, 1.0), True, x)
    except Exception as error:  # compilers may raise anything
        warnings.warn(f"norms run uncompiled, since Triton cannot compile here: {error}", RuntimeWarning, stacklevel=2)
        return None
    return triton_kernels


def takes(x: torch.Tensor) -> bool:
    """Whether kernels read a tensor: a map `[N, C, *]` with rows and cols, of a dtype that they compute."""
    return x.ndim in (4, 5) and x.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
