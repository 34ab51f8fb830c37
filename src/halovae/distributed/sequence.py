"""Ranks of one process that run one after the other: each until it ends, or needs what a later one sends."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from halovae.device.copies import pinned
from halovae.device.kinds import HOSTS, Device
from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Scope, Transport, Value, members
from halovae.grid import Grid


def in_sequence(grid: Grid, device: torch.device, function: Callable[[Mesh], None], host: bool = False) -> None:
    """Call a function on each rank of a grid. The first one that can go on computes.

    Args:
        grid: of the ranks.
        device: which all of them use.
        function: takes the rank's mesh.
        host: whether messages and maps that are kept for later ranks wait in the host's memory.

    Raises:
        BaseException: what the first rank that failed raised.
    """
    line = _Line(grid, host)
    own = Device(device)
    queue = own.queue()
    modes = _get_current_dispatch_mode_stack()  # they belong to this thread; what counts its tensors counts all ranks'

    def work(rank: int) -> None:
        try:
            line.wait(rank, lambda: True)
            with ExitStack() as stack:
                stack.enter_context(own.queuing(queue))
                for mode in modes:
                    stack.enter_context(mode)
                function(Mesh(grid, device, SequenceTransport(line, rank)))
            line.leave(rank)
        except BaseException as error:
            line.fail(error)

    runs = [copy_context().run for _ in range(grid.size)]  # what belongs to this thread belongs to theirs
    threads = [threading.Thread(target=run, args=(work, rank), daemon=True) for rank, run in enumerate(runs)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C
        line.fail(error)
        raise
    failure, line.failure = line.failure, None
    line.letters.clear()
    line.maps.clear()
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # its frames would hold what strips left until the next collection of garbage


class _Line:
    """Whose turn it is, the messages between ranks, and the maps that the first one keeps for all."""

    def __init__(self, grid: Grid, host: bool) -> None:
        self.grid, self.host = grid, host
        self.failure: BaseException | None = None
        self._turn = threading.Condition()
        self._current = 0
        self._ready: dict[int, Callable[[], bool]] = {rank: lambda: True for rank in range(grid.size)}
        self.letters: defaultdict[tuple[int, int], deque[Any]] = defaultdict(deque)
        self.maps: defaultdict[int, list[Tensor | None]] = defaultdict(list)
        self.read: defaultdict[tuple[int, int], int] = defaultdict(int)

    def wait(self, rank: int, ready: Callable[[], bool]) -> None:
        """Let others compute until it is this rank's turn, and it is ready.

        Raises:
            RuntimeError: another rank failed, or each waits for another.
        """
        with self._turn:
            self._ready[rank] = ready
            if self._current == rank:
                self._pass_on()
            self._turn.wait_for(lambda: self._current == rank or self.failure is not None)
            if self.failure is not None:
                raise RuntimeError("another strip failed") from self.failure

    def leave(self, rank: int) -> None:
        with self._turn:
            del self._ready[rank]
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the first rank that is ready."""
        able = next((rank for rank in sorted(self._ready) if self._ready[rank]()), None)
        if able is None and self._ready:
            self.failure = RuntimeError(f"strips {sorted(self._ready)} wait for each other")
        self._current = -1 if able is None else able
        self._turn.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._turn:
            self.failure = self.failure or error
            self._turn.notify_all()


class SequenceTransport(Transport):
    """The transport of one of the ranks. What they send waits in memory until it is received."""

    shared_device = True

    def __init__(self, line: _Line, rank: int) -> None:
        self.rank, self.world, self._line = rank, line.grid.size, line

    def _collect(self, peer: int) -> Any:
        letters = self._line.letters[peer, self.rank]
        if not letters:
            self._line.wait(self.rank, lambda: bool(letters))
        return letters.popleft()

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        for peer, tensor in sends:
            self._line.letters[self.rank, peer].append(self._left(tensor))

        def wait() -> None:
            for peer, tensor in receives:
                tensor.copy_(self._collect(peer), non_blocking=True)

        return wait

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        return self._all(scope, own)

    def all_values(self, value: Value) -> list[Value]:
        return self._all("world", value)

    def _all(self, scope: Scope, own: Any) -> list[Any]:
        peers = members(self._line.grid, scope, self.rank)
        for peer in peers:
            self._line.letters[self.rank, peer].append(own)
        return [self._collect(peer) for peer in peers]

    def hand(self, site: int, whole: Tensor) -> None:
        self._line.maps[site].append(self._left(whole))

    def handed(self, site: int, blank: Callable[[], Tensor]) -> Tensor:
        maps, index = self._line.maps[site], self._line.read[site, self.rank]
        if len(maps) <= index:
            self._line.wait(self.rank, lambda: len(maps) > index)
        self._line.read[site, self.rank] += 1  # after the wait: the last one to read a map frees it
        found = maps[index]
        assert found is not None
        if all(self._line.read[site, other] > index for other in range(1, self.world)):
            maps[index] = None
        return found

    def _left(self, x: Tensor) -> Tensor:
        """What waits of a tensor. Copies that do not block are done in the order of the device's stream."""
        if not self._line.host or x.device.type in HOSTS:
            return x
        return pinned(x).copy_(x, non_blocking=True)
