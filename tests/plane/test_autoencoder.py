"""Decodes of any autoencoder by the public API: planned, within memory, in chunks, as pictures, with a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import halovae
from halovae.distributed.ranks import Ranks
from halovae.errors import MemoryBudgetError
from halovae.grid import Grid
from halovae.models import zoo

Group = Callable[[int], Ranks]
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}


def made(name: str, *shape: int) -> tuple[Any, Tensor, Tensor]:
    """A decoder, latents, and the result of one process."""
    module, plain = zoo.build(ENTRIES[name], torch.float64), zoo.build(ENTRIES[name], torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return halovae.load(module), x, zoo.decode(plain, x)


def planned(name: str, shape: tuple[int, ...], budget: int | None) -> tuple[float, dict[str, Any], str]:
    decoder, x, expected = made(name, *shape)
    pieces = decoder.stream(x, gather="all", memory_budget=budget)
    found = pieces.join()
    assert found is not None
    report = pieces.shared_report()
    assert len(report.ranks) == 2
    assert report.decision is not None
    return (found - expected).abs().max().item(), report.decision, report.grid


def test_the_grid_is_the_one_predicted_to_be_the_fastest(ranks: Group) -> None:
    for error, decision, grid in ranks(2).run(planned, "AutoencoderKL", (1, 4, 32, 24), None):
        assert error < 1e-12
        seconds = [decision["chosen"]["seconds"], *(one["seconds"] for one in decision["others"])]
        assert decision["chosen"]["grid"] == grid
        assert seconds[0] <= 1.02 * min(seconds)
        assert {1, 2} == {decision["chosen"]["ranks"], *(one["ranks"] for one in decision["others"])}


def within() -> tuple[float, dict[str, Any], str, int]:
    decoder, x, _ = made("AutoencoderKL", 3, 4, 24, 24)
    pieces = decoder.stream(x, gather="all")
    pieces.join()
    decision = pieces.report.decision
    peaks = [one["peak"] for one in (decision["chosen"], *decision["others"]) if one["peak"] is not None]
    budget = int(1.2 * min(peaks)) + 8 * math.prod(pieces.report.frames)
    return *planned("AutoencoderKL", (3, 4, 24, 24), budget), budget


def test_a_budget_makes_ranks_share_what_each_of_them_could_not_hold(ranks: Group) -> None:
    for error, decision, grid, budget in ranks(2).run(within):
        assert error < 1e-12
        assert Grid.parse(grid).rows * Grid.parse(grid).cols == 2  # items go one after the other
        assert decision["chosen"]["peak"] * 1.15 < decision["budget"] < budget  # without pictures
        assert any(one["peak"] is not None and one["peak"] > decision["budget"] for one in decision["others"])


def too_little() -> str:
    decoder, x, _ = made("AutoencoderKL", 1, 4, 24, 24)
    with pytest.raises(MemoryBudgetError) as caught:
        decoder.decode(x, memory_budget=1000)
    return str(caught.value)


def test_a_budget_that_nothing_fits_into_is_refused_by_all_ranks(ranks: Group) -> None:
    for message in ranks(2).run(too_little):
        assert "do not fit into a memory budget of 0.0 MiB: the result of the decode takes" in message


def in_chunks() -> tuple[list[list[int]], float, list[int]]:
    decoder, x, expected = made("AutoencoderKLCogVideoX", 1, 4, 7, 6, 6)
    pieces = decoder.stream(x, grid=Grid(rows=2), gather="rank0")
    found = [one for one in pieces if one is not None]
    sizes = [list(one.shape) for one in found]
    error = (torch.cat(found, 2) - expected).abs().max().item() if found else 0.0
    return sizes, error, list(pieces.shared_report().frames)


def test_clips_come_chunk_by_chunk(ranks: Group) -> None:
    (sizes, error, frames), (none, _, _) = ranks(2).run(in_chunks)
    assert none == []
    assert len(sizes) > 1
    assert error < 1e-12
    assert sum(size[2] for size in sizes) == frames[2]


def on_one_rank() -> tuple[bool, list[int], bool]:
    decoder, x, expected = made("AutoencoderKL", 1, 4, 5, 5)
    found = decoder.decode(x, grid=Grid(), gather="rank0")
    equal = found is None or bool((found - expected).abs().max() < 1e-12)
    return found is None, list(decoder.report.shape), equal


def test_on_one_rank_the_others_compute_nothing(ranks: Group) -> None:
    first, second = ranks(2).run(on_one_rank)
    assert (first[0], second[0]) == (False, True)
    assert first[1] == second[1]
    assert first[2]


def test_pictures_in_bytes() -> None:
    decoder, x, expected = made("AutoencoderKL", 1, 4, 5, 5)
    found = decoder.decode(x, dtype=torch.uint8)
    assert found is not None
    assert found.dtype == torch.uint8
    assert torch.equal(found, ((expected.clamp(-1, 1).float() + 1) * 127.5).round().to(torch.uint8))
    with pytest.raises(TypeError, match="dtype=torch.int32: expected a floating dtype or torch.uint8"):
        decoder.decode(x, dtype=torch.int32)


def test_arguments_that_make_no_sense() -> None:
    decoder, x, _ = made("AutoencoderKL", 1, 4, 5, 5)
    with pytest.raises(ValueError, match="mode='fast': expected one of auto, single, parallel"):
        decoder.decode(x, mode="fast")
    with pytest.raises(ValueError, match="memory_budget=0: expected a number of bytes > 0"):
        decoder.decode(x, memory_budget=0)


def with_a_generator() -> float:
    """As pipelines of Stable Diffusion pass theirs."""
    decoder, x, expected = made("AutoencoderKL", 1, 4, 9, 8)
    options = {"generator": torch.Generator().manual_seed(0)}
    found = decoder.decode(x, gather="all", module_kwargs=options)
    return float((found - expected).abs().max())


def test_a_generator_is_no_difference_between_ranks(ranks: Group) -> None:
    assert max(ranks(2).run(with_a_generator)) < 1e-12


def with_hooks() -> float:
    torch.manual_seed(0)
    module = zoo.build(ENTRIES["AutoencoderKL"], torch.float32)
    plain = zoo.build(ENTRIES["AutoencoderKL"], torch.float32)
    for one in (module, plain):
        one.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)  # type: ignore[operator]
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = zoo.decode(plain, x)
    found = halovae.load(module).decode(x, gather="all")
    assert found is not None
    return float((found - expected).abs().max())


def test_modules_whose_hooks_cast_weights_are_not_planned(ranks: Group) -> None:
    assert max(ranks(2).run(with_hooks)) < 1e-5


def black() -> list[int]:
    vae = zoo.build(ENTRIES["AutoencoderKL"])
    halovae.parallelize(vae, gather="rank0")
    with torch.no_grad():
        sample = vae.decode(torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))).sample  # type: ignore[operator]
    return list(sample.shape)


def test_black_pictures_have_the_shape_of_all_rounds(ranks: Group) -> None:
    assert ranks(2).run(black) == [[3, 3, 32, 32]] * 2


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y + torch.randn_like(y)


def two_draws() -> float:
    torch.manual_seed(0)
    module = Noisy().requires_grad_(False)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    torch.manual_seed(5)
    expected = [module(x), module(x)][1]
    sharded = halovae.shard(module)
    torch.manual_seed(5)
    sharded(x, grid=Grid(), gather="rank0")
    found = sharded(x, grid=Grid(rows=2), gather="all")
    assert found is not None
    return float((found - expected).abs().max())


def test_ranks_draw_in_step_where_one_of_them_decodes(ranks: Group) -> None:
    assert max(ranks(2).run(two_draws)) < 1e-12


class Cropped(torch.nn.Module):
    """Crops a row that only the last rank has: only that rank could not hand out chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Conv3d(2, 2, 3, padding=1, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        z = torch.nn.functional.pad(z, (0, 0, 0, 1))
        return torch.cat([self.decoder(one) for one in z.split(1, 2)], 2)[..., :-1, :]


def cropped() -> float:
    torch.manual_seed(0)
    module = Cropped().requires_grad_(False)
    x = torch.randn(1, 2, 4, 6, 6, dtype=torch.float64)
    found = halovae.shard(module)(x, grid=Grid(rows=2))
    assert found is not None
    return float((found - module(x)).abs().max())


def test_ranks_agree_on_chunks(ranks: Group) -> None:
    assert max(ranks(2).run(cropped)) < 1e-12


def test_a_budget_holds_on_one_process_too() -> None:
    decoder, x, expected = made("AutoencoderKL", 4, 4, 24, 24)
    pieces = decoder.stream(x)
    pieces.join()
    unlimited = pieces.report.memory.peak_allocated
    decoder, x, expected = made("AutoencoderKL", 4, 4, 24, 24)
    pieces = decoder.stream(x, memory_budget=unlimited // 2)
    found = pieces.join()
    assert (found - expected).abs().max() < 1e-12
    assert pieces.report.memory.peak_allocated < 0.6 * unlimited
    with pytest.raises(MemoryBudgetError, match="do not fit into a memory budget"):
        decoder.decode(x, memory_budget=1)


def refused_by_one(what: str) -> str:
    decoder, x, _ = made("AutoencoderKL", 1, 4, 8, 8)
    wrong: Any = {"mode": {"mode": "fast"}, "option": {"tmeb": x}, "dtype": {"dtype": torch.int8}}[what]
    try:
        decoder.decode(x, **({"grid": Grid(rows=2)} if dist.get_rank() else wrong))
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mode", "mode='fast': expected one of"),
        ("option", "unknown option tmeb; expected mode, grid, gather"),
        ("dtype", "dtype=torch.int8: expected"),
    ],
)
def test_what_one_rank_refuses_ends_all(ranks: Group, what: str, message: str) -> None:
    first, second = ranks(2).run(refused_by_one, what)
    assert message in first
    assert "others cannot" in second
    assert message in second


def test_pictures_are_converted_before_they_are_sent(ranks: Group) -> None:
    (wide, narrow), _ = ranks(2).run(sent_bytes)
    assert narrow < wide


def sent_bytes() -> list[int]:
    decoder, x, _ = made("AutoencoderKL", 1, 4, 8, 8)
    sent = []
    for dtype in (None, torch.uint8):
        pieces = decoder.stream(x, grid=Grid(rows=2), dtype=dtype)
        pieces.join()
        sent.append(sum(rank.bytes_sent for rank in pieces.shared_report().ranks))
    return sent
