"""What a rank does in a server: denoise one order after the other, and pass the latents on to be decoded."""

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
from halovae.runtime.vae import VAE
from halovae.serving.decoding import Decoding, summary, survived
from halovae.serving.files import Batch, Order, Writer
from halovae.serving.lead import IDLE, Lead
from halovae.serving.line import RankLine
from halovae.serving.settings import RankSettings

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Nobody asks for the order any more."""


def serve_as_rank(settings: RankSettings, ready: Event | None = None) -> None:
    """Work on what the front orders, until the process is ended.

    Args:
        settings: the same on all ranks.
        ready: is set once orders can be worked on.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    first = int(os.environ.get("RANK", "0")) == 0
    line = RankLine(settings.endpoint) if first else None
    begin = time.monotonic()
    generator = Generator(
        settings.model, settings.dtype, settings.vae_dtype, settings.ulysses, settings.ring, settings.offload,
        settings.vae_mode,
    )  # fmt: skip
    engine = Engine(generator, settings, line)
    if settings.warmup is not None:
        engine.warm_up(*settings.warmup)
    if line is not None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        log.info("%s is ready on %d rank(s), after %.1f s", settings.model.name, ranks, time.monotonic() - begin)
        line.ready = True
    if ready is not None:
        ready.set()
    engine.run()


