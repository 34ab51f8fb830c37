"""A `halovae serve` process with real ranks, and clients of it, for the benchmarks of the server."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import httpx
import psutil

FRAMES = 5
# A first decode would measure the machine, which takes longer than the short `--stall-timeout` of these benchmarks.
_ENVIRONMENT = {"HALOVAE_CALIBRATION": "cpu-epyc-2-cores"}


class Work(NamedTuple):
    """The jobs of the clients: their sizes, in turn, and their number of steps."""

    sizes: tuple[str, ...]
    steps: int


@dataclass
class Server:
    """A `halovae serve` process. It can be killed and restarted with the same jobs."""

    model: Path
    output: Path
    options: tuple[str, ...] = ()
    ranks_started: int = 2
    key: str | None = None  # of the health checks
    port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.model.with_name(f"{self.output.name}.log")

    def start(self) -> Server:
        words = ["serve", "--model-path", self.model, "--num-gpus", self.ranks_started, "--port", self.port]
        words += ["--dtype", "fp32", "--output-dir", self.output, *self.options]
        command = [sys.executable, "-m", "halovae.cli.main", *map(str, words)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **_ENVIRONMENT}
            )
        return self

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    def wait(self, seconds: float = 120) -> Server:
        """Wait until the ranks are ready."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready within {seconds} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        return self

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks: spawned by a spawned agent."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if child.is_running() and len(_spawned(child)) == 2]
        return []

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 60) -> int:
        """Ask the server to end, and return its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def _spawned(child: psutil.Process) -> list[psutil.Process]:
    """Return a process and its parent, as far as multiprocessing spawned them. It spawned both for a rank."""
    pair = child, child.parent()
    return [process for process in pair if process is not None and "spawn_main" in " ".join(process.cmdline())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def submit(server: Server, work: Work, index: int, headers: dict[str, str] | None = None) -> str:
    """Submit a job until the server accepts it, and return its id.

    A broken connection leaves open whether the job was accepted. With an `Idempotency-Key` among the headers, the
    server makes one job of all tries.
    """
    body = {
        "prompt": f"job {index}", "size": work.sizes[index % len(work.sizes)], "num_frames": FRAMES,
        "num_inference_steps": work.steps, "seed": index,
    }  # fmt: skip
    while True:
        try:
            answer = httpx.post(f"{server.url}/v1/videos", json=body, headers=headers, timeout=30)
            if answer.status_code == 200:
                return str(answer.json()["id"])
            if answer.status_code not in (429, 503, 507):
                raise RuntimeError(f"job {index}: {answer.status_code} {answer.text}")
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def ended(server: Server, video: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Wait until the job is completed or failed, and return it. A job that the server does not know is lost."""
    while True:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{server.url}/v1/videos/{video}", headers=headers, timeout=30)
            if answer.status_code == 404:
                return {"id": video, "status": "lost"}
            if answer.status_code == 200 and answer.json()["status"] in ("completed", "failed"):
                shown: dict[str, Any] = answer.json()
                return shown
        time.sleep(0.2)


def plays(server: Server, shown: dict[str, Any], headers: dict[str, str] | None = None) -> bool:
    """Whether a completed job's file contains the expected frames."""
    content = httpx.get(f"{server.url}/v1/videos/{shown['id']}/content", headers=headers, timeout=30).content
    try:
        with av.open(io.BytesIO(content), "r") as container:
            frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
    except av.FFmpegError:
        return False
    width, _, height = shown["size"].partition("x")
    return frames == [(int(width), int(height))] * FRAMES
