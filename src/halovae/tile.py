"""Tiles: local tensors with the ghost rows and cols of their neighbours, and the refresh that fetches those."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from halovae.geometry import Shard
from halovae.mesh import Axis, Mesh


class Halo(NamedTuple):
    """How many ghost rows and cols a tile carries on each side; 0 at the border of the picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def scaled(self, factor: int) -> Halo:
        return Halo(*(width * factor for width in self))

    def within(self, other: Halo) -> Halo:
        """The part of this halo that `other` has as well."""
        return Halo(*map(min, self, other))


@dataclass(frozen=True)
class Tile:
    """A local tensor with its halo.

    Attributes:
        data: `[B, C, T, top + H + bottom, left + W + right]`, where H x W is what this rank owns.
        halo: how much of `data` on each side is the neighbours'.
        scale: map cells per latent cell, along H and along W.
    """

    data: Tensor
    halo: Halo = Halo()
    scale: int = 1

    def cropped(self, halo: Halo) -> Tile:
        """A view of this tile that carries `halo`, which must be within its own."""
        top, bottom, left, right = (mine - kept for mine, kept in zip(self.halo, halo, strict=True))
        height, width = self.data.shape[-2:]
        return replace(self, data=self.data[..., top : height - bottom, left : width - right], halo=halo)

    def plus(self, other: Tile) -> Tile:
        """This tile with `other` added in place, cut to the halo that both carry."""
        halo = self.halo.within(other.halo)
        total = self.cropped(halo)
        total.data.add_(other.cropped(halo).data)
        return total


@dataclass
class Cache:
    """The last two input frames of each causal convolution, ghost rows included, from one chunk to the next."""

    frames: dict[nn.Module, Tensor] = field(default_factory=dict)

    def keep(self, layer: nn.Module, recent: Tensor) -> None:
        """Remember `recent`, copied: `[B, C, 2, H, W]` with whatever halo it has."""
        if layer in self.frames:
            self.frames[layer].copy_(recent)
        else:
            self.frames[layer] = recent.clone()


@dataclass(frozen=True)
class Context:
    """What the layers know besides their tile, while one chunk goes through the decoder.

    Attributes:
        mesh: the lines to the other ranks.
        cache: the feature caches of this decode.
        first: whether this is the chunk of the first latent frame, which has no past.
        shards: every rank's shard of the latent.
        depths: halo depth of each block by its name, the default under "".
        depth: halo depth of the block that the chunk is in.
    """

    mesh: Mesh
    cache: Cache
    first: bool
    shards: tuple[Shard, ...]
    depths: dict[str, int]
    depth: int = 1

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

    def refreshed(self, tile: Tile) -> Tile:
        """`tile` with at least one ghost row and col for the next convolution, and at most this block's depth.

        Ghosts that are still there are used up first. Otherwise the neighbours send new ones: along the rows, then
        along the cols with the ghost rows among them, which brings the corners.
        """
        widest = self.widest(tile.scale)
        if all(have >= min(want, 1) for have, want in zip(tile.halo, widest, strict=True)):
            return tile.cropped(tile.halo.within(widest))
        data = tile.cropped(Halo()).data
        depths: dict[Axis, int] = {"rows": max(widest.top, widest.bottom), "cols": max(widest.left, widest.right)}
        for axis, depth in depths.items():
            if depth:
                data = self.mesh.extend(data, axis, depth)
        return replace(tile, data=data, halo=widest)

    def gathered_tokens(self, own: Tensor, scale: int) -> Tensor:
        """The tokens `[N, tokens, C]` of all ranks that share this rank's latents, in their order."""
        plane = self.mesh.grid.rows * self.mesh.grid.cols
        members = self.shards[self.mesh.item * plane : (self.mesh.item + 1) * plane]
        counts = [shard.rows.size * shard.cols.size * scale * scale for shard in members]
        return self.mesh.gather_tokens(own, counts)
