"""Convolutions with fewer multiplications: Winograd's minimal filtering, in fp32, on the CPU.

A convolution of 3 x 3 in space computes 4 x 4 results from 36 products of transformed inputs and weights where direct
convolution needs 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015). Along one dim, with
the weights g and the inputs d of a tile, the results are
`output_transform @ ((filter_transform @ g) * (input_transform @ d))`.
Matrix products sum the products over channels and past frames.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from halovae.kernels.halves import has_units
from halovae.kernels.native import EAGER, LANES, Kernels, carved, compiled
from halovae.kernels.pool import BufferPool
from halovae.kernels.schemes import PLAIN, SCHEMES, Matrix, Scheme

# Rows of the multiplied matrices per thread: fewer keep a CPU's units waiting, more do not fit its caches.
ROWS = 256
# Elements of transformed weights in memory at once.
WEIGHTS = 16 * 2**20
# With fewer channels than this, transforming the cells costs more than it saves. Where a CPU has units for half
# precision, direct convolution runs in bf16 at twice the speed of fp32, so eager kernels need more channels.
CHANNELS, EAGER_HALF_CHANNELS = 16, 128
# With fewer cells than this, transforming the weights by eager kernels costs more than it saves. `Scheme.cells` is the
# bound for compiled kernels. Channel counts that LANES does not divide use eager kernels.
EAGER_CELLS = 2560


def is_profitable(scheme: Scheme, weight: Tensor, cells: int, kernels: Kernels, device: str) -> bool:
    """Whether Winograd's convolution is faster for `cells` cells and weights `[O, C, ...]` on a kind of device.

    Measured by benchmarks/decode.py. Where a CPU has AMX, nothing is faster than its own half precision. With one
    temporal tap there is too little arithmetic to make up for the memory passes of eager kernels.
    """
    if device != "cpu" or weight.dtype == torch.float64:
        return False
    eager = kernels is EAGER or any(extent % LANES for extent in weight.shape[:2])
    if eager and math.prod(weight.shape[2:]) == 9:
        return False
    half = weight.dtype != torch.float32 and has_units(weight.dtype)  # without units, both multiply in fp32
    if half and torch.cpu._is_amx_tile_supported():
        return False
    least = EAGER_HALF_CHANNELS if half and eager else CHANNELS
    return min(weight.shape[:2]) >= least and cells >= (EAGER_CELLS if eager else scheme.cells)


def convolved(
    window: Tensor, weight: Tensor, bias: Tensor | None, out: Callable[[], Tensor], direct: Callable[[Tensor], Tensor],
    kernels: Kernels, pool: BufferPool, *, device: str = "cpu", add: bool = False,
    ready: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Convolve a window without padding: whole tiles by Winograd where that is profitable, the rest directly.

    Args:
        window: `[B, C, T + taps - 1, H + 2, W + 2]`, channels last.
        weight: `[O, C, taps, 3, 3]`.
        bias: `[O]`.
        out: returns memory for the result, `[B, O, T, H, W]`, channels last.
        direct: convolves a piece of the window by PyTorch.
        kernels: eager or compiled.
        pool: for scratch memory.
        device: the kind of device.
        add: add to what `out` holds.
        ready: called before the window's first or last row is read. Until then, a halo exchange may write these rows.
    """
    frames, rows, cols = (extent - taps + 1 for extent, taps in zip(window.shape[2:], weight.shape[2:], strict=True))
    # Whole tiles, then the remaining rows below and cols beside them.
    down, across = (extent - extent % PLAIN.results for extent in (rows, cols))
    if not (down and across and is_profitable(PLAIN, weight, frames * rows * cols, kernels, device)):
        if ready is not None:
            ready()
        data = direct(window)
        return out().add_(data) if add else data
    result = out()
    whole = result[..., :down, :across]
    convolve(PLAIN, window[..., : down + 2, : across + 2], weight, bias, whole, kernels, pool, add=add, ready=ready)
    for source, target in (
        (window[..., down:, :], result[..., down:, :]),
        (window[..., : down + 2, across:], result[..., :down, across:]),
    ):
        if target.numel():
            rest = direct(source)
            target.add_(rest) if add else target.copy_(rest)
    return result


