"""What a server keeps while its processes are killed and stopped, its database is locked, and its disk is full.

    python benchmarks/chaos.py [--jobs 300] [--clients 16] [--output docs/benchmarks/chaos.md]

A tiny pipeline runs on two ranks. Two tenants, each with a key, submit jobs. Meanwhile, at random moments and in
random order: 5 ranks are killed, 2 are stopped (SIGSTOP), the front gets SIGTERM twice and SIGKILL twice, another
process locks the database for 20 s, and the disk is filled once (needs root, to mount a small one). Each disturbance
starts after the server has recovered from the last one.

No job may be lost, made twice, or fail, but for those whose files are written while the disk is full. `/readyz` must
not say that the server is ready once it has had time to notice that it is not.
"""

from __future__ import annotations

import argparse
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from live_server import Server, Work, ended, plays, submit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from halovae.pipelines import tiny

TENANTS = "amber", "blue"
WORK = Work(("64x48", "80x48", "64x64"), 4)
COUNTS = {"kill a rank": 5, "stop a rank": 2, "SIGTERM": 2, "SIGKILL": 2, "lock the database": 1, "fill the disk": 1}
STALL = 10  # seconds, `--stall-timeout`
LOCK = 20.0  # seconds for which the database is locked
FULL = 5.0  # seconds for which the disk is full
DISK = "48m"
# Seconds within which `/readyz` must say that the server is not ready: by silence, by stalling, at once.
NOTICED = {"kill a rank": 12.0, "stop a rank": STALL + 3.0, "SIGTERM": 1.0, "SIGKILL": 1.0}
console = Console(stderr=True, width=140)


