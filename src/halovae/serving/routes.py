"""The routes under /v1, in OpenAI's format."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from halovae.serving import thumbnails
from halovae.serving.access import Caller, Dispatching, Front, authorized, rated
from halovae.serving.answers import describe, event_of, file_of, find_job, preview_of
from halovae.serving.bodies import held_by
from halovae.serving.errors import ApiError
from halovae.serving.events import TooManyListeners
from halovae.serving.requests import job_spec_for, pictures_of, reference_of
from halovae.serving.schemas import Asked, Deleted, EditRequest, ImageRequest, Images, Video, VideoList, VideoRequest
from halovae.serving.submission import fields_of, made_images, submitted
from halovae.serving.table import JobTable

routes = APIRouter(prefix="/v1", dependencies=[Depends(authorized)])
_RATED = [Depends(rated)]  # of submissions


def _body(schema: type[Asked]) -> dict[str, Any]:
    """Return the OpenAPI description of a body that the handler reads by itself."""
    fields = schema.model_json_schema()
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {kind: {"schema": fields} for kind in kinds}}}


@routes.get("/models")
async def models(front: Front) -> dict[str, Any]:
    """The list of models. It holds the one model that is served."""
    pipeline = front.pipeline
    width, height = pipeline.family.size
    model = {
        "id": front.name, "object": "model", "created": 0, "owned_by": "halovae", "pipeline": pipeline.name,
        "makes": "video" if pipeline.makes_video else "image", "pictures": [*pipeline.pictures],
        "multiple_of": pipeline.step,
        "defaults": {
            "size": f"{width}x{height}", "num_frames": pipeline.family.frames, "fps": pipeline.fps,
            "num_inference_steps": Asked.model_fields["num_inference_steps"].default,
        },
    }  # fmt: skip
    return {"object": "list", "data": [model]}


@routes.post("/videos", response_model=Video, openapi_extra=_body(VideoRequest), dependencies=_RATED)
async def create_video(request: Request, dispatcher: Dispatching, front: Front, caller: Caller) -> Video:
    """Start to make a video. Answers at once; poll the video until it is completed."""
    asked, uploads = await fields_of(request, front, VideoRequest)
    images = await reference_of(front, asked, uploads.get("input_reference", []), held_by(request))
    job = await submitted(request, dispatcher, front, caller, "video", job_spec_for(front, asked, images), images)
    return describe(dispatcher, job)


@routes.get("/videos", response_model=VideoList)
async def list_videos(
    dispatcher: Dispatching,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> VideoList:
    """List the videos, by default the newest first."""
    start = None if after is None else await find_job(dispatcher, caller, after, "video", "after", 400)
    jobs = await dispatcher.jobs.read(JobTable.page, "video", limit + 1, order == "desc", start, caller)
    data = [describe(dispatcher, job) for job in jobs[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > limit)


@routes.get("/videos/{video_id}", response_model=Video)
async def get_video(video_id: str, dispatcher: Dispatching, caller: Caller) -> Video:
    """The status of a video."""
    return describe(dispatcher, await find_job(dispatcher, caller, video_id, "video"))


@routes.delete("/videos/{video_id}", response_model=Deleted)
async def delete_video(video_id: str, dispatcher: Dispatching, caller: Caller) -> Deleted:
    """Delete a video. A running job is cancelled within a step."""
    await dispatcher.remove(await find_job(dispatcher, caller, video_id, "video"))
    return Deleted(id=video_id)


@routes.post("/videos/{video_id}/cancel", response_model=Video)
async def cancel_video(video_id: str, dispatcher: Dispatching, caller: Caller) -> Video:
    """Cancel a video that has not ended. It stays, as failed with the code `cancelled`."""
    await dispatcher.cancel(await find_job(dispatcher, caller, video_id, "video"))
    return describe(dispatcher, await find_job(dispatcher, caller, video_id, "video"))


@routes.get("/videos/{video_id}/content", response_class=Response)
async def video_content(
    video_id: str,
    dispatcher: Dispatching,
    caller: Caller,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    index: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """The video, its first frame as webp, or a sheet of its frames as jpeg."""
    path = file_of(dispatcher, await find_job(dispatcher, caller, video_id, "video"), index)
    if variant == "video":
        return FileResponse(path, media_type="video/mp4", filename=path.name)
    kind = "webp" if variant == "thumbnail" else "jpeg"
    return Response(await thumbnails.drawn(path, variant), media_type=f"image/{kind}")


@routes.get("/videos/{video_id}/preview", response_class=Response)
async def video_preview(video_id: str, dispatcher: Dispatching, caller: Caller) -> Response:
    """The latest preview of a running video job, as jpeg."""
    return preview_of(dispatcher, await find_job(dispatcher, caller, video_id, "video"))


@routes.post("/images/generations", response_model=Images, openapi_extra=_body(ImageRequest), dependencies=_RATED)
async def create_image(request: Request, dispatcher: Dispatching, front: Front, caller: Caller) -> Images:
    """Make pictures. Answers when they are done."""
    asked, _ = await fields_of(request, front, ImageRequest)
    return await made_images(request, dispatcher, front, caller, asked, ())


@routes.post("/images/edits", response_model=Images, openapi_extra=_body(EditRequest), dependencies=_RATED)
async def edit_image(request: Request, dispatcher: Dispatching, front: Front, caller: Caller) -> Images:
    """Make pictures from other pictures. Answers when they are done."""
    asked, uploads = await fields_of(request, front, EditRequest)
    images = await pictures_of(front, uploads.get("image", []), "image", held_by(request))
    return await made_images(request, dispatcher, front, caller, asked, images)


@routes.get("/images/{image_id}/content", response_class=Response)
async def image_content(
    image_id: str, dispatcher: Dispatching, caller: Caller, index: Annotated[int, Query(ge=0)] = 0
) -> Response:
    """A picture, as PNG."""
    path = file_of(dispatcher, await find_job(dispatcher, caller, image_id, "image"), index)
    return FileResponse(path, media_type="image/png")


@routes.get("/images/{image_id}/preview", response_class=Response)
async def image_preview(image_id: str, dispatcher: Dispatching, caller: Caller) -> Response:
    """The latest preview of a running picture job, as jpeg."""
    return preview_of(dispatcher, await find_job(dispatcher, caller, image_id, "image"))


@routes.delete("/images/{image_id}", include_in_schema=False)
async def delete_image(image_id: str, dispatcher: Dispatching, caller: Caller) -> dict[str, Any]:
    """Delete pictures. The page uses this."""
    await dispatcher.remove(await find_job(dispatcher, caller, image_id, "image"))
    return {"id": image_id, "deleted": True}


@routes.get("/jobs", include_in_schema=False)
async def jobs(dispatcher: Dispatching, caller: Caller) -> StreamingResponse:
    """Stream the latest jobs, then each job that changes, as server-sent events. The page uses this."""

    try:
        with ExitStack() as stack:
            changes = stack.enter_context(dispatcher.events.listening(caller))
            latest = await dispatcher.jobs.read(JobTable.page, None, 50, owner=caller)
            stack = stack.pop_all()
    except TooManyListeners as many:
        raise ApiError(429, "too many listeners are connected", headers={"Retry-After": "30"}) from many

    async def events() -> AsyncIterator[bytes]:
        with stack:
            for job in reversed(latest):
                yield event_of(dispatcher, job)
            async for event in changes:
                yield event

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
