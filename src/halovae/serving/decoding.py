"""The decodes of a rank, in a thread of their own: the next order is denoised meanwhile."""

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
from halovae.runtime.vae import VAE
from halovae.serving.files import Batch, Order, Writer
from halovae.serving.lead import IDLE, Lead
from halovae.serving.line import RankLine

_MIB = 2**20


class Decoding(threading.Thread):
    """Decodes latents, those of one shape together.

    Args:
        decoder: the VAE's.
        options: of `VAE.stream`.
        most: how many latents to decode at once.
        lead: from rank 0, which chooses what is decoded next.
        line: to the front; None on other ranks.

    Attributes:
        needs: bytes that a decode of latents of a shape `[B, C, T, H, W]` took on a rank, as last measured.
    """

    def __init__(self, decoder: VAE, options: dict[str, Any], most: int, lead: Lead, line: RankLine | None) -> None:
        super().__init__(daemon=True, name="decoding")
        self._decoder, self._options, self._most, self._lead, self._line = decoder, options, most, lead, line
        self._writer = Writer(line) if line is not None else None
        self._waiting: dict[str, tuple[Order, Tensor]] = {}
        self._changed = threading.Condition()
        self._running = 0
        self.needs: dict[tuple[int, ...], int] = {}

    def add(self, order: Order, latents: Tensor) -> None:
        """Decode latents `[B, C, T, H, W]`, one for each of the order's paths, when their turn comes."""
        with self._changed:
            self._waiting[order.id] = (order, latents)
            self._changed.notify_all()

    def wait_until(self, fits: Callable[[], bool]) -> None:
        """Wait until nothing is being decoded or about to be, or `fits()`."""
        with self._changed:
            self._changed.wait_for(lambda: fits() or not (self._waiting or self._running))

    def run(self) -> None:
        Device(self._decoder.device).enter()
        if self._writer is not None:
            self._writer.start()
        while True:
            chosen = self._lead.say(self._choose() if self._lead.first else [])
            if chosen:
                with survived(self._lead, self._line, chosen):
                    self._decode(chosen)
            with self._changed:
                self._running = 0
                self._changed.notify_all()

    def _choose(self) -> list[str]:
        """The orders to decode next: the one that has waited longest, and those of its shape as far as they fit."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, IDLE)
            chosen: list[str] = []
            size, shape = 0, None
            for order, (_, latents) in self._waiting.items():
                shape = shape or latents.shape[1:]
                if latents.shape[1:] == shape and (not chosen or size + len(latents) <= self._most):
                    chosen.append(order)
                    size += len(latents)
            self._running = len(chosen)
            return chosen

    def _decode(self, chosen: list[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(order in self._waiting for order in chosen))
            taken = [self._waiting.pop(order) for order in chosen]
            self._running = len(chosen)
        batch = Batch([order for order, _ in taken])
        latents = torch.cat([latents for _, latents in taken])
        del taken
        stream = self._decoder.stream(latents, dtype=torch.uint8, denormalize=True, **self._options)
        for piece in stream:
            if self._writer is not None and piece is not None:
                self._writer.write(batch, piece)
            if not self._lead.say(self._asked_for(chosen)):
                stream.close()
                if self._writer is not None:
                    self._writer.finish(batch, {})
                return
        report = stream.shared_report()
        self.needs[tuple(latents.shape)] = report.memory.above_resting
        if self._writer is not None:
            self._writer.finish(batch, summary(report))

    def _asked_for(self, orders: list[str]) -> bool:
        return self._line is None or any(order not in self._line.cancelled for order in orders)


class survived:
    """What fails on all ranks alike fails these orders, and the ranks go on. What fails on one rank ends it: the
    others wait for its messages, and only the agent that watches them can end them too.
    """

    def __init__(self, lead: Lead, line: RankLine | None, orders: list[str]) -> None:
        self._lead, self._line, self._orders = lead, line, orders

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return True
        logging.getLogger(__name__).error("failed: orders %s", ", ".join(self._orders), exc_info=error)
        if not isinstance(error, Exception) or not self._lead.failed_together():
            os._exit(1)
        memory = isinstance(error, MemoryBudgetError) or is_out_of_memory(error)
        if self._line is not None:
            for order in self._orders:
                self._line.tell(
                    "failed", order, code="out_of_memory" if memory else "internal_error", message=str(error)
                )
        return True


def summary(report: DecodeReport) -> dict[str, Any]:
    """What clients are told of a decode; sizes in MiB. `one_device` is what one rank alone was predicted to take."""
    memory, chosen, alone = report.memory, None, None
    if report.decision is not None:
        chosen = report.decision["chosen"]
        alone = next((one for one in (chosen, *report.decision["others"]) if one["ranks"] == 1), None)
    return {
        "seconds": round(report.seconds, 3),
        "plan": chosen["grid"] if chosen else report.grid,
        "why": chosen["verdict"] if chosen else "as the server was told",
        "batch": report.frames[0],
        "peak_memory_mb": round(memory.peak_reserved / _MIB, 1),
        "peak_allocated_mb": round(memory.peak_allocated / _MIB, 1),
        "pool_overhead_mb": round(memory.pool_overhead / _MIB, 1),
        "remaining_mb": round(memory.remaining / _MIB, 1),
        "predicted": _predicted(chosen),
        "one_device": _predicted(alone),
        "fell_back": report.fell_back,
    }


def _predicted(candidate: dict[str, Any] | None) -> dict[str, float] | None:
    if candidate is None or candidate["peak"] is None:
        return None
    return {"seconds": round(candidate["seconds"], 3), "peak_allocated_mb": round(candidate["peak"] / _MIB, 1)}
