"""Thread-local context of operators: the mesh of ranks, kernels, and memory for maps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.kernels.native import EAGER, Kernels
from halovae.kernels.pool import BufferPool
from halovae.plane.layout import MeshDim
from halovae.plane.tensor import is_channels_last

_current = threading.local()


@contextmanager
def on(mesh: Mesh, kernels: Kernels = EAGER, pool: BufferPool | None = None, kind: str = "meta") -> Iterator[None]:
    """Make this thread's operators use the ranks of `mesh`.

    Args:
        mesh: the ranks.
        kernels: the kernels that operators use on the CPU.
        pool: the buffer pool for their maps; None for a new one.
        kind: the kind of device whose code path meta tensors take: "cpu", or "meta" for none.
    """
    before = dict(vars(_current))
    _current.mesh, _current.kernels, _current.pool, _current.kind = mesh, kernels, pool, kind
    try:
        yield
    finally:
        vars(_current).clear()
        vars(_current).update(before)


@contextmanager
def without_gradients() -> Iterator[None]:
    """Compute without gradients, and outside of inference mode: tensors made in it cannot be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def current() -> Mesh:
    """The mesh that operators use in this thread."""
    mesh: Mesh = _current.mesh
    return mesh


def kind_of(x: Tensor) -> str:
    """The kind of device whose code path a tensor takes."""
    kind: str = _current.kind if x.is_meta else x.device.type
    return kind


def current_kernels(x: Tensor) -> tuple[Kernels, BufferPool]:
    """Return this thread's kernels and its buffer pool on the device of `x`; on meta, buffers have no data."""
    if _current.pool is None or _current.pool.device != x.device:
        _current.pool = BufferPool(x.device)
    return _current.kernels, _current.pool


def empty_map(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a buffer of this thread's pool for a map like `x`: `sizes` is `[N, C, *]`, with 2 or 3 spatial dims."""
    items, channels, *plane = sizes
    out = current_kernels(x)[1].empty((items, channels, *[1] * (3 - len(plane)), *plane), x.dtype)
    return out if len(plane) == 3 else out[:, :, 0]


def stride(mesh: Mesh, mesh_dim: MeshDim) -> int:
    """The distance in rank between neighbors along a mesh dim."""
    return mesh.grid.cols if mesh_dim == "rows" else 1


def position_in(mesh: Mesh, mesh_dim: MeshDim) -> int:
    """The position of a mesh's own rank along a mesh dim."""
    return mesh.row if mesh_dim == "rows" else mesh.col


def position(mesh_dim: MeshDim) -> int:
    """The position of this thread's rank along a mesh dim."""
    return position_in(current(), mesh_dim)


def empty_along(
    x: Tensor, dim: int, length: int, sizes: Sequence[int] | None = None, last: bool | None = None
) -> Tensor:
    """Return an empty tensor like `x`, with `length` along `dim` and other extents by `sizes` (None for those of `x`).

    It is channels-last if `last` is set, or, with None, if `x` is.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(x.ndim, torch.contiguous_format)
    sizes = x.shape if sizes is None else sizes
    shape = [*sizes[:dim], length, *sizes[dim + 1 :]]
    last = is_channels_last(x) if last is None else last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout if last else torch.contiguous_format)
