"""Tiles: local tensors with the ghost rows and cols of their neighbours, and the refresh that fetches those."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from halovae.geometry import Halo, Shard
from halovae.kernels import EAGER, Kernels
from halovae.mesh import Mesh
from halovae.parts import part
from halovae.pool import Pool

NO_HALO = Halo()
# How many past frames a causal convolution of three taps sees.
PAST = 2


@dataclass(frozen=True)
class Tile:
    """A local tensor with its halo.

    Attributes:
        data: `[B, C, T, top + H + bottom, left + W + right]`, where H x W is what this rank owns.
        halo: how much of `data` on each side is the neighbours'.
        scale: map cells per latent cell, along H and along W.
    """

    data: Tensor
    halo: Halo = NO_HALO
    scale: int = 1

    def cropped(self, halo: Halo) -> Tile:
        """A view of this tile that carries `halo`, which must be within its own."""
        return replace(self, data=inside(self.data, self.halo.beyond(halo)), halo=halo)

    def plus(self, other: Tile) -> Tile:
        """This tile with `other` added in place, cut to the halo that both carry."""
        halo = self.halo.within(other.halo)
        total = self.cropped(halo)
        total.data.add_(other.cropped(halo).data)
        return total


def inside(data: Tensor, ring: Halo) -> Tensor:
    """A view of `data` without `ring`, its outermost rows and cols."""
    height, width = data.shape[-2:]
    return data[..., ring.top : height - ring.bottom, ring.left : width - ring.right]


@dataclass
class Cache:
    """What a decode keeps from one chunk to the next.

    Attributes:
        frames: the last two input frames of each causal convolution, ghost rows included.
        pool: where its maps lie, on the CPU.
    """

    pool: Pool
    frames: dict[nn.Module, Tensor] = field(default_factory=dict)

    def keep(self, layer: nn.Module, recent: Tensor, layout: torch.memory_format) -> None:
        """Remember the last two of `recent` `[B, C, T, H, W]`, copied, with whatever halo they have.

        Before the very first frame there were zeros.
        """
        with part("copies"):
            recent = recent[:, :, -PAST:]
            if layer not in self.frames:
                batch, channels, _, height, width = recent.shape
                self.frames[layer] = torch.empty(
                    (batch, channels, PAST, height, width),
                    dtype=recent.dtype,
                    device=recent.device,
                    memory_format=layout,
                )
            kept = self.frames[layer]
            kept[:, :, : PAST - recent.shape[2]] = 0
            kept[:, :, PAST - recent.shape[2] :] = recent


@dataclass(frozen=True)
class Context:
    """What the layers know besides their tile, while one chunk goes through the decoder.

    Attributes:
        mesh: the lines to the other ranks.
        cache: the feature caches of this decode.
        first: whether this is the chunk of the first latent frame, which has no past.
        last: whether no other chunk follows, for which anything would have to be kept.
        shards: every rank's shard of the latent.
        depths: halo depth of each block by its name, the default under "".
        kernels: the passes over memory, eager or compiled.
        depth: halo depth of the block that the chunk is in.
    """

    mesh: Mesh
    cache: Cache
    first: bool
    last: bool
    shards: tuple[Shard, ...]
    depths: dict[str, int]
    kernels: Kernels = EAGER
    depth: int = 1

    @property
    def compiled(self) -> bool:
        return self.kernels is not EAGER

    def block(self, name: str) -> Context:
        """The context within the block `name`."""
        return replace(self, depth=self.depths.get(name, self.depths[""]))

    def edges(self) -> Halo:
        """1 on each side where the picture ends, 0 where a neighbour goes on."""
        (above, below), (left, right) = self.mesh.neighbours("rows"), self.mesh.neighbours("cols")
        return Halo(*(int(peer is None) for peer in (above, below, left, right)))

    def widest(self, scale: int) -> Halo:
        """The halo of a tile fresh from a refresh in this block, where a map has `scale` cells per latent cell."""
        # No halo can be deeper than the smallest shard that has to serve it.
        rows = min(self.depth, scale * min(shard.rows.size for shard in self.shards))
        cols = min(self.depth, scale * min(shard.cols.size for shard in self.shards))
        top, bottom, left, right = self.edges()
        return Halo(rows * (1 - top), rows * (1 - bottom), cols * (1 - left), cols * (1 - right))

    def usable(self, tile: Tile) -> tuple[Tile, Halo]:
        """What of `tile` goes into the next convolution, and the halo which that has to get from the neighbours.

        Ghosts that are still there are used up first: all of them that this block's depth allows, and none is missing.
        Else a whole new halo is.
        """
        widest = self.widest(tile.scale)
        if all(have >= min(want, 1) for have, want in zip(tile.halo, widest, strict=True)):
            return tile.cropped(tile.halo.within(widest)), Halo()
        return tile.cropped(Halo()), widest

    def refreshed(self, tile: Tile) -> Tile:
        """`tile` with at least one ghost row and col for the next convolution, and at most this block's depth."""
        usable, missing = self.usable(tile)
        if not any(missing):
            return usable
        data = self.empty(usable.data, missing)
        with part("copies"):
            inside(data, missing).copy_(usable.data)
        self.mesh.refresh(data, missing)
        return replace(tile, data=data, halo=missing)

    def keep(self, layer: nn.Module, recent: Tensor) -> None:
        """Remember the last two frames of `recent` `[B, C, T, H, W]` for the next chunk, unless there is none."""
        if not self.last:
            self.cache.keep(layer, recent, self.mesh.platform.layout())

    def empty(
        self, like: Tensor, ring: Halo = NO_HALO, past: int = 0, shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Memory for maps of `shape` `[C, T, H, W]`, by default that of `like` `[B, C, T, H, W]`.

        It has `ring` more rows and cols, and `past` more frames.
        """
        channels, frames, height, width = shape or like.shape[1:]
        rows, cols = ring.top + height + ring.bottom, ring.left + width + ring.right
        extents = (len(like), channels, past + frames, rows, cols)
        platform = self.mesh.platform
        if platform.kind == "cpu":
            return self.cache.pool.empty(extents, like.dtype)
        return torch.empty(extents, dtype=like.dtype, device=like.device, memory_format=platform.layout())

    def gathered_tokens(self, own: Tensor, scale: int) -> Tensor:
        """The tokens `[N, tokens, C]` of all ranks that share this rank's latents, in their order."""
        plane = self.mesh.grid.rows * self.mesh.grid.cols
        members = self.shards[self.mesh.item * plane : (self.mesh.item + 1) * plane]
        counts = [shard.rows.size * shard.cols.size * scale * scale for shard in members]
        return self.mesh.gather_tokens(own, counts)
