"""The fused operators of graph passes: convolutions of 3 x 3 cells with the norm, SiLU and upsampling before them.

A window holds all cells that a rank's shard of a convolution depends on: the rank's shard of the map, its neighbors'
halos, and zeros or the map's own edges around the picture. Where Winograd's convolution is faster, or halovae's own
kernels run, the map is normalized and activated straight into the window. Otherwise PyTorch's operators do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.device.kinds import Device
from halovae.kernels import halves, winograd
from halovae.kernels.schemes import PLAIN, UPSAMPLING
from halovae.plane import backends, context, operators, rings
from halovae.plane.norms import Cells, Norm, activated, empty_like, is_dense, sum_of, write, writer
from halovae.plane.operators import Cut
from halovae.plane.rings import Edges
from halovae.plane.row_blocks import RowBlocks, upsampled_window

aten = torch.ops.aten


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: tuple[Cut, ...], early: bool, *,
    zeros: int = 0, past: Tensor | None = None, keep: Tensor | None = None, shift: Tensor | None = None,
    gamma: Tensor | None = None, beta: Tensor | None = None, norm: Norm | None = None, silu: bool = False,
    spare: bool = False, repeats: tuple[int, int] = (0, 0), edges: Edges | None = None, onto: Tensor | None = None,
    found: Tensor | None = None, beyond: tuple[int, int, int, int] = (0, 0, 0, 0), plus: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalize and activate a map, then convolve it with stride 1.

    Args:
        x: this rank's shard `[N, C, *]`.
        weight: `[C', C, *, 3, 3]`.
        bias: `[C']`.
        padding: of each spatial dim; 1 for the last two.
        cuts: the dims along which other ranks have cells that this one needs.
        early: whether PyTorch's convolution computes during the halo exchange, as `operators.convolution` does.
        zeros: the number of frames of zeros before the map and its past.
        past: frames that come before the map, `[N, C, T', H, W]`. They are neither normalized nor activated.
        keep: filled with the last frames of the map as they are convolved, `[N, C, T'', H, W]`.
        shift: `[C]`, added to the map before it is normalized and activated: the previous convolution's deferred bias.
        gamma: `[C]`, the norm's weight; for a norm over channels, any shape with C values.
        beta: `[C]`, the norm's bias; for a norm over channels, any shape with C values, and only on the CPU.
        norm: GroupNorm, or the norm over each cell's channels, as described at `Norm`; None for no norm.
        silu: whether SiLU comes before the convolution.
        spare: whether `x` may be overwritten, also by the result.
        repeats: how often the first frame is repeated before the map, and the last frame after it. Excludes `past`.
        edges: the cells around the picture in place of zeros, as described at `rings.Edges`.
        onto: of the result's shape. The sum of both is written to it and returned.
        found: GroupNorm's variance and mean `[2, N, groups]`, if they are known.
        beyond: how many rows and cols of `x`, 0 or 1 at the top, bottom, left and right, lie outside of the result.
        plus: of the shape of `x`. The sum with it, and with `shift`, replaces `x` before. Later operators may read it.

    Returns:
        This rank's shard of the result, `[N, C', *]`.
    """
    kernels, pool = context.current_kernels(x)
    top, bottom, left, right = beyond
    height, width = x.shape[-2] - top - bottom, x.shape[-1] - left - right
    kind = context.kind_of(x)
    maps, whole = (tensor if tensor.ndim == 5 else tensor.unsqueeze(2) for tensor in (x, weight))
    frames, before = maps.shape[2], sum(padding[:-2])
    first = zeros + repeats[0] + (0 if past is None else past.shape[2])
    depth = first + frames + repeats[1]
    shape = (x.shape[0], weight.shape[0], depth + 2 * before - whole.shape[2] + 1, height, width)
    cells = shape[2] * shape[3] * shape[4]
    by_winograd = min(height, width) >= PLAIN.results and winograd.is_profitable(PLAIN, weight, cells, kernels, kind)
    # A window replaces any other copy that adds frames or halos to the map.
    fused = backends.kernels(x.device.type) is not None and (shift is not None or norm is not None or silu)
    copied = past is not None or zeros > 0 or (bool(cuts) and (fused or not early))
    windowed = by_winograd or edges is not None or any(repeats) or (copied and (fused or kind == "cpu"))
    if not windowed:
        x = activated(x, shift, gamma, beta, norm, silu, spare, found, plus)
        if keep is not None:
            keep.copy_(x[:, :, frames - keep.shape[2] :])
        return _summed(onto, _within(_direct(_after(zeros, past, x), weight, bias, padding, cuts, early), beyond))
    if plus is not None and by_winograd:  # it reads rows several times
        x, plus, shift = sum_of(x, plus, shift, x), None, None
    plus = plus if plus is None or plus.ndim == 5 else plus.unsqueeze(2)
    normalized = writer(maps, shift, gamma, beta, norm, silu, found, plus)

    def interior(items: slice, rows: slice, cols: slice, out: Tensor) -> None:
        rows, cols = _shifted(rows, top, height), _shifted(cols, left, width)
        span, inner = (items, slice(None), slice(None), rows, cols), out[:, :, before : before + depth]
        if past is not None:
            inner[:, :, zeros:first].copy_(past[span])
        normalized(span, inner[:, :, first : first + frames])
        if repeats[0]:
            inner[:, :, :first].copy_(inner[:, :, first : first + 1].expand_as(inner[:, :, :first]))
        if repeats[1]:
            last = inner[:, :, first + frames - 1 : first + frames]
            inner[:, :, first + frames :].copy_(last.expand_as(inner[:, :, first + frames :]))
        if keep is not None:
            keep[span].copy_(inner[:, :, depth - keep.shape[2] :])

    added_onto = by_winograd and onto is not None and is_dense(onto)
    over = spare and not added_onto and maps.shape == shape and is_dense(maps)
    ring = depth + 2 * before, before + zeros, before
    in_blocks = by_winograd and not (shape[3] % PLAIN.results or shape[4] % PLAIN.results)
    in_blocks = in_blocks and (not over or winograd.reads_once(PLAIN, whole))
    own = _within(x, beyond)
    if in_blocks:
        blocks = RowBlocks(interior, own, *ring, slice(before, before + depth), cuts, edges, beyond)
        finish = blocks.start()
    else:
        window = rings.window(own, *ring, cuts, edges)
        inside = slice(-top, height + bottom), slice(-left, width + right)
        interior(slice(None), *inside, window[..., 1 - top : height + 1 + bottom, 1 - left : width + 1 + right])
        padded = window[:, :, before : before + depth]
        finish = rings.start(padded if x.ndim == 5 else padded.squeeze(2), cuts, edges)
    ready = finish if cuts else None

    def memory() -> Tensor:
        if onto is not None and added_onto:
            return onto if x.ndim == 5 else onto.unsqueeze(2)
        return maps if over else pool.empty(shape, x.dtype)

    try:
        if in_blocks:
            result = memory()
            winograd.convolve(PLAIN, blocks, whole, bias, result, kernels, pool, add=added_onto, ready=ready)
        elif by_winograd:
            result = winograd.convolved(
                window, whole, bias, memory, lambda piece: _plain(piece, whole, bias), kernels, pool, add=added_onto,
                ready=ready,
            )  # fmt: skip
    finally:
        finish()  # also after an error: other ranks' messages are under way
    if not by_winograd:
        result = _plain(window, whole, bias)
    result = result if x.ndim == 5 else result.squeeze(2)
    return result if added_onto else _summed(onto, result)


