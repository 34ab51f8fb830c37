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

from halovae.schemes import SCHEMES, Matrix


def normalize(x: Tensor, scale: Tensor, limits: Tensor, silu: bool, out: Tensor) -> None:
    """`x / sqrt(max(|x|^2 + added, least)) * scale` over the last dim, in fp32 at least, rounded once into `out`.

    Args:
        x: the map.
        scale: `[C]`.
        limits: `added` and `least`, as `limits` makes them. As numbers they would be symbols, which Inductor cannot
            compile (torch 2.13).
        silu: whether SiLU follows.
        out: of the map's shape; no memory of it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    added, least = limits.unbind()
    inverse = torch.maximum(wide.square().sum(-1, keepdim=True) + added, least).rsqrt()
    result = wide * inverse * scale
    out.copy_(F.silu(result) if silu else result)


@cache
def limits(added: float, least: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The limits of `normalize`, made once: a copy to an accelerator waits for all that is queued there."""
    with torch.inference_mode(False):  # they outlive the call
        return torch.tensor((added, least), dtype=dtype, device=device)


def spread(x: Tensor, scheme: str, outs: Sequence[Tensor]) -> None:
    """`outs[p][a, n, k] = sum over i of spread[p][i] * x[a, n * step + i, k]`, in the dtype of `outs`."""
    rows, step = _spreading(scheme)
    last = step * (outs[0].shape[1] - 1) + 1
    parts = [x[:, i : i + last : step].to(outs[0].dtype) for i in range(len(rows[0]))]
    for out, total in zip(outs, _combined(rows, parts), strict=True):
        out.copy_(total)


def merge(products: Sequence[Tensor], scheme: str, bias: Tensor, outs: Sequence[Tensor], add: bool) -> None:
    """`outs[q][a, k] = bias[k] + sum over p of merge[q][p] * products[p][a, k]`; added to `outs` if `add`."""
    for out, total in zip(outs, _combined(_merging(scheme), products), strict=True):
        merged = total + bias
        out.copy_(merged + out if add else merged)


# What these two return is a constant of compiled code. As arguments, factors would be loaded for each value.
def _spreading(scheme: str) -> tuple[Matrix, int]:
    return SCHEMES[scheme].spread, SCHEMES[scheme].step


def _merging(scheme: str) -> Matrix:
    return SCHEMES[scheme].merge


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

    normalize: Callable[..., None]
    spread: Callable[..., None]
    merge: Callable[..., None]


EAGER = Kernels(normalize, spread, merge)


@cache
def compiled() -> Kernels:
    """The kernels as `torch.compile` makes them, when each meets its first tensors; it keeps them between processes."""
    import torch._dynamo  # takes seconds, and only those who compile need it

    # Each scheme and dtype, images and video: more kinds of tensors than the 8 that torch takes for a mistake.
    for constant in (_spreading, _merging):
        torch.compiler.assume_constant_result(constant)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return Kernels(*(torch.compile(kernel, dynamic=True) for kernel in (normalize, spread, merge)))


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
            compiled().normalize(x, x[0], x[0, :2], True, torch.empty_like(x))
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(f"kernels run uncompiled, since one could not be compiled: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True
