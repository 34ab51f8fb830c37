"""The effect of batched decodes on a server's throughput.

    python benchmarks/serve_load.py [--jobs 200] [--clients 16] [--output docs/benchmarks/serve_load.md]

A tiny pipeline runs on two ranks. Rounds measure throughput with `--decode-batch` 4 and 1 in turn. The jobs take longer
to decode than to denoise, as only such jobs wait for one another. `chaos.py` shows what the server keeps while its
processes are killed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from live_server import Server, Work, ended, submit
from rich.console import Console
from rich.progress import track

from halovae.pipelines import tiny

DECODES = Work(("96x96",), 1)
console = Console(stderr=True)


def run(server: Server, jobs: int, clients: int) -> tuple[list[dict[str, Any]], float]:
    """Run all jobs, shared by clients with one job each at a time. Return the ended jobs and the seconds they took."""

    def client(indices: range) -> list[dict[str, Any]]:
        return [ended(server, submit(server, DECODES, index)) for index in indices]

    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, range(first, jobs, clients)) for first in range(clients)]
        results = [shown for future in track(futures, "clients", console=console) for shown in future.result()]
    return results, time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=2, help="rounds with and without batching")
    parser.add_argument("--output", type=Path, help="file for the figures")
    args = parser.parse_args()
    rates: dict[int, list[float]] = {4: [], 1: []}
    batches: list[int] = []
    with TemporaryDirectory() as place:
        home = Path(place)
        tiny.make_model("wan2.1", home / "model")
        for round_ in range(args.repeat):
            for batch in rates:
                options = "--decode-batch", str(batch), "--max-queue", "50"
                server = Server(home / "model", home / f"{batch}-{round_}", options).start().wait()
                run(server, args.clients, args.clients)  # one-time work
                results, seconds = run(server, args.jobs, args.clients)
                assert all(shown["status"] == "completed" for shown in results)
                rates[batch].append(args.jobs / seconds)
                if batch > 1:
                    batches += [shown["decode"]["batch"] for shown in results]
                server.stop()
    medians = {batch: statistics.median(values) for batch, values in rates.items()}
    text = (
        "# The server under load\n\n"
        f"`python benchmarks/serve_load.py`, {date.today()}, {os.cpu_count()} cores: a tiny Wan2.1 on two ranks of one "
        f"thread, {args.clients} clients with one job each at a time, {args.jobs} jobs of {DECODES.sizes[0]}, "
        f"{DECODES.steps} step.\n\n"
        f"- `--decode-batch` 4: {medians[4]:.2f} jobs/s, 1: {medians[1]:.2f} jobs/s "
        f"({medians[4] / medians[1]:.2f}x); jobs by batch: {dict(sorted(Counter(batches).items()))}\n"
    )
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
