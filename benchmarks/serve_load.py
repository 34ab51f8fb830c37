"""A server under load while its ranks and its front are killed, and the effect of batched decodes.

    python benchmarks/serve_load.py [--jobs 200] [--clients 16] [--output docs/benchmarks/serve_load.md]

A tiny pipeline runs on two ranks. First, all clients submit jobs while 5 ranks and the front are killed at random
moments. Every accepted job must end as completed, with files that play, or as failed with a code. Then rounds without
kills measure throughput with `--decode-batch` 4 and 1 in turn. Their jobs take longer to decode than to denoise, as
only such jobs wait for one another.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import av
import httpx
import psutil
from rich.console import Console
from rich.progress import track

from halovae.pipelines import tiny

FRAMES = 5
RANKS = 2
KILLED_RANKS, KILLED_FRONTS = 5, 1
console = Console(stderr=True)


class Work(NamedTuple):
    """The jobs of the clients: their sizes, in turn, and their number of steps."""

    sizes: tuple[str, ...]
    steps: int


MIXED, DECODES = Work(("64x48", "80x48", "64x64"), 4), Work(("96x96",), 1)


@dataclass
class Server:
    """A `halovae serve` process. It can be killed and restarted with the same jobs."""

    model: Path
    output: Path
    batch: int
    port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        words = ["serve", "--model-path", self.model, "--num-gpus", RANKS, "--port", self.port, "--dtype", "fp32"]
        words += ["--output-dir", self.output, "--decode-batch", self.batch, "--max-queue", 50]
        command = [sys.executable, "-m", "halovae.cli.main", *map(str, words)]
        log = self.output.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        return self

    def wait(self) -> Server:
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            time.sleep(0.1)

    def ranks(self) -> list[psutil.Process]:
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if child.is_running() and len(_spawned(child)) == 2]
        return []

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def _spawned(child: psutil.Process) -> list[psutil.Process]:
    """Return a process and its parent, as far as multiprocessing spawned them. It spawned both for a rank."""
    pair = child, child.parent()
    return [process for process in pair if process is not None and "spawn_main" in " ".join(process.cmdline())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def submit(server: Server, work: Work, index: int) -> str:
    """Submit a job until the server accepts it, and return its id.

    A broken connection leaves open whether the job was accepted. It is then submitted again, with the same seed.
    """
    body = {
        "prompt": f"job {index}", "size": work.sizes[index % len(work.sizes)], "num_frames": FRAMES,
        "num_inference_steps": work.steps, "seed": index,
    }  # fmt: skip
    while True:
        try:
            answer = httpx.post(f"{server.url}/v1/videos", json=body, timeout=30)
            if answer.status_code == 200:
                return str(answer.json()["id"])
            if answer.status_code != 429:
                raise RuntimeError(f"job {index}: {answer.status_code} {answer.text}")
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def ended(server: Server, video: str) -> dict[str, Any]:
    """Wait until the job is completed or failed, and return it. A job that the server does not know is lost."""
    while True:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{server.url}/v1/videos/{video}", timeout=30)
            if answer.status_code != 200:
                return {"status": "lost"}
            shown: dict[str, Any] = answer.json()
            if shown["status"] in ("completed", "failed"):
                return shown
        time.sleep(0.2)


def client(server: Server, work: Work, jobs: range) -> list[dict[str, Any]]:
    """Run one client. It has one job at a time."""
    return [ended(server, submit(server, work, index)) for index in jobs]


def plays(server: Server, shown: dict[str, Any]) -> bool:
    """Whether a completed job's file contains the expected frames."""
    content = httpx.get(f"{server.url}/v1/videos/{shown['id']}/content", timeout=30).content
    try:
        with av.open(io.BytesIO(content), "r") as container:
            frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
    except av.FFmpegError:
        return False
    width, _, height = shown["size"].partition("x")
    return frames == [(int(width), int(height))] * FRAMES


