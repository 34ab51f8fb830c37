"""Operators that reduce dims, or that work along a dim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane.layout import Layout, is_partitioned, local_extent, replicated_dim
from halovae.plane.rules.registry import known, rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten
Combine = Callable[[Tensor], Tensor]


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    position = _position(func, name)
    return args[position] if position is not None and position < len(args) else default


@cache
def _position(func: Any, name: str) -> int | None:
    """Where an argument is in an operator's schema."""
    return next((at for at, argument in enumerate(func._schema.arguments) if argument.name == name), None)


def _dims(x: Tensor, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, Sequence) and len(dims) == 0):
        return list(range(x.ndim))
    ndim = x.ndim
    return sorted({dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)})


def reduced_layout(layout: Layout, dims: Sequence[int], keep: bool) -> Layout:
    """The layout once these dims are reduced."""
    return _reduced(layout, tuple(dims), keep)


@lru_cache(maxsize=4096)
def _reduced(layout: Layout, dims: tuple[int, ...], keep: bool) -> Layout:
    return tuple(() if dim in dims else factors for dim, factors in enumerate(layout) if keep or dim not in dims)


def over_ranks(plane: Plane, x: PlaneTensor, dims: Sequence[int], local: Tensor, combine: Combine) -> Tensor:
    """Combine what ranks reduced their shards to: `[ranks, ...]`, in the same order on all ranks."""
    mesh_dims = {factor.mesh_dim for dim in dims for factor in x.partition[dim] if factor.mesh_dim is not None}
    return combine(plane.gather(local, mesh_dims)) if mesh_dims else local


def _wide(x: Tensor, asked: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a sum, and the dtype to accumulate in."""
    result = asked or (x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64)
    return result, torch.promote_types(result, torch.float32) if result.is_floating_point else result


@rule(aten.sum, aten.mean)
def total(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank sums its shard; the ranks' sums are added in fp32 at least."""
    x = args[0]
    dims = _dims(x, _argument(func, args, kwargs, "dim", None))
    keep = _argument(func, args, kwargs, "keepdim", False)
    layout = reduced_layout(x.partition, dims, keep)
    if not any(is_partitioned(x.partition[dim]) for dim in dims):
        return plane.wrap(known(func).direct(x.local, *args[1:], **kwargs), layout)
    result, wide = _wide(x, kwargs.get("dtype"))
    local = aten.sum.dim_IntList(x.local, dims, keep, dtype=wide)
    combined = over_ranks(plane, x, dims, local, lambda sums: sums.sum(0))
    if func._schema.name == "aten::mean":
        combined = combined / math.prod(x.shape[dim] for dim in dims)
    return plane.wrap(combined.to(result), layout)


@rule(aten.amax, aten.amin, aten.max.default, aten.min.default, aten.all, aten.any)
def extreme(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank reduces its shard; then the ranks' results are reduced."""
    x = args[0]
    dims = _dims(x, _argument(func, args, kwargs, "dim", None))
    layout = reduced_layout(x.partition, dims, _argument(func, args, kwargs, "keepdim", False))
    name = func._schema.name.removeprefix("aten::")
    again: Any = {"max": torch.amax, "amax": torch.amax, "min": torch.amin, "amin": torch.amin}.get(name)
    again = again or {"all": torch.all, "any": torch.any}[name]
    local = func(x.local, *args[1:], **kwargs)
    return plane.wrap(over_ranks(plane, x, dims, local, lambda results: again(results, 0)), layout)


@rule(aten.linalg_vector_norm)
def vector_norm(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms of any order over replicated dims; of order 2 over partitioned dims."""
    x = args[0]
    dims = _dims(x, _argument(func, args, kwargs, "dim", None))
    layout = reduced_layout(x.partition, dims, _argument(func, args, kwargs, "keepdim", False))
    if not any(is_partitioned(x.partition[dim]) for dim in dims):
        return plane.wrap(func(x.local, *args[1:], **kwargs), layout)
    if _argument(func, args, kwargs, "ord", 2) != 2:
        return NotImplemented
    result, wide = _wide(x, kwargs.get("dtype"))
    keep = _argument(func, args, kwargs, "keepdim", False)
    local = aten.linalg_vector_norm(x.local, 2, dims, keep, dtype=wide)
    combined = over_ranks(plane, x, dims, local, lambda norms: norms.square().sum(0).sqrt())
    return plane.wrap(combined.to(result), layout)


@rule(aten.var, aten.std, aten.var_mean, aten.std_mean)
def variance(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ranks' means and squared deviations are combined (Chan et al. 1983)."""
    x = args[0]
    if func._overloadname != "correction":
        return NotImplemented
    dims = _dims(x, _argument(func, args, kwargs, "dim", None))
    keep = _argument(func, args, kwargs, "keepdim", False)
    layout, name = reduced_layout(x.partition, dims, keep), func._schema.name.removeprefix("aten::")
    if not any(is_partitioned(x.partition[dim]) for dim in dims):
        found = func(x.local, *args[1:], **kwargs)
        return (
            tuple(plane.wrap(one, layout) for one in found) if isinstance(found, tuple) else plane.wrap(found, layout)
        )
    correction = _argument(func, args, kwargs, "correction", None)
    mesh_dims = {factor.mesh_dim for dim in dims for factor in x.partition[dim] if factor.mesh_dim is not None}
    _, wide = _wide(x, None)
    result, mean = torch.var_mean(x.local.to(wide), dims, correction=0, keepdim=keep)
    means, variances = plane.gather(torch.stack((mean, result)), mesh_dims).unbind(1)
    counts = [
        math.prod(local_extent(x.partition[dim], {**plane.coordinates, **place}) for dim in dims)
        for place in plane.places(mesh_dims)
    ]
    count = torch.tensor(counts, dtype=wide, device=x.device).view(-1, *[1] * mean.ndim)
    mean = (count * means).sum(0) / sum(counts)
    squares = (count * (variances + (means - mean).square())).sum(0)
    result = squares / max(0, sum(counts) - (1 if correction is None else correction))
    result = result.sqrt() if name.startswith("std") else result
    first = plane.wrap(result.to(x.dtype), layout)
    return (first, plane.wrap(mean.to(x.dtype), layout)) if name.endswith("mean") else first


@rule(
    aten._softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.sort, aten.topk, aten.argmax, aten.argmin,
    aten.max.dim, aten.min.dim, aten.logsumexp, aten.glu, aten.argsort, aten.prod.dim_int, aten.logcumsumexp,
)  # fmt: skip
def along(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operators along a dim, which is replicated."""
    x = args[0]
    dims = _argument(func, args, kwargs, "dim", -1)
    if dims is None or not x.ndim:
        return NotImplemented
    dims = _dims(x, dims)
    x = plane.replicate(x, dims)
    found = func(x.local, *args[1:], **kwargs)
    results = []
    for one in found if isinstance(found, tuple) else (found,):
        if one.ndim < x.ndim:
            layout = reduced_layout(x.partition, dims, False)
        else:
            layout = tuple(
                replicated_dim(one.shape[dim]) if dim in dims else factors for dim, factors in enumerate(x.partition)
            )
        results.append(plane.wrap(one, layout))
    return (
        type(found)(results) if isinstance(found, list) else tuple(results) if isinstance(found, tuple) else results[0]
    )
