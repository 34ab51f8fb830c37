"""Jobs, their files and previews as clients see them."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.jobs import Job, Kind
from halovae.serving.schemas import Decode, Failure, Video
from halovae.serving.table import JobTable


async def find_job(
    dispatcher: Dispatcher, owner: str | None, job_id: str, kind: Kind, param: str | None = None, status: int = 404
) -> Job:
    """Return the owner's job of this id and kind.

    Raises:
        ApiError: there is no such job.
    """
    job = await dispatcher.jobs.read(JobTable.get, job_id)
    if job is None or job.kind != kind or job.owner != owner:
        raise ApiError(status, f"there is no {kind} {ascii(job_id)[:80]}", param or f"{kind}_id", "not_found")
    return job


def file_of(dispatcher: Dispatcher, job: Job, index: int) -> Path:
    """Return the path of one result of a job.

    Raises:
        ApiError: there is no such file.
    """
    if job.status != "completed":
        # Not 409: OpenAI's client would retry.
        raise ApiError(404, f"{job.id} is {job.status}: there is no content", code=f"{job.kind}_not_ready")
    if index >= len(job.files):
        raise ApiError(404, f"{job.id} holds {len(job.files)} results", "index", "not_found")
    path = dispatcher.paths(job)[index]
    if not path.is_file():
        raise ApiError(404, f"the file of {job.id} is gone", code="not_found")
    return path


def preview_of(dispatcher: Dispatcher, job: Job) -> Response:
    """Return a job's preview as JPEG.

    Raises:
        ApiError: there is none.
    """
    preview = dispatcher.preview(job)
    if preview is None:
        message = f"{job.id} is {job.status}: it has a preview only while it is running, with preview_every"
        raise ApiError(404, message, code="no_preview")
    return Response(preview.jpeg, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


def describe(dispatcher: Dispatcher, job: Job) -> Video:
    """Return a job as clients see it."""
    spec, done, attempt = job.spec, job.status == "completed", None if job.ended else dispatcher.running(job)
    preview = None if attempt is None else attempt.preview
    end = job.completed if job.ended else None
    expires = None if end is None else int(end + dispatcher.expire_after)
    error = Failure(code=job.error_code, message=job.error_message or "") if job.error_code else None
    return Video(
        id=job.id, object=job.kind, created_at=int(job.created), completed_at=None if end is None else int(end),
        expires_at=expires, model=job.model, status=job.status,
        progress=100 if done else 0 if attempt is None else attempt.percent,
        prompt=spec.text,
        stage=None if attempt is None else attempt.stage, steps=spec.steps * spec.count,
        step=attempt.done if attempt is not None and attempt.stage == "denoising" else None,
        eta_seconds=None if attempt is None else dispatcher.progress.left(attempt),
        seconds=f"{spec.frames / spec.fps:g}", size=f"{spec.size[0]}x{spec.size[1]}", error=error,
        num_frames=spec.frames, fps=spec.fps, seed=spec.seed, n=spec.count, adjusted=spec.asked,
        inference_time_s=round(end - job.started, 3) if done and end and job.started else None,
        peak_memory_mb=job.report["peak_memory_mb"] if job.report else None,
        url=f"/v1/{job.kind}s/{job.id}/content" if done else None,
        file_path=f"results/{job.names()[0]}" if done else None,
        preview=f"/v1/{job.kind}s/{job.id}/preview?done={preview.done}" if preview else None,
        decode=Decode(**job.report) if job.report else None,
    )  # fmt: skip


def event_of(dispatcher: Dispatcher, job: Job) -> bytes:
    """Return a job as a server-sent event."""
    return b"data: " + describe(dispatcher, job).model_dump_json().encode() + b"\n\n"
