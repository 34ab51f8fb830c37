"""What passes over memory are made with on a device, besides PyTorch's operators."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def kernels(kind: str) -> Any:
    """The module `triton_kernels` where it runs, on CUDA devices that have Triton beside PyTorch; else None."""
    if kind != "cuda":
        return None
    try:
        from halovae.plane import triton_kernels
    except ImportError:
        return None
    return triton_kernels
