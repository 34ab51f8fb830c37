"""Convolutions of 3 x 3 cells in space, as graph passes make them: with the norm, SiLU and upsampling before them.

A window is all that a rank's part of a convolution depends on: its own part of the map, the halos of its neighbors, and
zeros where the picture ends. Where Winograd's convolution is the faster one, the map is normalized and activated
straight into the window. Where it is not, PyTorch's operators do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae import winograd
from halovae.halves import multiplied
from halovae.lines import Scope
from halovae.plane import operators
from halovae.plane.operators import Cut
from halovae.plane.tensor import is_channels_last
from halovae.schemes import PLAIN, UPSAMPLING

aten = torch.ops.aten
# GroupNorm's groups, eps, and scope and counts as `operators.statistics` has them; or the least norm of a cell's
# channels, and what their quotient is multiplied by.
Norm = tuple[int, float, Scope, tuple[int, ...]] | tuple[float, float]
_VALUES = 2**18  # of a map that are normalized at once


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: tuple[Cut, ...], early: bool,
    zeros: int, past: Tensor | None, keep: Tensor | None, gamma: Tensor | None, beta: Tensor | None, norm: Norm | None,
    silu: bool, spare: bool,
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
        gamma: `[C]`, the norm's weight; of a norm over channels of any shape with C values.
        beta: `[C]`, GroupNorm's bias.
        norm: GroupNorm, or the norm over each cell's channels, as `Norm` has them; None where there is none.
        silu: whether SiLU comes before the convolution.
        spare: whether `x` may be written over.

    Returns:
        This rank's part of the result, `[N, C', *]`.
    """
    kernels, pool = operators.current_kernels()
    maps, whole = (one if one.ndim == 5 else one.unsqueeze(2) for one in (x, weight))
    own, before = maps.shape[2], sum(padding[:-2])
    first = zeros + (0 if past is None else past.shape[2])
    depth = first + own
    shape = (x.shape[0], weight.shape[0], depth + 2 * before - whole.shape[2] + 1, *x.shape[-2:])
    cells = shape[2] * shape[3] * shape[4]
    if min(x.shape[-2:]) < PLAIN.results or not winograd.pays(PLAIN, weight, cells, kernels, x.device.type):
        x = _activated(x, gamma, beta, norm, silu, spare)
        if keep is not None:
            keep.copy_(x[:, :, own - keep.shape[2] :])
        return _direct(_after(zeros, past, x), weight, bias, padding, cuts, early)
    window = _window(maps, depth + 2 * before, before + zeros, before)
    padded = window.narrow(2, before, depth)
    inner = padded[..., 1:-1, 1:-1]
    if past is not None:
        inner[:, :, zeros:first].copy_(past)
    _write(maps, gamma, beta, norm, silu, inner[:, :, first:])
    if keep is not None:
        keep.copy_(inner[:, :, depth - keep.shape[2] :])
    finish = _start_halos(padded if x.ndim == 5 else padded.squeeze(2), cuts)
    try:
        result = winograd.convolved(
            window, whole, bias, lambda: pool.empty(shape, x.dtype), lambda part: _plain(part, whole, bias), kernels,
            pool, ready=finish if cuts else None,
        )  # fmt: skip
    finally:
        finish()  # whatever happens here: the others' messages are under way
    return result if x.ndim == 5 else result.squeeze(2)


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
    kernels, pool = operators.current_kernels()
    items, _, height, width = x.shape
    folded = winograd.pays(UPSAMPLING, weight, items * height * width, kernels, x.device.type)
    if not folded and not cuts:
        return _plain(_upsampled(x), weight, bias, (1, 1))
    window = _window(x.unsqueeze(2), 1, 0, 0) if folded else None
    if window is None:
        for dim, mesh_dim, bounds, wanted, *_ in cuts:
            x = operators.fetch(x, dim, mesh_dim, bounds, wanted)
        larger, padding = _upsampled(x), [1, 1]
        for dim, *_ in cuts:
            larger, padding[dim - 2] = larger.narrow(dim, 1, larger.shape[dim] - 2), 0
        return _plain(larger, weight, bias, padding)
    window[:, :, 0, 1:-1, 1:-1].copy_(x)
    finish = _start_halos(window[:, :, 0], cuts)
    try:
        out = pool.empty((items, weight.shape[0], 1, 2 * height, 2 * width), x.dtype)
        winograd.convolve(
            UPSAMPLING, window, weight.unsqueeze(2), bias, out, kernels, pool, ready=finish if cuts else None
        )
    finally:
        finish()
    return out[:, :, 0]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of one cell. Where channels lie side by side, a map is a matrix as it is.

    PyTorch (2.13) copies such maps first where the weights do not lie so: 256 to 128 channels of 256 x 256 cells take
    62 ms, the product of matrices 24 (fp32, one thread).

    Args:
        x: this rank's part `[N, C, *]`.
        weight: `[C', C, 1, ...]`.
        bias: `[C']`.
    """
    if x.device.type == "cpu" and x.stride(1) == 1 and x.shape[1] > 1:
        return multiplied(F.linear, x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return _plain(x, weight, bias)


def kept(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for the last frames of a map, channels last, which the convolution with this weight will fill."""
    items, channels, *rest = shape
    return weight.new_empty(items, *rest, channels).movedim(-1, 1)


