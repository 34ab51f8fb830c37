"""`halovae decode`: a latents file to a video, a picture, or a folder of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halovae import latents as latents_file
from halovae import media
from halovae.cli.common import Dtype, Mode, console, errors_shown, parse_bytes, parse_chunk, parsed
from halovae.decode import Decoder, check_latents, load
from halovae.geometry import Grid
from halovae.launch import launch, under_torchrun
from halovae.lines import world_size
from halovae.models.load import find_folder, read_config


@dataclass(frozen=True)
class _Job:
    """All that a rank has to know."""

    latents: Path
    folder: Path
    output: Path
    mode: Any
    grid: Grid | None
    dtype: torch.dtype
    chunk: Any
    halo_depth: int | None
    memory_budget: int | None
    denormalize: bool
    fps: float
    report: Path | None


def decode(
    latents: Annotated[Path, typer.Argument(help="Latents as a .safetensors file, [B, C, T, H, W].")],
    model: Annotated[str, typer.Option(help="Folder in diffusers layout (a VAE's or a pipeline's), or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="clip.mp4, picture.png, or a folder's name for numbered PNGs.")
    ],
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="How many ranks to start on this host. [default: as many as --grid has]")
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(help="auto: the plan predicted to be fastest. single: one rank. parallel: all share the rows."),
    ] = Mode.auto,
    grid: Annotated[
        str | None, typer.Option(help="Ranks along ROWSxCOLS, or BATCHxROWSxCOLS, instead of --mode.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.fp32,
    chunk: Annotated[
        str | None, typer.Option(help="Latent frames per pass, or 'all': more need more memory. [default: as planned]")
    ] = None,
    halo_depth: Annotated[
        int | None, typer.Option(min=1, help="How many convolutions one halo exchange lasts. [default: as planned]")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="What a rank may take to decode, such as 8GiB. [default: what is free]")
    ] = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--raw",
            help="Whether latents are normalized, as pipelines give them. [default: as the file says]",
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=0.01, help="Frames per second. [default: as the file says]")] = None,
    report: Annotated[
        Path | None, typer.Option(help="A JSON file for what the decode took; one that exists is replaced.")
    ] = None,
) -> None:
    """Decode latents on one device, or on several at once.

    With --num-gpus N, N ranks are started on this host (on a machine without accelerators they share its cores). Under
    torchrun the world that it started is used. The output appears under its name when it is whole.
    """
    with errors_shown():
        wanted = Grid.parse(grid) if grid is not None else None
        ranks = num_gpus or (world_size() if under_torchrun() else wanted.size if wanted else 1)
        if mode is Mode.parallel:
            wanted = wanted or Grid(rows=ranks)
        if wanted is not None and wanted.size != ranks:
            raise ValueError(f"--grid {wanted} needs {wanted.size} ranks, but --num-gpus is {ranks}")
        header = latents_file.read_header(latents)
        folder = find_folder(model)
        config = read_config(folder)
        check_latents(config, header.shape, header.dtype, wanted or Grid())
        if header.family not in (None, config.family):
            raise ValueError(f"{latents} holds latents of {header.family}, but {folder} is a {config.family} model")
        for path in _outputs(output, header.shape[0]):
            media.check_output(path, config.frames(header.shape[2]))
        job = _Job(
            latents=latents,
            folder=folder,
            output=output,
            mode=mode.value,
            grid=wanted,
            dtype=dtype.torch,
            chunk=parsed("--chunk", chunk, parse_chunk) if chunk else None,
            halo_depth=halo_depth,
            memory_budget=parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None,
            denormalize=bool(header.scaled) if scaled is None else scaled,
            fps=fps or header.fps or 16.0,
            report=report,
        )
        if report is not None:
            media.check_writable(report)
        try:
            launch(ranks, _run, job)
        finally:  # a rank that was ended from outside could not tidy up
            for path in _outputs(output, header.shape[0]):
                media.discard(media.partial_of(path))


def _outputs(output: Path, batch: int) -> list[Path]:
    """One file or folder per latent of the batch: clip.mp4, or clip-0.mp4, clip-1.mp4."""
    if batch == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{item}{output.suffix}") for item in range(batch)]


def _run(job: _Job) -> None:
    """One rank's work; rank 0 writes the frames."""
    decoder = load(job.folder, dtype=job.dtype)
    latents = latents_file.read(job.latents)
    pieces = decoder.stream(
        latents,
        mode=job.mode,
        grid=job.grid,
        chunk=job.chunk,
        dtype=torch.uint8,
        halo_depth=job.halo_depth,
        memory_budget=job.memory_budget,
        denormalize=job.denormalize,
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        pieces.join()
    else:
        _write(job, decoder, latents.shape, pieces)
    report = pieces.shared_report()
    if rank > 0:
        return
    names = ", ".join(str(path) for path in _outputs(job.output, latents.shape[0]))
    ranks = f"{len(report.ranks)} rank{'s' * (len(report.ranks) > 1)} ({report.grid})"
    frames = report.frames[0] * report.frames[2]
    console.print(f"{names}: {frames} frames by {ranks} in {report.seconds:.2f} s", soft_wrap=True)
    console.print(report.table())
    if report.decision is not None:
        chosen = report.decision["chosen"]
        console.print(f"plan: {chosen['plan']} ({chosen['verdict']})", soft_wrap=True, highlight=False)
    if report.fell_back:
        console.print(f"[yellow]Warning:[/] {report.fell_back}; decoded by a leaner plan", soft_wrap=True)
    if job.report is not None:
        job.report.write_text(report.as_json() + "\n")


def _write(job: _Job, decoder: Decoder, shape: torch.Size, pieces: Any) -> None:
    bar = Progress(
        TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    sinks = [media.Sink(path, job.fps) for path in _outputs(job.output, shape[0])]
    with bar:
        task = bar.add_task("decoding", total=decoder.config.frames(shape[2]))
        done = False
        try:
            for piece in pieces:
                for sink, frames in zip(sinks, piece, strict=True):
                    sink.write(frames)
                bar.advance(task, piece.shape[2])
            done = True
        finally:
            for sink in sinks:
                sink.close(whole=done)
