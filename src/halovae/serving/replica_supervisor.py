"""The front's side of replicas: it starts their agent, says how many there are to be, and hears what became of them."""

from __future__ import annotations

import asyncio
import hmac
import logging
import multiprocessing
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import zmq

from halovae.serving.channel import MOST_UNREAD, notice_loss
from halovae.serving.replica_agent import NO_CLUSTER, Changed, Door, End, Joined, Wish, watch_over_replicas
from halovae.serving.replicas import Replica
from halovae.serving.scaling import Scaling
from halovae.serving.settings import RankSettings, ReplicaSettings
from halovae.serving.supervisor import GAVE_UP, Backoff, RanksLost

log = logging.getLogger(__name__)
_CHECK = 0.1  # seconds between two checks
_LONGEST = 30.0  # seconds until a lost cluster is looked for again


class ReplicaSupervisor:
    """Keeps replicas running for as long as the server lives. It is the `Fleet` of the front's dispatcher.

    Args:
        settings: of the replicas.
        ranks: of their ranks.
    """

    away = elastic = True

    def __init__(self, settings: ReplicaSettings, ranks: RankSettings) -> None:
        self._settings, self._ranks = settings, ranks
        self._scaling = Scaling(settings.least, settings.most, settings.idle)
        self.replicas: dict[str, Replica] = {}
        self._since: dict[str, float] = {}  # when the last ranks of replicas that were ended had started
        for number in range(settings.least):
            self._add(str(number))
        self.token = secrets.token_hex(16)
        self._public, self._secret = zmq.curve_keypair()
        self._socket: zmq.Socket[Any] | None = None
        self._endpoint = ""
        self._opened = asyncio.Event()
        self._context = multiprocessing.get_context("spawn")
        self._process: BaseProcess | None = None
        self._agent: Connection | None = None  # once it has the door
        self._told: Wish | None = None
        self._reason, self._have_been_ready = "", False

    # What the dispatcher calls.

    def open(self, socket: zmq.Socket[Any], lose: Callable[[Replica], Awaitable[None]]) -> None:
        """Take the socket. It listens once the agent knows by which address the cluster's hosts reach this one."""
        self._lose = lose
        socket.rcvhwm = MOST_UNREAD
        notice_loss(socket)
        socket.router_handover = True  # a rank 0 that connects again has the same identity
        socket.curve_server, socket.curve_secretkey, socket.curve_publickey = True, self._secret, self._public
        self._socket = socket
        self._opened.set()

    def knows(self, token: object) -> bool:
        return isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())

    def restart(self, replica: Replica, reason: str, seconds: float) -> bool:
        if replica.state in ("placing", "ended") or time.monotonic() - replica.changed < seconds:
            return False
        log.warning("the ranks of replica %s are restarted: %s", replica.name, reason)
        self._send(End(replica.name, reason))
        return True

    def follow(self, waiting: int, busy: Mapping[str, int]) -> None:
        """Tell the agent which replicas there are to be, as `Scaling` says."""
        now, wanted = time.monotonic(), [one for one in self.replicas.values() if one.wanted]
        ready = [one for one in wanted if one.ready]
        count = self._scaling.count(now, len(wanted), len(ready), waiting)
        for name in map(str, range(self._settings.most)):
            if len(wanted) < count and name not in self.replicas:
                log.info("replica %s is started: %d job(s) wait", name, waiting)
                wanted.append(self._add(name))
        unused = {one.name: one.used for one in wanted if not busy.get(one.name)}
        used = {one.name: unused.get(one.name, now) for one in wanted}
        if (idle := self._scaling.idle_one(now, waiting, used, {one.name for one in ready})) is not None:
            log.info("replica %s is ended: it has had no job for %g s", idle, self._settings.idle)
            self.replicas[idle].wanted = False
            if self.replicas[idle].state == "ended":  # nothing is left to be ended
                self._drop(idle)
        names = frozenset(one.name for one in self.replicas.values() if one.wanted)
        wish = Wish(names, frozenset(one.name for one in ready if one.wanted))
        if wish != self._told and self._send(wish):
            self._told = wish

    def close(self) -> None:
        pass

    def _add(self, name: str) -> Replica:
        """Add a replica. Ranks of an earlier one of this name are not taken for its own."""
        self.replicas[name] = Replica(name, state="placing", since=self._since.get(name, 0.0))
        return self.replicas[name]

    def _drop(self, name: str) -> None:
        self._since[name] = self.replicas.pop(name).since

    # The agent.

    def _send(self, message: Wish | End) -> bool:
        if self._agent is None:
            return False
        try:
            self._agent.send(message)
        except OSError:  # it has ended, which `run` notices
            return False
        return True

    async def run(self) -> None:
        """Start the agent, and restart it whenever it ends.

        Raises:
            RanksLost: Ray cannot be used, or ranks ended before they were ready, at the first start or several times in
                a row.
        """
        await self._opened.wait()
        backoff, has_joined = Backoff(), False
        while True:
            begin, were_ready = time.monotonic(), await self._run_agent()
            code = self._process.exitcode if self._process is not None else None
            reason = self._reason or f"Ray ended the agent, exit status {code}"
            has_joined = has_joined or bool(self._endpoint)
            for replica in [*self.replicas.values()]:
                await self._note(replica, Changed(replica.name, "ended", reason=reason, lost_host=True))
            pause = None if code == GAVE_UP else backoff.pause(were_ready, time.monotonic() - begin)
            if code == NO_CLUSTER and has_joined:
                pause = _LONGEST  # it may come back
            if pause is None:
                raise RanksLost(reason)
            log.warning("the replicas' agent ended (%s), and is restarted in %.1f s", reason, pause)
            await asyncio.sleep(pause)

    async def _run_agent(self) -> bool:
        """Run an agent until it ends. Return whether any ranks were ready."""
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=watch_over_replicas,
            args=(self._settings, self._ranks, theirs, self._have_been_ready),
            name="agent",
        )
        self._reason, were_ready = "", False
        self._process.start()
        theirs.close()
        while self._process.is_alive():
            await self._hear(ours)
            were_ready = were_ready or any(one.is_ready for one in self.replicas.values())
            await asyncio.sleep(_CHECK)
        await self._hear(ours)
        self._agent = self._told = None
        self._have_been_ready = self._have_been_ready or were_ready
        return were_ready

    async def _hear(self, agent: Connection) -> None:
        """Take all messages of the agent."""
        try:
            while agent.poll():
                message = agent.recv()
                if isinstance(message, Joined):
                    latest = max([*self._since.values(), *(one.since for one in self.replicas.values()), 0.0])
                    agent.send(Door(self._listen(message.address), self.token, self._public, latest))
                    self._agent, self._settings = agent, replace(self._settings, device=message.device)
                elif isinstance(message, Changed):
                    if message.name in self.replicas:
                        await self._note(self.replicas[message.name], message)
                else:
                    self._reason = str(message)
        except (EOFError, OSError):
            return

    def _listen(self, address: str) -> str:
        """Let ranks connect by an address of this host, and return the endpoint."""
        assert self._socket is not None
        if self._endpoint:
            self._socket.unbind(self._endpoint)
        host = f"[{address}]" if ":" in address else address
        self._socket.ipv6 = ":" in address
        self._socket.bind(f"tcp://{host}:*")
        self._endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        return self._endpoint

    async def _note(self, replica: Replica, change: Changed) -> None:
        if 0.0 < change.since < replica.since:  # others have followed them, and were heard first
            return
        replica.became(change.state, change.reason)
        replica.host = change.host or replica.host
        if change.state != "ended":
            return
        if change.reason:
            log.warning("replica %s has lost its ranks: %s", replica.name, change.reason)
        if change.lost_host:
            replica.cause = "host"
        await self._lose(replica)
        if not replica.wanted:
            self._drop(replica.name)

    def stop(self) -> None:
        """End the replicas."""
        if self._process is not None:
            self._process.terminate()  # the agent ends the ranks
            self._process.join(20)
            self._process.kill()
