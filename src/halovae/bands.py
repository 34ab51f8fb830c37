"""Where not even the leanest plan fits: a rank decodes its own shard in bands, all chunks of one before the next.

Only one band's feature caches live at a time, and those are most of what a long decode holds. Ranks exchange nothing:
each takes the whole plane through the middle block, which is small, and starts every band from as many more rows of its
result as the band's pictures depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halovae.geometry import Grid, Halo, Shard, Span, split
from halovae.kernels import Kernels
from halovae.lines import Lines
from halovae.mesh import Mesh
from halovae.models.wan import WanConfig, WanDecoder
from halovae.pool import Pool
from halovae.tile import NO_HALO, Cache, Context, Tile


@dataclass(frozen=True)
class _BandContext(Context):
    """The context of a band, whose halo was made to last: it uses up what it has, and never asks for more.

    Attributes:
        ends: 1 on each side where the band, ghosts included, reaches the end of the picture.
    """

    ends: Halo = NO_HALO

    def edges(self) -> Halo:
        return self.ends

    def usable(self, tile: Tile) -> tuple[Tile, Halo]:
        return tile, NO_HALO


def reach(config: WanConfig) -> int:
    """How many rows (cols) of the middle block's result beyond its own a band's pictures depend on."""
    rows = 1  # the last convolution
    for level in reversed(range(len(config.dim_mult))):
        if level < len(config.temporal_upsample):
            rows = rows // 2 + 1  # an upsampling makes 2h - 1 ghosts of h
        rows += 2 * (config.num_res_blocks + 1)
    return rows


class Bands:
    """How one rank decodes its shard of some latents alone.

    Args:
        model: the decoder.
        shard: what is to be decoded.
        plane: rows and cols of the whole latents.
        spans: the latent frames of each chunk.
        kernels: the passes over memory.
        mesh: the rank's, for its device.
        pool: where maps lie.
    """

    def __init__(
        self, model: WanDecoder, shard: Shard, plane: tuple[int, int], spans: Sequence[Span], kernels: Kernels,
        mesh: Mesh, pool: Pool,
    ) -> None:  # fmt: skip
        self._model, self._shard, self._plane, self._spans = model, shard, plane, spans
        self._kernels, self._pool = kernels, pool
        self._alone = Mesh(Grid(), mesh.platform.device, Lines())
        self._shards = Grid().shards(shard.batch.size, *plane)

    def decode(self, bands: int, tile: Callable[[Span], Tile], convert: Callable[[Tensor], Tensor]) -> Tensor:
        """All frames of the shard, contiguous.

        Args:
            bands: how many to cut its rows into.
            tile: gives a chunk's latents, of the whole plane.
            convert: is applied to frames in [-1, 1] before they are kept.
        """
        config = self._model.config
        factor, cols = config.spatial_factor, self._shard.cols
        around = self._grown(self._shard.rows, cols)
        features = self._features(around, tile)
        clip: Tensor | None = None
        for rows in split(self._shard.rows.size, bands):
            band = Span(self._shard.rows.start + rows.start, self._shard.rows.start + rows.stop)
            cache, lines = Cache(pool=self._pool), rows.scaled(factor).slice
            for span in self._spans:
                frames = convert(self._band(features, around, self._grown(band, cols), band, span, cache))
                if clip is None:
                    extents = (config.frames(self._spans[-1].stop), self._shard.rows.size * factor, frames.shape[-1])
                    clip = frames.new_empty((*frames.shape[:2], *extents))
                start = 0 if span.start == 0 else config.frames(span.start)
                clip[:, :, start : start + frames.shape[2], lines] = frames
        assert clip is not None
        return clip

    def _grown(self, rows: Span, cols: Span) -> tuple[Span, Span]:
        """What of the plane these rows and cols depend on."""
        ghosts = reach(self._model.config)
        height, width = self._plane
        return (
            Span(max(0, rows.start - ghosts), min(height, rows.stop + ghosts)),
            Span(max(0, cols.start - ghosts), min(width, cols.stop + ghosts)),
        )

    def _features(self, around: tuple[Span, Span], tile: Callable[[Span], Tile]) -> Tensor:
        """The middle block's result in these rows and cols, for all chunks."""
        cache, features = Cache(pool=self._pool), None
        for span in self._spans:
            context = Context(self._alone, cache, *self._ends(span), self._shards, {"": 1}, self._kernels)
            data = self._model.head(tile(span), context).data[..., around[0].slice, around[1].slice]
            if features is None:
                extents = (*data.shape[:2], self._spans[-1].stop, *data.shape[3:])
                layout = self._alone.platform.layout()
                features = torch.empty(extents, dtype=data.dtype, device=data.device, memory_format=layout)
            features[:, :, span.slice] = data
        assert features is not None
        return features

    def _band(
        self, features: Tensor, around: tuple[Span, Span], own: tuple[Span, Span], band: Span, span: Span, cache: Cache
    ) -> Tensor:
        """The frames of one chunk of a band."""
        (rows, cols), height, width = own, *self._plane
        halo = Halo(
            band.start - rows.start,
            rows.stop - band.stop,
            self._shard.cols.start - cols.start,
            cols.stop - self._shard.cols.stop,
        )
        ends = Halo(int(rows.start == 0), int(rows.stop == height), int(cols.start == 0), int(cols.stop == width))
        context = _BandContext(self._alone, cache, *self._ends(span), self._shards, {"": 1}, self._kernels, ends=ends)
        down, across = rows.start - around[0].start, cols.start - around[1].start
        source = features[:, :, span.slice, down : down + rows.size, across : across + cols.size]
        # A copy: the decoder adds to what it is given, and the next band needs these rows as well.
        return self._model.pictures(self._model.decoder.tail(Tile(context.empty(source).copy_(source), halo), context))

    def _ends(self, span: Span) -> tuple[bool, bool]:
        """Whether this chunk is the first, and the last one."""
        return span.start == 0, span.stop == self._spans[-1].stop
