"""Matrix products. Rows, cols or items stay partitioned; a partitioned sum is added up over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane.layout import Dim, is_partitioned, replicated_dim
from halovae.plane.rules.pointwise import aligned
from halovae.plane.rules.registry import plain, rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def _mesh_dims(*dims: Dim) -> set[Any]:
    return {factor.mesh_dim for dim in dims for factor in dim if factor.mesh_dim is not None}


def arranged(plane: Plane, a: PlaneTensor, b: PlaneTensor) -> tuple[PlaneTensor, PlaneTensor]:
    """Return `a` `[*, M, K]` and `b` `[*, K, N]` in layouts in which each mesh dim partitions one of their indices.

    M takes precedence over N: matrices with many rows are mostly maps, and those with many cols weights or keys. A sum
    over K stays partitioned if both have the same cut, or if `a` is replicated: cutting it is free, and only sums move.
    """
    batch = range(a.ndim - 2)
    for dim in batch:
        if a.partition[dim] != b.partition[dim]:
            if is_partitioned(a.partition[dim]) and not _mesh_dims(a.partition[dim]) & _mesh_dims(*b.partition):
                b = plane.to_layout(b, (*b.partition[:dim], a.partition[dim], *b.partition[dim + 1 :]))
            else:
                a = plane.replicate(a, [dim])
                b = plane.replicate(b, [dim])
    items, rows, inner = _mesh_dims(*(a.partition[dim] for dim in batch)), a.ndim - 2, a.ndim - 1
    if a.partition[inner] != b.partition[rows]:
        mine, theirs = _mesh_dims(a.partition[inner]), _mesh_dims(b.partition[rows])
        small = a.shape[rows] * b.shape[-1] < b.shape[rows] * b.shape[-1]
        if theirs and not mine and small and not theirs & (_mesh_dims(a.partition[rows]) | items):
            a = plane.to_layout(a, (*a.partition[:inner], b.partition[rows]))
        else:
            a, b = plane.replicate(a, [inner]), plane.replicate(b, [rows])
    if _mesh_dims(b.partition[-1]) & (_mesh_dims(*a.partition)):
        b = plane.replicate(b, [b.ndim - 1])
    return a, b


def product(plane: Plane, func: Any, a: PlaneTensor, b: PlaneTensor) -> PlaneTensor:
    """`a @ b` by `func`, `mm` or `bmm`."""
    a, b = arranged(plane, a, b)
    result = func(a.local, b.local)
    if sums := _mesh_dims(a.partition[-1]):
        wide = torch.promote_types(result.dtype, torch.float32)
        result = plane.gather(result, sums).sum(0, dtype=wide).to(result.dtype)
    return plane.wrap(result, (*a.partition[:-1], b.partition[-1]))


@rule(aten.mm, aten.bmm)
def mm(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product, or one for each item of a batch."""
    return product(plane, func, plane.lift(args[0]), plane.lift(args[1]))


@rule(aten.addmm, aten.baddbmm)
def addmm(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product plus a tensor."""
    added, a, b = args
    a, b = arranged(plane, plane.lift(a), plane.lift(b))
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    layout = (*a.partition[:-1], b.partition[-1])
    if _mesh_dims(a.partition[-1]):
        result = product(plane, aten.mm.default if a.ndim == 2 else aten.bmm.default, a, b)
        result = result * alpha if alpha != 1 else result
        return result + (added * beta if beta != 1 else added) if beta != 0 else result
    if beta == 0:  # `added` is not read: it may hold any values
        result = aten.mm.default(a.local, b.local) if a.ndim == 2 else aten.bmm.default(a.local, b.local)
        return plane.wrap(result * alpha if alpha != 1 else result, layout)
    return plane.wrap(func(aligned(plane, added, layout), a.local, b.local, **kwargs), layout)


@rule(aten.linear)
def linear(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product with replicated weights."""
    x, weight, *bias = args
    weight, bias = plain(weight), [plain(one) for one in bias]
    if any(isinstance(one, PlaneTensor) for one in (weight, *bias)) or not isinstance(x, PlaneTensor):
        return NotImplemented
    x = plane.replicate(x, [x.ndim - 1])
    local: Tensor = func(x.local, weight, *bias)
    size = weight.shape[0]
    return plane.wrap(local, (*x.partition[:-1], replicated_dim(size)) if weight.ndim == 2 else x.partition[:-1])


@rule(aten._cdist_forward, aten._euclidean_dist)
def cdist(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Distances between rows, arranged like the matrices of a product."""
    a, b, *rest = args
    a, b = plane.lift(a), plane.lift(b)
    turned = plane.lift(plane.replicate(b, [b.ndim - 1]).transpose(-1, -2))
    a, turned = arranged(plane, plane.replicate(a, [a.ndim - 1]), turned)
    local = func(a.local, turned.local.transpose(-1, -2), *rest)
    return plane.wrap(local, (*a.partition[:-1], turned.partition[-1]))
