"""The front's end of the line: which job the ranks get next, and what becomes of it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import zmq
import zmq.asyncio

from halovae.io.media import discard
from halovae.serving.jobs import ATTEMPTS, Job, Jobs, Wish, adopt, tidy
from halovae.serving.line import BEAT
from halovae.serving.metrics import Metrics
from halovae.serving.settings import FrontSettings, RankSettings

log = logging.getLogger(__name__)
_SILENCE = 10 * BEAT  # after which ranks count as gone
_AHEAD = 2  # orders that are not denoised yet: one at work, and one for when it is done
_DENOISING = 80  # percent of a job's progress; the rest is decoding
_BUSY = 0.05  # seconds that the event loop waits for another process that writes to the database
_PAUSES = 0.1, 2.0  # seconds until news that could not be written is tried again: at first, and at most


class QueueFull(Exception):
    """As many jobs wait as may."""


class Drawn(NamedTuple):
    """The latest preview of a job.

    Attributes:
        done: how many steps of all its results were done.
        jpeg: the picture.
    """

    done: int
    jpeg: bytes


@dataclass
class _Flight:
    """A job that the ranks have."""

    job: Job
    stage: str = "waiting"
    done: int = 0
    preview: Drawn | None = None
    over: bool = False  # the ranks have let go of it, which is not on disk yet


class _News(NamedTuple):
    """What has become of an order, until it is on disk.

    Attributes:
        write: puts it on disk before it does anything else.
        last: nothing more will come of the order.
    """

    order: str
    write: Callable[[Job], None]
    last: bool


class Dispatcher:
    """Takes jobs, gives them to the ranks in turn, and keeps what comes of them; for the event loop's thread."""

    def __init__(self, jobs: Jobs, ranks: RankSettings, front: FrontSettings, metrics: Metrics) -> None:
        self.jobs, self._ranks, self._front, self._metrics = jobs, ranks, front, metrics
        self._flights: dict[str, _Flight] = {}
        self._removed: dict[str, Job] = {}  # by order, until the ranks have let go of it
        self._news: deque[_News] = deque()
        self._pause, self._next_try = _PAUSES[0], 0.0
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
        jobs.wait_for_others(_BUSY)

    @property
    def expire_after(self) -> float:
        """Seconds that finished files are kept."""
        return self._front.expire_after

    @property
    def ready(self) -> bool:
        """Whether there are ranks that work on jobs."""
        return self._ready and time.monotonic() - self._heard < _SILENCE

    async def run(self) -> None:
        """Hear what the ranks have to say, and write it down, for ever."""
        while True:
            pause = max(0.0, self._next_try - time.monotonic()) if self._news else None
            if await self._socket.poll(None if pause is None else round(1000 * pause)):
                parts = await self._socket.recv_multipart()
                try:
                    peer, message = parts
                    await self._take(peer, json.loads(message))
                except Exception:  # one job's trouble must not end the others'
                    log.exception("a message of the ranks was not understood")
            if time.monotonic() >= self._next_try:
                self._write()
            await self._pump()

    async def close(self) -> None:
        with suppress(sqlite3.Error):  # a job whose end is not written is made again after the next start
            self._write()
        self._socket.close()
        for listener in self._listeners:
            listener.put_nowait(None)

    def progress(self, job: Job) -> int:
        """Percent."""
        if job.status == "completed":
            return 100
        flight = self._flight(job)
        if flight is None or flight.stage == "waiting":
            return 0
        if flight.stage == "denoising":
            return _DENOISING * flight.done // (job.wish.steps * job.wish.count)
        return _DENOISING + (99 - _DENOISING) * flight.done // job.wish.frames

    def preview(self, job: Job) -> Drawn | None:
        """The latest one; None if there is none, or the job is no longer being made."""
        flight = self._flight(job)
        return None if flight is None else flight.preview

    def _flight(self, job: Job) -> _Flight | None:
        return next((one for one in self._flights.values() if one.job.id == job.id), None)

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
                del self._flights[order]
                if not flight.over:
                    self._removed[order] = job
                    await self._send({"kind": "cancel", "order": order})
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
            try:
                size += sum(path.stat().st_size for path in self.paths(job) if path.exists())
                old = now - (job.completed or job.created) > self._front.expire_after
                if old or (self._front.max_output is not None and size > self._front.max_output):
                    self._discard(job)  # first: what is no longer in the database would never be removed
                    self.jobs.delete(job.id)
                    self._publish(job)
            except OSError:
                log.exception("%s cannot be removed, and is tried again at the next sweep", job.id)

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
        elif kind in ("finished", "failed", "cancelled") and message["order"] in self._removed:
            self._discard(self._removed.pop(message["order"]))

    async def _greet(self, peer: bytes) -> None:
        """New ranks: what others were given is to be done again."""
        if self._peer is not None:
            self._metrics.restarts.inc()
        self._peer, self._ready = peer, False
        await self._send({"kind": "welcome"})
        for order, flight in list(self._flights.items()):
            if flight.over:
                continue  # its end is still to be written
            if flight.stage == "waiting":
                del self._flights[order]
            else:
                flight.over = True
                self._news.append(
                    _News(order, partial(self._retry, reason="a rank ended while it was being made"), True)
                )

    def _advance(self, order: str, flight: _Flight, kind: str, message: dict[str, Any]) -> None:
        """What the ranks are at is known at once; what becomes of the job only once it is written."""
        now = time.time()
        write: Callable[[Job], None]
        if kind == "started":
            write = partial(self._begin, now=now)
            flight.stage = "denoising"
        elif kind == "progress":
            flight.stage, flight.done = message["stage"], message["done"]
            return self._publish(flight.job)
        elif kind == "preview":
            flight.preview = Drawn(flight.done, base64.b64decode(message["picture"]))
            return self._publish(flight.job)
        elif kind == "denoised":
            write = partial(self._denoised, seconds=message["seconds"])
            flight.stage, flight.done = "decoding", 0
        elif kind == "finished":
            write = partial(self._complete, now=now, decode=message["decode"])
        elif kind == "failed":
            write = partial(self._fail, code=message["code"], message=message["message"])
        else:  # cancelled by nobody here: the ranks let go of it
            write = partial(self._retry, reason="the ranks gave it up")
        flight.over = kind not in ("started", "denoised")
        self._news.append(_News(order, write, flight.over))

    def _write(self) -> None:
        """Write the news in order. What cannot be written now, and what comes after it, is tried again later."""
        while self._news:
            order, write, last = self._news[0]
            flight = self._flights.get(order)
            if flight is not None:  # else its job was removed meanwhile
                try:
                    write(flight.job)
                except sqlite3.OperationalError as error:
                    if self._pause == _PAUSES[0]:
                        log.warning("the jobs cannot be written (%s): this is tried again until they are", error)
                    self._next_try = time.monotonic() + self._pause
                    self._pause = min(2 * self._pause, _PAUSES[1])
                    return
                except sqlite3.Error:
                    raise  # waiting would not help
                except Exception:
                    log.exception("%s is written, but not all was done that follows", flight.job.id)
                if last:
                    del self._flights[order]
                self._publish(flight.job)
            self._news.popleft()
        if self._pause != _PAUSES[0]:
            self._pause = _PAUSES[0]
            log.warning("the jobs are written again")

    def _begin(self, job: Job, now: float) -> None:
        self.jobs.update(job, status="in_progress", started=now, attempts=job.attempts + 1)

    def _denoised(self, job: Job, seconds: float) -> None:
        self.jobs.update(job, denoised=seconds)
        self._metrics.denoising.labels(job.kind).observe(seconds)

    def _complete(self, job: Job, now: float, decode: dict[str, Any]) -> None:
        self.jobs.update(job, status="completed", completed=now, files=job.names(), report=decode)
        self._metrics.finished(job, decode)
        self._drop_inputs(job)

    def _retry(self, job: Job, reason: str) -> None:
        if job.attempts < ATTEMPTS:
            self.jobs.update(job, status="queued", started=None)
        else:
            self._fail(job, "interrupted", f"{reason}, {ATTEMPTS} times")

    def _fail(self, job: Job, code: str, message: str) -> None:
        text = message.encode(errors="replace").decode()  # SQLite takes no lone surrogates
        self.jobs.update(job, status="failed", completed=time.time(), error_code=code, error_message=text)
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
        ahead = sum(flight.stage in ("waiting", "denoising") for flight in self._flights.values() if not flight.over)
        room = min(_AHEAD - ahead, most - len(self._flights))
        if room <= 0:
            return
        given = {flight.job.id for flight in self._flights.values()}
        try:
            waiting = [job for job in self.jobs.of("queued", limit=len(given) + room) if job.id not in given]
        except sqlite3.OperationalError as error:  # the ranks' next beat comes here again
            return log.warning("the jobs cannot be read (%s)", error)
        for job in waiting[:room]:
            order = uuid.uuid4().hex
            self._flights[order] = _Flight(job)
            await self._send(
                {"kind": "order", "order": order, "prompt": _prompt(job.wish), "fps": job.wish.fps,
                 "preview_every": job.wish.preview_every, "paths": [str(path) for path in self.paths(job)]}
            )  # fmt: skip


def _prompt(wish: Wish) -> dict[str, Any]:
    fields = asdict(wish)
    return {name: fields[name] for name in fields.keys() - {"count", "fps", "preview_every", "asked"}}
