"""Reads request bodies, JSON or multipart, and turns their fields into job specs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halovae.errors import PromptError
from halovae.pipelines.specs import Prompt
from halovae.serving import pictures
from halovae.serving.errors import ApiError, from_validation
from halovae.serving.fetch import fetch
from halovae.serving.jobs import JobSpec
from halovae.serving.schemas import Asked, EditRequest, ImageRequest, VideoRequest
from halovae.serving.settings import FrontSettings

Schema = TypeVar("Schema", bound=BaseModel)
# The request field that each of these prompt attributes comes from.
_FIELDS = {
    "frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2", "negative": "negative_prompt",
}  # fmt: skip


class BodyLimit:
    """Refuses bodies of more than `most` bytes; at once if their length is declared."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body has more than {self._most} bytes (--max-body)", code="body_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._most:
            await too_large.response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise too_large
            return message

        await self._app(scope, counted, send)


async def read(
    request: Request, front: FrontSettings, schema: type[Schema]
) -> tuple[Schema, dict[str, list[UploadFile | str]]]:
    """Return the checked fields of a request, and the values of `image` and `input_reference`, which may be files.

    Raises:
        ApiError: a field is wrong; the error names it. Or the body cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        form = await request.form(max_fields=100, max_files=16)
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            plain = name.removesuffix("[]").removesuffix("[image_url]")
            if plain in ("image", "input_reference"):
                fields.setdefault(plain, []).append(value)
            elif isinstance(value, UploadFile):
                raise ApiError(400, f"{name}: a file is not expected here", name, "invalid_value")
            elif plain in fields:
                raise ApiError(400, f"{name}: given more than once", name, "invalid_value")
            else:
                fields[plain] = value
    else:
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is neither JSON nor a form ({error})", code="invalid_json") from error
        if not isinstance(fields, dict):
            raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    files = {name: _items(fields[name]) for name in ("image", "input_reference") if fields.get(name) is not None}
    try:
        return schema.model_validate(fields), files
    except ValidationError as error:
        raise from_validation(error) from error


def _items(value: Any) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    return [item.get("image_url") if isinstance(item, dict) else item for item in items]


async def pictures_of(front: FrontSettings, files: Sequence[UploadFile | str], param: str) -> tuple[bytes, ...]:
    """Return pictures as plain PNGs.

    Raises:
        ApiError: one of the files is not a valid picture.
    """
    checked = []
    for file in files:
        if isinstance(file, UploadFile):
            data = await file.read()
        elif isinstance(file, str):
            data = pictures.from_data_url(file, param)
        else:
            raise ApiError(400, f"{param}: expected a file, or a data: URL in base64", param)
        checked.append(await anyio.to_thread.run_sync(pictures.checked, data, param))
    return tuple(checked)


async def reference_of(
    front: FrontSettings, asked: VideoRequest, files: Sequence[UploadFile | str]
) -> tuple[bytes, ...]:
    """Return the pictures that a video starts from, as plain PNGs.

    Raises:
        ApiError: a file is not a valid picture, or the request names a path or URL that is not allowed.
    """
    if asked.output_path is not None:
        message = "output_path: the server chooses where files go; fetch them by /v1/videos/{id}/content"
        raise ApiError(400, message, "output_path", "invalid_value")
    if asked.reference_url is None:
        return await pictures_of(front, files, "input_reference")
    if not front.allow_url_inputs:
        raise ApiError(400, "reference_url: this server fetches nothing (--allow-url-inputs)", "reference_url")
    data = await fetch(asked.reference_url, front.limits.body, "reference_url")
    return (await anyio.to_thread.run_sync(pictures.checked, data, "reference_url"),)


def job_spec_for(front: FrontSettings, asked: Asked, images: Sequence[bytes]) -> JobSpec:
    """Return the job spec of a request. The caller still has to set the paths of its pictures.

    Raises:
        ApiError: the pipeline cannot serve a field; the error names it.
    """
    pipeline = front.pipeline
    size, frames, fps, guidance_2 = None, None, pipeline.fps, None
    if isinstance(asked, VideoRequest):
        fps, guidance_2 = asked.fps or fps, asked.guidance_scale_2
        frames = asked.num_frames or (max(1, round(asked.seconds * fps)) if asked.seconds else None)
        size = asked.size
    elif isinstance(asked, ImageRequest):
        size = None if asked.size == "auto" else asked.size
    width, _, height = (size or "").partition("x")
    prompt = Prompt(
        text=asked.prompt,
        size=(int(width), int(height)) if size else None,
        frames=frames,
        steps=asked.num_inference_steps,
        seed=random.getrandbits(31) if asked.seed is None else asked.seed,
        negative=asked.negative_prompt,
        guidance=asked.guidance_scale,
        guidance_2=guidance_2,
        images=tuple(images),
    )
    try:
        made = pipeline.fitted(prompt)
    except PromptError as error:
        images_field = "image" if isinstance(asked, EditRequest) else "input_reference"
        param = images_field if error.field == "images" else _FIELDS.get(error.field, error.field)
        raise ApiError(400, f"{param}: {error}", param, "invalid_value") from error
    assert made.size is not None
    assert made.frames is not None
    adjusted: dict[str, str | int | None] = {}
    if prompt.size not in (None, made.size):
        adjusted["size"] = size
    if prompt.frames not in (None, made.frames):
        adjusted["num_frames"] = frames
    return JobSpec(
        made.text, made.size, made.frames, made.steps, made.seed, made.negative, made.guidance, made.guidance_2,
        count=asked.n, fps=fps, preview_every=asked.preview_every, asked=adjusted,
    )  # fmt: skip
