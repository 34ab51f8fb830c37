"""Server-sent events: each change is rendered once, and the bytes go to all listeners."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from halovae.serving.jobs import Job

log = logging.getLogger(__name__)
MOST, MOST_OF_OWNER = 100, 25  # listeners at a time
_PERIOD = 0.25  # seconds between two events of a job
_WAITING = 200  # events that a listener may leave unread; one that is slower is dropped
_SILENCE = 15.0  # seconds after which a comment tells proxies that the connection is in use
Render = Callable[[str], Awaitable[bytes]]


class TooManyListeners(Exception):
    """As many listeners are connected as may be."""


class _Listener:
    def __init__(self, owner: str | None) -> None:
        self.owner = owner
        self.unread: dict[str, bytes] = {}  # by job, the oldest change first
        self.changed = asyncio.Event()
        self.open = True

    def close(self) -> None:
        self.open = False
        self.changed.set()


class Events:
    """Tells listeners which jobs changed, at most every `_PERIOD` seconds.

    Args:
        render: returns the event of a job, by id. Jobs that are gone have one too.

    Attributes:
        ended: set whenever a job has ended; its user clears it.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._changed: dict[str, str | None] = {}  # owners by id
        self._wake = asyncio.Event()
        self.ended = asyncio.Event()
        self._listeners: set[_Listener] = set()
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def publish(self, job: Job) -> None:
        """Note that a job changed."""
        for event in self._waiting.get(job.id, ()):
            event.set()
        if job.ended:
            self.ended.set()
        if self._listeners:
            self._changed[job.id] = job.owner
            self._wake.set()

    async def run(self) -> None:
        """Render changes and pass them on, forever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            changed, self._changed = self._changed, {}
            for job, owner in changed.items():
                try:
                    event = await self._render(job)
                except Exception:  # the database may be locked; later changes are told again
                    log.exception("a change of %s could not be told", job)
                    continue
                for listener in [*self._listeners]:
                    if listener.owner == owner:
                        listener.unread[job] = event
                        listener.changed.set()
                        if len(listener.unread) > _WAITING:
                            self._listeners.discard(listener)
                            listener.close()
            await asyncio.sleep(_PERIOD)

    @contextmanager
    def listening(self, owner: str | None) -> Iterator[AsyncIterator[bytes]]:
        """Yield the events of an owner's jobs.

        Raises:
            TooManyListeners: `MOST` listeners are connected, or `MOST_OF_OWNER` of this owner.
        """
        own = sum(one.owner == owner for one in self._listeners)
        if len(self._listeners) >= MOST or (owner is not None and own >= MOST_OF_OWNER):
            raise TooManyListeners
        listener = _Listener(owner)
        self._listeners.add(listener)
        try:
            yield _events(listener)
        finally:
            self._listeners.discard(listener)

    @contextmanager
    def changes(self, job: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when the job changes."""
        event = asyncio.Event()
        self._waiting.setdefault(job, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[job].discard(event)
            if not self._waiting[job]:
                del self._waiting[job]

    def close(self) -> None:
        """End all streams."""
        for listener in self._listeners:
            listener.close()
        for events in self._waiting.values():
            for event in events:
                event.set()


async def _events(listener: _Listener) -> AsyncIterator[bytes]:
    while listener.open:
        try:
            await asyncio.wait_for(listener.changed.wait(), _SILENCE)
        except asyncio.TimeoutError:
            yield b": still here\n\n"
            continue
        listener.changed.clear()
        while listener.unread:
            yield listener.unread.pop(next(iter(listener.unread)))
