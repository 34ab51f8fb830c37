"""The routes under /v1, in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from halovae.serving import thumbnails
from halovae.serving.access import Dispatching, Front, authorized
from halovae.serving.answers import describe, file_of, find_job, preview_of
from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.requests import job_spec_for, pictures_of, reference_of
from halovae.serving.schemas import Asked, Deleted, EditRequest, ImageRequest, Images, Video, VideoList, VideoRequest
from halovae.serving.submission import fields_of, made_images, submitted

routes = APIRouter(prefix="/v1", dependencies=[Depends(authorized)])


def _body(schema: type[Asked]) -> dict[str, Any]:
    """Return the OpenAPI description of a body that the handler reads by itself."""
    fields = schema.model_json_schema()
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {kind: {"schema": fields} for kind in kinds}}}


@routes.get("/models")
async def models(front: Front) -> dict[str, Any]:
    """The list of models. It holds the one model that is served."""
    pipeline = front.pipeline
    model = {
        "id": front.name, "object": "model", "created": 0, "owned_by": "halovae", "pipeline": pipeline.name,
        "makes": "video" if pipeline.makes_video else "image", "pictures": [*pipeline.pictures],
        "multiple_of": pipeline.step,
    }  # fmt: skip
    return {"object": "list", "data": [model]}


@routes.post("/videos", response_model=Video, openapi_extra=_body(VideoRequest))
async def create_video(request: Request, dispatcher: Dispatching, front: Front) -> Video:
    """Start to make a video. Answers at once; poll the video until it is completed."""
    asked, uploads = await fields_of(request, front, VideoRequest)
    if not front.pipeline.makes_video:
        raise ApiError(400, f"{front.name} makes pictures: POST /v1/images/generations")
    images = await reference_of(front, asked, uploads.get("input_reference", []))
    job = await submitted(dispatcher, front, "video", job_spec_for(front, asked, images), images)
    return describe(dispatcher, job)


@routes.get("/videos", response_model=VideoList)
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


@routes.get("/videos/{video_id}", response_model=Video)
async def get_video(video_id: str, dispatcher: Dispatching) -> Video:
    """The status of a video."""
    return describe(dispatcher, find_job(dispatcher, video_id, "video"))


@routes.delete("/videos/{video_id}", response_model=Deleted)
async def delete_video(video_id: str, dispatcher: Dispatching) -> Deleted:
    """Delete a video. A running job is cancelled within a step."""
    await dispatcher.remove(find_job(dispatcher, video_id, "video"))
    return Deleted(id=video_id)


@routes.get("/videos/{video_id}/content", response_class=Response)
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


@routes.get("/videos/{video_id}/preview", response_class=Response)
async def video_preview(video_id: str, dispatcher: Dispatching) -> Response:
    """The latest preview of a running video job, as jpeg."""
    return preview_of(dispatcher, find_job(dispatcher, video_id, "video"))


@routes.post("/images/generations", response_model=Images, openapi_extra=_body(ImageRequest))
async def create_image(request: Request, dispatcher: Dispatching, front: Front) -> Images:
    """Make pictures. Answers when they are done."""
    asked, _ = await fields_of(request, front, ImageRequest)
    return await made_images(request, dispatcher, front, asked, ())


@routes.post("/images/edits", response_model=Images, openapi_extra=_body(EditRequest))
async def edit_image(request: Request, dispatcher: Dispatching, front: Front) -> Images:
    """Make pictures from other pictures. Answers when they are done."""
    asked, uploads = await fields_of(request, front, EditRequest)
    images = await pictures_of(front, uploads.get("image", []), "image")
    return await made_images(request, dispatcher, front, asked, images)


@routes.get("/images/{image_id}/content", response_class=Response)
async def image_content(
    image_id: str, dispatcher: Dispatching, index: Annotated[int, Query(ge=0, le=9)] = 0
) -> Response:
    """A picture, as PNG."""
    path = file_of(dispatcher, find_job(dispatcher, image_id, "image"), index)
    return Response(path.read_bytes(), media_type="image/png")


@routes.get("/images/{image_id}/preview", response_class=Response)
async def image_preview(image_id: str, dispatcher: Dispatching) -> Response:
    """The latest preview of a running picture job, as jpeg."""
    return preview_of(dispatcher, find_job(dispatcher, image_id, "image"))


@routes.delete("/images/{image_id}", include_in_schema=False)
async def delete_image(image_id: str, dispatcher: Dispatching) -> dict[str, Any]:
    """Delete pictures. The page uses this."""
    await dispatcher.remove(find_job(dispatcher, image_id, "image"))
    return {"id": image_id, "deleted": True}


@routes.get("/jobs", include_in_schema=False)
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
