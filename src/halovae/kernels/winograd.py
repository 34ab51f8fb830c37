"""Convolutions with fewer multiplications: Winograd's minimal filtering, in fp32, on the CPU.

A convolution of 3 x 3 in space computes 4 x 4 results from 36 products of transformed inputs and weights where the
direct way takes 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015). Along one dim, with
the weights g and the inputs d of a tile, the results are `merge @ ((taps @ g) * (spread @ d))`.
Products of one transformed cell are summed over channels and past frames by matrix multiplications.
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
from halovae.kernels.pool import Pool
from halovae.kernels.schemes import PLAIN, SCHEMES, Matrix, Scheme

# Rows of the matrices that are multiplied, for each thread: fewer keep a CPU's units waiting, more leave its caches.
ROWS = 256
# Transformed weights at a time, in elements.
WEIGHTS = 16 * 2**20
# Fewer channels than this do not pay for transforming the cells. Where a CPU has units for half precision, the
# direct way multiplies bf16 at twice the speed of fp32, so that eager kernels need more.
CHANNELS, EAGER_HALF_CHANNELS = 16, 128
# Fewer cells do not pay for transforming the weights by eager kernels, which also take channels that LANES does not
# divide; by compiled ones, see `Scheme`.
EAGER_CELLS = 2560


def is_profitable(scheme: Scheme, weight: Tensor, cells: int, kernels: Kernels, device: str) -> bool:
    """Whether this way is the faster one for `cells` cells and weights `[O, C, ...]` on a kind of device.

    Measured by benchmarks/decode.py. Where a CPU has AMX, nothing is faster than its own half
    precision. With one temporal tap there is too little to multiply for what eager passes over memory take.
    """
    if device != "cpu" or weight.dtype == torch.float64:
        return False
    eager = kernels is EAGER or any(extent % LANES for extent in weight.shape[:2])
    if eager and math.prod(weight.shape[2:]) == 9:
        return False
    half = weight.dtype != torch.float32 and has_units(weight.dtype)  # without units, both ways multiply in fp32
    if half and torch.cpu._is_amx_tile_supported():
        return False
    least = EAGER_HALF_CHANNELS if half and eager else CHANNELS
    return min(weight.shape[:2]) >= least and cells >= (EAGER_CELLS if eager else scheme.cells)


def convolved(
    window: Tensor, weight: Tensor, bias: Tensor | None, out: Callable[[], Tensor], direct: Callable[[Tensor], Tensor],
    kernels: Kernels, pool: Pool, *, device: str = "cpu", add: bool = False, ready: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """A window convolved without padding, in whole tiles where that pays, and directly where it does not.

    Args:
        window: `[B, C, T + taps - 1, H + 2, W + 2]`, channels last.
        weight: `[O, C, taps, 3, 3]`.
        bias: `[O]`.
        out: gives the memory of the result, `[B, O, T, H, W]`, channels last.
        direct: the convolution of a part of the window, done by PyTorch.
        kernels: eager or compiled.
        pool: for scratch memory.
        device: the kind of device.
        add: add to what `out` holds.
        ready: is called before the window's first or last row is read, which others may write until then.
    """
    frames, rows, cols = (extent - taps + 1 for extent, taps in zip(window.shape[2:], weight.shape[2:], strict=True))
    # Whole tiles, then what is left below and beside them.
    down, across = (extent - extent % PLAIN.results for extent in (rows, cols))
    if not (down and across and is_profitable(PLAIN, weight, frames * rows * cols, kernels, device)):
        if ready is not None:
            ready()
        data = direct(window)
        return out().add_(data) if add else data
    result = out()
    whole = result[..., :down, :across]
    convolve(PLAIN, window[..., : down + 2, : across + 2], weight, bias, whole, kernels, pool, add=add, ready=ready)
    for rest, left in (
        (window[..., down:, :], result[..., down:, :]),
        (window[..., : down + 2, across:], result[..., :down, across:]),
    ):
        if left.numel():
            strip = direct(rest)
            left.add_(strip) if add else left.copy_(strip)
    return result


class Bands(Protocol):
    """A window of which only some rows are there at a time.

    Attributes:
        x: the map that it is made of, `[B, C, T, H, W]`.
    """

    x: Tensor

    def write(self, item: int, start: int, rows: slice, band: Tensor) -> None:
        """Write rows of a band, `[C, T, L, W]`, which begins at the row `start` of an item's window."""


def reads_once(scheme: Scheme, weight: Tensor) -> bool:
    """Whether `convolve` needs each row of a window once: all weights are transformed at once."""
    return _Plan.block_of(scheme, weight) == len(weight)


