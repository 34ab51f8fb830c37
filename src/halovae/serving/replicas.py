"""Groups of ranks as the front knows them, and which of them gets a job."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zmq

from halovae.serving.attempts import RunningAttempt
from halovae.serving.channel import BEAT, SocketFolder
from halovae.serving.jobs import Cause, Job

SILENCE = 10 * BEAT  # seconds without a message after which ranks count as gone
log = logging.getLogger(__name__)
_STRANGERS = 100  # processes of which the log says that they were turned away
AHEAD = 2  # attempts that ranks hold before denoising ends: the current one and the next
LOADING = 1800.0  # seconds for which ranks may be starting
ONLY = "0"  # the name of a front's only group of ranks, where there are no replicas


@dataclass
class Replica:
    """A group of ranks that work on attempts together. Other ranks follow under its name when these have ended.

    Attributes:
        name: its number, from "0" on.
        peer: rank 0's identity on the socket; None while there are no ranks.
        since: when the present ranks started, by their own clock; earlier ones that still live are not heard.
        is_ready: whether the ranks have said that they can work.
        heard: when they last sent anything (`time.monotonic`), and `advanced`: when an attempt last got further.
        cause: why the present ranks will have ended.
        removed: jobs that were removed, by attempt id, until the ranks have ended the attempt.
        state: what the supervisor says of ranks that have not been heard: "placing" while there is no room for them,
            "starting", or "ended".
        reason: why the last ranks ended; "" if none have.
        host: the name of rank 0's host, once it is known.
        changed: when the state changed (`time.monotonic`).
        used: when the replica last had an attempt.
        completed: how many attempts it has completed, and `starts`: how often ranks have started.
        wanted: whether it gets jobs, or will be ended.
    """

    name: str
    peer: bytes | None = None
    since: float = 0.0
    is_ready: bool = False
    heard: float = field(default_factory=time.monotonic)
    advanced: float = field(default_factory=time.monotonic)
    cause: Cause = "ranks"
    removed: dict[str, Job] = field(default_factory=dict)
    state: str = "starting"
    reason: str = ""
    host: str = ""
    changed: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)
    completed: int = 0
    starts: int = 0
    wanted: bool = True

    @property
    def ready(self) -> bool:
        """Whether its ranks work on attempts."""
        return self.is_ready and self.wanted and time.monotonic() - self.heard < SILENCE

    @property
    def restarts(self) -> int:
        """How often its ranks were restarted."""
        return max(0, self.starts - 1)

    @property
    def shown(self) -> str:
        """Its state in a word, for people."""
        if self.is_ready:
            return "ready" if self.ready else "silent"
        return self.state

    def became(self, state: str, reason: str = "") -> None:
        """Note a new state of its ranks."""
        self.state, self.changed, self.reason = state, time.monotonic(), reason or self.reason

    def hear_beat(self, is_ready: bool) -> None:
        """Take a sign of life, which says whether the ranks can work."""
        if is_ready and not self.is_ready:
            self.changed = time.monotonic()
        self.is_ready = is_ready

    def stalled(self, now: float, busy: bool, timeout: float) -> float:
        """Return after how many seconds without progress the ranks are to be restarted, if these have passed; else 0.

        Args:
            now: the time (`time.monotonic`).
            busy: whether they have work.
            timeout: seconds without progress that ranks which are ready may take.
        """
        if busy:
            self.used = now
        if not self.is_ready:  # they are starting
            timeout = max(timeout, LOADING)
        elif not busy and now - self.heard < SILENCE:
            self.advanced = now
        if now - self.advanced <= timeout:
            return 0.0
        self.advanced = now
        return timeout

    def take(self, peer: bytes, since: float) -> None:
        """Note that other ranks have started."""
        self.peer, self.since, self.starts = peer, since, self.starts + 1
        self.used = self.advanced = time.monotonic()

    def lose(self) -> None:
        """Note that its ranks have ended."""
        self.peer, self.is_ready = None, False


def work_left(attempts: Sequence[RunningAttempt]) -> float:
    """How much denoising is left of attempts, in pixels x frames x steps. It compares the loads of replicas."""
    return sum(attempt.work * (100 - attempt.percent) / 100 for attempt in attempts if not attempt.over)


def room(attempts: Sequence[RunningAttempt], decode_batch: int) -> int:
    """How many more attempts a replica that has these ones can hold."""
    most = AHEAD + 2 * decode_batch
    ahead = sum(attempt.stage in ("waiting", "denoising") for attempt in attempts if not attempt.over)
    return max(0, min(AHEAD - ahead, most - len(attempts)))


class Turn:
    """One round of giving waiting jobs to replicas, in the order of their arrival.

    Args:
        replicas: those that are ready.
        attempts: what each has, by name.
        decode_batch: how many latents a replica decodes at once.
    """

    def __init__(
        self, replicas: Sequence[Replica], attempts: Mapping[str, Sequence[RunningAttempt]], decode_batch: int
    ) -> None:
        self._attempts = {one.name: list(attempts[one.name]) for one in replicas}
        self._replicas, self._batch = {one.name: one for one in replicas}, decode_batch

    @property
    def room(self) -> int:
        """How many jobs the replicas can hold."""
        return sum(room(attempts, self._batch) for attempts in self._attempts.values())

    def place(self, job: Job) -> Replica | None:
        """Return the least loaded replica that has room for a job.

        A job that runs alone waits until a replica is idle. If none is, the least loaded one gets no further job in
        this round, so that it will be.
        """
        by_load = sorted(self._attempts, key=lambda name: (work_left(self._attempts[name]), len(name), name))
        for name in by_load:
            if not self._replicas[name].ready:  # it was lost since the round began
                continue
            attempts = self._attempts[name]
            busy = [attempt for attempt in attempts if not attempt.over]
            shared = busy and (job.alone or any(attempt.job.alone for attempt in busy))
            if room(attempts, self._batch) and not shared:
                attempts.append(RunningAttempt(job))
                return self._replicas[name]
        if job.alone and by_load:
            del self._attempts[by_load[0]]
        return None


class Fleet(Protocol):
    """The groups of ranks of a front, and how it starts and ends them.

    Attributes:
        replicas: the groups, by name.
        token: what the front shows ranks, so that they know that it is this server's.
        away: whether ranks may be on other hosts, so that files travel over the socket.
        elastic: whether the number of replicas follows the queue.
    """

    replicas: dict[str, Replica]
    token: str
    away: bool
    elastic: bool

    def open(self, socket: zmq.Socket[Any], lose: Callable[[Replica], Awaitable[None]]) -> None:
        """Let ranks connect to a socket. `lose` retries the jobs of a replica whose ranks have ended."""

    def knows(self, token: object) -> bool:
        """Whether a message shows the token."""

    def restart(self, replica: Replica, reason: str, seconds: float) -> bool:
        """End a replica's ranks, so that others start, unless they are younger than so many seconds."""

    def follow(self, waiting: int, busy: Mapping[str, int]) -> None:
        """Start or end replicas.

        Args:
            waiting: jobs that no replica has.
            busy: how many attempts each replica has, by name.
        """

    def close(self) -> None:
        """Let no more ranks connect."""


