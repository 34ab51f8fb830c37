"""The encoder of the Wan family: `wan.py` read backwards, one module for the same checkpoints.

                    Wan2.1, Qwen-Image                       Wan2.2-TI2V-5B
    conv in         3 -> 96                                  patchify by 2, then 12 -> 160
    down block 0    96 -> 96, 1/2 space                      160 -> 160, 1/2 space
    down block 1    96 -> 192, 1/2 space and time            160 -> 320, 1/2 space and time
    down block 2    192 -> 384, 1/2 space and time           320 -> 640, 1/2 space and time
    down block 3    384 -> 384                               640 -> 640
    middle          residual, attention, residual            the same
    conv out        384 -> 32: mean, log of the variance     640 -> 96

In Wan2.2 a shortcut of averaged cells spans each down block.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halovae.geometry import Halo
from halovae.halves import multiplied
from halovae.layers import CausalConv3d, PointwiseConv, ResidualBlock, RMSNorm, pointwise
from halovae.models.wan import MidBlock, WanConfig
from halovae.parts import part
from halovae.tile import PAST, Context, Tile


class StridedTimeConv(nn.Module):
    """The temporal half of a downsampling by two in time: a causal convolution of three taps at every second frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, PAST + 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[B, C, 2T, H, W]` to `[B, C, T, H, W]`; the very first frame passes as it is."""
        if context.first:
            context.keep(self, x)
            return x
        frames = x.shape[2]
        cells = torch.cat([context.cache.frames[self][:, :, -1:], x], dim=2).movedim(1, -1)
        context.keep(self, x)
        taps = torch.cat([cells[:, tap : tap + frames : 2] for tap in range(PAST + 1)], dim=-1).movedim(-1, 1)
        return pointwise(taps, self.weight.transpose(1, 2).flatten(1), self.bias)


class Downsample(nn.Module):
    """A 3x3 convolution at every second row and col; with `temporal`, half the frames after it.

    A cell is made from those at twice its row and col and the two rows and cols that follow, which end in zeros.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))
        self.time_conv = StridedTimeConv(channels) if temporal else None

    def forward(self, tile: Tile, context: Context) -> Tile:
        """Downsample; the result has no halo."""
        edges = context.edges()
        tile = context.refreshed(tile).cropped(Halo(bottom=1 - edges.bottom, right=1 - edges.right))
        frames = tile.data.unbind(2)
        height, width = (extent // 2 for extent in frames[0].shape[2:])
        data = context.empty(tile.data, shape=(len(self.weight), len(frames), height, width))
        with part("convolution"):
            for target, frame in zip(data.unbind(2), frames, strict=True):
                padded = F.pad(frame, (0, edges.right, 0, edges.bottom))
                target.copy_(multiplied(F.conv2d, padded, self.weight, self.bias, 2))
        if self.time_conv is not None:
            data = self.time_conv(data, context)
        return Tile(data, scale=tile.scale // 2)


class AverageShortcut(nn.Module):
    """Wan2.2's shortcut around a down block: cells and frames that become one are laid side by side as channels, and
    every so many adjoining channels are averaged (AvgDown3D in diffusers).

    Raises:
        ValueError: the channels laid side by side are not a multiple of `out_channels`.
    """

    def __init__(self, channels: int, out_channels: int, down: Downsample | None) -> None:
        super().__init__()
        space = 1 if down is None else 2
        self.factors = (1 if down is None or down.time_conv is None else 2, space, space)
        self.out_channels = out_channels
        if (laid := channels * math.prod(self.factors)) % out_channels:
            raise ValueError(f"a down block from {laid} channels, laid side by side, to {out_channels}: not a multiple")

    def forward(self, data: Tensor) -> Tensor:
        """`[B, C, T, H, W]` without halo to what is added to the block's result; the first frame follows zeros."""
        time, rows, cols = self.factors
        data = F.pad(data, (0, 0, 0, 0, -data.shape[2] % time, 0))
        data = data.unflatten(4, (-1, cols)).unflatten(3, (-1, rows)).unflatten(2, (-1, time))
        laid = data.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return laid.unflatten(1, (self.out_channels, -1)).mean(2)


class DownBlock(nn.Module):
    """Wan2.2's residual blocks and downsampling (None on the last level), with a shortcut around all of it."""

    def __init__(self, channels: int, out_channels: int, num_res_blocks: int, down: Downsample | None) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (num_res_blocks - 1)
        self.resnets = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.downsampler = down
        self.shortcut = AverageShortcut(channels, out_channels, down)

    def forward(self, tile: Tile, context: Context) -> Tile:
        around = self.shortcut(tile.cropped(Halo()).data)
        for layer in (*self.resnets, *([] if self.downsampler is None else [self.downsampler])):
            tile = layer(tile, context)
        tile = tile.cropped(Halo())
        tile.data.add_(around)
        return tile


class Encoder3d(nn.Module):
    """What diffusers calls `vae.encoder`, with the same parameter names but for the downsamplers' (see `load.py`)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        widths = [config.encoder_dim * mult for mult in (1, *config.dim_mult)]
        temporal = [*reversed(config.temporal_upsample)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (channels, out_channels) in enumerate(pairwise(widths)):
            down = Downsample(out_channels, temporal[level]) if level < len(temporal) else None
            if config.is_residual:
                self.down_blocks.append(DownBlock(channels, out_channels, config.num_res_blocks, down))
                continue
            for index in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(out_channels if index else channels, out_channels))
            if down is not None:
                self.down_blocks.append(down)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)

    def forward(self, tile: Tile, context: Context) -> Tile:
        tile = self.conv_in(self.conv_in.window(tile, context), context)
        for layer in (*self.down_blocks, self.mid_block):
            tile = layer(tile, context)
        moments: Tile = self.conv_out(self.conv_out.window(tile, context, self.norm_out), context)
        return moments


class WanEncoder(nn.Module):
    """From a tile of pictures to the moments of this rank's shard of the latents."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder3d(config)
        self.quant_conv = PointwiseConv(2 * config.z_dim, 2 * config.z_dim)

    def forward(self, tile: Tile, context: Context) -> Tensor:
        """Encode one chunk.

        Args:
            tile: pictures `[B, 3, T', H', W']`: the first frame alone, or a multiple of `temporal_factor`. Its halo is
                a multiple of the patch's size.
            context: mesh and caches of this encode; its halo depth is 1.

        Returns:
            `[B, 2 * z_dim, T, H, W]`: this rank's moments without halo.
        """
        tile = self.encoder(patchify(tile, self.config.patch_size), context)
        return self.quant_conv(tile.cropped(Halo()).data)


def patchify(tile: Tile, size: int) -> Tile:
    """Lay `size` x `size` cells out as channels `[C * size * size]`; in a patch, the cols vary slowest."""
    data = tile.data.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, C, T, H, down, W, across]
    data = data.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
    return Tile(data, Halo(*(width // size for width in tile.halo)), tile.scale // size)
