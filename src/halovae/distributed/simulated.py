"""Simulated ranks: threads of one process that share a device, and wait for each other where they exchange halos.

One of them computes at a time, so that each one's time, and the memory of its tensors, can be measured.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from halovae.device.kinds import Device
from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Link, Scope, Transport, Value, members
from halovae.grid import Grid

Result = TypeVar("Result")


def on_threads(grid: Grid, device: torch.device, function: Callable[[Mesh], Result]) -> list[Result]:
    """Call a function on each rank of a grid, every rank a thread of this process. One computes at a time.

    Args:
        grid: of the ranks.
        device: which all of them use.
        function: takes the rank's mesh.

    Returns:
        What it returned, by rank.

    Raises:
        BaseException: what the first rank that failed raised.
    """
    return on_clocks(grid, device, lambda mesh, _: function(mesh), Link())


def on_clocks(
    grid: Grid, device: torch.device, function: Callable[[Mesh, SimulatedTransport], Result], link: Link
) -> list[Result]:
    """As `on_threads`; the function also takes the transport, whose clock runs as if each rank had its own device."""
    meeting, own = _Meeting(grid, link), Device(device)
    results: dict[int, Result] = {}

    random = torch.get_rng_state()

    def work(rank: int) -> None:
        try:
            with meeting.turn:
                torch.set_rng_state(random)
                transport = SimulatedTransport(meeting, rank, own)
                results[rank] = function(Mesh(grid, device, transport), transport)
                meeting.finish(rank)
        except BaseException as error:
            meeting.fail(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(grid.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if meeting.failure is not None:
        raise meeting.failure
    return [results[rank] for rank in range(grid.size)]


class _Meeting:
    """The mailboxes of simulated ranks. The rank that computes holds `turn`, and releases it while it waits."""

    def __init__(self, grid: Grid, link: Link) -> None:
        self.grid, self.link = grid, link
        self.turn = threading.Condition()
        self.failure: BaseException | None = None
        self._finished: set[int] = set()
        self._letters: defaultdict[tuple[int, int], deque[tuple[Any, float]]] = defaultdict(deque)

    def post(self, sender: int, receiver: int, content: Any, sent: float) -> None:
        self._letters[sender, receiver].append((content, sent))
        self.turn.notify_all()

    def collect(self, sender: int, receiver: int) -> tuple[Any, float]:
        """Wait for the next message: return its content, and when it was sent.

        Raises:
            RuntimeError: another rank has failed, or has finished without sending.
        """
        letters = self._letters[sender, receiver]
        self.turn.wait_for(lambda: letters or self.failure or sender in self._finished)
        if self.failure is not None:
            raise RuntimeError("another simulated rank failed") from self.failure
        if not letters:
            raise RuntimeError(f"simulated rank {receiver} waits for rank {sender}, which has finished")
        return letters.popleft()

    def finish(self, rank: int) -> None:
        """Note that a rank sends no more. It holds `turn`."""
        self._finished.add(rank)
        self.turn.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.turn:
            self.failure = self.failure or error
            self.turn.notify_all()


class SimulatedTransport(Transport):
    """A simulated rank's transport, and its clock, which runs as if the rank had a device of its own."""

    shared_device = True

    def __init__(self, meeting: _Meeting, rank: int, device: Device) -> None:
        self.rank, self.world = rank, meeting.grid.size
        self.clock = self.computing = self.waiting = 0.0
        self._meeting, self._device = meeting, device
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Add the time computed since the last turn to the clock."""
        self._device.synchronize()
        self._random = torch.get_rng_state()  # each rank draws the numbers that a process of its own would
        took = time.perf_counter() - self._resumed
        self.clock += took
        self.computing += took

    def _resume(self, arrivals: Sequence[float]) -> None:
        later = max([self.clock, *arrivals])
        self.waiting += later - self.clock
        self.clock = later
        torch.set_rng_state(self._random)
        self._resumed = time.perf_counter()

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        self.pause()
        for peer, tensor in sends:
            self._meeting.post(self.rank, peer, tensor, self.clock)
        self._resume([])

        def wait() -> None:
            self.pause()
            arrivals = []
            for peer, tensor in receives:
                content, sent = self._meeting.collect(peer, self.rank)
                tensor.copy_(content)
                arrivals.append(sent + self._meeting.link.seconds(content.nbytes))
            self._resume(arrivals)

        return wait

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        contents, last = self._all(scope, own)
        # Around a ring: each rank passes on one part after the other.
        self._resume([last + (ranks - 1) * self._meeting.link.seconds(own.nbytes)])
        return contents

    def all_values(self, value: Value) -> list[Value]:
        values, last = self._all("world", value)
        self._resume([last])
        return values

    def _all(self, scope: Scope, own: Any) -> tuple[list[Any], float]:
        """Return what every rank in the scope gives, and the time of the last one."""
        self.pause()
        peers = members(self._meeting.grid, scope, self.rank)
        for peer in peers:
            self._meeting.post(self.rank, peer, own, self.clock)
        letters = [self._meeting.collect(peer, self.rank) for peer in peers]
        return [content for content, _ in letters], max(sent for _, sent in letters)
