"""Encodes against diffusers' own encoders: on one rank, and on several that share the rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, vae
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from halovae import Grid, Mesh
from halovae.bench.ranks import Ranks
from halovae.encode import Encoder
from halovae.loop import moments
from halovae.models.load import encoder_from_module
from halovae.planning.cost import walk_encoder

BOUND = 1e-4  # of the largest moment
CPU = torch.device("cpu")


def pictures(family: str, frames: int = 9, rows: int = 5, cols: int = 3, batch: int = 1) -> Tensor:
    """So many frames of so many latent rows and cols, in [-1, 1]."""
    factor = 16 if family == "wan2.2-5b" else 8
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(batch, 3, frames, rows * factor, cols * factor, generator=generator) - 1


def reference(family: str, clip: Tensor) -> Tensor:
    model = vae(family)
    with torch.inference_mode():
        parameters: Tensor = model.encode(clip).latent_dist.parameters
    return parameters


def encoder(family: str, mesh: Mesh | None = None) -> Encoder:
    return Encoder(encoder_from_module(vae(family)), mesh)


def encoded(family: str, clip: Tensor, **options: Any) -> Tensor:
    """On each rank."""
    return encoder(family).encode(clip, **options)


def off(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_one_rank_equals_diffusers(family: str, frames: int) -> None:
    clip = pictures(family, frames, batch=2)
    assert off(encoded(family, clip), reference(family, clip)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "grid"), [(1, Grid(rows=3)), (9, Grid(rows=3)), (5, Grid(cols=3))])
def test_ranks_equal_diffusers(ranks: Callable[[int], Ranks], family: str, frames: int, grid: Grid) -> None:
    clip = pictures(family, frames)  # 5 latent rows: the ranks have unequal shares
    found = ranks(3).run(_shared, family, clip, grid)
    assert off(found[0], reference(family, clip)) <= BOUND
    assert all(torch.equal(one, found[0]) for one in found)


def _shared(family: str, clip: Tensor, grid: Grid) -> Tensor:
    return encoder(family, Mesh(grid, CPU)).encode(clip, mode="parallel")


def test_frames_that_fill_no_group_are_left_out_as_by_diffusers() -> None:
    clip = pictures("wan2.1", 7)
    assert off(encoded("wan2.1", clip), reference("wan2.1", clip)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_counts_what_a_real_encode_does(ranks: Callable[[int], Ranks], family: str) -> None:
    clip = pictures(family, 13)
    config = encoder(family).model.config
    flops, messages, sent = ranks(3).run(_counted, family, clip)[1]
    cost = walk_encoder(config, clip.shape, torch.float32, Grid(rows=3))
    attention = cost.kinds()["scaled_dot_product_attention"].flops  # the counter does not know it on the CPU
    assert (cost.flops - attention, cost.messages, cost.bytes_sent) == (flops, messages, sent)


def _counted(family: str, clip: Tensor) -> tuple[int, int, int]:
    mesh = Mesh(Grid(rows=3), CPU)
    with FlopCounterMode(display=False) as counter:
        for _ in moments(encoder_from_module(vae(family)), clip, mesh):
            pass
    return counter.get_total_flops(), mesh.traffic.messages, mesh.traffic.bytes


def test_auto_shares_what_is_large_enough(ranks: Callable[[int], Ranks]) -> None:
    sent = ranks(3).run(_messages_in_auto)
    assert all(large > 0 and small == 0 for large, small in sent)


def _messages_in_auto() -> tuple[int, int]:
    sent = []
    for rows in (24, 3):
        mesh = Mesh(Grid(rows=3), CPU)
        encoder("wan2.1", mesh).encode(pictures("wan2.1", 5, rows=rows, cols=rows))
        sent.append(mesh.traffic.messages)
    return sent[0], sent[1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 40, 44), "pictures of 44x40: expected.*multiples of 8"),
        ((1, 4, 5, 40, 40), r"shape \[1, 4, 5, 40, 40\]: expected \[B, 3, T, H, W\]"),
        ((3, 5, 40, 40), r"expected \[B, 3, T, H, W\] for wan2.1"),
    ],
)
def test_bad_pictures_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded("wan2.1", torch.zeros(shape))


def test_pictures_in_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match="dtype torch.uint8; expected a floating dtype"):
        encoded("wan2.1", torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("rows", "mode", "message"),
    [
        ((1, 1, 1), "half", "mode='half': expected one of auto, single, parallel"),
        ((1, 1, 1), "parallel", "at most 1 ranks fit there"),
        ((1, 2, 1), "single", "all ranks must ask for the same, but they differ"),
    ],
)
def test_bad_wishes_are_refused_by_all(
    ranks: Callable[[int], Ranks], rows: tuple[int, ...], mode: str, message: str
) -> None:
    assert all(message in said for said in ranks(3).run(_refusal, rows, mode))


def _refusal(rows: tuple[int, ...], mode: Any) -> str:
    everyone = Mesh(Grid(rows=3), CPU)
    try:
        encoder("wan2.1", everyone).encode(pictures("wan2.1", 1, rows[everyone.rank]), mode=mode)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""