class Newcomers:
    """Knows which processes may be ranks: those that know the token, and are not older than the present ranks."""

    def __init__(self) -> None:
        self._strangers = set[bytes]()

    def replica_of(self, fleet: Fleet, peer: bytes, beat: Mapping[str, Any]) -> Replica | None:
        """Return the replica to which the sender of a first message belongs; None if it is turned away."""
        replica = fleet.replicas.get(beat.get("replica", ONLY))
        if replica is None or beat["since"] <= replica.since:
            return None
        if fleet.knows(beat.get("token")):
            return replica
        if peer not in self._strangers and len(self._strangers) < _STRANGERS:
            self._strangers.add(peer)
            log.error("a process that does not know this server's token was turned away")
        return None


class OneGroup:
    """The fleet of a front that has one group of ranks, on this host or under torchrun.

    Args:
        output: the folder of jobs.
        restart: ends all ranks that are older than some seconds, for a reason. Returns whether it did.
    """

    away = elastic = False

    def __init__(self, output: Path, restart: Callable[[str, float], bool]) -> None:
        self.replicas = {ONLY: Replica(ONLY)}
        self._output, self._restart = output, restart

    def open(self, socket: zmq.Socket[Any], lose: Callable[[Replica], Awaitable[None]]) -> None:
        self._folder = SocketFolder(self._output, front=True)
        self.token = self._folder.token
        socket.bind(self._folder.endpoint)

    def knows(self, token: object) -> bool:
        return self._folder.knows(token)

    def restart(self, replica: Replica, reason: str, seconds: float) -> bool:
        return self._restart(reason, seconds)

    def follow(self, waiting: int, busy: Mapping[str, int]) -> None:
        pass

    def close(self) -> None:
        self._folder.remove()
