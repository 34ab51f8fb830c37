"""Schemas of requests and responses: OpenAI's fields for videos and images, and fields that serving stacks add."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_CHARACTERS = 32_000
_FILE: Any = {"type": "string", "format": "binary"}
_SIZE = "^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$"


def _text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it contains a NUL character")
    return text


def _size(text: str) -> str:
    if not re.fullmatch(_SIZE, text):
        raise ValueError("expected WIDTHxHEIGHT in pixels, such as 1280x720")
    return text


def _prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty: say what to make")
    return _text(text)


Text = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_text)]
Prompt = Annotated[
    str, Field(min_length=1, max_length=MOST_CHARACTERS, description="What to make."), AfterValidator(_prompt)
]
Size = Annotated[
    str,
    Field(
        description="WIDTHxHEIGHT in pixels. Sizes that the model cannot make are rounded down.",
        json_schema_extra={"pattern": _SIZE},
    ),
    AfterValidator(_size),
]
Guidance = Annotated[float, Field(ge=0, le=100)]


class Asked(BaseModel):
    """The fields that all requests have in common.

    `Limits` bounds sizes, numbers of frames, steps, and results.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Prompt
    model: Text | None = Field(None, description="Any name: there is one model.")
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: Guidance | None = Field(None, description="How strongly the prompt guides the result.")
    negative_prompt: Text | None = Field(None, description="What to avoid.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Equal seeds give equal results.")
    n: int = Field(1, ge=1, description="How many results to make, one for each seed from `seed` on.")
    preview_every: int | None = Field(None, ge=1, le=1000, description="Steps from one preview to the next.")
    user: Text | None = Field(None, description="Without effect.")


class VideoRequest(Asked):
    """`POST /v1/videos`."""

    size: Size | None = None
    num_frames: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0, le=120, description="Length, instead of `num_frames`.")
    fps: float | None = Field(None, ge=1, le=120, description="Frames per second. [default: the model's usual]")
    guidance_scale_2: Guidance | None = Field(None, description="`guidance_scale` of Wan2.2-A14B's second transformer.")
    input_reference: Any = Field(
        None, description="A picture to start from: a file, or a data: URL.", json_schema_extra=_FILE
    )
    reference_url: Text | None = Field(None, description="URL of a picture to start from, if the server allows URLs.")
    output_path: Text | None = Field(None, description="Refused: fetch files from /content.")


class ImageRequest(Asked):
    """`POST /v1/images/generations`."""

    size: Size | Literal["auto"] | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(90, ge=0, le=100, description="Quality of jpeg and webp.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Without effect.")
    moderation: Text | None = Field(None, description="Without effect.")
    quality: Text | None = Field(None, description="Without effect.")
    style: Text | None = Field(None, description="Without effect.")


class EditRequest(ImageRequest):
    """`POST /v1/images/edits`."""

    image: Any = Field(
        None, description="One picture, or several as `image[]`: files, or data: URLs.", json_schema_extra=_FILE
    )
    input_fidelity: Text | None = Field(None, description="Without effect.")


class Failure(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Measured(BaseModel):
    """The predicted time and memory of a plan."""

    seconds: float
    peak_allocated_mb: float


class Decode(BaseModel):
    """What the decode of a job took. Sizes are in MiB, of the rank with the most.

    `batch` is how many results were decoded together.
    """

    seconds: float
    plan: str
    why: str
    batch: int
    peak_memory_mb: float
    peak_allocated_mb: float
    pool_overhead_mb: float
    remaining_mb: float
    predicted: Measured | None
    one_device: Measured | None
    fell_back: str


class Video(BaseModel):
    """A video job. The fields `object` to `error` are OpenAI's; the others are SGLang's or halovae's."""

    id: str
    object: Literal["video", "image"] = "video"
    created_at: int
    completed_at: int | None
    expires_at: int | None
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    stage: Literal["waiting", "denoising", "decoding"] | None = Field(description="Where a running job is.")
    step: int | None = Field(description="Denoising steps that are done, over all results.")
    steps: int = Field(description="Denoising steps of all results.")
    eta_seconds: float | None = Field(description="Predicted seconds until the job ends, where known.")
    prompt: str
    seconds: str
    size: str
    error: Failure | None
    num_frames: int
    fps: float
    seed: int
    n: int
    adjusted: dict[str, Any] = Field(description="Requested values that were rounded, by field.")
    inference_time_s: float | None
    peak_memory_mb: float | None
    url: str | None
    file_path: str | None = Field(description="The first file, within the server's `--output-dir`.")
    preview: str | None = Field(description="Path of the latest preview while the job is running.")
    decode: Decode | None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A deleted video."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ImageData(BaseModel):
    """One picture: its content, or its URL."""

    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """The response to a request for pictures."""

    created: int
    data: list[ImageData]
    size: str
    output_format: str
    seed: int
    adjusted: dict[str, Any]
    inference_time_s: float | None
    decode: Decode | None
