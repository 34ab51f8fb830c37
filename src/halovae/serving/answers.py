"""What clients see of jobs."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.jobs import Job, Kind
from halovae.serving.schemas import Decode, Failure, Video


def found(dispatcher: Dispatcher, job_id: str, kind: Kind, param: str | None = None, status: int = 404) -> Job:
    """A job by its id; an error for the client if there is none of that kind."""
    job = dispatcher.jobs.get(job_id)
    if job is None or job.kind != kind:
        raise ApiError(status, f"there is no {kind} {ascii(job_id)[:80]}", param or f"{kind}_id", "not_found")
    return job


def file_of(dispatcher: Dispatcher, job: Job, index: int) -> Path:
    """The file of one of a job's results; an error for the client if there is none."""
    if job.status != "completed":
        # Not 409, which OpenAI's client would retry.
        raise ApiError(404, f"{job.id} is {job.status}: there is no content", code=f"{job.kind}_not_ready")
    if index >= len(job.files):
        raise ApiError(404, f"{job.id} holds {len(job.files)} results", "index", "not_found")
    path = dispatcher.paths(job)[index]
    if not path.is_file():
        raise ApiError(404, f"the file of {job.id} is gone", code="not_found")
    return path


def preview_of(dispatcher: Dispatcher, job: Job) -> Response:
    """A job's preview as JPEG; an error for the client if there is none."""
    drawn = dispatcher.preview(job)
    if drawn is None:
        message = f"{job.id} is {job.status}: it has a preview only while it is made, with preview_every"
        raise ApiError(404, message, code="no_preview")
    return Response(drawn.jpeg, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


def shown(dispatcher: Dispatcher, job: Job) -> Video:
    """A job as clients see it."""
    wish, done, preview = job.wish, job.status == "completed", dispatcher.preview(job)
    end = job.completed if job.ended else None
    expires = None if end is None else int(end + dispatcher.expire_after)
    error = Failure(code=job.error_code, message=job.error_message or "") if job.error_code else None
    return Video(
        id=job.id, object=job.kind, created_at=int(job.created), completed_at=None if end is None else int(end),
        expires_at=expires, model=job.model, status=job.status, progress=dispatcher.progress(job), prompt=wish.text,
        seconds=f"{wish.frames / wish.fps:g}", size=f"{wish.size[0]}x{wish.size[1]}", error=error,
        num_frames=wish.frames, fps=wish.fps, seed=wish.seed, n=wish.count, adjusted=wish.asked,
        inference_time_s=round(end - job.started, 3) if done and end and job.started else None,
        peak_memory_mb=job.report["peak_memory_mb"] if job.report else None,
        url=f"/v1/{job.kind}s/{job.id}/content" if done else None,
        file_path=str(dispatcher.paths(job)[0]) if done else None,
        preview=f"/v1/{job.kind}s/{job.id}/preview?done={preview.done}" if preview else None,
        decode=Decode(**job.report) if job.report else None,
    )  # fmt: skip
