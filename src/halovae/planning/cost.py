"""What a decode takes, found by one walk through the real decoder with tensors that have shapes but no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from halovae.geometry import Grid
from halovae.lines import Lines, Scope
from halovae.memory import LiveBytes
from halovae.mesh import Mesh
from halovae.models.wan import WanConfig, WanDecoder
from halovae.tile import Cache, Context, Tile

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """What one rank of a decode takes.

    Attributes:
        flops: multiplications and additions of the convolutions and the attention, over all frames.
        weights: bytes of the decoder's parameters.
        caches: bytes of the feature caches, held from chunk to chunk.
        peak: bytes of live tensors at the highest point, caches included, weights and the finished clip not.
    """

    flops: int
    weights: int
    caches: int
    peak: int


def estimate(
    config: WanConfig,
    shape: Sequence[int],
    dtype: torch.dtype,
    grid: Grid | None = None,
    chunk: int = 1,
    halo_depth: int = 1,
) -> Cost:
    """What the rank with the largest shard takes to decode latents `[B, C, T, H, W]`.

    Frames after the first cost the same each, so three chunks are walked and the rest is multiplied.

    Raises:
        ValueError: the grid has more ranks along an axis than there is to share out.
    """
    grid = grid or Grid()
    batch, channels, length, height, width = shape
    shards = grid.shards(batch, height, width)
    walked = min(length, 1 + 2 * chunk)
    # In the middle of the grid, where a rank has neighbours on all sides; spans are cut larger first.
    rank = (min(1, grid.rows - 1)) * grid.cols + min(1, grid.cols - 1)
    with torch.device("meta"):
        model = WanDecoder(config)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    with FakeTensorMode(), torch.inference_mode():
        model.load_state_dict({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, assign=True)
        mesh, cache = Mesh(grid, CPU, _WalkedLines(rank)), Cache()
        flops, live = [], LiveBytes()
        starts = [0, *range(1, walked, chunk)]
        for start in starts:
            frames = 1 if start == 0 else min(chunk, walked - start)
            last = start + frames == length
            context = Context(mesh, cache, start == 0, last, shards, {"": halo_depth})
            halo = context.block("conv_in").widest(1)
            shard = shards[rank]
            rows, cols = (shard.rows.grown(halo.top, halo.bottom), shard.cols.grown(halo.left, halo.right))
            extents = (shard.batch.size, channels, frames, rows.size, cols.size)
            tile = Tile(torch.empty(extents, dtype=dtype, memory_format=mesh.platform.layout()), halo)
            with FlopCounterMode(display=False) as counter, live:
                model(tile, context)
            flops.append(counter.get_total_flops())
        per_frame = flops[1] / min(chunk, walked - 1) if length > 1 else 0
        return Cost(
            flops=int(flops[0] + per_frame * (length - 1)),
            weights=sum(_bytes(parameter) for parameter in model.parameters()),
            caches=sum(_bytes(frames) for frames in cache.frames.values()),
            peak=live.peak,
        )


class _WalkedLines(Lines):
    """Lines to ranks that are not there: nothing is sent, and what would be received is made up."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def exchange(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        pass

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        return [torch.empty_like(own) for _ in range(ranks)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
