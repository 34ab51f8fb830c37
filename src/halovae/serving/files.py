"""Writes frames to files in a thread of its own, so that the next batch can be decoded meanwhile."""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from halovae.io import media
from halovae.pipelines.specs import Prompt
from halovae.serving.channel import RankChannel

_WAITING = 2  # pieces of frames that may wait to be written; more would only take memory


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job.

    Attributes:
        id: the attempt's id.
        prompt: what to make; each seed from `prompt.seed` on makes one result.
        paths: where the results go.
        fps: frames per second of a video.
        preview_every: steps from one preview to the next; None for no previews.
    """

    id: str
    prompt: Prompt
    paths: tuple[Path, ...]
    fps: float
    preview_every: int | None = None


@dataclass
class Batch:
    """Attempts whose frames are decoded together. `finished`: one of them is."""

    attempts: Sequence[Attempt]
    done: int = 0
    finished: bool = False
    sinks: dict[str, list[media.Sink]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)  # ids of attempts that were cancelled or could not be written


def why_unwritten(error: Exception) -> tuple[str, str]:
    """The code and the message of a job whose result cannot be written, without the server's paths."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    reason = getattr(error, "strerror", None) or type(error).__name__
    return "disk_full" if full else "cannot_write", f"the result cannot be written: {reason}"


class Writer(threading.Thread):
    """Writes frames as they come, and reports the progress and end of each attempt to the front. Runs on rank 0."""

    def __init__(self, channel: RankChannel) -> None:
        super().__init__(daemon=True, name="writer")
        self._channel = channel
        self._queue: queue.Queue[tuple[Batch, Tensor | None, dict[str, Any]]] = queue.Queue(_WAITING)

    def write(self, batch: Batch, frames: Tensor) -> None:
        """Append frames `[B, 3, T, H, W]`, uint8, to the batch's files. Blocks while too many pieces wait."""
        self._queue.put((batch, frames, {}))

    def finish(self, batch: Batch, decode: dict[str, Any]) -> None:
        """Close the batch's files and report each attempt as finished. `decode` holds the figures of its decode."""
        self._queue.put((batch, None, decode))

    def run(self) -> None:
        while True:
            batch, frames, decode = self._queue.get()
            first = 0
            for attempt in batch.attempts:
                last = first + len(attempt.paths)
                if batch.done == 0 and frames is not None:
                    self._run_step(batch, attempt, self._open)
                if attempt.id in batch.sinks:
                    if frames is None:
                        self._run_step(batch, attempt, self._close, decode)
                    else:
                        self._run_step(batch, attempt, self._append, frames[first:last])
                first = last
            batch.done += 0 if frames is None else frames.shape[2]
            del frames

    def _run_step(self, batch: Batch, attempt: Attempt, step: Any, *args: Any) -> None:
        """Run one step of an attempt. A failure ends only this attempt."""
        try:
            if attempt.id in self._channel.cancelled:
                self._drop(batch, attempt)
                self._channel.send("cancelled", attempt.id)
            else:
                step(batch, attempt, *args)
        except Exception as error:
            self._drop(batch, attempt)
            for path in attempt.paths:
                media.discard(path)
            if not isinstance(error, OSError):
                logging.getLogger(__name__).exception("attempt %s cannot be written", attempt.id)
            code, message = why_unwritten(error)
            self._channel.send("failed", attempt.id, code=code, message=message)

    def _open(self, batch: Batch, attempt: Attempt) -> None:
        sinks = batch.sinks[attempt.id] = []
        for path in attempt.paths:
            sinks.append(media.Sink(path, attempt.fps))

    def _append(self, batch: Batch, attempt: Attempt, frames: Tensor) -> None:
        for sink, result in zip(batch.sinks[attempt.id], frames, strict=True):
            sink.write(result)
        self._channel.send("progress", attempt.id, stage="decoding", done=batch.done + frames.shape[2])

    def _close(self, batch: Batch, attempt: Attempt, decode: dict[str, Any]) -> None:
        for sink in batch.sinks[attempt.id]:
            sink.close(whole=True)
        del batch.sinks[attempt.id]
        self._channel.deliver(attempt.id, attempt.paths)
        # The figures are of the whole batch: the front observes them once.
        self._channel.send("finished", attempt.id, decode=decode, first=not batch.finished)
        batch.finished = True

    def _drop(self, batch: Batch, attempt: Attempt) -> None:
        batch.dropped.add(attempt.id)
        for sink in batch.sinks.pop(attempt.id, []):
            try:
                sink.close(whole=False)
            except OSError:  # the reason is known already
                media.discard(sink.partial)
