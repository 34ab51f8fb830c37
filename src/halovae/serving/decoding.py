"""Decodes on a rank. They run in a thread of their own, so that the next attempt can be denoised meanwhile."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halovae.device.kinds import Device
from halovae.distributed.out_of_memory import is_out_of_memory
from halovae.errors import MemoryBudgetError
from halovae.report import DecodeReport
from halovae.runtime.options import DecodeOptions
from halovae.runtime.vae import VAE
from halovae.serving.broadcast import IDLE, RankZeroBroadcast
from halovae.serving.channel import RankChannel
from halovae.serving.files import Attempt, Batch, Writer

_MIB = 2**20
_UNFORESEEN = "the ranks failed to make this; the server's log says why"


class Decoding(threading.Thread):
    """Decodes latents. Latents of one shape are decoded together.

    Args:
        decoder: the VAE.
        options: options of `VAE.stream`.
        most: how many latents to decode at once.
        broadcast: from rank 0, which chooses what is decoded next.
        channel: to the front; None except on rank 0.

    Attributes:
        needs: bytes that a decode took on a rank when last measured, by the latents' shape `[B, C, T, H, W]`.
    """

    def __init__(
        self,
        decoder: VAE,
        options: DecodeOptions,
        most: int,
        broadcast: RankZeroBroadcast,
        channel: RankChannel | None,
    ) -> None:
        super().__init__(daemon=True, name="decoding")
        self._decoder, self._options, self._most = decoder, options, most
        self._broadcast, self._channel = broadcast, channel
        self._writer = Writer(channel) if channel is not None else None
        self._waiting: dict[str, tuple[Attempt, Tensor]] = {}
        self._changed = threading.Condition()
        self._running = 0
        self.needs: dict[tuple[int, ...], int] = {}

    def add(self, attempt: Attempt, latents: Tensor) -> None:
        """Queue latents `[B, C, T, H, W]` for decoding, one for each of the attempt's paths."""
        with self._changed:
            self._waiting[attempt.id] = (attempt, latents)
            self._changed.notify_all()

    def wait_until(self, fits: Callable[[], bool], seconds: float) -> bool:
        """Wait until no decode is running or queued, or until `fits()`. False after `seconds` without either."""
        with self._changed:
            return self._changed.wait_for(lambda: fits() or not (self._waiting or self._running), seconds)

    def run(self) -> None:
        Device(self._decoder.device).enter()
        if self._writer is not None:
            self._writer.start()
        while True:
            chosen = self._broadcast.send(self._choose() if self._broadcast.is_rank_zero else [])
            if chosen:
                with survived(self._broadcast, self._channel, chosen):
                    self._decode(chosen)
            with self._changed:
                self._running = 0
                self._changed.notify_all()

    def _choose(self) -> list[str]:
        """Return the ids of attempts to decode next: the oldest, and others of its shape, up to `most` latents."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, IDLE)
            chosen: list[str] = []
            size, shape = 0, None
            for attempt_id, (_, latents) in self._waiting.items():
                shape = shape or latents.shape[1:]
                if latents.shape[1:] == shape and (not chosen or size + len(latents) <= self._most):
                    chosen.append(attempt_id)
                    size += len(latents)
            self._running = len(chosen)
            return chosen

    def _decode(self, chosen: list[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(attempt_id in self._waiting for attempt_id in chosen))
            taken = [self._waiting.pop(attempt_id) for attempt_id in chosen]
            self._running = len(chosen)
        batch = Batch([attempt for attempt, _ in taken])
        latents = torch.cat([latents for _, latents in taken])
        del taken
        options: DecodeOptions = {**self._options, "dtype": torch.uint8, "denormalize": True}
        stream = self._decoder.stream(latents, **options)
        for piece in stream:
            if self._writer is not None and piece is not None:
                self._writer.write(batch, piece)
            if not self._broadcast.send(self._is_wanted(batch)):
                stream.close()
                if self._writer is not None:
                    self._writer.finish(batch, {})
                return
        report = stream.shared_report()
        self.needs[tuple(latents.shape)] = report.memory.above_resting
        if self._writer is not None:
            self._writer.finish(batch, summary(report))

    def _is_wanted(self, batch: Batch) -> bool:
        if self._channel is None:
            return True
        unwanted = self._channel.cancelled | batch.dropped
        return any(attempt.id not in unwanted for attempt in batch.attempts)


class survived:
    """A context that turns an error on all ranks into failed attempts, and lets the ranks go on.

    An error on only some ranks ends their processes. The other ranks wait for messages from them, and only the agent
    that watches all ranks can end those.
    """

    def __init__(self, broadcast: RankZeroBroadcast, channel: RankChannel | None, attempt_ids: list[str]) -> None:
        self._broadcast, self._channel, self._attempt_ids = broadcast, channel, attempt_ids

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return True
        logging.getLogger(__name__).error("attempts failed: %s", ", ".join(self._attempt_ids), exc_info=error)
        if not isinstance(error, Exception) or not self._broadcast.failed_together():
            os._exit(1)
        memory = isinstance(error, MemoryBudgetError) or is_out_of_memory(error)
        if self._channel is not None:
            for attempt_id in self._attempt_ids:
                code, message = ("out_of_memory", str(error)) if memory else ("internal_error", _UNFORESEEN)
                self._channel.send("failed", attempt_id, code=code, message=message)
        return True


def summary(report: DecodeReport) -> dict[str, Any]:
    """Return a decode's figures for clients. Sizes are in MiB. `one_device` holds the prediction for a single rank."""
    memory, chosen, one_device = report.memory, None, None
    if report.decision is not None:
        chosen = report.decision["chosen"]
        candidates = (chosen, *report.decision["others"])
        one_device = next((candidate for candidate in candidates if candidate["ranks"] == 1), None)
    return {
        "seconds": round(report.seconds, 3),
        "plan": chosen["grid"] if chosen else report.grid,
        "why": chosen["verdict"] if chosen else "set by the server's options",
        "batch": report.frames[0],
        "peak_memory_mb": round(memory.peak_reserved / _MIB, 1),
        "peak_allocated_mb": round(memory.peak_allocated / _MIB, 1),
        "pool_overhead_mb": round(memory.pool_overhead / _MIB, 1),
        "remaining_mb": round(memory.remaining / _MIB, 1),
        "predicted": _predicted(chosen),
        "one_device": _predicted(one_device),
        "fell_back": report.fell_back,
    }


def _predicted(candidate: dict[str, Any] | None) -> dict[str, float] | None:
    if candidate is None or candidate["peak"] is None:
        return None
    return {"seconds": round(candidate["seconds"], 3), "peak_allocated_mb": round(candidate["peak"] / _MIB, 1)}
