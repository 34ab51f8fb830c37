"""Connections of the HTTP server: how many there may be, and how long one may wait for a request."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

WAIT = 30.0  # seconds that a connection may take for the header of its next request
LINGER = 5.0  # seconds that one may go on with a body that was answered already, so that its client reads the answer
_OTHER_FILES = 512  # file descriptors that are not connections
_QUIET = 10.0  # seconds between two equal messages that clients can cause
_CAUSED = (
    "socket.accept() out of system resource", "Invalid HTTP request received", "Unsupported upgrade request",
    "Exceeded concurrency limit",
)  # fmt: skip


class Connection(H11Protocol):
    """A connection that ends if it sends no complete header in time.

    If there are too many connections, the one that has waited longest for a request gives way to a new one. If all
    have requests, the new one is answered with 503.

    Args:
        waiting: the connections of the server that wait for a request, oldest first. All connections share it.
        most: how many connections there may be.
        options: what uvicorn passes.
    """

    def __init__(self, waiting: dict[Connection, asyncio.TimerHandle], most: int, **options: Any) -> None:
        super().__init__(**options)
        self._waiting, self._most = waiting, most

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            # One with unsent data would lose the end of its answer.
            oldest = next((one for one in self._waiting if not one.transport.get_write_buffer_size()), None)
            if oldest is not None:
                oldest._stop_waiting()
                self.connections.discard(oldest)
                oldest.transport.abort()
            else:
                self.limit_concurrency = 0  # uvicorn answers 503
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # nobody reads the rest: without this, it could take forever
            self.loop.call_later(LINGER, self.transport.close)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Start to wait for a request, unless the connection waits already or has one."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_waiting()
        elif self not in self._waiting:
            self._waiting[self] = self.loop.call_later(WAIT, self.transport.close)

    def _stop_waiting(self) -> None:
        if (timer := self._waiting.pop(self, None)) is not None:
            timer.cancel()


class Seldom(logging.Filter):
    """Lets messages that clients can cause at will pass once in a while."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        caused = next((text for text in _CAUSED if text in str(record.msg)), None)
        if caused is None:
            return True
        now = time.monotonic()
        passes = now >= self._next.get(caused, now)
        if passes:
            self._next[caused] = now + _QUIET
        return passes


_seldom = Seldom()


def quiet() -> None:
    """Keep clients from flooding the log."""
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(_seldom)


def most_connections(wanted: int) -> int:
    """Let this process open as many files as it may, and return how many connections it can then have, up to `wanted`.

    With more, the server could not even accept a connection to refuse it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY or hard - _OTHER_FILES >= wanted:
        return wanted
    most = max(hard // 2, hard - _OTHER_FILES)
    if most < wanted:
        logging.getLogger(__name__).warning(
            "--max-connections %d: this process may open %d files (ulimit -n), so that there may be %d connections",
            wanted, hard, most,
        )  # fmt: skip
    return min(wanted, most)
