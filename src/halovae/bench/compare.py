"""How far two decodes differ: overall, at the seams, and in each pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halovae.grid import Grid, Span

# Latent cells on each side of a border between ranks that count as its seam.
SEAM_CELLS = 1


@dataclass(frozen=True)
class Difference:
    """The difference between frames in [-1, 1] and a reference.

    Attributes:
        max_error: the largest absolute difference.
        rms_error: its root mean square.
        psnr: in dB, peak to peak 2; None if they are equal.
        ssim: scikit-image's structural similarity, averaged over frames.
        seam_error: the largest absolute difference at the seams; 0 if there are none.
        interior_error: the largest absolute difference elsewhere.
    """

    max_error: float
    rms_error: float
    psnr: float | None
    ssim: float
    seam_error: float
    interior_error: float


def compare(frames: Tensor, reference: Tensor, grid: Grid, factor: int) -> Difference:
    """Compare frames `[B, 3, T, H, W]` that `grid` decoded with a reference; `factor` is pixels per latent cell."""
    frames, reference = frames.float(), reference.float()
    errors = (frames - reference).abs()
    seams = seam_mask(grid, errors.shape[-2], errors.shape[-1], factor)
    mean_square = errors.double().square().mean().item()
    return Difference(
        max_error=errors.max().item(),
        rms_error=math.sqrt(mean_square),
        psnr=10 * math.log10(4 / mean_square) if mean_square else None,
        ssim=_ssim(frames, reference),
        seam_error=errors[..., seams].max().item() if seams.any() else 0.0,
        interior_error=errors[..., ~seams].max().item() if not seams.all() else 0.0,
    )


def seam_mask(grid: Grid, height: int, width: int, factor: int) -> Tensor:
    """Return a mask `[H, W]` that is true within a latent cell of a border between two ranks."""
    shards = grid.shards(grid.batch, height // factor, width // factor)
    seams = torch.zeros(height, width, dtype=torch.bool)
    margin = SEAM_CELLS * factor

    def around(border: int) -> slice:
        return Span(border, border).grown(min(margin, border), margin).slice

    for shard in shards:
        if shard.rows.start:
            seams[around(shard.rows.start * factor)] = True
        if shard.cols.start:
            seams[:, around(shard.cols.start * factor)] = True
    return seams


def _ssim(frames: Tensor, reference: Tensor) -> float:
    from skimage.metrics import structural_similarity

    pairs = zip(*(x.movedim(1, -1).flatten(0, 1).double().cpu().numpy() for x in (frames, reference)), strict=True)
    scores = [structural_similarity(a, b, data_range=2.0, channel_axis=-1) for a, b in pairs]
    return float(sum(scores) / len(scores))


def draw_heatmap(frames: Tensor, reference: Tensor, grid: Grid, factor: int, path: Path) -> None:
    """Draw the largest difference from a reference in each pixel, with the borders between ranks."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    errors = (frames.float() - reference.float()).abs().amax(dim=(0, 1, 2)).cpu()
    figure = Figure(figsize=(7, 7 * errors.shape[0] / errors.shape[1] + 0.6), layout="constrained")
    axes = figure.subplots()
    floor = 1e-9
    shown = axes.imshow(errors.clamp_min(floor).numpy(), norm=LogNorm(floor, max(errors.max().item(), 10 * floor)))
    for shard in grid.shards(grid.batch, errors.shape[0] // factor, errors.shape[1] // factor):
        if shard.rows.start:
            axes.axhline(shard.rows.start * factor - 0.5, color="white", linewidth=0.5, linestyle=":")
        if shard.cols.start:
            axes.axvline(shard.cols.start * factor - 0.5, color="white", linewidth=0.5, linestyle=":")
    axes.set_title(f"largest absolute difference, {grid} ranks (dotted: their borders)")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)
