"""What borders that travel while the rest is written gain, and the most that any overlap could gain.

    python benchmarks/overlap.py [--wire 1gbit 100mbit] [--rounds 20]

Two ranks of one thread share the rows of true-size models on seeded random weights. They decode as they do, overlapped,
and without a single message, in turns; that last way's frames are wrong at the border, and its time is what would be
left if messages cost nothing. First on one host, then as two hosts: network namespaces of this machine joined by a wire
of the named rates (`tc ... tbf`; as root). Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from halovae import Grid, load
from halovae.bench.models import random_vae
from halovae.decode import Decoder
from halovae.lines import Lines, ProcessLines, Scope
from halovae.mesh import Mesh
from halovae.planning.plan import Plan
from halovae.platform import RANK_ENVIRONMENT

# Family, and the latents' shape.
CASES = (
    ("qwen-image", (1, 16, 1, 8, 8)), ("qwen-image", (1, 16, 1, 16, 16)), ("qwen-image", (1, 16, 1, 32, 32)),
    ("wan2.1", (1, 16, 3, 8, 8)), ("wan2.1", (1, 16, 3, 16, 16)),
)  # fmt: skip
CHUNK = 2
GRID = Grid(rows=2)
ADDRESS = "10.78.0.{}"
HEAD = """| case | as it is (s) | waiting (s) | overlapped | waiting (s) | without messages | sent (MiB) |
| --- | --- | --- | --- | --- | --- | --- |"""


class Mute(Lines):
    """Lines that carry nothing: what others would send is whatever lies in memory."""

    def __init__(self, lines: Lines) -> None:
        self.rank, self.world = lines.rank, lines.world

    def exchange(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        return lambda: None

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        return [own] * ranks

    def all_values(self, value: Any) -> list[Any]:
        return [value] * self.world


def work(rounds: int) -> None:
    """Be one of the ranks; rank 0 prints a line of JSON for each case."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    lines = ProcessLines(GRID, device)
    mute = Mesh(GRID, device, Mute(lines))
    held: dict[str, Decoder] = {}
    for family, shape in CASES:
        if family not in held:
            with TemporaryDirectory() as folder:
                random_vae(family).save_pretrained(folder)
                held = {family: load(folder, device="cpu")}
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        plan = Plan.of(1, GRID, CHUNK)
        ways: dict[str, dict[str, Any]] = {
            "plain": {"plan": plan},
            "overlapped": {"plan": Plan.of(1, GRID, CHUNK, overlap=True)},
            "mute": {"mesh": mute, "chunk": CHUNK},
        }
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name in sorted(ways, reverse=bool(turn % 2)):
                lines.all_values(None)
                stream = held[family].stream(latents, gather="none", **ways[name])
                stream.join()
                ranks = lines.all_values(stream.report.ranks[0])
                if turn:  # the first one warms up
                    took[name].append((max(one.seconds for one in ranks), max(one.waiting for one in ranks)))
                if name == "plain":
                    sent = ranks[0].bytes_sent
        if lines.rank == 0:
            print(
                json.dumps({"case": f"{family}, {'x'.join(map(str, shape))}", "took": took, "sent": sent}), flush=True
            )


@contextmanager
def hosts(rate: str | None) -> Iterator[list[list[str]]]:
    """What to start each rank by: nothing, or two hosts joined by a wire of `rate`."""
    if rate is None:
        yield [[], []]
        return
    names = [f"overlap-{os.getpid()}-{index}" for index in range(2)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(
            f"ip link add wire netns {names[0]} type veth peer name wire netns {names[1]}".split(), check=True
        )
        for index, name in enumerate(names):
            for command in (
                f"ip -n {name} address add {ADDRESS.format(index + 1)}/24 dev wire",
                f"ip -n {name} link set wire up",
                f"ip -n {name} link set lo up",
                f"tc -n {name} qdisc add dev wire root tbf rate {rate} burst 64kb latency 500ms",
            ):
                subprocess.run(command.split(), check=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def measured(rate: str | None, rounds: int) -> Iterator[str]:
    """The table's lines as they get finished."""
    where = {"MASTER_ADDR": "127.0.0.1" if rate is None else ADDRESS.format(1), "MASTER_PORT": "29577"}
    if rate is not None:
        where["GLOO_SOCKET_IFNAME"] = "wire"
    with hosts(rate) as prefixes:
        ranks = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, "--worker", "--rounds", str(rounds)],
                stdout=subprocess.PIPE, text=True,
                env={**os.environ, **RANK_ENVIRONMENT, **where, "RANK": str(rank), "WORLD_SIZE": "2"},
            )
            for rank, prefix in enumerate(prefixes)
        ]  # fmt: skip
        try:
            assert ranks[0].stdout is not None
            for line in ranks[0].stdout:
                yield told(json.loads(line))
        finally:
            for rank in ranks:
                rank.terminate()
                rank.wait()


def told(result: dict[str, Any]) -> str:
    took = {
        name: [statistics.median(values) for values in zip(*pairs, strict=True)]
        for name, pairs in result["took"].items()
    }

    def ratio(name: str) -> float:
        pairs = zip(result["took"][name], result["took"]["plain"], strict=True)
        return statistics.median(one[0] / plain[0] for one, plain in pairs)

    return (
        f"| {result['case']} | {took['plain'][0]:.3f} | {took['plain'][1]:.3f} | {ratio('overlapped'):.3f} | "
        f"{took['overlapped'][1]:.3f} | {ratio('mute'):.3f} | {result['sent'] / 2**20:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wire", nargs="*", default=[], metavar="RATE", help="as two hosts: 1gbit, 100mbit")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.rounds)
        return
    console = Console(highlight=False, soft_wrap=True)
    text = []
    for rate in (None, *args.wire):
        text += ["", "On one host:" if rate is None else f"Two hosts, a wire of {rate}:", "", HEAD]
        console.print("\n".join(text[-4:]), markup=False)
        for line in measured(rate, args.rounds):
            text.append(line)
            console.print(line, markup=False)
    if args.output is not None:
        args.output.write_text("\n".join(text).lstrip() + "\n")


if __name__ == "__main__":
    main()