class RowBlocks(Protocol):
    """A window that is computed in row blocks, never as a whole.

    Attributes:
        x: the map that the window is computed from, `[B, C, T, H, W]`.
    """

    x: Tensor

    def write(self, item: int, start: int, rows: slice, block: Tensor) -> None:
        """Write some rows of a row block `[C, T, L, W]` that begins at the row `start` of an item's window."""


def reads_once(scheme: Scheme, weight: Tensor) -> bool:
    """Whether `convolve` reads each row of a window once, since all weights are transformed at once."""
    return _Plan.channels_of(scheme, weight) == len(weight)


def convolve(
    scheme: Scheme, window: Tensor | RowBlocks, weight: Tensor, bias: Tensor | None, out: Tensor, kernels: Kernels,
    pool: BufferPool, *, add: bool = False, ready: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Convolve a window, without padding, into `out`.

    Row blocks are written in order, and a row that two blocks share is written once. Only the window's first and last
    row are written after the call of `ready`. Where `reads_once`, `out` may be the memory that the row blocks are
    computed from: rows of the result are written once their memory is no longer needed.

    Args:
        scheme: `PLAIN`, or `UPSAMPLING` to upsample the window first.
        window: `[B, C, T + taps - 1, H, W]`, channels last; or its row blocks.
        weight: `[O, C, taps, 3, 3]`.
        bias: `[O]`.
        out: `[B, O, T, H', W']`, channels last, with a whole number of tiles in rows and cols.
        kernels: eager or compiled.
        pool: for scratch memory.
        add: add to what `out` holds.
        ready: as for `convolved`.
    """
    blocks, whole = (None, window) if isinstance(window, Tensor) else (window, window.x)
    plan = _Plan.of(scheme, weight, out, 0 if blocks is None else 1 + (ready is not None))
    scratch, known = pool.scratch(plan.scratch), False
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    for at, (item, result) in enumerate(zip(whole.unbind(0), out.unbind(0), strict=True)):
        maps = item.movedim(0, -1), weight, bias, result.movedim(0, -1), scratch
        write = None if blocks is None else partial(blocks.write, at)
        if out.is_meta:  # outside the operator: dispatch modes do not see calls within it
            if ready is not None:
                ready()
            ready = write = None  # writing row blocks is part of the operator, and of its cost
        _callbacks.ready, _callbacks.write = ready, write
        try:
            torch.ops.halovae.convolve(*maps, scheme.name, add, kernels is not EAGER, known)
        finally:
            _callbacks.ready = _callbacks.write = None
        ready, known = None, plan.channels == len(weight)


@dataclass(frozen=True)
class _Plan:
    """How a convolution is cut: into blocks of output channels, and these into row blocks.

    Sizes are in elements.
    """

    channels: int  # output channels at a time
    tile_rows: int  # rows of tiles in a row block
    window_shape: tuple[int, int, int, int]  # of a row block's window, `[T + taps - 1, rows, W, C]`
    weights: int  # size of the transformed weights
    cells: int  # size of the memory shared by transformed inputs, half-transformed outputs, and weights in fp32
    products: int  # size of the memory shared by a row block's half-transformed inputs and its products
    windows: int  # size of the memory for the windows of one row block, or of two

    @classmethod
    def of(cls, scheme: Scheme, weight: Tensor, out: Tensor, blocks: int) -> _Plan:
        """Return the plan for `out` as in `convolve`. `blocks`: how many row blocks' windows are in memory at once."""
        count, inputs = scheme.products**2, len(scheme.input_transform[0])
        frames, tile_rows, tile_cols = out.shape[2], out.shape[3] // scheme.results, out.shape[4] // scheme.results
        channels, taps = weight.shape[1:3]
        outputs = cls.channels_of(scheme, weight)
        high = min(tile_rows, max(1, math.ceil(ROWS * torch.get_num_threads() / (frames * tile_cols))))
        rows, width = ((tiles - 1) * scheme.step + inputs for tiles in (high, tile_cols))
        tiles, inputs = high * tile_cols, frames + taps - 1
        return cls(
            channels=outputs,
            tile_rows=high,
            window_shape=(inputs, rows, width, channels),
            windows=math.ceil(blocks * inputs * rows * width * channels * out.element_size() / 4),
            weights=count * taps * outputs * channels,
            cells=max(
                count * inputs * tiles * channels,
                scheme.products * frames * tiles * scheme.results * outputs,
                9 * taps * outputs * channels,
            ),
            products=max(
                count * frames * tiles * outputs,
                scheme.products * inputs * high * width * channels,
            ),
        )

    @staticmethod
    def channels_of(scheme: Scheme, weight: Tensor) -> int:
        """Return how many output channels are computed at a time."""
        most = WEIGHTS // (scheme.products**2 * math.prod(weight.shape[1:3]))
        return min(len(weight), max(2 * LANES, most // LANES * LANES))

    @property
    def scratch(self) -> int:
        return self.weights + self.cells + self.products + self.windows

    def memory(self, scratch: Tensor, dtype: torch.dtype, at: int = 0) -> Tensor:
        """Return the memory for the first or second row block's window, `[T + taps - 1, rows, W, C]`."""
        size = math.prod(self.window_shape)
        windows = scratch[self.weights + self.cells + self.products :].view(dtype)
        return carved(windows[at * size :], self.window_shape)


def _convolve(
    window: Tensor, weight: Tensor, bias: Tensor, out: Tensor, scratch: Tensor, scheme: str, add: bool,
    use_compiled: bool, known: bool,
) -> None:  # fmt: skip
    """Convolve one item.

    Args:
        window: `[T + taps - 1, H, W, C]`, or the map that row blocks are computed from.
        weight: as for `convolve`.
        bias: as for `convolve`.
        out: `[T, H', W', O]`.
        scratch: as much memory as the plan needs.
        scheme: the scheme's name.
        add: add to what `out` holds.
        use_compiled: use compiled kernels.
        known: the scratch memory holds the transformed weights, from the previous item.
    """
    how, kernels = SCHEMES[scheme], compiled() if use_compiled else EAGER
    plan = _Plan.of(how, weight, out.movedim(-1, 0).unsqueeze(0), 0)
    weights, cells, products = scratch[: plan.scratch].split([plan.weights, plan.cells, plan.products])
    for first in range(0, len(weight), plan.channels):
        outputs = slice(first, min(first + plan.channels, len(weight)))
        part = weight[outputs]
        transformed = carved(weights, (how.products**2, part.shape[2], *part.shape[:2]))
        if not known:
            _transform(part, how, cells, transformed)
        for row, rows, block in _row_blocks(window, how, plan, out, scratch):
            tiles = rows * (out.shape[2] // how.results)
            inputs = carved(cells, (how.products**2, block.shape[0], tiles, block.shape[3]))
            kernels.input_transform(block, rows, how, products, inputs)
            multiplied = _multiplied(inputs, transformed, products)
            result = out[:, row * how.results : (row + rows) * how.results, :, outputs]
            kernels.output_transform(multiplied, rows, how, cells, bias[outputs], result, add)


def _row_blocks(
    window: Tensor, how: Scheme, plan: _Plan, out: Tensor, scratch: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield an item's row blocks: the first tile row, the number of tile rows, and the rows of the window.

    If `ready` must be called first, the blocks at the top and the bottom come last.
    """
    tile_rows = out.shape[1] // how.results
    starts, shared = range(0, tile_rows, plan.tile_rows), len(how.input_transform[0]) - how.step
    ready, write = _callbacks.ready, _callbacks.write
    delayed = starts[: int(ready is not None and len(starts) > 1)]
    first = before = None
    if write is not None and delayed:
        first = before = plan.memory(scratch, out.dtype, 1)
        write(0, slice(1, first.shape[1]), first.movedim(-1, 0))
    for row in (*starts[len(delayed) :], *delayed):
        if ready is not None and row in (starts[0], starts[-1]):
            ready()
            ready = _callbacks.ready = None
        rows = min(plan.tile_rows, tile_rows - row)
        start, height = row * how.step, (rows - 1) * how.step + len(how.input_transform[0])
        if write is None:
            block = window[:, start : start + height]
        elif first is not None and row == 0:
            block = first
            write(0, slice(0, 1), first.movedim(-1, 0))
        else:
            block, taken = plan.memory(scratch, out.dtype)[:, :height], 0
            if before is not None:
                taken = shared
                for at in range(taken):  # row by row: the two may be the same memory
                    block[:, at].copy_(before[:, before.shape[1] - taken + at])
            write(start, slice(taken, height), block.movedim(-1, 0))
            before = block
        yield row, rows, block


def _transform(weight: Tensor, how: Scheme, memory: Tensor, out: Tensor) -> None:
    """Transform weights `[O, C, taps, 3, 3]` to `[products, taps, O, C]` in fp32, by a copy in `memory` if need be.

    Each tap is one matrix product of 9 columns. For 512 x 512 x 3 x 3 it takes 7 ms, where compiled passes over one dim
    after the other took 49 (one thread).
    """
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        weight = carved(memory, weight.shape).copy_(weight)
    for columns, result in zip(weight.flatten(3).unbind(2), out.flatten(2).unbind(1), strict=True):
        torch.mm(_both_dims(how.filter_transform, weight.device), columns.flatten(0, 1).T, out=result)


@cache
def _both_dims(matrix: Matrix, device: torch.device) -> Tensor:
    """Return the filter transform of both dims, `[products * products, 9]`. Products of rows vary fastest."""
    with torch.inference_mode(False):  # the cached tensor outlives the call
        rows = torch.tensor(matrix, dtype=torch.float64, device=device)
        return torch.einsum("pr,qc->qprc", rows, rows).reshape(-1, 9).float()


def _multiplied(cells: Tensor, weights: Tensor, memory: Tensor) -> Tensor:
    """Multiply `[products, T + taps - 1, tiles, C]` by `[products, taps, O, C]`, to `[products, T, tiles, O]`.

    One batched product per tap. For 256 tiles of 96 channels it takes 2.1 ms, where a loop over 36 products took 2.9;
    for 512 channels 46 and 48 ms (fp32, one thread).
    """
    count, inputs, tiles, _ = cells.shape
    taps, outputs = weights.shape[1:3]
    frames = inputs - taps + 1
    out = carved(memory, (count, frames * tiles, outputs))
    for tap in range(taps):
        past = cells[:, tap : tap + frames].flatten(1, 2)
        torch.baddbmm(out, past, weights[:, tap].transpose(1, 2), beta=int(tap > 0), out=out)
    return out.view(count, frames, tiles, outputs)


class _Callbacks(threading.local):
    """The functions that this thread's operator calls, besides its arguments.

    Attributes:
        ready: waits for other ranks' rows of the window.
        write: writes rows of the window, if it is computed in row blocks.
    """

    ready: Callable[[], None] | None = None
    write: Callable[[int, slice, Tensor], None] | None = None


_callbacks = _Callbacks()


# A custom operator, so that dispatch modes (the memory and FLOP counters) see one call and not hundreds.
# `torch.library.custom_op` would import the compiler at the first call.
_library = torch.library.Library("halovae", "DEF")
_library.define(
    "convolve(Tensor window, Tensor weight, Tensor bias, Tensor(a!) out, Tensor(b!) scratch, str scheme, bool add, "
    "bool use_compiled, bool known) -> ()"
)
_library.impl("convolve", _convolve, "CPU")
_library.impl("convolve", lambda *_: None, "Meta")  # it returns nothing


@register_flop_formula(torch.ops.halovae.convolve)
def _flops(
    window: Sequence[int], weight: Sequence[int], bias: Sequence[int], out: Sequence[int], scratch: Sequence[int],
    scheme: str, *_: object, **__: object,
) -> int:  # fmt: skip
    how = SCHEMES[scheme]
    tiles = out[1] // how.results * (out[2] // how.results)
    return 2 * how.products**2 * out[0] * tiles * math.prod(weight[:3])
