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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread
import zmq
import zmq.asyncio

from halovae.serving import results
from halovae.serving.attempts import Drawn, Progress, RunningAttempt
from halovae.serving.channel import BEAT, SocketFolder
from halovae.serving.events import Events, Render
from halovae.serving.jobs import Cause, Job, JobSpec, failed, interrupted
from halovae.serving.metrics import Metrics
from halovae.serving.settings import FrontSettings, RankSettings
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

log = logging.getLogger(__name__)
_SILENCE = 10 * BEAT  # seconds without a message after which ranks count as gone
_AHEAD = 2  # attempts that ranks hold before denoising ends: the current one and the next
_PAUSES = 0.1, 2.0  # seconds until a failed write is tried again: the first pause, and the longest
_EXPIRED = 1000  # jobs that one sweep removes at most


class Draining(Exception):
    """The server is ending, and takes no more jobs."""


class _PendingWrite(NamedTuple):
    """Changes to an attempt's job that are not on disk yet. `last`: they end the attempt."""

    attempt: str
    changes: dict[str, Any]
    last: bool


class Dispatcher:
    """Takes jobs, gives them to the ranks in turn, and keeps their results. For the event loop's thread only.

    Args:
        jobs: the jobs on disk.
        ranks: the ranks' settings.
        front: the front's settings.
        metrics: what is counted.
        restart: ends all ranks, so that others start. Called with the reason when the ranks make no progress.
        render: returns the event of a job that changed.
    """

    def __init__(
        self, jobs: JobStore, ranks: RankSettings, front: FrontSettings, metrics: Metrics,
        restart: Callable[[str], object], render: Render,
    ) -> None:  # fmt: skip
        self.jobs, self._ranks, self._front, self._metrics, self._restart = jobs, ranks, front, metrics, restart
        self.events = Events(render)
        self.progress = Progress()
        self.draining = self.closed = False
        self._attempts: dict[str, RunningAttempt] = {}
        self._removed: dict[str, Job] = {}  # by attempt id, until the ranks have ended the attempt
        self._pending: deque[_PendingWrite] = deque()
        self._pause, self._next_try = _PAUSES[0], 0.0
        self._pumping = asyncio.Lock()
        self._peer: bytes | None = None
        self._since = 0.0  # when the present ranks started; earlier ones that still live are not heard
        self._ready, self._heard, self._advanced = False, time.monotonic(), time.monotonic()
        self._cause: Cause = "ranks"  # why the present ranks will have ended
        self.inputs = ranks.output / ".inputs"

    async def start(self) -> None:
        """Recover the jobs of an earlier front, and listen to the ranks."""
        for folder in (self.inputs, self._ranks.results):
            folder.mkdir(mode=0o700, exist_ok=True)
        adopted = await self.jobs.write(JobTable.adopt, results.noted(self._ranks.results))
        if adopted:
            log.warning("%d result(s) that the database did not know were taken over", adopted)
        for job in await self.jobs.read(JobTable.of, "queued", "in_progress"):
            if job.kind == "image" and job.request is None:  # nobody waits for it, and nobody can come back for it
                await self.jobs.write(JobTable.delete, job.id)
        running = await self.jobs.read(JobTable.of, "in_progress")
        for job in running:
            await self.jobs.write(JobTable.update, job, **interrupted(job, "front", len(running) == 1))
        completed = await self.jobs.read(JobTable.of, "completed")
        queued = await self.jobs.read(JobTable.of, "queued")

        def tidy() -> None:
            results.tidy(self._ranks.results)
            results.adopt(self._ranks.output, self._ranks.results, completed)
            results.drop_orphans(self.inputs, queued)

        await anyio.to_thread.run_sync(tidy)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._folder = SocketFolder(self._ranks.output, front=True)
        self._socket.bind(self._folder.endpoint)

    @property
    def expire_after(self) -> float:
        """How long finished files are kept, in seconds."""
        return self._front.expire_after

    @property
    def ready(self) -> bool:
        """Whether there are ranks that work on jobs."""
        return self._ready and time.monotonic() - self._heard < _SILENCE and not self.draining

    async def run(self) -> None:
        """Receive messages from the ranks and write them to disk, forever."""
        while True:
            pause = max(0.0, self._next_try - time.monotonic()) if self._pending else BEAT
            if await self._socket.poll(round(1000 * min(BEAT, pause))):
                parts = await self._socket.recv_multipart()
                try:
                    peer, message = parts
                    await self._take(peer, json.loads(message))
                except Exception:  # a failure of one job must not end the others
                    log.exception("a message from the ranks could not be handled")
            if time.monotonic() >= self._next_try:
                await self._write()
            await self._watch()
            await self._pump()

    @property
    def run_count(self) -> int:
        """How many jobs the ranks work on."""
        return sum(attempt.runs for attempt in self._attempts.values())

    async def drain(self, seconds: float) -> None:
        """Start no more jobs, and wait until those that run have ended, for at most `seconds`."""
        self.draining = True
        until = time.monotonic() + seconds
        async with self._pumping:
            for attempt_id, attempt in list(self._attempts.items()):
                if attempt.stage == "waiting" and not attempt.over:
                    del self._attempts[attempt_id]
                    await self._send({"kind": "cancel", "attempt": attempt_id})
        while time.monotonic() < until and self.run_count:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Put jobs that run back to the queue: the server's end is not their fault."""
        self.draining = self.closed = True
        with suppress(sqlite3.Error):  # what is not written now is recovered at the next start
            await self._write()
            for attempt in self._attempts.values():
                if attempt.runs:
                    await self.jobs.write(JobTable.update, attempt.job, status="queued", started=None)
        self._socket.close()
        self._folder.remove()
        self.events.close()

    def running(self, job: Job) -> RunningAttempt | None:
        """Return the job's attempt that the ranks have, if there is one."""
        return next((attempt for attempt in self._attempts.values() if attempt.job.id == job.id), None)

    def preview(self, job: Job) -> Drawn | None:
        """Return the job's latest preview; None if there is none, or the job is no longer running."""
        attempt = self.running(job)
        return None if attempt is None else attempt.preview

    async def submit(self, job: Job) -> Job:
        """Store a job, and queue it. Return it, or the job that the same request made before.

        Raises:
            QueueFull: the queue holds as many jobs as it may.
            Draining: the server is ending.
        """
        if self.draining:
            raise Draining
        limits = self._front.limits
        per_owner = None if job.owner is None else limits.queue_per_key
        stored = await self.jobs.write(JobTable.add, job, limits.queue, per_owner)
        if stored is job:
            self._metrics.submitted.labels(job.kind).inc()
            self.events.publish(job)
            await self._pump()
        return stored

    async def remove(self, job: Job) -> None:
        """Cancel a job, and delete it and its files."""
        async with self._pumping:
            await self.jobs.write(JobTable.delete, job.id)
            await self._withdraw(job)
        await anyio.to_thread.run_sync(results.remove, self._ranks.results, job)
        self.events.publish(job)
        await self._pump()

    async def cancel(self, job: Job, code: str = "cancelled", message: str = "the job was cancelled") -> None:
        """Fail a job that has not ended. It is no longer worked on."""
        async with self._pumping:
            attempt = self.running(job)
            current = await self.jobs.read(JobTable.get, job.id)
            if current is None or current.ended or (attempt is not None and attempt.over):
                return
            await self.jobs.write(JobTable.update, current, **failed(code, message))
            await self._withdraw(job)
        self._metrics.failed.labels(job.kind, code).inc()
        results.drop_inputs(job)
        self.events.publish(job)
        await self._pump()

    async def _withdraw(self, job: Job) -> None:
        """Tell the ranks that nobody wants a job any more."""
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.job.id == job.id:
                del self._attempts[attempt_id]
                if not attempt.over:
                    self._removed[attempt_id] = job
                    await self._send({"kind": "cancel", "attempt": attempt_id})

    async def expire(self) -> None:
        """Delete ended jobs that are too old, and the oldest ones while all files together are too large."""
        before = time.time() - self._front.expire_after
        for job in await self.jobs.read(JobTable.expired, before, self._front.max_output, _EXPIRED):
            try:  # files first: a job that is not in the database would be taken over again
                await anyio.to_thread.run_sync(results.remove, self._ranks.results, job)
                await self.jobs.write(JobTable.delete, job.id)
                self.events.publish(job)
            except OSError:
                self._metrics.sweep_errors.inc()
                log.exception("%s cannot be removed: the next sweep tries again", job.id)

    def paths(self, job: Job) -> list[Path]:
        """Return the paths of a job's results, whether they exist yet or not."""
        return [self._ranks.results / name for name in job.names()]

    async def _send(self, message: dict[str, Any]) -> None:
        if self._peer is not None:
            await self._socket.send_multipart([self._peer, json.dumps(message).encode()])

    async def _take(self, peer: bytes, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "beat" and peer != self._peer and message["since"] > self._since:
            if not self._folder.knows(message.get("token")):
                return log.error("a process that is none of this server's ranks was turned away")
            self._since = message["since"]
            await self._greet(peer)
        if peer != self._peer:
            return  # from ranks that have been replaced
        self._heard = time.monotonic()
        if kind == "beat":
            self._ready = bool(message["ready"])
            return
        self._advanced = time.monotonic()
        if attempt := self._attempts.get(message["attempt"]):
            self._advance(message["attempt"], attempt, kind, message)
        elif kind in ("finished", "failed", "cancelled") and message["attempt"] in self._removed:
            await anyio.to_thread.run_sync(results.remove, self._ranks.results, self._removed.pop(message["attempt"]))

    async def _greet(self, peer: bytes) -> None:
        """Welcome new ranks, and retry the jobs that earlier ranks had."""
        if self._peer is not None:
            self._metrics.restarts.inc()
        self._peer, self._ready = peer, False
        await self._send({"kind": "welcome", "token": self._folder.token})
        running = [attempt for attempt in self._attempts.values() if attempt.runs]
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.runs:
                self._end(attempt_id, attempt, interrupted(attempt.job, self._cause, len(running) == 1))
            elif not attempt.over:  # else its end is not written yet
                del self._attempts[attempt_id]
        self._cause = "ranks"
        for job in self._removed.values():
            await anyio.to_thread.run_sync(results.remove, self._ranks.results, job)
        self._removed.clear()

    def _advance(self, attempt_id: str, attempt: RunningAttempt, kind: str, message: dict[str, Any]) -> None:
        """Apply a message about an attempt. Progress is visible at once, the job's status only once it is written."""
        now, job = time.time(), attempt.job
        if kind == "started":
            attempt.begin("denoising")
            changes = {"status": "in_progress", "started": now, "attempts": job.attempts + 1}
            self._pending.append(_PendingWrite(attempt_id, changes, False))
        elif kind == "progress":
            attempt.advance(message["stage"], message["done"])
            self.events.publish(job)
        elif kind == "preview":
            attempt.preview = Drawn(attempt.done, base64.b64decode(message["picture"]))
            self.events.publish(job)
        elif kind == "denoised":
            self._metrics.denoising.labels(job.kind).observe(message["seconds"])
            attempt.begin("decoding")
            self.events.publish(job)
        elif kind == "finished":
            self.progress.took(job.spec, message["decode"].get("seconds", 0.0))
            done = {"status": "completed", "completed": now, "files": job.names(), "report": message["decode"]}
            self._end(attempt_id, attempt, done)
        elif kind == "failed":
            self._end(attempt_id, attempt, failed(message["code"], message["message"]))
        else:  # cancelled, though this front did not cancel it
            self._end(attempt_id, attempt, {"status": "queued", "started": None})

    def _end(self, attempt_id: str, attempt: RunningAttempt, changes: dict[str, Any]) -> None:
        attempt.over = True
        self._pending.append(_PendingWrite(attempt_id, changes, True))

    async def _write(self) -> None:
        """Write pending changes in order. If one cannot be written, it and all later ones are tried again later."""
        while self._pending:
            attempt_id, changes, last = self._pending[0]
            attempt = self._attempts.get(attempt_id)
            if attempt is not None:  # None if its job was removed meanwhile
                try:
                    await self._store(attempt.job, changes)
                except (sqlite3.OperationalError, OSError) as error:
                    if self._pause == _PAUSES[0]:
                        log.warning("the jobs cannot be written (%s): writing is tried again until it succeeds", error)
                    self._next_try = time.monotonic() + self._pause
                    self._pause = min(2 * self._pause, _PAUSES[1])
                    return
                if last:
                    self._attempts.pop(attempt_id, None)
                self.events.publish(attempt.job)
            self._pending.popleft()
        if self._pause != _PAUSES[0]:
            self._pause = _PAUSES[0]
            log.warning("the jobs are written again")

    async def _store(self, job: Job, changes: dict[str, Any]) -> None:
        status = changes["status"]
        if status == "completed":
            changes = await anyio.to_thread.run_sync(results.note, self._ranks.results, job, changes)
        await self.jobs.write(JobTable.update, job, **changes)
        if status == "completed":
            self._metrics.finished(job, changes["report"])
        elif status == "failed":
            self._metrics.failed.labels(job.kind, changes["error_code"]).inc()
        if job.ended:
            try:
                await anyio.to_thread.run_sync(results.drop_inputs, job)
            except OSError:
                log.exception("the input pictures of %s could not be removed", job.id)

    async def _watch(self) -> None:
        """End jobs that run for too long, and ranks that make no progress."""
        now, limits = time.monotonic(), self._front.limits
        running = [attempt for attempt in self._attempts.values() if attempt.runs]
        if limits.job_seconds is not None:
            for attempt in running:
                if now - attempt.began > limits.job_seconds:
                    message = f"the job ran for more than {limits.job_seconds:g} s (--job-timeout)"
                    with suppress(sqlite3.OperationalError):  # tried again a moment later
                        await self.cancel(attempt.job, "timeout", message)
        if not any(not attempt.over for attempt in self._attempts.values()) and now - self._heard < _SILENCE:
            self._advanced = now
        elif now - self._advanced > self._front.stall_timeout:
            self._cause, self._ready, self._advanced = "stall", False, now
            self._restart(f"the ranks made no progress for {self._front.stall_timeout:g} s (--stall-timeout)")

    async def _pump(self) -> None:
        """Send the ranks as many waiting jobs as they have room for."""
        if not self.ready:
            return
        async with self._pumping:
            most = _AHEAD + 2 * self._ranks.decode_batch
            ahead = sum(
                attempt.stage in ("waiting", "denoising") for attempt in self._attempts.values() if not attempt.over
            )
            room = min(_AHEAD - ahead, most - len(self._attempts))
            if room <= 0:
                return
            sent = {attempt.job.id for attempt in self._attempts.values()}
            try:
                queued = await self.jobs.read(JobTable.of, "queued", limit=len(sent) + room)
            except sqlite3.OperationalError as error:  # the next beat of the ranks calls this again
                return log.warning("the jobs cannot be read (%s)", error)
            for job in [job for job in queued if job.id not in sent][:room]:
                busy = [attempt for attempt in self._attempts.values() if not attempt.over]
                if busy and (job.alone or any(attempt.job.alone for attempt in busy)):
                    return
                attempt_id = uuid.uuid4().hex
                self._attempts[attempt_id] = RunningAttempt(job)
                await self._send(
                    {"kind": "attempt", "attempt": attempt_id, "prompt": _prompt(job.spec), "fps": job.spec.fps,
                     "preview_every": job.spec.preview_every, "paths": [str(path) for path in self.paths(job)]}
                )  # fmt: skip


def _prompt(spec: JobSpec) -> dict[str, Any]:
    fields = asdict(spec)
    return {name: fields[name] for name in fields.keys() - {"count", "fps", "preview_every", "asked"}}
