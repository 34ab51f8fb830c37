"""Jobs as they are stored."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["video", "image"]
Status = Literal["queued", "in_progress", "completed", "failed"]
# What can interrupt a running job: the end of its ranks, their stalling, the front's end, the loss of their host.
Cause = Literal["ranks", "stall", "front", "host"]
REQUEUED: dict[str, Any] = {"status": "queued", "started": None}  # the changes to a job that waits again
TRIES = 3  # interruptions by one cause, with nothing else running, after which a job fails
HOSTS = 5  # the same, of hosts that were lost


@dataclass(frozen=True)
class JobSpec:
    """What a job asks for, checked and rounded.

    Attributes:
        text: the prompt; `size`, `frames`, `steps`, `seed`, `negative`, `guidance` and `guidance_2` as in `Prompt`.
        images: paths of pictures to start from, written by the front.
        count: how many results to make, one for each seed from `seed` on.
        fps: frames per second of a video.
        preview_every: steps from one preview to the next; None for no previews.
        asked: what was asked for where a value was rounded, by field of the request.
    """

    text: str
    size: tuple[int, int]
    frames: int
    steps: int
    seed: int
    negative: str | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    images: tuple[str, ...] = ()
    count: int = 1
    fps: float = 16.0
    preview_every: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """A job as it is stored. Times are seconds since 1970.

    Attributes:
        owner: the name of the key that it was submitted with; None without keys.
        request: the client's idempotency key, None without; and a digest of the request that it belongs to.
        seq: its place in the order of arrival.
        attempts: how often ranks have started it.
        interrupted: how often each cause interrupted it while nothing else ran.
        alone: whether it only runs while nothing else does, as it may be what ended the ranks.
        bytes: the size of its files.
        report: figures of its decode, as `decoding.summary` returns them.
    """

    id: str
    kind: Kind
    model: str
    spec: JobSpec
    created: float
    owner: str | None = None
    request: str | None = None
    digest: str | None = None
    seq: int = 0
    status: Status = "queued"
    started: float | None = None
    completed: float | None = None
    attempts: int = 0
    interrupted: dict[Cause, int] = field(default_factory=dict)
    alone: bool = False
    error_code: str | None = None
    error_message: str | None = None
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    report: dict[str, Any] | None = None

    @classmethod
    def new(cls, kind: Kind, model: str, spec: JobSpec, owner: str | None = None) -> Job:
        return cls(f"{kind}_{uuid.uuid4().hex}", kind, model, spec, time.time(), owner)

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")

    def names(self) -> list[str]:
        """Return the file names of its results."""
        suffix = "mp4" if self.kind == "video" else "png"
        return [f"{self.id}-{index}.{suffix}" for index in range(self.spec.count)]


@dataclass(frozen=True)
class JobEvent:
    """An event about a job that ended, until a webhook has received it.

    Attributes:
        id: the event's own.
        job: the job's id.
        type: the job's kind and how it ended, such as "video.completed".
        created: when it ended, in seconds since 1970.
        tries: how often the event was sent.
    """

    id: str
    job: str
    type: str
    created: int
    tries: int


def failed(code: str, message: str) -> dict[str, Any]:
    """Return the changes to a job that failed."""
    text = message.encode(errors="replace").decode()  # SQLite rejects lone surrogates
    return {"status": "failed", "completed": time.time(), "error_code": code, "error_message": text}


def interrupted(job: Job, cause: Cause, only: bool) -> dict[str, Any]:
    """Return the changes to a job that was interrupted.

    It counts against a job only if nothing else ran. From now on the job runs alone, so that it shows whose fault it
    is. Hosts are lost without any job's fault; only a job that loses one after the other is suspected.
    """
    counts = dict(job.interrupted)
    if only or cause == "host":
        counts[cause] = counts.get(cause, 0) + 1
    if only and counts[cause] >= (HOSTS if cause == "host" else TRIES):
        words = {
            "ranks": "a rank ended", "stall": "the ranks stalled", "front": "the server ended",
            "host": "the host was lost",
        }[cause]  # fmt: skip
        message = f"{words} {counts[cause]} times while only this job was running: it is not tried again"
        return {**failed("interrupted", message), "interrupted": counts}
    alone = job.alone or cause != "host" or counts["host"] > 1
    return {**REQUEUED, "interrupted": counts, "alone": alone}
