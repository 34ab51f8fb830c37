"""How messages travel between the ranks of a grid. The mesh knows what to send; a transport knows how."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from halovae.device.kinds import INTERFACES, Device
from halovae.grid import Grid

Scope = Literal["rows", "cols", "plane", "world"]
Value = TypeVar("Value")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks there are: of a process group, else of the torchrun that started this process, else 1.

    Args:
        group: the process group; None for the world's.
    """
    return dist.get_world_size(group) if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def patience() -> timedelta:
    """How long a rank waits for another before it fails: `HALOVAE_TIMEOUT` in seconds, else torch's 30 minutes.

    Raises:
        ValueError: the variable is not a number above 0.
    """
    text = os.environ.get("HALOVAE_TIMEOUT")
    if text is None:
        return default_pg_timeout
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"HALOVAE_TIMEOUT={text}: expected seconds, a number above 0")
    return timedelta(seconds=seconds)


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
        ValueError: the ranks span hosts, and the environment does not name the network interface to use; or
            `HALOVAE_TIMEOUT` is no number.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    own = Device(device)
    own.enter()
    own.choose_interfaces()
    if _meeting_file is None:
        dist.init_process_group(own.backend, timeout=patience())
    else:
        rank, world = int(os.environ["RANK"]), world_size()
        store = dist.FileStore(str(_meeting_file), world)  # type: ignore[attr-defined]
        store.set_timeout(patience())
        dist.init_process_group(own.backend, timeout=patience(), store=store, rank=rank, world_size=world)


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
    """A transport between processes, over process groups of its own: the messages of two transports cannot meet.

    The grid's ranks are the first of its ranks. The others only take part where all do. Making one is a collective
    call: all of its ranks make it, in the same order.

    Args:
        grid: the extents over batch, rows, and cols.
        device: where messages lie.
        ranks: its ranks by their numbers in the world, this one among them; None for all of the world.
    """

    def __init__(self, grid: Grid, device: torch.device, ranks: Sequence[int] | None = None) -> None:
        join_world(device)
        self._device = device
        self._ranks = list(range(dist.get_world_size()) if ranks is None else ranks)
        self.rank, self.world = self._ranks.index(dist.get_rank()), len(self._ranks)
        mesh = torch.tensor(self._ranks[: grid.size]).view(grid.batch, grid.rows, grid.cols)
        groups: dict[Scope, Tensor] = {
            "rows": mesh.movedim(1, -1).flatten(0, 1),
            "cols": mesh.flatten(0, 1),
            "plane": mesh.flatten(1),
            "world": torch.tensor([self._ranks]),
        }
        everyone = ranks is None
        self._groups = {scope: _own_group(members.tolist(), everyone) for scope, members in groups.items()}

    def _group(self, scope: Scope) -> _Group:
        group = self._groups[scope]
        assert group is not None
        return group

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        group = self._group(scope).group
        operations = [dist.P2POp(dist.isend, tensor, self._ranks[peer], group) for peer, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, self._ranks[peer], group) for peer, tensor in receives]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(ranks)]
        group = self._group(scope)
        dist.all_gather(everyone, own, group.group)
        return [everyone[place] for place in group.places]

    def all_values(self, value: Value) -> list[Value]:
        group = self._group("world")
        everyone: list[Value] = [value] * self.world
        dist.all_gather_object(everyone, value, group.group)
        return [everyone[place] for place in group.places]

    def anyone(self, fact: bool) -> bool:
        flag = torch.tensor(int(fact), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._group("world").group)
        return bool(flag)


class _Group(NamedTuple):
    """A process group, and where in it each of its ranks is: torch sorts them."""

    group: dist.ProcessGroup
    places: list[int]


def _own_group(groups: list[list[int]], everyone: bool) -> _Group | None:
    """Make disjoint process groups, and return the one that this rank is in, if any. Collective.

    Args:
        groups: the ranks of each.
        everyone: whether all ranks of the world make them; else only those that are in one.
    """
    own = next((ranks for ranks in groups if dist.get_rank() in ranks), None)
    if everyone:
        made, _ = dist.new_subgroups_by_enumeration(groups, timeout=patience())
    elif own is not None:
        made = dist.new_group(own, timeout=patience(), use_local_synchronization=True)
    if own is None:
        return None
    assert isinstance(made, dist.ProcessGroup)
    return _Group(made, [sorted(own).index(rank) for rank in own])
