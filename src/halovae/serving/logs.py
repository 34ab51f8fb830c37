"""Logs: their format, and the log of requests."""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Iterator
from traceback import TracebackException
from typing import Any, TextIO

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from halovae.serving.jobs import Job
from halovae.serving.metrics import Metrics
from halovae.serving.settings import LogFormat, LogLevel

_access, _audit = logging.getLogger("halovae.access"), logging.getLogger("halovae.audit")
_PROBES = ("/livez", "/readyz", "/health", "/metrics")  # asked every few seconds
_MOST_ID = 128  # characters of a request id
_GONE = 499  # the status of a request whose client left before the answer began


def configure(form: LogFormat, level: LogLevel = "info") -> None:
    """Write all logs of this process to standard error: as text, or as one JSON object on each line.

    Tracebacks hold no values of variables. Control characters are escaped, also in the messages of errors: no client
    can forge a line.

    Args:
        form: "text" or "json".
        level: the least that is written. Libraries' logs hold warnings and errors at most.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rest: list[Processor]
    if form == "json":
        rest = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        colors = sys.stderr.isatty()
        rest = [_printable, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_write_traceback)]
    handler = logging.StreamHandler()
    handler.setLevel(level.upper())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rest]
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("halovae").setLevel(level.upper())
    logging.captureWarnings(True)


def _printable(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Escape characters that a terminal would obey."""
    return {name: escaped(value) if isinstance(value, str) else value for name, value in event.items()}


def _write_traceback(out: TextIO, error: ExcInfo) -> None:
    out.write("\n" + "\n".join(_traceback(TracebackException(*error))))


def _traceback(error: TracebackException) -> Iterator[str]:
    """Yield the lines of a traceback. The message of each error is one line, escaped."""
    if error.__cause__ is not None:
        yield from _traceback(error.__cause__)
        yield "The above exception was the direct cause of the following exception:"
    elif error.__context__ is not None and not error.__suppress_context__:
        yield from _traceback(error.__context__)
        yield "During handling of the above exception, another exception occurred:"
    yield "Traceback (most recent call last):"
    yield from "".join(error.stack.format()).splitlines()
    yield escaped("".join(error.format_exception_only()).rstrip("\n"))
    for one in getattr(error, "exceptions", None) or ():  # of a group
        yield from (f"  {line}" for line in _traceback(one))


def escaped(text: str) -> str:
    """Return a text in which all characters that cannot be printed are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def queued(job: Job, prompts: bool) -> None:
    """Log that a job was queued; its prompt only with `prompts`."""
    spec, prompt = job.spec, {"prompt": job.spec.text, "negative_prompt": job.spec.negative} if prompts else {}
    size = f"{spec.size[0]}x{spec.size[1]}"
    facts = {"frames": spec.frames, "steps": spec.steps, "n": spec.count, "size": size, **prompt}
    _audit.info("queued", extra={"job": job.id, "key": job.owner, **facts})


class RequestLog:
    """Logs and measures requests, and gives each an id: the client's `X-Request-Id`, or a new one.

    The log has the path without the query, which may hold signatures. Deletions and cancellations get a line of their
    own. Probes that succeed are logged only at the level DEBUG.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, method, request_id = time.perf_counter(), scope["method"], _request_id(scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        answered: dict[str, Any] = {"status": _GONE, "bytes": 0}

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered["status"] = message["status"]
                self._metrics.answered(method, _route(scope), message["status"], time.perf_counter() - begin)
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            else:
                answered["bytes"] += len(message.get("body", b""))
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id), self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, noted)
            finally:
                seconds, client = round(time.perf_counter() - begin, 6), (scope.get("client") or ("",))[0]
                key = state.get("caller")
                probe = path in _PROBES and answered["status"] < 400
                facts = {"method": method, "path": path, **answered, "seconds": seconds}
                _access.log(
                    logging.DEBUG if probe else logging.INFO, "request", extra={**facts, "key": key, "client": client}
                )
                _log_change(scope, method, answered["status"], key, client)


def _log_change(scope: Scope, method: str, status: int, key: str | None, client: str) -> None:
    """Log a deletion or cancellation that succeeded."""
    names = scope.get("path_params") or {}
    job = names.get("video_id") or names.get("image_id")
    change = "deleted" if method == "DELETE" else "cancelled" if _route(scope).endswith("/cancel") else None
    if job is not None and change is not None and status < 300:
        _audit.info(change, extra={"job": job, "key": key, "client": client})


def _route(scope: Scope) -> str:
    """Return the route's template: ids in paths would make too many series."""
    return getattr(scope.get("route"), "path", None) or "other"


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= _MOST_ID and value.isascii() and value.decode().isprintable():
            return str(value.decode())
    return uuid.uuid4().hex
