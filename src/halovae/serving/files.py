"""Frames to files, in a thread of its own: the next batch decodes while this one's last frames are encoded."""

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
from halovae.serving.line import RankLine

_WAITING = 2  # pieces of frames: more of them would only take memory


@dataclass(frozen=True)
class Order:
    """One attempt at a job.

    Attributes:
        id: the attempt's.
        prompt: what to make; the seeds from `prompt.seed` on make one result each.
        paths: where the results go.
        fps: of a video.
        preview_every: steps from one preview to the next; None for no previews.
    """

    id: str
    prompt: Prompt
    paths: tuple[Path, ...]
    fps: float
    preview_every: int | None = None


@dataclass
class Batch:
    """Orders whose frames are decoded together."""

    orders: Sequence[Order]
    done: int = 0
    sinks: dict[str, list[media.Sink]] = field(default_factory=dict)


class Writer(threading.Thread):
    """Writes frames as they come, and tells the front of each order's progress and end. On rank 0."""

    def __init__(self, line: RankLine) -> None:
        super().__init__(daemon=True, name="writer")
        self._line = line
        self._queue: queue.Queue[tuple[Batch, Tensor | None, dict[str, Any]]] = queue.Queue(_WAITING)

    def write(self, batch: Batch, frames: Tensor) -> None:
        """Append frames `[B, 3, T, H, W]`, uint8, to the batch's files; waits while much is still to be written."""
        self._queue.put((batch, frames, {}))

    def finish(self, batch: Batch, decode: dict[str, Any]) -> None:
        """The batch has all its frames, and its decode took this."""
        self._queue.put((batch, None, decode))

    def run(self) -> None:
        while True:
            batch, frames, decode = self._queue.get()
            first = 0
            for order in batch.orders:
                last = first + len(order.paths)
                if batch.done == 0 and frames is not None:
                    self._attempt(batch, order, self._open)
                if order.id in batch.sinks:
                    if frames is None:
                        self._attempt(batch, order, self._close, decode)
                    else:
                        self._attempt(batch, order, self._append, frames[first:last])
                first = last
            batch.done += 0 if frames is None else frames.shape[2]
            del frames

    def _attempt(self, batch: Batch, order: Order, step: Any, *args: Any) -> None:
        """One step of an order. A failure ends this order alone."""
        try:
            if order.id in self._line.cancelled:
                self._drop(batch, order)
                self._line.tell("cancelled", order.id)
            else:
                step(batch, order, *args)
        except Exception as error:
            self._drop(batch, order)
            for path in order.paths:
                media.discard(path)
            if not isinstance(error, OSError):
                logging.getLogger(__name__).exception("order %s cannot be written", order.id)
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            self._line.tell("failed", order.id, code="disk_full" if full else "cannot_write", message=str(error))

    def _open(self, batch: Batch, order: Order) -> None:
        sinks = batch.sinks[order.id] = []
        for path in order.paths:
            sinks.append(media.Sink(path, order.fps))

    def _append(self, batch: Batch, order: Order, frames: Tensor) -> None:
        for sink, own in zip(batch.sinks[order.id], frames, strict=True):
            sink.write(own)
        self._line.tell("progress", order.id, stage="decoding", done=batch.done + frames.shape[2])

    def _close(self, batch: Batch, order: Order, decode: dict[str, Any]) -> None:
        for sink in batch.sinks[order.id]:
            sink.close(whole=True)
        del batch.sinks[order.id]
        self._line.tell("finished", order.id, decode=decode)

    def _drop(self, batch: Batch, order: Order) -> None:
        for sink in batch.sinks.pop(order.id, []):
            try:
                sink.close(whole=False)
            except OSError:  # the reason is known already
                media.discard(sink.partial)