OPERATORS = (convolution, kept, pointwise, upsampled_convolution)


def _upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _direct(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: Sequence[Cut], early: bool
) -> Tensor:
    """By PyTorch's convolution."""
    left = list(padding)
    if cuts and early:
        ones = (1,) * len(padding)
        return operators.convolution(x, weight, bias, padding, ones, 1, tuple(cuts))
    for dim, mesh_dim, bounds, wanted, *_ in cuts:
        x = operators.fetch(x, dim, mesh_dim, bounds, wanted)
        left[dim - 2] = 0
    return _plain(x, weight, bias, left)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int] = ()) -> Tensor:
    if weight.ndim == 5 and weight.shape[2] == 1 and x.shape[2] == 1 and not any(padding[:1]):
        return _plain(x[:, :, 0], weight[:, :, 0], bias, padding[1:]).unsqueeze(2)
    spatial = weight.ndim - 2
    zeros = [0] * spatial
    ones = [1] * spatial
    return multiplied(aten.convolution.default, x, weight, bias, ones, list(padding) or zeros, ones, False, zeros, 1)


def _after(zeros: int, past: Tensor | None, x: Tensor) -> Tensor:
    """A map with frames before it."""
    parts = [] if past is None else [past]
    if zeros:
        items, channels, _, *plane = x.shape
        parts.insert(0, x.new_zeros(items, channels, zeros, *plane))
    return torch.cat([*parts, x], 2) if parts else x


def _write(x: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: Norm | None, silu: bool, out: Tensor) -> None:
    """The map normalized and activated, into `out`."""
    if norm is None:
        out.copy_(x)
        if silu:
            F.silu(out, inplace=True)
    elif len(norm) == 2:
        _normalize_cells(x, gamma, norm, silu, out)
    else:
        _normalize(x, gamma, beta, norm, silu, out)


def _activated(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: Norm | None, silu: bool, spare: bool
) -> Tensor:
    """The map normalized and activated, written over it if it is spare and that is not slower."""
    if norm is None:
        return F.silu(x, inplace=spare) if silu else x
    if len(norm) == 2:
        out = x if spare else torch.empty_like(x)
        _normalize_cells(x, gamma, norm, silu, out)
        return out
    if spare and x.device.type == "cpu" and is_channels_last(x):
        _normalize(x, gamma, beta, norm, silu, x)
        return x
    groups, eps, scope, counts = norm
    if counts:
        x = operators.group_norm(x, gamma, beta, groups, eps, scope, counts)
    else:
        x = operators.whole_group_norm(x, groups, gamma, beta, eps)
    return F.silu(x, inplace=True) if silu else x


