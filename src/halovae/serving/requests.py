"""Reads request bodies, JSON or multipart, and turns their fields into job specs.

Bodies are parsed in threads: the event loop serves others meanwhile, whatever a body holds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import urllib.parse
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from halovae.errors import PromptError
from halovae.pipelines.specs import Prompt
from halovae.serving import pictures
from halovae.serving.bodies import Held
from halovae.serving.errors import ApiError, from_validation, short, unknown_field
from halovae.serving.fetch import fetch
from halovae.serving.jobs import JobSpec
from halovae.serving.limits import Threads
from halovae.serving.schemas import Asked, ImageRequest, VideoRequest
from halovae.serving.settings import FrontSettings

Schema = TypeVar("Schema", bound=Asked)
Picture = bytes | str  # a file's content, or a data: URL
# The request field that each of these prompt attributes comes from.
_FIELDS = {
    "frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2", "negative": "negative_prompt",
}  # fmt: skip
_MULTIPART, _URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
_PICTURES = ("image", "input_reference")  # the fields that hold pictures
_MOST_FIELDS = 100  # of a form
_MOST_FILES = 16  # of a form, and pictures of a JSON body
_MOST_NESTED = 10_000  # lists and objects of a JSON body
_SEARCHED = 64  # strings of a JSON body that may be pictures
_json_threads, _form_threads = Threads("JSON", 2), Threads("forms", 2)  # apart: a large form takes seconds


@dataclass
class Parsed:
    """A body before its fields are checked.

    Attributes:
        fields: values by name, without pictures.
        files: the pictures, by field.
        digest: equal for repetitions of a request; None if it is not needed.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Picture]] = field(default_factory=dict)
    digest: str | None = None


