"""Rank 0's channel to the front. A dedicated thread receives attempts and sends updates."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from typing import Any

import zmq

BEAT = 1.0  # seconds between signs of life
_NAP = 20  # milliseconds for which a message may wait to be sent


class RankChannel:
    """Rank 0's end of the channel.

    Messages are JSON objects with a `kind`. The front sends `welcome` (a front has begun to use these ranks; attempts
    of an earlier front are void), `attempt` and `cancel`. Rank 0 sends `beat`, and for an attempt `started`,
    `progress`, `preview`, `denoised`, `finished`, `failed` and `cancelled`.

    Attributes:
        attempts: `attempt` messages, as the front sent them.
        cancelled: ids of unfinished attempts that the front has cancelled, or that are void.
        ready: whether jobs can be worked on, as beats report it.
    """

    def __init__(self, endpoint: str) -> None:
        self.attempts: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[str] = set()
        self.ready = False
        self._known: set[str] = set()
        self._outgoing: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._endpoint = endpoint
        threading.Thread(target=self._run, daemon=True, name="channel to the front").start()

    def send(self, kind: str, attempt: str, **facts: Any) -> None:
        """Queue a message about an attempt, named by its id. `finished`, `failed` and `cancelled` end the attempt."""
        if kind in ("finished", "failed", "cancelled"):
            self._known.discard(attempt)
            self.cancelled.discard(attempt)
        self._outgoing.put({"kind": kind, "attempt": attempt, **facts})

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._endpoint)
        last = 0.0
        while True:
            if time.monotonic() - last > BEAT:
                last = time.monotonic()
                self._outgoing.put({"kind": "beat", "ready": self.ready})
            while not self._outgoing.empty():
                socket.send(json.dumps(self._outgoing.get()).encode())
            if socket.poll(_NAP):
                self._receive(json.loads(socket.recv()))

    def _receive(self, message: dict[str, Any]) -> None:
        if message["kind"] == "welcome":
            self.cancelled |= self._known
        elif message["kind"] == "cancel":
            if message["attempt"] in self._known:
                self.cancelled.add(message["attempt"])
        else:
            self._known.add(message["attempt"])
            self.attempts.put(message)
