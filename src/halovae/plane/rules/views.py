"""Views: they regroup, order, cut or add dims. Data moves only if a cut does not match the ranks' bounds."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._mode_utils import no_dispatch

from halovae.plane.layout import (
    Dim,
    Factor,
    Layout,
    even,
    extent,
    is_partitioned,
    joined,
    proper,
    ranges,
    replicated_dim,
    sole,
)
from halovae.plane.operators import Needed
from halovae.plane.rules.registry import plain, rule
from halovae.plane.tensor import PlaneTensor, made, version

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


@lru_cache(maxsize=4096)
def _resolved(own: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    known = math.prod(size for size in sizes if size != -1)
    return tuple(size if size != -1 else math.prod(own) // max(known, 1) for size in sizes)


@rule(aten.view, aten.reshape, aten._unsafe_view, aten._reshape_alias)
def view(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Partitioned dims stay partitioned if the view leaves each rank's shard in one piece."""
    x, sizes = args[:2]
    if isinstance(sizes, torch.dtype) or x.numel() == 0:
        return NotImplemented
    own = x.shape
    sizes = _resolved(own, tuple(sizes))
    moved, layout = plane.viewed(x, sizes)
    local = moved.local.reshape(plane.local_sizes(layout))
    if func is aten._unsafe_view.default:
        return plane.wrap(local, layout)
    strides = viewed_strides(own, x.stride(), sizes)
    frozen, source = moved.frozen or x.frozen, x.source
    if moved is not x:
        source = source or version(x.local)
    if strides is None or local.untyped_storage()._cdata != moved.local.untyped_storage()._cdata:
        # Plain PyTorch would copy or raise an error, or only this rank's memory format needs a copy.
        frozen, source = frozen or "it had to be copied", source or version(x.local)
    return made(local, layout, plane, frozen, strides, source)


