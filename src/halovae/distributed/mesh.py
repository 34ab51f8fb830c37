"""This process's place among the ranks: gathers, and errors that end every rank."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from halovae.device.kinds import Device, Stopwatch
from halovae.distributed.transport import (
    ProcessGroupTransport,
    Scope,
    SharedGroupTransport,
    Transport,
    Value,
    world_size,
)
from halovae.grid import Grid, Shard


class Traffic:
    """Counts what a rank sends, and how long it waits for other ranks.

    Attributes:
        messages: how many messages it sent; a gather counts as one to each other rank.
        bytes: their size in bytes.
        calls: how many exchanges and gathers it took part in.
        waiting: the time spent waiting for halos, and for other ranks' keys and values.
    """

    def __init__(self, device: Device) -> None:
        self.messages = self.bytes = self.calls = 0
        self.waiting = Stopwatch(device)

    def sent(self, tensor: Tensor, times: int = 1) -> None:
        self.messages += times
        self.bytes += times * tensor.numel() * tensor.element_size()


class Mesh:
    """This process's place on a grid of ranks, and how it reaches the others.

    Making a mesh of several ranks is a collective call: all ranks make it, in the same order. A mesh serves one decode
    at a time in each thread; threads that decode at once each need a mesh of their own, made in one order on all ranks.

    Args:
        grid: the extents of the mesh; without `transport`, `grid.size` must equal the number of ranks, or be 1: each
            rank then computes by itself.
        device: where the exchanged tensors live.
        transport: how the ranks reach each other, which may be more than the grid has; None for the processes of this
            world, or for none at all where the grid has one rank.

    Raises:
        ValueError: the grid does not match the world.
    """

    def __init__(self, grid: Grid, device: torch.device, transport: Transport | None = None) -> None:
        world = world_size()
        if transport is None and grid.size not in (1, world):
            raise ValueError(
                f"grid {grid} needs {grid.size} ranks, but the world has {world}: choose a grid of {world}, "
                f"such as {world}x1, or start {grid.size} ranks (torchrun --nproc-per-node {grid.size})"
            )
        self.grid = grid
        self.device = Device(device)
        self.traffic = Traffic(self.device)
        self.transport = transport or (ProcessGroupTransport(grid, device) if grid.size > 1 else Transport())
        self.rank = self.transport.rank
        self.item, self.row, self.col = grid.coordinates(self.rank)
        self._user: int | None = None

    def _exchange(self, scope: Scope, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> None:
        if not (sends or receives):
            return
        for _, tensor in sends:
            self.traffic.sent(tensor)
        self.transport.exchange(scope, sends, receives)
        self.traffic.calls += 1

    def _collect(self, own: Tensor, sizes: Sequence[int], scope: Scope) -> list[Tensor]:
        """Gather every rank's flat `own`, in the order of the scope's ranks. Lengths may differ."""
        padded = own.new_empty(max(sizes))
        padded[: own.numel()] = own.flatten()
        self.traffic.sent(padded, len(sizes) - 1)
        everyone = self.transport.all_gather(scope, padded, len(sizes))
        self.traffic.calls += 1
        return [flat[:size] for flat, size in zip(everyone, sizes, strict=True)]

    def gather_frames(self, own: Tensor, shards: Sequence[Shard], out: Tensor | None, everyone: bool) -> None:
        """Assemble the frames of all ranks. Collective.

        Args:
            own: this rank's frames `[B, C, T, H, W]`, contiguous.
            shards: the shards of the grid's ranks at the scale of the frames.
            out: where to write the full frames; None on a rank that receives nothing.
            everyone: True fills `out` on every rank, False on rank 0 only.
        """
        channels, frames = own.shape[1:3]
        shapes = [shard.shape(channels, frames) for shard in shards]
        if everyone:
            sizes = [math.prod(shape) for shape in shapes]
            shards_of_all = self._collect(own, sizes + [0] * (self.transport.world - len(sizes)), "world")
            pictures = [one.view(shape) for one, shape in zip(shards_of_all, shapes, strict=False)]
        elif self.rank == 0:
            pictures = [own, *(own.new_empty(shape) for shape in shapes[1:])]
            receives = [(peer, picture.flatten()) for peer, picture in enumerate(pictures[1:], start=1)]
            self._exchange("world", [], receives)
        else:
            self._exchange("world", [(0, own.flatten())], [])
        if out is not None:
            for shard, picture in zip(shards, pictures, strict=True):
                out[shard.index] = picture

    def agree(self, request: str, error: Exception | None, offer: Value) -> list[Value]:
        """Check that all ranks are about to do the same, and that none of them refuses. Collective.

        Args:
            request: what this rank is about to do.
            error: why this rank refuses, or None. It is raised here, and named on the other ranks.
            offer: a value that the other ranks need.

        Returns:
            Every rank's offer, in the order of the ranks.

        Raises:
            RuntimeError: another rank refused, or its request differs.
        """
        reason = "" if error is None else f"{type(error).__name__}: {error}"
        everyone = self.transport.all_values((request, reason, offer))
        if error is not None:
            raise error
        refusals = [f"rank {rank}: {reason}" for rank, (_, reason, _) in enumerate(everyone) if reason]
        if refusals:
            raise RuntimeError("this rank could go on, but others cannot; " + "; ".join(refusals))
        if len({asked for asked, _, _ in everyone}) > 1:
            requests = "; ".join(f"rank {rank}: {asked}" for rank, (asked, _, _) in enumerate(everyone))
            raise RuntimeError(f"all ranks must ask for the same, but they differ: {requests}")
        return [offered for _, _, offered in everyone]

    @contextmanager
    def in_use(self, traffic: Traffic) -> Iterator[None]:
        """Reserve the mesh for this thread during one chunk, and count what it sends in `traffic`.

        Raises:
            RuntimeError: another thread uses the mesh; their messages would mix.
        """
        me = threading.get_ident()
        if self.grid.size > 1 and self._user not in (None, me):
            raise RuntimeError(
                "two threads decode over one mesh at once, and their messages would mix: "
                "make a Mesh for each, in the same order on all ranks, and pass it as mesh=; or a process group each"
            )
        self._user, self.traffic = me, traffic
        try:
            yield
        finally:
            self._user = None


_meshes: dict[tuple[Any, ...], Mesh] = {}
_caller_meshes: OrderedDict[tuple[Any, ...], Mesh] = OrderedDict()  # over groups of callers
_MAX_CALLER_MESHES = 32  # that are kept; making one again sends no messages


def mesh_for(grid: Grid, device: torch.device, group: dist.ProcessGroup | None = None) -> Mesh:
    """Return the mesh that calls share when they name only a grid: made once per grid, device, and process group.

    Args:
        grid: its extents.
        device: where the exchanged tensors live.
        group: the ranks; None for all of the world, over groups of halovae's own.

    Raises:
        ValueError: the grid does not match the number of ranks, or this rank is not in the group.
    """
    if group is not None:
        if grid.size not in (1, world_size(group)):
            raise ValueError(f"grid {grid} needs {grid.size} ranks, but the group has {world_size(group)}")
        return _over_group(grid, device, group, dist.get_process_group_ranks(group))
    key = (grid, device, dist.group.WORLD if dist.is_initialized() else None)
    if key not in _meshes:
        _meshes[key] = Mesh(grid, device)
    return _meshes[key]


def mesh_over(mesh: Mesh | DeviceMesh | None, device: torch.device) -> Mesh | None:
    """Return the mesh over a `DeviceMesh` with dims out of "batch", "rows", and "cols", in that order.

    Args:
        mesh: its ranks may be some of the world's. One of several dims must be, or be a slice of, a mesh of the whole
            world; if it leaves out ranks, torch flattens it first, for which all ranks of the world must call. A `Mesh`
            is returned as it is, and so is None.
        device: where the exchanged tensors live.

    Raises:
        ValueError: other names of dims, this rank is not in it, or its root mesh leaves out ranks of the world.
        TypeError: it is something else.
    """
    if mesh is None or isinstance(mesh, Mesh):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh or a halovae.Mesh, got {type(mesh).__name__}")
    names, known = mesh.mesh_dim_names, ("batch", "rows", "cols")
    if names is None or list(names) != [name for name in known if name in names]:
        raise ValueError(f"mesh: its dims are {names}, expected names out of {known}, in this order")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh: rank {dist.get_rank()} is not in {mesh.mesh.tolist()}, but calls")
    grid = Grid(**dict(zip(names, mesh.mesh.shape, strict=True)))
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == dist.get_world_size():
        assert dist.group.WORLD is not None
        group = dist.group.WORLD
    elif mesh.ndim == 1:
        group = mesh.get_group()
    elif _root_of(mesh).size() == dist.get_world_size():
        group = mesh._flatten().get_group()  # torch keeps what it flattened
    else:
        raise ValueError(
            f"mesh: {mesh.mesh.tolist()} is no slice of a mesh of the whole world; give group=, made of its ranks by "
            f"torch.distributed.new_group on all ranks, and grid={grid}"
        )
    return _over_group(grid, device, group, ranks)


def _root_of(mesh: DeviceMesh) -> DeviceMesh:
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch 2.8

    return _mesh_resources.get_root_mesh(mesh)


def _over_group(grid: Grid, device: torch.device, group: dist.ProcessGroup, ranks: list[int]) -> Mesh:
    key = (grid, device, group, tuple(ranks))
    if key not in _caller_meshes:
        _caller_meshes[key] = Mesh(
            grid, device, SharedGroupTransport(grid, device, group, ranks) if grid.size > 1 else Transport()
        )
        while len(_caller_meshes) > _MAX_CALLER_MESHES:
            _caller_meshes.popitem(last=False)
    _caller_meshes.move_to_end(key)
    return _caller_meshes[key]


def leave_world() -> None:
    """Leave the process group, if this process is in one, and drop the meshes over it.

    Process groups that a mesh still held would be destroyed by the interpreter at exit, when its threads may be gone.
    """
    _meshes.clear()
    _caller_meshes.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
