"""Halo exchange and gathers over real ranks, against slices of the full tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import latents, vae
from torch import Tensor

import halovae
from halovae.bench.ranks import Ranks
from halovae.geometry import Grid, Halo
from halovae.mesh import Mesh, mesh_for
from halovae.pool import Pool
from halovae.tile import Cache, Context, Tile

CPU = torch.device("cpu")
FULL = torch.arange(2 * 3 * 2 * 9 * 11, dtype=torch.float32).view(2, 3, 2, 9, 11)


def context_of(grid: Grid, depth: int) -> tuple[Context, Mesh]:
    mesh = mesh_for(grid, CPU)
    return Context(
        mesh, Cache(Pool(torch.device("cpu"))), True, False, grid.shards(2, 9, 11), {"": depth}, depth=depth
    ), mesh


def refresh_differs(grid: Grid, depth: int) -> float:
    """How far this rank's refreshed tile is from the same part of the full tensor, ghosts and corners included."""
    context, mesh = context_of(grid, depth)
    shard = context.shards[mesh.rank]
    tile = context.refreshed(Tile(FULL[shard.index].clone()))
    halo = tile.halo
    rows, cols = shard.rows.grown(halo.top, halo.bottom), shard.cols.grown(halo.left, halo.right)
    wanted = FULL[shard.batch.slice, :, :, rows.slice, cols.slice]
    inner = [width for width, edge in zip(halo, context.edges(), strict=True) if not edge]
    assert all(width == 0 for width, edge in zip(halo, context.edges(), strict=True) if edge)
    assert min(inner) >= 1
    assert tile.data.shape == wanted.shape
    return (tile.data - wanted).abs().max().item()


@pytest.mark.parametrize("grid", ["2x1", "1x2", "4x1", "1x4", "2x2", "2x2x1", "2x1x2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_refresh_brings_rows_cols_and_corners(ranks: Callable[[int], Ranks], grid: str, depth: int) -> None:
    layout = Grid.parse(grid)
    assert ranks(layout.size).run(refresh_differs, layout, depth) == [0.0] * layout.size


def halo_after_refresh(grid: Grid, depth: int) -> Halo:
    context, mesh = context_of(grid, depth)
    return context.refreshed(Tile(FULL[context.shards[mesh.rank].index].clone())).halo


def test_a_halo_is_no_deeper_than_the_smallest_shard(ranks: Callable[[int], Ranks]) -> None:
    # 9 rows on 4 ranks: 3 2 2 2. A halo of 5 would need rows that the neighbour does not own.
    assert ranks(4).run(halo_after_refresh, Grid(rows=4), 5) == [(0, 2, 0, 0), (2, 2, 0, 0), (2, 2, 0, 0), (2, 0, 0, 0)]


def gathered(grid: Grid, everyone: bool) -> Tensor | None:
    context, mesh = context_of(grid, 1)
    out = torch.zeros_like(FULL) if everyone or mesh.rank == 0 else None
    mesh.gather_frames(FULL[context.shards[mesh.rank].index].contiguous(), context.shards, out, everyone)
    return out


@pytest.mark.parametrize("grid", ["2x1", "1x2", "2x1x1", "2x2", "3x1", "1x4"])
def test_frames_are_gathered_on_one_rank_or_on_all(ranks: Callable[[int], Ranks], grid: str) -> None:
    layout = Grid.parse(grid)
    first, *others = ranks(layout.size).run(gathered, layout, False)
    assert first is not None
    assert torch.equal(first, FULL)
    assert others == [None] * (layout.size - 1)
    for full in ranks(layout.size).run(gathered, layout, True):
        assert full is not None
        assert torch.equal(full, FULL)


def traffic(depth: int, frames: int) -> list[tuple[int, int]]:
    """Messages and bytes that this rank sends for halos, chunk by chunk of one latent frame."""
    decoder = halovae.load(vae("wan2.1"))
    sent: list[tuple[int, int]] = []
    original = dist.batch_isend_irecv

    def counting(operations: list[Any]) -> Any:
        halos = [op.tensor for op in operations if op.op is dist.isend]
        sent[-1] = (sent[-1][0] + len(halos), sent[-1][1] + sum(t.numel() * t.element_size() for t in halos))
        return original(operations)

    module: Any = dist
    module.batch_isend_irecv = counting
    try:
        sent.append((0, 0))
        stream = decoder.stream(latents("wan2.1", frames, 16, 4), grid=Grid(rows=2), halo_depth=depth, gather="none")
        for _ in stream:
            sent.append((0, 0))
    finally:
        module.batch_isend_irecv = original
    return sent[:-1]


def test_deeper_halos_send_fewer_messages_and_cached_frames_are_not_sent_again(ranks: Callable[[int], Ranks]) -> None:
    shallow, deep = (ranks(2).run(traffic, depth, 4)[0] for depth in (1, 4))
    messages, volumes = zip(*shallow, strict=True)
    # At most one message per convolution of 3 x 3, of which Wan2.1's decoder has 33.
    assert max(messages) <= 33
    assert all(count < messages[0] for count, _ in deep)
    # From the second latent frame on a chunk holds new frames only: equal volumes, however many frames are cached.
    assert volumes[1] == volumes[2] == volumes[3]
    first_frame = volumes[0]
    assert volumes[1] <= 4 * first_frame


def refused_mesh(grid: Grid) -> str:
    with pytest.raises(ValueError, match="world") as caught:
        Mesh(grid, CPU)
    return str(caught.value)


def test_a_grid_that_does_not_match_the_world_says_which_would(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(2).run(refused_mesh, Grid(rows=3)):
        assert "needs 3 ranks, but the world has 2" in message
        assert "2x1" in message


def test_one_rank_needs_no_process_group() -> None:
    mesh = Mesh(Grid(), CPU)
    assert mesh.neighbours("rows") == mesh.neighbours("cols") == (None, None)
    assert not dist.is_initialized()
