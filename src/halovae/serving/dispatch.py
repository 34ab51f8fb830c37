"""The front's end of the rank channel. It sends attempts to the ranks, and stores the outcome of each job."""

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
from halovae.serving.channel import BEAT
from halovae.serving.jobs import ATTEMPTS, Job, Jobs, JobSpec, adopt, tidy
from halovae.serving.metrics import Metrics
from halovae.serving.settings import FrontSettings, RankSettings

log = logging.getLogger(__name__)
_SILENCE = 10 * BEAT  # seconds without a message after which ranks count as gone
_AHEAD = 2  # attempts that ranks hold before denoising ends: the current one and the next
_DENOISING = 80  # percent of a job's progress at the end of denoising; the rest is decoding
_BUSY = 0.05  # seconds that the event loop waits for another process that writes to the database
_PAUSES = 0.1, 2.0  # seconds until a failed write is tried again: the first pause, and the longest


class QueueFull(Exception):
    """The queue holds as many jobs as it may."""


class Drawn(NamedTuple):
    """The latest preview of a job.

    Attributes:
        done: how many steps were done, over all results of the job.
        jpeg: the picture.
    """

    done: int
    jpeg: bytes


@dataclass
class _Attempt:
    """An attempt that the ranks have."""

    job: Job
    stage: str = "waiting"
    done: int = 0
    preview: Drawn | None = None
    over: bool = False  # the attempt has ended, but its end is not on disk yet


class _PendingWrite(NamedTuple):
    """A change to an attempt's job that is not on disk yet.

    Attributes:
        attempt: the attempt's id.
        write: writes the change to disk before it does anything else.
        last: whether the change ends the attempt.
    """

    attempt: str
    write: Callable[[Job], None]
    last: bool


