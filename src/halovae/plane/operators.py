"""Operators between ranks, which a traced graph has besides ATen's.

Each is a function of tensors and integers; `shape_of` knows their results. Ranks use the mesh of their thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.kernels import halves
from halovae.plane import backends
from halovae.plane.context import current, empty_along, position_in, stride
from halovae.plane.group_norms import (
    combined,
    gather,
    group_norm,
    normalized_groups,
    own_statistics,
    whole_group_norm,
)
from halovae.plane.layout import Bounds, MeshDim
from halovae.plane.tensor import is_channels_last
from halovae.plane.whole_maps import hand, handed, like_handed, part, part_of

Interval = tuple[int, int]
Place = Callable[[int, int], Tensor]
Needed = tuple[tuple[Interval, ...], ...]  # for each rank along a mesh dim: its intervals, in order

_LARGEST_HEAD = 256  # channels; the limit of flash attention


def fetch(x: Tensor, dim: int, mesh_dim: MeshDim, bounds: Bounds, needed: Needed) -> Tensor:
    """Move rows or cols between the ranks along one mesh dim, so that each has the intervals that it needs.

    Args:
        x: this rank's shard; `x.shape[dim]` is the extent that it owns.
        dim: the partitioned dim.
        mesh_dim: the ranks that take part.
        bounds: the ranges that ranks own.
        needed: the intervals that each rank needs, in order. Cells outside of `0:bounds[-1]` are zeros.

    Returns:
        The needed intervals side by side along `dim`.
    """
    wait, joined, _ = fetching(lambda start, length: x.narrow(dim, start, length), x, dim, mesh_dim, bounds, needed)
    wait()
    return joined()


def fetching(
    take: Callable[[int, int], Tensor], x: Tensor, dim: int, mesh_dim: MeshDim, bounds: Bounds, needed: Needed
) -> tuple[Callable[[], None], Callable[[], Tensor], Callable[[Place], None]]:
    """Start to fetch rows or cols. `take` returns a range of this rank's.

    Returns:
        Three functions. The first waits for the messages. After it, the second joins the needed intervals in new
        memory. The third, in place of the second, writes them to the memory that its argument returns for a first row
        (or col), counted over all intervals, and a number of rows within one interval.
    """
    mesh = current()
    position = position_in(mesh, mesh_dim)
    first = mesh.rank - position * stride(mesh, mesh_dim)
    own, mine = (bounds[position], bounds[position + 1]), needed[position]
    sends, receives, places = [], [], []
    sizes = list(take(0, 0).shape)
    for peer, intervals in enumerate(needed):
        if peer == position:
            continue
        rank = first + peer * stride(mesh, mesh_dim)
        pieces = [take(a - own[0], b - a) for a, b in _overlaps(intervals, own)]
        if pieces:
            sent = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
            # Ranks that share a process read the message later, when this rank may have written to its memory.
            if mesh.transport.shared_device:
                sent = sent.clone(memory_format=torch.contiguous_format)
            sends.append((rank, sent.contiguous().view(-1)))
        theirs = (bounds[peer], bounds[peer + 1])
        if length := sum(b - a for a, b in _overlaps(mine, theirs)):
            buffer = x.new_empty([*sizes[:dim], length, *sizes[dim + 1 :]])
            receives.append((rank, buffer.view(-1)))
            places.append((buffer, theirs))
    arrive = None
    if sends or receives:
        for _, sent in sends:
            mesh.traffic.sent(sent)
        with mesh.traffic.waiting.running():
            arrive = mesh.transport.start(mesh_dim, sends, receives)
        mesh.traffic.calls += 1

    def wait() -> None:
        if arrive is not None:
            with mesh.traffic.waiting.running():
                arrive()

    def fill(place: Place) -> None:
        begin = 0
        for a, b in mine:
            for first, length in ((a, min(b, 0) - a), (max(bounds[-1], a), b - max(bounds[-1], a))):
                if length > 0:
                    place(begin + first - a, length).zero_()
            start, stop = max(a, own[0]), min(b, own[1])
            if start < stop:
                place(begin + start - a, stop - start).copy_(take(start - own[0], stop - start))
            for buffer, (low, high) in places:
                start, stop = max(a, low), min(b, high)
                if start < stop:
                    offset = _offset(mine, (low, high), (a, b))
                    place(begin + start - a, stop - start).copy_(buffer.narrow(dim, offset, stop - start))
            begin += b - a

    def joined() -> Tensor:
        out = empty_along(x, dim, sum(b - a for a, b in mine), sizes)
        fill(lambda first, length: out.narrow(dim, first, length))
        return out

    return wait, joined, fill


# A dim along which a convolution's input is cut: the dim; mesh dim, bounds and needed intervals as for `fetch`; the
# width of the halos; and whether there are ranks before and after this one.
Cut = tuple[int, MeshDim, Bounds, Needed, int, bool, bool]
Halos = Sequence[tuple[int, Tensor, int]]  # for each dim: halos before and after, side by side; and their width


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    cuts: tuple[Cut, ...],
) -> Tensor:  # fmt: skip
    """Convolve with stride 1, keeping the input's extents: the whole shard while halos travel, then its edges again.

    The zero-padded shard gives correct results except for the rows and cols next to a cut. These are computed again
    from their neighborhoods once the halos have arrived. No copy of the whole map with its halos is made.

    Args:
        x: this rank's shard `[N, C, *]`.
        weight: `[C', C / groups, *]`.
        bias: `[C']`.
        padding: of each spatial dim.
        dilation: of each spatial dim.
        groups: of channels.
        cuts: the dims along which this rank needs halos. Every rank needs its own shard and its halos.

    Returns:
        This rank's shard of the result, `[N, C', *]` of the input's extents.
    """

    def convolved(region: Tensor, padding: list[int]) -> Tensor:
        return halves.convolved(region, weight, bias, padding, dilation, groups)

    position = {name: position_in(current(), name) for _, name, *_ in cuts}
    halos: list[tuple[int, Tensor, int]] = []
    out = None
    for dim, mesh_dim, bounds, needed, width, *_ in cuts:
        start, stop = needed[position[mesh_dim]][0]
        mine = ((start, start + width), (stop - width, stop))
        known = tuple(halos)

        def take(start: int, length: int, dim: int = dim, known: Halos = known) -> Tensor:
            inner = [(at, halo.narrow(dim, start, length), wide) for at, halo, wide in known]
            return _region(x.narrow(dim, start, length), inner, [(-w, x.shape[at] + w) for at, _, w in known])

        intervals = tuple(mine if at == position[mesh_dim] else one for at, one in enumerate(needed))
        wait, joined, _ = fetching(take, x, dim, mesh_dim, bounds, intervals)
        try:
            out = convolved(x, list(padding)) if out is None else out
        finally:
            wait()  # even after an error: the other ranks' messages are under way
        halos.append((dim, joined(), width))
    assert out is not None
    left = list(padding)
    for dim, *_ in cuts:
        left[dim - 2] = 0
    whole = [(-width, x.shape[dim] + width) for dim, _, width in halos]
    for index, (dim, _, _, _, width, before, after) in enumerate(cuts):
        extent = x.shape[dim]
        edges = ((before, 0, -width), (after, extent - width, extent - 2 * width))
        for _, place, start in (one for one in edges if one[0]):
            box = [*whole[:index], (start, start + 3 * width), *whole[index + 1 :]]
            out.narrow(dim, place, width).copy_(convolved(_region(x, halos, box), left))
    return out


def _region(x: Tensor, halos: Halos, box: Sequence[tuple[int, int]]) -> Tensor:
    """Return a region of a map with its halos.

    Args:
        x: the map.
        halos: of the first dim without corners; of a second dim with those of the first.
        box: for each dim of the halos, where the region begins and ends; 0 is the map's first cell.
    """
    if not halos:
        return x
    *inner, (dim, halo, width) = halos
    *others, (start, stop) = box
    extent = x.shape[dim]
    for (at, _, wide), (low, high) in zip(inner, others, strict=True):
        halo = halo.narrow(at, low + wide, high - low)
    pieces = [halo.narrow(dim, width + start, min(stop, 0) - start)] if start < 0 else []
    low, high = max(start, 0), min(stop, extent)
    if low < high or not pieces:
        narrowed = [(at, one.narrow(dim, low, high - low), wide) for at, one, wide in inner]
        pieces.append(_region(x.narrow(dim, low, high - low), narrowed, others))
    if stop > extent:
        first = max(start, extent)
        pieces.append(halo.narrow(dim, width + first - extent, stop - first))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def fetched_shape(
    mesh: Mesh, x: Tensor, dim: int, mesh_dim: MeshDim, bounds: Bounds, needed: Needed
) -> tuple[Tensor, int, int]:
    """Return an empty tensor like `fetch`'s result, and the numbers of messages and bytes that this rank sends."""
    position = position_in(mesh, mesh_dim)
    own = (bounds[position], bounds[position + 1])
    cell = x.element_size() * math.prod(extent for at, extent in enumerate(x.shape) if at != dim)
    lengths = [sum(b - a for a, b in _overlaps(intervals, own)) for intervals in needed]
    sent = [length * cell for peer, length in enumerate(lengths) if length and peer != position]
    return empty_along(x, dim, sum(b - a for a, b in needed[position])), len(sent), sum(sent)


def _convolved_shape(
    mesh: Mesh, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, dilation: Any, groups: int,
    cuts: tuple[Cut, ...],
) -> tuple[Tensor, int, int]:  # fmt: skip
    messages = sent = 0
    extended = x
    for dim, mesh_dim, bounds, needed, *_ in cuts:
        extended, more, size = fetched_shape(mesh, extended, dim, mesh_dim, bounds, needed)
        messages, sent = messages + more, sent + size
    last = is_channels_last(x) or is_channels_last(weight)
    return empty_along(x, 1, weight.shape[0], last=last), messages, sent


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None,
    grouped: bool,
) -> Tensor:  # fmt: skip
    """PyTorch's attention, recorded as one operator: the device chooses the kernel when it runs."""
    fused = backends.kernels(query.device.type)
    plain = mask is None and dropout == 0 and not causal and query.ndim >= 3
    plain = plain and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if fused is not None and plain and query.shape[-1] > _LARGEST_HEAD and query.dtype.itemsize == 2:
        shape = *query.shape[:-1], value.shape[-1]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return _heads_last(fused.attention(query, key, value, factor).view(shape))
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return _heads_last(result)


def _heads_last(x: Tensor) -> Tensor:
    """Lay the heads side by side in memory, as flash attention does, whichever kernel was used."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.ndim >= 3 else x


# A rank that does not use the result may still have to send data for it.
BETWEEN_RANKS = (fetch, convolution, gather, group_norm, hand, handed)
STATISTICS = (own_statistics, combined, normalized_groups)


def pack(*values: Tensor) -> list[Tensor]:
    """Pack the inputs of a called graph. It takes the values out, so that each is freed after its last use there."""
    return list(values)


def take(box: list[Any], index: int) -> Any:
    """Take one of the values out of the box."""
    value, box[index] = box[index], None
    return value


def emit(chunk: Tensor, start: int) -> None:
    """Mark a finished chunk of the result, and where it begins along the result's chunked dim."""


def shape_of(function: Callable[..., Tensor], args: tuple[Any, ...], mesh: Mesh) -> tuple[Tensor, int, int]:
    """Return an empty tensor like an operator's result, and the numbers of messages and bytes that this rank sends."""
    if function is handed:
        sizes, dtype, last, _ = args
        return like_handed(sizes, dtype, last), 0, 0
    x = args[0]
    if function is hand:
        return x.detach(), 0, 0
    if function is part:
        return part_of(mesh, *args), 0, 0
    if function is fetch:
        return fetched_shape(mesh, *args)
    if function is convolution:
        return _convolved_shape(mesh, *args)
    if function is attention:
        return _heads_last(x.new_empty((*x.shape[:-1], args[2].shape[-1]))), 0, 0
    if function in (whole_group_norm, normalized_groups):
        return empty_along(x, 1, x.shape[1]), 0, 0
    if function is own_statistics:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.empty((2, x.shape[0], args[1]), dtype=dtype, device="meta"), 0, 0
    if function is combined:
        return torch.empty(x.shape[1:], dtype=x.dtype, device="meta"), 0, 0
    if function is gather:
        ranks = args[2]
        return x.new_empty((ranks, *x.shape)), ranks - 1, (ranks - 1) * x.numel() * x.element_size()
    assert function is group_norm
    groups, counts = args[3], args[6]
    statistics = 2 * x.shape[0] * groups * max(4, x.element_size())
    return x.new_empty(x.shape), len(counts) - 1, (len(counts) - 1) * statistics


def _overlaps(intervals: Sequence[Interval], owned: Interval) -> list[Interval]:
    found = [(max(a, owned[0]), min(b, owned[1])) for a, b in intervals]
    return [(a, b) for a, b in found if a < b]


def _offset(intervals: Sequence[Interval], owned: Interval, until: Interval) -> int:
    """Where in a message the cells of the interval `until` begin."""
    return sum(b - a for a, b in _overlaps(intervals[: intervals.index(until)], owned))