class Engine:
    """A rank's work; all ranks have one, and rank 0's `line` says what to do."""

    def __init__(self, generator: Generator, settings: RankSettings, line: RankLine | None) -> None:
        self._generator, self._line = generator, line
        self._device = Device(generator.device)
        self._lead = Lead()
        self._options: dict[str, Any] = {"memory_budget": settings.memory_budget}
        self._options |= {"grid": settings.vae_grid} if settings.vae_grid else {"mode": settings.vae_mode}
        # None where a pipeline decodes within its own call.
        self._decoding: Decoding | None = None
        self._writer: Writer | None = None
        if not generator.kind.whole:
            self._decoding = Decoding(generator.decoder, self._options, settings.decode_batch, Lead(), line)
        elif line is not None:
            self._writer = Writer(line)
        self._needs: dict[tuple[Any, ...], int] = {}  # bytes that denoising took on a rank, by what was made
        self._free = 0
        self._previews: VAE | None = None

    def warm_up(self, width: int, height: int, frames: int) -> None:
        """Generate something once, so that the first request need not wait for what is done only once."""
        ready(self._device.torch_device, wait=True)
        kind, picture = self._generator.kind, io.BytesIO()
        Image.new("RGB", (width, height)).save(picture, "png")
        images = (picture.getvalue(),) * kind.pictures.start
        prompt = kind.fitted(Prompt("", (width, height), frames, steps=1, images=images))
        if kind.whole:
            self._generator.make(prompt, **self._options)
            return
        latents = self._generator.denoise(prompt)
        self._generator.decoder.warmup(latents.shape, **self._options)

    def run(self) -> None:
        """Denoise what is ordered, for ever."""
        for thread in (self._decoding, self._writer):
            if thread is not None:
                thread.start()
        while True:
            order = self._lead.say(self._next() if self._lead.first else None)
            if order is None:
                continue
            with survived(self._lead, self._line, [order.id]):
                try:
                    results = self._results(order)
                except Cancelled:
                    if self._line is not None:
                        self._line.tell("cancelled", order.id)
                else:
                    self._pass_on(order, results)

    def _next(self) -> Order | None:
        """The next order, once it may be denoised beside what is being decoded; None if there is none for long."""
        assert self._line is not None
        try:
            message = self._line.orders.get(timeout=IDLE)
        except queue.Empty:
            return None
        try:
            order = _order(message)
        except OSError as error:
            self._line.tell("failed", message["order"], code="input_lost", message=str(error))
            return None
        if self._decoding is not None:
            self._decoding.wait_until(lambda: self._has_room(order))
        return order

    def _has_room(self, order: Order) -> bool:
        """Whether denoising has memory beside a decode: both have been measured before, and together are not too much.

        What was not measured yet is denoised alone, and measured.
        """
        assert self._decoding is not None
        need, decodes = self._needs.get(_likeness(order)), self._decoding.needs.values()
        return need is not None and bool(decodes) and need + max(decodes) <= USABLE * self._free

    def _pass_on(self, order: Order, results: Sequence[Tensor | Made]) -> None:
        """Have latents decoded, or frames written."""
        latents = [one for one in results if isinstance(one, Tensor)]
        made = [one for one in results if isinstance(one, Made)]
        if self._decoding is not None:
            self._decoding.add(order, torch.cat(latents))
        elif self._writer is not None:
            batch = Batch([order])
            self._writer.write(batch, torch.cat([one.frames for one in made if one.frames is not None]))
            seconds = round(sum(one.report.seconds for one in made), 3)
            self._writer.finish(batch, {**summary(made[-1].report), "seconds": seconds})

    def _results(self, order: Order) -> list[Tensor | Made]:
        """The latents of all of an order's results, or their frames where the pipeline decodes too."""
        meter = MemoryMeter(self._device) if _likeness(order) not in self._needs else None
        begin, prompt, watch = time.monotonic(), order.prompt, self._watch(order)
        results: list[Tensor | Made] = []
        for index in range(len(order.paths)):
            made = index * prompt.steps

            def told(step: int, made: int = made) -> None:
                if self._lead.say(self._line is not None and order.id in self._line.cancelled):
                    raise Cancelled
                if self._line is not None:
                    self._line.tell("progress", order.id, stage="denoising", done=made + step)

            if self._line is not None and index == 0:
                self._line.tell("started", order.id)
            told(0)
            own = replace(prompt, seed=prompt.seed + index)
            if self._generator.kind.whole:
                results.append(self._generator.make(own, told, watch, **self._options))
            else:
                results.append(self._generator.denoise(own, told, watch))
        everyone = self._lead.all_say((meter.read().above_resting if meter else 0, self._device.memory()[0]))
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self._device.kind == "cpu" else 1
        self._free = min(free for _, free in everyone) // sharing
        if meter:
            self._needs[_likeness(order)] = max(need for need, _ in everyone)
        if self._line is not None:
            self._line.tell("denoised", order.id, seconds=round(time.monotonic() - begin, 3))
        return results

    def _watch(self, order: Order) -> StepEnd | None:
        """What draws an order's previews, on rank 0; None if nobody asked for them, or it is not known how."""
        line, pipeline = self._line, self._generator.pipeline
        if line is None or order.preview_every is None:
            return None
        if self._previews is None:
            self._previews = VAE(pipeline.vae)  # of its own, as a decode may be under way in another thread

        def show(preview: Preview) -> None:
            file = io.BytesIO()
            preview.picture.save(file, "jpeg")
            line.tell("preview", order.id, step=preview.step, picture=base64.b64encode(file.getvalue()).decode())

        try:
            draw = previews(
                pipeline, every=order.preview_every, show=show, size=order.prompt.size, decoder=self._previews
            )
        except TypeError as error:
            log.warning("no previews of %s: %s", order.id, error)
            return None
        works = True

        def watch(*step: Any) -> None:
            nonlocal works
            try:
                if works:
                    draw(*step)
            except Exception as error:  # the job does not fail for it
                works = False
                log.warning("no more previews of %s: %s", order.id, error)

        return watch


def _order(message: dict[str, Any]) -> Order:
    prompt = message["prompt"]
    images = tuple(Path(path).read_bytes() for path in prompt["images"])
    return Order(
        message["order"],
        Prompt(**{**prompt, "size": tuple(prompt["size"]), "images": images}),
        tuple(Path(path) for path in message["paths"]),
        message["fps"],
        message["preview_every"],
    )


def _likeness(order: Order) -> tuple[Any, ...]:
    """What denoising memory depends on."""
    prompt = order.prompt
    guided = prompt.negative is not None or (prompt.guidance or 0) > 1
    return prompt.size, prompt.frames, len(prompt.images), guided, order.preview_every is not None
