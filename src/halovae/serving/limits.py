"""Limits: the operator's on requests, and the threads that handling requests may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

T = TypeVar("T")
_COUNTS = ("body", "body_memory", "fields", "pixels", "frames", "steps", "results", "picture_pixels", "queue")


@dataclass(frozen=True)
class Limits:
    """The most that a request, a job, or a client may take.

    `pixels`, `frames` and `steps` hold for each of the `results` of a job on its own.

    Attributes:
        body: bytes of a request.
        body_memory: bytes of all requests, and of their pictures, that are in memory at a time.
        fields: bytes of a JSON request without the pictures in it, and of a form without its files.
        pixels: pixels of a frame or picture to make.
        frames: frames of a video, however its length is given.
        steps: denoising steps.
        results: results of one job (`n`).
        picture_pixels: pixels of a picture that a client sends.
        job_seconds: seconds that a job may run; None for no limit.
        queue: jobs that may wait.
        queue_per_key: jobs of one key that may wait; None for no limit.
        rate: submissions of one key, or one address where there are no keys, such as "30/minute"; None for no limit.

    Raises:
        ValueError: a number is not positive.
    """

    body: int = 64 * 2**20
    body_memory: int = 512 * 2**20
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

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value}: expected 1 or more")


class Threads:
    """Runs calls in threads, at most `most` at once for each event loop, that is, for each front.

    Args:
        name: distinguishes it from others.
        most: how many calls run at once. Others wait.
    """

    def __init__(self, name: str, most: int) -> None:
        self._most = most
        self._limiter: RunVar[CapacityLimiter | None] = RunVar(f"halovae {name}")

    async def run(self, call: Callable[..., T], *args: object) -> T:
        """Return what `call(*args)` returns."""
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self._most)
            self._limiter.set(limiter)
        return await anyio.to_thread.run_sync(call, *args, limiter=limiter)
