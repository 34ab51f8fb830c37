"""Views: they regroup, order, cut or add dims. Data moves only where a cut is not where the ranks' bounds are."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._mode_utils import no_dispatch

from halovae.plane.layout import (
    Factor,
    Layout,
    even,
    extent,
    is_partitioned,
    joined,
    local_shape,
    proper,
    ranges,
    sole,
    whole,
)
from halovae.plane.rules.registry import plain, rule
from halovae.plane.tensor import PlaneTensor, version

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def _resolved(x: torch.Tensor, sizes: Any) -> tuple[int, ...]:
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    return tuple(size if size != -1 else x.numel() // max(known, 1) for size in sizes)


@rule(aten.view, aten.reshape, aten._unsafe_view, aten._reshape_alias)
def view(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Partitioned dims stay so where the view leaves each rank's part in one piece."""
    x, sizes = args[:2]
    if isinstance(sizes, torch.dtype) or x.numel() == 0:
        return NotImplemented
    sizes = _resolved(x, sizes)
    moved, layout = plane.viewed(x, sizes)
    local = moved.local.reshape(local_shape(layout, plane.coordinates))
    if func is aten._unsafe_view.default:
        return plane.wrap(local, layout)
    strides = viewed_strides(tuple(x.shape), x.stride(), sizes)
    frozen, source = moved.frozen or x.frozen, x.source
    if moved is not x:
        source = source or version(x.local)
    if strides is None or local.untyped_storage()._cdata != moved.local.untyped_storage()._cdata:
        # Plain PyTorch would copy, or refuse; or it would not, but this rank's part lies in memory otherwise.
        frozen, source = frozen or "it had to be copied", source or version(x.local)
    return PlaneTensor(local, layout, plane, frozen, strides, source)


