"""`halovae demo`: decode one clip in four ways, with time, memory, and error of each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from halovae.cli.common import check_installed, console, errors_shown
from halovae.io import media


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("demo"),
    num_gpus: Annotated[int, typer.Option(min=2, max=24, help="Number of ranks that decode together.")] = 2,
) -> None:
    """Decode a clip with diffusers, one rank, several ranks, and diffusers' tiling, and show how they differ.

    The model is a small Wan-architecture VAE that ships with halovae. Everything runs on the CPU. Writes demo.mp4 (the
    clip beside its decode), frames.png (frames and amplified differences), and latents.safetensors for halovae decode.
    """
    with errors_shown():
        check_installed("the demo", "diffusers", "matplotlib", "skimage")
        from halovae.demo import run as demo_run

        output.mkdir(parents=True, exist_ok=True)
        media.check_writable(output / "demo.mp4")
        with console.status("") as status:
            clip, shown = demo_run.run(output, num_gpus, status.update)
        table = Table(title=f"{demo_run.FRAMES} frames of {demo_run.WIDTH}x{demo_run.HEIGHT}", title_justify="left")
        for column in ("decode", "time (s)", "peak memory per rank (MiB)", "max error", "PSNR to the clip (dB)"):
            table.add_column(column, justify="left" if column == "decode" else "right")
        for way in shown:
            error_max = (way.frames - shown[0].frames).abs().max().item()
            psnr = 10 * math.log10(4 / (way.frames - clip).square().mean().item())
            peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in way.peaks)
            table.add_row(way.name, f"{way.seconds:.2f}", peaks, f"{error_max:.1e}", f"{psnr:.2f}")
        Console().print(table)
        Console().print(
            "Max error is against diffusers' untiled decode, in [-1, 1]. Peak memory is above the resting process.\n"
            f"Written to {output}: demo.mp4 (clip | decode by {num_gpus} ranks), frames.png, latents.safetensors",
            soft_wrap=True,
        )
