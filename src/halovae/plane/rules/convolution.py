"""Convolutions of any kernel, stride, dilation, padding and groups; transposed convolutions; pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.plane import operators
from halovae.plane.layout import (
    Bounds,
    Factor,
    Layout,
    MeshDim,
    even,
    is_partitioned,
    partitioned,
    proper,
    ranges,
    replicated_dim,
    shape,
    sole,
)  # fmt: skip
from halovae.plane.rules.registry import known, plain, rule
from halovae.plane.tensor import PlaneTensor, channels_last, is_channels_last

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten
InputRange = Callable[[int, int], tuple[int, int]]  # the range of inputs that a range of outputs depends on
# Edges are computed twice if a map has at least this many rows (or cols) for each one of a halo; and, on the CPU, where
# every call lays out the weights again, this many values for each weight; on other devices, where a few small operators
# take longer than copying a small map, this many values.
# (docs/plane.md, docs/benchmarks/accelerator.md)
_EXTENT_TO_HALO, _MAP_TO_WEIGHTS, _LARGE_MAP = 8, 16, 2**24


def output_factor(
    plane: Plane, before: Factor, size: int, bounds: Callable[[int], int], complete: Callable[[int], int],
    mesh_dim: MeshDim,
) -> Factor:  # fmt: skip
    """Return the factor of an operator's result: cut where the input is, else evenly, else not at all.

    Args:
        plane: the plane.
        before: the input's factor.
        size: extent of the result.
        bounds: the position in the result of a bound of the input.
        complete: how many rows (or cols) of the result depend on nothing beyond a bound of the input.
        mesh_dim: the mesh dim to partition over.
    """
    ranks = plane.extents.get(mesh_dim, 1)
    if plane.strips is not None and ranks > 1:
        return plane.strips.output_factor(before, size, complete, plane.path)
    if ranks == 1 or size < ranks:
        return Factor(size)
    if before.mesh_dim is not None:
        cut: Bounds = (0, *(bounds(bound) for bound in before.bounds[1:-1]), size)
        if proper(cut, size):
            return Factor(size, mesh_dim, cut)
    return Factor(size, mesh_dim, even(size, ranks))


def fetch_inputs(
    plane: Plane, local: Tensor, dim: int, before: Factor, result: Factor, inputs_of: InputRange
) -> tuple[Tensor, int]:
    """Fetch the range of a dim that this rank's shard of the result depends on, with zeros outside of the map.

    Args:
        plane: the plane.
        local: this rank's shard.
        dim: the dim to fetch along.
        before: the dim's factor.
        result: the factor of the result.
        inputs_of: the range of inputs that a range of outputs depends on.

    Returns:
        The data, and the index of their first row (or col) in the whole map.
    """
    owned = ranges(result.bounds) if result.mesh_dim is not None else ((0, result.size),)
    own = ranges(before.bounds) if before.mesh_dim is not None else ((0, 0),) * len(owned)
    # A strip without a row of the result needs nothing.
    needed = tuple((inputs_of(*one) if one[0] < one[1] else own[place],) for place, one in enumerate(owned))
    mesh_dim = result.mesh_dim or before.mesh_dim
    assert mesh_dim is not None
    if result.mesh_dim is None:
        needed *= plane.extents[mesh_dim]
    (mine,) = needed[plane.coordinates[mesh_dim]]
    if before.mesh_dim is None:
        part = plane.part(local, dim, needed)
        return zero_extended(local, dim, mine, before.size) if part is None else part, mine[0]
    return plane.fetch(local, dim, before, needed), mine[0]


def zero_extended(x: Tensor, dim: int, interval: tuple[int, int], size: int) -> Tensor:
    """Return an interval of a dim, with zeros outside of the dim."""
    start, stop = interval
    low = min(max(start, 0), size)
    inner = x.narrow(dim, low, max(min(stop, size) - low, 0))
    before, after = max(min(stop, 0) - start, 0), max(stop - max(start, size), 0)
    return F.pad(inner, [0, 0] * (x.ndim - 1 - dim) + [before, after]) if before or after else inner


def prepared(plane: Plane, x: PlaneTensor, spatial: int) -> PlaneTensor:
    """Return a convolution's input `[N, C, *]`: channels replicated, each spatial dim one factor or replicated."""
    tangled = [dim for dim in range(x.ndim - spatial, x.ndim) if sole(x.partition[dim]) is None]
    return plane.replicate(x, [dim for dim in (x.ndim - spatial - 1, *tangled) if is_partitioned(x.partition[dim])])


