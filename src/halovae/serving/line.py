"""Rank 0's line to the front: orders come in, news go out, by a thread that does nothing else."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from typing import Any

import zmq

BEAT = 1.0  # seconds between signs of life
_NAP = 20  # milliseconds that news may wait for


class RankLine:
    """Rank 0's end.

    Messages are JSON objects with a `kind`. From the front: `welcome` (a front has begun to use these ranks: what
    another one ordered is void), `order`, `cancel`. To it: `beat`, and for an order `started`, `progress`, `finished`,
    `failed`, `cancelled`. An order is one attempt at a job.

    Attributes:
        orders: as the front sent them.
        cancelled: those that nobody asks for any more, by their ids.
        ready: what a beat says about whether jobs can be worked on.
    """

    def __init__(self, endpoint: str) -> None:
        self.orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[str] = set()
        self.ready = False
        self._known: set[str] = set()
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._endpoint = endpoint
        threading.Thread(target=self._run, daemon=True, name="line to the front").start()

    def tell(self, kind: str, order: str, **facts: Any) -> None:
        """Send news of an order; those after which it is over also forget it here."""
        if kind in ("finished", "failed", "cancelled"):
            self._known.discard(order)
            self.cancelled.discard(order)
        self._news.put({"kind": kind, "order": order, **facts})

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._endpoint)
        last = 0.0
        while True:
            if time.monotonic() - last > BEAT:
                last = time.monotonic()
                self._news.put({"kind": "beat", "ready": self.ready})
            while not self._news.empty():
                socket.send(json.dumps(self._news.get()).encode())
            if socket.poll(_NAP):
                self._heard(json.loads(socket.recv()))

    def _heard(self, message: dict[str, Any]) -> None:
        if message["kind"] == "welcome":
            self.cancelled |= self._known
        elif message["kind"] == "cancel":
            if message["order"] in self._known:
                self.cancelled.add(message["order"])
        else:
            self._known.add(message["order"])
            self.orders.put(message)
