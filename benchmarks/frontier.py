"""Strips on this machine: time, live bytes, and error, beside one decode at once, and diffusers at once and in tiles.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --model wan2.1 --latent 1x16x3x60x104 --strips 8:cols --repeat 2
    python benchmarks/frontier.py --model flux --latent 1x16x64x64 --strips 4:rows 8:rows 8:rows:recompute

A true-size model on seeded random weights, one process, one thread. Ways take turns. Live bytes are those of tensors
that a decode creates, besides its result; `predicted` is what plans expect. Errors are the largest difference from
diffusers' own untiled decode, over its largest value.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halovae import Grid
from halovae.device.memory import LiveBytes
from halovae.kernels.native import ready
from halovae.models.architectures import random_vae
from halovae.models.registry import families
from halovae.models.zoo import decode
from halovae.plane import Sharded
from halovae.plane.strip_program import InStrips
from halovae.planning.graphs import traced

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Way = tuple[str, Callable[[], Tensor | None], int | None]


def ways_of(name: str, latents: Tensor, strips: list[InStrips], diffusers: bool) -> list[Way]:
    """Return the ways to decode, each with its name and its predicted peak in bytes."""
    vae = random_vae(name).to(latents.dtype)
    sharded = Sharded(lambda z: decode(vae, z), [vae])

    def predicted(how: InStrips | None) -> int:
        return traced(
            lambda z: decode(vae, z), vae, latents.shape, latents.dtype, Grid(), kind="cpu", strips=how
        ).cost.peak  # fmt: skip

    found: list[Way] = []
    if diffusers:
        tiled = random_vae(name).to(latents.dtype)
        tiled.enable_tiling()
        found += [
            ("diffusers", lambda: decode(vae, latents), None),
            ("diffusers, tiles", lambda: tiled.decode(latents, return_dict=False)[0], None),
        ]
    found.append(("at once", lambda: sharded(latents, grid=Grid()), predicted(None)))
    for how in strips:
        found.append((str(how), partial(sharded, latents, grid=Grid(), strips=how), predicted(how)))
    return found


def main() -> None:
    """Let the ways take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(families()), default="wan2.1")
    parser.add_argument("--latent", default="1x16x2x40x52", help="BxCxTxHxW or BxCxHxW")
    parser.add_argument(
        "--strips", nargs="+", default=["2:cols", "4:cols", "8:cols"], help="COUNT:rows or COUNT:cols[:recompute]"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-diffusers", action="store_true", help="leave diffusers out: errors are to one decode")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    ready(CPU, True)
    shape = [int(size) for size in arguments.latent.split("x")]
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[arguments.dtype])
    asked = [one.split(":") for one in arguments.strips]
    strips = [InStrips(int(count), "rows" if axis == "rows" else "cols", bool(rest)) for count, axis, *rest in asked]
    ways = ways_of(arguments.model, latents, strips, not arguments.no_diffusers)
    seconds: dict[str, list[float]] = {name: [] for name, *_ in ways}
    peaks, results = dict[str, int](), dict[str, Tensor]()
    console = Console()
    with torch.no_grad(), console.status("") as status:
        for turn in range(arguments.repeat + 1):  # the first one records, and is not timed
            for name, call, _ in ways:
                status.update(f"turn {turn}: {name}")
                with LiveBytes() as live:
                    begin = time.perf_counter()
                    result = call()
                    taken = time.perf_counter() - begin
                assert result is not None
                if turn:
                    seconds[name].append(taken)
                    peaks[name] = live.peak - result.nbytes
                results[name] = result.float()
    reference = results[ways[0][0]]
    once = statistics.median(seconds["at once"])
    table = Table(title=f"{arguments.model} {arguments.latent}, {arguments.dtype}, {arguments.threads} thread(s)")
    for column in ("way", "s (median)", "of at once", "live MiB", "of at once", "predicted MiB", "error"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, _, predicted in ways:
        median, error = statistics.median(seconds[name]), (results[name] - reference).abs().max()
        table.add_row(
            name, f"{median:.2f}", f"{median / once:.2f}", f"{peaks[name] / 2**20:,.0f}",
            f"{peaks[name] / peaks['at once']:.2f}", "" if predicted is None else f"{predicted / 2**20:,.0f}",
            f"{(error / reference.abs().max()).item():.1e}",
        )  # fmt: skip
    console.print(table)
    if arguments.output is not None:
        with arguments.output.open("w") as file:
            Console(file=file, width=140).print(table)
        console.print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
