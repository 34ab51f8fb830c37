"""Every autoencoder class of diffusers on a partitioned plane, compared with the plain module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halovae import Grid
from halovae.bench import on_grids
from halovae.errors import TraceError
from halovae.models import zoo
from halovae.models.zoo import Direction, Entry
from halovae.plane import context, group_norms, operators

diffusers = pytest.importorskip("diffusers")

BY_NAME = {entry.name: entry for entry in zoo.ENTRIES}
CALLS: list[tuple[str, Direction]] = [
    (entry.name, direction)
    for entry in zoo.ENTRIES
    for direction in zoo.CALLS
    if entry.shape(direction) is not None
]  # fmt: skip
GRIDS = ["2x1", "1x2", "2x2", "3x1"]
UNRECORDED = {("ConsistencyDecoderVAE", "decode")}  # draws from a generator that is an argument of the call
SLOW = {
    "AutoencoderKLAllegro (tiles)",  # thousands of operators
    "AutoencoderVidTok (causal, chunks)",
    "AutoencoderKLWan (2.1)",  # the layers of AutoencoderKLQwenImage
    "AutoencoderKLLTXVideo (timestep)",  # the one with noise has all of its layers
}
"""Variants of classes that another entry covers in the fast tests."""
TWO_RANKS = {
    "AutoencoderKLAllegro (one tile)",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLKVAEVideo",
    "AutoencoderKLMagvit",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan (2.2)",
    "Kandinsky6SRVAE",
}
"""These have so many operators that the fast tests run them on two ranks only."""
REPLAYED = [
    "AutoencoderKL",
    "AutoencoderKL (attention blocks)",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderTiny",
    "VQModel (spatial norm)",
    "AutoencoderDC (conv)",
    "AutoencoderKLKVAE",
    "AutoencoderKLHunyuanImageRefiner",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLQwenImage21",
    "AutoencoderKLLTXVideo (0.9.1, noise)",
    "AutoencoderKLMochi",
    "AutoencoderRAE (dinov2)",
    "AutoencoderKLMiniMaxH3",
]


def is_fast(name: str, direction: Direction) -> bool:
    """Decodes, and encodes of pictures, which are cheap."""
    pictures = BY_NAME[name].pictures
    return name not in SLOW and (direction == "decode" or (pictures is not None and len(pictures) == 4))


def entry_of(name: str) -> Entry:
    """The entry; the test is skipped where this diffusers does not have its class yet."""
    entry = BY_NAME[name]
    if entry.class_name != "PaellaVQModel" and not hasattr(diffusers, entry.class_name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {entry.class_name}")
    return entry


def check_eager(name: str, direction: Direction, grid: str) -> None:
    entry = entry_of(name)
    found = on_grids.eager(entry, direction, torch.float64, Grid.parse(grid))
    reference = on_grids.plain(entry, direction, torch.float64)
    assert on_grids.error([result for result, _ in found], reference) <= entry.bound
    known = zoo.FALLBACKS.get((name, direction), {})
    for _, plane in found:
        assert plane.fallbacks.keys() <= known.keys()
        assert plane.fallbacks == found[0][1].fallbacks


def check_replay(name: str, direction: Direction, grid: str) -> None:
    entry = entry_of(name)
    programs = on_grids.record(entry, direction, torch.float64, Grid.parse(grid))
    results = on_grids.replay(programs, entry, direction, torch.float64, Grid.parse(grid))
    assert on_grids.error(results, on_grids.plain(entry, direction, torch.float64)) <= entry.bound
    assert programs[0].fallbacks.keys() <= zoo.FALLBACKS.get((name, direction), {}).keys()


@pytest.mark.parametrize(("name", "direction"), [call for call in CALLS if is_fast(*call)])
def test_eager(name: str, direction: Direction) -> None:
    check_eager(name, direction, "2x1" if name in TWO_RANKS else "2x2")


@pytest.mark.parametrize("name", REPLAYED)
def test_replay(name: str) -> None:
    check_replay(name, "decode", "2x1")


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "direction"), CALLS)
def test_eager_on_four_grids(name: str, direction: Direction, grid: str) -> None:
    check_eager(name, direction, grid)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "direction"), [call for call in CALLS if call not in UNRECORDED])
def test_replay_on_four_grids(name: str, direction: Direction, grid: str) -> None:
    check_replay(name, direction, grid)


@pytest.mark.parametrize(("name", "direction"), sorted(UNRECORDED))
def test_what_cannot_be_recorded_says_so(name: str, direction: Direction) -> None:
    with pytest.raises(TraceError, match="generator that is an argument"):
        on_grids.record(entry_of(name), direction, torch.float64, Grid(rows=2))


def test_every_class_has_an_entry_or_a_reason() -> None:
    """This test fails if a new release of diffusers adds a class."""
    folder: Any = diffusers.models.autoencoders
    found = {
        name
        for name in dir(folder)
        if isinstance(getattr(folder, name), type) and issubclass(getattr(folder, name), nn.Module)
    }
    assert len(found) > 20
    known = {entry.class_name for entry in zoo.ENTRIES} | zoo.LEFT_OUT.keys()
    assert not found - known


def without_halos(fetch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`operators.fetch`, but cells of other ranks arrive as zeros."""

    def broken(x: Tensor, dim: int, mesh_dim: Any, bounds: Any, wanted: Any) -> Tensor:
        out = fetch(x, dim, mesh_dim, bounds, wanted)
        mesh = context.current()
        position = mesh.row if mesh_dim == "rows" else mesh.col
        begin = 0
        for start, stop in wanted[position]:
            for cell in range(start, stop):
                if not bounds[position] <= cell < bounds[position + 1]:
                    out.select(dim, begin + cell - start).zero_()
            begin += stop - start
        return out

    return broken


def without_others(gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`group_norms.gather`, but every rank sees its own tensor in all places."""

    def broken(x: Tensor, scope: Any, ranks: int) -> Tensor:
        return gather(x, scope, ranks) * 0 + x

    return broken


@pytest.mark.parametrize(("operator", "breaks"), [("fetch", without_halos), ("gather", without_others)])
def test_a_broken_operator_shows(operator: str, breaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_eager("AutoencoderKL", "decode", "2x2")
    module = operators if operator == "fetch" else group_norms
    monkeypatch.setattr(module, operator, breaks(getattr(module, operator)))
    with pytest.raises(AssertionError, match=r"<= 1e-12"):
        check_eager("AutoencoderKL", "decode", "2x2")
