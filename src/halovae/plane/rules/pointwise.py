"""Operators that compute each value from the values at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane.layout import Dim, Layout, extent, is_partitioned, replicated, shape, whole
from halovae.plane.rules.registry import rule, written
from halovae.plane.tensor import PlaneTensor, channels_last, dense

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def common(layouts: Sequence[Layout], leader: int | None = None) -> Layout:
    """A layout of the broadcast of tensors, in which most of what is partitioned stays so.

    Args:
        layouts: the tensors'.
        leader: which of them keeps its layout.
    """
    ndim = max(map(len, layouts))
    aligned = [((),) * (ndim - len(layout)) + layout for layout in layouts]
    if leader is not None:
        return aligned[leader]
    used: set[str] = set()
    result: list[Dim] = []
    for dims in zip(*aligned, strict=True):
        best: Dim = max((dim for dim in dims), key=extent)
        for dim in dims:
            mesh_dims = {factor.mesh_dim for factor in dim if factor.mesh_dim is not None}
            if mesh_dims and not mesh_dims & used:
                best = dim
                break
        else:
            if is_partitioned(best):
                best = whole(extent(best))
        used |= {factor.mesh_dim for factor in best if factor.mesh_dim is not None}
        result.append(best)
    return tuple(result)


def aligned(plane: Plane, x: Tensor, layout: Layout) -> Tensor:
    """This rank's part of a tensor that is broadcast with one of this layout."""
    lifted = plane.lift(x)
    own = layout[len(layout) - lifted.ndim :]
    wanted = tuple(dim if extent(now) == extent(dim) else now for now, dim in zip(lifted.partition, own, strict=True))
    return lifted.local if wanted == lifted.partition else plane.to_layout(lifted, wanted).local


def _alike(args: tuple[Any, ...]) -> list[Any] | None:
    """The ranks' parts, where all tensors have the first one's layout: most calls. None for others."""
    partition, found = args[0].partition, []
    for one in args:
        if isinstance(one, PlaneTensor):
            if one.partition is not partition and one.partition != partition:
                return None
            found.append(one.local)
        elif isinstance(one, (Tensor, list, tuple)):
            return None
        else:
            found.append(one)
    return found


def pointwise(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any number of tensors of any layouts, broadcast."""
    if args and not kwargs and isinstance(args[0], PlaneTensor):
        alike = _alike(args)
        if alike is not None:
            result = func(*alike)
            return args[0] if written(func) else plane.wrap(result, args[0].partition, strides=strides_like(args[0]))
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, Tensor)]
    layouts = [one.partition if isinstance(one, PlaneTensor) else replicated(tuple(one.shape)) for one in tensors]
    in_place = bool(written(func))
    if in_place and not isinstance(args[0], PlaneTensor):
        return NotImplemented
    layout = layouts[0] if len(tensors) == 1 else common(layouts, 0 if in_place else None)
    locals_ = [aligned(plane, one, layout) if isinstance(one, Tensor) else one for one in flat]
    local_args, local_kwargs = torch.utils._pytree.tree_unflatten(locals_, spec)
    result = func(*local_args, **local_kwargs)
    if in_place:
        return args[0]
    sizes = shape(layout)
    leader = next((one for one in tensors if isinstance(one, PlaneTensor) and tuple(one.shape) == sizes), None)
    strides = None if leader is None else strides_like(leader)
    if isinstance(result, Tensor):
        return plane.wrap(result, layout, strides=strides)
    return type(result)(plane.wrap(one, layout, strides=strides) for one in result)


def strides_like(x: PlaneTensor, memory_format: torch.memory_format = torch.preserve_format) -> tuple[int, ...] | None:
    """The strides of a new tensor like another; None if it is contiguous."""
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        return channels_last(tuple(x.shape))
    return None if memory_format is torch.contiguous_format or x.is_contiguous() else dense(tuple(x.shape), x.stride())


@rule(
    aten.copy_, aten.fill_, aten.zero_, aten._to_copy, aten.clone, aten.native_dropout, aten.masked_fill_,
    aten.lerp_, aten.where, aten.nan_to_num,
)  # fmt: skip
def untagged(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pointwise operators that PyTorch does not tag as such."""
    if func is aten.where.default:
        return NotImplemented
    result = pointwise(plane, func, args, kwargs)
    wished = kwargs.get("memory_format")
    if wished is None or not isinstance(result, PlaneTensor):
        return result
    return plane.wrap(result.local, result.partition, strides=strides_like(args[0], wished))


@rule(aten.detach, aten.alias, aten.lift_fresh, aten.lift)
def same(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor itself."""
    x = args[0]
    return PlaneTensor(x.local, x.partition, plane, x.frozen, x.stride(), x.source)


@rule(aten._local_scalar_dense)
def item(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A number that every rank knows."""
    return plane.full(args[0].reshape(1))[0].item()
