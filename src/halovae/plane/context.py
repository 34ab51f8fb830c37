"""What operators use in this thread: the mesh of ranks, kernels, and memory for maps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.kernels.native import EAGER, Kernels
from halovae.kernels.pool import Pool
from halovae.plane.layout import MeshDim
from halovae.plane.tensor import is_channels_last

_current = threading.local()


@contextmanager
def on(mesh: Mesh, kernels: Kernels = EAGER, pool: Pool | None = None, kind: str = "meta") -> Iterator[None]:
    """Let this thread's operators reach the ranks of `mesh`.

    Args:
        mesh: the ranks.
        kernels: what passes over memory are made with, on the CPU.
        pool: where maps lie that these make; None for a new one.
        kind: of device whose way tensors without data take: "cpu", or "meta" for the way of no device.
    """
    before = dict(vars(_current))
    _current.mesh, _current.kernels, _current.pool, _current.kind = mesh, kernels, pool, kind
    try:
        yield
    finally:
        vars(_current).clear()
        vars(_current).update(before)


def current() -> Mesh:
    """The mesh that operators use in this thread."""
    mesh: Mesh = _current.mesh
    return mesh


def kind_of(x: Tensor) -> str:
    """The kind of device whose way a tensor takes."""
    kind: str = _current.kind if x.is_meta else x.device.type
    return kind


def current_kernels(x: Tensor) -> tuple[Kernels, Pool]:
    """The kernels and the buffer pool of this thread, for maps where `x` is; on meta they have no data."""
    if _current.pool is None or _current.pool.device != x.device:
        _current.pool = Pool(x.device)
    return _current.kernels, _current.pool


def empty_map(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Memory of this thread's buffer pool for a map of `sizes`, `[N, C, *]` with two or three dims, like `x`."""
    items, channels, *plane = sizes
    out = current_kernels(x)[1].empty((items, channels, *[1] * (3 - len(plane)), *plane), x.dtype)
    return out if len(plane) == 3 else out[:, :, 0]


def stride(mesh: Mesh, mesh_dim: MeshDim) -> int:
    """How far apart in rank the neighbors along a mesh dim are."""
    return mesh.grid.cols if mesh_dim == "rows" else 1


def position_in(mesh: Mesh, mesh_dim: MeshDim) -> int:
    """Where along a mesh dim this rank of a mesh is."""
    return mesh.row if mesh_dim == "rows" else mesh.col


def position(mesh_dim: MeshDim) -> int:
    """Where along a mesh dim this thread's rank is."""
    return position_in(current(), mesh_dim)


def empty_along(
    x: Tensor, dim: int, length: int, sizes: Sequence[int] | None = None, last: bool | None = None
) -> Tensor:
    """An empty tensor of another extent along `dim`, channels last where `x` or `last` is; of its or other sizes."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(x.ndim, torch.contiguous_format)
    sizes = x.shape if sizes is None else sizes
    shape = [*sizes[:dim], length, *sizes[dim + 1 :]]
    last = is_channels_last(x) if last is None else last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout if last else torch.contiguous_format)