def _normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: tuple[int, float, Scope, tuple[int, ...]], silu: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """GroupNorm and SiLU of a map, into `out`."""
    groups, eps, scope, counts = norm
    items, channels = x.shape[:2]
    variance, mean = operators.statistics(x, groups, scope, counts)
    shape = (items, groups, channels // groups)
    scale = (variance + eps).rsqrt().unsqueeze(-1).expand(shape).reshape(items, channels)
    scale = scale if gamma is None else scale * gamma.to(scale.dtype)
    shift = mean.unsqueeze(-1).expand(shape).reshape(items, channels) * -scale
    shift = shift if beta is None else shift + beta.to(shift.dtype)

    def write(item: int, source: Tensor, result: Tensor) -> None:
        torch.addcmul(shift[item], source, scale[item], out=result)

    _in_parts(x, scale.dtype, write, silu, out)


def _normalize_cells(x: Tensor, gamma: Tensor | None, norm: tuple[float, float], silu: bool, out: Tensor) -> None:
    """Each cell's channels divided by their Euclidean norm, times a factor and `gamma`; SiLU; into `out`."""
    least, factor = norm
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale = torch.full((), factor, dtype=dtype, device=x.device)
    scale = scale if gamma is None else gamma.flatten().to(dtype) * factor

    def write(item: int, source: Tensor, result: Tensor) -> None:
        length = torch.linalg.vector_norm(source, dim=-1, keepdim=True).clamp_min_(least)
        torch.div(source, length, out=result)
        result.mul_(scale)

    _in_parts(x, dtype, write, silu, out)


def _in_parts(
    x: Tensor, dtype: torch.dtype, write: Callable[[int, Tensor, Tensor], None], silu: bool, out: Tensor
) -> None:
    """Normalize and activate a map `[N, C, *]` into `out`, in `dtype`, rounded once.

    Some rows at once, so that they stay in a core's cache between the operators: GroupNorm and SiLU of 128 x 256 x 256
    take 15 ms, where a compiled loop takes 35 and PyTorch's operators one after the other 60 (fp32, one thread, torch
    2.13).

    Args:
        x: the map.
        dtype: to compute in.
        write: normalizes rows of an item, channels last, into memory.
        silu: whether SiLU follows.
        out: of the map's shape.
    """
    values = _VALUES if x.device.type == "cpu" else x.numel()
    rows = max(1, values * x.shape[-2] // x[0].numel())
    for start in range(0, x.shape[-2], rows):
        span = (..., slice(start, start + rows), slice(None))
        for item, (one, target) in enumerate(zip(x[span], out[span], strict=True)):
            source, result = one.movedim(0, -1), target.movedim(0, -1)
            wide = result if result.dtype == dtype else torch.empty(source.shape, dtype=dtype, device=x.device)
            write(item, source.to(dtype), wide)
            if silu:
                F.silu(wide, inplace=True)
            if wide is not result:
                result.copy_(wide)


def _window(x: Tensor, frames: int, before: int, after: int) -> Tensor:
    """Memory for frames of a map `[N, C, T, H, W]` with a ring of zeros; so many before and after are all zeros."""
    _, pool = operators.current_kernels()
    shape = (x.shape[0], x.shape[1], frames, x.shape[-2] + 2, x.shape[-1] + 2)
    window = pool.empty(shape, x.dtype)
    for dim, first, last in ((2, before, after), (3, 1, 1), (4, 1, 1)):
        window.narrow(dim, 0, first).zero_()
        window.narrow(dim, window.shape[dim] - last, last).zero_()
    return window


def _start_halos(window: Tensor, cuts: Sequence[Cut]) -> Callable[[], None]:
    """Start to fill what of a window's ring other ranks have; returns what waits for it and does the rest, once.

    Only rows travel meanwhile: with cols every row of the window is incomplete, and the corners come with them.
    """
    known: list[int] = []
    finish = lambda: None  # noqa: E731
    for dim, mesh_dim, bounds, wanted, width, *_ in cuts:
        finish()
        # Along a dim that was filled before, its halos travel too: they are the corners.
        ring = window
        for at in range(window.ndim - 2, window.ndim):
            if at not in known and at != dim:
                ring = ring.narrow(at, 1, window.shape[at] - 2)
        inner = ring.narrow(dim, 1, window.shape[dim] - 2)
        position = operators.position(mesh_dim)
        start, stop = wanted[position][0]
        mine = ((start, start + width), (stop - width, stop))
        intervals = tuple(mine if at == position else one for at, one in enumerate(wanted))

        def take(first: int, length: int, dim: int = dim, inner: Tensor = inner) -> Tensor:
            return inner.narrow(dim, first, length)

        wait, joined = operators.fetching(take, inner, dim, mesh_dim, bounds, intervals)

        def finish(
            wait: Callable[[], None] = wait, joined: Callable[[], Tensor] = joined, dim: int = dim, ring: Tensor = ring
        ) -> None:
            wait()
            halos = joined()
            ring.narrow(dim, 0, 1).copy_(halos.narrow(dim, 0, 1))
            ring.narrow(dim, ring.shape[dim] - 1, 1).copy_(halos.narrow(dim, 1, 1))

        known.append(dim)
    left = [finish]

    def finish_once() -> None:
        if left:
            left.pop()()

    if known and known[-1] == window.ndim - 1:
        finish_once()
    return finish_once
