"""The front's end of the line: which job the ranks get next, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from halovae.media import discard
from halovae.serving.jobs import ATTEMPTS, Job, Jobs, Wish, adopt, tidy
from halovae.serving.line import BEAT
from halovae.serving.metrics import Metrics
from halovae.serving.settings import FrontSettings, RankSettings

log = logging.getLogger(__name__)
_SILENCE = 10 * BEAT  # after which ranks count as gone
_AHEAD = 2  # orders that are not denoised yet: one at work, and one for when it is done
_DENOISING = 80  # percent of a job's progress; the rest is decoding


class QueueFull(Exception):
    """As many jobs wait as may."""


@dataclass
class _Flight:
    """A job that the ranks have."""

    job: Job
    stage: str = "waiting"
    done: int = 0


class Dispatcher:
    """Takes jobs, gives them to the ranks in turn, and keeps what comes of them; for the event loop's thread."""

    def __init__(self, jobs: Jobs, ranks: RankSettings, front: FrontSettings, metrics: Metrics) -> None:
        self.jobs, self._ranks, self._front, self._metrics = jobs, ranks, front, metrics
        self._flights: dict[str, _Flight] = {}
        self._removed: dict[str, Job] = {}  # by order, until the ranks have let go of it
        self._peer: bytes | None = None
        self._ready, self._heard = False, 0.0
        self._listeners: set[asyncio.Queue[Job | None]] = set()
        self.inputs = ranks.output / ".inputs"
        self.inputs.mkdir(exist_ok=True)
        ranks.results.mkdir(exist_ok=True)
        for job in jobs.of("in_progress"):
            self._retry(job, "the server was ended while it was being made")
        tidy(ranks.results)
        adopt(ranks.output, ranks.results, jobs.of("completed"))
        context = zmq.asyncio.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ranks.endpoint)

    @property
    def expire_after(self) -> float:
        """Seconds that finished files are kept."""
        return self._front.expire_after

    @property
    def ready(self) -> bool:
        """Whether there are ranks that work on jobs."""
        return self._ready and time.monotonic() - self._heard < _SILENCE

    async def run(self) -> None:
        """Hear what the ranks have to say, for ever."""
        while True:
            peer, message = await self._socket.recv_multipart()
            try:
                await self._take(peer, json.loads(message))
            except Exception:  # one job's trouble must not end the others'
                log.exception("a message of the ranks was not understood")

    async def close(self) -> None:
        self._socket.close()
        for listener in self._listeners:
            listener.put_nowait(None)

    def progress(self, job: Job) -> int:
        """Percent."""
        if job.status == "completed":
            return 100
        flight = next((one for one in self._flights.values() if one.job.id == job.id), None)
        if flight is None or flight.stage == "waiting":
            return 0
        if flight.stage == "denoising":
            return _DENOISING * flight.done // (job.wish.steps * job.wish.count)
        return _DENOISING + (99 - _DENOISING) * flight.done // job.wish.frames

    async def submit(self, job: Job) -> None:
        """Keep a job, and work on it when its turn comes.

        Raises:
            QueueFull: as many wait as may.
        """
        if self.jobs.count("queued") >= self._front.max_queue:
            raise QueueFull
        self.jobs.add(job)
        self._metrics.submitted.labels(job.kind).inc()
        self._publish(job)
        await self._pump()

    async def remove(self, job: Job) -> None:
        """Stop working on a job, and forget it and its files."""
        self.jobs.delete(job.id)
        for order, flight in list(self._flights.items()):
            if flight.job.id == job.id:
                await self._send({"kind": "cancel", "order": order})
                self._removed[order] = self._flights.pop(order).job
        self._discard(job)
        self._publish(job)
        await self._pump()

    @contextmanager
    def listening(self) -> Iterator[asyncio.Queue[Job | None]]:
        """A queue of the jobs that change from now on; None at the server's end."""
        listener: asyncio.Queue[Job | None] = asyncio.Queue()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    async def changes(self, job: Job) -> AsyncIterator[Job]:
        """A job each time it has changed, until it has ended or is gone."""
        with self.listening() as listener:
            current = self.jobs.get(job.id)
            while current is not None and not current.ended:
                changed = await listener.get()
                if changed is None:
                    return
                if changed.id == job.id:
                    current = self.jobs.get(job.id)
                    if current is not None:
                        yield current

    def expire(self) -> None:
        """Forget ended jobs that are too old, and the oldest ones while all files together are too large."""
        now, size = time.time(), 0
        for job in reversed(self.jobs.of("completed", "failed")):
            size += sum(path.stat().st_size for path in self.paths(job) if path.exists())
            old = now - (job.completed or job.created) > self._front.expire_after
            if old or (self._front.max_output is not None and size > self._front.max_output):
                self.jobs.delete(job.id)
                self._discard(job)
                self._publish(job)

    def paths(self, job: Job) -> list[Path]:
        """Where a job's results are, or will be."""
        return [self._ranks.results / name for name in job.names()]

    async def _send(self, message: dict[str, Any]) -> None:
        if self._peer is not None:
            await self._socket.send_multipart([self._peer, json.dumps(message).encode()])

    async def _take(self, peer: bytes, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "beat" and peer != self._peer:
            await self._greet(peer)
        if peer != self._peer:
            return  # ranks that are no more
        self._heard = time.monotonic()
        if kind == "beat":
            self._ready = bool(message["ready"])
        elif flight := self._flights.get(message["order"]):
            self._advance(message["order"], flight, kind, message)
            self._publish(flight.job)
        elif kind in ("finished", "failed", "cancelled") and message["order"] in self._removed:
            self._discard(self._removed.pop(message["order"]))
        await self._pump()

    async def _greet(self, peer: bytes) -> None:
        """New ranks: what others were given is to be done again."""
        if self._peer is not None:
            self._metrics.restarts.inc()
        self._peer, self._ready = peer, False
        await self._send({"kind": "welcome"})
        flights, self._flights = self._flights, {}
        for flight in flights.values():
            if flight.stage != "waiting":
                self._retry(flight.job, "a rank ended while it was being made")
            self._publish(flight.job)

    def _advance(self, order: str, flight: _Flight, kind: str, message: dict[str, Any]) -> None:
        job, now = flight.job, time.time()
        if kind == "started":
            flight.stage = "denoising"
            self.jobs.update(job, status="in_progress", started=now, attempts=job.attempts + 1)
        elif kind == "progress":
            flight.stage, flight.done = message["stage"], message["done"]
        elif kind == "denoised":
            flight.stage, flight.done = "decoding", 0
            self.jobs.update(job, denoised=message["seconds"])
            self._metrics.denoising.labels(job.kind).observe(message["seconds"])
        else:
            del self._flights[order]
            if kind == "finished":
                decode = message["decode"]
                self.jobs.update(job, status="completed", completed=now, files=job.names(), report=decode)
                self._metrics.finished(job, decode)
                self._drop_inputs(job)
            elif kind == "failed":
                self._fail(job, message["code"], message["message"])
            else:  # cancelled by nobody here: the ranks let go of it
                self._retry(job, "the ranks gave it up")

    def _retry(self, job: Job, reason: str) -> None:
        if job.attempts < ATTEMPTS:
            self.jobs.update(job, status="queued", started=None)
        else:
            self._fail(job, "interrupted", f"{reason}, {ATTEMPTS} times")

    def _fail(self, job: Job, code: str, message: str) -> None:
        self.jobs.update(job, status="failed", completed=time.time(), error_code=code, error_message=message)
        self._metrics.failed.labels(job.kind, code).inc()
        self._drop_inputs(job)

    def _drop_inputs(self, job: Job) -> None:
        for path in job.wish.images:
            Path(path).unlink(missing_ok=True)

    def _discard(self, job: Job) -> None:
        self._drop_inputs(job)
        for path in self.paths(job):
            discard(path)

    def _publish(self, job: Job) -> None:
        for listener in self._listeners:
            listener.put_nowait(job)

    async def _pump(self) -> None:
        """Give the ranks what they have room for."""
        if not self._ready:
            return
        most = _AHEAD + 2 * self._ranks.decode_batch
        ahead = sum(flight.stage in ("waiting", "denoising") for flight in self._flights.values())
        room = min(_AHEAD - ahead, most - len(self._flights))
        if room <= 0:
            return
        given = {flight.job.id for flight in self._flights.values()}
        waiting = [job for job in self.jobs.of("queued", limit=len(given) + room) if job.id not in given]
        for job in waiting[:room]:
            order = uuid.uuid4().hex
            self._flights[order] = _Flight(job)
            await self._send(
                {"kind": "order", "order": order, "prompt": _prompt(job.wish), "fps": job.wish.fps,
                 "paths": [str(path) for path in self.paths(job)]}
            )  # fmt: skip


def _prompt(wish: Wish) -> dict[str, Any]:
    fields = asdict(wish)
    return {name: fields[name] for name in fields.keys() - {"count", "fps", "asked"}}
