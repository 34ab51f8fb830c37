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
from halovae.plane import backends, operators
from halovae.plane.norms import Norm, activated, sum_of, write
from halovae.plane.operators import Cut
from halovae.schemes import PLAIN, UPSAMPLING

aten = torch.ops.aten


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cuts: tuple[Cut, ...], early: bool, *,
    zeros: int = 0, past: Tensor | None = None, keep: Tensor | None = None, shift: Tensor | None = None,
    gamma: Tensor | None = None, beta: Tensor | None = None, norm: Norm | None = None, silu: bool = False,
    spare: bool = False,
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
    folded = min(x.shape[-2:]) >= PLAIN.results and winograd.pays(PLAIN, weight, cells, kernels, x.device.type)
    # Where norms are written by kernels of our own, they are into a window, too, if there is more to come into it.
    fused = backends.kernels(x.device.type) is not None and (shift is not None or norm is not None or silu)
    if not folded and not (fused and (cuts or past is not None or zeros)):
        x = activated(x, shift, gamma, beta, norm, silu, spare)
        if keep is not None:
            keep.copy_(x[:, :, own - keep.shape[2] :])
        return _direct(_after(zeros, past, x), weight, bias, padding, cuts, early)
    window = _window(maps, depth + 2 * before, before + zeros, before, _cut_dims(x, cuts))
    padded = window.narrow(2, before, depth)
    inner = padded[..., 1:-1, 1:-1]
    if past is not None:
        inner[:, :, zeros:first].copy_(past)
    write(maps, shift, gamma, beta, norm, silu, inner[:, :, first:])
    if keep is not None:
        keep.copy_(inner[:, :, depth - keep.shape[2] :])
    finish = _start_halos(padded if x.ndim == 5 else padded.squeeze(2), cuts)
    try:
        if folded:
            result = winograd.convolved(
                window, whole, bias, lambda: pool.empty(shape, x.dtype), lambda part: _plain(part, whole, bias),
                kernels, pool, ready=finish if cuts else None,
            )  # fmt: skip
    finally:
        finish()  # whatever happens here: the others' messages are under way
    if not folded:
        result = _plain(window, whole, bias)
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
    window = _window(x.unsqueeze(2), 1, 0, 0, _cut_dims(x, cuts)) if folded else None
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
    62 ms, the product of matrices 24 (fp32, one thread). On CUDA devices a product adds the bias on its way.

    Args:
        x: this rank's part `[N, C, *]`.
        weight: `[C', C, 1, ...]`.
        bias: `[C']`.
    """
    known = x.device.type == "cpu" or backends.kernels(x.device.type) is not None
    if known and x.stride(1) == 1 and x.shape[1] > 1:
        return multiplied(F.linear, x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return _plain(x, weight, bias)


def kept(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for the last frames of a map, channels last, which the convolution with this weight will fill."""
    items, channels, *rest = shape
    return weight.new_empty(items, *rest, channels).movedim(-1, 1)


def added(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The sum of two maps of one shape and a bias `[C]`."""
    return sum_of(x, y, bias, torch.empty_like(x))


def added_(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The same, written over the first map."""
    return sum_of(x, y, bias, x)


OPERATORS = (convolution, kept, pointwise, upsampled_convolution)


def _upsampled(x: Tensor) -> Tensor:
    fused = backends.kernels(x.device.type)
    if fused is not None:
        larger: Tensor = fused.upsampled(x)
        return larger
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
    fused = backends.kernels(x.device.type)
    if fused is not None:  # a channels-last map: its results lie so, too
        x = x.contiguous(memory_format=torch.channels_last if spatial == 2 else torch.channels_last_3d)
    late = bias if fused is None else None
    result = multiplied(aten.convolution.default, x, weight, late, ones, list(padding) or zeros, ones, False, zeros, 1)
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


def _window(x: Tensor, frames: int, before: int, after: int, cut: Sequence[int]) -> Tensor:
    """Memory for frames of a map `[N, C, T, H, W]` with a ring; so many frames before and after are all zeros.

    The ring is zeros but along the dims that are cut, counted from the last: halos will be written there.
    """
    _, pool = operators.current_kernels()
    shape = (x.shape[0], x.shape[1], frames, x.shape[-2] + 2, x.shape[-1] + 2)
    window = pool.empty(shape, x.dtype)
    for dim, first, last in ((-3, before, after), (-2, 1, 1), (-1, 1, 1)):
        if first and dim not in cut:
            window.narrow(dim, 0, first).zero_()
        if last and dim not in cut:
            window.narrow(dim, window.shape[dim] - last, last).zero_()
    return window


def _cut_dims(x: Tensor, cuts: Sequence[Cut]) -> list[int]:
    return [dim - x.ndim for dim, *_ in cuts]


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

        wait, _, fill = operators.fetching(take, inner, dim, mesh_dim, bounds, intervals)

        def finish(
            wait: Callable[[], None] = wait, fill: Callable[[operators.Place], None] = fill, dim: int = dim,
            ring: Tensor = ring,
        ) -> None:  # fmt: skip
            wait()
            fill(lambda first, _: ring.narrow(dim, (ring.shape[dim] - 1) * first, 1))

        known.append(dim)
    left = [finish]

    def finish_once() -> None:
        if left:
            left.pop()()

    if known and known[-1] == window.ndim - 1:
        finish_once()
    return finish_once
