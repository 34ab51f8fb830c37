"""Sizes of the VAEs of Wan2.1 (also Wan2.2-A14B), Wan2.2-TI2V-5B, and Qwen-Image(-Edit)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halovae.grid import Grid

# Defaults, as the models were trained: width, height, frames, frames per second.
_USUAL = {
    "wan2.1": (832, 480, 81, 16.0),
    "wan2.2-5b": (1280, 704, 121, 24.0),
    "qwen-image": (1328, 1328, 1, 1.0),
}


@dataclass(frozen=True)
class WanConfig:
    """The sizes of a Wan-family VAE, as diffusers' `config.json` has them.

    Attributes:
        family: "wan2.1", "wan2.2-5b" or "qwen-image".
        base_dim: channels of the decoder's last blocks.
        z_dim: channels of latents.
        dim_mult: channels of each level as multiples of `base_dim`.
        temporal_upsample: which of the decoder's upsamplings also upsample in time.
        out_channels: channels of the decoder's output, before patches become pixels.
        patch_size: pixels per patch, in each direction.
    """

    family: str
    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    temporal_upsample: tuple[bool, ...]
    out_channels: int
    patch_size: int

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> WanConfig:
        """Read the config of an `AutoencoderKLWan` or `AutoencoderKLQwenImage`."""
        wan = config["_class_name"] == "AutoencoderKLWan"
        return cls(
            family=("wan2.2-5b" if config.get("is_residual") else "wan2.1") if wan else "qwen-image",
            base_dim=config.get("decoder_base_dim") or config["base_dim"],
            z_dim=config["z_dim"],
            dim_mult=tuple(config["dim_mult"]),
            temporal_upsample=tuple(reversed(config["temperal_downsample"])),
            out_channels=config.get("out_channels", 3) if wan else config.get("input_channels", 3),
            patch_size=config.get("patch_size") or 1,
        )

    @property
    def spatial_factor(self) -> int:
        """Picture rows per latent row, and cols per col."""
        return int(2 ** (len(self.dim_mult) - 1)) * self.patch_size

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, except for the first latent frame, which makes one frame."""
        return int(2 ** sum(self.temporal_upsample))

    @property
    def makes_clips(self) -> bool:
        return self.family != "qwen-image"

    @property
    def usual(self) -> tuple[int, int, int, float]:
        """The default width, height, frames, and frames per second."""
        return _USUAL[self.family]

    @property
    def picture_channels(self) -> int:
        return self.out_channels // self.patch_size**2

    def check_latents(self, shape: Sequence[int], dtype: torch.dtype, grid: Grid) -> None:
        """Check that latents of this shape and dtype can be decoded on this grid.

        Raises:
            ValueError: the shape or the grid is wrong; the message says what is expected or possible.
            TypeError: the dtype is not floating point.
        """
        expected = f"[B, {self.z_dim}, T, H, W] for {self.family}"
        if len(shape) != 5:
            raise ValueError(f"latents of shape {list(shape)} have {len(shape)} dims; expected 5: {expected}")
        if shape[1] != self.z_dim:
            raise ValueError(f"latents of shape {list(shape)} have {shape[1]} channels; expected {expected}")
        if min(shape) < 1:
            raise ValueError(f"latents of shape {list(shape)} are empty; expected {expected}, each at least 1")
        if not dtype.is_floating_point:
            raise TypeError(f"latents of dtype {dtype}; expected a floating dtype, such as torch.float32")
        grid.shards(shape[0], shape[3], shape[4])

    def check_pictures(self, shape: Sequence[int], grid: Grid) -> None:
        """Check that pictures of this shape can be encoded on this grid.

        Raises:
            ValueError: the shape is not `[B, C, T, H, W]`, has other channels, or H or W is no multiple of the factor;
                or the grid has more ranks than there are latent rows, cols, or items.
        """
        factor = self.spatial_factor
        expected = f"[B, {self.picture_channels}, T, H, W] for {self.family}, H and W multiples of {factor}"
        if len(shape) != 5 or shape[1] != self.picture_channels or min(shape) < 1:
            raise ValueError(f"pictures of shape {list(shape)}: expected {expected}, none of them 0")
        if shape[3] % factor or shape[4] % factor:
            raise ValueError(f"pictures of {shape[4]}x{shape[3]}: expected {expected}")
        grid.shards(shape[0], shape[3] // factor, shape[4] // factor)

    def frames(self, latent_frames: int) -> int:
        """The number of frames that latents with `latent_frames` frames decode to."""
        return 1 + (latent_frames - 1) * self.temporal_factor

    def latents(self, size: tuple[int, int], frames: int, batch: int = 1) -> tuple[int, int, int, int, int]:
        """Return the shape `[B, C, T, H, W]` of latents that decode to frames of `size`, `(width, height)` in pixels.

        Raises:
            ValueError: no latents do; the message gives the nearest sizes or numbers of frames.
        """
        width, height = size
        factor, step = self.spatial_factor, self.temporal_factor
        if width % factor or height % factor:
            nearest = "x".join(str(max(1, round(extent / factor)) * factor) for extent in size)
            raise ValueError(f"size {width}x{height}: {self.family} makes multiples of {factor}, such as {nearest}")
        if (frames - 1) % step:
            below = 1 + (frames - 1) // step * step
            raise ValueError(
                f"{frames} frames: {self.family} makes 1 + a multiple of {step}: {below} or {below + step}"
            )
        return (batch, self.z_dim, 1 + (frames - 1) // step, height // factor, width // factor)
