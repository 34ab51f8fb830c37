"""Decodes against diffusers' own untiled decode: on one rank and on grids of real ones."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from models import FAMILIES, latents, reference, vae
from torch import Tensor

import halovae
from halovae import Grid, Mesh
from halovae.bench.ranks import Ranks
from halovae.decode import HaloDepth
from halovae.planning.plan import Chunk

BOUND = 1e-4


def decoded(family: str, z: Tensor, grid: str | None = None, **options: Any) -> Tensor | None:
    return halovae.load(vae(family)).decode(z, grid=None if grid is None else Grid.parse(grid), **options)


def off(frames: Tensor | None, wanted: Tensor) -> float:
    assert frames is not None
    assert frames.shape == wanted.shape
    return (frames - wanted).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 2, "all"])
def test_one_rank_equals_diffusers(family: str, chunk: Chunk) -> None:
    z = latents(family, frames=4, batch=2)
    assert off(decoded(family, z, chunk=chunk), reference(family, z)) <= BOUND


@pytest.mark.parametrize(("height", "width"), [(1, 200), (3, 61), (45, 2)])
def test_shapes_that_no_tile_fits_into(height: int, width: int) -> None:
    z = latents("wan2.1", frames=2, height=height, width=width)
    assert off(decoded("wan2.1", z), reference("wan2.1", z)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_one_frame(family: str) -> None:
    z = latents(family, frames=1)
    assert off(decoded(family, z), reference(family, z)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", ["2x1", "1x2", "3x1", "2x2", "2x1x2"])
@pytest.mark.parametrize("depth", [1, 2, 4, {"mid": 3, "up1": 7, "up3": 5}])
def test_a_grid_of_ranks_equals_diffusers(
    ranks: Callable[[int], Ranks], family: str, grid: str, depth: int | Mapping[str, int]
) -> None:
    layout = Grid.parse(grid)
    z = latents(family, batch=layout.batch)
    frames, *others = ranks(layout.size).run(_decode_on_rank, family, z, grid, depth)
    assert off(frames, reference(family, z)) <= BOUND
    assert others == [None] * (layout.size - 1)


def _decode_on_rank(family: str, z: Tensor, grid: str, depth: HaloDepth) -> Tensor | None:
    return decoded(family, z, grid, halo_depth=depth, chunk=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_shards_equal_diffusers(ranks: Callable[[int], Ranks], family: str) -> None:
    z = latents(family, frames=2, height=11, width=5)
    frames = ranks(3).run(_decode_on_rank, family, z, "3x1", 4)[0]
    assert off(frames, reference(family, z)) <= BOUND


def test_one_row_per_rank_equals_diffusers(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1", height=4, width=3)
    assert off(ranks(4).run(_decode_on_rank, "wan2.1", z, "4x1", 4)[0], reference("wan2.1", z)) <= BOUND


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
    from models import WIDTH

    from halovae.bench.models import random_vae

    with torch.inference_mode():
        frames: Tensor = random_vae(family, WIDTH).bfloat16().decode(z.bfloat16()).sample
    return frames


def _bf16(family: str, z: Tensor, grid: str) -> Tensor | None:
    from models import WIDTH

    from halovae.bench.models import random_vae

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


@pytest.mark.parametrize(("chunk", "lengths"), [(1, [1, 4, 4, 4]), (2, [1, 8, 4]), ("all", [1, 12])])
def test_a_stream_yields_frames_as_they_get_finished(chunk: Chunk, lengths: list[int]) -> None:
    z = latents("wan2.1", frames=4)
    pieces = list(halovae.load(vae("wan2.1")).stream(z, chunk=chunk))
    assert [piece.shape[2] for piece in pieces if piece is not None] == lengths
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
    from halovae.bench.models import random_vae

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


def test_a_decode_leaves_no_state_on_modules() -> None:
    model = halovae.load(vae("wan2.1")).model
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    halovae.Decoder(model).decode(latents("wan2.1"))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: state.keys() for name, state in before.items()} == {n: s.keys() for n, s in after.items()}
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
