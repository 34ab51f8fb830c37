"""A rank runs out of memory during a recorded decode: all ranks turn to a leaner grid together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from plane.test_autoencoder import Group, made
from torch import Tensor

from halovae.grid import Grid
from halovae.plane import operators, sharded, windows
from halovae.plane.results import Gather
from halovae.runtime.options import Choice, Sharing
from halovae.runtime.pictures import PictureStream

PLACES = {
    "exchange": (operators, "fetching"), "convolution": (windows, "_plain"), "result": (sharded, "gathered"),
    "buffers": (torch, "empty_like"),  # of an all-gather
}  # fmt: skip
CLIP = ("AutoencoderKLCogVideoX", 1, 4, 7, 6, 6)
PICTURES = ("AutoencoderKL", 2, 4, 12, 10)


def running_out(function: Callable[..., Any], calls: int, error: Exception) -> Callable[..., Any]:
    """Wrap a function: after some calls, one call runs out of memory."""
    left = [calls]

    def called(*args: Any, **kwargs: Any) -> Any:
        left[0] -= not any(isinstance(one, Tensor) and one.is_meta for one in args)  # recording takes no memory
        if left[0] < 0:
            left[0] = 2**30
            raise error
        return function(*args, **kwargs)

    return called


def short(
    model: tuple[Any, ...], grids: tuple[str, str], items: int, gather: Gather, place: str, rank: int, calls: int
) -> tuple[float, int, str, str]:
    """The error against one process, the number of pieces, the grid that was given up, and the final grid."""
    decoder, x, expected = made(*model)
    call = decoder.calls["decode"]
    first, second = map(Grid.parse, grids)
    choice = Choice(first, items, leaner=Choice(second, items))
    where, name = PLACES[place]
    failing = running_out(getattr(where, name), calls, MemoryError("std::bad_alloc"))
    mine = int(os.environ["RANK"]) == rank
    with patch.object(where, name, failing if mine else getattr(where, name)):
        sharing = Sharing(gather=gather)
        stream = PictureStream(x, choice, call.stream(x, choice, sharing, {}), call, call.everyone(sharing))
        found: list[Tensor] = [one for one in stream if one is not None]
    whole = torch.cat(found, 2 if x.ndim == 5 else 0) if found else expected
    report = stream.shared_report()
    return float((whole - expected).abs().max()), len(found), report.fell_back, report.grid


@pytest.mark.parametrize(
    ("model", "grids", "gather", "place", "rank", "calls"),
    [
        (CLIP, ("2x1", "1x2"), "rank0", "exchange", 0, 40),
        (CLIP, ("1x2", "2x1"), "all", "result", 1, 1),
        (CLIP, ("1x1", "2x1"), "rank0", "convolution", 0, 60),
        (PICTURES, ("2x1", "1x2"), "rank0", "exchange", 1, 0),
        (PICTURES, ("2x1", "1x2"), "all", "convolution", 1, 5),
        (PICTURES, ("2x1", "1x2"), "rank0", "result", 0, 0),
        (PICTURES, ("2x1", "1x2"), "all", "buffers", 1, 1),
    ],
)
def test_all_ranks_fall_back_together(
    ranks: Group, model: tuple[Any, ...], grids: tuple[str, str], gather: Gather, place: str, rank: int, calls: int
) -> None:
    outcomes = ranks(2).run(short, model, grids, model[1], gather, place, rank, calls)
    for error, _, fell_back, grid in outcomes:
        assert error < 1e-12
        assert fell_back == f"memory ran out on a rank of grid {grids[0]}"
        assert grid == grids[1]
    pieces = [count for _, count, _, _ in outcomes]
    assert pieces[0] == (3 if model is CLIP else 1)
    assert pieces[1] == (pieces[0] if gather == "all" else 0)


def test_rounds_of_a_batch_fall_back_together(ranks: Group) -> None:
    for error, _, fell_back, grid in ranks(2).run(short, PICTURES, ("2x1", "1x2"), 1, "all", "exchange", 1, 40):
        assert error < 1e-12
        assert (fell_back, grid) == ("memory ran out on a rank of grid 2x1", "1x2")


def chosen() -> tuple[float, str, str]:
    decoder, x, expected = made(*PICTURES[:1], 1, *PICTURES[2:])
    decoder.decode(x)
    (choice,) = decoder.calls["decode"]._choices.values()
    assert choice.leaner is not None
    error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    failing = running_out(windows._plain, 2, error)
    with patch.object(windows, "_plain", failing if int(os.environ["RANK"]) == 0 else windows._plain):
        stream = decoder.stream(x, gather="all")
        found = stream.join()
    return float((found - expected).abs().max()), stream.report.fell_back, str(choice.grid)


def test_mode_auto_knows_a_leaner_grid(ranks: Group) -> None:
    for error, fell_back, grid in ranks(2).run(chosen):
        assert error < 1e-12
        assert fell_back == f"memory ran out on a rank of grid {grid}"


def without(error: Exception, leaner: bool) -> str:
    decoder, x, _ = made(*PICTURES)
    call, second = decoder.calls["decode"], Choice(Grid(cols=2), 2)
    choice = Choice(Grid(rows=2), 2, leaner=second if leaner else None)
    with (
        patch.object(windows, "_plain", running_out(windows._plain, 2, error)),
        pytest.raises(type(error)) as caught,
    ):
        call.stream(x, choice, Sharing(), {}).join()
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "leaner"), [(MemoryError("std::bad_alloc"), False), (RuntimeError("something else"), True)]
)
def test_other_errors_and_those_without_a_leaner_way_stay_as_they_are(
    ranks: Group, error: Exception, leaner: bool
) -> None:
    assert ranks(2).run(without, error, leaner) == [str(error)] * 2
