"""Encodes against diffusers' own: on one rank, and on several that share rows or cols, planned or as they are told."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from samples import FAMILIES, vae
from torch import Tensor

from halovae import Grid, Mesh
from halovae.distributed.mesh import mesh_for
from halovae.distributed.ranks import Ranks
from halovae.errors import MemoryBudgetError
from halovae.pipelines.within import share_encode
from halovae.planning.graphs import traced
from halovae.runtime.options import Sharing
from halovae.runtime.plane_call import PlaneCall
from halovae.runtime.vae import VAE

BOUND = 1e-4  # of the largest moment
CPU = torch.device("cpu")
Group = Callable[[int], Ranks]


def pictures(family: str, frames: int = 9, rows: int = 5, cols: int = 3, batch: int = 1) -> Tensor:
    """So many frames of so many latent rows and cols, in [-1, 1]."""
    factor = 16 if family == "wan2.2-5b" else 8
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(batch, 3, frames, rows * factor, cols * factor, generator=generator) - 1


def reference(family: str, clip: Tensor) -> Tensor:
    with torch.inference_mode():
        parameters: Tensor = vae(family).encode(clip).latent_dist.parameters
    return parameters


def encoded(family: str, clip: Tensor, **options: Any) -> Tensor:
    """On each rank."""
    moments = VAE(vae(family)).encode(clip, **options)
    assert moments is not None
    return moments


def encoded_on(family: str, clip: Tensor, grid: Grid) -> Tensor:
    return encoded(family, clip, grid=grid)


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
def test_ranks_equal_diffusers(ranks: Group, family: str, frames: int, grid: Grid) -> None:
    clip = pictures(family, frames)  # 5 latent rows: the ranks have unequal shares
    found = ranks(3).run(encoded_on, family, clip, grid)
    assert off(found[0], reference(family, clip)) <= BOUND
    assert all(torch.equal(one, found[0]) for one in found)


def test_frames_that_fill_no_group_are_left_out_as_by_diffusers() -> None:
    clip = pictures("wan2.1", 7)
    assert off(encoded("wan2.1", clip), reference("wan2.1", clip)) <= BOUND


def in_auto(rows: int) -> tuple[list[str], list[float], bool, int, Tensor]:
    """The grids that were priced and their seconds, the chosen one first; whether it fits; messages; moments."""
    call, sharing = PlaneCall(vae("wan2.1"), "encode"), Sharing(gather="all")
    clip = pictures("wan2.1", 5, rows=rows, cols=rows)
    choice = call.choose(clip, sharing, {})
    found = call.stream(clip, choice, sharing, {}).join()
    assert choice.decision is not None
    assert found is not None
    assert call.report is not None
    seen = choice.decision.candidates
    chosen = seen[0].fits(choice.decision.budget)
    return [str(one.grid) for one in seen], [one.seconds for one in seen], chosen, call.report.messages, found


@pytest.mark.parametrize("rows", [24, 3])
def test_auto_takes_what_is_predicted_to_be_the_fastest(ranks: Group, rows: int) -> None:
    for grids, seconds, fits, messages, found in ranks(3).run(in_auto, rows):
        assert set(grids) == {"1x1", "3x1", "1x3"}
        assert fits
        assert seconds[0] <= 1.02 * min(seconds)
        assert (messages > 0) is (grids[0] != "1x1")
        assert off(found, reference("wan2.1", pictures("wan2.1", 5, rows=rows, cols=rows))) <= BOUND


def large_and_small() -> list[str]:
    call, sharing = PlaneCall(vae("wan2.1"), "encode"), Sharing(gather="all")
    clips = (pictures("wan2.1", 5, rows=rows, cols=rows) for rows in (96, 3))
    return [str(call.choose(clip, sharing, {}).grid) for clip in clips]


def test_auto_shares_what_is_large_enough(ranks: Group) -> None:
    for large, small in ranks(3).run(large_and_small):
        assert large != "1x1"
        assert small == "1x1"


def sent(family: str) -> tuple[int, int]:
    """The messages of each rank, and their bytes; moments stay where they are."""
    call, sharing = PlaneCall(vae(family), "encode"), Sharing(grid=Grid(rows=3), gather="none")
    clip = pictures(family, 9)
    call.stream(clip, call.choose(clip, sharing, {}), sharing, {}).join()
    assert call.report is not None
    return call.report.messages, call.report.bytes_sent


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_know_the_messages_of_an_encode(ranks: Group, family: str) -> None:
    model, clip = vae(family), pictures(family, 9)  # 5 latent rows on 3 ranks
    multiple = 16 if family == "wan2.2-5b" else 8
    for rank, found in enumerate(ranks(3).run(sent, family)):
        cost = traced(
            lambda x: model.encode(x).latent_dist.parameters,
            model,
            clip.shape,
            clip.dtype,
            Grid(rows=3),
            rank,
            multiple,
        ).cost
        assert (cost.messages, cost.bytes_sent) == found


def fewer_rows_than_ranks() -> list[str]:
    """The grids that are candidates for pictures of 2 latent rows, for which bounds are multiples of 8 pixels."""
    call = PlaneCall(vae("wan2.1"), "encode")
    decision = call.choose(pictures("wan2.1", 1, rows=2, cols=6), Sharing(gather="all"), {}).decision
    assert decision is not None
    return sorted(str(one.grid) for one in decision.candidates)


def test_no_grid_has_more_ranks_than_latent_rows(ranks: Group) -> None:
    assert ranks(3).run(fewer_rows_than_ranks) == [["1x1", "1x3"]] * 3


def within_a_pipeline(mode: Any) -> tuple[float, float]:
    """Twice, on a mesh that is nobody else's, once with pictures of another dtype."""
    family = vae("qwen-image")
    clip = pictures("qwen-image", 1, rows=24, cols=24)
    wanted = reference("qwen-image", clip)
    mesh, busy = Mesh(Grid(rows=3), CPU), [mesh_for(grid, CPU) for grid in (Grid(), Grid(rows=3))]
    share_encode(family, Sharing(mode, gather="all"), mesh)
    try:
        with ExitStack() as stack:
            for one in busy:
                stack.enter_context(one.in_use(one.traffic))
                one._user = -1  # another thread's decode: who uses it as well is told so
            found = [family.encode(one).latent_dist.parameters for one in (clip, clip.double())]
    finally:
        del family.encode
    assert (mesh.traffic.calls > 0) is (mode == "parallel") or mode == "auto"
    return off(found[0], wanted), off(found[1], wanted)


