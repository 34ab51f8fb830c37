"""Triton kernels for norms, SiLU, sums and upsampling of maps: one pass each over an accelerator's memory.

PyTorch's GroupNorm runs one block per group of a map on devices that run hundreds of blocks, and copies channels-last
maps first; its nearest upsampling is 2.4 times as slow for channels-last maps as for others (H200, torch 2.11).

Maps are `[N, C, *]`, dense, channels last. Kernels compute in fp32, or in fp64 for fp64 maps, and round once. Attention
also rounds its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 4096  # values of a map per program, in registers
_PROGRAMS = 1024  # programs that share a map's statistics
_SCORES = 2**26  # attention scores in memory at once


@triton.jit
def _count_moments(
    x, shift, means, squares, cells, own, channels,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute each channel's mean and sum of squared deviations over a program's `own` cells (Welford's recurrence)."""
    part, item = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    row = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * own
    end = tl.minimum(first + own, cells)
    base = x + item.to(tl.int64) * cells * channels
    mean = tl.zeros((BLOCK, CHANNELS), WIDE)
    square = tl.zeros((BLOCK, CHANNELS), WIDE)
    if SHIFT:
        added = tl.load(shift + channel, channel < channels, 0).to(WIDE)
    count = tl.zeros((BLOCK, 1), WIDE)
    for start in range(first, end, BLOCK):
        cell = start + row[:, None]
        seen = cell < end
        value = tl.load(base + cell * channels + channel[None, :], seen & (channel[None, :] < channels), 0).to(WIDE)
        if SHIFT:
            value += added[None, :]
        count += tl.where(seen, 1.0, 0.0).to(WIDE)
        deviation = tl.where(seen, value - mean, 0.0)
        mean += deviation / tl.maximum(count, 1.0)
        square += deviation * (value - mean)
    total = tl.sum(count, 0)
    middle = tl.sum(mean * count, 0) / total
    deviation = mean - middle[None, :]
    total_square = tl.sum(square + deviation * deviation * count, 0)
    place = (item * tl.num_programs(0) + part) * channels + channel
    tl.store(means + place, middle, channel < channels)
    tl.store(squares + place, total_square, channel < channels)


