"""The HTTP server. Asked to end, it first lets running jobs end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from halovae.serving import connections, operations
from halovae.serving.logs import RequestLog
from halovae.serving.settings import FrontSettings

log = logging.getLogger(__name__)
BACKLOG = 128  # connections that the system holds until they are accepted
_HEADER = 32 * 2**10  # bytes of a request's header
_MOST_ADMIN = 100  # connections of the admin port


def listening(host: str, port: int, options: str = "--host {} --port {}") -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        OSError: it cannot. The message names the options.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"{options.format(host, port)}: cannot listen ({error.strerror})") from error


class HttpServer(uvicorn.Server):
    """Serves an app whose `state.dispatcher` knows what is running, and `state.front` how to serve it.

    Args:
        app: the front.
        drain_timeout: seconds for which running jobs may go on once the server is asked to end.
        tell: shows a message to the person who asked.
        options: further options of `uvicorn.Config`.

    Raises:
        OSError: it cannot listen on the admin port.
    """

    def __init__(self, app: FastAPI, drain_timeout: float, tell: Callable[[str], object], **options: object) -> None:
        front: FrontSettings = app.state.front
        most = connections.most_connections(front.max_connections)
        connections.quiet()
        super().__init__(
            _config(
                RequestLog(app, app.state.metrics), most, ssl_certfile=front.ssl_certfile,
                ssl_keyfile=front.ssl_keyfile, root_path=front.root_path,
                forwarded_allow_ips=front.forwarded_allow_ips, **options,
            )
        )  # fmt: skip
        self._app, self._drain_timeout, self._tell = app, drain_timeout, tell
        self._draining: asyncio.Task[None] | None = None
        self._admin: _AdminServer | None = None
        if front.admin_port is not None:
            admin = RequestLog(operations.admin_app(app), app.state.metrics)
            self._admin = _AdminServer(_config(admin, _MOST_ADMIN, lifespan="off"))
            self._admin_socket = listening(front.admin_host, front.admin_port, "--admin-host {} --admin-port {}")

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the server has been asked to end and running jobs have ended."""
        self._loop = asyncio.get_running_loop()
        if self._admin is None:
            return await super().serve(sockets)
        serving = asyncio.create_task(self._admin.serve([self._admin_socket]))
        try:
            await super().serve(sockets)
        finally:
            self._admin.should_exit = True
            await serving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let waiting requests return, and end all connections."""
        self._app.state.dispatcher.end_streams()
        await super().shutdown(sockets)

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


class _AdminServer(uvicorn.Server):
    """Runs beside another server, which takes the signals."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def _config(app: ASGIApp, most: int, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration. Its logs go where those of this process go."""
    return uvicorn.Config(
        app, http=partial(connections.Connection, {}, most),  # type: ignore[arg-type]
        ws="none", backlog=BACKLOG, h11_max_incomplete_event_size=_HEADER, timeout_graceful_shutdown=3,
        server_header=False, access_log=False, log_config=None, log_level="warning", **options,
    )  # fmt: skip
