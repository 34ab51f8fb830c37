"""Concatenation."""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

import torch

from halovae.plane.layout import (
    Factor,
    Layout,
    extent,
    is_partitioned,
    joined,
    partitioned,
    ranges,
    replicated_dim,
    sole,
)
from halovae.plane.rules.pointwise import common
from halovae.plane.rules.registry import known, rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def _without(layout: Layout, dim: int) -> Layout:
    return (*layout[:dim], (), *layout[dim + 1 :])


@lru_cache(maxsize=4096)
def _side_by_side(layouts: tuple[Layout, ...], dim: int) -> Layout | None:
    """The layout of a concatenation along a replicated dim, if the other dims have equal layouts; else None."""
    first = layouts[0]
    if not first or any(len(one) != len(first) for one in layouts):
        return None
    dim %= len(first)
    if any(is_partitioned(one[dim]) or _without(one, dim) != _without(first, dim) for one in layouts):
        return None
    if any(extent(factors) == 0 for one in layouts for factors in one):
        return None
    return (*first[:dim], replicated_dim(sum(extent(one[dim]) for one in layouts)), *first[dim + 1 :])


@rule(aten.cat)
def cat(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replicated dims are joined on each rank; along a partitioned dim, each rank fetches its shard of the result."""
    tensors, dim = (*args, kwargs.get("dim", 0))[:2]
    if all(isinstance(one, PlaneTensor) for one in tensors) and len({one.dtype for one in tensors}) == 1:
        joint = _side_by_side(tuple([one.partition for one in tensors]), dim)
        if joint is not None:
            return plane.wrap(known(func).direct([one.local for one in tensors], dim % len(joint)), joint)
    ndim = max(one.ndim for one in tensors)
    pieces = [plane.lift(one) for one in tensors if one.ndim == ndim and one.numel()]
    dim %= ndim
    if len({one.dtype for one in pieces}) > 1:  # a rank may own cells of some pieces only
        dtype = reduce(torch.promote_types, [one.dtype for one in pieces])
        pieces = [plane.lift(one.to(dtype)) for one in pieces]
    if not pieces:
        return NotImplemented
    others = common([_without(one.partition, dim) for one in pieces], in_strips=plane.strips is not None)
    taken = {factor.mesh_dim for _, factor in partitioned(others)}
    sizes = [one.shape[dim] for one in pieces]
    total = sum(sizes)
    mesh_dims = {
        factor.mesh_dim for one in pieces for factor in one.partition[dim] if factor.mesh_dim is not None
    } - taken
    kept = []
    for one in pieces:
        factor = sole(one.partition[dim])
        entangled = is_partitioned(one.partition[dim]) and (factor is None or factor.mesh_dim not in mesh_dims)
        kept.append(plane.replicate(one, [dim]) if entangled else one)
    mesh_dim = next(iter(sorted(mesh_dims)), None)
    result = plane.factor(total, mesh_dim) if mesh_dim is not None and len(mesh_dims) == 1 else Factor(total)
    if result.mesh_dim is None:
        kept = [plane.replicate(one, [dim]) for one in kept]
    kept = [plane.to_layout(one, (*others[:dim], one.partition[dim], *others[dim + 1 :])) for one in kept]
    layout = (*others[:dim], joined((result,)), *others[dim + 1 :])
    if result.mesh_dim is None:
        return plane.wrap(func([one.local for one in kept], dim), layout)
    locals_, offset = [], 0
    position = plane.coordinates[result.mesh_dim]
    for one, size in zip(kept, sizes, strict=True):
        clipped = [(min(max(a - offset, 0), size), min(max(b - offset, 0), size)) for a, b in ranges(result.bounds)]
        needed = tuple((one,) for one in clipped)
        factor = sole(one.partition[dim])
        if factor is None:
            start, stop = needed[position][0]
            locals_.append(one.local.narrow(dim, start, stop - start))
        else:
            locals_.append(plane.fetch(one.local, dim, factor, needed))
        offset += size
    return plane.wrap(func([one for one in locals_ if one.shape[dim]], dim), layout)


@rule(aten.stack)
def stack(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Concatenation along a new dim."""
    tensors, dim = (*args, kwargs.get("dim", 0))[:2]
    return aten.cat.default([plane.lift(one).unsqueeze(dim) for one in tensors], dim % (tensors[0].ndim + 1))
