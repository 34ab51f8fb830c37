"""The work of a rank in a server: it denoises one attempt after another, and passes the latents on to the decoder."""

from __future__ import annotations

import base64
import io
import logging
import os
import queue
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from halovae.device.kinds import Device
from halovae.device.memory import MemoryMeter
from halovae.kernels.native import ready
from halovae.pipelines.generator import Generator, Made, StepEnd
from halovae.pipelines.previews import Preview, previews
from halovae.pipelines.specs import Prompt
from halovae.planning.planner import USABLE
from halovae.runtime.options import DecodeOptions
from halovae.runtime.vae import VAE
from halovae.serving import logs
from halovae.serving.broadcast import IDLE, RankZeroBroadcast
from halovae.serving.channel import Link, RankChannel
from halovae.serving.decoding import Decoding, summary, survived
from halovae.serving.files import Attempt, Batch, Writer
from halovae.serving.settings import RankSettings

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The front has cancelled the attempt."""


def serve_as_rank(settings: RankSettings, ready: Event | None = None, link: Link | None = None) -> None:
    """Work on the front's attempts until the process is ended.

    Args:
        settings: the same on all ranks.
        ready: an event to set once attempts can be worked on.
        link: how rank 0 reaches the front; None for a front on this host.
    """
    logs.configure(settings.log_format, settings.log_level)
    is_rank_zero = int(os.environ.get("RANK", "0")) == 0
    channel = RankChannel(link or settings.output) if is_rank_zero else None
    begin = time.monotonic()
    generator = Generator(
        settings.model, settings.dtype, settings.vae_dtype, settings.ulysses, settings.ring, settings.offload,
        settings.vae_mode,
    )  # fmt: skip
    engine = Engine(generator, settings, channel)
    if settings.warmup is not None:
        engine.warm_up(*settings.warmup)
    if channel is not None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        log.info("%s is ready on %d rank(s), after %.1f s", settings.model.name, ranks, time.monotonic() - begin)
        channel.ready = True
    if ready is not None:
        ready.set()
    engine.run()


class Engine:
    """The work of one rank. Every rank has an engine; rank 0 receives attempts by its `channel`."""

    def __init__(self, generator: Generator, settings: RankSettings, channel: RankChannel | None) -> None:
        self._generator, self._channel = generator, channel
        self._device = Device(generator.device)
        self._broadcast = RankZeroBroadcast()
        self._options: DecodeOptions = {"memory_budget": settings.memory_budget}
        if settings.vae_grid is None:
            self._options["mode"] = settings.vae_mode
        else:
            self._options["grid"] = settings.vae_grid
        # None if the pipeline decodes within its own call.
        self._decoding: Decoding | None = None
        self._writer: Writer | None = None
        if not generator.kind.whole:
            self._decoding = Decoding(
                generator.decoder, self._options, settings.decode_batch, RankZeroBroadcast(), channel
            )
        elif channel is not None:
            self._writer = Writer(channel)
        self._needs: dict[tuple[Any, ...], int] = {}  # bytes that denoising took on a rank, by `_memory_key`
        self._free = 0
        self._held: Attempt | None = None  # rank 0's next attempt, until it may be denoised
        self._previews: VAE | None = None

    def warm_up(self, width: int, height: int, frames: int) -> None:
        """Generate once, so that the first request does not wait for one-time work."""
        ready(self._device.torch_device, wait=True)
        kind, picture = self._generator.kind, io.BytesIO()
        Image.new("RGB", (width, height)).save(picture, "png")
        images = (picture.getvalue(),) * kind.pictures.start
        prompt = kind.fitted(Prompt("", (width, height), frames, steps=1, images=images))
        if kind.whole:
            self._generator.make(prompt, options=self._options)
            return
        latents = self._generator.denoise(prompt)
        self._generator.decoder.warmup(latents.shape, **self._options)

    def run(self) -> None:
        """Denoise attempts, forever."""
        for thread in (self._decoding, self._writer):
            if thread is not None:
                thread.start()
        while True:
            attempt = self._broadcast.send(self._next() if self._broadcast.is_rank_zero else None)
            if attempt is None:
                continue
            with survived(self._broadcast, self._channel, [attempt.id]):
                try:
                    results = self._results(attempt)
                except Cancelled:
                    if self._channel is not None:
                        self._channel.send("cancelled", attempt.id)
                else:
                    self._pass_on(attempt, results)

    def _next(self) -> Attempt | None:
        """Return the next attempt once it may be denoised beside running decodes.

        None if no attempt arrives within `IDLE`, if none may be denoised within it, or if its input pictures are lost.
        The other ranks wait for the answer, and take a long silence for the end of this one.
        """
        assert self._channel is not None
        if self._held is None:
            try:
                message = self._channel.attempts.get(timeout=IDLE)
            except queue.Empty:
                return None
            try:
                self._held = _attempt_from(message, self._channel)
            except OSError as error:
                log.error("an input picture cannot be read: %s", error)
                self._channel.send("failed", message["attempt"], code="input_lost", message="an input picture is gone")
                return None
        attempt = self._held
        if self._decoding is not None and not self._decoding.wait_until(lambda: self._has_room(attempt), IDLE):
            return None
        self._held = None
        return attempt

    def _has_room(self, attempt: Attempt) -> bool:
        """Whether an attempt may be denoised beside a decode: both were measured, and fit into memory together.

        An attempt that was not measured yet is denoised on its own, and measured.
        """
        assert self._decoding is not None
        need, decodes = self._needs.get(_memory_key(attempt)), self._decoding.needs.values()
        return need is not None and bool(decodes) and need + max(decodes) <= USABLE * self._free

    def _pass_on(self, attempt: Attempt, results: Sequence[Tensor | Made]) -> None:
        """Queue latents for decoding, or frames for writing."""
        latents = [result for result in results if isinstance(result, Tensor)]
        made = [result for result in results if isinstance(result, Made)]
        if self._decoding is not None:
            self._decoding.add(attempt, torch.cat(latents))
        elif self._writer is not None:
            batch = Batch([attempt])
            self._writer.write(batch, torch.cat([result.frames for result in made if result.frames is not None]))
            seconds = round(sum(result.report.seconds for result in made), 3)
            self._writer.finish(batch, {**summary(made[-1].report), "seconds": seconds})

    def _results(self, attempt: Attempt) -> list[Tensor | Made]:
        """Return the latents of all results of an attempt, or their frames if the pipeline decodes within its own call.

        Raises:
            Cancelled: the front has cancelled the attempt.
        """
        meter = MemoryMeter(self._device) if _memory_key(attempt) not in self._needs else None
        begin, prompt, watch = time.monotonic(), attempt.prompt, self._watch(attempt)
        results: list[Tensor | Made] = []
        for index in range(len(attempt.paths)):
            steps_before = index * prompt.steps

            def report_step(step: int, steps_before: int = steps_before) -> None:
                if self._broadcast.send(self._channel is not None and attempt.id in self._channel.cancelled):
                    raise Cancelled
                if self._channel is not None:
                    self._channel.send("progress", attempt.id, stage="denoising", done=steps_before + step)

            if self._channel is not None and index == 0:
                self._channel.send("started", attempt.id)
            report_step(0)
            seeded = replace(prompt, seed=prompt.seed + index)
            if self._generator.kind.whole:
                results.append(self._generator.make(seeded, report_step, watch, options=self._options))
            else:
                results.append(self._generator.denoise(seeded, report_step, watch))
        memory = self._broadcast.gather((meter.read().above_resting if meter else 0, self._device.memory()[0]))
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self._device.kind == "cpu" else 1
        self._free = min(free for _, free in memory) // sharing
        if meter:
            self._needs[_memory_key(attempt)] = max(need for need, _ in memory)
        if self._channel is not None:
            self._channel.send("denoised", attempt.id, seconds=round(time.monotonic() - begin, 3))
        return results

    def _watch(self, attempt: Attempt) -> StepEnd | None:
        """Return a callback that draws an attempt's previews.

        None on ranks other than 0, if no previews are requested, or if the pipeline supports none.
        """
        channel, pipeline = self._channel, self._generator.pipeline
        if channel is None or attempt.preview_every is None:
            return None
        if self._previews is None:
            self._previews = VAE(pipeline.vae)  # a separate VAE, as a decode may be running in another thread

        def show(preview: Preview) -> None:
            file = io.BytesIO()
            preview.picture.save(file, "jpeg")
            channel.send("preview", attempt.id, step=preview.step, picture=base64.b64encode(file.getvalue()).decode())

        try:
            draw = previews(
                pipeline, every=attempt.preview_every, show=show, size=attempt.prompt.size, decoder=self._previews
            )
        except TypeError as error:
            log.warning("no previews of %s: %s", attempt.id, error)
            return None
        works = True

        def watch(*step: Any) -> None:
            nonlocal works
            try:
                if works:
                    draw(*step)
            except Exception as error:  # a failed preview does not fail the job
                works = False
                log.warning("no more previews of %s: %s", attempt.id, error)

        return watch


def _attempt_from(message: dict[str, Any], channel: RankChannel) -> Attempt:
    prompt = message["prompt"]
    images = (*message["pictures"], *(Path(path).read_bytes() for path in prompt["images"]))
    return Attempt(
        message["attempt"],
        Prompt(**{**prompt, "size": tuple(prompt["size"]), "images": images}),
        tuple(channel.place(path) for path in message["paths"]),
        message["fps"],
        message["preview_every"],
    )


def _memory_key(attempt: Attempt) -> tuple[Any, ...]:
    """Return the properties of an attempt on which its denoising memory depends."""
    prompt = attempt.prompt
    guided = prompt.negative is not None or (prompt.guidance or 0) > 1
    return prompt.size, prompt.frames, len(prompt.images), guided, attempt.preview_every is not None
