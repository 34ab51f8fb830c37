"""`halovae decode`: decode a latents file to a video, a picture, or a folder of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from halovae.cli.common import (
    MODEL_HELP,
    Dtype,
    GridText,
    Interface,
    Mode,
    NumGpus,
    SharedBy,
    check_installed,
    errors_shown,
    parse_bytes,
    parsed,
    ranks_of,
)
from halovae.cli.planes import PlaneModel
from halovae.cli.writing import outputs, print_report, write
from halovae.distributed.launch import launch
from halovae.grid import Grid
from halovae.io import latents as latents_file
from halovae.io import media
from halovae.models.classes import decode_options
from halovae.models.load import CLASSES, find_model, read_alike, read_class, read_config
from halovae.runtime.vae import load


@dataclass(frozen=True)
class _Job:
    """Everything that a rank needs to know."""

    latents: Path
    model: Path
    output: Path
    frames: int
    mode: Any
    grid: Grid | None
    dtype: torch.dtype
    memory_budget: int | None
    denormalize: bool
    fps: float
    report: Path | None


def decode(
    latents: Annotated[Path, typer.Argument(help="A .safetensors file of latents: [B, C, T, H, W] or [B, C, H, W].")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="clip.mp4, picture.png, or a folder for numbered PNGs.")
    ],
    num_gpus: NumGpus = None,
    mode: SharedBy = Mode.auto,
    grid: GridText = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory that a rank may use to decode, such as 8GiB.", show_default="what is free"),
    ] = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--raw",
            help="Whether latents are normalized, as pipelines return them.",
            show_default="as the file says",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames per second.", show_default="as the file says")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="JSON file for a report of the decode; an existing file is replaced.")
    ] = None,
    interface: Interface = None,
) -> None:
    """Decode latents on one device, or on several at once.

    With --num-gpus N, the command starts N ranks on this host; without accelerators, they share its cores. Under
    torchrun, it uses the world that torchrun started. The output appears under its name once it is complete.
    """
    with errors_shown():
        ranks, chosen = ranks_of(num_gpus, mode, grid)
        header = latents_file.read_header(latents)
        path = find_model(model)
        family, frames = _described(path, header, chosen or Grid())
        if header.family not in (None, family, *read_alike(path)):
            raise ValueError(f"{latents} holds latents of {header.family}, but {path} is a {family} model")
        for target in outputs(output, header.shape[0]):
            media.check_output(target, frames)
        job = _Job(
            latents=latents,
            model=path,
            output=output,
            frames=frames,
            mode=mode.value,
            grid=chosen,
            dtype=dtype.torch,
            memory_budget=parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None,
            denormalize=bool(header.scaled) if scaled is None else scaled,
            fps=fps or header.fps or 16.0,
            report=report,
        )
        if report is not None:
            media.check_writable(report)
        try:
            launch(ranks, _run, job)
        finally:  # a rank that was killed could not clean up
            for target in outputs(output, header.shape[0]):
                media.discard(media.partial_of(target))


def _described(path: Path, header: latents_file.LatentsHeader, grid: Grid) -> tuple[str, int]:
    """Return the model's family, or class, and how many frames the latents decode to.

    Raises:
        ValueError: the model cannot decode such latents, or diffusers is not installed.
    """
    check_installed("decode", "diffusers", extra="diffusers")
    if read_class(path) in CLASSES:
        config = read_config(path)
        config.check_latents(header.shape, header.dtype, grid)
        return config.family, config.frames(header.shape[2])
    model = PlaneModel.read(path, torch.float32)
    return model.name, model.clip(header.shape, torch.float32, grid)[2]


def _run(job: _Job) -> None:
    """Decode on one rank. Rank 0 writes the frames."""
    decoder, latents = load(job.model, dtype=job.dtype, encoder=False), latents_file.read(job.latents)
    pieces = decoder.stream(
        latents, mode=job.mode, grid=job.grid, dtype=torch.uint8, denormalize=job.denormalize,
        memory_budget=job.memory_budget, module_kwargs=decode_options(decoder.module, latents),
    )  # fmt: skip
    rank = dist.get_rank() if dist.is_initialized() else 0
    paths = outputs(job.output, pieces.latents.shape[0])
    if rank > 0:
        pieces.join()
    else:
        write(pieces.on_host(), paths, job.fps, job.frames)
    report = pieces.shared_report()
    if rank == 0:
        print_report(report, paths, job.report)
