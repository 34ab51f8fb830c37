"""How requests become jobs, and how a request for pictures waits for its job."""

from __future__ import annotations

import asyncio
import base64
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from halovae.serving import logs, pictures
from halovae.serving.answers import describe
from halovae.serving.bodies import held_by
from halovae.serving.dispatch import Dispatcher, Draining
from halovae.serving.errors import ApiError
from halovae.serving.jobs import Job, JobSpec, Kind
from halovae.serving.requests import job_spec_for, read
from halovae.serving.results import drop_inputs
from halovae.serving.schemas import Asked, ImageData, ImageRequest, Images, VideoRequest
from halovae.serving.settings import FrontSettings
from halovae.serving.table import JobTable, QueueFull

_KEY_CHARACTERS = 255  # of an idempotency key
_PAUSE = 0.5  # seconds until the removal of a job is tried again
# HTTP status of a failed job by its code: 4xx for what the request or its client caused. Others are 500.
_STATUS = {"out_of_memory": 400, "timeout": 400, "cancelled": 400, "disk_full": 507}


async def fields_of(request: Request, front: FrontSettings, schema: type[Asked]) -> Any:
    """Return what `requests.read` returns.

    Before the body is read, this refuses what the model does not make, and any request while the queue is full.

    Raises:
        ApiError: the request is refused, or cannot be read.
    """
    makes_video = front.pipeline.makes_video
    if issubclass(schema, VideoRequest) != makes_video:
        right = "videos: POST /v1/videos" if makes_video else "pictures: POST /v1/images/generations"
        raise ApiError(400, f"{front.name} makes {right}", code="wrong_route")
    dispatcher: Dispatcher = request.app.state.dispatcher
    if dispatcher.draining:
        raise _ending()
    may_be_known = "idempotency-key" in request.headers  # a repetition, which the queue need not take
    if not may_be_known and await dispatcher.jobs.read(JobTable.count, "queued") >= front.limits.queue:
        raise _queue_full(QueueFull(front.limits.queue))
    try:
        return await read(request, front, schema)
    except ClientDisconnect as gone:
        raise ApiError(400, "the client disconnected before the body was complete") from gone


async def submitted(
    request: Request, dispatcher: Dispatcher, front: FrontSettings, owner: str | None, kind: Kind, spec: JobSpec,
    images: Sequence[bytes],
) -> Job:  # fmt: skip
    """Queue a job, and return it. A repeated request with the same `Idempotency-Key` gets the job that it made before.

    A list of images is emptied once they are on disk.

    Raises:
        ApiError: the queue is full, the job cannot be kept, or the key was used for another request.
    """
    job = Job.new(kind, front.name, spec, owner)
    job.request, job.digest = request.headers.get("idempotency-key"), request.state.digest
    if job.request is not None and not 0 < len(job.request) <= _KEY_CHARACTERS:
        raise ApiError(400, f"Idempotency-Key: expected 1 to {_KEY_CHARACTERS} characters", "Idempotency-Key")
    paths = [dispatcher.inputs / f"{job.id}-{index}.png" for index in range(len(images))]
    job.spec = replace(spec, images=tuple(map(str, paths)))
    try:
        await anyio.to_thread.run_sync(_write, paths, images)
        if isinstance(images, list):
            images.clear()
        held_by(request).release()
        stored = await dispatcher.submit(job)
    except Exception as refused:
        await _drop_unless_stored(dispatcher, job)
        if isinstance(refused, OSError):
            raise ApiError(507, f"the picture cannot be kept: {refused.strerror}", code="disk_full") from refused
        if isinstance(refused, Draining):
            raise _ending() from refused
        if isinstance(refused, QueueFull):
            raise _queue_full(refused) from refused
        raise
    if stored is job:
        logs.queued(job, front.log_prompts)
    else:
        await anyio.to_thread.run_sync(drop_inputs, job)
        if stored.digest != job.digest or stored.kind != job.kind:
            message = "the Idempotency-Key was used for another request: choose another key"
            raise ApiError(400, message, "Idempotency-Key", "idempotency_conflict")
    return stored


