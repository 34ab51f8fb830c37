"""The front: an HTTP server over a dispatcher."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from halovae import __version__
from halovae.serving import errors, operations, routes
from halovae.serving.answers import event_of
from halovae.serving.bodies import BodyLimit
from halovae.serving.dispatch import Dispatcher
from halovae.serving.guards import BodyDeadline, Heads, HostGuard
from halovae.serving.keys import Keys
from halovae.serving.metrics import Metrics
from halovae.serving.rates import Rates
from halovae.serving.replicas import Fleet, OneGroup
from halovae.serving.settings import FrontSettings, RankSettings
from halovae.serving.signatures import Signatures
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable
from halovae.serving.webhooks import Webhooks

log = logging.getLogger(__name__)
_URLS = {"http.url", "http.target", "url.full"}  # attributes of spans, by earlier and present conventions
_SWEEP = 30.0  # seconds between two sweeps for expired results
_EXPOSED = [
    "Retry-After",
    "X-Request-Id",
    *(f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")),
]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it.",
        401: "The key is missing or wrong.",
        403: "A page of another origin sent it.",
        404: "It does not exist.",
        408: "The body was not received in time.",
        413: "The body is too large.",
        421: "It calls the server by a name that is not trusted.",
        429: "The queue is full, or the caller has submitted too much.",
        503: "The jobs cannot be read or written at the moment, or other requests take all memory.",
        507: "The disk is full.",
    }.items()
}


def make_app(
    ranks: RankSettings, front: FrontSettings, fail: Callable[[str], object] = lambda reason: None,
    restart: Callable[[str, float], bool] = lambda reason, seconds: False, fleet: Fleet | None = None,
) -> FastAPI:  # fmt: skip
    """Make the server's front. It works with any ranks that connect to its endpoint.

    Args:
        ranks: the ranks' settings.
        front: the front's settings.
        fail: called with a reason when the front can no longer work. It must end the server.
        restart: ends all ranks that are older than some seconds, for a reason, so that others start. Returns whether it
            did.
        fleet: several groups of ranks; None for one, which `restart` ends.

    Raises:
        ValueError: the file of keys or the rate is not valid.
        OSError: the file of keys cannot be read.
    """
    metrics, keys = Metrics(), Keys(front.api_key, front.api_key_file)
    metrics.watch_disk(ranks.output)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = JobStore(ranks.output / "jobs.sqlite", front.webhook is not None)

        async def render(job_id: str) -> bytes:
            job = await jobs.read(JobTable.get, job_id)
            if job is None:
                return b"data: " + json.dumps({"id": job_id, "gone": True}).encode() + b"\n\n"
            return event_of(dispatcher, job)

        groups = fleet or OneGroup(ranks.output, restart)
        dispatcher = app.state.dispatcher = Dispatcher(jobs, ranks, front, metrics, groups, render)
        await dispatcher.start()
        tasks = app.state.tasks = [
            asyncio.create_task(dispatcher.run(), name="the dispatcher"),
            asyncio.create_task(dispatcher.events.run(), name="the event stream"),
            asyncio.create_task(_sweeping(dispatcher), name="the sweep of old results"),
        ]
        if front.webhook is not None:
            webhooks = Webhooks(jobs, front.webhook, metrics, dispatcher.events.ended)
            tasks.append(asyncio.create_task(webhooks.run(), name="the delivery of events"))
        for task in tasks:
            task.add_done_callback(partial(_ended_early, fail))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await dispatcher.close()
        jobs.close()

    app = FastAPI(
        title="halovae", version=__version__, lifespan=lifespan, responses=_ERRORS,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    # Requests pass the last one first.
    app.add_middleware(BodyLimit, most=front.limits.body, most_together=front.limits.body_memory)
    app.add_middleware(BodyDeadline)
    app.add_middleware(Heads)
    if front.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=front.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=_EXPOSED,
        )  # fmt: skip
    app.add_middleware(HostGuard, host=front.host, front=front, has_keys=bool(keys))
    app.state.metrics, app.state.front, app.state.keys = metrics, front, keys
    app.state.rates = None if front.limits.rate is None else Rates(front.limits.rate)
    app.state.signatures = Signatures(ranks.output)
    errors.install(app)
    operations.install(app, front, bool(keys))
    app.include_router(routes.routes)
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        _trace(app)
    return app


def _trace(app: FastAPI) -> None:
    """Send traces of requests to OpenTelemetry's collector. The SDK reads its address and all else from `OTEL_*`."""
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        processors = import_module("opentelemetry.sdk.trace.export")
        exporters = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        instrumentation = import_module("opentelemetry.instrumentation.fastapi")
    except ImportError as error:
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT: no traces are sent; pip install 'halovae[otel]' (%s)", error)
        return
    provider = sdk.TracerProvider()
    provider.add_span_processor(processors.BatchSpanProcessor(exporters.OTLPSpanExporter()))
    front: FrontSettings = app.state.front
    root = re.escape(front.root_path).replace(",", ".")  # a comma separates patterns
    instrumentation.FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        excluded_urls=rf"^[a-z]+://[^/]*({root})*/(livez|readyz|health|metrics)$",
        server_request_hook=_hide_query,
    )


def _hide_query(span: Any, scope: Mapping[str, Any]) -> None:
    """Remove the query from a request's span. It may hold a signature, which opens a result to its reader."""
    attributes = getattr(span, "attributes", None) or {}  # none if the span is not recorded
    for name in _URLS & attributes.keys():
        span.set_attribute(name, str(attributes[name]).partition("?")[0])
    if "url.query" in attributes:
        span.set_attribute("url.query", "")


async def _sweeping(dispatcher: Dispatcher) -> None:
    while True:
        try:
            await dispatcher.expire()
        except Exception:
            log.exception("old results could not be removed: the next try is in %g s", _SWEEP)
        await asyncio.sleep(_SWEEP)


def _ended_early(fail: Callable[[str], object], task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        error = task.exception()
        log.critical("%s ended: the server ends too", task.get_name(), exc_info=error)
        fail(f"{task.get_name()} ended ({error!r})")