def disturb(server: Server, rng: random.Random, done: threading.Event, log: list[str]) -> None:
    """Kill ranks and the front at random moments, each after the server has recovered from the last kill."""
    kills = ["rank"] * KILLED_RANKS + ["front"] * KILLED_FRONTS
    rng.shuffle(kills)
    begin = time.monotonic()
    for kill in kills:
        server.wait()
        if done.wait(rng.uniform(1, 6)):
            return
        if kill == "front":
            server.kill()
            server.start()
        elif ranks := server.ranks():
            rng.choice(ranks).kill()
        log.append(f"{kill} at {time.monotonic() - begin:.1f} s")


def run(server: Server, work: Work, jobs: int, clients: int) -> tuple[list[dict[str, Any]], float]:
    """Run all jobs, shared by the clients. Return the ended jobs and the seconds that all took."""
    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, server, work, range(first, jobs, clients)) for first in range(clients)]
        results = [shown for future in track(futures, "clients", console=console) for shown in future.result()]
    return results, time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=2, help="rounds with and without batching")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments of kills")
    parser.add_argument("--output", type=Path, help="file for the figures")
    args = parser.parse_args()
    lines = [
        "# The server under load\n",
        f"`python benchmarks/serve_load.py`, {date.today()}, {os.cpu_count()} cores: a tiny Wan2.1 on {RANKS} ranks "
        f"of one thread, {args.clients} clients with one job each at a time.\n",
    ]
    with TemporaryDirectory() as place:
        home = Path(place)
        tiny.make_model("wan2.1", home / "model")
        server = Server(home / "model", home / "killed", 4).start().wait()
        done, log = threading.Event(), list[str]()
        killer = threading.Thread(target=disturb, args=(server, random.Random(args.seed), done, log))
        killer.start()
        results, seconds = run(server, MIXED, args.jobs, args.clients)
        done.set()
        killer.join()
        server.wait()
        metrics = httpx.get(f"{server.url}/metrics").text
        statuses = Counter(shown["status"] for shown in results)
        codes = Counter(shown["error"]["code"] for shown in results if shown["status"] == "failed")
        broken = [shown["id"] for shown in results if shown["status"] == "completed" and not plays(server, shown)]
        left = [
            row for row in metrics.splitlines() if row.startswith(('halovae_jobs{status="q', 'halovae_jobs{status="i'))
        ]
        lines.append(f"- {args.jobs} jobs of {args.clients} clients in {seconds:.0f} s; killed: {', '.join(log)}")
        lines.append(f"- ended as: {dict(statuses)}, failed with: {dict(codes)}; broken files: {len(broken)}")
        server.stop()
        partial = [path.name for path in server.output.rglob(".*.partial")]
        lines.append(f"- left at the end: {'; '.join(left)}; unfinished files: {len(partial)}")
        rates: dict[int, list[float]] = {4: [], 1: []}
        batches: list[int] = []
        for round_ in range(args.repeat):
            for batch in rates:
                quiet = Server(home / "model", home / f"quiet-{batch}-{round_}", batch).start().wait()
                run(quiet, DECODES, args.clients, args.clients)  # one-time work
                results, seconds = run(quiet, DECODES, args.jobs, args.clients)
                rates[batch].append(args.jobs / seconds)
                if batch > 1:
                    batches += [shown["decode"]["batch"] for shown in results]
                quiet.stop()
        if args.repeat:
            medians = {batch: statistics.median(values) for batch, values in rates.items()}
            lines.append(
                f"- {DECODES.sizes[0]}, {DECODES.steps} step: --decode-batch 4: {medians[4]:.2f} jobs/s, 1: "
                f"{medians[1]:.2f} jobs/s ({medians[4] / medians[1]:.2f}x); jobs by batch: "
                f"{dict(sorted(Counter(batches).items()))}"
            )
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text)
    if broken or statuses["lost"] or "None" in codes or len(results) != args.jobs:
        sys.exit("jobs were lost, or files broken")


if __name__ == "__main__":
    main()
