"""How far halovae's frames are from diffusers' own untiled decode, over models, grids, halo depths, chunks and dtypes.

    python benchmarks/exactness.py

Small models of the true architecture on seeded random weights; real gloo ranks. The status is 1 if a bound is broken:
in fp32 the largest error must be at most 1e-4; in bf16 the error against diffusers' fp32 decode at most 1.1 times that
of diffusers' own bf16 decode, both the largest and the root mean square.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from halovae import Grid, load
from halovae.bench.models import FAMILIES, random_vae
from halovae.bench.ranks import Ranks

GRIDS = ["1x1", "2x1", "1x2", "3x1", "2x2"]
CASES = [((1, 4, 12, 8), grid) for grid in GRIDS] + [((1, 4, 23, 17), "3x1")]
DEPTHS, CHUNKS = [1, 2, 4], [1, 2, "all"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP32_BOUND, BF16_BOUND = 1e-4, 1.1

_vaes: dict[tuple[str, int, str], Any] = {}


def vae_of(family: str, width: int, dtype: str) -> Any:
    """The model, made once in each process."""
    key = (family, width, dtype)
    diffusers.utils.logging.set_verbosity_error()  # it warns of every conversion to bf16
    if key not in _vaes:
        _vaes[key] = random_vae(family, width).to(DTYPES[dtype])
    return _vaes[key]


def latents_of(family: str, size: tuple[int, int, int, int]) -> torch.Tensor:
    batch, frames, height, width = size
    channels = 48 if family == "wan2.2-5b" else 16
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(1))


def errors(frames: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """The largest error, and the root mean square."""
    difference = (frames.float() - reference).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def decode(family: str, width: int, dtype: str, size: Any, grid: str, depth: int, chunk: Any) -> torch.Tensor | None:
    """On each rank: the frames, on rank 0."""
    decoder = load(vae_of(family, width, dtype))
    return decoder.decode(latents_of(family, size), grid=Grid.parse(grid), halo_depth=depth, chunk=chunk)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of the last level (default 16)")
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    args = parser.parse_args()
    console, broken = Console(), 0
    cells_bf16: list[tuple[float, float]] = []
    groups = {count: Ranks(count) for count in (1, 2, 3, 4)}
    table = Table(title="largest error by halo depth / chunk; = marks frames bitwise equal to the 1x1 grid's")
    for column in ("model", "dtype", "latents", "grid", "diffusers"):
        table.add_column(column)
    for depth in DEPTHS:
        for chunk in CHUNKS:
            table.add_column(f"{depth}/{chunk}", no_wrap=True)
    plan = [(family, dtype, size, grid) for family in args.models for dtype in DTYPES for size, grid in CASES]
    for family, dtype, size, grid in track(plan, description="decoding", console=Console(stderr=True), transient=True):
        latents = latents_of(family, size)
        reference = vae_of(family, args.width, "fp32").decode(latents).sample
        own = vae_of(family, args.width, dtype).decode(latents.to(DTYPES[dtype])).sample
        theirs, their_rms = errors(own, reference)
        arguments = (family, args.width, dtype, size)
        singles = {chunk: groups[1].run(decode, *arguments, "1x1", 1, chunk)[0] for chunk in CHUNKS}
        cells = []
        for depth in DEPTHS:
            for chunk in CHUNKS:
                frames = groups[Grid.parse(grid).size].run(decode, *arguments, grid, depth, chunk)[0]
                single = singles[chunk]
                assert frames is not None
                assert single is not None
                error, rms = errors(frames, reference)
                breaks = error > FP32_BOUND
                if dtype == "bf16":
                    breaks = error > BF16_BOUND * theirs or rms > BF16_BOUND * their_rms
                broken += breaks
                if dtype == "bf16":
                    cells_bf16.append((error / theirs, rms / their_rms))
                marks = f"{'!' if breaks else ''}{'=' if torch.equal(frames, single) else ''}"
                cells.append(f"{error:.1e} {marks}")
        table.add_row(family, dtype, "x".join(map(str, size[1:])), grid, f"{theirs:.1e}", *cells)
    for group in groups.values():
        group.close()
    console.width = max(console.width, 170)
    console.print(table)
    console.print(
        "Largest absolute error against diffusers in fp32, frames in [-1, 1]; the column diffusers has diffusers' own "
        f"in that dtype. Bounds broken (marked !): {broken}"
    )
    largest, rms_ratios = zip(*cells_bf16, strict=True)
    console.print(
        f"bf16 against diffusers' bf16: root mean square error {min(rms_ratios):.2f} to {max(rms_ratios):.2f} times, "
        f"largest error {min(largest):.2f} to {max(largest):.2f} times"
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
