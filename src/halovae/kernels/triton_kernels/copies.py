"""Copies that change sizes, layouts, or dtypes: upsampling, halo borders, and frames of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halovae.kernels.triton_kernels.maps import device_of, extents, flat, grid, row_of_program, sizes, steps

_BLOCK = 1024  # values per program
_ROUNDING = tl.constexpr(float(3 << 22))  # fp32 has no fractions there


@triton.jit
def _write_upsampled(
    x, out, frames, height, width, channels, x_item, x_cell, x_channel, out_item, out_channel, out_frame, out_row,
    out_col, TIMES: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the upsampled map. `frames`, `height` and `width` are the extents of the result."""
    item, frame, row, col, there = row_of_program(frames, height, width, BLOCK)
    above = (frame // TIMES) * (height // DOWN) + row // DOWN
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    source = item * x_item + (above * (width // ACROSS) + col // ACROSS) * x_cell
    target = item * out_item + frame * out_frame + row * out_row + col * out_col
    mask = there[:, None] & (channel < channels)[None, :]
    value = tl.load(x + source[:, None] + channel[None, :] * x_channel, mask, 0)
    tl.store(out + target[:, None] + channel[None, :] * out_channel, value, mask)


@triton.jit
def _place(index, channels, frames, height, width, item_step, channel_step, frame_step, row_step, col_step):
    """Return the offset of the value that is at `index` of a contiguous map, in one with other strides."""
    col, row = index % width, index // width % height
    plane = index // width // height
    frame, channel, item = plane % frames, plane // frames % channels, plane // frames // channels
    return item * item_step + channel * channel_step + frame * frame_step + row * row_step + col * col_step


@triton.jit
def _copy_sides(
    source_0, source_1, target_0, target_1, count, channels, frames, height, width, from_item, from_channel, from_frame,
    from_row, from_col, to_item, to_channel, to_frame, to_row, to_col, BLANK_0: tl.constexpr, BLANK_1: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy two borders of the same sizes and strides, or fill them with zeros."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = index < count
    source = _place(index, channels, frames, height, width, from_item, from_channel, from_frame, from_row, from_col)
    target = _place(index, channels, frames, height, width, to_item, to_channel, to_frame, to_row, to_col)
    if tl.program_id(1) == 0:
        if BLANK_0:
            tl.store(target_0 + target, tl.zeros((BLOCK,), target_0.dtype.element_ty), there)
        else:
            tl.store(target_0 + target, tl.load(source_0 + source, there, 0), there)
    else:
        if BLANK_1:
            tl.store(target_1 + target, tl.zeros((BLOCK,), target_1.dtype.element_ty), there)
        else:
            tl.store(target_1 + target, tl.load(source_1 + source, there, 0), there)


@triton.jit
def _write_bytes(
    x, out, count, channels, frames, height, width, item_step, channel_step, frame_step, row_step, col_step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write values of [-1, 1] as bytes, contiguous. Halves round to even, as `Tensor.round` does."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = index < count
    place = _place(
        index, channels, frames, height, width, item_step, channel_step, frame_step, row_step, col_step
    )  # fmt: skip
    value = tl.load(x + place, there, 0).to(tl.float32)
    value = (tl.minimum(tl.maximum(value, -1.0), 1.0) + 1.0) * 127.5
    tl.store(out + index, ((value + _ROUNDING) - _ROUNDING).to(tl.int32).to(tl.uint8), there)


def upsample(x: Tensor, factors: Sequence[int], out: Tensor) -> None:
    """Repeat each frame, row and col of a map `[N, C, *]` by `factors`, one per dim of `*`, into `out`.

    Args:
        x: the map, of any strides.
        factors: for each dim of `*`.
        out: of any strides; may be a part of a window.
    """
    frames, height, cols = extents(out)
    x, *strides = flat(x)
    width, block, _ = sizes(x)
    times, down, across = (1, *factors)[-3:]
    with device_of(x):
        _write_upsampled[grid(out, block)](
            x, out, frames, height, cols, x.shape[1], *strides, *steps(out), times, down, across, block, width
        )


def packed(first: Tensor, last: Tensor) -> Tensor:
    """Copy two borders `[N, C, *]` of one size and of equal strides, side by side: contiguous `[2, N, C, *]`."""
    out = torch.empty((2, *first.shape), dtype=first.dtype, device=first.device)
    _copy((first, last), out.unbind())
    return out


def unpack(messages: tuple[Tensor | None, Tensor | None], borders: tuple[Tensor, Tensor]) -> None:
    """Copy two messages to the borders of a window, which have equal strides; without a message, to zeros.

    Args:
        messages: contiguous `[N, C, *]`, for the border before and for the one after.
        borders: both of one size.
    """
    _copy(messages, borders)


def _copy(sources: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
    (one, other), (target, target_1) = sources, targets
    assert target.shape == target_1.shape
    assert target.stride() == target_1.stride()
    assert one is None or other is None or one.stride() == other.stride()
    like = target if one is None and other is None else one if one is not None else other
    assert like is not None
    blank, blank_1 = one is None, other is None
    with device_of(target):
        _copy_sides[(triton.cdiv(target.numel(), _BLOCK), 2)](
            target if one is None else one, target if other is None else other, target, target_1, target.numel(),
            target.shape[1], *extents(target), *steps(like), *steps(target), blank, blank_1, _BLOCK,
        )  # fmt: skip


def as_bytes(x: Tensor) -> Tensor:
    """Convert pictures in [-1, 1] to contiguous uint8 in one pass; values beyond are clamped.

    Args:
        x: `[N, C, *]` of any strides and floating dtype.
    """
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    with device_of(x):
        _write_bytes[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), x.shape[1], *extents(x), *steps(x), _BLOCK)
    return out