def convolve(
    scheme: Scheme, window: Tensor | Bands, weight: Tensor, bias: Tensor | None, out: Tensor, kernels: Kernels,
    pool: Pool, *, add: bool = False, ready: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Convolve a window, without padding, into `out`.

    Bands are written in order, rows that two of them share once, and only the first and last row of the window after
    `ready` was called. Where `reads_once`, `out` may be the memory of what they are made of: rows of the result are
    written once they are not needed any more.

    Args:
        scheme: `PLAIN`, or `UPSAMPLING` for a window that is to be upsampled first.
        window: `[B, C, T + taps - 1, H, W]`, channels last; or its bands.
        weight: `[O, C, taps, 3, 3]`.
        bias: `[O]`.
        out: `[B, O, T, H', W']`, channels last, with a whole number of tiles in rows and cols.
        kernels: eager or compiled.
        pool: for scratch memory.
        add: add to what `out` holds.
        ready: as for `convolved`.
    """
    bands, whole = (None, window) if isinstance(window, Tensor) else (window, window.x)
    plan = _Plan.of(scheme, weight, out, 0 if bands is None else 1 + (ready is not None))
    scratch, known = pool.scratch(plan.scratch), False
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    for at, (item, result) in enumerate(zip(whole.unbind(0), out.unbind(0), strict=True)):
        maps = item.movedim(0, -1), weight, bias, result.movedim(0, -1), scratch
        write = None if bands is None else partial(bands.write, at)
        if out.is_meta:  # not within the operator, where dispatch modes do not see what it does
            if ready is not None:
                ready()
            ready = write = None  # what writes bands is a part of the operator, in what it takes, too
        _under_way.ready, _under_way.write = ready, write
        try:
            torch.ops.halovae.convolve(*maps, scheme.name, add, kernels is not EAGER, known)
        finally:
            _under_way.ready = _under_way.write = None
        ready, known = None, plan.block == len(weight)


@dataclass(frozen=True)
class _Plan:
    """How a convolution is cut: `block` output channels after the other, and within, bands of `band` tile rows."""

    block: int
    band: int
    band_window: tuple[int, int, int, int]  # what a band is made of, `[T + taps - 1, rows, W, C]`
    weights: int  # elements of a block's transformed weights
    cells: int  # of what is spread over a band, or merged from it, and of a block's weights before
    products: int  # of the products of a band
    made: int  # of the rows that are made for a band, or for two

    @classmethod
    def of(cls, scheme: Scheme, weight: Tensor, out: Tensor, bands: int) -> _Plan:
        """For `out` as `convolve` has it, and so many bands at a time of which rows are made."""
        count, inputs = scheme.products**2, len(scheme.spread[0])
        frames, tile_rows, tile_cols = out.shape[2], out.shape[3] // scheme.results, out.shape[4] // scheme.results
        channels, taps = weight.shape[1:3]
        block = cls.block_of(scheme, weight)
        band = min(tile_rows, max(1, math.ceil(ROWS * torch.get_num_threads() / (frames * tile_cols))))
        rows, width = ((tiles - 1) * scheme.step + inputs for tiles in (band, tile_cols))
        tiles, inputs = band * tile_cols, frames + taps - 1
        return cls(
            block=block,
            band=band,
            band_window=(inputs, rows, width, channels),
            made=math.ceil(bands * inputs * rows * width * channels * out.element_size() / 4),
            weights=count * taps * block * channels,
            cells=max(
                count * inputs * tiles * channels,
                scheme.products * frames * tiles * scheme.results * block,
                9 * taps * block * channels,  # the weights as they are, in fp32
            ),
            products=max(
                count * frames * tiles * block,
                scheme.products * inputs * band * width * channels,
            ),
        )

    @staticmethod
    def block_of(scheme: Scheme, weight: Tensor) -> int:
        most = WEIGHTS // (scheme.products**2 * math.prod(weight.shape[1:3]))
        return min(len(weight), max(2 * LANES, most // LANES * LANES))

    @property
    def scratch(self) -> int:
        return self.weights + self.cells + self.products + self.made

    def memory(self, scratch: Tensor, dtype: torch.dtype, at: int = 0) -> Tensor:
        """Of the rows that are made for a band, `[T + taps - 1, rows, W, C]`: the first such memory, or the second."""
        size = math.prod(self.band_window)
        made = scratch[self.weights + self.cells + self.products :].view(dtype)
        return carved(made[at * size :], self.band_window)


def _convolve(
    window: Tensor, weight: Tensor, bias: Tensor, out: Tensor, scratch: Tensor, scheme: str, add: bool,
    use_compiled: bool, known: bool,
) -> None:  # fmt: skip
    """One item: `window` is `[T + taps - 1, H, W, C]`, or what bands are made of, and `out` `[T, H', W', O]`.

    If they are `known`, the transformed weights are in the scratch memory, from the item before.
    """
    how, kernels = SCHEMES[scheme], compiled() if use_compiled else EAGER
    plan = _Plan.of(how, weight, out.movedim(-1, 0).unsqueeze(0), 0)
    weights, cells, products = scratch[: plan.scratch].split([plan.weights, plan.cells, plan.products])
    for first in range(0, len(weight), plan.block):
        block = slice(first, min(first + plan.block, len(weight)))
        part = weight[block]
        transformed = carved(weights, (how.products**2, part.shape[2], *part.shape[:2]))
        if not known:
            _transform(part, how, cells, transformed)
        for row, rows, band in _bands(window, how, plan, out, scratch):
            tiles = rows * (out.shape[2] // how.results)
            spread = carved(cells, (how.products**2, band.shape[0], tiles, band.shape[3]))
            kernels.spread(band, rows, how, products, spread)
            multiplied = _multiplied(spread, transformed, products)
            result = out[:, row * how.results : (row + rows) * how.results, :, block]
            kernels.merge(multiplied, rows, how, cells, bias[block], result, add)


def _bands(window: Tensor, how: Scheme, plan: _Plan, out: Tensor, scratch: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The bands of an item: the first tile row, how many there are, and that part of the window.

    Those at its ends come last if something else is to be ready before.
    """
    tile_rows = out.shape[1] // how.results
    starts, shared = range(0, tile_rows, plan.band), len(how.spread[0]) - how.step
    ready, write = _under_way.ready, _under_way.write
    delayed = starts[: int(ready is not None and len(starts) > 1)]
    first = before = None
    if write is not None and delayed:
        first = before = plan.memory(scratch, out.dtype, 1)
        write(0, slice(1, first.shape[1]), first.movedim(-1, 0))
    for row in (*starts[len(delayed) :], *delayed):
        if ready is not None and row in (starts[0], starts[-1]):
            ready()
            ready = _under_way.ready = None
        rows = min(plan.band, tile_rows - row)
        start, height = row * how.step, (rows - 1) * how.step + len(how.spread[0])
        if write is None:
            band = window[:, start : start + height]
        elif first is not None and row == 0:
            band = first
            write(0, slice(0, 1), first.movedim(-1, 0))
        else:
            band, taken = plan.memory(scratch, out.dtype)[:, :height], 0
            if before is not None:
                taken = shared
                for at in range(taken):  # one after the other: the two may be the same memory
                    band[:, at].copy_(before[:, before.shape[1] - taken + at])
            write(start, slice(taken, height), band.movedim(-1, 0))
            before = band
        yield row, rows, band


def _transform(weight: Tensor, how: Scheme, memory: Tensor, out: Tensor) -> None:
    """Weights `[O, C, taps, 3, 3]` as `[products, taps, O, C]` in fp32, those of other dtypes by way of `memory`.

    Each tap is one matrix product of 9 columns. Of 512 x 512 x 3 x 3 it takes 7 ms, where compiled passes over one dim
    after the other took 49 (one thread).
    """
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        weight = carved(memory, weight.shape).copy_(weight)
    for columns, result in zip(weight.flatten(3).unbind(2), out.flatten(2).unbind(1), strict=True):
        torch.mm(_both_dims(how.taps, weight.device), columns.flatten(0, 1).T, out=result)


@cache
def _both_dims(taps: Matrix, device: torch.device) -> Tensor:
    """For both dims of a kernel at once, `[products * products, 9]`: products of cols, and within these of rows."""
    with torch.inference_mode(False):  # it outlives the call
        one = torch.tensor(taps, dtype=torch.float64, device=device)
        return torch.einsum("pr,qc->qprc", one, one).reshape(-1, 9).float()


def _multiplied(cells: Tensor, weights: Tensor, memory: Tensor) -> Tensor:
    """`[products, T + taps - 1, tiles, C]` times `[products, taps, O, C]`, as `[products, T, tiles, O]`.

    One batch for each tap. Of 256 tiles of 96 channels it takes 2.1 ms, where a loop over 36 products took 2.9; of 512
    channels 46 and 48 (fp32, one thread).
    """
    count, inputs, tiles, _ = cells.shape
    taps, outputs = weights.shape[1:3]
    frames = inputs - taps + 1
    out = carved(memory, (count, frames * tiles, outputs))
    for tap in range(taps):
        past = cells[:, tap : tap + frames].flatten(1, 2)
        torch.baddbmm(out, past, weights[:, tap].transpose(1, 2), beta=int(tap > 0), out=out)
    return out.view(count, frames, tiles, outputs)


class _UnderWay(threading.local):
    """What this thread's operator needs besides its arguments.

    Attributes:
        ready: waits for other ranks' rows of the window.
        write: writes rows of the window, where they are made band by band.
    """

    ready: Callable[[], None] | None = None
    write: Callable[[int, slice, Tensor], None] | None = None


_under_way = _UnderWay()


# An operator of its own, so that those who watch operators (the memory and FLOP counters) see one and not hundreds.
# `torch.library.custom_op` would import the compiler at the first call.
_library = torch.library.Library("halovae", "DEF")
_library.define(
    "convolve(Tensor window, Tensor weight, Tensor bias, Tensor(a!) out, Tensor(b!) scratch, str scheme, bool add, "
    "bool use_compiled, bool known) -> ()"
)
_library.impl("convolve", _convolve, "CPU")
_library.impl("convolve", lambda *_: None, "Meta")  # writes into what it is given: nothing to make up


@register_flop_formula(torch.ops.halovae.convolve)
def _flops(
    window: Sequence[int], weight: Sequence[int], bias: Sequence[int], out: Sequence[int], scratch: Sequence[int],
    scheme: str, *_: object, **__: object,
) -> int:  # fmt: skip
    how = SCHEMES[scheme]
    tiles = out[1] // how.results * (out[2] // how.results)
    return 2 * how.products**2 * out[0] * tiles * math.prod(weight[:3])
