"""Convolutions of 3 x 3 cells in space, as graph passes make them: with the norm, SiLU and upsampling before them.

A window is all that a rank's part of a convolution depends on: its own part of the map, the halos of its neighbors, and
where the picture ends zeros or the map's own edges. Where Winograd's convolution is the faster one, or there are
kernels of our own, the map is normalized and activated straight into the window. Else PyTorch's operators do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels import halves, winograd
from halovae.kernels.schemes import PLAIN, UPSAMPLING
from halovae.plane import backends, context, operators, rings
from halovae.plane.bands import Bands
from halovae.plane.norms import Cells, Norm, activated, empty_like, is_dense, sum_of, write, writer
from halovae.plane.operators import Cut
from halovae.plane.rings import Edges

aten = torch.ops.aten


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: tuple[Cut, ...], early: bool, *,
    zeros: int = 0, past: Tensor | None = None, keep: Tensor | None = None, shift: Tensor | None = None,
    gamma: Tensor | None = None, beta: Tensor | None = None, norm: Norm | None = None, silu: bool = False,
    spare: bool = False, repeats: tuple[int, int] = (0, 0), edges: Edges | None = None, onto: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A convolution of stride 1 of a map that is normalized and activated before.

    Args:
        x: this rank's part `[N, C, *]`.
        weight: `[C', C, *, 3, 3]`.
        bias: `[C']`.
        padding: of each spatial dim, 1 of the last two.
        cuts: the dims along which other ranks have what this one needs.
        early: whether PyTorch's convolution computes while halos travel, as `operators.convolution` does.
        zeros: how many frames of zeros come before the map, and before its past.
        past: frames that come before the map, `[N, C, T', H, W]`. They are neither normalized nor activated.
        keep: is filled with the last frames of the map as it is convolved, `[N, C, T'', H, W]`.
        shift: `[C]`, is added to the map before it is normalized and activated: the bias that it has not got yet.
        gamma: `[C]`, the norm's weight; of a norm over channels of any shape with C values.
        beta: `[C]`, the norm's bias; of a norm over channels, on the CPU alone, of any shape with C values.
        norm: GroupNorm, or the norm over each cell's channels, as `Norm` has them; None where there is none.
        silu: whether SiLU comes before the convolution.
        spare: whether `x` may be written over, also by the result.
        repeats: how often the first and the last frame are repeated, before and after the map. There is no past then.
        edges: what is around the picture in place of zeros, as `rings.Edges` has it.
        onto: of the result's shape; is written over by the sum of both, which is returned.

    Returns:
        This rank's part of the result, `[N, C', *]`.
    """
    kernels, pool = context.current_kernels(x)
    kind = context.kind_of(x)
    maps, whole = (one if one.ndim == 5 else one.unsqueeze(2) for one in (x, weight))
    own, before = maps.shape[2], sum(padding[:-2])
    first = zeros + repeats[0] + (0 if past is None else past.shape[2])
    depth = first + own + repeats[1]
    shape = (x.shape[0], weight.shape[0], depth + 2 * before - whole.shape[2] + 1, *x.shape[-2:])
    cells = shape[2] * shape[3] * shape[4]
    folded = min(x.shape[-2:]) >= PLAIN.results and winograd.is_profitable(PLAIN, weight, cells, kernels, kind)
    # A window takes the place of any other copy that has more around the map: of its frames, or of its halos.
    fused = backends.kernels(x.device.type) is not None and (shift is not None or norm is not None or silu)
    copied = past is not None or zeros > 0 or (bool(cuts) and (fused or not early))
    windowed = folded or edges is not None or any(repeats) or (copied and (fused or kind == "cpu"))
    if not windowed:
        x = activated(x, shift, gamma, beta, norm, silu, spare)
        if keep is not None:
            keep.copy_(x[:, :, own - keep.shape[2] :])
        return _summed(onto, _direct(_after(zeros, past, x), weight, bias, padding, cuts, early))
    normalized = writer(maps, shift, gamma, beta, norm, silu)

    def interior(items: slice, rows: slice, cols: slice, out: Tensor) -> None:
        part, inner = (items, slice(None), slice(None), rows, cols), out[:, :, before : before + depth]
        if past is not None:
            inner[:, :, zeros:first].copy_(past[part])
        normalized(part, inner[:, :, first : first + own])
        if repeats[0]:
            inner[:, :, :first].copy_(inner[:, :, first : first + 1].expand_as(inner[:, :, :first]))
        if repeats[1]:
            last = inner[:, :, first + own - 1 : first + own]
            inner[:, :, first + own :].copy_(last.expand_as(inner[:, :, first + own :]))
        if keep is not None:
            keep[part].copy_(inner[:, :, depth - keep.shape[2] :])

    merged = folded and onto is not None and is_dense(onto)
    over = spare and not merged and maps.shape == shape and is_dense(maps)
    ring = depth + 2 * before, before + zeros, before
    banded = folded and not (shape[3] % PLAIN.results or shape[4] % PLAIN.results)
    banded = banded and (not over or winograd.reads_once(PLAIN, whole))
    if banded:
        bands = Bands(interior, x, *ring, slice(before, before + depth), cuts, edges)
        finish = bands.start()
    else:
        window = rings.window(x, *ring, cuts, edges)
        interior(slice(None), slice(None), slice(None), window[..., 1:-1, 1:-1])
        padded = window[:, :, before : before + depth]
        finish = rings.start(padded if x.ndim == 5 else padded.squeeze(2), cuts, edges)
    ready = finish if cuts else None

    def memory() -> Tensor:
        if onto is not None and merged:
            return onto if x.ndim == 5 else onto.unsqueeze(2)
        return maps if over else pool.empty(shape, x.dtype)

    try:
        if banded:
            result = memory()
            winograd.convolve(PLAIN, bands, whole, bias, result, kernels, pool, add=merged, ready=ready)
        elif folded:
            result = winograd.convolved(
                window, whole, bias, memory, lambda part: _plain(part, whole, bias), kernels, pool, add=merged,
                ready=ready,
            )  # fmt: skip
    finally:
        finish()  # whatever happens here: the others' messages are under way
    if not folded:
        result = _plain(window, whole, bias)
    result = result if x.ndim == 5 else result.squeeze(2)
    return result if merged else _summed(onto, result)


