"""What passes over memory are made with on a device, besides PyTorch's operators."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch


@cache
def kernels(kind: str) -> Any:
    """The module `triton_kernels` where it runs, on CUDA devices that have Triton beside PyTorch; else None.

    Warns:
        RuntimeWarning: Triton is there, but compiles nothing: is there no C compiler, or is the device too old for it?
    """
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    try:
        from halovae.plane import triton_kernels
    except ImportError:
        return None
    try:
        triton_kernels.moments(torch.zeros(1, 1, 1, 1, device=kind), None, 1)
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(
            f"norms run uncompiled, since Triton compiles nothing here: {error}", RuntimeWarning, stacklevel=2
        )
        return None
    return triton_kernels