@dataclass
class Disturbance:
    """What was done, and when: seconds from the start of the run.

    Attributes:
        unready: seconds until `/readyz` first said that the server is not ready; None if it never did.
        again: seconds until it said again that the server is ready.
    """

    kind: str
    at: float
    unready: float | None = None
    again: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether the end of the ranks or of the server was noticed too late."""
        return self.kind in NOTICED and (self.unready is None or self.unready > NOTICED[self.kind])


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk on a folder. Yields whether that was possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        console.print(f"no small disk can be mounted, so none is filled: {mounted.stderr.strip()}")
    try:
        yield not mounted.returncode
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True)


class Chaos:
    """Disturbs a server, and notes what `/readyz` says meanwhile."""

    def __init__(self, server: Server, rng: random.Random, kinds: list[str]) -> None:
        self._server, self._rng, self._kinds = server, rng, kinds
        self.begin = time.monotonic()
        self.done = threading.Event()
        self.log: list[Disturbance] = []
        self.crashes: list[str] = []  # errors of the thread that disturbs

    def run(self) -> None:
        try:
            for kind in self._kinds:
                self._server.wait()
                if self.done.wait(self._rng.uniform(1, 4)):
                    return
                self._disturb(kind)
        except Exception as error:
            self.crashes.append(repr(error))

    def _disturb(self, kind: str) -> None:
        actions: dict[str, Callable[[], None]] = {
            "kill a rank": lambda: self._rng.choice(self._server.ranks()).kill(),
            "stop a rank": lambda: self._rng.choice(self._server.ranks()).suspend(),
            "SIGTERM": self._terminate,
            "SIGKILL": self._kill,
            "lock the database": self._lock,
            "fill the disk": self._fill,
        }
        begin = time.monotonic()
        one = Disturbance(kind, begin - self.begin)
        self.log.append(one)
        acting = threading.Thread(target=actions[kind])
        acting.start()
        bound = NOTICED.get(kind, 0.0) + 2
        while acting.is_alive() or one.again is None:
            passed, ready = time.monotonic() - begin, self._server.is_ready()
            if not ready and one.unready is None:
                one.unready = passed
            if ready and not acting.is_alive() and (one.unready is not None or passed > bound):
                one.again = passed
            time.sleep(0.05)
        acting.join()

    def _terminate(self) -> None:
        code = self._server.stop()
        if code:
            self.crashes.append(f"exit status {code} after SIGTERM")
        self._server.start()

    def _kill(self) -> None:
        self._server.kill()
        self._server.start()

    def _lock(self) -> None:
        other = sqlite3.connect(self._server.output / "jobs.sqlite", isolation_level=None, timeout=30)
        other.execute("BEGIN IMMEDIATE")
        time.sleep(LOCK)
        other.close()

    def _fill(self) -> None:
        filling = self._server.output / "filling"
        with filling.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(65536))
        time.sleep(FULL)
        filling.unlink()


def headers_of(index: int) -> dict[str, str]:
    """The headers of one job: the key of its tenant, and an idempotency key."""
    return {"Authorization": f"Bearer {TENANTS[index % len(TENANTS)]}-secret", "Idempotency-Key": f"job-{index}"}


def listed(server: Server, tenant: str) -> list[str]:
    """Return the prompts of all videos of a tenant."""
    prompts: list[str] = []
    after: str | None = None
    while True:
        params: dict[str, Any] = {"limit": 100, **({"after": after} if after else {})}
        answer = httpx.get(
            f"{server.url}/v1/videos", params=params, headers={"Authorization": f"Bearer {tenant}-secret"}, timeout=30
        ).json()
        prompts += [one["prompt"] for one in answer["data"]]
        if not answer["has_more"]:
            return prompts
        after = answer["last_id"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--minutes", type=float, default=15.0, help="the run fails after this time")
    parser.add_argument("--output", type=Path, help="file for the figures")
    args = parser.parse_args()
    with TemporaryDirectory() as place, small_disk(Path(place) / "output") as has_disk:
        home, rng = Path(place), random.Random(args.seed)
        tiny.make_model("wan2.1", home / "model")
        keys = home / "keys"
        keys.write_text("".join(f"{tenant} {tenant}-secret\n" for tenant in TENANTS))
        keys.chmod(0o600)
        options = ("--api-key-file", str(keys), "--max-queue", "50", "--stall-timeout", str(STALL))
        server = Server(home / "model", home / "output", (*options, "--drain-timeout", "5")).start().wait()
        kinds = [kind for kind, count in COUNTS.items() for _ in range(count) if has_disk or kind != "fill the disk"]
        rng.shuffle(kinds)
        chaos = Chaos(server, rng, kinds)
        disturbing = threading.Thread(target=chaos.run, daemon=True)
        disturbing.start()
        jobs: dict[int, dict[str, Any]] = {}
        progress = Progress(console=console)
        shown = progress.add_task("jobs", total=args.jobs)
        stop = time.monotonic() + 60 * args.minutes
        indices = iter(range(10**9))
        lock = threading.Lock()

        def client() -> None:
            """Run jobs, one at a time, until there were enough and all disturbances are over."""
            while time.monotonic() < stop:
                with lock:
                    index = next(indices)
                if index >= args.jobs and not disturbing.is_alive():
                    return
                headers = headers_of(index)
                jobs[index] = ended(server, submit(server, WORK, index, headers), headers)
                progress.update(shown, completed=len(jobs))

        with progress, ThreadPoolExecutor(args.clients) as pool:
            for future in [pool.submit(client) for _ in range(args.clients)]:
                future.result()
        seconds = time.monotonic() - chaos.begin
        disturbing.join(60)
        server.wait()
        statuses = Counter(one["status"] for one in jobs.values())
        errors = [one["error"] for one in jobs.values() if one["status"] == "failed"]
        completed = {index: one for index, one in jobs.items() if one["status"] == "completed"}
        broken = [index for index, one in completed.items() if not plays(server, one, headers_of(index))]
        prompts = Counter(prompt for tenant in TENANTS for prompt in listed(server, tenant))
        duplicated = sum(count - 1 for count in prompts.values())
        lost = statuses["lost"] + len([index for index in jobs if f"job {index}" not in prompts])
        server.stop()
        partial = [path.name for path in server.output.rglob(".*.partial")]
    table = Table(title="disturbances", title_justify="left")
    rows: list[tuple[str, ...]] = [("what", "at (s)", "not ready after (s)", "ready again after (s)", "")]
    for one in chaos.log:
        times = ["-" if value is None else f"{value:.1f}" for value in (one.at, one.unready, one.again)]
        rows.append((one.kind, *times, "LATE" if one.wrong else ""))
    for name in rows[0]:
        table.add_column(name)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    lines = [
        "# The server in chaos\n",
        f"`python benchmarks/chaos.py`, {date.today()}, {os.cpu_count()} cores: a tiny Wan2.1 on two ranks, two "
        f"tenants, {args.clients} clients with one job each at a time, `--stall-timeout {STALL} --drain-timeout 5`.\n",
        f"- {len(jobs)} jobs in {seconds:.0f} s: {dict(statuses)}; failed with: "
        f"{dict(Counter(error['code'] for error in errors))}",
        f"- lost: {lost}; made twice: {duplicated}; broken files: {len(broken)}; unfinished files at the end: "
        f"{len(partial)}",
        f"- `/readyz` too late: {sum(one.wrong for one in chaos.log)} of {len(chaos.log)} disturbances\n",
        "| " + " | ".join(rows[0]) + " |",
        "| --- | --- | --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in rows[1:]),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text)
    for error in errors:
        console.print(f"failed: {error['code']}: {error['message'][:200]}")
    missing = len(kinds) - len(chaos.log)
    unexpected = [error for error in errors if error["code"] != "disk_full"]
    wrong = [lost, duplicated, len(broken), len(unexpected), missing, *(one.wrong for one in chaos.log)]
    if any(wrong) or chaos.crashes or len(jobs) < args.jobs:
        sys.exit(f"jobs were lost, made twice, or failed, or the run was cut short: {chaos.crashes or ''}")


if __name__ == "__main__":
    main()