def residual_convolution(onto: Tensor, *arguments: Any, **given: Any) -> Tensor:
    """A convolution's result added to a map, in its memory: `convolution(..., onto=onto)`."""
    return convolution(*arguments, **given, onto=onto)


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, cuts: tuple[Cut, ...]) -> Tensor:
    """A convolution, padded by 1, of a map whose rows and cols are repeated before: halos travel at the low resolution.

    Args:
        x: this rank's part `[N, C, H, W]`.
        weight: `[C', C, 3, 3]`.
        bias: `[C']`.
        cuts: the dims of `x` along which other ranks have what this one needs.

    Returns:
        This rank's part of the result, `[N, C', 2H, 2W]`.
    """
    kernels, pool = context.current_kernels(x)
    items, _, height, width = x.shape
    folded = winograd.is_profitable(UPSAMPLING, weight, items * height * width, kernels, context.kind_of(x))
    if not folded and not cuts:
        return _plain(upsampled(x, (2, 2)), weight, bias, (1, 1))
    if not folded:
        for dim, mesh_dim, bounds, needed, *_ in cuts:
            x = operators.fetch(x, dim, mesh_dim, bounds, needed)
        larger, padding = upsampled(x, (2, 2)), [1, 1]
        for dim, *_ in cuts:
            larger, padding[dim - 2] = larger.narrow(dim, 1, larger.shape[dim] - 2), 0
        return _plain(larger, weight, bias, padding)

    def interior(items: slice, rows: slice, cols: slice, out: Tensor) -> None:
        out[:, :, 0].copy_(x[items, :, rows, cols])

    bands = Bands(interior, x, 1, 0, 0, slice(1), cuts, None)
    finish = bands.start()
    try:
        out = pool.empty((items, weight.shape[0], 1, 2 * height, 2 * width), x.dtype)
        ready = finish if cuts else None
        winograd.convolve(UPSAMPLING, bands, weight.unsqueeze(2), bias, out, kernels, pool, ready=ready)
    finally:
        finish()
    return out[:, :, 0]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of one cell. Where channels lie side by side, a map is a matrix as it is.

    PyTorch (2.13) copies such maps first where the weights do not lie so: 256 to 128 channels of 256 x 256 cells take
    62 ms, the product of matrices 24 (fp32, one thread). On CUDA devices a product adds the bias on its way.

    Args:
        x: this rank's part `[N, C, *]`.
        weight: `[C', C, 1, ...]`.
        bias: `[C']`.
    """
    known = context.kind_of(x) == "cpu" or backends.kernels(x.device.type) is not None
    if known and x.stride(1) == 1 and x.shape[1] > 1:
        return halves.linear(x, weight.flatten(1), bias)
    return _plain(x, weight, bias)


def normalized(x: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: Cells, *, spare: bool = False) -> Tensor:
    """A map normalized over each cell's channels, where no convolution takes it; on the CPU.

    Args:
        x: this rank's part `[N, C, *]`.
        gamma: the norm's weight, of any shape with C values.
        beta: its bias, of any shape with as many.
        norm: as `Cells` has it.
        spare: whether `x` is written over by the result.
    """
    out = x if spare else empty_like(x)
    write(x, None, gamma, beta, norm, False, out)
    return out


def padded(x: Tensor, widths: Sequence[int], value: float = 0.0) -> Tensor:
    """`aten.constant_pad_nd`. On the CPU a map that lies channels last stays so.

    PyTorch (2.13) does not recognize such a map of one item or one frame. A convolution of stride 2 then takes twice as
    long, and the norm after it copies.

    Args:
        x: `[N, C, *]`.
        widths: before and after each dim, from the last dim on.
        value: what it is padded with.
    """
    dims = next((at for at in range(len(widths) // 2, 0, -1) if any(widths[2 * at - 2 : 2 * at])), 0)
    last = x.device.type == "cpu" and x.ndim in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1
    if not last or min(widths) < 0 or dims > x.ndim - 2:
        return aten.constant_pad_nd.default(x, widths, value)
    sizes = list(x.shape)
    for at in range(dims):
        sizes[-1 - at] += widths[2 * at] + widths[2 * at + 1]
    result = inner = context.empty_map(x, sizes)
    for at in range(dims):
        dim, before, after = x.ndim - 1 - at, widths[2 * at], widths[2 * at + 1]
        inner.narrow(dim, 0, before).fill_(value)
        inner.narrow(dim, inner.shape[dim] - after, after).fill_(value)
        inner = inner.narrow(dim, before, x.shape[dim])
    inner.copy_(x)
    return result


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`aten.cat`. On the CPU, maps of more than five dims stay channels last, which PyTorch does not do.

    Where frames are doubled, a module joins `[N, C, T, 1, H, W]` twice. All that follows would lie the other way.
    """
    first = parts[0]
    known = first.device.type == "cpu" and first.ndim > 5 and first.shape[1] > 1
    known = known and all((one.ndim, one.dtype) == (first.ndim, first.dtype) for one in parts)
    if not known or any(one.stride(1) != 1 for one in parts) or dim % first.ndim < 2:
        return torch.cat(list(parts), dim)
    sizes = list(first.shape)
    sizes[dim] = sum(one.shape[dim] for one in parts)
    items, channels, *rest = sizes
    return torch.cat(list(parts), dim, out=first.new_empty((items, *rest, channels)).movedim(-1, 1))


