"""Routes for operators, the API's description, and the page for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.params import Depends as Dependency
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.staticfiles import StaticFiles

from halovae.serving import errors
from halovae.serving.access import Dispatching, authorized, front_of, key_name
from halovae.serving.guards import Heads, HostGuard
from halovae.serving.jobs import Status
from halovae.serving.replicas import Replica
from halovae.serving.settings import FrontSettings
from halovae.serving.table import JobTable

_probes, _figures, _descriptions = APIRouter(), APIRouter(), APIRouter()
_PAGE = StaticFiles(packages=[("halovae.serving", "page")])
_SWAGGER = "/docs/files"  # FastAPI's own page would load them from the internet


@_probes.get("/livez", include_in_schema=False)
async def livez(request: Request) -> JSONResponse:
    """200 while the front works, whatever the ranks do."""
    tasks = getattr(request.app.state, "tasks", ())
    ended = next((task.get_name() for task in tasks if task.done()), None)
    if not tasks or ended:
        return JSONResponse({"status": f"{ended} ended" if ended else "starting"}, 503, {"Retry-After": "5"})
    return JSONResponse({"status": "alive"})


@_probes.get("/readyz", include_in_schema=False)
async def readyz(request: Request) -> JSONResponse:
    """200 while ranks are ready and the server is not ending."""
    dispatcher = getattr(request.app.state, "dispatcher", None)
    if dispatcher is not None and dispatcher.ready:
        return JSONResponse({"status": "ready"})
    ending = dispatcher is not None and dispatcher.draining
    reason = "the server is ending" if ending else "the ranks are starting"
    return JSONResponse({"status": reason}, 503, {"Retry-After": "10" if ending else "5"})


@_probes.get("/health")
async def health(
    request: Request, dispatcher: Dispatching, name: Annotated[str | None, Depends(key_name)]
) -> JSONResponse:
    """200 while ranks are ready; 503 while they are starting. With keys, only their holders see the rest.

    That is the model, the jobs, and the replicas.
    """
    body: dict[str, Any] = {"status": "ready" if dispatcher.ready else "starting"}
    on_admin_port = request.app is not request.app.state.described
    if request.app.state.shows_details or on_admin_port or name is not None:
        statuses: tuple[Status, ...] = ("queued", "in_progress")
        body["model"] = front_of(request).name
        body["jobs"] = {status: await dispatcher.jobs.read(JobTable.count, status) for status in statuses}
        if dispatcher.fleet.elastic:
            replicas = sorted(dispatcher.fleet.replicas.values(), key=lambda replica: int(replica.name))
            body["replicas"] = [_describe(replica, dispatcher.loads()[replica.name]) for replica in replicas]
    return JSONResponse(body, 200 if dispatcher.ready else 503, None if dispatcher.ready else {"Retry-After": "5"})


def _describe(replica: Replica, jobs: int) -> dict[str, Any]:
    """A replica for operators. `seconds`: for how long it has been in its state; `jobs`: how many it has."""
    return {
        "name": replica.name, "state": replica.shown, "host": replica.host, "jobs": jobs,
        "completed": replica.completed, "restarts": replica.restarts,
        "seconds": round(time.monotonic() - replica.changed), "reason": replica.reason,
    }  # fmt: skip


@_figures.get("/metrics")
async def metrics(request: Request, dispatcher: Dispatching) -> Response:
    """Metrics for Prometheus."""
    text = await request.app.state.metrics.text(
        dispatcher.jobs, dispatcher.ready, dispatcher.fleet.replicas, dispatcher.loads()
    )
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@_descriptions.get("/openapi.json", include_in_schema=False)
async def description(request: Request) -> JSONResponse:
    """The description of the API. On the admin port, it names the port of the API."""
    described: FastAPI = request.app.state.described
    schema, root = described.openapi(), request.scope.get("root_path", "")
    if request.app is not described:
        root = front_of(request).url(request.url.hostname or "localhost")
        text = f"Requests go to another port than this page's: {root}"
        schema = {**schema, "info": {**schema["info"], "description": text}}
    return JSONResponse({**schema, "servers": [{"url": root}]} if root else schema)


@_descriptions.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """The description of the API for people. A key can be entered there.

    On the admin port, requests cannot be tried out: browsers refuse them to the port of the API.
    """
    root = request.scope.get("root_path", "")
    parameters: dict[str, Any] = {"persistAuthorization": True}
    if request.app is not request.app.state.described:
        parameters["supportedSubmitMethods"] = []
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json", title="halovae",
        swagger_js_url=f"{root}{_SWAGGER}/swagger-ui-bundle.js", swagger_css_url=f"{root}{_SWAGGER}/swagger-ui.css",
        swagger_favicon_url="data:,", swagger_ui_parameters=parameters,
    )  # fmt: skip


async def _page() -> FileResponse:
    path, _ = _PAGE.lookup_path("index.html")
    return FileResponse(path)


def install(app: FastAPI, front: FrontSettings, has_keys: bool) -> None:
    """Add the page and the routes for operators to the app.

    With an admin port, only the probes are here, and `/health` tells nobody without a key about jobs.
    """
    app.state.described, app.state.shows_details = app, not has_keys and front.admin_port is None
    app.add_api_route("/", _page, include_in_schema=False, response_class=FileResponse)
    app.mount("/page", _PAGE, name="page")
    app.include_router(_probes)
    if front.admin_port is None:
        _install_private(app, [Depends(authorized)] if front.private_endpoints else [])


def admin_app(app: FastAPI) -> FastAPI:
    """Return the app of the admin port. It shares the state of the front's app, and requires no key."""
    admin = FastAPI(title="halovae", docs_url=None, redoc_url=None, openapi_url=None)
    admin.state = app.state
    errors.install(admin)
    admin.add_middleware(Heads)
    front: FrontSettings = app.state.front
    admin.add_middleware(HostGuard, host=front.admin_host, front=front, has_keys=False)
    admin.include_router(_probes)
    _install_private(admin, [])
    return admin


def _install_private(app: FastAPI, dependencies: Sequence[Dependency]) -> None:
    app.include_router(_figures, dependencies=dependencies)
    app.include_router(_descriptions, dependencies=dependencies)
    app.mount(_SWAGGER, StaticFiles(packages=[("fastapi_offline", "static")]), name="swagger")
