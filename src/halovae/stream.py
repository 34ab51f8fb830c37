"""The loop: chunks of latent frames through the decoder of each rank, and the frames gathered as they get finished."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from halovae.geometry import Shard
from halovae.memory import MemoryMeter
from halovae.mesh import Mesh, Traffic
from halovae.models.wan import WanDecoder
from halovae.parts import part
from halovae.platform import Stopwatch
from halovae.report import DecodeReport, RankReport
from halovae.tile import Cache, Context, Tile

Gather = Literal["rank0", "all", "none"]
Chunk = int | Literal["all"]


@dataclass(frozen=True)
class Request:
    """What is wanted of a decode, checked; see `Decoder.stream`."""

    chunk: Chunk
    gather: Gather
    dtype: torch.dtype
    depths: dict[str, int]
    denormalize: bool
    compiled: bool


class FrameStream(Iterator[Tensor | None]):
    """Finished frames of a decode, chunk by chunk, as `Decoder.stream` describes them.

    A chunk is decoded when the next item is asked for. After the last one `report` says what the decode took.
    """

    def __init__(self, model: WanDecoder, latents: Tensor, mesh: Mesh, request: Request, first_use: bool) -> None:
        self._model, self._latents, self._mesh, self._request = model, latents, mesh, request
        self._first_use = first_use
        self._traffic, self._clock = Traffic(mesh.platform), Stopwatch(mesh.platform)
        self._chunks = self._decoded()
        self._own: RankReport | None = None

    def __next__(self) -> Tensor | None:
        return next(self._chunks)

    def close(self) -> None:
        """Decode no further."""
        self._chunks.close()

    def join(self) -> Tensor | None:
        """All frames at once: `[B, 3, T', H', W']` on the ranks that receive any, None on the others."""
        frames, done, out = self._model.config.frames(self._latents.shape[2]), 0, None
        for piece in self:
            if piece is None:
                continue
            if piece.shape[2] == frames:
                out = piece
                continue
            if out is None:
                out = piece.new_empty(*piece.shape[:2], frames, *piece.shape[3:])
            out[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
        return out

    @property
    def report(self) -> DecodeReport:
        """What this rank took.

        Raises:
            RuntimeError: frames are still to come.
        """
        if self._own is None:
            raise RuntimeError("the report of a decode is there once its last frames have been taken")
        latents, config = self._latents.shape, self._model.config
        factor = config.spatial_factor
        return DecodeReport(
            family=config.family,
            latents=tuple(latents),
            frames=(latents[0], 3, config.frames(latents[2]), latents[3] * factor, latents[4] * factor),
            dtype=str(next(self._model.parameters()).dtype).removeprefix("torch."),
            device=self._mesh.platform.kind,
            grid=str(self._mesh.grid),
            chunk=self._request.chunk,
            halo_depths=self._request.depths,
            first_use=self._first_use,
            ranks=(self._own,),
        )

    def shared_report(self) -> DecodeReport:
        """What every rank took; all ranks ask for it, and all get it."""
        return replace(self.report, ranks=tuple(self._mesh.lines.all_values(self.report.ranks[0])))

    @torch.inference_mode()
    def _decoded(self) -> Generator[Tensor | None, None, None]:
        model, latents, mesh, request = self._model, self._latents, self._mesh, self._request
        batch, _, length, height, width = latents.shape
        shards = mesh.grid.shards(batch, height, width)
        pictures = [shard.scaled(model.config.spatial_factor) for shard in shards]
        memory = MemoryMeter(mesh.platform, by_thread=mesh.lines.shared_device)
        cache, start = Cache(), 0
        while start < length:
            stop = 1 if start == 0 else length if request.chunk == "all" else min(start + request.chunk, length)
            context = Context(mesh, cache, start == 0, stop == length, shards, request.depths, request.compiled)
            with mesh.in_use(self._traffic), memory.counting(), self._clock.running():
                own = _converted(model(self._tile(start, stop, shards[mesh.rank], context), context), request.dtype)
                frames = self._gathered(own, pictures)
            yield frames
            start = stop
        traffic = self._traffic
        self._own = RankReport(
            rank=mesh.rank,
            seconds=self._clock.seconds(),
            waiting=traffic.waiting.seconds(),
            messages=traffic.messages,
            bytes_sent=traffic.bytes,
            memory=memory.read(),
        )

    def _tile(self, start: int, stop: int, shard: Shard, context: Context) -> Tile:
        """This rank's part of the latents, its first halo cut from them as well: every rank was given all of them."""
        halo = context.block("conv_in").widest(scale=1)
        rows, cols = shard.rows.grown(halo.top, halo.bottom), shard.cols.grown(halo.left, halo.right)
        weights = next(self._model.parameters())
        data = self._latents[shard.batch.slice, :, start:stop, rows.slice, cols.slice].to(weights.device, weights.dtype)
        data = self._model.denormalized(data) if self._request.denormalize else data
        return Tile(data.contiguous(memory_format=self._mesh.platform.layout()), halo)

    def _gathered(self, own: Tensor, pictures: list[Shard]) -> Tensor | None:
        """What this rank receives of the frames of all ranks."""
        mesh, gather = self._mesh, self._request.gather
        if gather == "none" or mesh.grid.size == 1:
            return own
        out, everyone = None, gather == "all"
        if everyone or mesh.rank == 0:
            batch, _, _, height, width = self._latents.shape
            factor = self._model.config.spatial_factor
            out = own.new_empty(batch, *own.shape[1:3], height * factor, width * factor)
        with part("gather"):
            mesh.gather_frames(own, pictures, out, everyone)
        return out


def _converted(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames in [-1, 1] as contiguous `dtype`, before anybody has to carry them: uint8 is a quarter of fp32."""
    with part("conversion"):
        if dtype == torch.uint8:
            frames = frames.float().add_(1).mul_(127.5).round_()
        return frames.to(dtype, memory_format=torch.contiguous_format)
