"""The effect of batched decodes on a server's throughput, and what replicas on Ray keep while a node is killed.

    python benchmarks/serve_load.py [--jobs 200] [--clients 16] [--output docs/benchmarks/serve_load.md]
    python benchmarks/serve_load.py --replicas 2 --kill-node [--jobs 60] [--output docs/benchmarks/replicas.md]

A tiny pipeline runs on two ranks. Rounds measure throughput with `--decode-batch` 4 and 1 in turn. The jobs take longer
to decode than to denoise, as only such jobs wait for one another. `chaos.py` shows what the server keeps while its
processes are killed.

With `--replicas`, a Ray cluster starts on this machine, on loopback: a node of one CPU for each replica of one rank.
With `--kill-node`, the last node is killed once a third of the jobs have ended. No job may be lost, be made twice, or
fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from live_server import Server, Work, ended, plays, submit
from rich.console import Console
from rich.progress import track

from halovae.pipelines import tiny

DECODES = Work(("96x96",), 1)
SPREAD = Work(("64x48", "80x48", "64x64"), 4)
STORE = 80 * 2**20  # bytes of each node's object store
console = Console(stderr=True)


def run(
    server: Server, jobs: int, clients: int, work: Work = DECODES, on_end: Callable[[], object] = lambda: None
) -> tuple[list[dict[str, Any]], float]:
    """Run all jobs, shared by clients with one job each at a time. Return the ended jobs and the seconds they took."""

    def one(index: int) -> dict[str, Any]:
        shown = ended(server, submit(server, work, index))
        on_end()
        return shown

    def client(indices: range) -> list[dict[str, Any]]:
        return [one(index) for index in indices]

    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, range(first, jobs, clients)) for first in range(clients)]
        results = [shown for future in track(futures, "clients", console=console) for shown in future.result()]
    return results, time.monotonic() - begin


def replicas_of(server: Server) -> list[dict[str, Any]]:
    """Return the replicas as `/health` shows them."""
    shown: list[dict[str, Any]] = httpx.get(f"{server.url}/health", timeout=30).json()["replicas"]
    return shown


def wait_for_ready(server: Server, count: int, seconds: float = 600) -> None:
    """Wait until so many replicas are ready."""
    server.wait(seconds)
    deadline = time.monotonic() + seconds
    while sum(one["state"] == "ready" for one in replicas_of(server)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{replicas_of(server)}:\n{server.log.read_text()[-3000:]}")
        time.sleep(0.2)


def run_replicas(home: Path, replicas: int, kills: bool, jobs: int, clients: int) -> tuple[str, bool]:
    """Run jobs on replicas. Return what became of them as text, and whether all is well."""
    # On loopback alone, and not ended for other processes' memory.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_memory_monitor_refresh_ms": "0"
    }  # fmt: skip
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes = [cluster.add_node(**node) for _ in range(replicas - 1)]
    options = "--replicas", str(replicas), "--ray-address", cluster.address, "--max-queue", "50"
    server = Server(home / "model", home / "replicas", options, ranks_started=1).start()
    lock, done, times = threading.Lock(), 0, dict[str, float]()

    def lose_a_node() -> None:
        """Kill a node once a third of the jobs have ended, and note when the server has noticed."""
        nonlocal done
        with lock:
            done += 1
            if not kills or done != jobs // 3:
                return
        begin = time.monotonic()
        cluster.remove_node(nodes[-1], allow_graceful=False)
        times["killed"] = time.monotonic() - begin
        while sum(one["state"] == "ready" for one in replicas_of(server)) == replicas:
            time.sleep(0.1)
        times["noticed"] = time.monotonic() - begin

    wait_for_ready(server, replicas)
    results, seconds = run(server, jobs, clients, SPREAD, lose_a_node)
    if kills:
        cluster.add_node(**node)
        wait_for_ready(server, replicas)
    shown, completed = replicas_of(server), _metric(server, "halovae_jobs_completed_total")
    broken = sum(not plays(server, one) for one in results if one["status"] == "completed")
    server.stop()
    cluster.shutdown()
    with sqlite3.connect(server.output / "jobs.sqlite") as database:
        rows = list(database.execute("SELECT json_extract(spec, '$.text'), attempts, interrupted FROM jobs"))
    prompts = Counter(text for text, _, _ in rows)
    interrupted = sum("host" in json.loads(counts or "{}") for _, _, counts in rows)
    lost = sum(one["status"] == "lost" for one in results) + jobs - len(prompts)
    twice = len(rows) - len(prompts) + max(0, round(completed) - jobs)
    statuses = Counter(one["status"] for one in results)
    lines = [
        "# Replicas while a node is lost\n" if kills else "# Replicas\n",
        f"`python benchmarks/serve_load.py --replicas {replicas}{' --kill-node' if kills else ''}`, {date.today()}, "
        f"{os.cpu_count()} cores: a tiny Wan2.1, {replicas} Ray nodes of one CPU on loopback, one replica of one rank "
        f"on each, {clients} clients with one job each at a time.\n",
        f"- {jobs} jobs in {seconds:.0f} s: {dict(statuses)}",
        f"- lost: {lost}; made twice: {twice}; broken files: {broken}",
        f"- attempts beyond the first: {sum(attempts for _, attempts, _ in rows) - jobs}, of {interrupted} jobs that "
        "the lost node had",
        f"- jobs by replica: {', '.join(str(one['completed']) for one in shown)}; restarts: "
        f"{', '.join(str(one['restarts']) for one in shown)}",
    ]
    if kills:
        lines.append(
            f"- killing the node took {times['killed']:.1f} s; after {times['noticed']:.1f} s its replica got no more "
            "jobs; a new node got it back"
        )
    well = not (lost or twice or broken) and statuses["completed"] == jobs
    return "\n".join(lines) + "\n", well


def _metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, help="default: 200, or 60 with --replicas")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=2, help="rounds with and without batching")
    parser.add_argument("--replicas", type=int, help="measure replicas on a Ray cluster of as many nodes instead")
    parser.add_argument("--kill-node", action="store_true", help="kill a node meanwhile")
    parser.add_argument("--output", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.kill_node and (args.replicas or 0) < 2:
        parser.error("--kill-node: expected also --replicas 2 or more")
    well = True
    with TemporaryDirectory() as place:
        tiny.make_model("wan2.1", Path(place) / "model")
        if args.replicas:
            text, well = run_replicas(Path(place), args.replicas, args.kill_node, args.jobs or 60, args.clients)
        else:
            text = compare_batches(Path(place), args.jobs or 200, args.clients, args.repeat)
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text)
    if not well:
        sys.exit("jobs were lost, made twice, or failed")


def compare_batches(home: Path, jobs: int, clients: int, repeat: int) -> str:
    """Measure throughput with and without batches. Return it as text."""
    rates: dict[int, list[float]] = {4: [], 1: []}
    batches: list[int] = []
    for round_ in range(repeat):
        for batch in rates:
            options = "--decode-batch", str(batch), "--max-queue", "50"
            server = Server(home / "model", home / f"{batch}-{round_}", options).start().wait()
            run(server, clients, clients)  # one-time work
            results, seconds = run(server, jobs, clients)
            assert all(shown["status"] == "completed" for shown in results)
            rates[batch].append(jobs / seconds)
            if batch > 1:
                batches += [shown["decode"]["batch"] for shown in results]
            server.stop()
    medians = {batch: statistics.median(values) for batch, values in rates.items()}
    return (
        "# The server under load\n\n"
        f"`python benchmarks/serve_load.py`, {date.today()}, {os.cpu_count()} cores: a tiny Wan2.1 on two ranks of one "
        f"thread, {clients} clients with one job each at a time, {jobs} jobs of {DECODES.sizes[0]}, "
        f"{DECODES.steps} step.\n\n"
        f"- `--decode-batch` 4: {medians[4]:.2f} jobs/s, 1: {medians[1]:.2f} jobs/s "
        f"({medians[4] / medians[1]:.2f}x); jobs by batch: {dict(sorted(Counter(batches).items()))}\n"
    )


if __name__ == "__main__":
    main()
