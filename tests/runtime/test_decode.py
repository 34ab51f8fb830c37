"""Decodes against diffusers' own untiled decode: on one rank and on grids of real ones."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import FAMILIES, WIDTH, latents, reference, vae
from torch import Tensor

import halovae
from halovae import Grid, Mesh
from halovae.distributed.ranks import Ranks
from halovae.models import zoo
from halovae.models.architectures import random_vae

BOUND = 1e-4


def decoded(family: str, z: Tensor, grid: str | None = None, **options: Any) -> Tensor | None:
    return halovae.load(vae(family)).decode(z, grid=None if grid is None else Grid.parse(grid), **options)


def off(frames: Tensor | None, wanted: Tensor) -> float:
    assert frames is not None
    assert frames.shape == wanted.shape
    return (frames - wanted).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_equals_diffusers(family: str) -> None:
    z = latents(family, frames=4, batch=2)
    assert off(decoded(family, z), reference(family, z)) <= BOUND


@pytest.mark.parametrize(("height", "width"), [(1, 200), (3, 61), (45, 2)])
def test_shapes_that_no_tile_fits_into(height: int, width: int) -> None:
    z = latents("wan2.1", frames=2, height=height, width=width)
    assert off(decoded("wan2.1", z), reference("wan2.1", z)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_one_frame(family: str) -> None:
    z = latents(family, frames=1)
    assert off(decoded(family, z), reference(family, z)) <= BOUND


@pytest.mark.parametrize(
    "family",
    ["wan2.1", "wan2.2-5b", pytest.param("qwen-image", marks=pytest.mark.slow)],  # the last is the first here
)
@pytest.mark.parametrize("grid", ["2x1", "1x2", "3x1", "2x2", "2x1x2"])
def test_a_grid_of_ranks_equals_diffusers(ranks: Callable[[int], Ranks], family: str, grid: str) -> None:
    layout = Grid.parse(grid)
    z = latents(family, batch=layout.batch)
    frames, *others = ranks(layout.size).run(decoded, family, z, grid)
    assert off(frames, reference(family, z)) <= BOUND
    assert others == [None] * (layout.size - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_shards_equal_diffusers(ranks: Callable[[int], Ranks], family: str) -> None:
    z = latents(family, frames=2, height=11, width=5)
    frames = ranks(3).run(decoded, family, z, "3x1")[0]
    assert off(frames, reference(family, z)) <= BOUND


def test_one_row_per_rank_equals_diffusers(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1", height=4, width=3)
    assert off(ranks(4).run(decoded, "wan2.1", z, "4x1")[0], reference("wan2.1", z)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_further_from_fp32_than_diffusers(ranks: Callable[[int], Ranks], family: str) -> None:
    z = latents(family, frames=4, height=12, width=8, seed=1)  # as in benchmarks/exactness.py
    wanted = reference(family, z)
    theirs = _diffusers_bf16(family, z).float()
    single, sharded = _bf16(family, z, "1x1"), ranks(2).run(_bf16, family, z, "2x1")[0]
    for frames in (single, sharded):
        assert frames is not None
        assert frames.dtype == torch.bfloat16
        assert off(frames.float(), wanted) <= 1.1 * off(theirs, wanted)
        assert (frames.float() - wanted).square().mean() <= (theirs - wanted).square().mean()


def _diffusers_bf16(family: str, z: Tensor) -> Tensor:
    with torch.inference_mode():
        frames: Tensor = random_vae(family, WIDTH).bfloat16().decode(z.bfloat16()).sample
    return frames


def _bf16(family: str, z: Tensor, grid: str) -> Tensor | None:
    return halovae.load(random_vae(family, WIDTH).bfloat16()).decode(z, grid=Grid.parse(grid))


def _gathers(z: Tensor) -> list[Any]:
    return [decoded("wan2.1", z, "2x1", gather=gather) for gather in ("rank0", "all", "none")]


def test_gather_to_one_rank_to_all_or_to_none(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1")
    wanted = reference("wan2.1", z)
    (one, everyone, top), (nothing, everyone_too, bottom) = ranks(2).run(_gathers, z)
    assert nothing is None
    for frames in (one, everyone, everyone_too, torch.cat([top, bottom], dim=-2)):
        assert off(frames, wanted) <= BOUND
    assert top.shape[-2] == 4 * 8  # 7 latent rows on 2 ranks: 4 and 3


def test_a_stream_yields_frames_as_they_get_finished() -> None:
    z = latents("wan2.1", frames=4)
    pieces = list(halovae.load(vae("wan2.1")).stream(z))
    assert [piece.shape[2] for piece in pieces if piece is not None] == [1, 4, 4, 4]
    assert off(torch.cat([piece for piece in pieces if piece is not None], dim=2), reference("wan2.1", z)) <= BOUND


def test_output_dtypes() -> None:
    z = latents("wan2.1")
    wanted = reference("wan2.1", z)
    pictures = decoded("wan2.1", z, dtype=torch.uint8)
    assert pictures is not None
    assert pictures.dtype == torch.uint8
    assert (pictures.float() - (wanted + 1) * 127.5).abs().max() <= 0.5 + 1e-2
    half = decoded("wan2.1", z, dtype=torch.float16)
    assert half is not None
    assert half.dtype == torch.float16
    rounded = halovae.load(random_vae("wan2.1", 8).bfloat16()).decode(z, dtype=torch.float32)
    assert rounded is not None
    assert rounded.dtype == torch.float32


def test_denormalizing_is_what_the_pipeline_does() -> None:
    z = latents("wan2.1")
    config = vae("wan2.1").config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    assert off(decoded("wan2.1", z, denormalize=True), reference("wan2.1", z / std + mean)) <= BOUND
    assert off(decoded("wan2.1", z), reference("wan2.1", z)) <= BOUND


@pytest.mark.parametrize("shape", [(1, 4, 1, 4, 4), (1, 1, 1, 4, 4), (16, 1, 4, 4)])
def test_denormalizing_checks_latents_first(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*\[B, 16, T, H, W\] for wan2\.1"):
        decoded("wan2.1", torch.zeros(shape), denormalize=True)


def test_a_decode_leaves_no_state_on_modules() -> None:
    model = random_vae("wan2.1", 8)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    halovae.load(model).decode(latents("wan2.1"))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    for name, state in before.items():
        assert state.keys() == after[name].keys()
        assert all(value is after[name][key] or value == after[name][key] for key, value in state.items())
    assert not list(model.buffers())


def test_two_streams_in_one_thread_do_not_mix() -> None:
    decoder = halovae.load(vae("wan2.1"))
    first, second = latents("wan2.1", seed=1), latents("wan2.1", seed=2)
    pairs = list(zip(decoder.stream(first), decoder.stream(second), strict=True))
    for index, z in enumerate((first, second)):
        pieces = [pair[index] for pair in pairs]
        assert off(torch.cat([p for p in pieces if p is not None], dim=2), reference("wan2.1", z)) <= BOUND


def _at_once(zs: list[Tensor], meshes: list[Mesh | None]) -> list[Any]:
    decoder = halovae.load(vae("wan2.1"))
    results: list[Any] = [None] * len(zs)

    def work(index: int) -> None:
        try:
            results[index] = decoder.decode(zs[index], mesh=meshes[index], gather="all")
        except RuntimeError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(zs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _at_once_on_own_meshes(zs: list[Tensor]) -> list[Any]:
    return _at_once(zs, [Mesh(Grid(rows=2), torch.device("cpu")) for _ in zs])


def test_two_threads_decode_at_once() -> None:
    zs = [latents("wan2.1", seed=seed) for seed in (1, 2)]
    for frames, z in zip(_at_once(zs, [None, None]), zs, strict=True):
        assert off(frames, reference("wan2.1", z)) <= BOUND


def test_two_threads_decode_at_once_on_two_ranks_with_a_mesh_each(ranks: Callable[[int], Ranks]) -> None:
    zs = [latents("wan2.1", seed=seed) for seed in (1, 2)]
    for results in ranks(2).run(_at_once_on_own_meshes, zs):
        for frames, z in zip(results, zs, strict=True):
            assert off(frames, reference("wan2.1", z)) <= BOUND


class SlowSet(set[Any]):
    def add(self, key: Any) -> None:
        time.sleep(2)
        super().add(key)


def _second_call_meets_a_settled_program_on_rank_0_only(zs: list[Tensor]) -> list[Any]:
    decoder = halovae.load(vae("wan2.1"))
    meshes = [Mesh(Grid(rows=2), torch.device("cpu")) for _ in zs]
    sharded = decoder.calls["decode"]._sharded
    sharded._agreed = set() if meshes[0].rank == 0 else SlowSet()
    results: list[Any] = [None, None]

    def work(index: int) -> None:
        while index == 1 and meshes[0].rank == 0 and not sharded._agreed:
            time.sleep(0.01)
        results[index] = decoder.decode(zs[index], mesh=meshes[index], gather="all")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_settle_a_program_together_whatever_other_threads_do(ranks: Callable[[int], Ranks]) -> None:
    zs = [latents("wan2.1", seed=seed) for seed in (1, 2)]
    for results in ranks(2).run(_second_call_meets_a_settled_program_on_rank_0_only, zs):
        for frames, z in zip(results, zs, strict=True):
            assert off(frames, reference("wan2.1", z)) <= BOUND


def test_a_mesh_refuses_a_second_thread() -> None:
    mesh = Mesh(Grid(), torch.device("cpu"))
    mesh.grid = Grid(rows=2)  # as if there were another rank; nothing is sent
    seen: list[str] = []

    def intrude() -> None:
        try:
            with mesh.in_use(mesh.traffic):
                pass
        except RuntimeError as error:
            seen.append(str(error))

    with mesh.in_use(mesh.traffic):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    assert "make a Mesh for each" in seen[0]


def test_latents_of_different_lengths_share_a_batch() -> None:
    one, other = latents("wan2.1", 3, 6, 5)[0], latents("wan2.1", 1, 6, 5, seed=1)[0]
    decoded = halovae.load(vae("wan2.1")).decode_many([one, other])
    for z, frames in zip((one, other), decoded, strict=True):
        assert off(None if frames is None else frames.unsqueeze(0), reference("wan2.1", z.unsqueeze(0))) <= BOUND


@pytest.mark.parametrize("shapes", [[], [(16, 1, 4, 4), (16, 1, 4, 5)], [(1, 16, 1, 4, 4)]])
def test_latents_that_cannot_share_a_batch_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        halovae.load(vae("wan2.1")).decode_many([torch.zeros(shape) for shape in shapes])


def test_lengths_only_differ_where_time_is_known_to_be_causal() -> None:
    decoder = halovae.load(zoo.build(next(one for one in zoo.ENTRIES if one.name == "AutoencoderKL")))
    with pytest.raises(TypeError, match="AutoencoderKL: latents of different lengths"):
        decoder.decode_many([torch.zeros(4, 1, 8, 8)])
