"""Write frames to files as they are decoded, with a progress bar, and print reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from halovae.cli.common import console
from halovae.io import media
from halovae.report import DecodeReport


def outputs(output: Path, batch: int) -> list[Path]:
    """Return a path per latent of the batch: clip.mp4, or clip-0.mp4, clip-1.mp4."""
    if batch == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{item}{output.suffix}") for item in range(batch)]


def bar(unit: str) -> Progress:
    """Return a progress bar on standard error that disappears when it is done."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip


def write(pieces: Iterable[Tensor | None], paths: Sequence[Path], fps: float, frames: int) -> None:
    """Write uint8 frames as they come, each latent's to its path. Called on rank 0 only."""
    sinks = [media.Sink(path, fps) for path in paths]
    with bar("frames") as shown:
        task = shown.add_task("decoding", total=frames)
        done = False
        try:
            for piece in pieces:
                assert piece is not None
                piece = piece if piece.ndim == 5 else piece.unsqueeze(2)
                for sink, clip in zip(sinks, piece, strict=True):
                    sink.write(clip)
                shown.advance(task, piece.shape[2])
            done = True
        finally:
            for sink in sinks:
                sink.close(whole=done)


def print_report(report: DecodeReport, paths: Sequence[Path], json: Path | None) -> None:
    """Print what was written and what the decode took. Write the whole report to `json` if given."""
    names = ", ".join(str(path) for path in paths)
    frames, ranks = report.frames[0] * report.frames[2], len(report.ranks)
    where = f"grid {report.grid} of {ranks} rank{'s' * (ranks > 1)}"
    console.print(f"{names}: {frames} frames decoded in {report.seconds:.2f} s ({where})", soft_wrap=True)
    console.print(report.table())
    if report.decision is not None:
        chosen = report.decision["chosen"]
        console.print(f"grid: {chosen['grid']} ({chosen['verdict']})", soft_wrap=True, highlight=False)
    if report.fell_back:
        console.print(f"[yellow]Warning:[/] {report.fell_back}; decoded on a leaner grid", soft_wrap=True)
    if json is not None:
        json.write_text(report.as_json() + "\n")