def copied(x: Tensor, channels: int, shape: tuple[int, ...] | None) -> Tensor:
    """A copy that lies channels last.

    Args:
        x: `[N, C, *]`.
        channels: how many dims after N are the channels.
        shape: of the map that it is reshaped to, `[N, C', *]`, where C' is the product of those dims; None for its own.
    """
    first, rest = range(1, 1 + channels), range(1 + channels, x.ndim)
    moved = x.permute(0, *rest, *first).clone(memory_format=torch.contiguous_format)
    if shape is None:
        return moved.movedim(tuple(range(-channels, 0)), tuple(first))
    return moved.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def kept(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for the last frames of a map, channels last, which the convolution with this weight will fill."""
    return context.current_kernels(weight)[1].empty(shape, weight.dtype, kept=True)


def upsampled(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """A map `[N, C, *]` with each frame, row and col as often as the factors say."""
    fused = backends.kernels(x.device.type)
    if fused is not None:
        larger: Tensor = fused.upsampled(x, factors)
        return larger
    return F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest")


def added(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The sum of two maps of one shape and a bias `[C]`."""
    return sum_of(x, y, bias, torch.empty_like(x))


def added_(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The same, written over the first map."""
    return sum_of(x, y, bias, x)


OPERATORS = (convolution, copied, kept, normalized, pointwise, residual_convolution, upsampled_convolution)


def _summed(onto: Tensor | None, result: Tensor) -> Tensor:
    return result if onto is None else onto.add_(result)


def _direct(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: Sequence[Cut], early: bool
) -> Tensor:
    """By PyTorch's convolution."""
    left = list(padding)
    if cuts and early:
        ones = (1,) * len(padding)
        return operators.convolution(x, weight, bias, padding, ones, 1, tuple(cuts))
    for dim, mesh_dim, bounds, needed, *_ in cuts:
        x = operators.fetch(x, dim, mesh_dim, bounds, needed)
        left[dim - 2] = 0
    return _plain(x, weight, bias, left)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int] = ()) -> Tensor:
    if weight.ndim == 5 and weight.shape[2] == 1 and x.shape[2] == 1 and not any(padding[:1]):
        return _plain(x[:, :, 0], weight[:, :, 0], bias, padding[1:]).unsqueeze(2)
    spatial = weight.ndim - 2
    fused = backends.kernels(x.device.type)
    # The result of a channels-last map lies so, too. On the CPU a small one is worth a copy.
    if fused is not None or (context.kind_of(x) == "cpu" and 4 * x.shape[1] <= weight.shape[0]):
        x = x.contiguous(memory_format=torch.channels_last if spatial == 2 else torch.channels_last_3d)
    late = bias if fused is None else None
    result = halves.convolved(x, weight, late, padding or [0] * spatial, [1] * spatial, 1)
    if fused is not None and bias is not None:  # cuDNN's are added by a kernel of PyTorch's that is half as fast
        result = sum_of(result, None, bias, result)
    return result


def _after(zeros: int, past: Tensor | None, x: Tensor) -> Tensor:
    """A map with frames before it."""
    parts = [] if past is None else [past]
    if zeros:
        items, channels, _, *plane = x.shape
        parts.insert(0, x.new_zeros(items, channels, zeros, *plane))
    return torch.cat([*parts, x], 2) if parts else x
