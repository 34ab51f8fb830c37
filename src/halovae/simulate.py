"""Many ranks in one process on one device: each a thread that meets the others where they exchange halos.

The ranks take turns, one computing at a time, so that what each takes can be told apart: its time, and the memory of
its tensors. The decoder's code is that of real ranks; only the lines between them differ.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halovae.decode import Decoder
from halovae.geometry import Grid
from halovae.lines import Lines, Scope, Value
from halovae.mesh import Mesh
from halovae.platform import Platform


@dataclass(frozen=True)
class Link:
    """What lies between two ranks.

    The defaults are of the order of NVLink and HCCS within one host: messages over NCCL or HCCL take tens of
    microseconds to begin with, whatever their size.

    Attributes:
        latency: seconds from a message's start to its first byte's arrival.
        bandwidth: bytes per second, each way.
    """

    latency: float = 20e-6
    bandwidth: float = 100e9

    def seconds(self, tensor: Tensor) -> float:
        """How long a message takes."""
        return self.latency + tensor.numel() * tensor.element_size() / self.bandwidth


@dataclass(frozen=True)
class SimulatedRank:
    """What one simulated rank took.

    Attributes:
        computing: seconds that it held the device.
        waiting: seconds that it would wait for others, over the given link.
        peak_allocated: bytes of its tensors at the highest point, without weights.
        messages: how many it sent, and their `bytes_sent`.
    """

    rank: int
    computing: float
    waiting: float
    peak_allocated: int
    messages: int
    bytes_sent: int


@dataclass(frozen=True)
class Simulation:
    """A decode by simulated ranks.

    Attributes:
        frames: what it decoded to, as `Decoder.decode` returns it on rank 0.
        grid: how the ranks stood.
        ranks: what each took, in order.
        seconds: when the last of them would be done, had each a device of its own.
    """

    frames: Tensor
    grid: Grid
    ranks: tuple[SimulatedRank, ...]
    seconds: float


def simulate(decoder: Decoder, latents: Tensor, grid: Grid, link: Link | None = None, **options: Any) -> Simulation:
    """Decode by `grid.size` ranks in this process, on the decoder's device.

    Args:
        decoder: what every rank decodes with.
        latents: `[B, C, T, H, W]`.
        grid: how the ranks share the latents.
        link: what to predict the time over; None for the defaults of `Link`.
        options: `chunk`, `dtype`, `halo_depth` and `denormalize` of `Decoder.stream`.

    Raises:
        ValueError: as `Decoder.stream` raises it.
    """
    meeting = _Meeting(grid, link or Link())
    platform = Platform(decoder.device)
    results: list[tuple[Tensor | None, SimulatedRank, float] | None] = [None] * grid.size

    def work(rank: int) -> None:
        try:
            with meeting.turn:
                lines = _ThreadLines(meeting, rank, platform)
                stream = decoder.stream(latents, mesh=Mesh(grid, decoder.device, lines), **options)
                frames = stream.join()
                lines.pause()
                took = stream.report.ranks[0]
                allocated = took.memory.peak_allocated
                simulated = SimulatedRank(
                    rank, lines.computing, lines.waiting, allocated, took.messages, took.bytes_sent
                )
                results[rank] = frames, simulated, lines.clock
        except BaseException as error:
            meeting.fail(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(grid.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if meeting.failure is not None:
        raise meeting.failure
    done = [result for result in results if result is not None]
    frames = done[0][0]
    assert frames is not None
    return Simulation(frames, grid, tuple(rank for _, rank, _ in done), max(clock for _, _, clock in done))


class _Meeting:
    """Where simulated ranks leave what they send. Who computes holds `turn`; waiting for others lets go of it."""

    def __init__(self, grid: Grid, link: Link) -> None:
        self.grid, self.link = grid, link
        self.turn = threading.Condition()
        self.failure: BaseException | None = None
        self._letters: defaultdict[tuple[int, int], deque[tuple[Any, float]]] = defaultdict(deque)

    def members(self, scope: Scope, rank: int) -> list[int]:
        """The ranks that meet in a scope, this one among them."""
        item, row, col = self.grid.coordinates(rank)
        same = {
            "rows": lambda i, r, c: (i, c) == (item, col),
            "cols": lambda i, r, c: (i, r) == (item, row),
            "plane": lambda i, r, c: i == item,
            "world": lambda i, r, c: True,
        }[scope]
        return [other for other in range(self.grid.size) if same(*self.grid.coordinates(other))]

    def post(self, sender: int, receiver: int, content: Any, sent: float) -> None:
        self._letters[sender, receiver].append((content, sent))
        self.turn.notify_all()

    def collect(self, sender: int, receiver: int) -> tuple[Any, float]:
        """Wait for the next letter: its content, and when it was sent.

        Raises:
            RuntimeError: another rank has failed.
        """
        letters = self._letters[sender, receiver]
        self.turn.wait_for(lambda: letters or self.failure)
        if self.failure is not None:
            raise RuntimeError("another simulated rank failed") from self.failure
        return letters.popleft()

    def fail(self, error: BaseException) -> None:
        with self.turn:
            self.failure = self.failure or error
            self.turn.notify_all()


class _ThreadLines(Lines):
    """A simulated rank's lines, and its clock: where a rank of its own device would be in time."""

    shared_device = True

    def __init__(self, meeting: _Meeting, rank: int, platform: Platform) -> None:
        self.rank, self.world = rank, meeting.grid.size
        self.clock = self.computing = self.waiting = 0.0
        self._meeting, self._platform = meeting, platform
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Put what was computed since the last turn on the clock."""
        self._platform.synchronize()
        took = time.perf_counter() - self._resumed
        self.clock += took
        self.computing += took

    def _resume(self, arrivals: Sequence[float]) -> None:
        later = max([self.clock, *arrivals])
        self.waiting += later - self.clock
        self.clock = later
        self._resumed = time.perf_counter()

    def exchange(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        self.pause()
        for peer, tensor in sends:
            self._meeting.post(self.rank, peer, tensor, self.clock)
        arrivals = []
        for peer, tensor in receives:
            content, sent = self._meeting.collect(peer, self.rank)
            tensor.copy_(content)
            arrivals.append(sent + self._meeting.link.seconds(content))
        self._resume(arrivals)

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        contents, last = self._all(scope, own)
        # Around a ring: each rank passes on one part after the other.
        self._resume([last + (ranks - 1) * self._meeting.link.seconds(own)])
        return contents

    def all_values(self, value: Value) -> list[Value]:
        values, last = self._all("world", value)
        self._resume([last])
        return values

    def _all(self, scope: Scope, own: Any) -> tuple[list[Any], float]:
        """What everybody in the scope gives, and when the last of them gave it."""
        self.pause()
        members = self._meeting.members(scope, self.rank)
        for peer in members:
            self._meeting.post(self.rank, peer, own, self.clock)
        letters = [self._meeting.collect(peer, self.rank) for peer in members]
        return [content for content, _ in letters], max(sent for _, sent in letters)
