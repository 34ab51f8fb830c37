"""Attempts that the ranks have, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from halovae.serving.jobs import Job, JobSpec

Stage = Literal["waiting", "denoising", "decoding"]
_DENOISING = 80  # percent of a job's progress at the end of denoising; the rest is decoding


class Drawn(NamedTuple):
    """The latest preview of a job.

    Attributes:
        done: how many steps were done, over all results of the job.
        jpeg: the picture.
    """

    done: int
    jpeg: bytes


@dataclass
class RunningAttempt:
    """An attempt that the ranks have.

    Attributes:
        replica: the name of the group of ranks that has it.
        stage: "waiting", "denoising" or "decoding".
        done: steps that are done over all results of the job, or decoded frames.
        over: whether the attempt has ended, though its end is not on disk yet.
        began: when denoising began, and `since`: when the present stage did (`time.monotonic`).
    """

    job: Job
    replica: str = ""
    stage: Stage = "waiting"
    done: int = 0
    preview: Drawn | None = None
    over: bool = False
    began: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)

    @property
    def runs(self) -> bool:
        """Whether the ranks work on it."""
        return self.stage != "waiting" and not self.over

    @property
    def work(self) -> int:
        """All of its denoising, in pixels x frames x steps."""
        spec = self.job.spec
        return spec.size[0] * spec.size[1] * spec.frames * spec.steps * spec.count

    def begin(self, stage: Stage) -> None:
        """Begin a stage."""
        if self.stage == "waiting":
            self.began = time.monotonic()
        self.stage, self.done, self.since = stage, 0, time.monotonic()

    def advance(self, stage: Stage, done: int) -> None:
        """Note the progress of a stage."""
        if stage != self.stage:
            self.begin(stage)
        self.done = done

    @property
    def percent(self) -> int:
        """The job's progress in percent."""
        spec = self.job.spec
        if self.stage == "denoising":
            return _DENOISING * self.done // (spec.steps * spec.count)
        return 0 if self.stage == "waiting" else _DENOISING + (99 - _DENOISING) * self.done // spec.frames


def as_message(attempt_id: str, job: Job, paths: Sequence[Path], away: bool) -> dict[str, Any]:
    """Return the message that sends ranks an attempt.

    Args:
        attempt_id: the attempt's id.
        job: what to make.
        paths: where the front wants the results.
        away: whether the ranks may be on another host, and get the bytes of input pictures, not their paths.
    """
    spec = asdict(job.spec)
    prompt = {name: spec[name] for name in spec.keys() - {"count", "fps", "preview_every", "asked"}}
    return {
        "kind": "attempt", "attempt": attempt_id, "prompt": {**prompt, "images": ()} if away else prompt,
        "fps": job.spec.fps, "preview_every": job.spec.preview_every, "paths": [str(path) for path in paths],
    }  # fmt: skip


class Progress:
    """Predicts how long jobs still take, by their own steps and by the last decode of their size."""

    def __init__(self) -> None:
        self._decodes: dict[tuple[tuple[int, int], int], float] = {}

    def took(self, spec: JobSpec, seconds: float) -> None:
        """Remember how long a decode took."""
        if len(self._decodes) > 1000:
            self._decodes.clear()
        self._decodes[spec.size, spec.frames] = seconds

    def left(self, attempt: RunningAttempt) -> float | None:
        """Return the seconds until an attempt ends; None if nothing is known yet."""
        spec, passed = attempt.job.spec, time.monotonic() - attempt.since
        decode = self._decodes.get((spec.size, spec.frames), 0.0)
        if attempt.stage == "decoding":
            return max(0.0, decode - passed) if decode else None
        if attempt.stage == "waiting" or not attempt.done:
            return None
        return passed / attempt.done * (spec.steps * spec.count - attempt.done) + decode
