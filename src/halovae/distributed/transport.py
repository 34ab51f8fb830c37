"""How messages travel between the ranks of a grid. The mesh knows what to send; a transport knows how."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from halovae.device.kinds import INTERFACES, Device
from halovae.grid import Grid

Scope = Literal["rows", "cols", "plane", "world"]
Value = TypeVar("Value")


def world_size() -> int:
    """How many ranks there are: of the process group, else of the torchrun that started this process, else 1."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


_meeting_file: Path | None = None


def meet_in_file(file: Path) -> None:
    """Let `join_world` meet the other ranks in `file`, on loopback; for a rank that this package started.

    Args:
        file: in a folder that only this user can enter. The ranks make it.
    """
    global _meeting_file
    _meeting_file = file
    for variable in INTERFACES.values():  # meant for worlds of several hosts
        os.environ.pop(variable, None)


def join_world(device: torch.device) -> None:
    """Join the world's process group, unless this process is in one already.

    Ranks that this package started meet in a file, others as torchrun's environment says.

    Raises:
        ValueError: the ranks span hosts, and the environment does not name the network interface to use.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    own = Device(device)
    own.enter()
    own.choose_interfaces()
    if _meeting_file is None:
        dist.init_process_group(own.backend)
    else:
        rank, world = int(os.environ["RANK"]), world_size()
        store = dist.FileStore(str(_meeting_file), world)  # type: ignore[attr-defined]
        store.set_timeout(default_pg_timeout)
        dist.init_process_group(own.backend, store=store, rank=rank, world_size=world)


@dataclass(frozen=True)
class Link:
    """What lies between two ranks.

    The defaults are of the order of NVLink and HCCS within one host: messages over NCCL or HCCL take tens of
    microseconds to begin with, whatever their size.

    Attributes:
        latency: seconds from a message's start to its first byte's arrival.
        per_byte: seconds for each byte: the inverse of the bandwidth each way.
    """

    latency: float = 20e-6
    per_byte: float = 1 / 100e9

    def seconds(self, size: float, messages: float = 1) -> float:
        """How long messages of `size` bytes together take, one after the other."""
        return self.latency * messages + self.per_byte * size


class Transport:
    """The transport of a world of one rank, and the interface of all others.

    A scope names who takes part: the ranks along one mesh dim, those that share this rank's latents ("plane"), or all.
    """

    rank = 0
    world = 1
    # Whether other ranks use this process and its device as well, so that what the device counts is everybody's.
    shared_device = False

    def exchange(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send tensors to ranks and fill others with what ranks send; all of them flat and contiguous.

        On an accelerator the tensors are ready for what is queued next on the current stream.
        """
        self.start(scope, sends, receives)()

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Start an exchange, and return what waits for its end. What is sent must stay as it is until then."""
        assert not sends
        assert not receives
        return lambda: None

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        """Every rank's flat `own`, all of one length, in the order of the scope's `ranks` ranks."""
        assert ranks == 1
        return [own]

    def all_values(self, value: Value) -> list[Value]:
        """Every rank's `value`, picklable, in the order of the ranks."""
        return [value]

    def anyone(self, fact: bool) -> bool:
        """Whether it is a fact on any rank."""
        return fact


class ProcessGroupTransport(Transport):
    """A transport between processes: a `DeviceMesh` over (batch, rows, cols), with process groups of its own.

    The grid's ranks are the first ones of the world. The others only take part where all of the world does.
    Making one is a collective call: all ranks make it, in the same order.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        join_world(device)
        self._device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Groups of its own, so that the messages of two meshes cannot meet: init_device_mesh would put a mesh
        # dim of all ranks on the default group.
        ranks = torch.arange(grid.size).view(grid.batch, grid.rows, grid.cols)
        groups = [_group_of(ranks.movedim(dim, -1).flatten(0, 1)) for dim in range(3)]
        self._groups = {"plane": _group_of(ranks.flatten(1)), "world": _group_of(torch.arange(self.world).view(1, -1))}
        if self.rank < grid.size:
            names = ("batch", "rows", "cols")
            axes = [group for group in groups if group is not None]
            self.axes = DeviceMesh.from_group(axes, device.type, mesh=ranks, mesh_dim_names=names)
            self._groups |= {name: self.axes.get_group(name) for name in names}

    def _group(self, scope: Scope) -> dist.ProcessGroup:
        group = self._groups[scope]
        assert group is not None
        return group

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        group = self._group(scope)
        operations = [dist.P2POp(dist.isend, tensor, peer, group) for peer, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, peer, group) for peer, tensor in receives]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(everyone, own, self._group(scope))
        return everyone

    def all_values(self, value: Value) -> list[Value]:
        everyone: list[Value] = [value] * dist.get_world_size()
        dist.all_gather_object(everyone, value, self._group("world"))
        return everyone

    def anyone(self, fact: bool) -> bool:
        flag = torch.tensor(int(fact), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._group("world"))
        return bool(flag)


def _group_of(groups: Tensor) -> dist.ProcessGroup | None:
    """Make process groups of `groups` `[groups, ranks]`, and return this rank's; None if it is in none. Collective."""
    group, _ = dist.new_subgroups_by_enumeration(groups.tolist())
    return group
