"""Operators that compute each value from the values at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane.layout import Dim, Layout, extent, is_partitioned, replicated, replicated_dim, shape
from halovae.plane.rules.registry import known, rule
from halovae.plane.tensor import PlaneTensor, channels_last, made, strides_of_new

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def common(layouts: Sequence[Layout], leader: int | None = None, in_strips: bool = False) -> Layout:
    """Return a layout of the broadcast of tensors, in which most partitioned dims stay partitioned.

    Args:
        layouts: the tensors' layouts.
        leader: index of a tensor that keeps its layout; None for none.
        in_strips: whether ranks run one after the other.
    """
    ndim = max(map(len, layouts))
    aligned = [((),) * (ndim - len(layout)) + layout for layout in layouts]
    if leader is not None:
        return aligned[leader]
    used: set[str] = set()
    result: list[Dim] = []
    for dims in zip(*aligned, strict=True):
        best: Dim = max((dim for dim in dims), key=extent)
        # Of strips the one that has come least far: the others' rows before it are known, those after it are not yet.
        for dim in sorted(dims, key=_reached) if in_strips else dims:
            mesh_dims = {factor.mesh_dim for factor in dim if factor.mesh_dim is not None}
            if mesh_dims and not mesh_dims & used:
                best = dim
                break
        else:
            if is_partitioned(best):
                best = replicated_dim(extent(best))
        used |= {factor.mesh_dim for factor in best if factor.mesh_dim is not None}
        result.append(best)
    return tuple(result)


def _reached(dim: Dim) -> tuple[int, ...]:
    return next((factor.bounds for factor in dim if factor.mesh_dim is not None), ())


def aligned(plane: Plane, x: Tensor, layout: Layout) -> Tensor:
    """Return this rank's shard of a tensor that is broadcast with one of this layout."""
    lifted = plane.lift(x)
    needed = _needed(lifted.partition, layout)
    return lifted.local if needed == lifted.partition else plane.to_layout(lifted, needed).local


@lru_cache(maxsize=4096)
def _needed(now: Layout, layout: Layout) -> Layout:
    """The layout that a tensor needs to be broadcast with one of another layout."""
    own = layout[len(layout) - len(now) :]
    return tuple(dim if extent(before) == extent(dim) else before for before, dim in zip(now, own, strict=True))


@lru_cache(maxsize=4096)
def _shared(layouts: tuple[Layout, ...], leader: int | None, in_strips: bool) -> tuple[Layout, bool]:
    """A layout of the broadcast of tensors, and whether no tensor has to move for it."""
    layout = layouts[0] if len(layouts) == 1 else common(layouts, leader, in_strips)
    return layout, all(_needed(one, layout) == one for one in layouts)


def _same_layout_locals(partition: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """Return the arguments with shards in place of tensors, if all have this layout, as in most calls; else None."""
    for one in kwargs.values():
        if isinstance(one, (Tensor, list, tuple)):
            return None
    found = []
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


def pointwise(
    plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
    memory_format: torch.memory_format = torch.preserve_format,
) -> Any:  # fmt: skip
    """Compute on any number of tensors in any layouts, which are broadcast."""
    first = args[0] if args else None
    if isinstance(first, PlaneTensor):
        local_args = _same_layout_locals(first.partition, args, kwargs)
        if local_args is not None:
            details = known(func)
            result = details.direct(*local_args, **kwargs)
            if details.writes:
                return first
            if isinstance(result, Tensor):
                return made(result, first.partition, plane, strides=strides_like(first, memory_format))
            return type(result)(plane.wrap(one, first.partition, strides=strides_like(first)) for one in result)
    nested = any(isinstance(one, (list, tuple)) for one in (*args, *kwargs.values()))
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs)) if nested else ([*args, *kwargs.values()], None)
    tensors = [one for one in flat if isinstance(one, Tensor)]
    layouts = tuple(
        [one.partition if isinstance(one, PlaneTensor) else replicated(tuple(one.shape)) for one in tensors]
    )
    details = known(func)
    in_place = details.writes
    if in_place and not isinstance(first, PlaneTensor):
        return NotImplemented
    layout, in_position = _shared(layouts, 0 if in_place else None, plane.strips is not None)
    if in_position:
        locals_ = [one.local if isinstance(one, PlaneTensor) else one for one in flat]
    else:
        locals_ = [aligned(plane, one, layout) if isinstance(one, Tensor) else one for one in flat]
    if spec is None:
        call = details.direct if isinstance(first, Tensor) else func
        result = call(*locals_[: len(args)], **dict(zip(kwargs, locals_[len(args) :], strict=True)))
    else:
        local_args, local_kwargs = torch.utils._pytree.tree_unflatten(locals_, spec)
        result = func(*local_args, **local_kwargs)
    if in_place:
        return first
    leader = next((one for one in tensors if isinstance(one, PlaneTensor) and one.shape == shape(layout)), None)
    strides = None if leader is None else strides_like(leader, memory_format)
    if isinstance(result, Tensor):
        return made(result, layout, plane, strides=strides)
    return type(result)(plane.wrap(one, layout, strides=strides) for one in result)


def strides_like(x: PlaneTensor, memory_format: torch.memory_format = torch.preserve_format) -> tuple[int, ...] | None:
    """The strides of a new tensor like `x`; None if it is contiguous."""
    if memory_format is torch.preserve_format:
        return strides_of_new(x.shape, x.stride())
    return None if memory_format is torch.contiguous_format else channels_last(x.shape)


@rule(
    aten.copy_, aten.fill_, aten.zero_, aten._to_copy, aten.clone, aten.native_dropout, aten.masked_fill_,
    aten.lerp_, aten.where, aten.nan_to_num,
)  # fmt: skip
def untagged(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pointwise operators without PyTorch's tag for them."""
    if func is aten.where.default:
        return NotImplemented
    return pointwise(plane, func, args, kwargs, kwargs.get("memory_format") or torch.preserve_format)


@rule(aten.detach, aten.alias, aten.lift_fresh, aten.lift)
def same(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor itself."""
    x = args[0]
    return made(x.local, x.partition, plane, x.frozen, x.stride(), x.source)


@rule(aten._local_scalar_dense)
def item(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A number that every rank knows."""
    return plane.full(args[0].reshape(1))[0].item()
