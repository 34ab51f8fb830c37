"""Metrics for Prometheus."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halovae.serving.jobs import Kind, Status
from halovae.serving.replicas import Replica
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_REQUEST_SECONDS = (0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.submitted = Counter("halovae_jobs_submitted", "Jobs accepted", ["kind"], registry=registry)
        self.completed = Counter("halovae_jobs_completed", "Jobs completed", ["kind"], registry=registry)
        self.failed = Counter("halovae_jobs_failed", "Jobs failed", ["kind", "code"], registry=registry)
        self.restarts = Counter("halovae_rank_restarts", "Times that the ranks were restarted", registry=registry)
        self.sweep_errors = Counter("halovae_sweep_errors", "Old results that could not be removed", registry=registry)
        self.webhooks = Counter("halovae_webhooks", "Events sent, by outcome", ["outcome"], registry=registry)
        for outcome in ("delivered", "failed", "given_up"):
            self.webhooks.labels(outcome)
        self.denoising = Histogram(
            "halovae_denoising_seconds", "Time to denoise a job", ["kind"], registry=registry, buckets=_SECONDS
        )
        self.decoding = Histogram(
            "halovae_decode_seconds",
            "Time to decode a batch",
            ["kind"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.batch = Histogram(
            "halovae_decode_batch", "Results decoded together", registry=registry, buckets=(1, 2, 4, 8, 16)
        )
        self.reserved = Gauge("halovae_decode_peak_reserved_bytes", "Peak of the last decode", registry=registry)
        self.allocated = Gauge("halovae_decode_peak_allocated_bytes", "Peak of the last decode", registry=registry)
        self.queue_wait = Histogram(
            "halovae_queue_wait_seconds", "Time from a job's request to its start", ["kind"], registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.in_flight = Gauge("halovae_http_requests_in_flight", "Requests that have not ended", registry=registry)
        self._requests = Histogram(
            "halovae_http_request_seconds", "Time until an answer begins", ["method", "route", "status"],
            registry=registry, buckets=_REQUEST_SECONDS,
        )  # fmt: skip
        self._disk = Gauge("halovae_disk_free_bytes", "Free space for jobs and results", registry=registry)
        self._jobs = Gauge("halovae_jobs", "Jobs by status", ["status"], registry=registry)
        self._ready = Gauge("halovae_ranks_ready", "Whether the ranks are ready", registry=registry)
        self.replica_completed = Counter(
            "halovae_replica_completed", "Jobs that a replica has completed", ["replica"], registry=registry
        )
        self.replica_restarts = Counter(
            "halovae_replica_restarts", "Times that a replica's ranks were restarted", ["replica"], registry=registry
        )
        self._replica_ready = Gauge(
            "halovae_replica_ready", "Whether a replica's ranks are ready", ["replica"], registry=registry
        )
        self._replica_jobs = Gauge("halovae_replica_jobs", "Jobs that a replica has", ["replica"], registry=registry)

    def decoded(self, kind: Kind, decode: dict[str, Any]) -> None:
        """Observe the decode of a batch. `decode` is as `decoding.summary` returns it."""
        self.decoding.labels(kind).observe(decode["seconds"])
        self.batch.observe(decode["batch"])
        self.reserved.set(decode["peak_memory_mb"] * 2**20)
        self.allocated.set(decode["peak_allocated_mb"] * 2**20)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Observe an answer to a request. `route` is the template of its path."""
        labels = method if method in _METHODS else "other", route, f"{status // 100}xx"
        self._requests.labels(*labels).observe(seconds)

    def watch_disk(self, folder: Path) -> None:
        """Show how much space is free for a folder."""
        self._disk.set_function(lambda: shutil.disk_usage(folder).free)

    async def text(
        self, jobs: JobStore, ready: bool, replicas: Mapping[str, Replica], loads: Mapping[str, int]
    ) -> bytes:
        """Return all metrics in Prometheus' text format. `loads`: how many jobs each replica has."""
        statuses: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed")
        for status in statuses:
            self._jobs.labels(status).set(await jobs.read(JobTable.count, status))
        self._ready.set(ready)
        for gauge in (self._replica_ready, self._replica_jobs):
            gauge.clear()  # of replicas that were ended
        for name, replica in replicas.items():
            self._replica_ready.labels(name).set(replica.ready)
            self._replica_jobs.labels(name).set(loads.get(name, 0))  # 0: added meanwhile
        return generate_latest(self._registry)
