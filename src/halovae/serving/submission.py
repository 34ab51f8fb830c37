"""How requests become jobs, and how a request for pictures waits for its job."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from halovae.serving import pictures
from halovae.serving.answers import describe
from halovae.serving.dispatch import Dispatcher, Draining
from halovae.serving.errors import ApiError
from halovae.serving.jobs import Job, JobSpec, Kind
from halovae.serving.requests import job_spec_for, read
from halovae.serving.schemas import ImageData, ImageRequest, Images
from halovae.serving.settings import FrontSettings
from halovae.serving.table import JobTable, QueueFull

_KEY_CHARACTERS = 255  # of an idempotency key
_PAUSE = 0.5  # seconds until the removal of a job is tried again


async def fields_of(request: Request, front: FrontSettings, schema: Any) -> Any:
    try:
        return await read(request, front, schema)
    except ClientDisconnect as gone:
        raise ApiError(400, "the client disconnected before the body was complete") from gone


async def submitted(
    request: Request, dispatcher: Dispatcher, front: FrontSettings, owner: str | None, kind: Kind, spec: JobSpec,
    images: Sequence[bytes],
) -> Job:  # fmt: skip
    """Queue a job, and return it. A repeated request with the same `Idempotency-Key` gets the job that it made before.

    Raises:
        ApiError: the queue is full, the job cannot be kept, or the key was used for another request.
    """
    job = Job.new(kind, front.name, spec, owner)
    job.request = request.headers.get("idempotency-key")
    if job.request is not None:
        if not 0 < len(job.request) <= _KEY_CHARACTERS:
            raise ApiError(400, f"Idempotency-Key: expected 1 to {_KEY_CHARACTERS} characters", "Idempotency-Key")
        job.digest = hashlib.sha256(await request.body()).hexdigest()
    paths = [dispatcher.inputs / f"{job.id}-{index}.png" for index in range(len(images))]
    job.spec = replace(spec, images=tuple(map(str, paths)))
    try:
        for path, data in zip(paths, images, strict=True):
            path.write_bytes(data)
        stored = await dispatcher.submit(job)
    except (QueueFull, Draining, OSError, sqlite3.OperationalError) as refused:
        for path in paths:
            path.unlink(missing_ok=True)
        if isinstance(refused, sqlite3.OperationalError):
            raise
        if isinstance(refused, OSError):
            raise ApiError(507, f"the picture cannot be kept: {refused.strerror}", code="disk_full") from refused
        if isinstance(refused, Draining):
            raise ApiError(503, "the server is ending", code="ending", headers={"Retry-After": "10"}) from refused
        option, whose = ("--max-queue-per-key", " of this key") if refused.of_owner else ("--max-queue", "")
        message = f"{refused.most} jobs{whose} are already waiting ({option})"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "10"}) from refused
    if stored is not job:
        for path in paths:
            path.unlink(missing_ok=True)
        if stored.digest != job.digest or stored.kind != job.kind:
            message = "the Idempotency-Key was used for another request: choose another key"
            raise ApiError(400, message, "Idempotency-Key", "idempotency_conflict")
    return stored


async def made_images(
    request: Request, dispatcher: Dispatcher, front: FrontSettings, owner: str | None, asked: ImageRequest,
    images: Sequence[bytes],
) -> Images:  # fmt: skip
    """Answer a request for pictures once they are done. If the client disconnects, its job is removed."""
    if front.pipeline.makes_video:
        raise ApiError(400, f"{front.name} makes videos: POST /v1/videos")
    job = await submitted(request, dispatcher, front, owner, "image", job_spec_for(front, asked, images), images)
    waiting = asyncio.create_task(_ended(dispatcher, job))
    while not waiting.done():
        await asyncio.wait([waiting], timeout=0.5)
        if not waiting.done() and await request.is_disconnected():
            waiting.cancel()
            await _removed(dispatcher, job)
            raise ApiError(400, "the client disconnected before its pictures were done")
    await waiting
    done = await dispatcher.jobs.read(JobTable.get, job.id)
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
    """Wait until a job has ended or is gone, or the server ends."""
    with dispatcher.events.changes(job.id) as changed:
        while not dispatcher.closed:
            current = await dispatcher.jobs.read(JobTable.get, job.id)
            if current is None or current.ended:
                return
            await changed.wait()
            changed.clear()
