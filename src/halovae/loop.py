"""The loop: chunks of latent frames through the decoder of each rank, and the frames gathered as they get finished."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halovae.bands import Bands
from halovae.geometry import Halo, Shard, Span
from halovae.kernels import EAGER, Kernels
from halovae.mesh import Mesh, Traffic
from halovae.models.wan import WanDecoder
from halovae.parts import part
from halovae.planning.plan import Plan, Stage
from halovae.pool import Pool
from halovae.tile import NO_HALO, Cache, Context, Tile

Gather = Literal["rank0", "all", "none"]


@dataclass(frozen=True)
class Request:
    """What is wanted of a decode, however it is done; see `Decoder.stream`."""

    gather: Gather
    dtype: torch.dtype
    denormalize: bool
    kernels: Kernels = EAGER


class Loop:
    """One decode on this rank.

    Args:
        model: the decoder.
        latents: `[B, C, T, H, W]`, whole, on any device.
        plan: how.
        meshes: one for each stage of the plan.
        request: what is wanted.
        traffic: counts what this rank sends.
    """

    def __init__(
        self, model: WanDecoder, latents: Tensor, plan: Plan, meshes: Sequence[Mesh], request: Request, traffic: Traffic
    ) -> None:
        self._spans = plan.chunks(latents.shape[2])
        self._plan, self._request, self._traffic = plan, request, traffic
        pool = Pool(next(model.parameters()).device)
        self._stages = [
            _Running(model, latents, stage, mesh, pool) for stage, mesh in zip(plan.stages, meshes, strict=True)
        ]

    @torch.inference_mode()
    def chunks(self) -> Generator[Tensor | None, None, None]:
        """Decode, and yield each chunk's frames, or None on a rank that receives none."""
        for span in self._spans:
            frames = []
            for stage in self._stages:
                with stage.mesh.in_use(self._traffic), stage.mesh.platform.repeatable():
                    frames.append(stage.frames(span, self._plan, self._request))
            received = [one for one in frames if one is not None]
            del frames
            if received:
                yield received[0] if len(received) == 1 else torch.cat(received)
            else:
                yield None
            received.clear()  # whoever asked has the frames now

    def cached(self) -> int:
        """Bytes of the feature caches as they are now."""
        return sum(kept.nbytes for stage in self._stages for kept in stage.cache.frames.values())


class _Running:
    """A stage, and what it keeps from chunk to chunk."""

    def __init__(self, model: WanDecoder, latents: Tensor, stage: Stage, mesh: Mesh, pool: Pool) -> None:
        self.mesh = mesh
        self.cache, self._pool = Cache(pool=pool), pool
        self._model, self._latents = model, latents[stage.items.slice]
        batch, _, self._length, *self._plane = self._latents.shape
        self._shards = stage.grid.shards(batch, *self._plane)
        self._clip: Tensor | None = None
        self._pictures = [shard.scaled(model.config.spatial_factor) for shard in self._shards]

    def frames(self, span: Span, plan: Plan, request: Request) -> Tensor | None:
        """What this rank receives of the frames of one chunk."""
        mesh, config = self.mesh, self._model.config
        frames = 1 if span.start == 0 else span.size * config.temporal_factor
        if mesh.idle:
            device = next(self._model.parameters()).device
            own = torch.empty((0, config.picture_channels, frames, 0, 0), dtype=request.dtype, device=device)
        else:
            own = self._decoded(span, plan, request)
        if request.gather == "none" or mesh.alone:
            return None if mesh.idle else own
        out, everyone = None, request.gather == "all"
        if everyone or mesh.rank == 0:
            height, width = (extent * config.spatial_factor for extent in self._plane)
            out = own.new_empty(len(self._latents), config.picture_channels, frames, height, width)
        with part("gather"):
            mesh.gather_frames(own, self._pictures, out, everyone)
        return out

    def _decoded(self, span: Span, plan: Plan, request: Request) -> Tensor:
        """This rank's own frames."""
        config = self._model.config
        if plan.bands > 1:
            if self._clip is None:
                self._clip = self._in_bands(plan, request)
            frames = self._clip[:, :, 0 if span.start == 0 else config.frames(span.start) : config.frames(span.stop)]
            return frames.contiguous()
        first, last = span.start == 0, span.stop == self._length
        context = Context(self.mesh, self.cache, first, last, self._shards, dict(plan.depths), request.kernels)
        halo = context.block("conv_in").widest(scale=1)
        tile = self._tile(span, self._shards[self.mesh.rank], halo, request.denormalize)
        return converted(self._model(tile, context), request.dtype)

    def _in_bands(self, plan: Plan, request: Request) -> Tensor:
        """This rank's own frames, all of them."""
        shard = self._shards[self.mesh.rank]
        height, width = self._plane
        whole = Shard(shard.batch, Span(0, height), Span(0, width))
        bands = Bands(
            self._model, shard, (height, width), plan.chunks(self._length), request.kernels, self.mesh, self._pool
        )
        return bands.decode(
            plan.bands,
            lambda span: self._tile(span, whole, NO_HALO, request.denormalize),
            lambda frames: converted(frames, request.dtype),
        )

    def _tile(self, span: Span, shard: Shard, halo: Halo, denormalize: bool) -> Tile:
        """Some of the latents, their first halo cut from them as well: every rank was given all of them."""
        rows, cols = shard.rows.grown(halo.top, halo.bottom), shard.cols.grown(halo.left, halo.right)
        weights = next(self._model.parameters())
        data = self._latents[shard.batch.slice, :, span.slice, rows.slice, cols.slice].to(weights.device, weights.dtype)
        data = self._model.denormalized(data) if denormalize else data
        return Tile(data.contiguous(memory_format=self.mesh.platform.layout()), halo)


def converted(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames in [-1, 1] as contiguous `dtype`, before anybody has to carry them: uint8 is a quarter of fp32."""
    with part("conversion"):
        if dtype == torch.uint8:
            frames = frames.float().add_(1).mul_(127.5).round_()
        return frames.to(dtype, memory_format=torch.contiguous_format)