def _ending() -> ApiError:
    return ApiError(503, "the server is ending", code="ending", headers={"Retry-After": "10"})


def _queue_full(full: QueueFull) -> ApiError:
    option, whose = ("--max-queue-per-key", " of this key") if full.of_owner else ("--max-queue", "")
    message = f"{full.most} jobs{whose} are already waiting ({option})"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "10"})


def _write(paths: Sequence[Path], images: Sequence[bytes]) -> None:
    for path, data in zip(paths, images, strict=True):
        path.write_bytes(data)


async def _drop_unless_stored(dispatcher: Dispatcher, job: Job) -> None:
    """Remove the input pictures of a job that could not be queued. If that fails, the next start removes them."""
    with suppress(sqlite3.Error, OSError):
        if await dispatcher.jobs.read(JobTable.get, job.id) is None:
            await anyio.to_thread.run_sync(drop_inputs, job)


async def made_images(
    request: Request, dispatcher: Dispatcher, front: FrontSettings, owner: str | None, asked: ImageRequest,
    images: Sequence[bytes],
) -> Images:  # fmt: skip
    """Answer a request for pictures once they are done.

    If the client disconnects, its job is removed, unless it can ask for it again by an idempotency key.
    """
    job = await submitted(request, dispatcher, front, owner, "image", job_spec_for(front, asked, images), images)
    waiting = asyncio.create_task(_ended(dispatcher, job))
    while not waiting.done():
        await asyncio.wait([waiting], timeout=0.5)
        if not waiting.done() and await request.is_disconnected():
            waiting.cancel()
            if job.request is None:  # else the client may come back for it
                await _removed(dispatcher, job)
            raise ApiError(400, "the client disconnected before its pictures were done")
    await waiting
    done = await dispatcher.jobs.read(JobTable.get, job.id)
    if done is None:
        raise ApiError(400, "the job was deleted before its pictures were done", code="cancelled")
    if not done.ended:
        raise _ending()
    made = describe(dispatcher, done)
    if made.error is not None:
        raise ApiError(_STATUS.get(made.error.code, 500), made.error.message, code=made.error.code)
    if asked.response_format == "url":
        base, signatures = str(request.base_url).rstrip("/"), request.app.state.signatures
        paths = [f"/v1/images/{done.id}/content?index={index}" for index in range(asked.n)]
        data = [ImageData(url=base + signatures.signed(path, done.owner, front.expire_after)) for path in paths]
    else:
        kind, quality = asked.output_format, asked.output_compression
        try:
            data = [
                ImageData(b64_json=await pictures.threads.run(_in_base64, path, kind, quality))
                for path in dispatcher.paths(done)
            ]
        except FileNotFoundError as error:
            raise ApiError(404, f"the pictures of {done.id} are gone", code="not_found") from error
    return Images(
        created=made.created_at, data=data, size=made.size, output_format=asked.output_format, seed=made.seed,
        adjusted=made.adjusted, inference_time_s=made.inference_time_s, decode=made.decode,
    )  # fmt: skip


def _in_base64(path: Path, kind: str, quality: int) -> str:
    return base64.b64encode(pictures.converted(path, kind, quality)).decode()


async def _removed(dispatcher: Dispatcher, job: Job) -> None:
    """Remove a job whose client has left, as soon as the database can be written."""
    while True:
        try:
            return await dispatcher.remove(job)
        except sqlite3.OperationalError:
            await asyncio.sleep(_PAUSE)


async def _ended(dispatcher: Dispatcher, job: Job) -> None:
    """Wait until a job has ended or is gone, or the server ends."""
    with dispatcher.events.changes(job.id) as changed:
        while not dispatcher.closed:
            current = await dispatcher.jobs.read(JobTable.get, job.id)
            if current is None or current.ended:
                return
            await changed.wait()
            changed.clear()
