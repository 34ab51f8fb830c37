"""Simulated ranks: the frames of one device, the messages of real ranks, and times that follow from the link."""

from collections.abc import Callable

import pytest
import torch
from samples import latents, reference, vae

import halovae
from halovae import Grid
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import Link
from halovae.runtime.simulate import simulate


@pytest.mark.parametrize(
    ("family", "grid", "size"),
    [
        ("wan2.1", "8x1", (8, 5)),
        pytest.param("wan2.1", "8x8", (8, 8), marks=pytest.mark.slow),
        pytest.param("wan2.1", "2x3x2", (7, 5), marks=pytest.mark.slow),
        ("wan2.2-5b", "2x2", (9, 7)),
        pytest.param("wan2.2-5b", "4x4", (9, 7), marks=pytest.mark.slow),
        pytest.param("qwen-image", "16x1", (17, 3), marks=pytest.mark.slow),
    ],
)
def test_layouts_of_many_ranks_equal_diffusers(family: str, grid: str, size: tuple[int, int]) -> None:
    layout = Grid.parse(grid)
    z = latents(family, frames=2, height=size[0], width=size[1], batch=layout.batch)
    simulation = simulate(halovae.load(vae(family)), z, layout)
    assert (simulation.frames - reference(family, z)).abs().max() <= 1e-4
    assert [rank.rank for rank in simulation.ranks] == list(range(layout.size))


def real_traffic() -> tuple[int, int]:
    stream = halovae.load(vae("wan2.1")).stream(latents("wan2.1"), grid=Grid(rows=2))
    stream.join()
    own = stream.report.ranks[0]
    return own.messages, own.bytes_sent


def test_simulated_ranks_send_what_real_ranks_send(ranks: Callable[[int], Ranks]) -> None:
    simulation = simulate(halovae.load(vae("wan2.1")), latents("wan2.1"), Grid(rows=2))
    assert [(rank.messages, rank.bytes_sent) for rank in simulation.ranks] == ranks(2).run(real_traffic)


def test_each_rank_takes_its_part_of_the_memory() -> None:
    decoder, z = halovae.load(vae("wan2.1")), latents("wan2.1", height=16, width=8)
    peaks = {
        rows: max(rank.peak_allocated for rank in simulate(decoder, z, Grid(rows=rows)).ranks) for rows in (1, 2, 4)
    }
    assert 0.5 <= peaks[2] / peaks[1] <= 0.6
    assert 0.25 <= peaks[4] / peaks[1] <= 0.4


def test_the_time_follows_from_the_link() -> None:
    decoder, z = halovae.load(vae("wan2.1")), latents("wan2.1", frames=2)
    slow = simulate(decoder, z, Grid(rows=2), Link(latency=1.0, per_byte=1e-12))
    waits = slow.ranks[1].messages - 2  # rank 1 receives as many halos as it sends; it sends two chunks of frames
    assert slow.ranks[1].waiting >= waits
    assert slow.seconds >= slow.ranks[0].computing + waits
    alone = simulate(decoder, z, Grid())
    assert alone.ranks[0].waiting == 0
    assert alone.ranks[0].messages == 0


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(ValueError, match="only 7 latent rows"):
        simulate(halovae.load(vae("wan2.1")), latents("wan2.1"), Grid(rows=8))
    with pytest.raises(TypeError, match=r"torch\.int8"):
        simulate(halovae.load(vae("wan2.1")), latents("wan2.1").to(torch.int8), Grid(rows=2))
