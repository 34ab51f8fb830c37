"""How messages travel between the ranks of a grid. The mesh knows what to send; a transport knows how."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from halovae.device.kinds import INTERFACES, Device
from halovae.grid import Grid

Scope = Literal["rows", "cols", "plane", "world"]
Value = TypeVar("Value")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return how many ranks there are: of a process group, else of the torchrun that started this process, else 1.

    Args:
        group: the process group; None for the world's.

    Raises:
        ValueError: this rank is not in the group.
    """
    if not dist.is_initialized():
        return int(os.environ.get("WORLD_SIZE", "1"))
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: rank {dist.get_rank()} is not in it, but calls")
    return dist.get_world_size(group)


def wait_limit() -> timedelta | None:
    """How long a rank waits for another before it fails: `HALOVAE_TIMEOUT` in seconds; None for the backend's default.

    Raises:
        ValueError: the variable is not a number above 0.
    """
    text = os.environ.get("HALOVAE_TIMEOUT")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"HALOVAE_TIMEOUT={text}: expected seconds, a number above 0")
    return timedelta(seconds=seconds)


_meeting_file: Path | None = None


def meet_in_file(file: Path) -> None:
    """Let `join_world` meet the other ranks in `file`, on loopback; for a rank that halovae started.

    Args:
        file: a path in a folder that only this user can enter. The ranks create it.
    """
    global _meeting_file
    _meeting_file = file
    for variable in INTERFACES.values():  # meant for worlds of several hosts
        os.environ.pop(variable, None)


def join_world(device: torch.device) -> None:
    """Join the world's process group, unless this process is in one already.

    Ranks that halovae started meet in a file; others meet as torchrun's environment says.

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
        dist.init_process_group(own.backend, timeout=wait_limit())
    else:
        rank, world = int(os.environ["RANK"]), world_size()
        store = dist.FileStore(str(_meeting_file), world)  # type: ignore[attr-defined]
        store.set_timeout(wait_limit() or default_pg_timeout)
        dist.init_process_group(own.backend, timeout=wait_limit(), store=store, rank=rank, world_size=world)


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
    ranks: Sequence[int] = (0,)  # by their numbers in the world, in the order of the mesh
    # Whether other ranks use this process and its device as well, so that what the device counts is everybody's.
    shared_device = False

    def exchange(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send tensors to ranks, and fill others with what ranks send; all are flat and contiguous.

        On an accelerator, what is queued next on the current stream sees the received tensors.
        """
        self.start(scope, sends, receives)()

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Start an exchange, and return a function that waits for its end. Sent tensors must not change until then."""
        assert not sends
        assert not receives
        return lambda: None

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        """Gather every rank's flat `own`, all of one length, in the order of the scope's `ranks` ranks."""
        assert ranks == 1
        return [own]

    def all_values(self, value: Value) -> list[Value]:
        """Gather every rank's picklable `value`, in the order of the ranks."""
        return [value]

    def anyone(self, fact: bool) -> bool:
        """Whether `fact` is true on any rank."""
        return fact

    def hand(self, site: int, whole: Tensor) -> None:
        """Keep a map for ranks that run after this one; here there are none."""

    def handed(self, site: int, blank: Callable[[], Tensor]) -> Tensor:
        """The next map that the first rank kept at a site. Where nothing is computed, `blank` makes one on meta."""
        return blank()


def members(grid: Grid, scope: Scope, rank: int) -> list[int]:
    """Return the ranks of a grid that meet in a scope, `rank` among them, in order."""
    item, row, col = grid.coordinates(rank)
    same = {
        "rows": lambda i, r, c: (i, c) == (item, col),
        "cols": lambda i, r, c: (i, r) == (item, row),
        "plane": lambda i, r, c: i == item,
        "world": lambda i, r, c: True,
    }[scope]
    return [other for other in range(grid.size) if same(*grid.coordinates(other))]


def _started(operations: list[dist.P2POp]) -> Callable[[], None]:
    works = dist.batch_isend_irecv(operations)

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


class ProcessGroupTransport(Transport):
    """A transport between the world's processes, over process groups of its own: two transports' messages cannot meet.

    The grid's ranks are the first of the world. The others only take part where all of the world does. Making one is a
    collective call: all ranks make it, in the same order.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        join_world(device)
        self._device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ranks = range(self.world)
        scopes: tuple[Scope, ...] = "rows", "cols", "plane"
        self._groups: dict[Scope, dist.ProcessGroup | None] = {"world": _own_group([list(range(self.world))])}
        for scope in scopes:
            every = {tuple(members(grid, scope, rank)) for rank in range(grid.size)}
            self._groups[scope] = _own_group([list(ranks) for ranks in sorted(every)])

    def _group(self, scope: Scope) -> dist.ProcessGroup:
        group = self._groups[scope]
        assert group is not None
        return group

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        group = self._group(scope)
        operations = [dist.P2POp(dist.isend, tensor, peer, group) for peer, tensor in sends]
        return _started(operations + [dist.P2POp(dist.irecv, tensor, peer, group) for peer, tensor in receives])

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(everyone, own, self._group(scope))
        return everyone

    def all_values(self, value: Value) -> list[Value]:
        everyone: list[Value] = [value] * self.world
        dist.all_gather_object(everyone, value, self._group("world"))
        return everyone

    def anyone(self, fact: bool) -> bool:
        flag = torch.tensor(int(fact), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._group("world"))
        return bool(flag)


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Make process groups of disjoint ranks, and return this rank's; None if it is in none. Collective."""
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=wait_limit())
    return group


class SharedGroupTransport(Transport):
    """A transport over one process group of the caller's. It makes no groups, so ranks outside need not take part.

    Its messages go between those that the caller sends over the group: all of its ranks use it in the same order.

    Args:
        grid: of all ranks of the group.
        device: where messages lie.
        group: the process group, which this rank is in.
        ranks: its ranks, by their numbers in the world, in the grid's order.
    """

    def __init__(self, grid: Grid, device: torch.device, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        self._grid, self._device, self._group, self.ranks = grid, device, group, ranks
        self.rank, self.world = ranks.index(dist.get_rank()), len(ranks)
        self._places = [dist.get_group_rank(group, rank) for rank in ranks]

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        group, ranks = self._group, self.ranks
        operations = [dist.P2POp(dist.isend, tensor, ranks[peer], group) for peer, tensor in sends]
        return _started(operations + [dist.P2POp(dist.irecv, tensor, ranks[peer], group) for peer, tensor in receives])

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(ranks)]
        if ranks == self.world:
            dist.all_gather(everyone, own, self._group)
            return [everyone[place] for place in self._places]
        peers = members(self._grid, scope, self.rank)
        everyone[peers.index(self.rank)] = own
        others = [(peer, one) for peer, one in zip(peers, everyone, strict=True) if peer != self.rank]
        self.exchange(scope, [(peer, own) for peer, _ in others], others)
        return everyone

    def all_values(self, value: Value) -> list[Value]:
        everyone: list[Value] = [value] * self.world
        dist.all_gather_object(everyone, value, self._group)
        return [everyone[place] for place in self._places]

    def anyone(self, fact: bool) -> bool:
        flag = torch.tensor(int(fact), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._group)
        return bool(flag)