def residual_convolution(onto: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Add a convolution's result to a map in place: `convolution(..., onto=onto)`."""
    return convolution(*arguments, **options, onto=onto)


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, cuts: tuple[Cut, ...]) -> Tensor:
    """Upsample a map by two and convolve it, padded by 1. Ranks exchange halos at the low resolution.

    Args:
        x: this rank's shard `[N, C, H, W]`.
        weight: `[C', C, 3, 3]`.
        bias: `[C']`.
        cuts: the dims of `x` along which other ranks have cells that this one needs.

    Returns:
        This rank's shard of the result, `[N, C', 2H, 2W]`.
    """
    kernels, pool = context.current_kernels(x)
    items, _, height, width = x.shape
    by_winograd = winograd.is_profitable(UPSAMPLING, weight, items * height * width, kernels, context.kind_of(x))
    if not by_winograd and not cuts:
        return _plain(upsampled(x, (2, 2)), weight, bias, (1, 1))
    if not by_winograd and backends.kernels(x.device.type) is not None and backends.takes(x):
        larger, padding = upsampled_window(x, cuts)
        return _plain(larger, weight, bias, padding)
    if not by_winograd:
        for dim, mesh_dim, bounds, needed, *_ in cuts:
            x = operators.fetch(x, dim, mesh_dim, bounds, needed)
        larger, padding = upsampled(x, (2, 2)), [1, 1]
        for dim, *_ in cuts:
            larger, padding[dim - 2] = larger.narrow(dim, 1, larger.shape[dim] - 2), 0
        return _plain(larger, weight, bias, padding)

    def interior(items: slice, rows: slice, cols: slice, out: Tensor) -> None:
        out[:, :, 0].copy_(x[items, :, rows, cols])

    blocks = RowBlocks(interior, x, 1, 0, 0, slice(1), cuts, None)
    finish = blocks.start()
    try:
        out = pool.empty((items, weight.shape[0], 1, 2 * height, 2 * width), x.dtype)
        ready = finish if cuts else None
        winograd.convolve(UPSAMPLING, blocks, weight.unsqueeze(2), bias, out, kernels, pool, ready=ready)
    finally:
        finish()
    return out[:, :, 0]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with a kernel of one cell. A channels-last map is a matrix, so this is a matrix product.

    PyTorch (2.13) copies such maps first if the weights are not channels last: 256 to 128 channels of 256 x 256 cells
    take 62 ms, the matrix product 24 (fp32, one thread). On CUDA devices the product also adds the bias.

    Args:
        x: this rank's shard `[N, C, *]`.
        weight: `[C', C, 1, ...]`.
        bias: `[C']`.
    """
    fused = context.kind_of(x) == "cpu" or backends.kernels(x.device.type) is not None
    if fused and x.stride(1) == 1 and x.shape[1] > 1:
        return halves.linear(x, weight.flatten(1), bias)
    return _plain(x, weight, bias)


def normalized(x: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: Cells, *, spare: bool = False) -> Tensor:
    """Normalize a map over each cell's channels where no convolution follows; only on the CPU.

    Args:
        x: this rank's shard `[N, C, *]`.
        gamma: the norm's weight, of any shape with C values.
        beta: the norm's bias, of any shape with C values.
        norm: as described at `Cells`.
        spare: whether the result overwrites `x`.
    """
    out = x if spare else empty_like(x)
    write(x, None, gamma, beta, norm, False, out)
    return out


def padded(x: Tensor, widths: Sequence[int], value: float = 0.0) -> Tensor:
    """Compute `aten.constant_pad_nd`, keeping channels-last maps channels last on the CPU.

    PyTorch (2.13) does not recognize a channels-last map of one item or one frame. A convolution of stride 2 then takes
    twice as long, and the norm after it copies.

    Args:
        x: `[N, C, *]`.
        widths: padding before and after each dim, from the last dim on.
        value: the padding's value.
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
    """Compute `aten.cat`. On the CPU, maps of more than five dims stay channels last, unlike in PyTorch.

    To double frames, a module joins `[N, C, T, 1, H, W]` twice. Otherwise all later maps would not be channels last.
    """
    first = parts[0]
    plain = first.device.type == "cpu" and first.ndim > 5 and first.shape[1] > 1
    plain = plain and all((part.ndim, part.dtype) == (first.ndim, first.dtype) for part in parts)
    if not plain or any(part.stride(1) != 1 for part in parts) or dim % first.ndim < 2:
        return torch.cat(list(parts), dim)
    sizes = list(first.shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    items, channels, *rest = sizes
    return torch.cat(list(parts), dim, out=first.new_empty((items, *rest, channels)).movedim(-1, 1))


def copied(x: Tensor, channels: int, shape: tuple[int, ...] | None) -> Tensor:
    """Copy a tensor to channels-last memory.

    Args:
        x: `[N, C, *]`.
        channels: the number of dims after N that are channels.
        shape: of the result, `[N, C', *]`, where C' is the product of the channel dims; None for the shape of `x`.
    """
    first, rest = range(1, 1 + channels), range(1 + channels, x.ndim)
    moved = x.permute(0, *rest, *first).clone(memory_format=torch.contiguous_format)
    if shape is None:
        return moved.movedim(tuple(range(-channels, 0)), tuple(first))
    return moved.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def kept(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Allocate channels-last memory for a map's last frames, which the convolution with this weight will fill."""
    return context.current_kernels(weight)[1].empty(shape, weight.dtype, kept=True)


def upsampled(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Repeat each frame, row and col of a map `[N, C, *]` by the factors."""
    fused = backends.kernels(x.device.type)
    if fused is None or not backends.takes(x):
        return F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest")
    sizes = *x.shape[:2], *(size * factor for size, factor in zip(x.shape[2:], factors, strict=True))
    larger = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=Device(x.device).layout(x.ndim))
    fused.upsample(x, factors, larger)
    return larger


def added(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Add two maps of one shape and a bias `[C]`."""
    return sum_of(x, y, bias, torch.empty_like(x))


def added_(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Add two maps of one shape and a bias `[C]` in place of the first map."""
    return sum_of(x, y, bias, x)


OPERATORS = (convolution, copied, kept, normalized, pointwise, residual_convolution, upsampled_convolution)


def _within(x: Tensor, beyond: tuple[int, int, int, int]) -> Tensor:
    """Return a map without rows and cols at its top, bottom, left and right."""
    top, bottom, left, right = beyond
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right] if any(beyond) else x


def _shifted(cells: slice, by: int, extent: int) -> slice:
    """Return a range of the result's rows (or cols) as a range of the map's."""
    start, stop = 0 if cells.start is None else cells.start, extent if cells.stop is None else cells.stop
    return slice(start + by, stop + by)


def _summed(onto: Tensor | None, result: Tensor) -> Tensor:
    return result if onto is None else onto.add_(result)


def _direct(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: Sequence[Cut], early: bool
) -> Tensor:
    """Exchange halos and convolve by PyTorch."""
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
    # The result of a channels-last map is channels last, too. On the CPU, a small map is worth the copy.
    if fused is not None or (context.kind_of(x) == "cpu" and 4 * x.shape[1] <= weight.shape[0]):
        x = x.contiguous(memory_format=Device(x.device).layout(x.ndim))
    late = bias if fused is None else None
    result = halves.convolved(x, weight, late, padding or [0] * spatial, [1] * spatial, 1)
    if fused is not None and bias is not None:  # PyTorch's kernel that adds cuDNN's biases is half as fast
        result = sum_of(result, None, bias, result)
    return result


def _after(zeros: int, past: Tensor | None, x: Tensor) -> Tensor:
    """Return a map with frames of zeros and of the past before it."""
    parts = [] if past is None else [past]
    if zeros:
        items, channels, _, *plane = x.shape
        parts.insert(0, x.new_zeros(items, channels, zeros, *plane))
    return torch.cat([*parts, x], 2) if parts else x
