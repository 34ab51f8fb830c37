"""`halovae inspect`: what a model is, and what a decode with it needs."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from halovae.cli.common import Dtype, errors_shown, parse_size, parsed
from halovae.geometry import Grid
from halovae.models.load import find_folder, read_config
from halovae.planning.cost import walk
from halovae.planning.plan import Plan

# What each model is mostly asked for: width, height, frames.
USUAL = {"wan2.1": (1280, 720, 81), "wan2.2-5b": (1280, 704, 121), "qwen-image": (1328, 1328, 1)}


def inspect(
    model: Annotated[str, typer.Argument(help="Folder in diffusers layout (a VAE's or a pipeline's), or a hub id.")],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the pictures. [default: the model's usual]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="How many frames. [default: the model's usual]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="How many clips at once.")] = 1,
    grid: Annotated[str, typer.Option(help="Ranks along ROWSxCOLS, or BATCHxROWSxCOLS.")] = "1x1",
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.fp32,
) -> None:
    """Show a model's family and sizes, and what one rank needs for a decode. Reads no weights."""
    with errors_shown():
        folder = find_folder(model)
        config = read_config(folder)
        width, height, count = USUAL[config.family]
        if size is not None:
            width, height = parsed("--size", size, parse_size)
        count = frames or count
        factor, step = config.spatial_factor, config.temporal_factor
        shape = config.latents((width, height), count, batch)
        ranks = Grid.parse(grid)
        cost = walk(config, shape, dtype.torch, Plan.of(batch, ranks))
        clip = batch * config.picture_channels * count * height * width
        table = Table(title=str(folder), show_header=False, title_justify="left")
        for name, value in (
            ("family", config.family),
            ("latent channels", f"{config.z_dim}"),
            ("scale", f"{factor}x in space, {step}x in time"),
            ("channels by level", " ".join(f"{config.base_dim * m}" for m in reversed(config.dim_mult))),
            ("blocks", " ".join(config.blocks)),
            ("decoder weights", _size(cost.weights) + f" in {dtype.value}"),
            ("", ""),
            ("decode of", f"{batch} x {width}x{height}, {count} frames: latents {list(shape)}"),
            ("on", f"{ranks.size} rank(s), grid {ranks}, one latent frame per pass, halo depth 1"),
            ("work per rank", f"{cost.flops / 1e12:,.2f} TFLOP"),
            ("peak per rank", f"{_size(cost.weights + cost.peak)} (weights, caches and activations)"),
            ("of it, caches", _size(cost.caches)),
            ("the clip", f"{_size(clip)} in uint8, {_size(clip * 4)} in fp32, where it is gathered"),
        ):
            table.add_row(name, value)
        Console().print(table)


def _size(count: int) -> str:
    unit = min(int(math.log(max(count, 1), 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
