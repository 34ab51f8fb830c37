"""Decodes of any autoencoder as users ask for them: planned, within memory, in chunks, as pictures, with a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import halovae
from halovae.bench import zoo
from halovae.bench.ranks import Ranks
from halovae.geometry import Grid
from halovae.planning.choose import TooLittleMemory

Group = Callable[[int], Ranks]
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}


def made(name: str, *shape: int) -> tuple[Any, Tensor, Tensor]:
    """A decoder, latents, and what one process makes of them."""
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
        assert decision["chosen"]["plan"].startswith(grid)
        assert seconds[0] <= 1.02 * min(seconds)
        assert {1, 2} == {decision["chosen"]["ranks"], *(one["ranks"] for one in decision["others"])}


def within() -> tuple[float, dict[str, Any], str, int]:
    decoder, x, _ = made("AutoencoderKL", 3, 4, 24, 24)
    pieces = decoder.stream(x, gather="all")
    pieces.join()
    decision = pieces.report.decision
    peaks = [one["peak"] for one in (decision["chosen"], *decision["others"]) if one["peak"] is not None]
    budget = int(1.2 * min(peaks))
    return *planned("AutoencoderKL", (3, 4, 24, 24), budget), budget


def test_a_budget_makes_ranks_share_what_each_of_them_could_not_hold(ranks: Group) -> None:
    for error, decision, grid, budget in ranks(2).run(within):
        assert error < 1e-12
        assert Grid.parse(grid).rows * Grid.parse(grid).cols == 2  # items go one after the other
        assert decision["chosen"]["peak"] * 1.15 < budget
        assert any(one["peak"] is not None and one["peak"] > budget for one in decision["others"])


def too_little() -> str:
    decoder, x, _ = made("AutoencoderKL", 1, 4, 24, 24)
    with pytest.raises(TooLittleMemory) as caught:
        decoder.decode(x, memory_budget=1000)
    return str(caught.value)


def test_a_budget_that_nothing_fits_into_is_refused_by_all_ranks(ranks: Group) -> None:
    for message in ranks(2).run(too_little):
        assert "do not fit into a memory budget of 0 MiB" in message


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


def alone() -> tuple[bool, list[int], bool]:
    decoder, x, expected = made("AutoencoderKL", 1, 4, 5, 5)
    found = decoder.decode(x, grid=Grid(), gather="rank0")
    equal = found is None or torch.equal(found, expected)
    return found is None, list(decoder.report.shape), equal


def test_on_one_rank_the_others_compute_nothing(ranks: Group) -> None:
    first, second = ranks(2).run(alone)
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
