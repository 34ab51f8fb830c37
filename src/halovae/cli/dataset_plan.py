"""`halovae dataset plan`: how long a dataset will take to encode. No device is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halovae.cli.common import Dtype, check_installed, errors_shown, parse_size, parsed, results_console
from halovae.grid import Grid
from halovae.planning.calibration import read, shipped
from halovae.planning.search import Search


def plan(
    model: Annotated[str, typer.Option(help="A VAE's folder, file, or hub id, or a name such as wan2.1, flux.")],
    clips: Annotated[int, typer.Option(min=1, help="Clips or pictures of the dataset.")],
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")] = "832x480",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each clip; 1 for pictures.", show_default="81 for clips")
    ] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.bf16,
    calibration: Annotated[
        str, typer.Option(help=f"A file from `halovae calibrate`, or one of {', '.join(shipped())}.")
    ] = "cuda-h200",
) -> None:
    """Predict the hours that encoders are busy with a dataset, for each number of GPUs that share an encode.

    The calibration prices the recorded encode, as `halovae plan` does for decodes. Reading, decoding of videos, and
    writing are not in it: they run beside the encoders, on CPUs, and the report of a short run says what they take.
    """
    with errors_shown():
        check_installed(f"--model {model}", "diffusers")
        width, height = parsed("--size", size, parse_size)
        results_console().print(_table(model, (width, height), frames, clips, num_gpus, dtype, calibration))


def _table(
    model: str, size: tuple[int, int], frames: int | None, clips: int, devices: int, dtype: Dtype, calibration: str
) -> Table:
    from halovae.models import zoo
    from halovae.models.architectures import latent_shape, meta_vae, meta_vae_of, usual_frames
    from halovae.models.classes import spatial_ratio, takes_frames
    from halovae.models.load import find_model, read_diffusers_config
    from halovae.models.registry import families

    if model in families():
        module = meta_vae(model, dtype.torch)
    else:
        path: Path = find_model(model)
        module = meta_vae_of(read_diffusers_config(path), str(path), dtype.torch)
    frames = frames or usual_frames(module, 81)
    latent_shape(module, model, size, frames)  # checks size and frames
    shape = (1, 3, frames, size[1], size[0]) if takes_frames(module) else (1, 3, size[1], size[0])
    rates = read(calibration)
    search = Search(
        lambda pictures: zoo.encode(module, pictures), module, shape, dtype.torch, rates,
        multiple=spatial_ratio(module) or 1,
    )  # fmt: skip
    what = f"{clips:,} clips of {frames} frames" if frames > 1 else f"{clips:,} pictures"
    title = (
        f"{what} at {size[0]}x{size[1]}, {model}, {dtype.value}, on {devices} devices; {rates.name} ({rates.origin})"
    )
    table = Table(title=title, title_justify="left")
    for column in ("ranks per actor", "one encode (s)", "peak (MiB)", "clips/s", "hours"):
        table.add_column(column, justify="right")
    ranks = 1
    while ranks <= min(devices, 8, size[1] // (spatial_ratio(module) or 1)):
        priced = search.price(Grid(rows=ranks))
        rate = devices // ranks / priced.seconds
        hours = clips / rate / 3600
        peak = f"{(priced.peak or 0) / 2**20:,.0f}"
        table.add_row(str(ranks), f"{priced.seconds:.3g}", peak, f"{rate:,.3g}", f"{hours:,.3g}")
        ranks *= 2
    return table
