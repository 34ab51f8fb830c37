"""How far two decodes are apart: in all, in the seam bands, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halovae.grid import Grid, Span

# Pixels on each side of a seam that count as its band: one latent cell.
BAND_CELLS = 1


@dataclass(frozen=True)
class Difference:
    """Between frames in [-1, 1] and a reference.

    Attributes:
        max_error: the largest absolute difference.
        rms_error: its root mean square.
        psnr: in dB, peak to peak 2; None if they are equal.
        ssim: the mean over frames of scikit-image's structural similarity.
        seam_error: the largest absolute difference within a latent cell of a border between ranks; 0 without any.
        interior_error: the largest one elsewhere.
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
    band = seam_band(grid, errors.shape[-2], errors.shape[-1], factor)
    mean_square = errors.double().square().mean().item()
    return Difference(
        max_error=errors.max().item(),
        rms_error=math.sqrt(mean_square),
        psnr=10 * math.log10(4 / mean_square) if mean_square else None,
        ssim=_ssim(frames, reference),
        seam_error=errors[..., band].max().item() if band.any() else 0.0,
        interior_error=errors[..., ~band].max().item() if not band.all() else 0.0,
    )


def seam_band(grid: Grid, height: int, width: int, factor: int) -> Tensor:
    """`[H, W]`, true within a latent cell of a border between two ranks."""
    shards = grid.shards(grid.batch, height // factor, width // factor)
    band = torch.zeros(height, width, dtype=torch.bool)
    reach = BAND_CELLS * factor

    def around(line: int) -> slice:
        return Span(line, line).grown(min(reach, line), reach).slice

    for shard in shards:
        if shard.rows.start:
            band[around(shard.rows.start * factor)] = True
        if shard.cols.start:
            band[:, around(shard.cols.start * factor)] = True
    return band


def _ssim(frames: Tensor, reference: Tensor) -> float:
    from skimage.metrics import structural_similarity

    pairs = zip(*(x.movedim(1, -1).flatten(0, 1).double().cpu().numpy() for x in (frames, reference)), strict=True)
    scores = [structural_similarity(a, b, data_range=2.0, channel_axis=-1) for a, b in pairs]
    return float(sum(scores) / len(scores))


def draw_heatmap(frames: Tensor, reference: Tensor, grid: Grid, factor: int, path: Path) -> None:
    """Draw where frames differ from a reference: the largest error of each pixel, with the borders between ranks."""
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
