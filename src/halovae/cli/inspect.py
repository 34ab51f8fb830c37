"""`halovae inspect`: show what a model is, and what its decodes need."""

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
from halovae.grid import Grid
from halovae.models.checkpoint import recognize
from halovae.models.classes import sizes_of
from halovae.models.load import find_model

# Width, height, and frames where the model does not say what is usual.
PICTURE, CLIP = (1024, 1024, 1), (1280, 720, 81)


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.", show_default="the model's usual")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each clip.", show_default="the model's usual")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of clips per decode.")] = 1,
    grid: Annotated[str, typer.Option(help="Ranks as ROWSxCOLS or BATCHxROWSxCOLS.")] = "1x1",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
) -> None:
    """Show a model's family and sizes, and what one rank needs for a decode. Weights are not read.

    For a file, the first rows say which layout its keys and shapes have.
    """
    with errors_shown():
        path = find_model(model)
        chosen = None if size is None else parsed("--size", size, parse_size)
        ranks = Grid.parse(grid)
        facts = recognize(path).facts() if path.is_file() else ()
        table = Table(title=str(path), show_header=False, title_justify="left")
        for row in (*facts, *_described(path, chosen, frames, batch, ranks, dtype)):
            table.add_row(*row)
        Console().print(table)


def _described(
    path: Path, size: tuple[int, int] | None, frames: int | None, batch: int, ranks: Grid, dtype: Dtype
) -> Iterator[tuple[str, str]]:
    model = PlaneModel.read(path, dtype.torch)
    from halovae.models.architectures import latent_shape, temporal_ratio
    from halovae.models.classes import latent_channels, makes_clips, spatial_ratio

    clips, sizes = makes_clips(model.module), sizes_of(model.module)
    width, height, count = sizes.usual[:3] if sizes is not None else CLIP if clips else PICTURE
    if size is not None:
        width, height = size
    count = frames or count
    shape = latent_shape(model.module, model.name, (width, height), count)
    items = -(-batch // ranks.batch)
    found = model.traced(shape, dtype.torch, replace(ranks, batch=1))
    cost, values = found.cost, batch * math.prod(found.pictures)
    if sizes is not None:
        yield "family", sizes.family
    yield "class", f"{model.name}, unmodified"
    yield "latent channels", f"{latent_channels(model.module)}"
    scale = f"{spatial_ratio(model.module)}x in space"
    yield "scale", scale + (f", {temporal_ratio(model.module)[0]}x in time" if clips else "")
    yield "decoder weights", _size(cost.weights) + f" in {dtype.value}"
    yield "", ""
    yield "decode of", f"{batch} x {width}x{height}, {count} frame(s): latents {[batch * shape[0], *shape[1:]]}"
    yield "on", f"{ranks.size} rank(s), grid {ranks}, {items} item(s) on each, one after the other"
    yield "without a rule", ", ".join(found.fallbacks) or "none: every operator is partitioned"
    yield "work per rank", f"{items * cost.flops / 1e12:,.2f} TFLOP"
    yield "peak per rank", f"{_size(cost.weights + cost.peak)} (weights, caches and activations)"
    yield "messages per rank", f"{items * cost.messages:,}, {_size(items * cost.bytes_sent)}"
    yield (
        "the clip" if clips else "the pictures",
        (f"{_size(values)} in uint8, {_size(values * 4)} in fp32, where they are gathered"),
    )


def _size(count: int) -> str:
    unit = min(int(math.log(max(count, 1), 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