async def read(request: Request, front: FrontSettings, schema: type[Schema]) -> tuple[Schema, dict[str, list[Picture]]]:
    """Return the checked fields of a request, and its pictures by field. No picture is decoded yet.

    A JSON body may hold `limits.fields` bytes, and besides them as many pictures (data: URLs) as the pipeline takes, up
    to `limits.body` bytes together. Without an `Idempotency-Key`, `request.state.digest` becomes None; with it, the
    digest of the fields and files.

    Raises:
        ApiError: a field is wrong; the error names it. Or the body cannot be read.
    """
    header = request.headers.get("content-type", "")
    kind = header.partition(";")[0].strip().lower()
    json_like = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not json_like and kind not in (_MULTIPART, _URLENCODED):
        given = f"Content-Type {short(ascii(kind))}" if kind else "the Content-Type is missing"
        expected = f"expected application/json, {_MULTIPART}, or {_URLENCODED}"
        raise ApiError(415, f"{given}: {expected}", "Content-Type", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "Content-Encoding: expected a body that is not compressed"
        raise ApiError(415, message, "Content-Encoding", "unsupported_media_type")
    with_files = kind == _MULTIPART or (json_like and front.pipeline.pictures.stop > 1)
    body = await _body(request, front.limits.body if with_files else front.limits.fields)
    digested = "idempotency-key" in request.headers
    if json_like:
        parsed = await _json_threads.run(_from_json, body, front, schema, digested)
    else:
        parsed = await _form_threads.run(_from_form, body, header, kind, front, schema, digested)
    del body
    request.state.digest = parsed.digest
    try:
        asked = schema.model_validate(parsed.fields)
    except ValidationError as error:
        raise from_validation(error) from error
    _check(front, asked, parsed.files)
    return asked, parsed.files


async def _body(request: Request, most: int) -> bytearray:
    """Return the body. It is not kept in the request, which may wait for long."""
    too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    body = bytearray()  # not a list of pieces: each may be one byte
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_large
    return body


def _from_json(body: bytearray, front: FrontSettings, schema: type[Asked], digested: bool) -> Parsed:
    most, taken = front.limits.fields, front.pipeline.pictures.stop - 1
    if len(body) - _picture_bytes(body, taken) > most:
        beside = f" beside the {taken} picture(s) that {front.pipeline.name} takes" if taken else ""
        raise ApiError(413, f"the body has more than {most} bytes{beside}", code="body_too_large")
    if body.count(b"[") + body.count(b"{") > _MOST_NESTED:  # for each of many, Python would look for garbage
        message = f"the body has more than {_MOST_NESTED} lists and objects"
        raise ApiError(400, message, code="invalid_json")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    _check_names(fields, schema)
    files = {name: _items(name, fields.pop(name)) for name in _PICTURES if fields.get(name) is not None}
    return Parsed(fields, files, hashlib.sha256(body).hexdigest() if digested else None)


def _picture_bytes(body: bytes | bytearray, most: int) -> int:
    """Return how many bytes of a JSON body belong to data: URLs: the `most` longest of the first ones.

    Each counts up to its closing quote. A string with an escaped character other than a slash counts as none, so that
    nothing but the inside of one string is ever counted.
    """
    lengths, end = [], 0
    for _ in range(_SEARCHED if most else 0):
        start = body.find(b'"data:', end)
        end = body.find(b'"', start + 1)
        if start < 0 or end < 0:
            break
        if body.count(b"\\", start, end) == body.count(b"\\/", start, end):
            lengths.append(end - start)
    return sum(sorted(lengths)[-most:]) if most else 0


def _from_form(
    body: bytearray, header: str, kind: str, front: FrontSettings, schema: type[Asked], digested: bool
) -> Parsed:
    charset = re.search(r";\s*charset\s*=\s*[\"']?([^;\"'\s]*)", header, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        message = f"Content-Type: charset {short(ascii(charset[1]))}, expected utf-8"
        raise ApiError(400, message, "Content-Type", "invalid_form")
    try:
        if kind == _URLENCODED:
            items: list[tuple[str, Picture]] = [*urllib.parse.parse_qsl(
                body.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS
            )]  # fmt: skip
        else:
            items = asyncio.run(_multipart(body, header, front.limits.fields))
    except Exception as error:  # the parsers raise errors of many kinds for damaged forms
        reason = error.message if isinstance(error, MultiPartException) else str(error)
        raise ApiError(400, f"the form cannot be read ({reason[:200]})", code="invalid_form") from error
    most = front.limits.fields
    if sum(len(value) for _, value in items if isinstance(value, str)) > most:
        raise ApiError(413, f"the form has more than {most} characters beside its files", code="body_too_large")
    parsed = Parsed()
    for name, value in items:
        plain = name.removesuffix("[]").removesuffix("[image_url]")
        if plain in _PICTURES:
            parsed.files.setdefault(plain, []).append(value)
        elif isinstance(value, bytes):
            raise ApiError(400, f"{short(name)}: a file is not expected here", name, "invalid_value")
        elif plain in parsed.fields:
            raise ApiError(400, f"{short(name)}: given more than once", name, "invalid_value")
        else:
            parsed.fields[plain] = value
    _check_names({**parsed.fields, **parsed.files}, schema)
    parsed.files = {name: _items(name, values) for name, values in parsed.files.items()}
    if digested:  # of the content: repetitions have other boundaries
        content = [[name, _digest(value) if isinstance(value, bytes) else value] for name, value in items]
        parsed.digest = _digest(json.dumps(content).encode())
    return parsed


async def _multipart(body: bytearray, header: str, most: int) -> list[tuple[str, Picture]]:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), 2**16):
            yield bytes(body[start : start + 2**16])

    form = await _InMemory(
        Headers({"content-type": header}), pieces(), max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=most
    ).parse()
    items = form.multi_items()
    return [(name, value.file.read() if isinstance(value, UploadFile) else value) for name, value in items]


class _InMemory(MultiPartParser):
    """Parses a form of which the whole body is in memory. Its files need not go to the disk."""

    spool_max_size = 2**62


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_names(fields: dict[str, Any], schema: type[Asked]) -> None:
    """Raise an error for the first unknown field. pydantic would build one for each."""
    for name in fields:
        if name not in schema.model_fields:
            raise unknown_field(name)


def _items(name: str, value: Any) -> list[Picture]:
    """Return the pictures of a field, which may be one or a list."""
    items = value if isinstance(value, list) else [value]
    if len(items) > _MOST_FILES:
        raise ApiError(400, f"{name}: {len(items)} pictures, expected at most {_MOST_FILES}", name, "invalid_value")
    items = [item.get("image_url") if isinstance(item, dict) else item for item in items]
    for item in items:
        if not (isinstance(item, bytes) or (isinstance(item, str) and pictures.is_data_url(item))):
            message = f"{name}: expected a file, or a data: URL in base64"
            raise ApiError(400, message, name, "invalid_value")
    return items


