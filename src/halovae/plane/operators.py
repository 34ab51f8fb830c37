"""What a rank does with other ranks: the operators that a traced graph has besides ATen's.

Each is a plain function of tensors and integers, with a twin that tells the result's shape. Ranks reach each other
through the mesh that is current in their thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.lines import Scope
from halovae.mesh import Mesh
from halovae.plane.layout import Bounds, MeshDim
from halovae.plane.tensor import is_channels_last

Interval = tuple[int, int]
Wanted = tuple[tuple[Interval, ...], ...]  # by rank along a mesh dim: intervals, one after the other

_current = threading.local()


@contextmanager
def on(mesh: Mesh) -> Iterator[None]:
    """Let this thread's operators reach the ranks of `mesh`."""
    before = getattr(_current, "mesh", None)
    _current.mesh = mesh
    try:
        yield
    finally:
        _current.mesh = before


def current() -> Mesh:
    """The mesh that operators use in this thread."""
    mesh: Mesh = _current.mesh
    return mesh


def fetch(x: Tensor, dim: int, mesh_dim: MeshDim, bounds: Bounds, wanted: Wanted) -> Tensor:
    """Move rows or cols between the ranks along one mesh dim, so that each has the intervals that it wants.

    Args:
        x: this rank's part; `x.shape[dim]` is what it owns.
        dim: the partitioned dim.
        mesh_dim: the ranks that take part.
        bounds: who owns what.
        wanted: for each rank the intervals that it wants, in order. What lies outside of `0:bounds[-1]` is zeros.

    Returns:
        The wanted intervals side by side along `dim`.
    """
    mesh = current()
    position = _position(mesh, mesh_dim)
    first = mesh.rank - position * _stride(mesh, mesh_dim)
    own, mine = (bounds[position], bounds[position + 1]), wanted[position]
    sends, receives, places = [], [], []
    for peer, intervals in enumerate(wanted):
        if peer == position:
            continue
        rank = first + peer * _stride(mesh, mesh_dim)
        pieces = [x.narrow(dim, a - own[0], b - a) for a, b in _overlaps(intervals, own)]
        if pieces:
            sent = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
            # Ranks that share a process read what is sent later, when this one may have written to it.
            sent = sent.clone(memory_format=torch.contiguous_format) if mesh.lines.shared_device else sent.contiguous()
            sends.append((rank, sent.view(-1)))
        theirs = (bounds[peer], bounds[peer + 1])
        if length := sum(b - a for a, b in _overlaps(mine, theirs)):
            buffer = x.new_empty([*x.shape[:dim], length, *x.shape[dim + 1 :]])
            receives.append((rank, buffer.view(-1)))
            places.append((buffer, theirs))
    if sends or receives:
        for _, sent in sends:
            mesh.traffic.sent(sent)
        mesh.traffic.calls += 1
        with mesh.traffic.waiting.running():
            mesh.lines.exchange(mesh_dim, sends, receives)
    out = _empty_along(x, dim, sum(b - a for a, b in mine))
    begin = 0
    for a, b in mine:
        _zero(out, dim, begin, min(b, 0) - a)
        _zero(out, dim, begin + max(bounds[-1], a) - a, b - max(bounds[-1], a))
        for source, (low, high) in ((x, own), *places):
            start, stop = max(a, low), min(b, high)
            if start < stop:
                offset = start - low if source is x else _offset(mine, (low, high), (a, b)) + start - max(a, low)
                out.narrow(dim, begin + start - a, stop - start).copy_(source.narrow(dim, offset, stop - start))
        begin += b - a
    return out


def fetched_shape(
    mesh: Mesh, x: Tensor, dim: int, mesh_dim: MeshDim, bounds: Bounds, wanted: Wanted
) -> tuple[Tensor, int, int]:
    """What `fetch` returns, without data, and the messages and bytes that this rank sends."""
    position = _position(mesh, mesh_dim)
    own = (bounds[position], bounds[position + 1])
    cell = x.element_size() * math.prod(extent for at, extent in enumerate(x.shape) if at != dim)
    lengths = [sum(b - a for a, b in _overlaps(intervals, own)) for intervals in wanted]
    sent = [length * cell for peer, length in enumerate(lengths) if length and peer != position]
    return _empty_along(x, dim, sum(b - a for a, b in wanted[position])), len(sent), sum(sent)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None,
    grouped: bool,
) -> Tensor:  # fmt: skip
    """PyTorch's attention, recorded as one operator: which kernel serves it is for the device to choose."""
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return _heads_last(result)


def _heads_last(x: Tensor) -> Tensor:
    """Heads side by side in memory, as flash attention leaves them, whatever kernel was used."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.ndim >= 3 else x


def whole_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's GroupNorm, for a map of which this rank has all that is normalized together."""
    return F.group_norm(x, groups, weight, bias, eps)


