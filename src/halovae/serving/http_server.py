"""The HTTP server. Asked to end, it first lets running jobs end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

log = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """Serves an app whose `state.dispatcher` knows what is running.

    Args:
        app: the front.
        drain_timeout: seconds for which running jobs may go on once the server is asked to end.
        tell: shows a message to the person who asked.
        options: further options of `uvicorn.Config`.
    """

    def __init__(self, app: FastAPI, drain_timeout: float, tell: Callable[[str], object], **options: object) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, **options))  # type: ignore[arg-type]
        self._app, self._drain_timeout, self._tell = app, drain_timeout, tell
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the server has been asked to end and running jobs have ended."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take SIGINT and SIGTERM: the first lets running jobs end, a second one does not wait for them."""
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._draining is not None or not self.started:
            self.should_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        dispatcher = self._app.state.dispatcher
        if running := dispatcher.run_count:
            self._tell(
                f"ending: {running} running job(s) may take up to {self._drain_timeout:g} s (--drain-timeout); "
                "interrupt again to end now"
            )
        await dispatcher.drain(self._drain_timeout)
        self.should_exit = True
