"""Maps that the first strip computes for all strips."""

from __future__ import annotations

import torch
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.plane.context import current, position_in
from halovae.plane.layout import MeshDim


def hand(whole: Tensor, site: int) -> Tensor:
    """Keep a whole map for later strips, and return it.

    Args:
        whole: the map.
        site: which map it is, of those that a function hands over. A site may be passed once for each chunk.
    """
    # The rank goes on with its own: it may write to it, and its memory is used again.
    current().transport.hand(site, whole.clone())
    return whole


def handed(sizes: tuple[int, ...], dtype: torch.dtype, last: bool, site: int) -> Tensor:
    """Return the next map that the first strip handed over at a site.

    Args:
        sizes: the shape of the map.
        dtype: its dtype.
        last: whether it is channels last.
        site: as for `hand`.
    """
    own: Tensor = current().transport.handed(site, lambda: like_handed(sizes, dtype, last))
    device = current().device.torch_device
    return own.clone() if own.device == device or own.is_meta else own.to(device, non_blocking=True)


def like_handed(sizes: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    """Return a meta tensor like the result of `handed`."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats[len(sizes)] if last else torch.contiguous_format
    return torch.empty(sizes, dtype=dtype, device="meta", memory_format=layout)


def part(whole: Tensor, dim: int, mesh_dim: MeshDim, needed: tuple[tuple[tuple[int, int], ...], ...]) -> Tensor:
    """Return the rows or cols of a whole map that a rank needs, as a view.

    Args:
        whole: the map.
        dim: their dim.
        mesh_dim: the ranks.
        needed: one interval within the map for each rank.
    """
    return part_of(current(), whole, dim, mesh_dim, needed)


def part_of(
    mesh: Mesh, whole: Tensor, dim: int, mesh_dim: MeshDim, needed: tuple[tuple[tuple[int, int], ...], ...]
) -> Tensor:
    """Return the part that a mesh's rank needs; the other arguments are those of `part`."""
    ((start, stop),) = needed[position_in(mesh, mesh_dim)]
    return whole.narrow(dim, start, stop - start)