class Dispatcher:
    """Takes jobs, gives them to the ranks in turn, and keeps their results. For the event loop's thread only."""

    def __init__(self, jobs: Jobs, ranks: RankSettings, front: FrontSettings, metrics: Metrics) -> None:
        self.jobs, self._ranks, self._front, self._metrics = jobs, ranks, front, metrics
        self._attempts: dict[str, _Attempt] = {}
        self._removed: dict[str, Job] = {}  # by attempt id, until the ranks have ended the attempt
        self._pending: deque[_PendingWrite] = deque()
        self._pause, self._next_try = _PAUSES[0], 0.0
        self._peer: bytes | None = None
        self._ready, self._heard = False, 0.0
        self._listeners: set[asyncio.Queue[Job | None]] = set()
        self.inputs = ranks.output / ".inputs"
        self.inputs.mkdir(exist_ok=True)
        ranks.results.mkdir(exist_ok=True)
        for job in jobs.of("in_progress"):
            self._retry(job, "the server ended while the job was running")
        tidy(ranks.results)
        adopt(ranks.output, ranks.results, jobs.of("completed"))
        context = zmq.asyncio.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ranks.endpoint)
        jobs.wait_for_others(_BUSY)

    @property
    def expire_after(self) -> float:
        """How long finished files are kept, in seconds."""
        return self._front.expire_after

    @property
    def ready(self) -> bool:
        """Whether there are ranks that work on jobs."""
        return self._ready and time.monotonic() - self._heard < _SILENCE

    async def run(self) -> None:
        """Receive messages from the ranks and write them to disk, forever."""
        while True:
            pause = max(0.0, self._next_try - time.monotonic()) if self._pending else None
            if await self._socket.poll(None if pause is None else round(1000 * pause)):
                parts = await self._socket.recv_multipart()
                try:
                    peer, message = parts
                    await self._take(peer, json.loads(message))
                except Exception:  # a failure of one job must not end the others
                    log.exception("a message from the ranks could not be handled")
            if time.monotonic() >= self._next_try:
                self._write()
            await self._pump()

    async def close(self) -> None:
        with suppress(sqlite3.Error):  # a job whose end is not written runs again after the next start
            self._write()
        self._socket.close()
        for listener in self._listeners:
            listener.put_nowait(None)

    def progress(self, job: Job) -> int:
        """Return the job's progress in percent."""
        if job.status == "completed":
            return 100
        attempt = self._attempt_of(job)
        if attempt is None or attempt.stage == "waiting":
            return 0
        if attempt.stage == "denoising":
            return _DENOISING * attempt.done // (job.spec.steps * job.spec.count)
        return _DENOISING + (99 - _DENOISING) * attempt.done // job.spec.frames

    def preview(self, job: Job) -> Drawn | None:
        """Return the job's latest preview; None if there is none, or the job is no longer running."""
        attempt = self._attempt_of(job)
        return None if attempt is None else attempt.preview

    def _attempt_of(self, job: Job) -> _Attempt | None:
        return next((attempt for attempt in self._attempts.values() if attempt.job.id == job.id), None)

    async def submit(self, job: Job) -> None:
        """Store a job, and queue it.

        Raises:
            QueueFull: the queue holds as many jobs as it may.
        """
        if self.jobs.count("queued") >= self._front.limits.queue:
            raise QueueFull
        self.jobs.add(job)
        self._metrics.submitted.labels(job.kind).inc()
        self._publish(job)
        await self._pump()

    async def remove(self, job: Job) -> None:
        """Cancel a job, and delete it and its files."""
        self.jobs.delete(job.id)
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.job.id == job.id:
                del self._attempts[attempt_id]
                if not attempt.over:
                    self._removed[attempt_id] = job
                    await self._send({"kind": "cancel", "attempt": attempt_id})
        self._discard(job)
        self._publish(job)
        await self._pump()

    @contextmanager
    def listening(self) -> Iterator[asyncio.Queue[Job | None]]:
        """Yield a queue that receives each job that changes, and None when the server ends."""
        listener: asyncio.Queue[Job | None] = asyncio.Queue()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    async def changes(self, job: Job) -> AsyncIterator[Job]:
        """Yield a job each time it changes, until it ends or is deleted."""
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
        """Delete ended jobs that are too old, and the oldest ones while all files together are too large."""
        now, size = time.time(), 0
        for job in reversed(self.jobs.of("completed", "failed")):
            try:
                size += sum(path.stat().st_size for path in self.paths(job) if path.exists())
                old = now - (job.completed or job.created) > self._front.expire_after
                if old or (self._front.max_output is not None and size > self._front.max_output):
                    self._discard(job)  # first: files of jobs that are not in the database are never removed
                    self.jobs.delete(job.id)
                    self._publish(job)
            except OSError:
                log.exception("%s cannot be removed: the next sweep tries again", job.id)

    def paths(self, job: Job) -> list[Path]:
        """Return the paths of a job's results, whether they exist yet or not."""
        return [self._ranks.results / name for name in job.names()]

    async def _send(self, message: dict[str, Any]) -> None:
        if self._peer is not None:
            await self._socket.send_multipart([self._peer, json.dumps(message).encode()])

    async def _take(self, peer: bytes, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "beat" and peer != self._peer:
            await self._greet(peer)
        if peer != self._peer:
            return  # from ranks that have been replaced
        self._heard = time.monotonic()
        if kind == "beat":
            self._ready = bool(message["ready"])
        elif attempt := self._attempts.get(message["attempt"]):
            self._advance(message["attempt"], attempt, kind, message)
        elif kind in ("finished", "failed", "cancelled") and message["attempt"] in self._removed:
            self._discard(self._removed.pop(message["attempt"]))

    async def _greet(self, peer: bytes) -> None:
        """Welcome new ranks, and retry the jobs that earlier ranks had."""
        if self._peer is not None:
            self._metrics.restarts.inc()
        self._peer, self._ready = peer, False
        await self._send({"kind": "welcome"})
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.over:
                continue  # its end is not written yet
            if attempt.stage == "waiting":
                del self._attempts[attempt_id]
            else:
                attempt.over = True
                self._pending.append(
                    _PendingWrite(
                        attempt_id, partial(self._retry, reason="a rank ended while the job was running"), True
                    )
                )

    def _advance(self, attempt_id: str, attempt: _Attempt, kind: str, message: dict[str, Any]) -> None:
        """Apply a message about an attempt. Progress is visible at once, the job's status only once it is written."""
        now = time.time()
        write: Callable[[Job], None]
        if kind == "started":
            write = partial(self._begin, now=now)
            attempt.stage = "denoising"
        elif kind == "progress":
            attempt.stage, attempt.done = message["stage"], message["done"]
            return self._publish(attempt.job)
        elif kind == "preview":
            attempt.preview = Drawn(attempt.done, base64.b64decode(message["picture"]))
            return self._publish(attempt.job)
        elif kind == "denoised":
            self._metrics.denoising.labels(attempt.job.kind).observe(message["seconds"])
            attempt.stage, attempt.done = "decoding", 0
            return self._publish(attempt.job)
        elif kind == "finished":
            write = partial(self._complete, now=now, decode=message["decode"])
        elif kind == "failed":
            write = partial(self._fail, code=message["code"], message=message["message"])
        else:  # cancelled, though this front did not cancel it
            write = partial(self._retry, reason="the ranks gave the job up")
        attempt.over = kind != "started"
        self._pending.append(_PendingWrite(attempt_id, write, attempt.over))

    def _write(self) -> None:
        """Write pending changes in order. If one cannot be written, it and all later ones are tried again later."""
        while self._pending:
            attempt_id, write, last = self._pending[0]
            attempt = self._attempts.get(attempt_id)
            if attempt is not None:  # None if its job was removed meanwhile
                try:
                    write(attempt.job)
                except sqlite3.OperationalError as error:
                    if self._pause == _PAUSES[0]:
                        log.warning("the jobs cannot be written (%s): writing is tried again until it succeeds", error)
                    self._next_try = time.monotonic() + self._pause
                    self._pause = min(2 * self._pause, _PAUSES[1])
                    return
                except sqlite3.Error:
                    raise  # waiting would not help
                except Exception:
                    log.exception("%s is written, but a later step failed", attempt.job.id)
                if last:
                    del self._attempts[attempt_id]
                self._publish(attempt.job)
            self._pending.popleft()
        if self._pause != _PAUSES[0]:
            self._pause = _PAUSES[0]
            log.warning("the jobs are written again")

    def _begin(self, job: Job, now: float) -> None:
        self.jobs.update(job, status="in_progress", started=now, attempts=job.attempts + 1)

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
        text = message.encode(errors="replace").decode()  # SQLite rejects lone surrogates
        self.jobs.update(job, status="failed", completed=time.time(), error_code=code, error_message=text)
        self._metrics.failed.labels(job.kind, code).inc()
        self._drop_inputs(job)

    def _drop_inputs(self, job: Job) -> None:
        for path in job.spec.images:
            Path(path).unlink(missing_ok=True)

    def _discard(self, job: Job) -> None:
        self._drop_inputs(job)
        for path in self.paths(job):
            discard(path)

    def _publish(self, job: Job) -> None:
        for listener in self._listeners:
            listener.put_nowait(job)

    async def _pump(self) -> None:
        """Send the ranks as many waiting jobs as they have room for."""
        if not self._ready:
            return
        most = _AHEAD + 2 * self._ranks.decode_batch
        ahead = sum(
            attempt.stage in ("waiting", "denoising") for attempt in self._attempts.values() if not attempt.over
        )
        room = min(_AHEAD - ahead, most - len(self._attempts))
        if room <= 0:
            return
        sent = {attempt.job.id for attempt in self._attempts.values()}
        try:
            waiting = [job for job in self.jobs.of("queued", limit=len(sent) + room) if job.id not in sent]
        except sqlite3.OperationalError as error:  # the next beat of the ranks calls this again
            return log.warning("the jobs cannot be read (%s)", error)
        for job in waiting[:room]:
            attempt_id = uuid.uuid4().hex
            self._attempts[attempt_id] = _Attempt(job)
            await self._send(
                {"kind": "attempt", "attempt": attempt_id, "prompt": _prompt(job.spec), "fps": job.spec.fps,
                 "preview_every": job.spec.preview_every, "paths": [str(path) for path in self.paths(job)]}
            )  # fmt: skip


def _prompt(spec: JobSpec) -> dict[str, Any]:
    fields = asdict(spec)
    return {name: fields[name] for name in fields.keys() - {"count", "fps", "preview_every", "asked"}}
