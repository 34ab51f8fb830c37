"""Layers that work on tiles. Each knows halos and caches; none knows a model.

Parameters have the names and shapes of diffusers' layers, so that a checkpoint's tensors can be shared as they are.
All activations are `[B, C, T, H, W]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from halovae import kernels, winograd
from halovae.geometry import Halo
from halovae.halves import convolution, multiplied
from halovae.parts import part
from halovae.schemes import UPSAMPLING
from halovae.tile import PAST, Context, Tile, inside


class RMSNorm(nn.Module):
    """Divide by the root mean square over the channels, then scale by `gamma` (`[C, 1, 1, 1]` or `[C, 1, 1]`).

    As in Wan's VAE this is `x / max(|x|, 1e-12) * sqrt(C) * gamma`, computed in fp32 at least and rounded once.
    """

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * spatial_dims))

    def frame(self, x: Tensor) -> Tensor:
        """Normalize one frame `[B, C, H, W]`; the result is fp32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
        return (x * (x.shape[1] ** 0.5 / length)).mul_(self.gamma.view(-1, 1, 1))

    def silu_into(self, out: Tensor, x: Tensor, context: Context) -> None:
        """Write `silu(norm(x))` into `out`, both `[B, C, T, H, W]`."""
        with part("norm"):
            if context.compiled:
                scale = self.gamma.flatten().float() * len(self.gamma) ** 0.5
                limits = kernels.limits(0.0, 1e-24, scale.dtype, scale.device)
                context.kernels.normalize(x.movedim(1, -1), scale, limits, True, out.movedim(1, -1))
                return
            for target, frame in zip(out.unbind(2), x.unbind(2), strict=True):
                target.copy_(F.silu(self.frame(frame), inplace=True))


class CausalConv3d(nn.Module):
    """A convolution that sees the past two frames and, in space, a ring of one cell.

    It is called in two steps, so that what it is made from can be let go before the result is there: `window` lays out
    all that the convolution sees, and passes over memory once to do so; calling the layer convolves it.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, channels, PAST + 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def window(self, tile: Tile, context: Context, norm: RMSNorm | None = None) -> Tile:
        """`tile`, or `silu(norm(tile))`, behind its past two frames (the first one has none), with at least one ghost
        row and col on each side: the neighbours', or zeros where the picture ends.
        """
        usable, missing = context.usable(tile)
        edges = context.edges()
        past = 0 if context.first else PAST
        data = context.empty(usable.data, missing.plus(edges), past=past)
        if not context.first:
            with part("copies"):
                data[:, :, :PAST] = context.cache.frames[self]
        present = data[:, :, past:]
        _clear(present, edges)
        picture = inside(present, edges)
        own = inside(picture, missing)
        if norm is None:
            with part("copies"):
                own.copy_(usable.data)
        else:
            norm.silu_into(own, usable.data, context)
        context.mesh.refresh(picture, missing)
        context.keep(self, data)
        return Tile(data, usable.halo.plus(missing).plus(edges), tile.scale)

    def forward(self, window: Tile, context: Context, onto: Tile | None = None) -> Tile:
        """Convolve a window; the result has one ghost row and col less on each side.

        With `onto`, a tile of its own memory, the result is added to it, cut to the halo that both carry.
        """
        halo = window.halo.beyond(Halo(1, 1, 1, 1))
        if onto is not None:
            halo = halo.within(onto.halo)
            onto = onto.cropped(halo)
        data = window.cropped(halo.plus(Halo(1, 1, 1, 1))).data
        weight: Tensor = self.weight
        if context.first:
            # Nothing lies in the past: of the three temporal taps only the last one meets data.
            weight = weight[:, :, -1:]
        with part("convolution"):
            data = _convolved(data, weight, self.bias, context, None if onto is None else onto.data)
        return Tile(data, halo, window.scale)


def _clear(data: Tensor, ring: Halo) -> None:
    """Set the outermost rows and cols of `data` to zero."""
    bottom, right = data.shape[-2] - ring.bottom, data.shape[-1] - ring.right
    for border in (data[..., : ring.top, :], data[..., bottom:, :], data[..., : ring.left], data[..., right:]):
        border.zero_()


def _convolved(window: Tensor, weight: Tensor, bias: Tensor, context: Context, onto: Tensor | None) -> Tensor:
    """`window` convolved in time and space without padding; added to `onto` if there is one."""
    return winograd.convolved(
        window, weight, bias,
        lambda: context.empty(window, shape=_convolved_shape(window, weight)) if onto is None else onto,
        lambda piece: _direct(piece, weight, bias, context),
        context.kernels, context.cache.pool, device=context.mesh.platform.kind, add=onto is not None,
    )  # fmt: skip


def _convolved_shape(window: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    frames, rows, cols = (extent - taps + 1 for extent, taps in zip(window.shape[2:], weight.shape[2:], strict=True))
    return len(weight), frames, rows, cols


def _direct(window: Tensor, weight: Tensor, bias: Tensor, context: Context) -> Tensor:
    platform = context.mesh.platform
    if weight.shape[2] == 1:
        plane, kernel = window[:, :, 0], weight[:, :, 0]
        data = _in_bands(
            plane, platform.convolution_cells, lambda band: multiplied(F.conv2d, band, kernel, bias)
        ).unsqueeze(2)
    else:
        data = _in_bands(window, platform.convolution_cells, lambda band: multiplied(_conv3d, band, weight, bias))
    return data.contiguous(memory_format=platform.layout())  # torch lays small results out its own way


def _conv3d(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    ones, zeros = (1, 1, 1), (0, 0, 0)
    return convolution(window, weight, bias, ones, zeros, ones, False, zeros, 1)


@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def _conv3d_flops(window: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """As of the other convolutions, which torch's counter knows."""
    return conv_flop_count(list(window), list(weight), list(out_shape))


