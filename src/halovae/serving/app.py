"""The front's HTTP routes."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from halovae import __version__
from halovae.serving import errors, pictures, thumbnails
from halovae.serving.answers import describe, file_of, find_job, preview_of
from halovae.serving.dispatch import Dispatcher, QueueFull
from halovae.serving.errors import ApiError
from halovae.serving.jobs import Job, Jobs, JobSpec, Kind
from halovae.serving.metrics import Metrics
from halovae.serving.requests import BodyLimit, job_spec_for, pictures_of, read, reference_of
from halovae.serving.schemas import (
    Asked,
    Deleted,
    EditRequest,
    ImageData,
    ImageRequest,
    Images,
    Video,
    VideoList,
    VideoRequest,
)  # fmt: skip
from halovae.serving.settings import FrontSettings, RankSettings

log = logging.getLogger(__name__)
_SWEEP = 30.0  # seconds between two sweeps for expired results
_PAUSE = 0.5  # seconds until the removal of a job is tried again
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
    app.add_middleware(BodyLimit, most=front.max_body)
    app.state.metrics, app.state.front = metrics, front
    errors.install(app)
    app.include_router(_open)
    app.include_router(_api)
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


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def _front(request: Request) -> FrontSettings:
    front: FrontSettings = request.app.state.front
    return front


async def _authorized(request: Request) -> None:
    key = _front(request).api_key
    if key is None:
        return
    sent = request.headers.get("authorization", "").encode("latin-1").removeprefix(b"Bearer ")
    if not hmac.compare_digest(sent, key.encode()):
        raise ApiError(401, "the key is missing or wrong: send 'Authorization: Bearer KEY'", code="invalid_api_key")


Dispatching = Annotated[Dispatcher, Depends(_dispatcher)]
Front = Annotated[FrontSettings, Depends(_front)]
_open = APIRouter()
_api = APIRouter(prefix="/v1", dependencies=[Depends(_authorized)])


def _body(schema: type[Asked]) -> dict[str, Any]:
    """Return the OpenAPI description of a body that the handler reads by itself."""
    fields = schema.model_json_schema()
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {kind: {"schema": fields} for kind in kinds}}}


@_open.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> str:
    """The page for people."""
    return files("halovae.serving").joinpath("page.html").read_text()


@_open.get("/health")
async def health(request: Request, dispatcher: Dispatching) -> JSONResponse:
    """200 while ranks are ready; 503 while they are starting."""
    jobs = {status: dispatcher.jobs.count(status) for status in ("queued", "in_progress")}
    body = {"status": "ready" if dispatcher.ready else "starting", "model": _front(request).name, "jobs": jobs}
    return JSONResponse(body, 200 if dispatcher.ready else 503, None if dispatcher.ready else {"Retry-After": "5"})


@_open.get("/metrics")
async def metrics(request: Request, dispatcher: Dispatching) -> Response:
    """Metrics for Prometheus."""
    return Response(request.app.state.metrics.text(dispatcher.jobs, dispatcher.ready), media_type="text/plain")


@_api.get("/models")
async def models(front: Front) -> dict[str, Any]:
    """The list of models. It holds the one model that is served."""
    pipeline = front.pipeline
    model = {
        "id": front.name, "object": "model", "created": 0, "owned_by": "halovae", "pipeline": pipeline.name,
        "makes": "video" if pipeline.makes_video else "image", "pictures": [*pipeline.pictures],
        "multiple_of": pipeline.step,
    }  # fmt: skip
    return {"object": "list", "data": [model]}


@_api.post("/videos", response_model=Video, openapi_extra=_body(VideoRequest))
async def create_video(request: Request, dispatcher: Dispatching, front: Front) -> Video:
    """Start to make a video. Answers at once; poll the video until it is completed."""
    asked, uploads = await _read(request, VideoRequest)
    if not front.pipeline.makes_video:
        raise ApiError(400, f"{front.name} makes pictures: POST /v1/images/generations")
    images = await reference_of(asked, uploads.get("input_reference", []), front.allow_url_inputs, front.max_body)
    job = await _submitted(dispatcher, front, "video", job_spec_for(front.pipeline, asked, images), images)
    return describe(dispatcher, job)


@_api.get("/videos", response_model=VideoList)
async def list_videos(
    dispatcher: Dispatching,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> VideoList:
    """List the videos, by default the newest first."""
    start = None if after is None else find_job(dispatcher, after, "video", "after", 400)
    jobs = dispatcher.jobs.page("video", limit + 1, order == "desc", start)
    data = [describe(dispatcher, job) for job in jobs[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > limit)


@_api.get("/videos/{video_id}", response_model=Video)
async def get_video(video_id: str, dispatcher: Dispatching) -> Video:
    """The status of a video."""
    return describe(dispatcher, find_job(dispatcher, video_id, "video"))


@_api.delete("/videos/{video_id}", response_model=Deleted)
async def delete_video(video_id: str, dispatcher: Dispatching) -> Deleted:
    """Delete a video. A running job is cancelled within a step."""
    await dispatcher.remove(find_job(dispatcher, video_id, "video"))
    return Deleted(id=video_id)


@_api.get("/videos/{video_id}/content", response_class=Response)
async def video_content(
    video_id: str,
    dispatcher: Dispatching,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    index: Annotated[int, Query(ge=0, le=9)] = 0,
) -> Response:
    """The video, its first frame as webp, or a sheet of its frames as jpeg."""
    path = file_of(dispatcher, find_job(dispatcher, video_id, "video"), index)
    if variant == "video":
        return FileResponse(path, media_type="video/mp4", filename=path.name)
    draw, kind = {"thumbnail": (thumbnails.thumbnail, "webp"), "spritesheet": (thumbnails.spritesheet, "jpeg")}[variant]
    return Response(await anyio.to_thread.run_sync(draw, path), media_type=f"image/{kind}")


@_api.get("/videos/{video_id}/preview", response_class=Response)
async def video_preview(video_id: str, dispatcher: Dispatching) -> Response:
    """The latest preview of a running video job, as jpeg."""
    return preview_of(dispatcher, find_job(dispatcher, video_id, "video"))


@_api.post("/images/generations", response_model=Images, openapi_extra=_body(ImageRequest))
async def create_image(request: Request, dispatcher: Dispatching, front: Front) -> Images:
    """Make pictures. Answers when they are done."""
    asked, _ = await _read(request, ImageRequest)
    return await _made(request, dispatcher, front, asked, ())


@_api.post("/images/edits", response_model=Images, openapi_extra=_body(EditRequest))
async def edit_image(request: Request, dispatcher: Dispatching, front: Front) -> Images:
    """Make pictures from other pictures. Answers when they are done."""
    asked, uploads = await _read(request, EditRequest)
    images = await pictures_of(uploads.get("image", []), "image")
    return await _made(request, dispatcher, front, asked, images)


@_api.get("/images/{image_id}/content", response_class=Response)
async def image_content(
    image_id: str, dispatcher: Dispatching, index: Annotated[int, Query(ge=0, le=9)] = 0
) -> Response:
    """A picture, as PNG."""
    path = file_of(dispatcher, find_job(dispatcher, image_id, "image"), index)
    return Response(path.read_bytes(), media_type="image/png")


@_api.get("/images/{image_id}/preview", response_class=Response)
async def image_preview(image_id: str, dispatcher: Dispatching) -> Response:
    """The latest preview of a running picture job, as jpeg."""
    return preview_of(dispatcher, find_job(dispatcher, image_id, "image"))


@_api.delete("/images/{image_id}", include_in_schema=False)
async def delete_image(image_id: str, dispatcher: Dispatching) -> dict[str, Any]:
    """Delete pictures. The page uses this."""
    await dispatcher.remove(find_job(dispatcher, image_id, "image"))
    return {"id": image_id, "deleted": True}


@_api.get("/jobs", include_in_schema=False)
async def jobs(dispatcher: Dispatching) -> StreamingResponse:
    """Stream the latest jobs, then each job that changes, as server-sent events. The page uses this."""

    async def events() -> AsyncIterator[str]:
        with dispatcher.listening() as listener:
            for job in reversed(dispatcher.jobs.page(None, 50)):
                yield _event(dispatcher, job.id)
            while True:
                try:
                    changed = await asyncio.wait_for(listener.get(), 15)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
                    continue
                if changed is None:
                    return
                yield _event(dispatcher, changed.id)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(dispatcher: Dispatcher, job_id: str) -> str:
    job = dispatcher.jobs.get(job_id)
    data = {"id": job_id, "gone": True} if job is None else describe(dispatcher, job).model_dump()
    return f"data: {json.dumps(data)}\n\n"


async def _read(request: Request, schema: Any) -> Any:
    try:
        return await read(request, schema)
    except ClientDisconnect as gone:
        raise ApiError(400, "the client disconnected before the body was complete") from gone


async def _submitted(
    dispatcher: Dispatcher, front: FrontSettings, kind: Kind, spec: JobSpec, images: Sequence[bytes]
) -> Job:
    job = Job.new(kind, front.name, spec)
    paths = [dispatcher.inputs / f"{job.id}-{index}.png" for index in range(len(images))]
    job.spec = replace(spec, images=tuple(map(str, paths)))
    try:
        for path, data in zip(paths, images, strict=True):
            path.write_bytes(data)
        await dispatcher.submit(job)
    except (QueueFull, OSError, sqlite3.OperationalError) as refused:
        for path in paths:
            path.unlink(missing_ok=True)
        if isinstance(refused, sqlite3.OperationalError):
            raise
        if isinstance(refused, OSError):
            raise ApiError(507, f"the picture cannot be kept: {refused.strerror}", code="disk_full") from refused
        message = f"{front.max_queue} jobs are already waiting (--max-queue)"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "10"}) from refused
    return job


async def _made(
    request: Request, dispatcher: Dispatcher, front: FrontSettings, asked: ImageRequest, images: Sequence[bytes]
) -> Images:
    """Answer a request for pictures once they are done. If the client disconnects, its job is removed."""
    if front.pipeline.makes_video:
        raise ApiError(400, f"{front.name} makes videos: POST /v1/videos")
    job = await _submitted(dispatcher, front, "image", job_spec_for(front.pipeline, asked, images), images)
    waiting = asyncio.create_task(_ended(dispatcher, job))
    while not waiting.done():
        await asyncio.wait([waiting], timeout=0.5)
        if not waiting.done() and await request.is_disconnected():
            waiting.cancel()
            await _removed(dispatcher, job)
            raise ApiError(400, "the client disconnected before its pictures were done")
    await waiting
    done = dispatcher.jobs.get(job.id)
    if done is None or not done.ended:
        raise ApiError(
            503, "the job was deleted, or the server is ending", code="cancelled", headers={"Retry-After": "10"}
        )
    made = describe(dispatcher, done)
    if made.error is not None:
        raise ApiError(500, made.error.message, code=made.error.code)
    if asked.response_format == "url":
        base = str(request.base_url).rstrip("/")
        data = [ImageData(url=f"{base}/v1/images/{done.id}/content?index={index}") for index in range(asked.n)]
    else:
        data = [
            ImageData(
                b64_json=base64.b64encode(
                    await anyio.to_thread.run_sync(
                        pictures.converted, path.read_bytes(), asked.output_format, asked.output_compression
                    )
                ).decode()
            )
            for path in dispatcher.paths(done)
        ]
    return Images(
        created=made.created_at, data=data, size=made.size, output_format=asked.output_format, seed=made.seed,
        adjusted=made.adjusted, inference_time_s=made.inference_time_s, decode=made.decode,
    )  # fmt: skip


async def _removed(dispatcher: Dispatcher, job: Job) -> None:
    """Remove a job whose client has left, as soon as the database can be written."""
    while True:
        try:
            return await dispatcher.remove(job)
        except sqlite3.OperationalError:
            await asyncio.sleep(_PAUSE)


async def _ended(dispatcher: Dispatcher, job: Job) -> None:
    async for _ in dispatcher.changes(job):
        pass
