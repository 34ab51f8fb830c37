"""Attention of wide heads by matrix products and a softmax."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from halovae.kernels.triton_kernels.maps import device_of

_SCORES = 2**26  # attention scores in memory at once


@triton.jit
def _write_softmax(scores, out, columns, scale, BLOCK: tl.constexpr):
    """Compute the softmax of a row of fp32 scores times `scale`."""
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        seen = first + column < columns
        value = tl.where(seen, tl.load(scores + start + first + column, seen, 0) * scale, float("-inf"))
        higher = tl.maximum(highest, value)
        # For masked values, and before the first value, the difference would be inf - inf.
        total = total * tl.where(highest == higher, 1.0, tl.exp(highest - higher)) + tl.where(
            seen, tl.exp(value - higher), 0.0
        )
        highest = higher
    top = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - top), 0)
    for first in range(0, columns, BLOCK):
        seen = first + column < columns
        value = tl.load(scores + start + first + column, seen, 0) * scale
        tl.store(out + start + first + column, (tl.exp(value - top) / total).to(out.dtype.element_ty), seen)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute attention `[B, heads, L, D]` in half precision, with scores in fp32, some queries at a time.

    PyTorch's flash attention supports heads of at most 256 channels. Autoencoders have one head of 512. There PyTorch's
    memory-efficient kernel ran at 120 TFLOP/s, and matrix products run at 600 (H100, 16384 cells).
    """
    length, columns = query.shape[-2], key.shape[-2]
    query, key, value = (tensor.flatten(0, -3) for tensor in (query, key, value))
    out = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
    step = max(1, _SCORES // (columns * len(query)))
    for start in range(0, length, step):
        part = query[:, start : start + step]
        scores = _product(part, key.transpose(-1, -2))
        weights = torch.empty_like(scores, dtype=query.dtype)
        with device_of(query):
            block = min(4096, triton.next_power_of_2(columns))
            _write_softmax[(scores.numel() // columns,)](scores, weights, columns, scale, block)
        out[:, start : start + step] = torch.bmm(weights, value)
    return out


def _product(x: Tensor, y: Tensor) -> Tensor:
    if _widens(x.device):
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(x.float(), y.float())


@cache
def _widens(device: torch.device) -> bool:
    """Whether a device's matrix products of half precision can return fp32."""
    try:
        x = torch.ones(1, 8, 8, dtype=torch.bfloat16, device=device)
        torch.bmm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True
