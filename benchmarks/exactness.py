"""Errors of halovae's frames against diffusers' untiled decode, by family, grid, dtype, and with passes on and off.

    python benchmarks/exactness.py
    python benchmarks/exactness.py --models wan2.1 AutoencoderKL --seeds 3

Small models of the true architecture on seeded random weights, real gloo ranks, compiled kernels. An error is the
largest absolute difference over the largest value; the table has the mean over seeds. The exit status is 1 if a bound
is broken. Bounds: 1e-5 in fp32; 1e-12 in fp64, where Winograd's convolution is not used (1e-6 if the module itself
casts to fp32); in bf16, 1.1 times the error of diffusers' own bf16 decode against its fp32 decode.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from halovae import Grid, load
from halovae.distributed.ranks import Ranks
from halovae.models import zoo
from halovae.models.architectures import random_vae
from halovae.models.registry import families

GRIDS = ("1x1", "2x1", "1x2", "3x1", "2x2")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
BOUNDS = {"fp32": 1e-5, "fp64": 1e-12}
CASTS = 1e-6  # the fp64 bound of a module that computes something in fp32
BF16_BOUND = 1.1
WIDTH = 16
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
# Shapes of latents. The zoo's own shapes of its models are too small for some grids.
SHAPES: dict[str, tuple[int, ...]] = {
    "wan2.1": (1, 16, 3, 12, 8),
    "wan2.2-5b": (1, 48, 3, 12, 8),
    "qwen-image": (1, 16, 1, 12, 8),
    "AutoencoderKL": (1, 4, 12, 8),
    "AutoencoderDC (conv)": (1, 4, 12, 8),
    "AutoencoderKLHunyuanVideo": (1, 4, 3, 12, 8),
    "AutoencoderKLCogVideoX": (1, 4, 3, 12, 8),
}

_vaes: dict[tuple[str, str], Any] = {}


def vae_of(name: str, dtype: str) -> Any:
    """Return the model, which each process makes once."""
    if (name, dtype) not in _vaes:
        vae = random_vae(name, WIDTH) if name in families() else zoo.build(ENTRIES[name])
        _vaes[name, dtype] = torch.nn.Module.to(vae, DTYPES[dtype])
    return _vaes[name, dtype]


def latents_of(name: str, dtype: str, seed: int) -> torch.Tensor:
    return torch.randn(*SHAPES[name], generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def decode(name: str, dtype: str, seeds: int, grid: str, passes: bool) -> list[torch.Tensor | None]:
    """Decode the latents of each seed on each rank. Return the frames on rank 0."""
    os.environ.pop("HALOVAE_PASSES", None)
    if not passes:
        os.environ["HALOVAE_PASSES"] = ""
    decoder, first = load(vae_of(name, dtype)), latents_of(name, dtype, 0)
    decoder.warmup(first.shape, grid=Grid.parse(grid))
    return [decoder.decode(latents_of(name, dtype, seed), grid=Grid.parse(grid)) for seed in range(seeds)]


def error(frames: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Return the largest error over the largest value."""
    assert frames is not None
    return float((frames.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@torch.inference_mode()
def main() -> None:
    """Decode, compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    table = Table(title=f"largest error over the largest value, mean of {args.seeds} seeds; ! breaks the bound")
    for column in ("model", "dtype", "passes", "bound", *GRIDS):
        table.add_column(column)
    groups = {count: Ranks(count) for count in (1, 2, 3, 4)}
    progress = Console(stderr=True, width=140)
    cases = [(name, dtype, passes) for name in args.models for dtype in DTYPES for passes in (True, False)]
    broken = 0
    for name, dtype, passes in track(cases, description="decoding", console=progress, transient=True):
        exact = "fp64" if dtype == "fp64" else "fp32"
        wanted = [zoo.decode(vae_of(name, exact), latents_of(name, exact, seed)) for seed in range(args.seeds)]
        if dtype == "bf16":
            own = [zoo.decode(vae_of(name, dtype), latents_of(name, dtype, seed)) for seed in range(args.seeds)]
            bound = BF16_BOUND * statistics.mean(map(error, own, wanted))
        else:
            casts = dtype == "fp64" and (name in families() or ENTRIES[name].factor_fp32)
            bound = CASTS if casts else BOUNDS[dtype]
        cells = []
        for grid in GRIDS:
            found = groups[Grid.parse(grid).size].run(decode, name, dtype, args.seeds, grid, passes)[0]
            mean = statistics.mean(map(error, found, wanted))
            broken += mean > bound
            cells.append(f"{mean:.1e}{'!' if mean > bound else ''}")
        row = [name, dtype, "on" if passes else "off", f"{bound:.1e}", *cells]
        table.add_row(*row)
        progress.print(*row)
    for group in groups.values():
        group.close()
    Console(width=140).print(table)
    print(f"{broken} of {len(cases) * len(GRIDS)} break their bound")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
