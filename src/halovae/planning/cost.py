"""What a decode takes, found by one walk through the real decoder with tensors that have shapes but no data."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from halovae.geometry import Grid
from halovae.mesh import Axis, Mesh
from halovae.models.wan import WanConfig, WanDecoder
from halovae.tile import Cache, Context, Tile


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
        mesh, cache = _WalkedMesh(grid, rank), Cache()
        flops, live = [], LiveBytes()
        starts = [0, *range(1, walked, chunk)]
        for start in starts:
            frames = 1 if start == 0 else min(chunk, walked - start)
            context = Context(mesh, cache, start == 0, shards, {"": halo_depth})
            halo = context.block("conv_in").widest(1)
            shard = shards[rank]
            tile = Tile(
                torch.empty(
                    shard.batch.size,
                    channels,
                    frames,
                    shard.rows.size + halo.top + halo.bottom,
                    shard.cols.size + halo.left + halo.right,
                    dtype=dtype,
                ),
                halo,
            )
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


class _WalkedMesh(Mesh):
    """A place on a grid whose other ranks are not there: what they would send is made up."""

    def __init__(self, grid: Grid, rank: int) -> None:
        self.grid, self.rank = grid, rank
        self.item, self.row, self.col = grid.coordinates(rank)

    def extend(self, own: Tensor, axis: Axis, depth: int) -> Tensor:
        dim = own.ndim - 2 if axis == "rows" else own.ndim - 1
        ghosts = [own.narrow(dim, 0, depth).clone() for peer in self.neighbours(axis) if peer is not None]
        return torch.cat([own, *ghosts], dim)

    def gather_tokens(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        return own if len(counts) == 1 else own.new_empty(own.shape[0], sum(counts), own.shape[2])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it, while they live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in known:
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
