"""Encode time of halovae on one and two ranks, and of diffusers, interleaved in one run.

    python benchmarks/encode.py [--output docs/benchmarks/encode.md]

True-size models on seeded random weights, one thread per rank, fp32, compiled kernels. Times are medians of the slowest
rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from halovae.distributed.ranks import Ranks
from halovae.kernels.native import ready
from halovae.models.architectures import random_vae
from halovae.runtime.vae import VAE

# Family, width, height, frames.
CASES = (
    ("qwen-image", 256, 256, 1), ("qwen-image", 512, 512, 1), ("wan2.1", 64, 64, 9), ("wan2.1", 128, 128, 9),
    ("wan2.2-5b", 128, 128, 9),
)  # fmt: skip
HEAD = """| clip | diffusers (s) | 1 rank (s) | 2 ranks (s) | 2 ranks, auto (s) | diffusers / 2 ranks | difference |
| --- | --- | --- | --- | --- | --- | --- |"""
_held: dict[str, Any] = {}


def hold(family: str) -> None:
    """Load the model on each rank."""
    _held["vae"] = random_vae(family)
    _held["encoder"] = VAE(random_vae(family))
    ready(torch.device("cpu"), wait=True)


@torch.inference_mode()
def encode(pictures: torch.Tensor, mode: str) -> tuple[float, torch.Tensor]:
    """Encode once on each rank. Return the seconds until this rank is done, and the moments."""
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    if mode == "diffusers":
        moments = _held["vae"].encode(pictures).latent_dist.parameters
    else:
        moments = _held["encoder"].encode(pictures, mode=mode)
    return time.perf_counter() - begin, moments


def row(ranks: dict[int, Ranks], case: tuple[str, int, int, int], repeat: int) -> str:
    """Let all ways take turns, and return a row of the table."""
    family, width, height, frames = case
    pictures = 2 * torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) - 1
    ways = {"diffusers": 1, "single": 1, "parallel": 2, "auto": 2}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, torch.Tensor] = {}
    for turn in range(repeat + 1):
        for way, count in ways.items():
            found = ranks[count].run(encode, pictures, way)
            results[way] = found[0][1]
            if turn:  # the first one warms up
                seconds[way].append(max(one[0] for one in found))
    times = {way: statistics.median(taken) for way, taken in seconds.items()}
    difference = max((results[way] - results["diffusers"]).abs().max().item() for way in ways)
    figures = [f"{times[way]:.3f}" for way in ways]
    figures += [f"{times['diffusers'] / times['parallel']:.2f}", f"{difference:.1e}"]
    return f"| {family}, {width}x{height}, {frames} frame(s) | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="rounds of a case after the first")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    table = [HEAD]
    console = Console(stderr=True)
    with Ranks(1) as one, Ranks(2) as two, console.status("") as status:
        ranks = {1: one, 2: two}
        for family in dict.fromkeys(case[0] for case in CASES):
            for group in ranks.values():
                group.run(hold, family)
            for case in (case for case in CASES if case[0] == family):
                status.update(str(case))
                table.append(row(ranks, case, args.repeat))
                console.print(table[-1], soft_wrap=True, highlight=False)
    print("\n".join(table))
    if args.output is not None:
        args.output.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
