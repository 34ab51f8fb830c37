"""Padding of every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from halovae.plane.layout import Factor, is_partitioned, joined, proper, ranges, sole
from halovae.plane.rules.registry import rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


@rule(aten.constant_pad_nd)
def constant(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ranks at the border pad; a negative width crops."""
    x, widths, *value = args
    if any(width < 0 for width in widths):
        for at in range(len(widths) // 2):
            before, after = (min(width, 0) for width in widths[2 * at : 2 * at + 2])
            x = x.narrow(x.ndim - 1 - at, -before, x.shape[x.ndim - 1 - at] + before + after)
        return func(x, [max(width, 0) for width in widths], *value, **kwargs)
    behind: list[tuple[int, int]] = []  # partitioned dims that are padded at their end only, and by how much
    before_padding, layout, pads = x, list(x.partition), list(widths) + [0] * (2 * x.ndim - len(widths))
    for dim in range(x.ndim):
        at = 2 * (x.ndim - 1 - dim)
        before, after = pads[at : at + 2]
        if not before and not after:
            continue
        factor = sole(x.partition[dim])
        if factor is None:
            x = plane.replicate(x, [dim])
            size = x.shape[dim] + before + after
            layout[dim] = joined((Factor(size),))
            continue
        assert factor.mesh_dim is not None
        size = factor.size + before + after
        bounds = (0, *(size if bound == factor.size else bound + before for bound in factor.bounds[1:-1]), size)
        if not before:
            behind.append((dim, after))
        position = plane.coordinates[factor.mesh_dim]
        start, stop = factor.bounds[position : position + 2]
        if position > 0:
            pads[at] = 0
        if not start < stop == factor.size:  # the rank with the last row pads after it
            pads[at + 1] = 0
        layout[dim] = (Factor(size, factor.mesh_dim, bounds),)
    # A rank that pads nothing copies, too: PyTorch returns a new tensor.
    local = func(x.local, pads, *value, **kwargs) if any(pads) else x.local.clone()
    result = plane.wrap(local, tuple(layout))
    if plane.recorder is not None and plane.strips is not None:
        plane.recorder.node(local).meta["behind"] = tuple(behind)
    if plane.recorder is not None and not any((*value, *kwargs.values())):
        result.padded = before_padding, tuple(widths), plane.recorder.module
    return result


def reindexed(
    plane: Plane, x: PlaneTensor, dim: int, size: int, source: Callable[[int], int], result: Factor | None = None
) -> PlaneTensor:
    """Return the tensor whose index i along `dim` is index `source(i)` of `x`.

    Args:
        plane: the plane.
        x: the tensor.
        dim: the dim.
        size: its extent in the result.
        source: the index in `x` of an index in the result.
        result: the result's factor; None for the factor of `x`.
    """
    factor = sole(x.partition[dim])
    if factor is None:
        x = plane.replicate(x, [dim])
        index = torch.tensor([source(i) for i in range(size)], device=x.device)
        layout = (*x.partition[:dim], joined((Factor(size),)), *x.partition[dim + 1 :])
        return plane.wrap(x.local.index_select(dim, index), layout)
    if result is None:
        result = factor
    assert factor.mesh_dim is not None
    needed, picks = list[tuple[tuple[int, int], ...]](), list[list[int]]()
    owned = ranges(result.bounds) if result.mesh_dim else ((0, size),) * plane.extents[factor.mesh_dim]
    for start, stop in owned:
        if start == stop:  # a strip without rows
            needed.append(((0, 0),))
            picks.append([])
            continue
        indices = [source(i) for i in range(start, stop)]
        cuts = [at for at in range(1, len(indices)) if abs(indices[at] - indices[at - 1]) > 1]
        intervals: list[tuple[int, int]] = []
        pick: list[int] = []
        for a, b in zip([0, *cuts], [*cuts, len(indices)], strict=True):
            run, offset = indices[a:b], sum(high - low for low, high in intervals)
            intervals.append((min(run), max(run) + 1))
            pick += [one - min(run) + offset for one in run]
        needed.append(tuple(intervals))
        picks.append(pick)
    local = plane.fetch(x.local, dim, factor, tuple(needed))
    pick = picks[plane.coordinates[factor.mesh_dim]]
    if pick != list(range(local.shape[dim])):
        local = local.index_select(dim, torch.tensor(pick, device=x.device))
    elif local.untyped_storage()._cdata == x.local.untyped_storage()._cdata:
        local = local.clone()
    return plane.wrap(local, (*x.partition[:dim], joined((result,)), *x.partition[dim + 1 :]))


def _padded(
    plane: Plane, func: Any, x: PlaneTensor, widths: Sequence[int], source: Callable[[int, int], int],
    short: int | None = None, beyond: int | None = None,
) -> Any:  # fmt: skip
    """Pad a map with copies of its own rows and cols.

    Args:
        plane: the plane.
        func: PyTorch's operator, for padding that needs no other ranks.
        x: the map.
        widths: before and after, the last dim first.
        source: the index in the map of an index relative to it, given the map's extent.
        short: by how much widths must be smaller than the map; None for any width.
        beyond: how many rows more than a width a rank at the border needs to pad without others; None if it cannot.
    """
    local, shared, layout = list(widths), list[int](), list(x.partition)
    for at in range(len(widths) // 2):
        dim, pads = x.ndim - 1 - at, widths[2 * at : 2 * at + 2]
        size, factor = x.shape[dim] + sum(pads), sole(x.partition[dim])
        if size < 1 or (short is not None and max(pads) > x.shape[dim] - short):
            return NotImplemented  # PyTorch raises an error
        if not any(pads):
            continue
        if factor is None:
            if is_partitioned(x.partition[dim]):
                return _padded(plane, func, plane.replicate(x, [dim]), widths, source, short, beyond)
            layout[dim] = joined((Factor(size),))
            continue
        assert factor.mesh_dim is not None
        cuts = (size if end == factor.size else end and end + pads[0] for end in factor.bounds[1:-1])
        bounds = (0, *cuts, size)
        if not proper(bounds, size, empty=not proper(factor.bounds, factor.size)):
            return NotImplemented
        ends = next(filter(None, factor.bounds)), factor.size - max(end for end in factor.bounds if end < factor.size)
        layout[dim] = (Factor(size, factor.mesh_dim, bounds),)
        if beyond is None or min(pads) < 0 or any(end < pad + beyond for end, pad in zip(ends, pads, strict=True)):
            shared.append(at)
            local[2 * at : 2 * at + 2] = 0, 0
            continue
        position = plane.coordinates[factor.mesh_dim]
        start, stop = factor.bounds[position : position + 2]
        local[2 * at] *= start == 0 < stop
        local[2 * at + 1] *= start < stop == factor.size
    own = [x.partition[d] if x.ndim - 1 - d in shared else layout[d] for d in range(x.ndim)]
    padded = plane.blank(x.local, tuple(own))
    if padded is None:
        padded = func(x.local, local) if any(local) else x.local.clone()
    x = plane.wrap(padded, tuple(own))
    for at in shared:
        dim, before = x.ndim - 1 - at, widths[2 * at]
        length, (result,) = x.shape[dim], layout[dim]
        x = reindexed(plane, x, dim, result.size, lambda i, n=length, b=before: source(i - b, n), result)  # type: ignore[misc]
    return x


@rule(aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d)
def reflect(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pad with the rows inside of the border, mirrored."""

    def source(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    return _padded(plane, func, args[0], args[1], source, short=1, beyond=1)


@rule(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d)
def replicate(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pad with the rows at the border, repeated."""
    narrow = -max(0, *args[1])  # one row is enough, however wide the padding
    return _padded(plane, func, args[0], args[1], lambda i, n: min(max(i, 0), n - 1), beyond=narrow)


@rule(aten._pad_circular)
def circular(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pad with rows from the other end."""
    return _padded(plane, func, args[0], args[1], lambda i, n: i % n, short=0)


@rule(aten.flip)
def flip(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows in reverse order: ranks swap what they own."""
    x, dims = args
    for dim in {dim % x.ndim for dim in dims}:
        x = reindexed(plane, x, dim, x.shape[dim], lambda i, n=x.shape[dim]: n - 1 - i, sole(x.partition[dim]))  # type: ignore[misc]
    return x


@rule(aten.roll)
def roll(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows shifted, those beyond the end to the start."""
    if len(args) < 3:
        return NotImplemented
    x, shifts, dims = args
    for shift, dim in zip(shifts, dims, strict=True):
        at = dim % x.ndim
        x = reindexed(plane, x, at, x.shape[at], lambda i, s=shift, n=x.shape[at]: (i - s) % n, sole(x.partition[at]))  # type: ignore[misc]
    return x
