"""What became of attempts, until it is on disk."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread

from halovae.serving import results
from halovae.serving.attempts import RunningAttempt
from halovae.serving.events import Events
from halovae.serving.jobs import Job
from halovae.serving.metrics import Metrics
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

log = logging.getLogger(__name__)
_PAUSES = 0.1, 2.0  # seconds until a failed write is tried again: the first pause, and the longest
_ENDED = ("completed", "failed")
_WAITED_FOR = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # errors of a disk that may go away


class _PendingWrite(NamedTuple):
    """Changes to an attempt's job that are not on disk yet. `last`: they end the attempt."""

    attempt: str
    changes: dict[str, Any]
    last: bool


class Outcomes:
    """Writes changes to the jobs of attempts, in order, however long the database cannot be written.

    Args:
        jobs: the jobs on disk.
        folder: the folder of results.
        metrics: what is counted.
        events: told of each change.
        attempts: the attempts that the ranks have, by id. One whose end is written is removed.
        changing: held while a change is written.
        away: whether ranks may be on other hosts, so that this process writes their files.
    """

    def __init__(
        self, jobs: JobStore, folder: Path, metrics: Metrics, events: Events, attempts: dict[str, RunningAttempt],
        changing: asyncio.Lock, away: bool = False,
    ) -> None:  # fmt: skip
        self._jobs, self._folder, self._metrics, self._events = jobs, folder, metrics, events
        self._attempts, self._changing, self._away = attempts, changing, away
        self._pending: deque[_PendingWrite] = deque()
        self._pause, self._next_try = _PAUSES[0], 0.0

    def begin(self, attempt_id: str, changes: dict[str, Any]) -> None:
        """Queue the changes to the job of an attempt that goes on."""
        self._pending.append(_PendingWrite(attempt_id, changes, False))

    def end(self, attempt_id: str, changes: dict[str, Any]) -> None:
        """Queue the changes to the job of an attempt that is over."""
        self._attempts[attempt_id].over = True
        self._pending.append(_PendingWrite(attempt_id, changes, True))

    def is_ending(self, job: Job) -> bool:
        """Whether a job has completed or failed, and that is not on disk yet."""
        ends = [self._attempts.get(one.attempt) for one in self._pending if one.changes["status"] in _ENDED]
        return any(attempt is not None and attempt.job.id == job.id for attempt in ends)

    @property
    def wait(self) -> float | None:
        """Seconds until the next try; None if nothing is pending."""
        return max(0.0, self._next_try - time.monotonic()) if self._pending else None

    async def write(self) -> None:
        """Write pending changes in order. If one cannot be written, it and all later ones are tried again later."""
        while self._pending:
            async with self._changing:
                attempt_id, changes, last = self._pending[0]
                attempt = self._attempts.get(attempt_id)
                if attempt is not None:  # None if its job was removed meanwhile
                    try:
                        if last and self._away:  # before another attempt may write these files
                            await anyio.to_thread.run_sync(self._drop_partial, attempt.job)
                        await self._store(attempt.job, changes)
                    except sqlite3.OperationalError as error:
                        if self._pause == _PAUSES[0]:
                            log.warning("the jobs cannot be written (%s): writing is tried until it succeeds", error)
                        self._next_try = time.monotonic() + self._pause
                        self._pause = min(2 * self._pause, _PAUSES[1])
                        return
                    if last:
                        self._attempts.pop(attempt_id, None)
                    self._events.publish(attempt.job)
                self._pending.popleft()
        if self._pause != _PAUSES[0]:
            self._pause = _PAUSES[0]
            log.warning("the jobs are written again")

    async def _store(self, job: Job, changes: dict[str, Any]) -> None:
        status = changes["status"]
        if status == "completed":
            changes = await anyio.to_thread.run_sync(self._noted, job, changes)
        await self._jobs.write(JobTable.update, job, **changes)
        try:
            if status == "completed":
                self._metrics.completed.labels(job.kind).inc()
            elif status == "failed":
                self._metrics.failed.labels(job.kind, changes["error_code"]).inc()
            if job.ended:
                await anyio.to_thread.run_sync(self.drop_inputs, job)
        except Exception:
            log.exception("%s is written, but a later step failed", job.id)

    def drop_inputs(self, job: Job) -> None:
        """Remove the input pictures of a job that has ended; not on the event loop."""
        try:
            results.drop_inputs(job)
        except OSError:
            log.exception("the input pictures of %s could not be removed", job.id)

    def _drop_partial(self, job: Job) -> None:
        """Remove what an attempt that has ended leaves of files that are not whole."""
        try:
            results.drop_partial(self._folder, job)
        except OSError:
            log.exception("files of %s that are not whole could not be removed", job.id)

    def _noted(self, job: Job, changes: dict[str, Any]) -> dict[str, Any]:
        """Write a note of a completed job beside its results. A job is completed without it, too.

        Raises:
            sqlite3.OperationalError: the disk is full.
        """
        try:
            return results.note(self._folder, job, changes)
        except OSError as error:
            if error.errno in _WAITED_FOR:
                raise sqlite3.OperationalError(str(error)) from error
            log.exception("the note of %s cannot be written", job.id)
            return changes