@triton.jit
def _places_of_parts(start, parts, cells, own, channels, size, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Return the offsets of some parts' moments of a program's group, a mask of valid ones, and the cells of parts."""
    group, item = tl.program_id(0), tl.program_id(1)
    part = (start + tl.arange(0, BLOCK))[:, None]
    channel = tl.arange(0, SIZE)[None, :]
    place = (item * parts + part) * channels + group * size + channel
    return place, (part < parts) & (channel < size), tl.minimum(own, cells - part * own)


@triton.jit(do_not_specialize=["values"])
def _join_moments(
    means, squares, variance, mean, parts, cells, own, channels, size, values,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Combine channels' moments to the variance and mean of each group (Chan et al. 1983)."""
    total = tl.zeros((BLOCK, SIZE), WIDE)
    for start in range(0, parts, BLOCK):
        place, seen, count = _places_of_parts(start, parts, cells, own, channels, size, BLOCK, SIZE)
        total += tl.where(seen, tl.load(means + place, seen, 0) * count.to(WIDE), 0.0)
    middle = tl.sum(total) / values.to(WIDE)
    total = tl.zeros((BLOCK, SIZE), WIDE)
    for start in range(0, parts, BLOCK):
        place, seen, count = _places_of_parts(start, parts, cells, own, channels, size, BLOCK, SIZE)
        deviation = tl.load(means + place, seen, 0) - middle
        total += tl.where(seen, tl.load(squares + place, seen, 0) + deviation * deviation * count.to(WIDE), 0.0)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(variance + place, tl.sum(total) / values.to(WIDE))
    tl.store(mean + place, middle)


@triton.jit
def _join_parts(parts, shares, out, count, ranks, BLOCK: tl.constexpr):
    """Combine variances and means of parts, weighted by their shares of the values (Chan et al. 1983)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = place < count
    mean = tl.zeros((BLOCK,), out.dtype.element_ty)
    for part in range(0, ranks):
        mean += tl.load(shares + part) * tl.load(parts + (2 * part + 1) * count + place, seen, 0)
    variance = tl.zeros((BLOCK,), out.dtype.element_ty)
    for part in range(0, ranks):
        deviation = tl.load(parts + (2 * part + 1) * count + place, seen, 0) - mean
        square = tl.load(parts + 2 * part * count + place, seen, 0) + deviation * deviation
        variance += tl.load(shares + part) * square
    tl.store(out + place, variance, seen)
    tl.store(out + count + place, mean, seen)


@triton.jit
def _places(frames, height, width, channels, item_step, frame_step, row_step, BLOCK: tl.constexpr):
    """Return a program's item, its cells' offsets in a dense map and in a strided one, and a mask of existing cells."""
    blocks = tl.cdiv(width, BLOCK)
    row_index = tl.program_id(0) // blocks
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    item = row_index // (frames * height)
    frame, row = row_index // height % frames, row_index % height
    source = (row_index.to(tl.int64) * width + cell) * channels
    target = item.to(tl.int64) * item_step + frame.to(tl.int64) * frame_step + row.to(tl.int64) * row_step
    return item, source, target + cell * channels, cell < width


@triton.jit
def _write_group_norm(
    x, shift, out, variance, mean, weight, bias, frames, height, width, channels, size, item_step, frame_step, row_step,
    EPS: tl.constexpr, SHIFT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    item, source, target, seen = _places(frames, height, width, channels, item_step, frame_step, row_step, BLOCK)
    channel = tl.arange(0, CHANNELS)
    there = channel < channels
    place = item * (channels // size) + channel // size
    scale = tl.rsqrt(tl.load(variance + place, there, 1) + EPS)
    middle = tl.load(mean + place, there, 0)
    if SHIFT:
        middle -= tl.load(shift + channel, there, 0).to(WIDE)
    if WEIGHT:
        scale *= tl.load(weight + channel, there, 0).to(WIDE)
    mask = seen[:, None] & there[None, :]
    value = (tl.load(x + source[:, None] + channel[None, :], mask, 0).to(WIDE) - middle[None, :]) * scale[None, :]
    if BIAS:
        value += tl.load(bias + channel, there, 0).to(WIDE)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + target[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask)


@triton.jit
def _write_norm_of_cells(
    x, shift, out, weight, frames, height, width, channels, item_step, frame_step, row_step,
    SHIFT: tl.constexpr, LEAST: tl.constexpr, ADDED: tl.constexpr, FACTOR: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, source, target, seen = _places(frames, height, width, channels, item_step, frame_step, row_step, BLOCK)
    channel = tl.arange(0, CHANNELS)
    there = channel < channels
    mask = seen[:, None] & there[None, :]
    value = tl.load(x + source[:, None] + channel[None, :], mask, 0).to(WIDE)
    if SHIFT:
        value += tl.load(shift + channel, there, 0).to(WIDE)[None, :]
    if NORM:
        length = tl.maximum(tl.sqrt(tl.sum(value * value, 1) + ADDED), LEAST, propagate_nan=tl.PropagateNan.ALL)
        value = value / length[:, None] * FACTOR
        if WEIGHT:
            value *= tl.load(weight + channel, there, 0).to(WIDE)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + target[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask)


@triton.jit
def _write_upsampled(
    x, out, frames, height, width, channels,
    TIMES: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the upsampled map. `frames`, `height` and `width` are the extents of the result."""
    blocks = tl.cdiv(width, BLOCK)
    row_index = tl.program_id(0) // blocks
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    item, frame, row = row_index // (frames * height), row_index // height % frames, row_index % height
    above = (item * (frames // TIMES) + frame // TIMES) * (height // DOWN) + row // DOWN
    source = (above.to(tl.int64) * (width // ACROSS) + cell // ACROSS) * channels
    target = (row_index.to(tl.int64) * width + cell) * channels
    channel = tl.arange(0, CHANNELS)
    mask = (cell < width)[:, None] & (channel < channels)[None, :]
    value = tl.load(x + source[:, None] + channel[None, :], mask, 0)
    tl.store(out + target[:, None] + channel[None, :], value, mask)


@triton.jit
def _write_sum(x, y, bias, out, count, channels, OTHER: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    value = tl.load(x + place, mask, 0).to(WIDE)
    if OTHER:
        value += tl.load(y + place, mask, 0).to(WIDE)
    value += tl.load(bias + place % channels, mask, 0).to(WIDE)
    tl.store(out + place, value.to(out.dtype.element_ty), mask)


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


def moments(x: Tensor, shift: Tensor | None, groups: int) -> Tensor:
    """Return variance and mean `[2, N, groups]` of groups of channels, at least in fp32. Add `shift` `[C]` before."""
    x = _dense(x)
    items, channels = x.shape[:2]
    cells = x.shape[2:].numel()
    width, block, wide = _sizes(x)
    own = max(block, triton.cdiv(triton.cdiv(cells, _PROGRAMS), block) * block)
    parts = triton.cdiv(cells, own)
    dtype = torch.promote_types(x.dtype, torch.float32)
    means, squares = torch.empty((2, items, parts, channels), dtype=dtype, device=x.device)
    result = torch.empty((2, items, groups), dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _count_moments[(parts, items)](
            x, shift, means, squares, cells, own, channels, shift is not None, block, width, wide
        )
        size = channels // groups
        padded = triton.next_power_of_2(size)
        _join_moments[(groups, items)](
            means, squares, *result.unbind(), parts, cells, own, channels, size, cells * size,
            max(1, 2048 // padded), padded, wide,
        )  # fmt: skip
    return result


def together(parts: Tensor, shares: Tensor) -> Tensor:
    """Combine variances and means of parts, `[parts, 2, *]`, to `[2, *]`. `shares`: the parts' shares of the values."""
    result = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    count = result[0].numel()
    with torch.cuda.device_of(parts):
        _join_parts[(triton.cdiv(count, 128),)](parts.contiguous(), shares, result, count, len(parts), 128)
    return result


def group_norm(
    x: Tensor, shift: Tensor | None, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    silu: bool, out: Tensor,
) -> None:  # fmt: skip
    """Apply GroupNorm and SiLU to a map, given its groups' variance and mean, into `out`.

    Args:
        x: `[N, C, *]`.
        shift: `[C]`, added to the map before.
        moments: variance and mean `[2, N, groups]` of the map, with `shift` added.
        weight: `[C]`.
        bias: `[C]`.
        eps: added to the variance.
        silu: whether SiLU follows.
        out: of the map's shape, channels last; may be a view of a larger map.
    """
    x = _dense(x)
    channels, steps = x.shape[1], _steps(out)
    width, block, wide = _sizes(x)
    frames, height, cols = _extents(x)
    with torch.cuda.device_of(x):
        _write_group_norm[_grid(x, block)](
            x, shift, out, *moments.contiguous().unbind(), weight, bias, frames, height, cols, channels,
            channels // moments.shape[2], *steps, eps, shift is not None, weight is not None, bias is not None, silu,
            block, width, wide,
        )  # fmt: skip


def norm_of_cells(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    norm: tuple[float, float, float] | None,
    silu: bool,
    out: Tensor,
) -> None:
    """Divide each cell's channels by their Euclidean norm, times a factor and `weight`; then SiLU; into `out`.

    Args:
        x: `[N, C, *]`.
        shift: `[C]`, added to the map before.
        weight: of any shape with C values.
        norm: the least divisor, the number added to the sum of squares, and the factor; None for only SiLU, or a copy.
        silu: whether SiLU follows.
        out: of the map's shape, channels last; may be a view of a larger map.
    """
    x = _dense(x)
    width, block, wide = _sizes(x)
    frames, height, cols = _extents(x)
    least, added, factor = norm or (0.0, 0.0, 1.0)
    with torch.cuda.device_of(x):
        _write_norm_of_cells[_grid(x, block)](
            x, shift, out, weight, frames, height, cols, x.shape[1], *_steps(out), shift is not None, least, added,
            factor, norm is not None, weight is not None, silu, block, width, wide,
        )  # fmt: skip


def add(x: Tensor, y: Tensor | None, bias: Tensor, out: Tensor) -> None:
    """Add two maps and a bias `[C]` into `out`, which may be one of the maps; all of one shape, dense."""
    *_, wide = _sizes(x)
    block = 2 * _VALUES // x.element_size()
    with torch.cuda.device_of(x):
        _write_sum[(triton.cdiv(x.numel(), block),)](x, y, bias, out, x.numel(), x.shape[1], y is not None, block, wide)


def upsampled(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Repeat each frame, row and col of a map `[N, C, *]` by `factors`, one per dim of `*`."""
    x = _dense(x)
    sizes = *x.shape[:2], *(size * factor for size, factor in zip(x.shape[2:], factors, strict=True))
    form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=form)
    frames, height, cols = _extents(out)
    times, down, across = (1, *factors)[-3:]
    width, block, _ = _sizes(x)
    with torch.cuda.device_of(x):
        _write_upsampled[_grid(out, block)](x, out, frames, height, cols, x.shape[1], times, down, across, block, width)
    return out


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
        with torch.cuda.device_of(query):
            block = min(4096, triton.next_power_of_2(columns))
            _write_softmax[(scores.numel() // columns,)](scores, weights, columns, scale, block)
        out[:, start : start + step] = torch.bmm(weights, value)
    return out


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.bmm(x.float(), y.float())


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _extents(x: Tensor) -> tuple[int, int, int]:
    *frames, height, width = x.shape[2:]
    return math.prod(frames), height, width


def _steps(out: Tensor) -> tuple[int, int, int]:
    """Return the strides of a map's items, frames and rows. Its cells and channels are contiguous."""
    assert out.shape[1] == 1 or out.stride(1) == 1
    assert out.shape[-1] == 1 or out.stride(-1) == out.shape[1]
    return out.stride(0), out.stride(2) if out.ndim == 5 else 0, out.stride(-2)


def _sizes(x: Tensor) -> tuple[int, int, object]:
    """Return the channels and cells per program, as powers of two, and the dtype that it computes in."""
    width = triton.next_power_of_2(x.shape[1])
    return width, max(1, _VALUES // width), tl.float64 if x.dtype == torch.float64 else tl.float32


def _grid(x: Tensor, block: int) -> tuple[int]:
    frames, height, width = _extents(x)
    return (x.shape[0] * frames * height * triton.cdiv(width, block),)
