"""The walk through the decoder without data, against real decodes."""

import pytest
import torch
from models import FAMILIES, latents, vae
from torch.utils.flop_counter import FlopCounterMode

import halovae
from halovae import Grid
from halovae.memory import LiveBytes
from halovae.planning.cost import walk
from halovae.planning.plan import Plan


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "chunk"), [(1, 1), (2, 1), (5, 1), (4, 2)])
def test_flops_are_those_of_a_real_decode(family: str, frames: int, chunk: int) -> None:
    decoder, z = halovae.load(vae(family)), latents(family, frames=frames)
    with FlopCounterMode(display=False) as counter:
        decoder.decode(z, chunk=chunk)
    plan = Plan.of(len(z), Grid(), chunk)
    cost = walk(decoder.config, z.shape, torch.float32, plan)
    # The counter does not know the attention that runs on the CPU.
    attention = cost.kinds()["scaled_dot_product_attention"].flops
    assert cost.flops - attention == counter.get_total_flops()
    assert 0 < attention < 0.01 * cost.flops


def test_weights_and_caches_are_counted_in_bytes() -> None:
    decoder = halovae.load(vae("wan2.1"))
    cost = walk(decoder.config, (1, 16, 3, 6, 6), torch.bfloat16, Plan.of(1, Grid()))
    assert cost.weights == 2 * sum(parameter.numel() for parameter in decoder.model.parameters())
    assert 0 < cost.caches < cost.peak


def test_peak_and_caches_fall_with_the_ranks() -> None:
    config = halovae.load(vae("wan2.1")).config
    plans = [Plan.of(1, Grid(rows=rows)) for rows in (1, 4)]
    alone, shared = (walk(config, (1, 16, 3, 32, 32), torch.float32, plan) for plan in plans)
    assert shared.caches <= 0.3 * alone.caches
    assert shared.peak <= 0.35 * alone.peak
    assert shared.weights == alone.weights


def test_live_bytes_of_a_stream_do_not_grow_with_its_length() -> None:
    decoder, peaks = halovae.load(vae("wan2.1")), []
    for frames in (5, 9, 27):
        z = latents("wan2.1", frames=frames, height=4, width=4)
        with LiveBytes() as live:
            for _ in decoder.stream(z, dtype=torch.uint8, chunk=1):
                pass
        # The check for NaN makes one flag per number of the latents; all else is a chunk's.
        peaks.append(live.peak)
    assert max(peaks) - min(peaks) <= 0.01 * min(peaks)
