"""Ranks: a `DeviceMesh` over (batch, rows, cols), halo exchange along it, gathers, and errors that end every rank."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from halovae import platform
from halovae.geometry import Grid, Shard

Axis = Literal["rows", "cols"]


def world_size() -> int:
    """How many ranks there are: of the process group, else of the torchrun that started this process, else 1."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def join_world(device: torch.device) -> None:
    """Join the process group that torchrun's environment describes, unless this process is in one already."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group(platform.backend(device))


class Mesh:
    """This process's place on a grid of ranks, and its lines to the others.

    Making a mesh of several ranks is a collective call: all ranks make it, in the same order. A mesh serves one decode
    at a time in each thread; threads that decode at once each need a mesh of their own, made in one order on all ranks.

    Args:
        grid: the extents of the mesh; `grid.size` must equal the world's size, or be 1: each rank then stands alone.
        device: where the exchanged tensors live.

    Raises:
        ValueError: the grid does not match the world.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        world = world_size()
        if grid.size not in (1, world):
            raise ValueError(
                f"grid {grid} needs {grid.size} ranks, but the world has {world}: choose a grid of {world}, "
                f"such as {world}x1, or start {grid.size} ranks (torchrun --nproc-per-node {grid.size})"
            )
        self.grid = grid
        self.device = device
        if grid.size > 1:
            join_world(device)
        self.rank = dist.get_rank() if grid.size > 1 else 0
        self.item, self.row, self.col = grid.coordinates(self.rank)
        self._user: int | None = None
        if grid.size > 1:
            # Groups of its own, so that the messages of two meshes cannot meet: init_device_mesh would put an axis of
            # all ranks on the default group.
            ranks = torch.arange(grid.size).view(grid.batch, grid.rows, grid.cols)
            lines = [_group_of(ranks.movedim(dim, -1).flatten(0, 1)) for dim in range(3)]
            names = ("batch", "rows", "cols")
            self.axes = DeviceMesh.from_group(lines, device.type, mesh=ranks, mesh_dim_names=names)
            self._plane = _group_of(ranks.flatten(1))
            self._world = _group_of(ranks.view(1, -1))

    def neighbours(self, axis: Axis) -> tuple[int | None, int | None]:
        """The ranks before and after this one along `axis`; None at the border of the picture."""
        position, extent, step = (
            (self.row, self.grid.rows, self.grid.cols) if axis == "rows" else (self.col, self.grid.cols, 1)
        )
        before = self.rank - step if position > 0 else None
        after = self.rank + step if position < extent - 1 else None
        return before, after

    def extend(self, own: Tensor, axis: Axis, depth: int) -> Tensor:
        """Put the neighbours' `depth` nearest rows (or cols) around `own`; nothing is added at the picture's border.

        Args:
            own: `[B, C, T, H, W]`, at least `depth` rows (or cols) on every rank.
            axis: "rows" exchanges along H, "cols" along W.
            depth: how many rows (or cols) to send to and receive from each neighbour.

        Returns:
            `own` with its ghosts: H (or W) grows by `depth` for each neighbour.
        """
        dim = own.ndim - 2 if axis == "rows" else own.ndim - 1
        before, after = self.neighbours(axis)
        nearest = {before: own.narrow(dim, 0, depth), after: own.narrow(dim, own.shape[dim] - depth, depth)}
        group, operations = self.axes.get_group(axis), []
        ghosts: dict[int | None, Tensor] = {}
        for peer in (before, after):
            if peer is not None:
                ghosts[peer] = torch.empty_like(nearest[peer], memory_format=torch.contiguous_format)
                operations.append(dist.P2POp(dist.isend, nearest[peer].contiguous(), peer, group))
                operations.append(dist.P2POp(dist.irecv, ghosts[peer], peer, group))
        _exchange(operations)
        parts = [ghosts.get(before), own, ghosts.get(after)]
        return torch.cat([part for part in parts if part is not None], dim)

    def _collect(self, own: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
        """Every rank's flat `own`, whose lengths may differ, in the order of `group`'s ranks."""
        padded = own.new_empty(max(sizes))
        padded[: own.numel()] = own.flatten()
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded, group)
        return [flat[:size] for flat, size in zip(everyone, sizes, strict=True)]

    def gather_tokens(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """All tokens of the plane: the ranks' `own` `[N, tokens, C]` in turn; `counts` are their tokens."""
        if len(counts) == 1:
            return own
        items, _, channels = own.shape
        parts = self._collect(own, [items * count * channels for count in counts], self._plane)
        views = [part.view(items, count, channels) for part, count in zip(parts, counts, strict=True)]
        return torch.cat(views, dim=1)

    def gather_frames(self, own: Tensor, shards: Sequence[Shard], out: Tensor | None, everyone: bool) -> None:
        """Lay the frames of several ranks into the full picture.

        Args:
            own: this rank's frames `[B, C, T, H, W]`, contiguous.
            shards: every rank's shard at the scale of the frames.
            out: the full frames to fill; None on a rank that receives nothing.
            everyone: True fills `out` on every rank, False on rank 0 only.
        """
        channels, frames = own.shape[1:3]
        shapes = [shard.shape(channels, frames) for shard in shards]
        if everyone:
            parts = self._collect(own, [math.prod(shape) for shape in shapes], self._world)
            pictures = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        elif self.rank == 0:
            pictures = [own, *(own.new_empty(shape) for shape in shapes[1:])]
            others = enumerate(pictures[1:], start=1)
            _exchange([dist.P2POp(dist.irecv, picture, peer, self._world) for peer, picture in others])
        else:
            _exchange([dist.P2POp(dist.isend, own, 0, self._world)])
        if out is not None:
            for shard, picture in zip(shards, pictures, strict=True):
                out[shard.index] = picture

    def agree(self, request: str, error: Exception | None) -> None:
        """Make sure that all ranks are about to decode the same thing, and that none of them has refused.

        Args:
            request: what this rank is about to do.
            error: why this rank cannot; it is raised here, and named on the other ranks.

        Raises:
            RuntimeError: another rank refused, or means to decode something else.
        """
        if self.grid.size > 1:
            everyone: list[tuple[str, str]] = [("", "")] * self.grid.size
            reason = "" if error is None else f"{type(error).__name__}: {error}"
            dist.all_gather_object(everyone, (request, reason), self._world)
            refusals = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(everyone) if reason]
            if error is None and refusals:
                raise RuntimeError("this rank could decode, but others cannot; " + "; ".join(refusals))
            if error is None and len({wish for wish, _ in everyone}) > 1:
                wishes = "; ".join(f"rank {rank}: {wish}" for rank, (wish, _) in enumerate(everyone))
                raise RuntimeError(f"all ranks must ask for the same decode, but they differ: {wishes}")
        if error is not None:
            raise error

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the mesh for one chunk.

        Raises:
            RuntimeError: another thread holds it; their messages would mix.
        """
        me = threading.get_ident()
        if self.grid.size > 1 and self._user not in (None, me):
            raise RuntimeError(
                "two threads decode over one mesh at once, and their messages would mix: "
                "make a Mesh for each, in the same order on all ranks, and pass it as mesh="
            )
        self._user = me
        try:
            yield
        finally:
            self._user = None


def _group_of(lines: Tensor) -> dist.ProcessGroup:
    """The group of this rank's line, all lines `[lines, ranks]` being made into groups by all ranks at once."""
    group, _ = dist.new_subgroups_by_enumeration(lines.tolist())
    assert group is not None
    return group


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


_meshes: dict[tuple[Grid, torch.device, object], Mesh] = {}


def mesh_for(grid: Grid, device: torch.device) -> Mesh:
    """The mesh that decodes share when they name only a grid: made once per process, grid, device and process group.

    Raises:
        ValueError: the grid does not match the world.
    """
    key = (grid, device, dist.group.WORLD if dist.is_initialized() else None)
    if key not in _meshes:
        _meshes[key] = Mesh(grid, device)
    return _meshes[key]
