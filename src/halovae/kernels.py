"""Passes over memory that come between the multiplications: each reads once and writes once, into memory it is given.

Eager PyTorch runs them anywhere; `torch.compile` fuses each into one loop. All maps are seen with the channels last,
`[B, T, H, W, C]`, whatever their layout in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Matrix = Sequence[Sequence[float]]


def norm_silu(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """`silu(x / max(|x|, 1e-12) * scale)` over the last dim, in fp32 at least, rounded once into `out`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
    out.copy_(F.silu(wide * inverse * scale))


def spread(x: Tensor, rows: Matrix, step: int, out: Tensor) -> None:
    """`out[p, a, n, k] = sum over i of rows[p][i] * x[a, n * step + i, k]`, in the dtype of `out`."""
    last = step * (out.shape[2] - 1) + 1
    out.copy_(torch.stack(_combined(rows, [x[:, i : i + last : step].to(out.dtype) for i in range(len(rows[0]))])))


def merge(products: Tensor, rows: Matrix, out: Tensor) -> None:
    """`out[a, q, k] = sum over p of rows[q][p] * products[p, a, k]`."""
    out.copy_(torch.stack(_combined(rows, products.unbind(0)), dim=1))


def merge_into(products: Tensor, rows: Matrix, bias: Tensor, out: Tensor, add: bool) -> None:
    """`out[t, n, q, w, c] = bias[c] + sum over p of rows[q][p] * products[p, t, n, w, c]`; added to `out` if `add`."""
    merged = torch.stack(_combined(rows, products.unbind(0)), dim=2) + bias
    out.copy_(merged + out if add else merged)


def _combined(rows: Matrix, parts: Sequence[Tensor]) -> list[Tensor]:
    sums = []
    for row in rows:
        terms = [part if factor == 1 else part * factor for factor, part in zip(row, parts, strict=True) if factor]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        sums.append(total)
    return sums


@dataclass(frozen=True)
class Kernels:
    """The functions of this module, eager or compiled."""

    norm_silu: Callable[..., None]
    spread: Callable[..., None]
    merge: Callable[..., None]
    merge_into: Callable[..., None]


EAGER = Kernels(norm_silu, spread, merge, merge_into)


@cache
def compiled() -> Kernels:
    """The kernels as `torch.compile` makes them, when each meets its first tensors; it keeps them between processes."""
    import torch._dynamo  # takes seconds, and only those who compile need it

    # Each scheme and dtype, images and video: more kinds of tensors than the 8 that torch takes for a mistake.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return Kernels(*(torch.compile(kernel, dynamic=True) for kernel in (norm_silu, spread, merge, merge_into)))


def works(device: torch.device) -> bool:
    """Whether kernels can be compiled for `device` here.

    Warns:
        RuntimeWarning: they cannot, and why.
    """
    if device.type == "npu":  # has no Inductor of its own
        return False
    try:
        with torch.inference_mode():
            x = torch.zeros(2, 3, device=device)
            compiled().norm_silu(x, x[0], torch.empty_like(x))
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(f"kernels run uncompiled, since one could not be compiled: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True
