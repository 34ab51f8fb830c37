"""How requests become jobs, and how a request for pictures waits for its job."""

from __future__ import annotations

import asyncio
import base64
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from halovae.serving import pictures
from halovae.serving.answers import describe
from halovae.serving.dispatch import Dispatcher, QueueFull
from halovae.serving.errors import ApiError
from halovae.serving.jobs import Job, JobSpec, Kind
from halovae.serving.requests import job_spec_for, read
from halovae.serving.schemas import ImageData, ImageRequest, Images
from halovae.serving.settings import FrontSettings

_PAUSE = 0.5  # seconds until the removal of a job is tried again


async def fields_of(request: Request, front: FrontSettings, schema: Any) -> Any:
    try:
        return await read(request, front, schema)
    except ClientDisconnect as gone:
        raise ApiError(400, "the client disconnected before the body was complete") from gone


async def submitted(
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
        message = f"{front.limits.queue} jobs are already waiting (--max-queue)"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "10"}) from refused
    return job


async def made_images(
    request: Request, dispatcher: Dispatcher, front: FrontSettings, asked: ImageRequest, images: Sequence[bytes]
) -> Images:
    """Answer a request for pictures once they are done. If the client disconnects, its job is removed."""
    if front.pipeline.makes_video:
        raise ApiError(400, f"{front.name} makes videos: POST /v1/videos")
    job = await submitted(dispatcher, front, "image", job_spec_for(front, asked, images), images)
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