def _check(front: FrontSettings, asked: Asked, files: dict[str, list[Picture]]) -> None:
    """Check all that can be checked before any picture is fetched or decoded."""
    count = sum(map(len, files.values()))
    if isinstance(asked, VideoRequest):
        if asked.output_path is not None:
            message = "output_path: the server chooses where files go; fetch them by /v1/videos/{id}/content"
            raise ApiError(400, message, "output_path", "invalid_value")
        if asked.reference_url is not None:
            if not front.allow_url_inputs:
                message = "reference_url: this server fetches nothing (--allow-url-inputs)"
                raise ApiError(400, message, "reference_url", "invalid_value")
            if count:
                message = "reference_url: expected either this or input_reference, not both"
                raise ApiError(400, message, "reference_url", "invalid_value")
            count = 1
    job_spec_for(front, asked, (b"",) * count)


async def pictures_of(front: FrontSettings, files: list[Picture], param: str, held: Held) -> list[bytes]:
    """Return pictures as plain PNGs, and empty `files`, as a request may wait for long.

    They are decoded in two threads that all requests share. `held` counts them.

    Raises:
        ApiError: one of the files is not a valid picture, or too much memory is held.
    """
    plain = []
    while files:
        size = len(files[0])
        plain.append(await pictures.threads.run(_plain, files.pop(0), param, front.limits.picture_pixels))
        held.add(len(plain[-1]) - size)
    return plain


def _plain(file: Picture, param: str, most_pixels: int) -> bytes:
    data = pictures.from_data_url(file, param) if isinstance(file, str) else file
    return pictures.checked(data, param, most_pixels)


async def reference_of(
    front: FrontSettings, asked: VideoRequest, files: list[Picture], held: Held
) -> list[bytes]:  # fmt: skip
    """Return the pictures that a video starts from, as plain PNGs, and empty `files`. `held` counts them.

    Raises:
        ApiError: a file is not a valid picture, the URL cannot be fetched, or too much memory is held.
    """
    if asked.reference_url is None:
        return await pictures_of(front, files, "input_reference", held)
    data = await fetch(asked.reference_url, front.limits.body, "reference_url")
    held.add(len(data))
    return await pictures_of(front, [data], "reference_url", held)


def job_spec_for(front: FrontSettings, asked: Asked, images: Sequence[bytes]) -> JobSpec:
    """Return the job spec of a request. The caller still has to set the paths of its pictures.

    Raises:
        ApiError: the pipeline cannot serve a field, or it is beyond the server's limits; the error names it.
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
        images_field = "input_reference" if isinstance(asked, VideoRequest) else "image"
        param = images_field if error.field == "images" else _FIELDS.get(error.field, error.field)
        raise ApiError(400, f"{param}: {error}", param, "invalid_value") from error
    assert made.size is not None
    assert made.frames is not None
    _enforce(front, asked, prompt, made)
    adjusted: dict[str, str | int | None] = {}
    if prompt.size not in (None, made.size):
        adjusted["size"] = size
    if prompt.frames not in (None, made.frames):
        adjusted["num_frames"] = frames
    return JobSpec(
        made.text, made.size, made.frames, made.steps, made.seed, made.negative, made.guidance, made.guidance_2,
        count=asked.n, fps=fps, preview_every=asked.preview_every, asked=adjusted,
    )  # fmt: skip


def _enforce(front: FrontSettings, asked: Asked, prompt: Prompt, made: Prompt) -> None:
    """Refuse what is beyond the operator's limits, whether it was asked for or is the model's usual value."""
    limits = front.limits
    size, frames = prompt.size or made.size or (0, 0), max(prompt.frames or 0, made.frames or 0)
    pixels, name, shown = size[0] * size[1], "num_frames", str(frames)
    if isinstance(asked, VideoRequest) and asked.num_frames is None and asked.seconds is not None:
        name, shown = "seconds", f"{asked.seconds:g}, which are {frames} frames"
    for param, given, value, most, unit, option in (
        ("size", f"{size[0]}x{size[1]}", pixels, limits.pixels, "pixels", "--max-pixels"),
        (name, shown, frames, limits.frames, "frames", "--max-frames"),
        ("num_inference_steps", str(prompt.steps), prompt.steps, limits.steps, "steps", "--max-steps"),
        ("n", str(asked.n), asked.n, limits.results, "results", "--max-n"),
    ):
        if value > most:
            chosen = param in asked.model_fields_set and getattr(asked, param) is not None
            usual = "" if chosen else " (the value if none is given)"
            message = f"{param}: {short(given)}{usual}: this server makes at most {most} {unit} ({option})"
            raise ApiError(400, message, param, "invalid_value")
