"""How kernels see maps: strides, sizes of programs, and the device that runs them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 4096  # values of a map per program, in registers


class Flat(NamedTuple):
    """A map `[N, C, *]` whose cells have one stride, as channels-last and contiguous maps have.

    Attributes:
        x: the map.
        item: the stride of its items.
        cell: that of its cells.
        channel: that of its channels.
    """

    x: Tensor
    item: int
    cell: int
    channel: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.item, self.cell, self.channel


def flat(x: Tensor) -> Flat:
    """Return a map as kernels read it; a copy of it if its cells have several strides."""
    form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    channels, cells = x.shape[1], x.shape[2:].numel()
    if x.is_contiguous(memory_format=form):
        return Flat(x, x.stride(0), channels, 1)
    if x.is_contiguous():
        return Flat(x, x.stride(0), 1, cells)
    step = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and stride != x.stride(-1) * step:
            return flat(x.contiguous(memory_format=form if x.stride(1) == 1 else torch.contiguous_format))
        step *= size
    return Flat(x, x.stride(0), x.stride(-1), x.stride(1))


def extents(x: Tensor) -> tuple[int, int, int]:
    """Return a map's numbers of frames, rows, and cols."""
    *frames, height, width = x.shape[2:]
    return math.prod(frames), height, width


def steps(x: Tensor) -> tuple[int, int, int, int, int]:
    """Return the strides of a map's items, channels, frames, rows, and cols."""
    return x.stride(0), x.stride(1), x.stride(2) if x.ndim == 5 else 0, x.stride(-2), x.stride(-1)


def sizes(x: Tensor) -> tuple[int, int, object]:
    """Return the channels and cells per program, as powers of two, and the dtype that it computes in."""
    width = triton.next_power_of_2(x.shape[1])
    return width, max(1, VALUES // width), tl.float64 if x.dtype == torch.float64 else tl.float32


def grid(x: Tensor, block: int) -> tuple[int]:
    """Return the number of programs that write a map's rows, `block` cells each."""
    frames, height, width = extents(x)
    return (x.shape[0] * frames * height * triton.cdiv(width, block),)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one. On the CPU, where Triton's interpreter runs, there is none."""
    if x.device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[object] = torch.get_device_module(x.device).device_of(x)
    return guard


@triton.jit
def row_of_program(frames, height, width, BLOCK: tl.constexpr):
    """Return a program's item, frame, row, and cols, with a mask of those that exist."""
    blocks = tl.cdiv(width, BLOCK)
    index = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    item = (index // (frames * height)).to(tl.int64)
    frame = (index // height % frames).to(tl.int64)
    return item, frame, (index % height).to(tl.int64), col.to(tl.int64), col < width