@pytest.mark.parametrize("mode", ["auto", "parallel", "single"])
def test_a_pipelines_pictures_are_encoded_on_a_mesh_of_their_own(ranks: Group, mode: str) -> None:
    assert all(max(errors) <= BOUND for errors in ranks(3).run(within_a_pipeline, mode))


def test_a_budget_that_nothing_fits_into_is_refused() -> None:
    with pytest.raises(
        MemoryBudgetError, match="do not fit into a memory budget of 0.0 MiB: the result of the encode takes"
    ):
        encoded("wan2.1", pictures("wan2.1", 1), memory_budget=100)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 40, 44), "pictures of 44x40: expected.*multiples of 8"),
        ((1, 4, 5, 40, 40), r"shape \[1, 4, 5, 40, 40\]: expected \[B, 3, T, H, W\]"),
        ((3, 5, 40, 40), r"expected \[B, 3, T, H, W\] for wan2.1"),
    ],
)
def test_pictures_of_other_sizes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded("wan2.1", torch.zeros(shape))


def test_bad_pictures_are_refused() -> None:
    with pytest.raises(TypeError, match=r"encode of torch.uint8 of shape .*: expected floating \[B, C, H, W\] or"):
        encoded("wan2.1", torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"float32 of shape \[3, 40, 40\]: expected floating \[B, C, H, W\] or"):
        encoded("wan2.1", torch.zeros(3, 40, 40))


@pytest.mark.parametrize(
    ("rows", "mode", "message"),
    [
        ((1, 1, 1), "half", "mode='half': expected one of auto, single, parallel"),
        ((1, 1, 1), "parallel", "at most 1 ranks fit there"),
        ((3, 4, 3), "parallel", "all ranks must ask for the same, but they differ"),
        ((3, 4, 3), "auto", "all ranks must ask for the same, but they differ"),
    ],
)
def test_bad_wishes_are_refused_by_all(ranks: Group, rows: tuple[int, ...], mode: str, message: str) -> None:
    assert all(message in said for said in ranks(3).run(refusal, rows, mode))


def test_ranks_that_encode_alone_on_a_mesh_of_their_own_agree(ranks: Group) -> None:
    said = ranks(3).run(alone_on_a_mesh)
    assert all("all ranks must ask for the same, but they differ" in one for one in said)


def alone_on_a_mesh() -> str:
    mesh = Mesh(Grid(rows=3), CPU)
    call = PlaneCall(vae("wan2.1"), "encode", mesh)
    try:
        call.choose(pictures("wan2.1", 1, 3 + mesh.rank % 2), Sharing("single", gather="all"), {})
    except RuntimeError as error:
        return str(error)
    return ""


def refusal(rows: tuple[int, ...], mode: Any) -> str:
    rank = Mesh(Grid(rows=3), CPU).rank
    try:
        encoded("wan2.1", pictures("wan2.1", 1, rows[rank]), mode=mode)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""
