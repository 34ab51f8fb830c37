"""Gathers and messages over real ranks, against slices of the full tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from samples import latents, vae
from torch import Tensor

import halovae
from halovae.distributed.mesh import Mesh, mesh_for
from halovae.distributed.ranks import Ranks
from halovae.grid import Grid

CPU = torch.device("cpu")
FULL = torch.arange(2 * 3 * 2 * 9 * 11, dtype=torch.float32).view(2, 3, 2, 9, 11)


def gathered(grid: Grid, everyone: bool) -> Tensor | None:
    mesh, shards = mesh_for(grid, CPU), grid.shards(2, 9, 11)
    out = torch.zeros_like(FULL) if everyone or mesh.rank == 0 else None
    mesh.gather_frames(FULL[shards[mesh.rank].index].contiguous(), shards, out, everyone)
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


def traffic(frames: int) -> list[tuple[int, int]]:
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
        stream = decoder.stream(latents("wan2.1", frames, 16, 4), grid=Grid(rows=2), gather="none")
        for _ in stream:
            sent.append((0, 0))
    finally:
        module.batch_isend_irecv = original
    return sent[:-1]


def test_what_is_sent_does_not_grow_with_the_clip(ranks: Callable[[int], Ranks]) -> None:
    messages, volumes = zip(*ranks(2).run(traffic, 4)[0], strict=True)
    # One message per convolution of 3 x 3, of which Wan2.1's decoder has 33; and one each of keys and values.
    assert max(messages) <= 33 + 2
    # From the third latent frame on all chunks are alike: up to four new frames, and the two before them.
    assert volumes[2] == volumes[3]
    assert 0 < volumes[2] <= 6 * volumes[0]


def refused_mesh(grid: Grid) -> str:
    with pytest.raises(ValueError, match="world") as caught:
        Mesh(grid, CPU)
    return str(caught.value)


def test_a_grid_that_does_not_match_the_world_says_which_would(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(2).run(refused_mesh, Grid(rows=3)):
        assert "needs 3 ranks, but the world has 2" in message
        assert "2x1" in message


def test_one_rank_needs_no_process_group() -> None:
    assert Mesh(Grid(), CPU).transport.world == 1
    assert not dist.is_initialized()
