"""Replicas without Ray, for tests: tests say what became of ranks, as the agent would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
from serving.stub_ranks import StubRanks

from halovae.distributed.ray_cluster import State
from halovae.serving.channel import RemoteLink
from halovae.serving.replica_agent import Changed, End, Wish
from halovae.serving.replica_supervisor import ReplicaSupervisor
from halovae.serving.replicas import Replica
from halovae.serving.settings import RankSettings, ReplicaSettings


class Replicas(ReplicaSupervisor):
    """The supervisor of a front's replicas, whose agent is the test.

    Attributes:
        sent: what the agent was told.
    """

    def __init__(self, least: int, most: int, ranks: RankSettings, idle: float = 300.0) -> None:
        super().__init__(ReplicaSettings(least, most, 1, str(ranks.model), idle=idle), ranks)
        self.sent: list[Wish | End] = []

    def open(self, socket: zmq.Socket[Any], lose: Callable[[Replica], Awaitable[None]]) -> None:
        super().open(socket, lose)
        self._loop = asyncio.get_running_loop()
        self._listen("127.0.0.1")

    def _send(self, message: Wish | End) -> bool:
        self.sent.append(message)
        return True

    def tell(self, name: str, state: State, reason: str = "", lost_host: bool = False, since: float = 0.0) -> None:
        """Say that a replica's ranks changed their state."""
        change = Changed(name, state, "a-host", reason, lost_host, since)
        asyncio.run_coroutine_threadsafe(self._note(self.replicas[name], change), self._loop).result(20)

    def link(self, name: str, folder: Path, **changes: Any) -> RemoteLink:
        """How a new rank 0 of a replica reaches the front. It makes results in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"token": self.token, "key": self._public, "since": time.time(), **changes}
        return RemoteLink(self._endpoint, replica=name, folder=str(folder), **facts)

    def start(self, name: str, folder: Path) -> StubRanks:
        """Start ranks of a replica without a model. They are in this process."""
        self.tell(name, "running")
        return StubRanks(self.link(name, folder))
