"""Synthetic clips: pans and zooms over scikit-image's bundled photographs with textured shapes moving in front.

The demo model is trained on clips over `TRAINING`, and demonstrated on clips over `HELD_OUT`, which it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRAINING = (
    "astronaut", "brick", "camera", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
HELD_OUT = ("chelsea",)


def photographs(names: Sequence[str]) -> list[Tensor]:
    """Load bundled photographs by their name in `skimage.data`, as float tensors `[3, H, W]` in [-1, 1]."""
    from skimage import data

    photos = []
    for name in names:
        pixels = torch.from_numpy(getattr(data, name)()).float() / 127.5 - 1
        photo = pixels[..., :3].permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
        shorter = min(photo.shape[-2:])
        if shorter > 384:  # at the size of clips, a photograph's finest detail is noise
            photo = F.interpolate(photo[None], scale_factor=384 / shorter, mode="area")[0]
        photos.append(photo.contiguous())
    return photos


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _path(low: float, high: float, frames: int, step: float, generator: torch.Generator) -> Tensor:
    """A straight path of at most `step` per frame that stays within [low, high]: `[T]`."""
    start = _uniform(low, high, generator)
    end = start + _uniform(-step, step, generator) * (frames - 1)
    return torch.linspace(start, min(max(end, low), high), frames)


def _look(photo: Tensor, x: Tensor, y: Tensor, angle: Tensor, extent: Tensor, height: int, width: int) -> Tensor:
    """The view of a camera at (x, y) in [-1, 1], turned by `angle` and `extent` source pixels high: `[3, T, H, W]`."""
    frames, (_, source_h, source_w) = len(x), photo.shape
    rows = torch.linspace(-1, 1, height).view(1, height, 1)
    cols = torch.linspace(-1, 1, width).view(1, 1, width) * (width / height)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    across = (cols * cos - rows * sin) * (extent / source_w).view(-1, 1, 1) + x.view(-1, 1, 1)
    down = (cols * sin + rows * cos) * (extent / source_h).view(-1, 1, 1) + y.view(-1, 1, 1)
    grid = torch.stack((across, down), dim=-1)
    seen = F.grid_sample(
        photo.expand(frames, -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return seen.transpose(0, 1)


def _camera(photo: Tensor, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    # One output pixel covers 0.6 to 1.3 source pixels; speeds are a few output pixels per frame.
    zoom = _path(0.6, 1.3, frames, 0.02, generator)
    return _look(
        photo,
        _path(-0.7, 0.7, frames, 0.02, generator),
        _path(-0.7, 0.7, frames, 0.02, generator),
        _path(-0.4, 0.4, frames, 0.02, generator),
        zoom * height,
        height,
        width,
    )


def _shape_mask(frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A soft-edged ellipse or rounded box that moves and turns: `[1, T, H, W]` in [0, 1]."""
    aspect = width / height
    rows = torch.linspace(-1, 1, height).view(1, height, 1)
    cols = torch.linspace(-aspect, aspect, width).view(1, 1, width)
    across = cols - _path(-aspect, aspect, frames, 0.08, generator).view(-1, 1, 1)
    down = rows - _path(-1.0, 1.0, frames, 0.08, generator).view(-1, 1, 1)
    angle = _path(-math.pi, math.pi, frames, 0.06, generator).view(-1, 1, 1)
    u = (across * angle.cos() + down * angle.sin()) / _uniform(0.2, 0.5, generator)
    v = (down * angle.cos() - across * angle.sin()) / _uniform(0.2, 0.5, generator)
    power = 2.0 if _uniform(0, 1, generator) < 0.5 else 8.0
    radius = (u.abs() ** power + v.abs() ** power) ** (1 / power)
    return ((1 - radius) * height / 8 + 0.5).clamp(0, 1).unsqueeze(0)


def make_clip(
    photos: Sequence[Tensor], frames: int, height: int, width: int, seed: int, shapes: int | None = None
) -> Tensor:
    """Make one clip over `photos`.

    Args:
        photos: photographs `[3, H', W']` in [-1, 1]; backgrounds and the shapes' textures are drawn from them.
        frames: the number of frames T.
        height: H in pixels.
        width: W in pixels.
        seed: equal seeds give equal clips.
        shapes: the number of moving shapes; None draws 0 to 2.

    Returns:
        `[3, T, H, W]`, float32 in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        photo = photos[int(torch.randint(len(photos), (), generator=generator))]
        return _camera(photo, frames, height, width, generator)

    clip = draw()
    count = int(torch.randint(3, (), generator=generator)) if shapes is None else shapes
    for _ in range(count):
        mask = _shape_mask(frames, height, width, generator)
        clip = torch.lerp(clip, draw(), mask)
    return clip.clamp(-1, 1)
