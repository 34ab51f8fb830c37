"""Norms over groups of channels and over each cell's, SiLU, and sums of maps: one pass each over memory.

PyTorch's GroupNorm runs one block per group of a map on devices that run hundreds of blocks, and copies channels-last
maps first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halovae.kernels.triton_kernels.maps import VALUES, device_of, extents, flat, grid, row_of_program, sizes, steps

_PROGRAMS = 1024  # programs that share a map's statistics


@triton.jit
def _count_moments(
    x, plus, shift, means, squares, cells, own, channels, item_step, cell_step, channel_step,
    PLUS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute each channel's mean and sum of squared deviations over a program's `own` cells (Welford's recurrence).

    With `plus`, the map's sum with it replaces the map first.
    """
    part, item = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    row = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * own
    end = tl.minimum(first + own, cells)
    base = item.to(tl.int64) * item_step
    mean = tl.zeros((BLOCK, CHANNELS), WIDE)
    square = tl.zeros((BLOCK, CHANNELS), WIDE)
    if SHIFT:
        added = tl.load(shift + channel, channel < channels, 0).to(WIDE)
    count = tl.zeros((BLOCK, 1), WIDE)
    for start in range(first, end, BLOCK):
        cell = start + row[:, None]
        seen = cell < end
        place = base + cell * cell_step + channel[None, :].to(tl.int64) * channel_step
        mask = seen & (channel[None, :] < channels)
        value = tl.load(x + place, mask, 0).to(WIDE)
        if PLUS:
            value += tl.load(plus + place, mask, 0).to(WIDE)
        if SHIFT:
            value += added[None, :]
        if PLUS:
            rounded = value.to(x.dtype.element_ty)
            tl.store(x + place, rounded, mask)
            value = rounded.to(WIDE)
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
def _write_group_norm(
    x, shift, out, variance, mean, weight, bias, frames, height, width, channels, size, x_item, x_cell, x_channel,
    out_item, out_channel, out_frame, out_row, out_col, EPS: tl.constexpr, SHIFT: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    item, frame, row, col, seen = row_of_program(frames, height, width, BLOCK)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    there = channel < channels
    place = item * (channels // size) + channel // size
    scale = tl.rsqrt(tl.load(variance + place, there, 1) + EPS)
    middle = tl.load(mean + place, there, 0)
    if SHIFT:
        middle -= tl.load(shift + channel, there, 0).to(WIDE)
    if WEIGHT:
        scale *= tl.load(weight + channel, there, 0).to(WIDE)
    mask = seen[:, None] & there[None, :]
    source = item * x_item + ((frame * height + row) * width + col) * x_cell
    target = item * out_item + frame * out_frame + row * out_row + col * out_col
    value = tl.load(x + source[:, None] + channel[None, :] * x_channel, mask, 0).to(WIDE)
    value = (value - middle[None, :]) * scale[None, :]
    if BIAS:
        value += tl.load(bias + channel, there, 0).to(WIDE)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + target[:, None] + channel[None, :] * out_channel, value.to(out.dtype.element_ty), mask)


@triton.jit
def _write_norm_of_cells(
    x, plus, shift, out, weight, frames, height, width, channels, x_item, x_cell, x_channel, out_item, out_channel,
    out_frame, out_row, out_col, PLUS: tl.constexpr, KEEP: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr,
    ADDED: tl.constexpr, FACTOR: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, SILU: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the normalized map. With `plus`, its sum with the map is normalized, and with KEEP it replaces the map."""
    item, frame, row, col, seen = row_of_program(frames, height, width, BLOCK)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    there = channel < channels
    mask = seen[:, None] & there[None, :]
    source = item * x_item + ((frame * height + row) * width + col) * x_cell
    source = source[:, None] + channel[None, :] * x_channel
    value = tl.load(x + source, mask, 0).to(WIDE)
    if PLUS:
        value += tl.load(plus + source, mask, 0).to(WIDE)
    if SHIFT:
        value += tl.load(shift + channel, there, 0).to(WIDE)[None, :]
    if PLUS:
        rounded = value.to(x.dtype.element_ty)
        if KEEP:
            tl.store(x + source, rounded, mask)
        value = rounded.to(WIDE)
    if NORM:
        length = tl.maximum(tl.sqrt(tl.sum(value * value, 1) + ADDED), LEAST, propagate_nan=tl.PropagateNan.ALL)
        value = value / length[:, None] * FACTOR
        if WEIGHT:
            value *= tl.load(weight + channel, there, 0).to(WIDE)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    target = item * out_item + frame * out_frame + row * out_row + col * out_col
    tl.store(out + target[:, None] + channel[None, :] * out_channel, value.to(out.dtype.element_ty), mask)


@triton.jit
def _write_sum(
    x, y, bias, out, count, channels, inner,
    OTHER: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add maps and a bias in the order of their memory, where `inner` values of one channel are neighbors."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    value = tl.load(x + place, mask, 0).to(WIDE)
    if OTHER:
        value += tl.load(y + place, mask, 0).to(WIDE)
    value += tl.load(bias + place // inner % channels, mask, 0).to(WIDE)
    tl.store(out + place, value.to(out.dtype.element_ty), mask)


def adds(*maps: Tensor) -> bool:
    """Whether kernels can add maps: all of one shape, dtype and layout, channels last or contiguous, without gaps."""
    first = maps[0]
    form = torch.channels_last if first.ndim == 4 else torch.channels_last_3d
    plain = first.ndim in (4, 5) and (first.is_contiguous() or first.is_contiguous(memory_format=form))
    return plain and all(
        (one.shape, one.stride(), one.dtype) == (first.shape, first.stride(), first.dtype) for one in maps[1:]
    )


def moments(x: Tensor, shift: Tensor | None, groups: int, plus: Tensor | None = None) -> Tensor:
    """Return variance and mean `[2, N, groups]` of groups of channels, at least in fp32.

    Args:
        x: `[N, C, *]`.
        shift: `[C]`, added to the map before.
        groups: of channels.
        plus: a map that `adds` allows. The sum with it, and with `shift`, is written to `x`; moments are those of it.
    """
    x, *strides = flat(x)
    items, channels = x.shape[:2]
    cells = x.shape[2:].numel()
    width, block, wide = sizes(x)
    own = max(block, triton.cdiv(triton.cdiv(cells, _PROGRAMS), block) * block)
    parts = triton.cdiv(cells, own)
    dtype = torch.promote_types(x.dtype, torch.float32)
    means, squares = torch.empty((2, items, parts, channels), dtype=dtype, device=x.device)
    result = torch.empty((2, items, groups), dtype=dtype, device=x.device)
    with device_of(x):
        _count_moments[(parts, items)](
            x, plus, shift, means, squares, cells, own, channels, *strides, plus is not None, shift is not None, block,
            width, wide,
        )  # fmt: skip
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
    with device_of(parts):
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
        out: of the map's shape; may be a view of a larger map.
    """
    x, *strides = flat(x)
    channels = x.shape[1]
    width, block, wide = sizes(x)
    with device_of(x):
        _write_group_norm[grid(x, block)](
            x, shift, out, *moments.contiguous().unbind(), weight, bias, *extents(x), channels,
            channels // moments.shape[2], *strides, *steps(out), eps, shift is not None, weight is not None,
            bias is not None, silu, block, width, wide,
        )  # fmt: skip


def norm_of_cells(
    x: Tensor, shift: Tensor | None, weight: Tensor | None, norm: tuple[float, float, float] | None, silu: bool,
    out: Tensor, plus: Tensor | None = None,
) -> None:  # fmt: skip
    """Divide each cell's channels by their Euclidean norm, times a factor and `weight`; then SiLU; into `out`.

    Args:
        x: `[N, C, *]`.
        shift: `[C]`, added to the map before.
        weight: of any shape with C values.
        norm: the least divisor, the number added to the sum of squares, and the factor; None for only SiLU, or a copy.
        silu: whether SiLU follows.
        out: of the map's shape; may be a view of a larger map.
        plus: a map that `adds` allows. The sum with it, and with `shift`, is normalized. It is written to `x`, too,
            unless that is `out`.
    """
    x, *strides = flat(x)
    width, block, wide = sizes(x)
    least, added, factor = norm or (0.0, 0.0, 1.0)
    with device_of(x):
        _write_norm_of_cells[grid(x, block)](
            x, plus, shift, out, weight, *extents(x), x.shape[1], *strides, *steps(out), plus is not None,
            out.data_ptr() != x.data_ptr(),
            shift is not None, least, added, factor, norm is not None, weight is not None, silu, block, width, wide,
        )  # fmt: skip


def add(x: Tensor, y: Tensor | None, bias: Tensor, out: Tensor) -> None:
    """Add two maps and a bias `[C]` into `out`, which may be one of the maps; all as `adds` allows."""
    *_, wide = sizes(x)
    block, channels = 2 * VALUES // x.element_size(), x.shape[1]
    inner = 1 if x.stride(1) == 1 else x.shape[2:].numel()
    with device_of(x):
        _write_sum[(triton.cdiv(x.numel(), block),)](
            x, y, bias, out, x.numel(), channels, inner, y is not None, block, wide
        )
