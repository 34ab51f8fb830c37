"""Nearest and linear resampling, pixel shuffle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from halovae.plane.layout import Factor, is_partitioned, joined, replicated_dim, sole
from halovae.plane.rules.convolution import mesh_dim_of, output_factor
from halovae.plane.rules.padding import reindexed
from halovae.plane.rules.registry import rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def _spatial(func: Any) -> int:
    return int(next(letter for letter in func._schema.name if letter.isdigit()))


def result_factor(plane: Plane, x: PlaneTensor, dim: int, size: int) -> Factor:
    """The factor of a dim that is resampled to `size`: cut in proportion."""
    before = sole(x.partition[dim]) or Factor(x.shape[dim])
    mesh_dim = mesh_dim_of(plane, x, dim)
    if mesh_dim is None or before.mesh_dim is None:
        return Factor(size)

    def complete(bound: int) -> int:
        return (bound - 3) * size // before.size  # a result depends on two inputs behind it at most

    return output_factor(plane, before, size, lambda bound: -(-bound * size // before.size), complete, mesh_dim)


@rule(
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d,
)  # fmt: skip
def nearest(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For whole-number factors each rank resamples its own shard; for others, rows are picked."""
    x, sizes, *scales = args
    if kwargs or func._overloadname != "default":
        return NotImplemented
    spatial = _spatial(func)
    dims = range(x.ndim - spatial, x.ndim)
    x = plane.replicate(x, [dim for dim in dims if sole(x.partition[dim]) is None])
    whole_numbers = all(size % x.shape[dim] == 0 for dim, size in zip(dims, sizes, strict=True))
    given = [*scales, *(None,) * spatial][:spatial]
    if whole_numbers and all(
        s is None or s == size / x.shape[d] for s, size, d in zip(given, sizes, dims, strict=True)
    ):
        layout, local = list(x.partition), list(x.local.shape)
        times = [size // x.shape[dim] for dim, size in zip(dims, sizes, strict=True)]
        for dim, factor in zip(dims, times, strict=True):
            layout[dim] = joined((*x.partition[dim], Factor(factor)))
            local[dim] *= factor
        if plane.recorder is not None and plane.blank(x.local, tuple(layout)) is not None:
            result = plane.recorder.empty(func, (x.local, local[-spatial:], *scales), local, times)
        else:
            result = func(x.local, local[-spatial:], *scales)
        return plane.wrap(result, tuple(layout))
    shift = 0.5 if "exact" in func._schema.name else 0.0
    for dim, size, scale in zip(dims, sizes, given, strict=True):
        length = x.shape[dim]
        # PyTorch computes this ratio in fp32 (UpSample.h, area_pixel_compute_scale).
        ratio = torch.tensor(1.0 / scale if scale else length / size, dtype=torch.float32)
        source = [min(math.floor((i + shift) * ratio), length - 1) for i in range(size)]
        if shift == 0 and size in (length, 2 * length):  # whatever the scale is (UpSample.h, nearest_idx)
            source = [i * length // size for i in range(size)]
        x = reindexed(plane, x, dim, size, source.__getitem__, result_factor(plane, x, dim, size))
    return x


@rule(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d, aten.upsample_bicubic2d)
def weighted(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Weighted sums of the nearest two or four rows, one dim after the other."""
    x, sizes, corners, *scales = args
    if kwargs or func._overloadname != "default":
        return NotImplemented
    spatial, cubic = _spatial(func), "cubic" in func._schema.name
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    given = [*scales, *(None,) * spatial][:spatial]
    dims = range(x.ndim - spatial, x.ndim)
    idle = [
        size == x.shape[dim] and (scale is None or scale == 1 or corners)
        for dim, size, scale in zip(dims, sizes, given, strict=True)
    ]
    if all(one or not is_partitioned(x.partition[dim]) for one, dim in zip(idle, dims, strict=True)):
        local = [n if one else size for one, n, size in zip(idle, x.local.shape[-spatial:], sizes, strict=True)]
        layout = [
            x.partition[dim] if one else replicated_dim(size) for one, dim, size in zip(idle, dims, sizes, strict=True)
        ]
        return plane.wrap(func(x.local, local, corners, *scales), (*x.partition[:-spatial], *layout))
    for dim, size, scale, skipped in zip(dims, sizes, given, idle, strict=True):
        length = x.shape[dim]
        if skipped:
            continue
        result = result_factor(plane, x, dim, size)
        positions = _positions(size, length, corners, scale, clamped=not cubic)
        taps: list[list[float]] = [[], [], [], []] if cubic else [[], []]
        for position in positions:
            fraction = position - math.floor(position)
            for tap, weight in zip(taps, _cubic(fraction) if cubic else (1 - fraction, fraction), strict=True):
                tap.append(weight)
        total: Any = 0
        for shift, tap in enumerate(taps, start=-1 if cubic else 0):
            source = [min(max(math.floor(position) + shift, 0), length - 1) for position in positions]
            weights = torch.tensor(tap, dtype=wide, device=x.device).view(-1, *[1] * (x.ndim - 1 - dim))
            total = total + reindexed(plane, x, dim, size, source.__getitem__, result) * weights
        x = total
    return x.to(dtype)


def _cubic(t: float, a: float = -0.75) -> tuple[float, ...]:
    """Weights of four neighbors (Keys 1981) with the constant that PyTorch uses."""

    def near(d: float) -> float:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: float) -> float:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return far(t + 1), near(t), near(1 - t), far(2 - t)


def _positions(size: int, length: int, corners: bool, scale: float | None, clamped: bool) -> Sequence[float]:
    if corners:
        return [i * (length - 1) / (size - 1) if size > 1 else 0.0 for i in range(size)]
    ratio = 1 / scale if scale else length / size
    return [max(0.0, at) if clamped else at for at in ((i + 0.5) * ratio - 0.5 for i in range(size))]


@rule(aten.pixel_shuffle)
def pixel_shuffle(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Channels become pixels; only by views."""
    x, r = args
    *batch, channels, height, width = x.shape
    n = len(batch)
    split = x.reshape(*batch, channels // r**2, r, r, height, width)
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    return split.permute(order).reshape(*batch, channels // r**2, height * r, width * r)


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pixels become channels; only by views."""
    x, r = args
    *batch, channels, height, width = x.shape
    n = len(batch)
    split = x.reshape(*batch, channels, height // r, r, width // r, r)
    return split.permute([*range(n + 1), n + 2, n + 4, n + 1, n + 3]).reshape(
        *batch, channels * r * r, height // r, width // r
    )
