"""`halovae inspect`: what a model is, and what a decode with it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from halovae.cli.common import MODEL_HELP, Dtype, errors_shown, parse_size, parsed
from halovae.cli.planes import PlaneModel
from halovae.geometry import Grid
from halovae.models.checkpoint import recognize
from halovae.models.load import CLASSES, find_model, read_class, read_config
from halovae.planning.cost import Cost, walk
from halovae.planning.plan import Plan

# What each model is mostly asked for: width, height, frames.
USUAL = {"wan2.1": (1280, 720, 81), "wan2.2-5b": (1280, 704, 121), "qwen-image": (1328, 1328, 1)}
PLANE_PICTURE, PLANE_CLIP, PLANE_FRAMES = (1024, 1024), (1280, 720), 81  # of other classes


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the pictures. [default: the model's usual]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="How many frames. [default: the model's usual]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="How many clips at once.")] = 1,
    grid: Annotated[str, typer.Option(help="Ranks along ROWSxCOLS, or BATCHxROWSxCOLS.")] = "1x1",
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.fp32,
) -> None:
    """Show a model's family and sizes, and what one rank needs for a decode. Reads no weights.

    For a file, the first rows say what its keys and shapes were recognized as.
    """
    with errors_shown():
        path = find_model(model)
        wanted = None if size is None else parsed("--size", size, parse_size)
        ranks = Grid.parse(grid)
        describe = _tile if read_class(path) in CLASSES else _plane
        facts = recognize(path).facts() if path.is_file() else ()
        table = Table(title=str(path), show_header=False, title_justify="left")
        for row in (*facts, *describe(path, wanted, frames, batch, ranks, dtype)):
            table.add_row(*row)
        Console().print(table)


def _tile(
    path: Path, size: tuple[int, int] | None, frames: int | None, batch: int, ranks: Grid, dtype: Dtype
) -> Iterator[tuple[str, str]]:
    config = read_config(path)
    width, height, count = USUAL[config.family]
    if size is not None:
        width, height = size
    count = frames or count
    shape = config.latents((width, height), count, batch)
    cost = walk(config, shape, dtype.torch, Plan.of(batch, ranks))
    yield "family", config.family
    yield "latent channels", f"{config.z_dim}"
    yield "scale", f"{config.spatial_factor}x in space, {config.temporal_factor}x in time"
    yield "channels by level", " ".join(f"{config.base_dim * m}" for m in reversed(config.dim_mult))
    yield "blocks", " ".join(config.blocks)
    yield "decoder weights", _size(cost.weights) + f" in {dtype.value}"
    yield "", ""
    yield "decode of", f"{batch} x {width}x{height}, {count} frames: latents {list(shape)}"
    yield "on", f"{ranks.size} rank(s), grid {ranks}, one latent frame per pass, halo depth 1"
    yield from _costs(cost, batch * config.picture_channels * count * height * width)


def _plane(
    path: Path, size: tuple[int, int] | None, frames: int | None, batch: int, ranks: Grid, dtype: Dtype
) -> Iterator[tuple[str, str]]:
    model = PlaneModel.read(path, dtype.torch)
    from halovae.bench.models import latent_channels, latent_shape, makes_clips, spatial_ratio, temporal_ratio

    clips = makes_clips(model.module)
    width, height = size or (PLANE_CLIP if clips else PLANE_PICTURE)
    count = frames or (PLANE_FRAMES if clips else 1)
    shape = latent_shape(model.module, model.name, (width, height), count)
    items = -(-batch // ranks.batch)
    found = model.traced(shape, dtype.torch, replace(ranks, batch=1))
    yield "class", f"{model.name}, on the plane path: unmodified"
    yield "latent channels", f"{latent_channels(model.module)}"
    scale = f"{spatial_ratio(model.module)}x in space"
    yield "scale", scale + (f", {temporal_ratio(model.module)[0]}x in time" if clips else "")
    yield "decoder weights", _size(found.cost.weights) + f" in {dtype.value}"
    yield "", ""
    yield "decode of", f"{batch} x {width}x{height}, {count} frame(s): latents {[batch * shape[0], *shape[1:]]}"
    yield "on", f"{ranks.size} rank(s), grid {ranks}, {items} item(s) on each, one after the other"
    yield "without a rule", ", ".join(found.fallbacks) or "none: every operator is partitioned"
    yield from _costs(found.cost, batch * math.prod(found.pictures), items)


def _costs(cost: Cost, values: int, items: int = 1) -> Iterator[tuple[str, str]]:
    yield "work per rank", f"{items * cost.flops / 1e12:,.2f} TFLOP"
    yield "peak per rank", f"{_size(cost.weights + cost.peak)} (weights, caches and activations)"
    if cost.caches:
        yield "of it, caches", _size(cost.caches)
    yield "messages per rank", f"{items * cost.messages:,}, {_size(items * cost.bytes_sent)}"
    yield "the clip", f"{_size(values)} in uint8, {_size(values * 4)} in fp32, where it is gathered"


def _size(count: int) -> str:
    unit = min(int(math.log(max(count, 1), 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
