"""Which kernels of halovae's own a device has, besides PyTorch's operators."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch


@cache
def kernels(kind: str) -> Any:
    """Return the module `triton_kernels` on CUDA devices where Triton is installed and works; else None.

    Warns:
        RuntimeWarning: Triton is installed, but cannot compile. Is a C compiler missing, or is the device too old?
    """
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    try:
        from halovae.plane import triton_kernels
    except ImportError:
        return None
    try:
        triton_kernels.moments(torch.zeros(1, 1, 1, 1, device=kind), None, 1)
    except Exception as error:  # compilers may raise anything
        warnings.warn(f"norms run uncompiled, since Triton cannot compile here: {error}", RuntimeWarning, stacklevel=2)
        return None
    return triton_kernels
