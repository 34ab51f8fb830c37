"""The decoder of Wan2.1 (also Wan2.2-A14B), Wan2.2-TI2V-5B and Qwen-Image(-Edit): one module, three checkpoints.

                    Wan2.1, Qwen-Image                       Wan2.2-TI2V-5B
    latent          16 channels, 1/8 size, 1/4 frames        48 channels, 1/16 size, 1/4 frames
    conv in         16 -> 384                                48 -> 1024
    middle          residual, attention, residual            the same
    up block 0      384 -> 384, 2x space and time            1024 -> 1024, 2x space and time
    up block 1      192 -> 384, 2x space and time            1024 -> 1024, 2x space and time
    up block 2      192 -> 192, 2x space                     1024 -> 512, 2x space
    up block 3      96 -> 96                                 512 -> 256
    conv out        96 -> 3                                  256 -> 12, then unpatchify by 2

In Wan2.1 each upsampling halves the channels; in Wan2.2 it keeps them, and a shortcut of repeated cells spans each
up block but the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from halovae.geometry import Grid, Halo
from halovae.layers import (
    CausalConv3d,
    DuplicateShortcut,
    PlaneAttention,
    PointwiseConv,
    ResidualBlock,
    RMSNorm,
    Upsample,
    unpatchify,
)
from halovae.tile import Context, Tile


@dataclass(frozen=True)
class WanConfig:
    """The sizes of a Wan-family VAE, as diffusers' `config.json` has them.

    Attributes:
        family: "wan2.1", "wan2.2-5b" or "qwen-image".
        base_dim: channels of the last blocks.
        out_channels: before patches are laid out.
        latents_mean: per channel, for de-normalizing latents; likewise `latents_std`.
    """

    family: str
    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_upsample: tuple[bool, ...]
    is_residual: bool
    out_channels: int
    patch_size: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> WanConfig:
        """Read the config of an `AutoencoderKLWan` or `AutoencoderKLQwenImage`."""
        residual = bool(config.get("is_residual", False))
        wan = config["_class_name"] == "AutoencoderKLWan"
        return cls(
            family=("wan2.2-5b" if residual else "wan2.1") if wan else "qwen-image",
            base_dim=config.get("decoder_base_dim") or config["base_dim"],
            z_dim=config["z_dim"],
            dim_mult=tuple(config["dim_mult"]),
            num_res_blocks=config["num_res_blocks"],
            temporal_upsample=tuple(reversed(config["temperal_downsample"])),
            is_residual=residual,
            out_channels=config.get("out_channels", 3) if wan else config.get("input_channels", 3),
            patch_size=config.get("patch_size") or 1,
            latents_mean=tuple(config["latents_mean"]),
            latents_std=tuple(config["latents_std"]),
        )

    @property
    def spatial_factor(self) -> int:
        """Picture rows per latent row, and cols per col."""
        return int(2 ** (len(self.dim_mult) - 1)) * self.patch_size

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, for all but the first, which makes one."""
        return int(2 ** sum(self.temporal_upsample))

    @property
    def picture_channels(self) -> int:
        return self.out_channels // self.patch_size**2

    def check_pictures(self, shape: Sequence[int], grid: Grid) -> None:
        """Check that pictures of this shape can be encoded on this grid.

        Raises:
            ValueError: they are not `[B, C, T, H, W]`, of other channels, or H or W are no multiples of the factor; or
                the grid has more ranks than there are latent rows, cols or items.
        """
        factor = self.spatial_factor
        expected = f"[B, {self.picture_channels}, T, H, W] for {self.family}, H and W multiples of {factor}"
        if len(shape) != 5 or shape[1] != self.picture_channels or min(shape) < 1:
            raise ValueError(f"pictures of shape {list(shape)}: expected {expected}, none of them 0")
        if shape[3] % factor or shape[4] % factor:
            raise ValueError(f"pictures of {shape[4]}x{shape[3]}: expected {expected}")
        grid.shards(shape[0], shape[3] // factor, shape[4] // factor)

    def frames(self, latent_frames: int) -> int:
        """How many frames so many latent frames decode to."""
        return 1 + (latent_frames - 1) * self.temporal_factor

    def latents(self, size: tuple[int, int], frames: int, batch: int = 1) -> tuple[int, int, int, int, int]:
        """The shape `[B, C, T, H, W]` of the latents that decode to frames of `size`, `(width, height)` in pixels.

        Raises:
            ValueError: none do; says which sizes and numbers of frames are nearest.
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

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that may have a halo depth of their own, in the order of decoding."""
        return ("conv_in", "mid", *(f"up{level}" for level in range(len(self.dim_mult))), "conv_out")


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([PlaneAttention(channels)])

    def forward(self, tile: Tile, context: Context) -> Tile:
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            tile = layer(tile, context)
        return tile


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling (None on the last level), and in Wan2.2 a shortcut around all of it."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_res_blocks: int,
        up: Upsample | None,
        shortcut: bool,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.upsampler = up
        self.shortcut: DuplicateShortcut | None = None
        if up is not None and shortcut:
            self.shortcut = DuplicateShortcut(channels, out_channels, up.time_conv is not None)

    def layers(self) -> list[nn.Module]:
        """What is passed in turn, the shortcut aside."""
        return [*self.resnets, *([] if self.upsampler is None else [self.upsampler])]


class Decoder3d(nn.Module):
    """What diffusers calls `vae.decoder`, with the same parameter names but for the upsamplers' (see `load.py`)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        widths = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = CausalConv3d(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (channels, out_channels) in enumerate(pairwise(widths)):
            if level > 0 and not config.is_residual:
                channels //= 2  # the upsampling before has halved them
            up = None
            if level < len(config.temporal_upsample):
                after = out_channels if config.is_residual else out_channels // 2
                up = Upsample(out_channels, after, config.temporal_upsample[level])
            block = UpBlock(channels, out_channels, config.num_res_blocks, up, config.is_residual)
            self.up_blocks.append(block)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def head(self, tile: Tile, context: Context) -> Tile:
        """Up to the end of the middle block, the only one in which all cells of a frame see each other."""
        tile = self.conv_in(self.conv_in.window(tile, context.block("conv_in")), context)
        middle: Tile = self.mid_block(tile, context.block("mid"))
        return middle

    def tail(self, tile: Tile, context: Context) -> Tile:
        """All that follows; may write to `tile.data`."""
        for level, block in enumerate(self.up_blocks):
            assert isinstance(block, UpBlock)
            # A loop here, and not a call of the block: a call would hold the block's input to its end.
            within = context.block(f"up{level}")
            if block.shortcut is not None:
                tile = within.refreshed(tile)
                start = tile
                if block.resnets[0].conv_shortcut is None:  # adds to its input
                    start = replace(tile, data=tile.data.clone())
            for layer in block.layers():
                tile = layer(tile, within)
            if block.shortcut is not None:
                tile = block.shortcut.add_to(tile, start, within)
                del start
        window = self.conv_out.window(tile, context.block("conv_out"), self.norm_out)
        del tile
        frames: Tile = self.conv_out(window, context)
        return frames


class WanDecoder(nn.Module):
    """From a latent's tile to the frames of this rank's shard."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = PointwiseConv(config.z_dim, config.z_dim)
        self.decoder = Decoder3d(config)

    def forward(self, tile: Tile, context: Context) -> Tensor:
        """Decode one chunk.

        Args:
            tile: latents `[B, C, T, H, W]` with any halo.
            context: mesh, caches and halo depths of this decode.

        Returns:
            `[B, 3, T', H', W']` in [-1, 1]: this rank's frames without halo, one for the first latent frame and
            `temporal_factor` for each later one.
        """
        return self.pictures(self.decoder.tail(self.head(tile, context), context))

    def head(self, tile: Tile, context: Context) -> Tile:
        """`forward` up to the end of the middle block."""
        return self.decoder.head(replace(tile, data=self.post_quant_conv(tile.data)), context)

    def pictures(self, tile: Tile) -> Tensor:
        """What `forward` does after the decoder's tail."""
        return unpatchify(tile, self.config.patch_size).cropped(Halo()).data.clamp(-1, 1)

    def denormalized(self, latents: Tensor) -> Tensor:
        """`latents * std + mean` per channel: from what the diffusion model works on to what the decoder takes.

        Raises:
            ValueError: mean and std are not known.
        """
        if not self.config.latents_mean:
            raise ValueError(f"no latents_mean is known for {self.config.z_dim} channels: give latents not normalized")
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return latents * std + mean