def mesh_dim_of(plane: Plane, x: PlaneTensor, dim: int) -> MeshDim | None:
    """The mesh dim that a spatial dim is partitioned over, or may be once it is large enough; None if there is none."""
    factor = sole(x.partition[dim])
    if factor is not None:
        return factor.mesh_dim
    target: MeshDim | None = {x.ndim - 2: "rows", x.ndim - 1: "cols"}.get(dim)  # type: ignore[assignment]
    taken = {one.mesh_dim for other in x.partition for one in other}
    return target if target in plane.extents and target not in taken else None


def windows(
    plane: Plane,
    x: PlaneTensor,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, list[int], list[Factor], list[tuple[int, int, int]]]:
    """Fetch the inputs that this rank needs for a sliding window over the spatial dims.

    Returns:
        The data, with the padding of partitioned dims; the padding that is left to do; the factors of the result; and
        what to keep of the result of the window over these data: dims, first cells, and lengths.
    """
    spatial = len(kernel)
    local, left, factors, kept = x.local, list(padding), list[Factor](), list[tuple[int, int, int]]()
    for index, (size, k, s, p, d) in enumerate(zip(sizes, kernel, stride, padding, dilation, strict=True)):
        dim = x.ndim - spatial + index
        mesh_dim, before = mesh_dim_of(plane, x, dim), sole(x.partition[dim]) or Factor(x.shape[dim])
        if mesh_dim is None:
            factors.append(Factor(size))
            continue

        def middle(bound: int, k: int = k, s: int = s, p: int = p, d: int = d) -> int:
            return -((d * (k - 1) - 2 * (bound + p)) // (2 * s))  # ceil((bound + p - d (k - 1) / 2) / s)

        def inputs_of(start: int, stop: int, k: int = k, s: int = s, p: int = p, d: int = d) -> tuple[int, int]:
            return start * s - p, (stop - 1) * s - p + d * (k - 1) + 1

        def complete(bound: int, k: int = k, s: int = s, p: int = p, d: int = d) -> int:
            return (bound + p - d * (k - 1) - 1) // s + 1

        def inside_of(
            start: int, stop: int, k: int = k, p: int = p, d: int = d, n: int = before.size
        ) -> tuple[int, int]:
            return max(start - p, 0), min(stop - p + d * (k - 1), n)

        factor = output_factor(plane, before, size, middle, complete, mesh_dim)
        if factor.mesh_dim is None and before.mesh_dim is None:
            factors.append(factor)
            continue
        if plane.strips is not None and factor.mesh_dim is not None and s == 1 and k > 1 and d * (k - 1) % 2 == 0:
            # A convolution that keeps extents has faster kernels. Rows at the ends that it pads are not kept.
            middle_tap = d * (k - 1) // 2
            if p <= middle_tap:
                local, first = fetch_inputs(plane, local, dim, before, factor, inside_of)
                place, length = plane.coordinates[mesh_dim], factor.local(plane.coordinates)
                left[index] = middle_tap
                kept.append((dim, factor.bounds[place] + middle_tap - p - first, length))
                factors.append(factor)
                continue
        local, _ = fetch_inputs(plane, local, dim, before, factor, inputs_of)
        left[index] = 0
        factors.append(factor)
    return local, left, factors, kept


@rule(aten.convolution, aten._convolution, aten.convolution_overrideable)
def convolution(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank fetches the inputs of its shard of the result, with the padding of partitioned dims."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, *rest = args
    weight, bias = plain(weight), plain(bias)
    if not isinstance(x, PlaneTensor) or isinstance(weight, PlaneTensor) or isinstance(bias, PlaneTensor):
        return NotImplemented
    last = is_channels_last(x) or is_channels_last(weight)  # then the result is, too, on devices with such maps
    about = weight.shape, tuple(stride), tuple(padding), tuple(plane.extents)
    one_cell = None if transposed else _layout_of_one_cell(x.partition, *about)
    if one_cell is not None:  # a kernel of one cell needs no other ranks: the fast path
        plane.note(one_cell)
        local = plane.blank(x.local, one_cell)
        local = known(func).direct(x.local, weight, bias, *args[3:]) if local is None else local
        return plane.wrap(local, one_cell, strides=channels_last(shape(one_cell)) if last else None)
    spatial = weight.ndim - 2
    if x.ndim != weight.ndim:
        return NotImplemented
    stride, padding, dilation, output_padding = (
        list(one) * (spatial if len(one) == 1 else 1) for one in (stride, padding, dilation, output_padding)
    )
    kernel = weight.shape[2:]
    if x.padded is not None and not transposed and set(stride) == {1}:
        x, padding = _unpadded(plane, x, padding)
    x = prepared(plane, x, spatial)
    channels = weight.shape[0]
    if transposed:
        lengths = zip(x.shape[2:], kernel, stride, padding, dilation, output_padding, strict=True)
        if any((n - 1) * s - 2 * p + d * (k - 1) + extra < 0 for n, k, s, p, d, extra in lengths):
            return NotImplemented  # PyTorch raises an error
        channels = weight.shape[1] * groups
        local, factors = _transposed(plane, x, weight, bias, stride, padding, dilation, output_padding, groups)
    else:
        sizes = [
            (x.shape[2 + index] + 2 * p - d * (k - 1) - 1) // s + 1
            for index, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True))
        ]
        cuts = _cuts(plane, x, weight, stride, padding, dilation) if sizes == list(x.shape[2:]) else ()
        if cuts:
            factors = [sole(dim) or Factor(size) for dim, size in zip(x.partition[2:], sizes, strict=True)]
            plane.received += _received(x.local, cuts)
            local = plane.run(
                operators.convolution, x.local, weight, bias, tuple(padding), tuple(dilation), groups, cuts
            )
        else:
            data, left, factors, kept = windows(plane, x, sizes, kernel, stride, padding, dilation)
            local = plane.blank(data, (x.partition[0], (Factor(channels),), *map(_dim, factors)))
            if local is None:
                local = func(data, weight, bias, stride, left, dilation, False, output_padding, groups, *rest)
                local = _narrowed(local, kept)
    layout = (x.partition[0], (Factor(channels),) if channels != 1 else (), *(_dim(factor) for factor in factors))
    plane.note(layout)
    return plane.wrap(local, layout, strides=channels_last(shape(layout)) if last else None)