@lru_cache(maxsize=4096)
def viewed_strides(sizes: tuple[int, ...], strides: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a view in other sizes; None if it needs a copy."""
    with no_dispatch():
        try:
            return torch.empty_strided(sizes, strides, device="meta").view(target).stride()
        except RuntimeError:
            return None


def _view_of(
    x: PlaneTensor, local: torch.Tensor, layout: Layout, strides: tuple[int, ...], frozen: str = ""
) -> PlaneTensor:
    """Return a view of a tensor; `frozen` says why it is really a copy."""
    source = x.source or (version(x.local) if frozen else None)
    return made(local, layout, x.plane, x.frozen or frozen, strides, source)


def _ordered(x: PlaneTensor, order: tuple[int, ...]) -> Any:
    strides, layout = x.stride(), x.partition
    return _view_of(
        x, x.local.permute(order), tuple([layout[dim] for dim in order]), tuple([strides[dim] for dim in order])
    )


@rule(aten.permute)
def permute(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dims in another order."""
    x, order = args
    ndim = len(x.partition)
    return _ordered(x, tuple([dim % ndim for dim in order]))


@rule(aten.transpose)
def transpose(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two dims swapped."""
    x, first, second = args
    order = list(range(len(x.partition)))
    order[first], order[second] = order[second], order[first]
    return _ordered(x, tuple(order))


@rule(aten.t)
def t(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A matrix transposed."""
    return _ordered(args[0], tuple(range(args[0].ndim))[::-1])


@rule(aten.squeeze)
def squeeze(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dims of extent 1 dropped."""
    x, *rest = args
    sizes = x.shape
    dims = range(len(sizes)) if not rest else rest if isinstance(rest[0], int) else rest[0]
    return _squeezed(x, tuple([dim % len(sizes) for dim in dims if sizes[dim] == 1]))


def _squeezed(x: PlaneTensor, gone: tuple[int, ...]) -> PlaneTensor:
    strides, layout = x.stride(), x.partition
    kept = [dim for dim in range(len(layout)) if dim not in gone]
    return _view_of(
        x, x.local.squeeze(gone), tuple([layout[dim] for dim in kept]), tuple([strides[dim] for dim in kept])
    )


@rule(aten.unsqueeze)
def unsqueeze(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dim of extent 1 added."""
    x, dim = args
    own, layout = x.stride(), x.partition
    at = dim % (len(own) + 1)
    strides = (*own[:at], x.shape[at] * own[at] if at < len(own) else 1, *own[at:])
    return _view_of(x, x.local.unsqueeze(at), (*layout[:at], (), *layout[at:]), strides)


@rule(aten.squeeze_, aten.unsqueeze_, aten.transpose_, aten.t_)
def in_place(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views that replace the tensor itself."""
    x = args[0]
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    rules = {"squeeze": squeeze, "unsqueeze": unsqueeze, "transpose": transpose, "t": t}
    made = rules[name](plane, func, args, kwargs)
    x.local, x.partition, x.frozen, x.source = made.local, made.partition, made.frozen, made.source
    x.padded = None
    with no_dispatch():  # changes the sizes that the wrapper reports
        func(*args, **kwargs)
    return x


@rule(aten.expand)
def expand(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dims of extent 1 repeated."""
    x, sizes = args[:2]
    layout, strides = _expanded(x.partition, x.stride(), tuple(sizes))
    return _view_of(x, x.local.expand(plane.local_sizes(layout)), layout, strides)


@lru_cache(maxsize=4096)
def _expanded(layout: Layout, strides: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Layout, tuple[int, ...]]:
    """The layout and the strides of a tensor with dims of extent 1 repeated."""
    new = len(sizes) - len(layout)
    found: list[Dim] = []
    steps = []
    for index, size in enumerate(sizes):
        dim = layout[index - new] if index >= new else ()
        kept = size in (-1, extent(dim))
        found.append(dim if kept else replicated_dim(size))
        steps.append(strides[index - new] if kept and index >= new else 0)
    return tuple(found), tuple(steps)


class _Cut(NamedTuple):
    """A range of a dim.

    Attributes:
        dim: the dim.
        start: its first index.
        stop: the index before which it ends.
        step: from each index to the next.
        strides: strides of the result.
        layout: layout of the result.
        all: whether it is all of the dim.
        factor: the dim's partitioned factor; None if the dim is or must be replicated.
        needed: the intervals that each rank needs.
        free: whether each rank owns what it needs.
    """

    dim: int
    start: int
    stop: int
    step: int
    strides: tuple[int, ...]
    layout: Layout
    all: bool = False
    factor: Factor | None = None
    needed: Needed = ()
    free: bool = True


@lru_cache(maxsize=4096)
def _cut(layout: Layout, strides: tuple[int, ...], dim: int, start: Any, end: Any, step: int) -> _Cut:
    dim %= len(layout)
    size = extent(layout[dim])
    start, stop, step = slice(start, end, step).indices(size)
    length = max(0, -(-(stop - start) // step))
    if length == size:
        return _Cut(dim, 0, size, 1, strides, layout, True)
    strides = tuple(own * step if at == dim else own for at, own in enumerate(strides))
    factor = sole(layout[dim])
    if factor is None or length == 0:
        left = joined((Factor(length),)) if length else (Factor(0),)
        return _Cut(dim, start, stop, step, strides, (*layout[:dim], left, *layout[dim + 1 :]))
    assert factor.mesh_dim is not None
    ranks = len(factor.bounds) - 1
    bounds = (0, *(min(max(-(-(bound - start) // step), 0), length) for bound in factor.bounds[1:-1]), length)
    if length == 1 or not proper(bounds, length, empty=not proper(factor.bounds, factor.size)):
        bounds = even(length, ranks) if length >= ranks else ()
    result = Factor(length, factor.mesh_dim, bounds) if bounds else Factor(length)
    kept = list(ranges(bounds)) if bounds else [(0, length)] * ranks
    owned = ranges(factor.bounds)
    spans = [
        (start + a * step, start + (b - 1) * step + 1) if a < b else own[:1] * 2
        for (a, b), own in zip(kept, owned, strict=True)
    ]
    needed = tuple((span,) for span in spans)
    free = all(own[0] <= mine[0] and mine[1] <= own[1] for own, (mine,) in zip(owned, needed, strict=True))
    layout = (*layout[:dim], joined((result,)), *layout[dim + 1 :])
    return _Cut(dim, start, stop, step, strides, layout, False, factor, needed, free)


@rule(aten.slice)
def slice_(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A range of a dim: each rank keeps the cells that it owns, if every rank owns some."""
    x, dim, start, end, step = args if len(args) == 5 else (*args, *(0, None, None, 1)[len(args) - 1 :])
    return _sliced(plane, x, dim, start, end, step)


def _sliced(plane: Plane, x: PlaneTensor, dim: int, start: int | None, end: int | None, step: int = 1) -> PlaneTensor:
    cut = _cut(x.partition, x.stride(), dim, start, end, step)
    local, frozen = _shard(plane, x, cut)
    return _view_of(x, local, cut.layout, cut.strides, frozen)


def _shard(plane: Plane, x: PlaneTensor, cut: _Cut) -> tuple[torch.Tensor, str]:
    """Return this rank's shard of a range, and why it is a copy; an empty text if it is a view."""
    at, step = cut.dim, cut.step
    if cut.all:
        return x.local, ""
    if cut.factor is None:
        replicated = plane.replicate(x, (at,))
        local = replicated.local[(slice(None),) * at + (slice(cut.start, cut.stop, step),)]
        return local, "" if replicated is x else replicated.frozen
    local = plane.fetch(x.local, at, cut.factor, cut.needed)
    if step != 1:
        local = local[(slice(None),) * at + (slice(None, None, step),)]
    return local, "" if cut.free else "it was made of other ranks' data"


@rule(aten.select)
def select(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One index of a dim."""
    x, dim, index = args
    sizes = x.shape
    dim %= len(sizes)
    index %= sizes[dim]
    cut = _cut(x.partition, x.stride(), dim, index, index + 1, 1)
    local, frozen = _shard(plane, x, cut)
    layout, strides = cut.layout, cut.strides
    layout, strides = (*layout[:dim], *layout[dim + 1 :]), (*strides[:dim], *strides[dim + 1 :])
    return _view_of(x, local.squeeze((dim,)), layout, strides, frozen)


@rule(aten.split, aten.split_with_sizes)
def split(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dim cut into ranges."""
    x, sizes, *rest = args
    own = x.shape
    dim = (rest[0] if rest else kwargs.get("dim", 0)) % len(own)
    each = isinstance(sizes, int)
    starts = [*range(0, own[dim], max(sizes, 1)), own[dim]] if each else [0, *accumulate(sizes)]
    return [_sliced(plane, x, dim, a, b) for a, b in pairwise(starts)]


@rule(aten.unbind)
def unbind(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every index of a dim."""
    x, dim = (*args, 0)[:2]
    return [select(plane, func, (x, dim, index), {}) for index in range(x.shape[dim])]


@rule(aten.repeat)
def repeat(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies of the tensor side by side: the repetition is a factor before the dim's own."""
    x, times = args
    new = len(times) - x.ndim
    own = [x.partition[index - new] if index >= new else () for index in range(len(times))]
    if any(n == 0 and is_partitioned(dim) for n, dim in zip(times, own, strict=True)):
        return NotImplemented
    layout: Layout = tuple(joined((Factor(n), *dim)) if n else (Factor(0),) for n, dim in zip(times, own, strict=True))
    return plane.wrap(x.local.repeat(times), layout)


@rule(aten.repeat_interleave)
def repeat_interleave(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each index repeated a number of times."""
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
    x = plane.replicate(x, [at])
    layout = (*x.partition[:at], replicated_dim(index.numel()), *x.partition[at + 1 :])
    return plane.wrap(func(x.local, at, index), layout)


@rule(aten.embedding)
def embedding(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a replicated table."""
    table, index, *rest = args
    table = plain(table)
    if isinstance(table, PlaneTensor):
        return NotImplemented
    return plane.wrap(func(table, index.local, *rest, **kwargs), (*index.partition, replicated_dim(table.shape[1])))
