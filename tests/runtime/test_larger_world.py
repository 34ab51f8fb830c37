"""halovae inside a larger job: some of the world's ranks decode, named by a `DeviceMesh` or a process group."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from samples import latents, reference, vae
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import halovae
from halovae import Grid
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import join_world

CPU = torch.device("cpu")
BOUND = 1e-4
FAMILY = "wan2.1"


def device_mesh(ranks: list[Any], names: tuple[str, ...]) -> DeviceMesh:
    join_world(CPU)
    return DeviceMesh("cpu", ranks, mesh_dim_names=names)


def errors(z: Tensor, found: list[Tensor | None]) -> list[float | None]:
    return [None if one is None else (one - reference(FAMILY, z)).abs().max().item() for one in found]


def over_mesh(z: Tensor, ranks: list[Any], names: tuple[str, ...]) -> tuple[Tensor | None, str]:
    mesh = device_mesh(ranks, names)
    if mesh.get_coordinate() is None:
        return None, ""
    stream = halovae.load(vae(FAMILY)).stream(z, mesh=mesh, gather="all")
    frames = stream.join()
    stream.shared_report()
    return frames, stream.report.grid


@pytest.mark.parametrize(
    ("ranks_of", "names", "grid", "left_out"),
    [
        ([1, 2], ("rows",), "2x1", [0]),
        ([2, 0], ("cols",), "1x2", [1]),  # not in the order of the world
        ([[2, 0, 1]], ("batch", "rows"), "3x1", []),
        ([[[1], [0]], [[3], [2]]], ("batch", "rows", "cols"), "2x2x1", []),
    ],
)
def test_a_device_mesh_says_who_decodes(
    ranks: Callable[[int], Ranks], ranks_of: list[Any], names: tuple[str, ...], grid: str, left_out: list[int]
) -> None:
    z = latents(FAMILY, frames=2, batch=2, height=6, width=6)
    found = ranks(4 if grid == "2x2x1" else 3).run(over_mesh, z, ranks_of, names)
    for rank, (error, (_, used)) in enumerate(zip(errors(z, [frames for frames, _ in found]), found, strict=True)):
        assert (error is None) == (rank in left_out)
        assert error is None or (error <= BOUND and used == grid)


def in_replicas(z: Tensor) -> list[Tensor | None]:
    """Both halves of the world decode latents of their own, on dims of one mesh."""
    mesh = device_mesh([[[0], [1]], [[2], [3]]], ("replica", "rows", "cols"))["rows", "cols"]
    own = z[dist.get_rank() // 2 :][:1]
    return [halovae.load(vae(FAMILY)).decode(own, mesh=mesh, gather="all")]


def test_dims_of_a_larger_mesh_say_who_decodes(ranks: Callable[[int], Ranks]) -> None:
    z = latents(FAMILY, frames=2, batch=2, height=6, width=6)
    for rank, found in enumerate(ranks(4).run(in_replicas, z)):
        error = errors(z[rank // 2 :][:1], found)[0]
        assert error is not None
        assert error <= BOUND


def in_group(z: Tensor, options: dict[str, Any]) -> tuple[Tensor | None, str]:
    join_world(CPU)
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None, ""
    stream = halovae.load(vae(FAMILY)).stream(z, group=group, gather="all", **options)
    frames = stream.join()
    return frames, stream.report.grid


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        ({"mode": "parallel"}, {"2x1"}),
        ({"grid": Grid(cols=2)}, {"1x2"}),
        ({"mode": "single"}, {"1x1"}),
        ({"memory_budget": 10**9}, {"1x1", "2x1", "1x2"}),
    ],
)
def test_a_process_group_shares_a_decode(
    ranks: Callable[[int], Ranks], options: dict[str, Any], grids: set[str]
) -> None:
    z = latents(FAMILY, frames=2, height=6, width=6)
    found = ranks(3).run(in_group, z, options)
    first, *others = errors(z, [frames for frames, _ in found])
    assert first is None
    assert all(error is not None and error <= BOUND for error in others)
    assert {grid for _, grid in found[1:]} <= grids


def within_budget(z: Tensor) -> tuple[str, str] | None:
    """A decode within what one rank is predicted to take, without the margin: the planned grid, and the one used."""
    join_world(CPU)
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    decoder = halovae.load(vae(FAMILY))
    free = decoder.plan(z.shape, group=group)
    assert free is not None
    peak = next(one.peak for one in free.candidates if one.grid == Grid())
    assert peak is not None
    kept = reference(FAMILY, z).numel() * 4
    planned = decoder.plan(z.shape, group=group, memory_budget=kept + peak)
    stream = decoder.stream(z, group=group, memory_budget=kept + peak)
    stream.join()
    assert planned is not None
    return str(planned.chosen.grid), stream.report.grid


def test_a_plan_for_a_group_keeps_its_budget(ranks: Callable[[int], Ranks]) -> None:
    first, *others = ranks(3).run(within_budget, latents(FAMILY, frames=2, height=12, width=12))
    assert first is None
    assert len(set(others)) == 1
    assert others[0] in (("2x1", "2x1"), ("1x2", "1x2"))


def through_diffusers(z: Tensor) -> tuple[float, float] | None:
    mesh = device_mesh([2, 1], ("rows",))
    if mesh.get_coordinate() is None:
        return None
    model: Any = vae(FAMILY)
    expected = diffusers.AutoencoderKLWan.decode(model, z).sample
    clip = expected[..., :48, :32].clamp(-1, 1)
    moments = diffusers.AutoencoderKLWan.encode(model, clip).latent_dist.parameters
    halovae.parallelize(model, mesh=mesh)
    try:
        error = (model.decode(z).sample - expected).abs().max().item()
        return error, (model.encode(clip).latent_dist.parameters - moments).abs().max().item()
    finally:
        halovae.restore(model)


def test_a_pipeline_runs_on_some_ranks(ranks: Callable[[int], Ranks]) -> None:
    z = latents(FAMILY, frames=2, height=6, width=6)
    first, *others = ranks(3).run(through_diffusers, z)
    assert first is None
    for errors_of_one in others:
        assert errors_of_one is not None
        assert max(errors_of_one) <= BOUND


def refusal(z: Tensor, what: str) -> str:
    join_world(CPU)
    group = dist.new_group([1, 2])
    options: dict[str, Any] = {
        "names": {"mesh": device_mesh([0, 1, 2], ("height",))},
        "order": {"mesh": device_mesh([[0], [1], [2]], ("rows", "batch"))},
        "both": {"mesh": device_mesh([0, 1, 2], ("rows",)), "group": group},
        "outside": {"group": group, "mode": "parallel"},
    }[what]
    if what == "outside" and dist.get_rank() > 0:
        return ""
    with pytest.raises(ValueError, match=r"mesh|group") as caught:
        halovae.load(vae(FAMILY)).decode(z, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("names", "mesh: its dims are ('height',), expected names out of ('batch', 'rows', 'cols'), in this order"),
        ("order", "mesh: its dims are ('rows', 'batch')"),
        ("both", "group and mesh both name the ranks: leave one out"),
        ("outside", "group: rank 0 is not in it, but calls"),
    ],
)
def test_ranks_that_cannot_be_are_refused(ranks: Callable[[int], Ranks], what: str, message: str) -> None:
    z = latents(FAMILY, frames=1, height=6, width=6)
    found = ranks(3).run(refusal, z, what)
    assert all(message in one for one in (found[:1] if what == "outside" else found))