def _unpadded(plane: Plane, x: PlaneTensor, padding: list[int]) -> tuple[PlaneTensor, list[int]]:
    """Return a map before its rows and cols were padded with zeros, and the padding for the convolution instead.

    This saves the copy for the padding, and halos are those of a convolution that pads. Zeros along other dims stay.
    """
    assert x.padded is not None
    assert plane.recorder is not None
    source, widths, module = x.padded
    left, right, top, bottom = (*widths, 0, 0, 0, 0)[:4]
    moved = any(plane.recorder.changes(one.local) for one in (x, source))
    if module != plane.recorder.module:
        return x, padding  # the padding may be in another graph
    if moved or (left, top) != (right, bottom) or len(padding) < 2 or not (left or top):
        return x, padding
    rest = [0, 0, 0, 0, *widths[4:]]
    if any(rest):
        source = aten.constant_pad_nd(source, rest)
    return source, [*padding[:-2], padding[-2] + top, padding[-1] + left]


def _cuts(
    plane: Plane, x: PlaneTensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[operators.Cut, ...]:
    """Return the dims whose halos `operators.convolution` fetches while it computes; none if a copy is faster.

    Ranks decide by their own shards. They need not agree: `windows` sends the same messages in the same order.
    """
    least = _MAP_TO_WEIGHTS * weight.numel() if x.device.type == "cpu" else _LARGE_MAP
    if plane.strips is not None or any(step != 1 for step in stride) or x.local.numel() < least:
        return ()
    found: list[operators.Cut] = []
    for dim, (k, p, d) in enumerate(zip(weight.shape[2:], padding, dilation, strict=True), start=2):
        factor, mesh_dim = sole(x.partition[dim]), mesh_dim_of(plane, x, dim)
        if mesh_dim is None:
            continue
        if factor is None or factor.mesh_dim is None or 2 * p != d * (k - 1):
            return ()
        if p == 0:
            continue
        if factor.local(plane.coordinates) < _EXTENT_TO_HALO * p:
            return ()
        needed = tuple(((start - p, stop + p),) for start, stop in ranges(factor.bounds))
        position, last = plane.coordinates[mesh_dim], plane.extents[mesh_dim] - 1
        found.append((dim, mesh_dim, factor.bounds, needed, p, position > 0, position < last))
    return tuple(found)


def _received(local: Tensor, cuts: Sequence[operators.Cut]) -> int:
    """Bytes of the halos; those along a second dim include the corners."""
    total, size = 0, local.nbytes
    for dim, *_, width, before, after in cuts:
        row = size // local.shape[dim]
        total += (before + after) * width * row
        size += 2 * width * row
    return total


@lru_cache(maxsize=4096)
def _layout_of_one_cell(
    layout: Layout, weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    mesh_dims: tuple[str, ...],
) -> Layout | None:  # fmt: skip
    """Return the result's layout, if it is the input's except for replicated channels; else None."""
    spatial = len(weight) - 2
    if len(layout) != len(weight) or {*weight[2:], *stride} != {1} or {*padding} != {0}:
        return None
    places = dict(partitioned(layout))
    cut = {factor.mesh_dim for _, factor in partitioned(layout)}
    if 1 in places or any(at >= 2 and sole(layout[at]) is None for at in places):
        return None
    # A replicated dim may be large enough to be partitioned now.
    for at, mesh_dim in ((len(layout) - 2, "rows"), (len(layout) - 1, "cols")):
        if at >= len(layout) - spatial and at not in places and mesh_dim in mesh_dims and mesh_dim not in cut:
            return None
    return (layout[0], replicated_dim(weight[0]), *layout[2:])


def _narrowed(x: Tensor, kept: Sequence[tuple[int, int, int]]) -> Tensor:
    for place in kept:
        x = x.narrow(*place)
    return x


def _dim(factor: Factor) -> tuple[Factor, ...]:
    return (factor,) if factor.size != 1 else ()


def _transposed(
    plane: Plane, x: PlaneTensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], output_padding: Sequence[int], groups: int,
) -> tuple[Tensor, list[Factor]]:  # fmt: skip
    """A transposed convolution: input i contributes to the outputs `i * s - p + d * t`."""
    spatial = weight.ndim - 2
    local, factors = x.local, []
    cuts: list[tuple[int, int, int]] = []
    left, extra = list(padding), list(output_padding)
    for index in range(spatial):
        dim, k, s, p, d = 2 + index, weight.shape[2 + index], stride[index], padding[index], dilation[index]
        length = x.shape[dim]
        size = (length - 1) * s - 2 * p + d * (k - 1) + output_padding[index] + 1
        mesh_dim, before = mesh_dim_of(plane, x, dim), sole(x.partition[dim]) or Factor(length)
        if mesh_dim is None:
            factors.append(Factor(size))
            continue

        def middle(bound: int, k: int = k, s: int = s, p: int = p, d: int = d) -> int:
            return -((-(2 * bound - 1) * s + 2 * p - d * (k - 1)) // 2)

        def inputs_of(
            start: int, stop: int, k: int = k, s: int = s, p: int = p, d: int = d, n: int = length
        ) -> tuple[int, int]:
            # A stride larger than the kernel leaves gaps: the first input begins no later than the outputs.
            first = max(0, min(-((d * (k - 1) - start - p) // s), (start + p) // s, n - 1))
            return first, min(n - 1, (stop - 1 + p) // s) + 1

        def complete(bound: int, s: int = s, p: int = p) -> int:
            return bound * s - p

        factor = output_factor(plane, before, size, middle, complete, mesh_dim)
        if factor.mesh_dim is None and before.mesh_dim is None:
            factors.append(factor)
            continue
        local, first = fetch_inputs(plane, local, dim, before, factor, inputs_of)
        start = factor.bounds[plane.coordinates[mesh_dim]] if factor.mesh_dim else 0
        needed = factor.local(plane.coordinates)
        left[index], extra[index] = 0, 0
        cuts.append((dim, start + p - first * s, needed))
        factors.append(factor)
    channels = (Factor(weight.shape[1] * groups),)
    if (blank := plane.blank(local, (x.partition[0], channels, *map(_dim, factors)))) is not None:
        return blank, factors
    result: Tensor = aten.convolution(local, weight, bias, stride, left, dilation, True, extra, groups)
    for dim, start, needed in cuts:
        missing = start + needed - result.shape[dim]
        if missing > 0:  # output padding, to which no input contributes
            shape = [*result.shape[:dim], missing, *result.shape[dim + 1 :]]
            fill = result.new_zeros(shape)
            if bias is not None:
                fill = fill + bias.view(-1, *[1] * spatial)
            result = torch.cat([result, fill], dim)
        if (start, needed) != (0, result.shape[dim]):
            result = result.narrow(dim, start, needed)
    return result.contiguous() if cuts else result, factors


@rule(aten.avg_pool2d, aten.avg_pool3d)
def pooling(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pooling without padding, whose windows lie within the map."""
    x, kernel = args[:2]
    stride, padding = (args[at] if len(args) > at else None for at in (2, 3))
    rest = args[4:]
    spatial = 3 if "3d" in func._schema.name else 2
    kernel = list(kernel) * (spatial if len(kernel) == 1 else 1)
    stride = list(stride or kernel) * (spatial if len(stride or kernel) == 1 else 1)
    if any(padding or [0]) or any(rest[:1]) or kwargs:
        return NotImplemented
    dims = [dim for dim in range(x.ndim - spatial, x.ndim) if sole(x.partition[dim]) is None]
    x = plane.replicate(x, dims)
    sizes = [(x.shape[x.ndim - spatial + i] - k) // s + 1 for i, (k, s) in enumerate(zip(kernel, stride, strict=True))]
    data, left, factors, kept = windows(plane, x, sizes, kernel, stride, [0] * spatial, [1] * spatial)
    layout = (*x.partition[: x.ndim - spatial], *(_dim(factor) for factor in factors))
    local = plane.blank(data, layout)
    return plane.wrap(_narrowed(func(data, kernel, stride, left, *rest), kept) if local is None else local, layout)
