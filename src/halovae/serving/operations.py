"""Routes for operators, and the page for people."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from halovae.serving.access import Dispatching, front_of
from halovae.serving.jobs import Status
from halovae.serving.table import JobTable

routes = APIRouter()


@routes.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> str:
    """The page for people."""
    return files("halovae.serving").joinpath("page.html").read_text()


@routes.get("/health")
async def health(request: Request, dispatcher: Dispatching) -> JSONResponse:
    """200 while ranks are ready; 503 while they are starting."""
    statuses: tuple[Status, ...] = ("queued", "in_progress")
    jobs = {status: await dispatcher.jobs.read(JobTable.count, status) for status in statuses}
    body = {"status": "ready" if dispatcher.ready else "starting", "model": front_of(request).name, "jobs": jobs}
    return JSONResponse(body, 200 if dispatcher.ready else 503, None if dispatcher.ready else {"Retry-After": "5"})


@routes.get("/metrics")
async def metrics(request: Request, dispatcher: Dispatching) -> Response:
    """Metrics for Prometheus."""
    text = await request.app.state.metrics.text(dispatcher.jobs, dispatcher.ready)
    return Response(text, media_type="text/plain")
