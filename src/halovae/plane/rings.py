"""Windows: maps with a ring of one cell around each frame: other ranks' halos, the map's own edges, or zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from halovae.plane import backends, context, operators
from halovae.plane.layout import ranges
from halovae.plane.operators import Cut

# How the ring is filled at the picture's edges, and which of these this rank has: left, right, top, bottom.
Edges = tuple[Literal["replicate", "reflect"], tuple[bool, bool, bool, bool]]


def window(x: Tensor, frames: int, before: int, after: int, cuts: Sequence[Cut], edges: Edges | None) -> Tensor:
    """Return memory for frames of a map with a ring, channels last. Cells that stay unwritten are zeros.

    Args:
        x: the map, `[N, C, T, H, W]` or `[N, C, H, W]`.
        frames: number of frames.
        before: number of zero frames among them, at the beginning.
        after: number of zero frames among them, at the end.
        cuts: the dims of `x` along which this rank needs halos.
        edges: how the ring is filled at the picture's edges; None for zeros.
    """
    _, pool = context.current_kernels(x)
    result = pool.empty((*x.shape[:2], frames, x.shape[-2] + 2, x.shape[-1] + 2), x.dtype)
    written = {dim - x.ndim for dim, *_ in cuts}
    for dim, first, last in ((-3, before, after), (-2, 1, 1), (-1, 1, 1)):
        if dim in written or (edges is not None and dim != -3):
            continue
        for start, length in ((0, first), (result.shape[dim] - last, last)):
            if length:
                result.narrow(dim, start, length).zero_()
    return result


def start(maps: Tensor, cuts: Sequence[Cut], edges: Edges | None) -> Callable[[], None]:
    """Start to fill the ring of a window, `[N, C, *, H + 2, W + 2]`.

    Returns:
        A function that waits for other ranks and fills the rest, once. Until then the first and the last row of the
        window are incomplete. If cols are cut, this function already waits, since no row would be complete.
    """
    rows, cols = maps.ndim - 2, maps.ndim - 1
    left, right, top, bottom = (False,) * 4 if edges is None else edges[1]
    sides = {rows: (top, bottom), cols: (left, right)}
    later: list[Callable[[], None]] = []
    known = list[int]()  # dims whose ring is filled: it travels with other dims' halos, as their corners

    def ring(dim: int) -> Tensor:
        (other,) = {rows, cols} - {dim}
        return maps if other in known else maps.narrow(other, 1, maps.shape[other] - 2)

    def repeat(dim: int) -> None:
        if edges is not None:
            _repeat_edges(ring(dim), dim, edges[0] == "reflect", *sides[dim])

    def finish() -> None:
        while later:
            later.pop(0)()

    for cut in cuts:
        finish()
        later += [
            exchange(*outermost(ring(cut[0]), cut[0]), cut),
            partial(repeat, cut[0]),
            partial(known.append, cut[0]),
        ]
    if any(dim == cols for dim, *_ in cuts):
        finish()
    for dim in {rows, cols} - {one for one, *_ in cuts}:
        repeat(dim)
        if later:
            later.append(partial(repeat, dim))  # the corners, once the other dim's halos have arrived
        known.append(dim)
    return finish


def outermost(ring: Tensor, dim: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a shard's first and last cells along a dim, which may coincide, and the places before and after them."""
    last = ring.shape[dim] - 1
    own, halos = (
        (ring.narrow(dim, 1, 1), ring.narrow(dim, last - 1, 1)),
        (ring.narrow(dim, 0, 1), ring.narrow(dim, last, 1)),
    )
    return own, halos


def exchange(own: tuple[Tensor, Tensor], halos: tuple[Tensor, Tensor], cut: Cut) -> Callable[[], None]:
    """Start to fetch the cells before and after this rank's shard along a dim.

    Args:
        own: this rank's first and last cells, which others need, `[N, C, *]`.
        halos: memory for the cells before and after them.
        cut: the dim.

    Returns:
        A function that waits for these cells and writes them to `halos`.
    """
    dim, mesh_dim, bounds, needed, width, *_ = cut
    if _is_packed(own, halos, cut):
        return _exchange_packed(own, halos, cut)
    position = context.position(mesh_dim)
    begin, end = needed[position][0]
    mine = ((begin, begin + width), (end - width, end))
    intervals = tuple(mine if at == position else one for at, one in enumerate(needed))

    def take(start: int, length: int) -> Tensor:
        return own[start > 0].narrow(dim, 0, length)

    wait, _, fill = operators.fetching(take, own[0], dim, mesh_dim, bounds, intervals)

    def finish() -> None:
        wait()
        fill(lambda first, _: halos[first])

    return finish


def _is_packed(own: tuple[Tensor, Tensor], halos: tuple[Tensor, Tensor], cut: Cut) -> bool:
    """Whether a kernel can pack both messages: then each comes from, and goes to, the next rank."""
    _, _, bounds, needed, width, *_ = cut
    if backends.kernels(own[0].device.type) is None or width != 1 or not backends.takes(own[0]):
        return False
    owned = ranges(bounds)
    plain = all(start < stop for start, stop in owned) and needed == tuple(((a - 1, b + 1),) for a, b in owned)
    return plain and own[0].stride() == own[1].stride() and halos[0].stride() == halos[1].stride()


def _exchange_packed(own: tuple[Tensor, Tensor], halos: tuple[Tensor, Tensor], cut: Cut) -> Callable[[], None]:
    """Exchange cells as `exchange` does: one kernel packs both messages, and one unpacks them or writes zeros."""
    mesh, (_, mesh_dim, bounds, *_) = context.current(), cut
    fused = backends.kernels(own[0].device.type)
    position, step = context.position(mesh_dim), context.stride(mesh, mesh_dim)
    there = position > 0, position < len(bounds) - 2
    peers = [(mesh.rank + way * step, side) for side, way in enumerate((-1, 1)) if there[side]]
    sent = fused.packed(*own)
    received = torch.empty_like(sent)
    for _, side in peers:
        mesh.traffic.sent(sent[side])
    with mesh.traffic.waiting.running():
        arrive = mesh.transport.start(
            mesh_dim,
            [(peer, sent[side].view(-1)) for peer, side in peers],
            [(peer, received[side].view(-1)) for peer, side in peers],
        )
    mesh.traffic.calls += 1

    def finish() -> None:
        with mesh.traffic.waiting.running():
            arrive()
        before, after = (received[side] if there[side] else None for side in (0, 1))
        fused.unpack((before, after), halos)

    return finish


def _repeat_edges(ring: Tensor, dim: int, mirrored: bool, before: bool, after: bool) -> None:
    last = ring.shape[dim] - 1
    for needed, target, source in ((before, 0, 1 + mirrored), (after, last, last - 1 - mirrored)):
        if needed:
            ring.narrow(dim, target, 1).copy_(ring.narrow(dim, source, 1))