def _in_bands(data: Tensor, cells: int | None, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """`convolve(data)`, a convolution of 3 x 3 in space without padding, whose results have at most `cells` cells."""
    rows, cols = data.shape[-2] - 2, data.shape[-1] - 2
    if cells is None or rows * cols <= cells:
        return convolve(data)
    height = max(1, cells // cols)
    starts = range(0, rows, height)
    bands = [convolve(data[..., start : min(start + height, rows) + 2, :]) for start in starts]
    return torch.cat(bands, dim=-2)


class PointwiseConv(nn.Module):
    """A convolution of one cell: needs neither halo nor past. `kernel_dims` is 3 or 2, as the checkpoint has it."""

    def __init__(self, channels: int, out_channels: int, kernel_dims: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, channels, *[1] * kernel_dims))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight.flatten(1), self.bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x` `[B, C, ..., H, W]` times `weight` `[O, C]`, cell by cell, in the layout of `x`."""
    with part("convolution"):
        if x.stride(1) == 1:  # the channels of a cell lie together: a matrix as it is
            return multiplied(F.linear, x.movedim(1, -1), weight, bias).movedim(-1, 1)
        convolve = F.conv3d if x.ndim == 5 else F.conv2d
        return multiplied(convolve, x, weight.reshape(*weight.shape, *[1] * (x.ndim - 2)), bias)


class ResidualBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, added to a shortcut: to the input itself if its channels stay as many."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels)
        self.conv1 = CausalConv3d(channels, out_channels)
        self.norm2 = RMSNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = PointwiseConv(channels, out_channels) if channels != out_channels else None

    def forward(self, tile: Tile, context: Context) -> Tile:
        if context.depth > 2:  # ghosts that outlast this block must go through the shortcut too
            tile = context.refreshed(tile)
        window = self.conv1.window(tile, context, self.norm1)
        inner = self.conv1(window, context)
        del window
        window = self.conv2.window(inner, context, self.norm2)
        del inner
        tile = tile.cropped(tile.halo.within(window.halo.beyond(Halo(1, 1, 1, 1))))
        if self.conv_shortcut is not None:
            tile = replace(tile, data=self.conv_shortcut(tile.data))
        return self.conv2(window, context, onto=tile)


class PlaneAttention(nn.Module):
    """Single-head attention of every cell of a frame to all cells of that frame, exact on a sharded plane.

    Each rank keeps its own queries and gathers everybody's keys and values.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, spatial_dims=2)
        self.to_qkv = PointwiseConv(channels, 3 * channels, kernel_dims=2)
        self.proj = PointwiseConv(channels, channels, kernel_dims=2)

    def forward(self, tile: Tile, context: Context) -> Tile:
        """Attend; the result has no halo."""
        tile = tile.cropped(Halo())
        batch, channels, frames, height, width = tile.data.shape
        normed = torch.cat([self.norm.frame(frame).to(frame.dtype) for frame in tile.data.unbind(2)])
        tokens = self.to_qkv(normed).flatten(2).transpose(1, 2)
        query, key_value = tokens.split((channels, 2 * channels), dim=-1)
        with part("gather"):
            key, value = context.gathered_tokens(key_value, tile.scale).chunk(2, dim=-1)
        with part("attention"):
            query, key, value = (one.unsqueeze(1) for one in (query, key, value))
            attended = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        planes = self.proj(attended.transpose(1, 2).reshape(frames * batch, channels, height, width))
        return Tile(planes.unflatten(0, (frames, batch)).movedim(0, 2), Halo(), tile.scale).plus(tile)


class CausalTimeConv(nn.Module):
    """The temporal half of an upsampling by two in time: a causal convolution of three taps onto twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * channels, channels, PAST + 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(2 * channels))

    def forward(self, x: Tensor, context: Context) -> list[Tensor]:
        """`[B, C, T, H, W]` to 2T frames `[B, C, H, W]`; the very first frame is not doubled, and leaves no past."""
        if context.first:
            context.keep(self, x[:, :, :0])
            return list(x.unbind(2))
        cells = torch.cat([context.cache.frames[self].movedim(1, -1), x.movedim(1, -1)], dim=1)
        context.keep(self, cells.movedim(-1, 1))
        frames = x.shape[2]
        taps = torch.cat([cells[:, tap : tap + frames] for tap in range(PAST + 1)], dim=-1).movedim(-1, 1)
        doubled = pointwise(taps, self.weight.transpose(1, 2).flatten(1), self.bias)
        return [half for frame in doubled.unbind(2) for half in frame.chunk(2, dim=1)]


class Upsample(nn.Module):
    """Twice the rows and cols (nearest), then a 3x3 convolution; with `temporal`, twice the frames first."""

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = CausalTimeConv(channels) if temporal else None
        self.weight = nn.Parameter(torch.empty(out_channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, tile: Tile, context: Context) -> Tile:
        """Upsample; a halo of h becomes one of 2h - 1, so that ghosts travel at the low resolution."""
        tile = context.refreshed(tile)
        frames = self.time_conv(tile.data, context) if self.time_conv is not None else tile.data.unbind(2)
        # A ring of zeros lies around all. On inner sides it spoils one ghost row or col of the result, which is cut.
        spoiled = Halo(1, 1, 1, 1).beyond(context.edges())
        channels, height, width = frames[0].shape[1:]
        out = context.empty(tile.data, shape=(len(self.weight), len(frames), 2 * height, 2 * width))
        cells, kind = len(frames) * height * width, context.mesh.platform.kind
        if winograd.pays(UPSAMPLING, self.weight, cells, context.kernels, kind):
            ring = Halo(1, 1, 1, 1)
            ringed = context.empty(tile.data, ring, shape=(channels, len(frames), height, width))
            with part("copies"):
                _clear(ringed, ring)
                for target, frame in zip(inside(ringed, ring).unbind(2), frames, strict=True):
                    target.copy_(frame)
            with part("convolution"):
                weight, kernels, pool = self.weight.unsqueeze(2), context.kernels, context.cache.pool
                winograd.convolve(UPSAMPLING, ringed, weight, self.bias, out, kernels, pool)
        else:
            with part("convolution"):
                for target, frame in zip(out.unbind(2), frames, strict=True):
                    target.copy_(self._plane(frame, context.mesh.platform.convolution_cells))
        return Tile(inside(out, spoiled), tile.halo.scaled(2).beyond(spoiled), tile.scale * 2)

    def _plane(self, frame: Tensor, cells: int | None) -> Tensor:
        larger = F.interpolate(frame, scale_factor=2, mode="nearest-exact")
        if cells is None:
            return multiplied(F.conv2d, larger, self.weight, self.bias, 1, 1)
        padded = F.pad(larger, (1, 1, 1, 1))
        return _in_bands(padded, cells, lambda band: multiplied(F.conv2d, band, self.weight, self.bias))


class DuplicateShortcut(nn.Module):
    """Wan2.2's shortcut around an up block: every cell repeated over 2x2 cells, and over two frames if `temporal`.

    Output channel o at offset (t, h, w) within the repeat takes input channel (o * factor + offset) // repeats, where
    factor is the size of the repeat and repeats = out_channels * factor / channels (DupUp3D in diffusers).

    Raises:
        ValueError: `channels` is not a multiple of `out_channels`.
    """

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        if channels % out_channels:
            raise ValueError(f"an up block from {channels} to {out_channels} channels: expected a multiple")
        self.step = channels // out_channels
        self.repeat = (2 if temporal else 1, 2, 2)

    def add_to(self, total: Tile, tile: Tile, context: Context) -> Tile:
        """Add the repeated `tile` to the block's result in place, cut to the halo that both carry."""
        halo = total.halo.within(tile.halo.scaled(2))
        total = total.cropped(halo)
        # An odd halo leaves half of a source cell's rows or cols outside.
        source = tile.cropped(Halo(*((width + 1) // 2 for width in halo))).data
        height, width = total.data.shape[-2:]
        repeats = math.prod(self.repeat) // self.step
        for offset, (time, row, col) in enumerate(product(*map(range, self.repeat))):
            frames = slice(time, None, self.repeat[0])
            if context.first:  # the first frame stands for one frame, the last of its repeats
                if time < self.repeat[0] - 1:
                    continue
                frames = slice(None)
            rows, from_rows = _every_other(height, row - halo.top % 2)
            cols, from_cols = _every_other(width, col - halo.left % 2)
            channels = slice(offset // repeats, None, self.step)
            total.data[:, :, frames, rows, cols].add_(source[:, channels, :, from_rows, from_cols])
        return total


def _every_other(length: int, start: int) -> tuple[slice, slice]:
    """Every second of `length` indices from `start`, and which source cells they repeat; -1 skips the first one."""
    skipped = int(start < 0)
    start += 2 * skipped
    return slice(start, None, 2), slice(skipped, skipped + (length - start + 1) // 2)


def unpatchify(tile: Tile, size: int) -> Tile:
    """Lay channels `[C * size * size]` out as `size` x `size` cells; in a patch, the cols vary slowest."""
    data = tile.data.unflatten(1, (-1, size, size))  # [B, C, across, down, T, H, W]
    data = data.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
    return Tile(data, tile.halo.scaled(size), tile.scale * size)
