"""Webhooks: events about jobs that ended go to the operator's URL, signed as Standard Webhooks and OpenAI sign them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import sqlite3
import time
from contextlib import suppress

import anyio
import anyio.to_thread
import httpx

from halovae.serving.jobs import JobEvent
from halovae.serving.metrics import Metrics
from halovae.serving.settings import Webhook
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

log = logging.getLogger(__name__)
TIMEOUT = 10.0  # seconds of one try
PAUSES = 5.0, 3600.0  # seconds until the next try: after the first one, and the longest
LIFE = 86400.0  # seconds after which an event is given up once a try fails
_AT_ONCE = 8  # events
_IDLE = 60.0  # seconds between two looks at the events, if no job ends
_PATIENCE = 60.0  # seconds for which a write waits for another process that writes


class Webhooks:
    """Sends each event until a receiver takes it, across restarts, for at most a day.

    Events are kept with the jobs, and dropped once a receiver answered with 2xx. A receiver may get one twice.

    Args:
        jobs: the jobs on disk, and their events.
        webhook: where the events go.
        metrics: what is counted.
        ended: set whenever a job has ended.
    """

    def __init__(self, jobs: JobStore, webhook: Webhook, metrics: Metrics, ended: asyncio.Event) -> None:
        self._jobs, self._webhook, self._metrics, self._ended = jobs, webhook, metrics, ended
        self._host = httpx.URL(webhook.url).host  # the rest of the URL may be a secret
        self._failing = False

    async def run(self) -> None:
        """Send events as they become due, forever."""
        certificates = await anyio.to_thread.run_sync(httpx.create_ssl_context)
        async with httpx.AsyncClient(verify=certificates, timeout=TIMEOUT, follow_redirects=False) as client:
            while True:
                self._ended.clear()
                wait = _IDLE
                try:
                    wait = await self._send_due(client)
                except sqlite3.OperationalError as error:
                    log.warning("events cannot be read or written (%s): tried again in %g s", error, wait)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), wait)

    async def _send_due(self, client: httpx.AsyncClient) -> float:
        """Send events that are due, and return the seconds until others are."""
        due = await self._jobs.read(JobTable.due_events, time.time(), _AT_ONCE)
        for error in await asyncio.gather(*(self._send(client, event) for event in due), return_exceptions=True):
            if isinstance(error, BaseException):
                raise error
        upcoming = await self._jobs.read(JobTable.next_event)
        return _IDLE if upcoming is None else min(_IDLE, max(0.0, upcoming - time.time()))

    async def _send(self, client: httpx.AsyncClient, event: JobEvent) -> None:
        """Send an event once, and keep what became of it."""
        failure = await self._post(client, event)
        if failure is None:
            self._metrics.webhooks.labels("delivered").inc()
            await self._jobs.write_patiently(_PATIENCE, JobTable.drop_event, event.id)
            if self._failing:
                log.warning("%s takes events again", self._host)
            self._failing = False
        elif time.time() - event.created > LIFE:
            self._metrics.webhooks.labels("given_up").inc()
            await self._jobs.write_patiently(_PATIENCE, JobTable.drop_event, event.id)
            log.error(
                "%s (%s of %s) is given up: %s did not take it %d times, at last because of %s",
                event.id, event.type, event.job, self._host, event.tries + 1, failure,
            )  # fmt: skip
        else:
            self._metrics.webhooks.labels("failed").inc()
            pause = min(PAUSES[1], PAUSES[0] * 2.0 ** min(event.tries, 30)) * random.uniform(0.5, 1.0)
            await self._jobs.write_patiently(_PATIENCE, JobTable.put_off, event.id, time.time() + pause)
            if not self._failing:
                log.warning("%s does not take events (%s): each is sent again for a day", self._host, failure)
            self._failing = True

    async def _post(self, client: httpx.AsyncClient, event: JobEvent) -> str | None:
        """Return None if the receiver took the event, or else why not."""
        body = json.dumps(
            {"id": event.id, "object": "event", "created_at": event.created, "type": event.type,
             "data": {"id": event.job}}
        ).encode()  # fmt: skip
        try:
            with anyio.fail_after(TIMEOUT):
                # The answer's body is not read.
                async with client.stream(
                    "POST", self._webhook.url, content=body, headers=headers(self._webhook.secret, event.id, body)
                ) as answer:
                    return None if answer.is_success else f"the status {answer.status_code}"
        except Exception as error:  # whatever a network or a receiver may do
            return f"{type(error).__name__}"


def headers(secret: bytes, event: str, body: bytes) -> dict[str, str]:
    """Return the headers of an event that is sent now. Receivers refuse signatures that are some minutes old."""
    now = str(int(time.time()))
    signature = hmac.new(secret, b".".join((event.encode(), now.encode(), body)), hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "User-Agent": "halovae",
        "webhook-id": event,
        "webhook-timestamp": now,
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
