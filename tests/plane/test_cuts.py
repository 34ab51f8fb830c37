"""Masks between all cells of a plane: each rank computes only the rows that it needs."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from plane.ranks import numbers
from plane.test_trace import recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.models import zoo
from halovae.plane import constants, cuts
from halovae.plane.program import Program

FRAMES, ROWS, COLS = 3, 6, 6
CELLS = FRAMES * ROWS * COLS
GRIDS = [Grid(rows=2), Grid(cols=3), Grid(rows=2, cols=2), Grid(rows=3)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a few cells are large enough."""
    for module, name in ((cuts, "_SMALLEST"), (constants, "_LARGEST")):
        monkeypatch.setattr(module, name, 4 * CELLS * 8)


def causal(dtype: torch.dtype) -> Tensor:
    """A frame sees itself and those before it; made as HunyuanVideo makes it."""
    frames = torch.arange(1, FRAMES + 1, dtype=torch.int32).repeat_interleave(ROWS * COLS)
    x, y = torch.meshgrid(frames, frames, indexing="xy")
    return torch.where(x <= y, 0, -float("inf")).to(dtype)


def attended(x: Tensor, mask: Tensor) -> Tensor:
    tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3).unsqueeze(1)
    result = F.scaled_dot_product_attention(tokens, tokens, tokens, mask)
    return result.squeeze(1).unflatten(1, (FRAMES, ROWS, COLS)).permute(0, 4, 1, 2, 3)


def whole_mask(x: Tensor) -> Tensor:
    return attended(x, causal(x.dtype))


def mask_of_each_item(x: Tensor) -> Tensor:
    return attended(x, causal(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1).unsqueeze(1))


def computed_mask(x: Tensor) -> Tensor:
    place = torch.linspace(0, 1, CELLS, dtype=x.dtype)
    return attended(x, -(place[:, None] - place).abs().mul(3).exp() + causal(x.dtype))


def multiplied(x: Tensor) -> Tensor:
    """A factor for each cell, of a vector of all of them."""
    weights = torch.linspace(0, 1, CELLS, dtype=x.dtype).view(FRAMES, ROWS, COLS)
    return x * (weights + torch.zeros(64, 1, 1, 1, dtype=x.dtype)).mean(0)


def check(function: Callable[[Tensor], Tensor], grid: Grid) -> list[Program]:
    x = numbers(2, 4, FRAMES, ROWS, COLS)
    expected = function(x)
    found = []
    for full, program, _ in recorded(function, x, grid):
        torch.testing.assert_close(full, expected, rtol=0, atol=1e-12)
        found.append(program)
    return found


def largest_constant(program: Program) -> int:
    """Cells of the largest tensor that does not depend on the input."""
    return max(math.prod(node.meta["shape"]) for node in program.nodes() if node.meta.get("constant"))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("function", [whole_mask, mask_of_each_item, computed_mask])
def test_a_rank_computes_its_rows_of_a_mask(function: Callable[[Tensor], Tensor], grid: Grid) -> None:
    for program in check(function, grid):
        items = 2 if function is mask_of_each_item else 1
        assert largest_constant(program) <= items * CELLS * CELLS / grid.size


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_no_mask_is_exact_too(grid: Grid) -> None:
    check(multiplied, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_mask_that_is_written_to_stays_whole(grid: Grid) -> None:
    def written(x: Tensor) -> Tensor:
        mask = causal(x.dtype)
        mask[:, 0] = 0.5
        return attended(x, mask)

    for program in check(written, grid):
        assert any(node.meta["shape"] == (CELLS, CELLS) for node in program.nodes())


@pytest.mark.parametrize("grid", [Grid(rows=2), Grid(rows=2, cols=2)], ids=str)
def test_a_mask_of_the_input_is_not_taken_for_a_constant(grid: Grid) -> None:
    def of_input(x: Tensor) -> Tensor:
        ones = (x.mean() * 0 + 1).reshape(1, 1)
        return attended(x, ones.expand(CELLS, CELLS) * causal(torch.float64).clamp(min=-9))

    check(of_input, grid)


@pytest.mark.parametrize("grid", [Grid(rows=2), Grid(rows=2, cols=2)], ids=str)
def test_hunyuan_video_shares_its_masks(grid: Grid) -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == "AutoencoderKLHunyuanVideo")
    module: nn.Module = zoo.build(entry)
    x = numbers(1, *entry.latents[1:3], 8, 8, dtype=torch.float32)  # type: ignore[index]
    with torch.no_grad():
        expected = zoo.decode(module, x)
    cells = x.shape[2] * 64
    for full, program, _ in recorded(lambda z: zoo.decode(module, z), x, grid, module):
        torch.testing.assert_close(full, expected, rtol=0, atol=1e-4)
        assert not any(node.meta["shape"][-2:] == (cells, cells) for node in program.nodes())
