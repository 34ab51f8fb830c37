"""`halovae serve` as users run it: a process that starts its own ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from serving.stub_ranks import free_port


def _is_spawned(process: psutil.Process) -> bool:
    """Whether multiprocessing started the process, and it is running."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class Server:
    """A running server. `output` may hold jobs of an earlier server."""

    def __init__(self, model: Path, output: Path, *options: str, ranks: int = 2, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = output
        self.log = output.with_suffix(".log")
        command = [sys.executable, "-m", "halovae.cli.main", "serve", "--model-path", str(model), "--dtype", "fp32"]
        command += ["--num-gpus", str(ranks), "--sp-degree", str(ranks), "--port", str(self.port), *options]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--output-dir", str(output)], stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> "Server":
        """Wait until the ranks are ready."""
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """Return the rank processes: the agent's children, oldest first."""
        try:
            agents = [child for child in psutil.Process(self.process.pid).children() if _is_spawned(child)]
            return [child for agent in agents for child in agent.children() if _is_spawned(child)]
        except psutil.NoSuchProcess:
            return []

    def submit(self, **fields: Any) -> str:
        body = {"prompt": "a cat", "size": "64x48", "num_frames": 5, "num_inference_steps": 2, **fields}
        answer = httpx.post(f"{self.url}/v1/videos", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def ended(self, video: str) -> dict[str, Any]:
        """Wait until the video is completed or failed, and return it."""
        while (shown := self.video(video))["status"] not in ("completed", "failed"):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return shown

    def video(self, video: str) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/v1/videos/{video}", timeout=30).json()
        return answer

    def stop(self, by: signal.Signals = signal.SIGINT) -> int:
        """End the server, and return its exit status."""
        if self.process.poll() is None:
            os.kill(self.process.pid, by)
        return self.process.wait(30)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)
