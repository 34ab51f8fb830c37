"""The front's end of the rank channel. It sends attempts to the ranks, and stores the outcome of each job."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sqlite3
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio.to_thread
import zmq
import zmq.asyncio

from halovae.serving import results
from halovae.serving.attempts import Drawn, Progress, RunningAttempt, as_message
from halovae.serving.channel import BEAT
from halovae.serving.events import Events, Render
from halovae.serving.files import why_unwritten
from halovae.serving.jobs import REQUEUED, Job, failed, interrupted
from halovae.serving.metrics import Metrics
from halovae.serving.outcomes import Outcomes
from halovae.serving.recovery import recover
from halovae.serving.replicas import Fleet, Newcomers, Replica, Turn
from halovae.serving.settings import FrontSettings, RankSettings
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

log = logging.getLogger(__name__)
_EXPIRED = 1000  # jobs that one sweep removes at most
_PATIENCE = 5.0  # seconds for which the server's end waits for another process that writes to the database


class Draining(Exception):
    """The server is ending, and takes no more jobs."""


class Dispatcher:
    """Takes jobs, gives them to replicas in turn, and keeps their results. For the event loop's thread only.

    Args:
        jobs: the jobs on disk.
        ranks: the ranks' settings.
        front: the front's settings.
        metrics: what is counted.
        fleet: the groups of ranks.
        render: returns the event of a job that changed.
    """

    def __init__(
        self, jobs: JobStore, ranks: RankSettings, front: FrontSettings, metrics: Metrics,
        fleet: Fleet, render: Render,
    ) -> None:  # fmt: skip
        self.jobs, self._ranks, self._front, self._metrics, self.fleet = jobs, ranks, front, metrics, fleet
        self.events = Events(render)
        self.progress = Progress()
        self.draining = self.closed = False
        self._attempts: dict[str, RunningAttempt] = {}
        self._changing = asyncio.Lock()  # held while a job's status or its place with the ranks changes
        self._outcomes = Outcomes(jobs, ranks.results, metrics, self.events, self._attempts, self._changing, fleet.away)
        self._newcomers = Newcomers()
        self._turned, self._followed = time.monotonic(), 0.0
        self.inputs = ranks.output / ".inputs"
        self._planned = ranks.output / ".ending"  # exists while the server ends because it was asked to

    async def start(self) -> None:
        """Recover the jobs of an earlier front, and listen to the ranks."""
        await recover(self.jobs, self._ranks, self.inputs, self._planned)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.fleet.open(self._socket, self.lose)

    @property
    def expire_after(self) -> float:
        """How long finished files are kept, in seconds."""
        return self._front.expire_after

    @property
    def ready(self) -> bool:
        """Whether there are ranks that work on jobs."""
        return not self.draining and any(replica.ready for replica in self.fleet.replicas.values())

    def attempts_of(self, replica: Replica) -> list[RunningAttempt]:
        """Return the attempts that a replica has, also those whose end is not on disk yet."""
        return [attempt for attempt in self._attempts.values() if attempt.replica == replica.name]

    def loads(self) -> dict[str, int]:
        """Return how many jobs each replica has, by name."""
        replicas = self.fleet.replicas.values()
        return {one.name: sum(not attempt.over for attempt in self.attempts_of(one)) for one in replicas}

    async def run(self) -> None:
        """Receive messages from the ranks and write them to disk, forever."""
        while True:
            wait = self._outcomes.wait
            if await self._socket.poll(round(1000 * (BEAT if wait is None else min(BEAT, wait)))):
                parts = await self._socket.recv_multipart()
                try:
                    peer, message, *data = parts
                    await self._take(peer, {**json.loads(message), "data": data})
                except Exception:  # a failure of one job must not end the others
                    log.exception("a message from the ranks could not be handled")
            if self._outcomes.wait == 0:
                await self._outcomes.write()
            try:
                await self._watch()
            except Exception:
                log.exception("stalled ranks, or jobs that run too long, could not be ended")
            await self._pump()

    @property
    def run_count(self) -> int:
        """How many jobs the ranks work on."""
        return sum(attempt.runs for attempt in self._attempts.values())

    async def drain(self, seconds: float) -> None:
        """Start no more jobs, and wait until those that run have ended, for at most `seconds`."""
        self.draining = True
        until = time.monotonic() + seconds
        with suppress(OSError):  # a full disk
            self._planned.touch()
        async with self._changing:
            for attempt_id, attempt in list(self._attempts.items()):
                if attempt.stage == "waiting" and not attempt.over:
                    del self._attempts[attempt_id]
                    await self._send(self.fleet.replicas[attempt.replica], {"kind": "cancel", "attempt": attempt_id})
        while time.monotonic() < until and self.run_count:
            await asyncio.sleep(0.05)

    def end_streams(self) -> None:
        """Let requests that wait for changes return."""
        self.closed = True
        self.events.close()

    async def close(self) -> None:
        """Put jobs that run back to the queue: the server's end is not their fault."""
        self.draining = True
        self.end_streams()
        until = time.monotonic() + _PATIENCE
        with suppress(sqlite3.Error):  # what is not written now is recovered at the next start
            while (wait := self._outcomes.wait) is not None and time.monotonic() < until:
                await asyncio.sleep(wait)
                await self._outcomes.write()
            for attempt in [*self._attempts.values()]:
                if attempt.runs:
                    left = max(0.0, until - time.monotonic())
                    await self.jobs.write_patiently(left, JobTable.update, attempt.job, **REQUEUED)
            self._planned.unlink(missing_ok=True)
        self._socket.close()
        self.fleet.close()

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
        async with self._changing:
            await anyio.to_thread.run_sync(results.forget, self._ranks.results, job)
            await self.jobs.write(JobTable.delete, job.id)
            await self._withdraw(job)
        await anyio.to_thread.run_sync(results.remove, self._ranks.results, job, self.fleet.away)
        self.events.publish(job)
        await self._pump()

    async def cancel(self, job: Job, code: str = "cancelled", message: str = "the job was cancelled") -> None:
        """Fail a job that has not ended. It is no longer worked on."""
        async with self._changing:
            current = await self.jobs.read(JobTable.get, job.id)
            if current is None or current.ended or self._outcomes.is_ending(job):
                return
            await self.jobs.write(JobTable.update, current, **failed(code, message))
            await self._withdraw(job)
        self._metrics.failed.labels(job.kind, code).inc()
        await anyio.to_thread.run_sync(self._outcomes.drop_inputs, job)
        self.events.publish(current)
        await self._pump()

    async def _withdraw(self, job: Job) -> None:
        """Tell the ranks that nobody wants a job any more."""
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.job.id == job.id:
                del self._attempts[attempt_id]
                if not attempt.over:
                    replica = self.fleet.replicas[attempt.replica]
                    replica.removed[attempt_id] = job
                    await self._send(replica, {"kind": "cancel", "attempt": attempt_id})

    async def expire(self) -> None:
        """Delete ended jobs that are too old, and the oldest ones while all files together are too large."""
        before = time.time() - self._front.expire_after
        expired = await self.jobs.read(JobTable.expired, before, self._front.max_output, _EXPIRED)
        for job in expired:
            try:  # files first: a job that is not in the database would be taken over again
                await anyio.to_thread.run_sync(results.remove, self._ranks.results, job, self.fleet.away)
                await self.jobs.write(JobTable.delete, job.id)
                self.events.publish(job)
            except OSError:
                self._metrics.sweep_errors.inc()
                log.exception("%s cannot be removed: the next sweep tries again", job.id)
        if expired:
            await self.jobs.write(JobTable.trim)

    def paths(self, job: Job) -> list[Path]:
        """Return the paths of a job's results, whether they exist yet or not."""
        return [self._ranks.results / name for name in job.names()]

    async def _send(self, replica: Replica, message: dict[str, Any], data: Sequence[bytes] = ()) -> None:
        if replica.peer is not None:
            await self._socket.send_multipart([replica.peer, json.dumps(message).encode(), *data])

    async def _take(self, peer: bytes, message: dict[str, Any]) -> None:
        kind = message["kind"]
        replica = next((one for one in self.fleet.replicas.values() if one.peer == peer), None)
        if kind == "beat" and replica is None:
            replica = await self._welcomed(peer, message)
        if replica is None:
            return  # from ranks that have been replaced
        replica.heard = time.monotonic()
        if kind == "beat":
            replica.hear_beat(bool(message["ready"]))
            return
        replica.advanced = replica.used = time.monotonic()
        attempt = self._attempts.get(message["attempt"])
        job = replica.removed.get(message["attempt"]) if attempt is None else attempt.job
        if attempt is not None and attempt.replica == replica.name:
            if kind == "file":
                await self._receive(message["attempt"], attempt, message)
            elif not attempt.over:
                self._advance(message["attempt"], attempt, kind, message)
                if kind == "finished":
                    replica.completed += 1
                    self._metrics.replica_completed.labels(replica.name).inc()
        elif kind in ("finished", "failed", "cancelled") and message["attempt"] in replica.removed:
            await self._remove_files(replica.removed.pop(message["attempt"]))
        if kind == "finished" and message.get("first", True) and job is not None:
            self._metrics.decoded(job.kind, message["decode"])

    async def _receive(self, attempt_id: str, attempt: RunningAttempt, message: dict[str, Any]) -> None:
        """Write a piece of a result that was made on another host. If that fails, so does the attempt."""
        if attempt.over:
            return
        path, (data,) = self.paths(attempt.job)[message["index"]], message["data"]
        try:
            await anyio.to_thread.run_sync(results.receive, path, data, message["first"], message["last"])
        except OSError as error:
            self._outcomes.end(attempt_id, failed(*why_unwritten(error)))

    async def _remove_files(self, job: Job) -> None:
        await anyio.to_thread.run_sync(results.try_to_remove, self._ranks.results, job, self.fleet.away)

    async def _welcomed(self, peer: bytes, message: dict[str, Any]) -> Replica | None:
        """Take new ranks, and return their replica; None if they are not taken. Earlier ranks' jobs are retried."""
        replica = self._newcomers.replica_of(self.fleet, peer, message)
        if replica is None:
            return None
        await self.lose(replica)
        replica.take(peer, message["since"])
        if replica.restarts:
            self._metrics.restarts.inc()
            self._metrics.replica_restarts.labels(replica.name).inc()
        await self._send(replica, {"kind": "welcome", "token": self.fleet.token})
        return replica

    async def lose(self, replica: Replica) -> None:
        """Retry the jobs that a replica's ranks had, which have ended."""
        replica.lose()
        gone, replica.removed = replica.removed, {}  # before any pause: another call may come meanwhile
        had = {key: attempt for key, attempt in self._attempts.items() if attempt.replica == replica.name}
        had = {key: attempt for key, attempt in had.items() if not attempt.over}
        running = [attempt_id for attempt_id, attempt in had.items() if attempt.runs]
        # The oldest one may have ended rank 0 before it could say that it has begun.
        suspects = running or [*had][:1]
        for attempt_id, attempt in had.items():
            if attempt_id in suspects:
                only = len(suspects) == 1 and not gone
                changes = REQUEUED if self.draining else interrupted(attempt.job, replica.cause, only)
                self._outcomes.end(attempt_id, changes)
            else:
                del self._attempts[attempt_id]
        replica.cause = "ranks"
        for job in gone.values():
            await self._remove_files(job)

    def _advance(self, attempt_id: str, attempt: RunningAttempt, kind: str, message: dict[str, Any]) -> None:
        """Apply a message about an attempt. Progress is visible at once, the job's status only once it is written."""
        now, job = time.time(), attempt.job
        if kind == "started":
            attempt.begin("denoising")
            self._metrics.queue_wait.labels(job.kind).observe(max(0.0, now - job.created))
            changes = {"status": "in_progress", "started": now, "attempts": job.attempts + 1}
            self._outcomes.begin(attempt_id, changes)
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
            self._outcomes.end(attempt_id, done)
        elif kind == "failed":
            self._outcomes.end(attempt_id, failed(message["code"], message["message"]))
        else:  # cancelled, though this front did not cancel it
            self._outcomes.end(attempt_id, REQUEUED)

    async def _watch(self) -> None:
        """End jobs that run for too long, and ranks that make no progress."""
        now, limits = time.monotonic(), self._front.limits
        replicas = [*self.fleet.replicas.values()]
        if now - self._turned > 3 * BEAT:  # this process was stopped: what the ranks sent meanwhile is still unread
            for replica in replicas:
                replica.heard = replica.advanced = now
        self._turned = now
        running = [attempt for attempt in self._attempts.values() if attempt.runs]
        if limits.job_seconds is not None:
            for attempt in running:
                if now - attempt.began > limits.job_seconds:
                    message = f"the job ran for more than {limits.job_seconds:g} s (--job-timeout)"
                    with suppress(sqlite3.OperationalError):  # tried again a moment later
                        await self.cancel(attempt.job, "timeout", message)
        for replica in replicas:
            busy = bool(replica.removed) or not all(attempt.over for attempt in self.attempts_of(replica))
            timeout = replica.stalled(now, busy, self._front.stall_timeout)
            reason = f"the ranks made no progress for {timeout:g} s (--stall-timeout)"
            if timeout and self.fleet.restart(replica, reason, timeout):
                replica.cause = "stall"
                replica.lose()  # what they still say does not count
        if self.fleet.elastic and not self.draining and now - self._followed >= BEAT:
            self._followed = now
            sent = sum(attempt.stage == "waiting" and not attempt.over for attempt in self._attempts.values())
            self.fleet.follow(await self.jobs.read(JobTable.count, "queued") - sent, self.loads())

    async def _pump(self) -> None:
        """Send the replicas as many waiting jobs as they have room for."""
        if not self.ready:
            return
        async with self._changing:
            ready = [replica for replica in self.fleet.replicas.values() if replica.ready]
            turn = Turn(ready, {one.name: self.attempts_of(one) for one in ready}, self._ranks.decode_batch)
            if not turn.room:
                return
            sent = {attempt.job.id for attempt in self._attempts.values()}
            try:
                queued = await self.jobs.read(JobTable.of, "queued", limit=len(sent) + turn.room + len(ready))
            except sqlite3.OperationalError as error:  # the next beat of the ranks calls this again
                return log.warning("the jobs cannot be read (%s)", error)
            for job in [job for job in queued if job.id not in sent] if self.ready else ():
                replica = turn.place(job)
                if replica is not None:
                    await self._start(job, replica)

    async def _start(self, job: Job, replica: Replica) -> None:
        """Send a replica an attempt at a job."""
        attempt_id, pictures = uuid.uuid4().hex, list[bytes]()
        try:
            if self.fleet.away:
                pictures = await anyio.to_thread.run_sync(results.inputs, job)
        except OSError as error:
            log.error("an input picture cannot be read: %s", error)
            self._attempts[attempt_id] = RunningAttempt(job, replica.name)
            return self._outcomes.end(attempt_id, failed("input_lost", "an input picture is gone"))
        if replica.ready:  # it may have been lost meanwhile
            self._attempts[attempt_id] = RunningAttempt(job, replica.name)
            await self._send(replica, as_message(attempt_id, job, self.paths(job), self.fleet.away), pictures)
