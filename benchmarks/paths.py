"""One decode by two paths, in turns: hand-written tiles, and the unmodified module's graph with its passes.

    python benchmarks/paths.py
    python benchmarks/paths.py --model wan2.1 --latent 1x16x3x32x32 --dtype bf16 --ranks 2

Each path and number of ranks has processes of its own, one thread a rank, compiled and warmed up. Seconds are the
slowest rank's of a decode whose frames stay where they are. Memory is the highest rank's above what it held with the
model and the compiler, before the first decode.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from halovae import Grid, kernels, load
from halovae.bench.models import FAMILIES, random_vae
from halovae.bench.ranks import Ranks
from halovae.integrations.autoencoder import Autoencoder
from halovae.memory import MemoryMeter
from halovae.platform import Platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = (
    ("qwen-image", "1x16x1x32x32"),
    ("wan2.1", "1x16x3x32x32"),
    ("wan2.2-5b", "1x48x2x16x16"),
)
PATHS = ("tiles", "graph")


@dataclass
class Taken:
    """What the decodes of one path took, and what the last one came to."""

    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    frames: torch.Tensor | None = None


def main() -> None:
    """Measure, and print a table with ratios of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(FAMILIES))
    parser.add_argument("--latent", help="BxCxTxHxW; needs --model")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--ranks", type=int, choices=(1, 2))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    if args.latent and not args.model:
        parser.error("--latent needs --model")
    table = Table(title="tiles and graphs, 1 thread a rank, medians", title_justify="left")
    for column in (
        "model", "latent", "dtype", "ranks", "tiles (s)", "graph (s)", "graph/tiles", "tiles (MiB)", "graph (MiB)",
        "graph/tiles", "apart",
    ):  # fmt: skip
        table.add_column(column)
    console = Console(width=160)
    for model, latent in CASES:
        if args.model not in (None, model):
            continue
        for dtype in DTYPES if args.dtype is None else (args.dtype,):
            for ranks in (1, 2) if args.ranks is None else (args.ranks,):
                case = model, args.latent or latent, dtype, ranks
                found = measure(*case, args.repeat)
                row = _row(found)
                print(*case, *row, *(f"{path}: {found[path].seconds}" for path in PATHS), flush=True)
                table.add_row(*map(str, case), *row)
    console.print(table)


def measure(model: str, latent: str, dtype: str, ranks: int, repeat: int) -> dict[str, Taken]:
    """Decode `repeat` times by each path in turn."""
    latents = torch.randn(*map(int, latent.split("x")), generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    groups = {path: Ranks(ranks, 1) for path in PATHS}
    taken = {path: Taken() for path in PATHS}
    try:
        for turn in range(repeat + 1):
            for path, group in groups.items():
                outcomes = group.run(_decoded, path, model, latents, Grid(rows=ranks))
                if turn:  # the first compiles, records, and warms up
                    one = taken[path]
                    one.seconds.append(round(max(seconds for seconds, _, _ in outcomes), 3))
                    one.peak.append(max(peak for _, peak, _ in outcomes))
                    one.frames = torch.cat([frames for _, _, frames in outcomes], -2)
    finally:
        for group in groups.values():
            group.close()
    return taken


def _row(found: dict[str, Taken]) -> list[str]:
    tiles, graph = (found[path] for path in PATHS)
    assert tiles.frames is not None
    assert graph.frames is not None
    apart = (tiles.frames.double() - graph.frames.double()).abs().max() / tiles.frames.double().abs().max()
    row = []
    for one, other, form, unit in (
        (tiles.seconds, graph.seconds, ".2f", 1), (tiles.peak, graph.peak, ".0f", 2**20),
    ):  # fmt: skip
        first, second = (statistics.median(values) / unit for values in (one, other))
        row += [f"{first:{form}}", f"{second:{form}}", f"{second / first:.3f}"]
    return [*row, f"{float(apart):.1e}"]


_held: dict[str, Any] = {}


def _decoded(path: str, model: str, latents: torch.Tensor, grid: Grid) -> tuple[float, int, torch.Tensor]:
    """Seconds of this rank's decode, bytes above those at rest, and its frames."""
    platform = Platform(torch.device("cpu"))
    if not _held:
        vae = random_vae(model).to(latents.dtype)
        del vae.encoder  # tiles do not hold it
        decoder = Autoencoder(vae) if path == "graph" else load(vae)
        kernels.works(platform.device)
        # What a decode leaves with malloc is not at rest: it was not there before.
        _held.update(decoder=decoder, resting=MemoryMeter(platform).resting)
        decoder.warmup(latents.shape, grid=grid)
    meter = MemoryMeter(platform)
    begin = time.perf_counter()
    with torch.inference_mode():
        frames = _held["decoder"].decode(latents, grid=grid, gather="none")
    return time.perf_counter() - begin, meter.read().peak_reserved - _held["resting"], frames


if __name__ == "__main__":
    main()