def gather(x: Tensor, scope: Scope, ranks: int) -> Tensor:
    """Every rank's small tensor, `[ranks, *x.shape]`, in the order of the ranks of a scope."""
    mesh, own = current(), x.contiguous().view(-1)
    mesh.traffic.sent(own, times=ranks - 1)
    mesh.traffic.calls += 1
    with mesh.traffic.waiting.running():
        everyone = mesh.lines.all_gather(scope, own, ranks)
    return torch.stack(everyone).view(ranks, *x.shape)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scope: Scope,
    counts: tuple[int, ...],
) -> Tensor:
    """GroupNorm of a partitioned map: each rank's mean and squared deviation are combined (Chan et al. 1983).

    Args:
        x: this rank's part `[N, C, *]`.
        weight: `[C]`.
        bias: `[C]`.
        groups: that share statistics.
        eps: added to the variance.
        scope: the ranks that have parts: "rows", "cols" or "plane".
        counts: values of one group that each of these ranks has.
    """
    items, channels = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    variance, mean = _moments(x, groups, wide)
    everyone = gather(torch.stack((mean, variance)), scope, len(counts))
    means, variances = everyone.unbind(1)
    count = torch.tensor(counts, dtype=wide, device=x.device).view(-1, 1, 1)
    total = float(sum(counts))
    mean = (count * means).sum(0) / total
    variance = (count * (variances + (means - mean).square())).sum(0) / total
    mean, variance = (one.repeat_interleave(channels // groups, 1).flatten() for one in (mean, variance))
    weight, bias = (None if one is None else one.to(wide).repeat(items) for one in (weight, bias))
    return F.batch_norm(x.reshape(1, items * channels, *x.shape[2:]), mean, variance, weight, bias, eps=eps).view(
        x.shape
    )


BETWEEN_RANKS = (fetch, gather, group_norm)  # a rank that wants nothing of the result may have to send for it


def pack(*values: Tensor) -> list[Tensor]:
    """What a called graph gets. It takes the values out, so that each is freed after its last use there."""
    return list(values)


def take(box: list[Any], index: int) -> Any:
    """One of the values, which is then no longer in the box."""
    value, box[index] = box[index], None
    return value


def emit(chunk: Tensor, start: int) -> None:
    """Marks a finished chunk of the result, and where along the result's chunked dim it begins."""


def shape_of(function: Callable[..., Tensor], args: tuple[Any, ...], mesh: Mesh) -> tuple[Tensor, int, int]:
    """What an operator returns, without data, and the messages and bytes that this rank sends."""
    x = args[0]
    if function is fetch:
        return fetched_shape(mesh, *args)
    if function is attention:
        return _heads_last(x.new_empty((*x.shape[:-1], args[2].shape[-1]))), 0, 0
    if function is whole_group_norm:
        return _empty_along(x, 1, x.shape[1]), 0, 0
    if function is gather:
        ranks = args[2]
        return x.new_empty((ranks, *x.shape)), ranks - 1, (ranks - 1) * x.numel() * x.element_size()
    assert function is group_norm
    groups, counts = args[3], args[6]
    statistics = 2 * x.shape[0] * groups * max(4, x.element_size())
    return x.new_empty(x.shape), len(counts) - 1, (len(counts) - 1) * statistics


def _moments(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Variance and mean `[N, groups]`."""
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    if x.dtype == dtype:
        return _variance_and_mean(grouped)
    found = [_variance_and_mean(one.to(dtype)) for one in grouped.split(1, 1)]  # no wide copy of it all
    variances, means = zip(*found, strict=True)
    return torch.cat(variances, 1), torch.cat(means, 1)


def _variance_and_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean over the last dim, in two passes on the CPU.

    `torch.var_mean` of `[1, 32, 32768]` takes 6.9 ms there (one thread, torch 2.13), two passes 0.5 ms.
    """
    if x.device.type != "cpu":
        return torch.var_mean(x, -1, correction=0)
    mean = x.mean(-1)
    return (x - mean.unsqueeze(-1)).square_().mean(-1), mean


def _stride(mesh: Mesh, mesh_dim: MeshDim) -> int:
    return mesh.grid.cols if mesh_dim == "rows" else 1


def _position(mesh: Mesh, mesh_dim: MeshDim) -> int:
    return mesh.row if mesh_dim == "rows" else mesh.col


def _overlaps(intervals: Sequence[Interval], owned: Interval) -> list[Interval]:
    found = [(max(a, owned[0]), min(b, owned[1])) for a, b in intervals]
    return [(a, b) for a, b in found if a < b]


def _offset(intervals: Sequence[Interval], owned: Interval, until: Interval) -> int:
    """Where in a message the part of the interval `until` begins."""
    return sum(b - a for a, b in _overlaps(intervals[: intervals.index(until)], owned))


def _empty_along(x: Tensor, dim: int, length: int) -> Tensor:
    """An empty tensor like `x`, channels last where it is, with another extent along `dim`."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(x.ndim, torch.contiguous_format)
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
    last = layout if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)


def _zero(out: Tensor, dim: int, start: int, length: int) -> None:
    if length > 0:
        out.narrow(dim, start, length).zero_()
