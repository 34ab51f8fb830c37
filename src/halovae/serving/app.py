"""The front: an HTTP server over a dispatcher."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI

from halovae import __version__
from halovae.serving import errors, operations, routes
from halovae.serving.answers import event_of
from halovae.serving.dispatch import Dispatcher
from halovae.serving.metrics import Metrics
from halovae.serving.requests import BodyLimit
from halovae.serving.settings import FrontSettings, RankSettings
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

log = logging.getLogger(__name__)
_SWEEP = 30.0  # seconds between two sweeps for expired results
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it.",
        401: "The key is missing or wrong.",
        404: "It does not exist.",
        413: "The body is too large.",
        429: "The queue is full.",
        503: "The jobs cannot be read or written at the moment.",
        507: "The disk is full.",
    }.items()
}


def make_app(
    ranks: RankSettings, front: FrontSettings, fail: Callable[[str], object] = lambda reason: None,
    restart: Callable[[str], object] = lambda reason: None,
) -> FastAPI:  # fmt: skip
    """Make the server's front. It works with any ranks that connect to its endpoint.

    Args:
        ranks: the ranks' settings.
        front: the front's settings.
        fail: called with a reason when the front can no longer work. It must end the server.
        restart: called with a reason when the ranks must end, so that others start.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = JobStore(ranks.output / "jobs.sqlite")

        async def render(job_id: str) -> bytes:
            job = await jobs.read(JobTable.get, job_id)
            if job is None:
                return b"data: " + json.dumps({"id": job_id, "gone": True}).encode() + b"\n\n"
            return event_of(dispatcher, job)

        dispatcher = app.state.dispatcher = Dispatcher(jobs, ranks, front, metrics, restart, render)
        await dispatcher.start()
        tasks = [
            asyncio.create_task(dispatcher.run(), name="the dispatcher"),
            asyncio.create_task(dispatcher.events.run(), name="the event stream"),
            asyncio.create_task(_sweeping(dispatcher), name="the sweep of old results"),
        ]
        for task in tasks:
            task.add_done_callback(partial(_ended_early, fail))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await dispatcher.close()
        jobs.close()

    app = FastAPI(title="halovae", version=__version__, lifespan=lifespan, responses=_ERRORS)
    app.add_middleware(BodyLimit, most=front.limits.body)
    app.state.metrics, app.state.front = metrics, front
    errors.install(app)
    app.include_router(operations.routes)
    app.include_router(routes.routes)
    return app


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
