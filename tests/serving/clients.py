"""Requests that tests send to a server."""

import time
from typing import Any

import httpx

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
