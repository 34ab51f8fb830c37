"""What tests send to a server, and how they look at what it does."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from halovae.serving.jobs import Job, JobSpec
from halovae.serving.table import JobTable

SPEC = JobSpec("a", (64, 48), 5, 2, 0)
ID = "0123456789abcdef" * 2  # of a job
SMALL = {"size": "64x48", "num_frames": 5, "num_inference_steps": 2}


def submitted(url: str, **fields: Any) -> str:
    """Submit a small video, and return its id."""
    answer = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL, **fields}, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def finished(url: str, video: str, seconds: float = 30) -> dict[str, Any]:
    """Wait until the video is completed or failed, for at most `seconds`, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        shown: dict[str, Any] = httpx.get(f"{url}/v1/videos/{video}", timeout=30).json()
        if shown["status"] in ("completed", "failed") or time.monotonic() > deadline:
            return shown
        time.sleep(0.02)


def job_on_disk(output: Path, job: str) -> Job:
    """Return a job as it is stored."""
    jobs = JobTable(output / "jobs.sqlite")
    found = jobs.get(job)
    jobs.close()
    assert found is not None
    return found


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shown(url: str, video: str) -> dict[str, Any]:
    """Return a video as clients see it."""
    answer: dict[str, Any] = httpx.get(f"{url}/v1/videos/{video}").json()
    return answer


class Restarts:
    """Takes the place of what ends the ranks, and keeps the reasons."""

    def __init__(self, could: bool = True) -> None:
        self.reasons: list[str] = []
        self._could = could

    def __call__(self, reason: str, seconds: float) -> bool:
        self.reasons.append(reason)
        return self._could


def runs(url: str, video: str) -> bool:
    """Whether the ranks work on a video."""
    return bool(shown(url, video)["status"] == "in_progress")


def connected(url: str, *data: bytes) -> socket.socket:
    """Return a new connection that has sent some data."""
    port = urlsplit(url).port
    assert port is not None
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    for piece in data:
        connection.sendall(piece)
    return connection


def sent(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
