"""The front: an HTTP server over a dispatcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI

from halovae import __version__
from halovae.serving import errors, operations, routes
from halovae.serving.dispatch import Dispatcher
from halovae.serving.jobs import Jobs
from halovae.serving.metrics import Metrics
from halovae.serving.requests import BodyLimit
from halovae.serving.settings import FrontSettings, RankSettings

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


def make_app(ranks: RankSettings, front: FrontSettings, fail: Callable[[str], object] = lambda reason: None) -> FastAPI:
    """Make the server's front. It works with any ranks that connect to its endpoint.

    `fail` is called with a reason when the front can no longer work. It must end the server.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = Jobs(ranks.output / "jobs.sqlite")
        dispatcher = app.state.dispatcher = Dispatcher(jobs, ranks, front, metrics)
        tasks = [
            asyncio.create_task(dispatcher.run(), name="the dispatcher"),
            asyncio.create_task(_sweeping(dispatcher), name="the sweep of old results"),
        ]
        for task in tasks:
            task.add_done_callback(partial(_ended_early, fail))
        yield
        for task in tasks:
            task.cancel()
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
            dispatcher.expire()
        except Exception:
            log.exception("old results could not be removed: the next try is in %g s", _SWEEP)
        await asyncio.sleep(_SWEEP)


def _ended_early(fail: Callable[[str], object], task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        error = task.exception()
        log.critical("%s ended: the server ends too", task.get_name(), exc_info=error)
        fail(f"{task.get_name()} ended ({error!r})")