@lru_cache(maxsize=4096)
def viewed_strides(sizes: tuple[int, ...], strides: tuple[int, ...], wished: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a view in other sizes; None if it needs a copy."""
    with no_dispatch():
        try:
            return torch.empty_strided(sizes, strides, device="meta").view(wished).stride()
        except RuntimeError:
            return None


def _view_of(
    x: PlaneTensor, local: torch.Tensor, layout: Layout, strides: tuple[int, ...], frozen: str = ""
) -> PlaneTensor:
    """A view of a tensor; `frozen` says why it is a copy in truth."""
    source = x.source or (version(x.local) if frozen else None)
    return PlaneTensor(local, layout, x.plane, x.frozen or frozen, strides, source)


def _ordered(plane: Plane, x: PlaneTensor, order: list[int]) -> Any:
    strides = tuple(x.stride(dim) for dim in order)
    return _view_of(x, x.local.permute(order), tuple(x.partition[dim] for dim in order), strides)


@rule(aten.permute)
def permute(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dims in another order."""
    x, order = args
    return _ordered(plane, x, [dim % x.ndim for dim in order])


@rule(aten.transpose)
def transpose(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two dims swapped."""
    x, first, second = args
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return _ordered(plane, x, order)


@rule(aten.t)
def t(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A matrix transposed."""
    return _ordered(plane, args[0], list(range(args[0].ndim))[::-1])


@rule(aten.squeeze)
def squeeze(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dims of extent 1 dropped."""
    x, *rest = args
    dims = range(x.ndim) if not rest else [rest[0]] if isinstance(rest[0], int) else rest[0]
    gone = [dim % x.ndim for dim in dims if x.shape[dim] == 1]
    kept = [dim for dim in range(x.ndim) if dim not in gone]
    strides = tuple(x.stride(dim) for dim in kept)
    return _view_of(x, x.local.squeeze(gone), tuple(x.partition[dim] for dim in kept), strides)


@rule(aten.unsqueeze)
def unsqueeze(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dim of extent 1 added."""
    x, dim = args
    at = dim % (x.ndim + 1)
    own = x.stride()
    strides = (*own[:at], x.shape[at] * own[at] if at < x.ndim else 1, *own[at:])
    return _view_of(x, x.local.unsqueeze(at), (*x.partition[:at], (), *x.partition[at:]), strides)


@rule(aten.squeeze_, aten.unsqueeze_, aten.transpose_, aten.t_)
def in_place(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views that replace the tensor itself."""
    x = args[0]
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    rules = {"squeeze": squeeze, "unsqueeze": unsqueeze, "transpose": transpose, "t": t}
    made = rules[name](plane, func, args, kwargs)
    x.local, x.partition, x.frozen, x.source = made.local, made.partition, made.frozen, made.source
    with no_dispatch():  # changes the sizes that the wrapper reports
        func(*args, **kwargs)
    return x


@rule(aten.expand)
def expand(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dims of extent 1 repeated."""
    x, sizes = args[:2]
    new = len(sizes) - x.ndim
    layout: list[Any] = []
    strides = []
    for index, size in enumerate(sizes):
        dim = x.partition[index - new] if index >= new else ()
        kept = size in (-1, extent(dim))
        layout.append(dim if kept else whole(size))
        strides.append(x.stride(index - new) if kept and index >= new else 0)
    return _view_of(x, x.local.expand(plane.local_sizes(tuple(layout))), tuple(layout), tuple(strides))


@rule(aten.slice)
def slice_(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A range of a dim: each rank keeps what it owns of it, if it owns any."""
    x, dim, start, end, step = tuple([*args, *[0, None, None, 1][len(args) - 1 :]])
    dim, size = dim % x.ndim, x.shape[dim]
    start, stop, step = slice(start, end, step).indices(size)
    length = max(0, -(-(stop - start) // step))
    strides = tuple(own * step if at == dim else own for at, own in enumerate(x.stride()))
    if length == size:
        return _view_of(x, x.local, x.partition, x.stride())
    layout = list(x.partition)
    factor = sole(x.partition[dim])
    if factor is None or length == 0:
        whole_x = plane.to_whole(x, [dim])
        layout[dim] = joined((Factor(length),)) if length else (Factor(0),)
        local = whole_x.local[(slice(None),) * dim + (slice(start, stop, step),)]
        return _view_of(x, local, tuple(layout), strides, "" if whole_x is x else whole_x.frozen)
    assert factor.mesh_dim is not None
    ranks = len(factor.bounds) - 1
    bounds = (0, *(min(max(-(-(bound - start) // step), 0), length) for bound in factor.bounds[1:-1]), length)
    if not proper(bounds, length):
        bounds = even(length, ranks) if length >= ranks else ()
    result = Factor(length, factor.mesh_dim, bounds) if bounds else Factor(length)
    owned = ranges(factor.bounds)
    parts = list(ranges(bounds)) if bounds else [(0, length)] * ranks
    wanted = tuple(((start + a * step, start + (b - 1) * step + 1),) for a, b in parts)
    free = all(own[0] <= mine[0] and mine[1] <= own[1] for own, (mine,) in zip(owned, wanted, strict=True))
    local = plane.fetch(x.local, dim, factor, wanted)
    if step != 1:
        local = local[(slice(None),) * dim + (slice(None, None, step),)]
    layout[dim] = joined((result,))
    return _view_of(x, local, tuple(layout), strides, "" if free else "it was made of other ranks' data")


@rule(aten.select)
def select(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One index of a dim."""
    x, dim, index = args
    dim = dim % x.ndim
    index = index % x.shape[dim]
    return slice_(plane, func, (x, dim, index, index + 1), {}).squeeze(dim)


@rule(aten.split, aten.split_with_sizes)
def split(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dim cut into ranges."""
    x, sizes, *rest = args
    dim = (rest[0] if rest else kwargs.get("dim", 0)) % x.ndim
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[dim] - at) for at in range(0, x.shape[dim], sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [slice_(plane, func, (x, dim, a, a + size), {}) for a, size in zip(starts, sizes, strict=True)]


@rule(aten.unbind)
def unbind(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every index of a dim."""
    x, dim = (*args, 0)[:2]
    return [select(plane, func, (x, dim, index), {}) for index in range(x.shape[dim])]


@rule(aten.repeat)
def repeat(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor put side by side: the repetition is a factor before the dim's own."""
    x, times = args
    new = len(times) - x.ndim
    own = [x.partition[index - new] if index >= new else () for index in range(len(times))]
    if any(n == 0 and is_partitioned(dim) for n, dim in zip(times, own, strict=True)):
        return NotImplemented
    layout: Layout = tuple(joined((Factor(n), *dim)) if n else (Factor(0),) for n, dim in zip(times, own, strict=True))
    return plane.wrap(x.local.repeat(times), layout)


@rule(aten.repeat_interleave)
def repeat_interleave(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each index repeated by a number."""
    x, times, dim = (*args, kwargs.get("dim"))[:3]
    if not isinstance(times, int) or dim is None or times < 1:
        return NotImplemented
    at = dim % x.ndim
    layout = (*x.partition[:at], joined((*x.partition[at], Factor(times))), *x.partition[at + 1 :])
    return plane.wrap(x.local.repeat_interleave(times, at), layout)


@rule(aten.index_select)
def index_select(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Indices of a dim."""
    x, dim, index = args
    index = plain(index)
    if isinstance(index, PlaneTensor) or not isinstance(x, PlaneTensor):
        return NotImplemented
    at = dim % x.ndim
    x = plane.to_whole(x, [at])
    layout = (*x.partition[:at], whole(index.numel()), *x.partition[at + 1 :])
    return plane.wrap(func(x.local, at, index), layout)


@rule(aten.embedding)
def embedding(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a table that every rank has."""
    table, index, *rest = args
    table = plain(table)
    if isinstance(table, PlaneTensor):
        return NotImplemented
    return plane.wrap(func(table, index.local, *rest, **kwargs), (*index.partition, whole(table.shape[1])))
