"""The overhead of an operator on a plane tensor over the same operator on the rank's shard, outside of tracing.

    python benchmarks/dispatch.py

One rank of a simulated 2x1 grid, tiny tensors, no communication: this measures Python. The two take turns, and the
least of several rounds counts. Eager calls have this overhead for each operator; replayed graphs do not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halovae import Grid, Mesh
from halovae.plane.plane import Plane
from halovae.planning.graphs import TracedTransport

WEIGHT, SCALE = torch.randn(8, 8, 1, 1), torch.randn(8, 1, 1)
OPERATORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda x, y: x + y,
    "add a number": lambda x, y: x + 1,
    "mul": lambda x, y: x * y,
    "mul by [C, 1, 1]": lambda x, y: x * SCALE,
    "silu": lambda x, y: F.silu(x),
    "view": lambda x, y: x.view(1, 2, 4, -1, 4),
    "reshape": lambda x, y: x.reshape(1, 8, -1),
    "permute": lambda x, y: x.permute(0, 2, 3, 1),
    "transpose": lambda x, y: x.transpose(1, 2),
    "slice": lambda x, y: x[:, :4],
    "select": lambda x, y: x[:, 0],
    "unsqueeze": lambda x, y: x.unsqueeze(2),
    "squeeze": lambda x, y: x.squeeze(0),
    "expand": lambda x, y: x.expand(2, -1, -1, -1),
    "chunk, 2 results": lambda x, y: x.chunk(2, 1),
    "split, 4 results": lambda x, y: x.split(2, 1),
    "cat of 2": lambda x, y: torch.cat([x, y], 1),
    "convolution 1x1": lambda x, y: F.conv2d(x, WEIGHT),
    "clone": lambda x, y: x.clone(),
    "clone, contiguous": lambda x, y: x.clone(memory_format=torch.contiguous_format),
    "mean over channels": lambda x, y: x.mean(1, keepdim=True),
    "to another dtype": lambda x, y: x.to(torch.float64),
}


def measured(names: Sequence[str], calls: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the least microseconds of each operator on a plane tensor, and on the rank's shard. All take turns."""
    plane = Plane(Mesh(Grid(rows=2), torch.device("cpu"), TracedTransport(0, 2)))
    with plane.active():
        x, y = (plane.scatter(torch.randn(1, 8, 4, 4)) for _ in range(2))
    least = dict.fromkeys(names, (math.inf, math.inf))
    for _ in range(rounds):
        for name in names:
            with torch.no_grad():
                plain = timed(OPERATORS[name], (x.local, y.local), calls)
            with plane.active():
                ours = timed(OPERATORS[name], (x, y), calls)
            least[name] = min(least[name][0], ours), min(least[name][1], plain)
    return least


def timed(operator: Callable[..., Any], tensors: tuple[Tensor, Tensor], calls: int) -> float:
    """Return the mean microseconds of a call."""
    begin = time.perf_counter()
    for _ in range(calls):
        operator(*tensors)
    return (time.perf_counter() - begin) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="calls of each operator in a round")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", nargs="*", choices=list(OPERATORS), default=list(OPERATORS), metavar="OPERATOR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with Console(stderr=True).status("measuring"):
        found = measured(args.only, args.calls, args.rounds)
    table = Table(title="microseconds of one call", title_justify="left")
    for column in ("operator", "on the shard", "on the plane tensor", "overhead"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, (ours, plain) in found.items():
        table.add_row(name, f"{plain:.1f}", f"{ours:.1f}", f"{ours - plain:.1f}")
    Console().print(table)
    print(json.dumps({name: round(ours - plain, 2) for name, (ours, plain) in found.items()}))


if __name__ == "__main__":
    main()
