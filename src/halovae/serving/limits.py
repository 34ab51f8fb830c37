"""The operator's limits on requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that a request, a job, or a client may take.

    Attributes:
        body: bytes of a request.
        fields: bytes of a JSON request without the pictures in it.
        pixels: pixels of a frame or picture to make.
        frames: frames of a video, however its length is given.
        steps: denoising steps.
        results: results of one job (`n`).
        picture_pixels: pixels of a picture that a client sends.
        job_seconds: seconds that a job may run; None for no limit.
        queue: jobs that may wait.
        queue_per_key: jobs of one key that may wait; None for no limit.
        rate: submissions of one key, or one address where there are no keys, such as "30/minute"; None for no limit.
    """

    body: int = 64 * 2**20
    fields: int = 2**20
    pixels: int = 4096 * 4096
    frames: int = 1025
    steps: int = 1000
    results: int = 10
    picture_pixels: int = 16_000_000
    job_seconds: float | None = None
    queue: int = 100
    queue_per_key: int | None = None
    rate: str | None = None
